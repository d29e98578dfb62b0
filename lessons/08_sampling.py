# %% [markdown]
# # 08 Choosing the next token
#
# After this lesson you can
# - draw the next token greedily, by temperature, top-k, top-p and min-p, and say what each does to a distribution,
# - explain what a KV cache keeps, prove that it changes nothing, and count what it saves,
# - round weights to int8, and measure what that costs.
#
# You need lessons 02 (softmax) and 05 (the block). Time: 45 minutes, exercises included.
#
# Letters, as in the code: B sequences, T positions, V vocabulary, L layers, D channels of a head.

# %%
import time

import matplotlib.pyplot as plt
import torch
from desk import check, hint, picture, source  # noqa: F401
from torch.nn import functional as F

from glass.generate import Int8Linear, sample
from model import GPT, GPTConfig

torch.manual_seed(0)

# %% [markdown]
# ## From logits to a choice
#
# A model gives a logit for each token of the vocabulary. Softmax makes probabilities of them, and one token is drawn.
# Here are ten tokens with made-up logits, in order of likelihood:

# %%
words = "the a his my this one an every our no".split()
logits = torch.tensor([4.0, 3.2, 2.6, 2.2, 1.5, 1.0, 0.4, -0.5, -1.5, -3.0])
probs = F.softmax(logits, dim=0)
for word, p in zip(words, probs.tolist(), strict=True):
    print(f"{word:6} {p:.3f} {'#' * round(60 * p)}")

# %% [markdown]
# **Greedy** decoding takes the likeliest token every time. It is right for answers of fact, and it makes long texts
# repeat themselves. Drawing follows the probabilities: of 10,000 draws, a share p takes a token of probability p.

# %%
generator = torch.Generator().manual_seed(1)
drawn = torch.stack([sample(logits[None], generator=generator)[0] for _ in range(10_000)])
shares = torch.bincount(drawn, minlength=10) / len(drawn)
print(
    "largest difference of the shares from the probabilities:",
    round((shares - probs).abs().max().item(), 4),
)

# %% [markdown]
# ## Temperature
#
# The **temperature** divides the logits. Below 1 the likely become likelier; at 0 it is greedy; above 1 all become
# more alike. It never changes the order. Below, the **entropy** is the mean of -ln p over the distribution: 0 where
# one token is certain, ln 10 = 2.30 where all ten are alike.

# %%
for temperature in (0.5, 1.0, 2.0):
    p = F.softmax(logits / temperature, dim=0)
    entropy = -(p * p.log()).sum().item()
    print(
        f"temperature {temperature}: likeliest {p[0]:.3f}, least likely {p[-1]:.5f}, entropy {entropy:.2f} nats"
    )

# %% [markdown]
# **Exercise 8.1** At which temperature is the likeliest token (logit 4.0) exactly e times as likely as the second
# (logit 3.2)? Give a number.

# %% tags=["8.1"]
temperature = None

check("8.1", temperature)

# %% [markdown]
# ## Cutting the tail: top-k, top-p, min-p
#
# A vocabulary has tens of thousands of unlikely tokens. Each is rare, all together they are not, and one of them
# can spoil a text. Three rules cut them off; what is left is scaled to sum to 1.
#
# - **top-k** keeps the k likeliest, however likely they are.
# - **top-p** keeps the fewest that together have at least probability p. It keeps many where the model is unsure.
# - **min-p** keeps those that are at least a given share as likely as the likeliest.


# %%
def top_k(p, k):
    kept = p >= p.topk(k).values[-1]
    return p * kept / (p * kept).sum()


def top_p(p, share):
    ordered, order = p.sort(descending=True)
    held_by_likelier = ordered.cumsum(0) - ordered
    kept = torch.zeros_like(p, dtype=torch.bool)
    kept[order] = held_by_likelier < share
    return p * kept / (p * kept).sum()


def min_p(p, share):
    kept = p >= share * p.max()
    return p * kept / (p * kept).sum()


cuts = {
    "all": probs,
    "top-k 4": top_k(probs, 4),
    "top-p 0.8": top_p(probs, 0.8),
    "min-p 0.1": min_p(probs, 0.1),
}
figure, axes = plt.subplots(1, 4, figsize=(9, 2.8), sharey=True)
for axis, (name, p) in zip(axes, cuts.items(), strict=True):
    axis.bar(words, p.numpy())
    axis.set_title(f"{name}: {(p > 0).sum()} tokens")
    axis.tick_params(axis="x", rotation=90)
axes[0].set_ylabel("probability")
picture("08_cuts")

# %% [markdown]
# The same is in `glass/generate.py`. Its draws, counted, are those of the pictures:

# %%
source(sample)

# %%
for name, words_of, expected in (
    ("top-k 4", {"top_k": 4}, cuts["top-k 4"]),
    ("top-p 0.8", {"top_p": 0.8}, cuts["top-p 0.8"]),
    ("min-p 0.1", {"min_p": 0.1}, cuts["min-p 0.1"]),
):
    rows = logits.expand(20_000, -1)
    shares = torch.bincount(sample(rows, generator=generator, **words_of), minlength=10) / 20_000
    print(f"{name}: largest difference from the picture {(shares - expected).abs().max():.4f}")

# %% [markdown]
# **Exercise 8.2** Which is the smallest p (to two decimals) for which top-p keeps exactly the tokens that top-k 4
# keeps here?

# %% tags=["8.2"]
smallest_p = None

check("8.2", smallest_p)

# %% [markdown]
# ## The KV cache
#
# To write token t + 1, attention needs the keys and values of all positions before it. They do not change: nothing
# looks ahead. So they are computed once and kept: the **KV cache**. Each step then puts a single position through the
# model.

# %%
model = GPT(
    GPTConfig(vocab_size=200, block_size=256, n_layer=4, n_head=4, n_embd=64, pos="rope")
).eval()
idx = torch.randint(200, (1, 12))  # (B, T)
with torch.no_grad():
    whole = model(idx)[0]  # (1, 12, V), all positions at once
    cache = model.new_cache(batch_size=1, max_len=12)
    stepwise = torch.cat([model(idx[:, [t]], cache=cache)[0] for t in range(12)], dim=1)
print("largest difference, with and without the cache:", (stepwise - whole).abs().max().item())
print("keys of the first layer:", tuple(cache.k[0].shape), "= (B, heads, positions, D)")

# %% [markdown]
# What it saves: without it, the text so far goes through the model for every token. Counting positions that pass
# through the model for a text of n tokens, that is 1 + 2 + ... + n = n (n + 1) / 2 instead of n.


# %%
def seconds_of(n, with_cache):
    started_at = time.perf_counter()
    with torch.no_grad():
        if with_cache:
            cache = model.new_cache(batch_size=1, max_len=n)
            token = torch.zeros(1, 1, dtype=torch.int64)
            for _ in range(n):
                token = model(token, cache=cache)[0].argmax(-1)
        else:
            model.generate(torch.zeros(1, 1, dtype=torch.int64), n, temperature=0)
    return time.perf_counter() - started_at


for n in (32, 128):
    plain, cached = seconds_of(n, False), seconds_of(n, True)
    print(f"{n:3} tokens: {1e3 * plain:6.0f} ms without the cache, {1e3 * cached:6.0f} ms with it")

# %% [markdown]
# **Exercise 8.3** Write `positions_computed(prompt, n, with_cache)`: how many positions pass through the model to add n
# tokens to a prompt. The prompt itself goes through once, and gives the first new token. With the cache each
# further token costs one position.


# %% tags=["8.3"]
def positions_computed(prompt, n, with_cache):
    return None


check("8.3", positions_computed)

# %% [markdown]
# ## int8: what rounding costs
#
# Writing one token at a time, a model spends its time reading weights from memory. **Quantisation** to int8 halves
# what bfloat16 reads: each row of a matrix is divided by a scale so that its largest weight is 127, and rounded.
# The numbers that a row can then hold, multiples of its scale, are its grid.

# %%
linear = torch.nn.Linear(64, 64, bias=False)
weight = linear.weight.detach()
scale = weight.abs().amax(dim=1, keepdim=True) / 127  # (64, 1)
rounded = (weight / scale).round().to(torch.int8)
error = (rounded * scale - weight).abs()
print(
    "bytes:",
    weight.numel() * 4,
    "in float32,",
    rounded.numel() + 2 * len(scale),
    "in int8 with bfloat16 scales",
)
print("largest error in steps of the grid:", round((error / scale).max().item(), 3))

quantised = Int8Linear(linear)
theirs = quantised.weight * quantised.scale.float()[:, None]
print(
    "largest difference from Int8Linear's weights, in steps:",
    round(((theirs - weight).abs() / scale).max().item(), 2),
)

# %% [markdown]
# **Exercise 8.4** A row of weights has the largest absolute value 2.54. With 127 steps to each side, what is the
# largest error that rounding can make in a weight of that row? And how large is it if a single outlier of 25.4 joins
# the row? Give both.

# %% tags=["8.4"]
rounding_errors = None

check("8.4", rounding_errors)

# %% [markdown]
# ## Break it
#
# Forget the position in the cache: put every new token at position 0. Keys are rotated by their position, so the scores
# are wrong from the second token on, and nothing fails. In `model.py`, let `KVCache.positions` return `new` alone and
# run `python -m pytest test_all.py -k cache`. (Untrained heads look at everything alike, so below their queries are
# made larger first.)

# %%
with torch.no_grad():
    for block in model.blocks:
        block.attn.q_proj.weight *= 100
    whole = model(idx)[0]
    cache = model.new_cache(batch_size=1, max_len=12)
    wrong = []
    for t in range(12):
        x, positions, rotation, mask = model.embed(idx[:, [t]], cache)
        first = model.pos_emb(x, torch.zeros(1, dtype=torch.int64))[1]  # the rotation of position 0
        for block in model.blocks:
            x = block(x, positions, first, mask, cache)
        cache.advance(1)
        wrong.append(model.head(model.final_norm(x)))
wrong = torch.cat(wrong, dim=1)
print("standard deviation of the logits:", round(whole.std().item(), 4))
print("difference at the first token: ", (wrong - whole)[0, 0].abs().max().item())
print("difference at the twelfth token:", round((wrong - whole)[0, 11].abs().max().item(), 4))

# %% [markdown]
# ## Where it happens
#
# | what | where |
# |---|---|
# | temperature, top-k, top-p, min-p | `glass/generate.py`: `sample` |
# | the plain loop | `model.py`: `GPT.generate` |
# | the cache | `model.py`: `KVCache` |
# | the fast loop | `glass/generate.py`: `stream` |
# | int8 | `glass/generate.py`: `Int8Linear`; `python sample.py --quantize=int8` |
# | the same with your own model and sliders | `python train.py`, then `python serve.py`: the view "Next token" |
#
# ## To read
# - Holtzman et al. 2019, "The curious case of neural text degeneration", arXiv:1904.09751: top-p.
# - Nguyen et al. 2024, "Turning up the heat: min-p sampling", arXiv:2407.01082.
# - Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339: outliers of the activations.
