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
