# %% [markdown]
# # 03 Attention, from an average
#
# After this lesson you can
# - average the past of every position at once, with one matrix product,
# - turn that average into attention: queries, keys, values, scaling, a causal mask,
# - split it into heads, and let several heads share keys and values,
# - read `attention_weights` and `explicit_attention` in `model.py` line by line.
#
# You need lesson 02 (logits, softmax). Time: 45 minutes, exercises included.
#
# Letters, the same as in the code: B sequences, T positions, C channels, H heads, D channels of a head.

# %%
import matplotlib.pyplot as plt
import torch
from desk import check, hint, picture, source  # noqa: F401
from torch.nn import functional as F

from model import GPT, GPTConfig, attention_weights, causal_mask, explicit_attention

torch.manual_seed(0)

# %% [markdown]
# ## The simplest way to use the past: average it
#
# A language model predicts the next token from the tokens so far. Each position holds a vector of C
# channels. The bigram model looks at the last position alone. The simplest way to use all of the past is
# the mean: position t gets the average of positions 0 to t. It must not see t + 1, because that is what
# it has to predict.
#
# First as a loop, one position at a time:

# %%
T, C = 6, 4
x = torch.randn(T, C)

looped = torch.zeros(T, C)
for t in range(T):
    looped[t] = x[: t + 1].mean(dim=0)
print(looped)

# %% [markdown]
# The same as one product with a triangular matrix. Row t of `average` holds 1 / (t + 1) up to column t
# and 0 after it. A row of a product is a weighted sum of the rows of `x`, so row t is their mean.

# %%
average = torch.tril(torch.ones(T, T))
average = average / average.sum(dim=1, keepdim=True)  # (T, T), each row sums to 1
product = average @ x  # (T, C)
print(average)
print("largest difference from the loop:", (product - looped).abs().max().item())

# %% [markdown]
# And a third way, which looks like a detour: begin with scores of 0, put -inf where a position would look
# ahead, and apply softmax to each row. $e^0 = 1$ and $e^{-\infty} = 0$, so the weights are the same.
# The detour pays as soon as the scores are not 0: then some of the past counts more than the rest.

# %%
mask = causal_mask(torch.arange(T), T)  # (T, T): 0 or -inf
weights = F.softmax(torch.zeros(T, T) + mask, dim=1)
print("largest difference from the triangle:", (weights - average).abs().max().item())

# %% [markdown]
# **Exercise 3.1** Write `past_mean(x)` for x (T, C) without a loop and without softmax: a running sum,
# divided by how many positions are in it.


# %% tags=["3.1"]
def past_mean(x):
    return None  # (T, C)


check("3.1", past_mean)

# %% [markdown]
# ## Scores from queries and keys
#
# Which of the past matters depends on what a position looks for. So each position makes two vectors from its own: a
# **query** (what do I look for?) and a **key** (what do I have to offer?). The score of position t for position s is
# the product of query t and key s. A third vector, the **value**, is what is handed over. Each is the product of the
# position's vector with a learned matrix, called a **projection**.

# %%
D = 16
q_proj, k_proj, v_proj = (torch.randn(C, D) for _ in range(3))
q, k, v = x @ q_proj, x @ k_proj, x @ v_proj  # (T, D) each

scores = q @ k.T / D**0.5  # (T, T)
weights = F.softmax(scores + mask, dim=1)
own = weights @ v  # (T, D)

figure, axes = plt.subplots(1, 3, figsize=(8, 2.8))
for axis, matrix, title in zip(
    axes, (average, scores, weights), ("average", "scores", "weights"), strict=True
):
    image = axis.imshow(matrix.numpy())
    axis.set(title=title, xlabel="looks at", ylabel="position")
    figure.colorbar(image, ax=axis, fraction=0.046)
picture("03_average_to_attention")

# %% [markdown]
# The last row of `weights` says where position 5 looks. Every row sums to 1, and the upper right triangle
# is 0: nothing looks ahead.
#
# This is what the model runs. The function below has two more dimensions, B sequences and H heads, and we
# come to the heads soon; until then Hkv = H and group_size is 1. The last argument of `explicit_attention`, below, is
# dropout on the weights (lesson 05); `Identity` means none.

# %%
source(attention_weights)

# %%
theirs = explicit_attention(q[None, None], k[None, None], v[None, None], mask, torch.nn.Identity())
print("largest difference from model.py:", (theirs[0, 0] - own).abs().max().item())

# %% [markdown]
# ## Why divide by the root of D
#
# The product of two random vectors with D entries of variance 1 has variance D. Without the division scores grow with
# the size of a head, and softmax turns large scores into a choice of a single position: all weight in one place, and
# almost no gradient to any score, so training can hardly change them.

# %%
for size in (4, 64, 1024):
    queries, keys = torch.randn(1000, size), torch.randn(1000, size)
    raw = (queries * keys).sum(dim=1)
    largest = F.softmax(queries @ keys[:16].T, dim=1).max(dim=1).values.mean()
    largest_scaled = F.softmax(queries @ keys[:16].T / size**0.5, dim=1).max(dim=1).values.mean()
    print(
        f"D = {size:4}: variance of a score {raw.var():7.1f}; mean of the largest of 16 weights "
        f"{largest:.2f}, with the division {largest_scaled:.2f}"
    )

# %% [markdown]
# **Exercise 3.2** Let every entry of a query have variance 4 instead of 1 (a standard deviation of 2), keys
# still 1. What must the scores be divided by, for D = 64, so that their variance is 1? Give a number.

# %% tags=["3.2"]
divisor = None

check("3.2", divisor)

# %% [markdown]
# ## Many heads
#
# One softmax gives one pattern of looking. Two things are often wanted at once: the previous character, and the last
# line break. So the C channels are split into H heads of D = C / H channels; each head attends on its own, and their
# outputs are joined again: **multi-head attention**. In a model a last learned matrix, `o_proj`, mixes the joined
# heads. (These heads are parts of attention. They have nothing to do with the head of lesson 02, the last matrix of
# the model.)

# %%
B, H, C = 2, 4, 32
D = C // H
x = torch.randn(B, T, C)
projections = [torch.randn(C, C) / C**0.5 for _ in range(3)]


def split_heads(y):
    return y.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)


q, k, v = (split_heads(x @ projection) for projection in projections)
heads = F.softmax(q @ k.transpose(-2, -1) / D**0.5 + mask, dim=-1) @ v  # (B, H, T, D)
joined = heads.transpose(1, 2).reshape(B, T, C)
print("heads", tuple(heads.shape), "joined", tuple(joined.shape))

one_by_one = []
for h in range(H):
    channels = slice(h * D, (h + 1) * D)
    queries, keys, values = (x @ projection[:, channels] for projection in projections)
    one_by_one.append(F.softmax(queries @ keys.transpose(1, 2) / D**0.5 + mask, dim=-1) @ values)
print(
    "largest difference from head by head:",
    (torch.cat(one_by_one, dim=2) - joined).abs().max().item(),
)

# %% [markdown]
# ## Heads that share keys and values
#
# While a model writes, the keys and values of every earlier position stay in memory (lesson 08). Llama 3 8B
# has 32 query heads but only 8 heads of keys and values: each serves a group of four. This is
# **grouped-query attention**; with a single head of keys and values it is **multi-query attention**.

# %%
Hkv = 2
k, v = torch.randn(B, Hkv, T, D), torch.randn(B, Hkv, T, D)
group_size = H // Hkv
repeated = F.softmax(
    q @ k.repeat_interleave(group_size, 1).transpose(-2, -1) / D**0.5 + mask, dim=-1
)
shared = attention_weights(q, k, mask)
print("largest difference from repeated keys:", (shared - repeated).abs().max().item())
print(f"numbers kept for a position: {2 * H * D} with {H} heads, {2 * Hkv * D} with {Hkv}")

# %% [markdown]
# **Exercise 3.3** Llama 3 8B has 32 layers, 8 heads of keys and values and D = 128. How many bytes do the keys and
# values of one sequence of 8,192 positions take in bfloat16 (2 bytes a number)? And how many would it take with 32
# heads of keys and values? Give a tuple of the two numbers.

# %% tags=["3.3"]
cache_bytes = None

check("3.3", cache_bytes)

# %% [markdown]
# ## In a whole model
#
# `attention_maps` gives the weights of every layer and head of a model. Here the model is untrained: every
# head looks at its past almost evenly, so it begins as the average that we began with.

# %%
model = GPT(GPTConfig(vocab_size=65, block_size=32, n_layer=2, n_head=4, n_embd=64))
idx = torch.randint(65, (1, 32))  # (B, T)
maps = model.attention_maps(idx)  # (L, B, H, T, T)
even = torch.tril(torch.ones(32, 32))
even = even / even.sum(dim=1, keepdim=True)
print(
    "shape",
    tuple(maps.shape),
    "- largest difference from the average:",
    (maps - even).abs().max().item(),
)

# %% [markdown]
# **Exercise 3.4** Write `attend(x, attention)`: the output of one attention layer of the model, for x (T, C), from
# its own projections `attention.q_proj`, `k_proj`, `v_proj`, `o_proj` (each is called like a function) and
# `attention.n_head` heads.  It is compared with the layer itself, to 1e-5. (The order of positions plays no role in
# this layer: lesson 04.)


# %% tags=["3.4"]
def attend(x, attention):
    return None  # (T, C)


check("3.4", attend)

# %% [markdown]
# ## Break it
#
# Turn the mask round, so that a position sees what comes after it and not what came before, and the model can read
# the answer. Below, an untrained model's logits at position 3 are compared before and after the last token changes:
# they must not differ. In `model.py`, change `>` to `<` in `causal_mask` and run `python -m pytest test_all.py -k
# causal`: what fails, and why do the losses of a training run with that line look so good?

# %%
changed = idx.clone()
changed[0, -1] = (idx[0, -1] + 1) % 65
with torch.no_grad():
    before, after = model(idx)[0], model(changed)[0]
print("with the mask, position 3 moves by", (after - before)[0, 3].abs().max().item())

attend_all = torch.zeros_like(mask)
without = attention_weights(q, k, attend_all)
print(
    "without it, position 0 gives positions ahead a weight of",
    round(without[0, 0, 0, 1:].sum().item(), 3),
)

# %% [markdown]
# ## Where it happens
#
# | what | where |
# |---|---|
# | weights, mask, softmax | `model.py`: `attention_weights`, `causal_mask` |
# | weights times values | `model.py`: `explicit_attention` |
# | the same without the T x T matrix | `model.py`: `sdpa_attention` |
# | projections, heads | `model.py`: `Attention` |
# | maps of a trained model | `python sample.py --show_attention=FILE.png`, and the page of `serve.py` |
#
# ## To read
# - Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762: section 3.2.
# - Ainslie et al. 2023, "GQA", arXiv:2305.13245: heads that share keys and values.
# - Dao et al. 2022, "FlashAttention", arXiv:2205.14135: why the matrix need not be kept.
