# Solutions of the exercises, by their numbers. Each replaces the cell of the same number in its lesson.

# %% tags=["1.1"]
def encode_words(text, ids):
    return [ids.get(word, ids["<|unk|>"]) for word in re.findall(r"\w+|[^\w\s]", text)]


check("1.1", encode_words)


# %% tags=["1.2"]
def utf8_length(character):
    code = ord(character)
    if code < 2**7:
        return 1
    if code < 2**11:
        return 2
    return 3 if code < 2**16 else 4


check("1.2", utf8_length)


# %% tags=["1.3"]
first_merges = ["co", "nu", "coco"]

check("1.3", first_merges)


# %% tags=["1.4"]
def encode_word(word, ranks):
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        joined = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
        candidates = [(ranks[pair], i) for i, pair in enumerate(joined) if pair in ranks]
        if not candidates:
            return [ranks[part] for part in parts]
        _, i = min(candidates)
        parts[i : i + 2] = [joined[i]]


check("1.4", encode_word)


# %% tags=["1.5"]
names = {"Анна": 8, "Άννα": 8, "अन्ना": 15, "安娜": 6}

check("1.5", names)


# %% tags=["2.1"]
def n_windows(N, T, stride):
    return (N - T - 1) // stride + 1


check("2.1", n_windows)


# %% tags=["2.2"]
mean_loss = (math.log(2) + math.log(4) + math.log(8)) / 3
three_measures = mean_loss, math.exp(mean_loss), mean_loss / math.log(2)

check("2.2", three_measures)


# %% tags=["2.3"]
def bits_per_byte(losses, text):
    bits = losses.sum().item() / math.log(2)
    return bits / len(text.encode("utf-8"))


check("2.3", bits_per_byte)


# %% tags=["2.4"]
def logits_gradient(z, target):
    gradient = F.softmax(z, dim=0)
    gradient[target] -= 1
    return gradient


check("2.4", logits_gradient)


# %% tags=["3.1"]
def past_mean(x):
    counts = torch.arange(1, len(x) + 1)[:, None]  # (T, 1)
    return x.cumsum(dim=0) / counts


check("3.1", past_mean)


# %% tags=["3.2"]
divisor = (64 * 4) ** 0.5

check("3.2", divisor)


# %% tags=["3.3"]
bytes_of_a_head = 2 * 32 * 128 * 8192 * 2
cache_bytes = 8 * bytes_of_a_head, 32 * bytes_of_a_head

check("3.3", cache_bytes)


# %% tags=["3.4"]
def attend(x, attention):
    T, C = x.shape
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    q, k, v = (
        each(x).view(T, attention.n_head, -1).transpose(0, 1) for each in projections
    )  # (H, T, D)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5  # (H, T, T)
    weights = F.softmax(scores + causal_mask(torch.arange(T), T), dim=-1)
    return attention.o_proj((weights @ v).transpose(0, 1).reshape(T, C))


check("3.4", attend)


# %% tags=["4.1"]
def product_at(n, w):
    return (n * w).cos().sum()


check("4.1", product_at)


# %% tags=["4.2"]
def rotate(x, positions, w):
    x1, x2 = x.chunk(2, dim=-1)  # (T, D / 2) each
    angles = positions[:, None] * w  # (T, D / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


check("4.2", rotate)


# %% tags=["4.3"]
def score_at(q, k, n, w):
    q1, q2 = q.chunk(2)  # the key stays at 0, the query goes to n
    cos, sin = (n * w).cos(), (n * w).sin()
    rotated = torch.cat([q1 * cos - q2 * sin, q2 * cos + q1 * sin])
    return rotated @ k / len(q) ** 0.5


check("4.3", score_at)


# %% tags=["4.4"]
r = (8192 / 4096 - 1) / (4 - 1)
scaled_wavelengths = 1000, 4096 / (r + (1 - r) / 8), 8 * 10_000

check("4.4", scaled_wavelengths)


# %% tags=["5.1"]
def rms_norm(x):
    mean_square = x.square().mean(dim=-1, keepdim=True)
    return x / (mean_square + 1e-5).sqrt()


check("5.1", rms_norm)


# %% tags=["5.2"]
after_dropout = 0, 0.6 / 0.8, 0.6

check("5.2", after_dropout)


# %% tags=["5.3"]
def count(C, L, tied, qkv_bias):
    V, T = 50_257, 1024
    attention = 4 * C * C + C + (3 * C if qkv_bias else 0)
    mlp = 2 * C * (4 * C) + 4 * C + C
    block = attention + mlp + 2 * (2 * C)
    head = 0 if tied else V * C
    return V * C + T * C + L * block + 2 * C + head


check("5.3", count)


# %% tags=["5.4"]
V, C, inner, keys = 128256, 4096, 14336, 8 * 128
block = 2 * C * C + 2 * C * keys + 3 * C * inner + 2 * C
llama3_8b = 32 * block + C + 2 * V * C

check("5.4", llama3_8b)


# %% tags=["6.1"]
limit = 2 / 50

check("6.1", limit)


# %% tags=["6.2"]
def adamw(w, g, m, v, t, eta=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1):
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    w = w - eta * weight_decay * w - eta * m_hat / (v_hat.sqrt() + eps)
    return w, m, v


check("6.2", adamw)


# %% tags=["6.3"]
p = (60 - 20) / (100 - 20)
rate = 1e-4 + (1e-3 - 1e-4) * 0.5 * (1 + math.cos(math.pi * p))

check("6.3", rate)


# %% tags=["6.4"]
def accumulate(model, idx, targets, n):
    total = 0.0
    for rows in zip(idx.chunk(n), targets.chunk(n), strict=True):
        loss = model(*rows)[1] / n
        loss.backward()
        total += loss.item()
    return total


check("6.4", accumulate)


# %% tags=["7.1"]
checkpoint_bytes = 3 * 4 * 124_439_808

check("7.1", checkpoint_bytes)


# %% tags=["7.2"]
refused = {"n_layer", "qk_norm", "dataset"}

check("7.2", refused)


# %% tags=["7.3"]
after_a_kill = 1200, 34

check("7.3", after_a_kill)


# %% tags=["8.1"]
temperature = 0.8

check("8.1", temperature)


# %% tags=["8.2"]
smallest_p = int(probs[:3].sum().item() * 100) / 100 + 0.01

check("8.2", smallest_p)


# %% tags=["8.3"]
def positions_computed(prompt, n, with_cache):
    if with_cache:
        return prompt + n - 1
    return sum(prompt + i for i in range(n))


check("8.3", positions_computed)


# %% tags=["8.4"]
rounding_errors = 2.54 / 127 / 2, 25.4 / 127 / 2

check("8.4", rounding_errors)


# %% tags=["9.1"]
def read_tensor(data, name):
    (n_header,) = struct.unpack("<Q", data[:8])
    about = json.loads(data[8 : 8 + n_header])[name]
    begin, end = about["data_offsets"]
    part = data[8 + n_header + begin : 8 + n_header + end]
    return torch.frombuffer(bytearray(part), dtype=torch.float32).view(about["shape"])


check("9.1", read_tensor)


# %% tags=["9.2"]
our_shapes = (C, C), (C, C), (4 * C, C), (V, C)

check("9.2", our_shapes)


# %% tags=["9.3"]
def split_qkv(c_attn):
    return [part.T for part in c_attn.chunk(3, dim=1)]


check("9.3", split_qkv)


# %% tags=["9.4"]
silent = ["attn.c_proj"]

check("9.4", silent)


# %% tags=["9.5"]
def to_halves(weight, n_head):
    pairs = weight.view(n_head, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


check("9.5", to_halves)


# %% tags=["10.1"]
chosen = 0, 1

check("10.1", chosen)


# %% tags=["10.2"]
s, n, z = 0.8, 100, 1.96
half = z * math.sqrt(s * (1 - s) / n + z * z / (4 * n * n))
middle, size = s + z * z / (2 * n), 1 + z * z / n
interval = (middle - half) / size, (middle + half) / size

check("10.2", interval)


# %% tags=["10.3"]
items_needed = (1.96 * 0.5 / 0.01) ** 2

check("10.3", items_needed)


# %% tags=["10.4"]
def shares_words(item, text, n):
    return bool(grams(item.lower().split(), n) & grams(text.lower().split(), n))


check("10.4", shares_words)


# %% tags=["11.1"]
def last_vectors(hidden, lengths):
    return hidden[torch.arange(len(hidden)), lengths - 1]


check("11.1", last_vectors)


# %% tags=["11.2"]
precision, recall = 72 / 90, 72 / 100
spam_figures = precision, recall, 2 * precision * recall / (precision + recall), 900 / 1000

check("11.2", spam_figures)


# %% tags=["11.3"]
lora_weights = 8 * 3072 + 768 * 8

check("11.3", lora_weights)


# %% tags=["12.1"]
flags = [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]

check("12.1", flags)


# %% tags=["12.2"]
def masked_loss(logits, targets, counts):
    logprobs = F.log_softmax(logits, dim=-1)
    came = logprobs.gather(1, targets[:, None])[:, 0]
    return -came[counts].mean()


check("12.2", masked_loss)


# %% tags=["12.3"]
def begins_right(texts, wanted):
    return sum(text.startswith(right) for text, right in zip(texts, wanted, strict=True)) / len(
        texts
    )


check("12.3", begins_right)


# %% tags=["13.1"]
bradley_terry = torch.sigmoid(torch.tensor(1.0)).item(), torch.tensor(9.0).log().item()

check("13.1", bradley_terry)


# %% tags=["13.2"]
def kl(p, q):
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum()


check("13.2", kl)


# %% tags=["13.3"]
margins = torch.tensor([0.1 * ((-20 + 22) - (-30 + 25)), 0.1 * ((-12 + 12) - (-14 + 18))])
dpo_losses = tuple((-F.logsigmoid(margins)).tolist())

check("13.3", dpo_losses)


# %% tags=["13.4"]
group = torch.tensor([1.0, 1.0, 1.0, 0.0])
group_advantages = ((group - group.mean()) / group.std(correction=0)).tolist(), [0.0] * 4

check("13.4", group_advantages)


# %% tags=["14.1"]
looks_at = 25 - 20 + 1

check("14.1", looks_at)


# %% tags=["14.2"]
def induction_score(weights, n):
    t = torch.arange(n, 2 * n)
    return weights[t, t - n + 1].mean()


check("14.2", induction_score)


# %% tags=["14.3"]
def loss_without(model, idx, layer, head):
    mask = torch.zeros(len(model.blocks), model.config.n_head + 1, dtype=torch.bool)
    mask[layer, head] = True
    with torch.no_grad(), switched_off(model, mask):
        return model(idx[:, :-1], idx[:, 1:])[1]


check("14.3", loss_without)


# %% tags=["14.4"]
def lens_probability(model, stream, token):
    logits = model.head(model.final_norm(stream))
    return logits.softmax(-1)[token]


check("14.4", lens_probability)


# %% tags=["15.1"]
def own_rows(step, rank, n):
    share = 8 // n
    first = step * 8 + rank * share
    return list(range(first, first + share))


check("15.1", own_rows)


# %% tags=["15.2"]
def ring_bytes(n_parameters, n):
    return 2 * (n - 1) / n * n_parameters * 4


milliseconds = ring_bytes(124_439_808, 8) / 25e9 * 1000

check("15.2", (ring_bytes, milliseconds))


# %% tags=["15.3"]
n_devices_needed = 4

check("15.3", n_devices_needed)


# %% tags=["15.4"]
losses = (25.0 + 60.0) / (10 + 30), (25.0 / 10 + 60.0 / 30) / 2

check("15.4", losses)
