# A plausible wrong answer to each exercise, for the tests: each must be refused with a reason.

# %% tags=["1.1"]
def encode_words(text, ids):
    return [ids[word] for word in text.split() if word in ids]


check("1.1", encode_words)


# %% tags=["1.2"]
def utf8_length(character):
    return 1 if ord(character) < 256 else 2


check("1.2", utf8_length)


# %% tags=["1.3"]
first_merges = ["co", "coco", "nu"]

check("1.3", first_merges)


# %% tags=["1.4"]
def encode_word(word, ranks):
    found = []
    while word:
        n = next(n for n in range(len(word), 0, -1) if word[:n] in ranks)
        found.append(ranks[word[:n]])
        word = word[n:]
    return found


check("1.4", encode_word)


# %% tags=["1.5"]
names = {"Анна": 4, "Άννα": 4, "अन्ना": 5, "安娜": 2}

check("1.5", names)


# %% tags=["2.1"]
def n_windows(N, T, stride):
    return (N - T) // stride + 1


check("2.1", n_windows)


# %% tags=["2.2"]
mean_probability = (1 / 2 + 1 / 4 + 1 / 8) / 3
three_measures = -math.log(mean_probability), 1 / mean_probability, -math.log2(mean_probability)

check("2.2", three_measures)


# %% tags=["2.3"]
def bits_per_byte(losses, text):
    return losses.sum().item() / math.log(2) / len(text)


check("2.3", bits_per_byte)


# %% tags=["2.4"]
def logits_gradient(z, target):
    gradient = -F.softmax(z, dim=0)
    gradient[target] += 1
    return gradient


check("2.4", logits_gradient)


# %% tags=["3.1"]
def past_mean(x):
    return x.cumsum(dim=0) / len(x)


check("3.1", past_mean)


# %% tags=["3.2"]
divisor = 8

check("3.2", divisor)


# %% tags=["3.3"]
cache_bytes = 32 * 8 * 128 * 8192 * 2, 32 * 32 * 128 * 8192 * 2

check("3.3", cache_bytes)


# %% tags=["3.4"]
def attend(x, attention):
    T, C = x.shape
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    q, k, v = (each(x).view(T, attention.n_head, -1).transpose(0, 1) for each in projections)
    weights = F.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1)
    return attention.o_proj((weights @ v).transpose(0, 1).reshape(T, C))


check("3.4", attend)


# %% tags=["4.1"]
def product_at(n, w):
    return (n * w).sin().sum()


check("4.1", product_at)


# %% tags=["4.2"]
def rotate(x, positions, w):
    x1, x2 = x[:, 0::2], x[:, 1::2]
    angles = positions[:, None] * w
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).view(x.shape)


check("4.2", rotate)


# %% tags=["4.3"]
def score_at(q, k, n, w):
    k1, k2 = k.chunk(2)
    cos, sin = (n * w).cos(), (n * w).sin()
    rotated = torch.cat([k1 * cos - k2 * sin, k2 * cos + k1 * sin])
    return q @ rotated / len(q) ** 0.5


check("4.3", score_at)


# %% tags=["4.4"]
scaled_wavelengths = 1000, (4096 + 2 * 8 * 4096) / 3, 8 * 10_000

check("4.4", scaled_wavelengths)


# %% tags=["5.1"]
def rms_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


check("5.1", rms_norm)


# %% tags=["5.2"]
after_dropout = 0, 0.6, 0.48

check("5.2", after_dropout)


# %% tags=["5.3"]
def count(C, L, tied, qkv_bias):
    attention = 4 * C * C + C + (3 * C if qkv_bias else 0)
    block = attention + 8 * C * C + 5 * C + 2 * (2 * C)
    return 50_257 * C + 1024 * C + L * block + 2 * C  # the head is forgotten


check("5.3", count)


# %% tags=["5.4"]
llama3_8b = 32 * (4 * 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096) + 4096 + 2 * 128256 * 4096

check("5.4", llama3_8b)


# %% tags=["6.1"]
limit = 2

check("6.1", limit)


# %% tags=["6.2"]
def adamw(w, g, m, v, t, eta=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1):
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    return w - eta * weight_decay * w - eta * m / (v.sqrt() + eps), m, v


check("6.2", adamw)


# %% tags=["6.3"]
rate = 1e-4 + (1e-3 - 1e-4) * 0.5 * (1 + math.cos(math.pi * 60 / 100))

check("6.3", rate)


# %% tags=["6.4"]
def accumulate(model, idx, targets, n):
    total = 0.0
    for rows in zip(idx.chunk(n), targets.chunk(n), strict=True):
        loss = model(*rows)[1]
        loss.backward()
        total += loss.item() / n
    return total


check("6.4", accumulate)


# %% tags=["7.1"]
checkpoint_bytes = 4 * 124_439_808

check("7.1", checkpoint_bytes)


# %% tags=["7.2"]
refused = {"n_layer", "batch_size", "dataset"}

check("7.2", refused)


# %% tags=["7.3"]
after_a_kill = 1234, 0

check("7.3", after_a_kill)


# %% tags=["8.1"]
temperature = 1.25

check("8.1", temperature)


# %% tags=["8.2"]
smallest_p = 0.8

check("8.2", smallest_p)


# %% tags=["8.3"]
def positions_computed(prompt, n, with_cache):
    return prompt + n if with_cache else sum(range(prompt + n))


check("8.3", positions_computed)


# %% tags=["8.4"]
rounding_errors = 0.02, 0.2

check("8.4", rounding_errors)


# %% tags=["9.1"]
def read_tensor(data, name):
    (n_header,) = struct.unpack("<Q", data[:8])
    about = json.loads(data[8 : 8 + n_header])[name]
    begin, end = about["data_offsets"]
    numbers = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.float32)
    return numbers.view(about["shape"])


check("9.1", read_tensor)


# %% tags=["9.2"]
our_shapes = (C, C), (C, C), (C, 4 * C), (V, C)

check("9.2", our_shapes)


# %% tags=["9.3"]
def split_qkv(c_attn):
    return c_attn.chunk(3, dim=1)


check("9.3", split_qkv)


# %% tags=["9.4"]
silent = ["attn.c_proj", "mlp.c_proj"]

check("9.4", silent)


# %% tags=["9.5"]
def to_halves(weight, n_head):
    return torch.cat([weight[0::2], weight[1::2]])


check("9.5", to_halves)


# %% tags=["10.1"]
chosen = 0, 2

check("10.1", chosen)


# %% tags=["10.2"]
interval = 0.8 - 1.96 * 0.04, 0.8 + 1.96 * 0.04

check("10.2", interval)


# %% tags=["10.3"]
items_needed = 2401

check("10.3", items_needed)


# %% tags=["10.4"]
def shares_words(item, text, n):
    return len(set(item.lower().split()) & set(text.lower().split())) >= n


check("10.4", shares_words)


# %% tags=["11.1"]
def last_vectors(hidden, lengths):
    return hidden[:, -1]


check("11.1", last_vectors)


# %% tags=["11.2"]
spam_figures = 0.72, 0.8, 0.76, 0.9

check("11.2", spam_figures)


# %% tags=["11.3"]
lora_weights = 768 * 3072

check("11.3", lora_weights)


# %% tags=["12.1"]
flags = [0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0]

check("12.1", flags)


# %% tags=["12.2"]
def masked_loss(logits, targets, counts):
    return (F.cross_entropy(logits, targets, reduction="none") * counts).mean()


check("12.2", masked_loss)


# %% tags=["12.3"]
def begins_right(texts, wanted):
    return sum(text == right for text, right in zip(texts, wanted, strict=True)) / len(texts)


check("12.3", begins_right)


# %% tags=["13.1"]
bradley_terry = 0.75, 0.9

check("13.1", bradley_terry)


# %% tags=["13.2"]
def kl(p, q):
    return (p * (p / q).log()).sum()


check("13.2", kl)


# %% tags=["13.3"]
dpo_losses = tuple((-F.logsigmoid(torch.tensor([0.1 * 10, 0.1 * 2]))).tolist())

check("13.3", dpo_losses)


# %% tags=["13.4"]
group_advantages = [0.5, 0.5, 0.5, -1.5], [0.0] * 4

check("13.4", group_advantages)


# %% tags=["14.1"]
looks_at = 5

check("14.1", looks_at)


# %% tags=["14.2"]
def induction_score(weights, n):
    t = torch.arange(n, 2 * n)
    return weights[t, t - n].mean()


check("14.2", induction_score)


# %% tags=["14.3"]
def loss_without(model, idx, layer, head):
    return model(idx[:, :-1], idx[:, 1:])[1]


check("14.3", loss_without)


# %% tags=["14.4"]
def lens_probability(model, stream, token):
    return model.head(stream).softmax(-1)[token]


check("14.4", lens_probability)


# %% tags=["15.1"]
def own_rows(step, rank, n):
    return list(range(step * 8 + rank, step * 8 + 8, n))


check("15.1", own_rows)


# %% tags=["15.2"]
def ring_bytes(n_parameters, n):
    return (n - 1) / n * n_parameters * 4


milliseconds = 10.0

check("15.2", (ring_bytes, milliseconds))


# %% tags=["15.3"]
n_devices_needed = 2

check("15.3", n_devices_needed)


# %% tags=["15.4"]
losses = 2.25, 2.25

check("15.4", losses)
