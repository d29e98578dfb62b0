# %% [markdown]
# # 04 Positions
#
# After this lesson you can
# - show that one layer of attention alone does not know the order of the past,
# - add learned positions to a model, and say what they cost and where they end,
# - write RoPE as a rotation of pairs of channels, and prove that distance alone decides,
# - say what theta, Llama 3.1's scaling and QK-norm change, in numbers.
#
# You need lesson 03 (queries, keys, heads). Time: 40 minutes, exercises included.
#
# Letters, as in the code: B sequences, T positions, C channels, H heads, D channels of a head. A query stands
# at position t, a key at position s.

# %%
import math

import matplotlib.pyplot as plt
import torch
from desk import check, hint, picture, source  # noqa: F401
from torch.nn import functional as F

from model import (
    GPT,
    PRESETS,
    GPTConfig,
    apply_rope,
    attention_weights,
    causal_mask,
    normalise,
    rope_frequencies,
    rope_rotation,
)

# %% [markdown]
# ## Attention does not know the order
#
# In lesson 03 a weight came from the content of two positions alone. The mask hides what comes later, but of the past
# it says nothing: which token is near and which is far makes no difference. So if the earlier tokens change places,
# the last position gets the same output. (This is exact for one layer. In a second layer the earlier positions have
# seen different pasts already, so a deep model can learn something about order from the mask alone: Haviv et al.
# 2022, arXiv:2203.16634.) For language that is not enough: "dog bites man" is not "man bites dog".

# %%
torch.manual_seed(0)
T, C = 6, 16
q_proj, k_proj, v_proj = (torch.randn(C, C) / C**0.5 for _ in range(3))
mask = causal_mask(torch.arange(T), T)  # (T, T)


def attend(x):
    q, k, v = ((x @ each)[None, None] for each in (q_proj, k_proj, v_proj))  # (1, 1, T, C)
    return (attention_weights(q, k, mask) @ v)[0, 0]  # (T, C)


x = torch.randn(T, C)
order = [3, 0, 4, 1, 2, 5]  # the last position stays
difference = (attend(x[order]) - attend(x))[-1].abs().max().item()
print("the last output changes by", difference, "when the past is shuffled")

# %% [markdown]
# ## Learned positions
#
# The first remedy: each position has a vector of its own, a row of a second matrix, which is added to the
# token's embedding. This is a **positional embedding**, learned like everything else. GPT-2 has it. Now the
# same shuffle makes a difference.

# %%
positions_table = torch.randn(T, C)
difference = (attend(x[order] + positions_table) - attend(x + positions_table))[-1].abs().max()
print(f"with positions, the last output changes by {difference:.3f}")

learned = GPT(GPTConfig(vocab_size=65, block_size=32, n_layer=1, n_head=4, n_embd=64))
idx = torch.randint(65, (1, 32))  # (B, T)
with torch.no_grad():
    by_hand = learned.tok_emb.weight[idx] + learned.pos_emb.weight[torch.arange(32)]  # (B, T, C)
    print("largest difference from model.py:", (by_hand - learned.embed(idx)[0]).abs().max().item())

# %% [markdown]
# It costs one row of C channels for each position, and there is no row after the last one: a model with a
# block size of 32 cannot read a 33rd token at all. Rows share nothing: that position 7 follows position 6 has
# to be learned from the text, like all else.

# %%
gpt2 = PRESETS["gpt2"]
print(f"GPT-2: {gpt2.block_size} x {gpt2.n_embd} = {gpt2.block_size * gpt2.n_embd:,} parameters")
try:
    learned.pos_emb(torch.zeros(1, 1, 64), torch.tensor([32]))
except IndexError as error:
    print("IndexError:", error)

# %% [markdown]
# ## Sinusoids: positions by a formula
#
# The first transformer (2017) used a fixed table. Channels come in pairs, and pair i turns with a
# **frequency** $w_i$, in radians per position: quickly in the first pair, slowly in the last.
#
# $$w_i = 10000^{-2i/C}, \qquad \mathrm{table}[t, 2i] = \sin(t\,w_i), \qquad \mathrm{table}[t, 2i+1] = \cos(t\,w_i)$$
#
# Like the hands of a clock: the fast hand tells near positions apart, the slow hands say roughly where we
# are.

# %%
C = 32
w = 10000.0 ** (-torch.arange(0, C, 2) / C)  # (C / 2,) radians per position
angles = torch.arange(128)[:, None] * w  # (128, C / 2)
table = torch.stack([angles.sin(), angles.cos()], dim=-1).view(128, C)  # sin and cos side by side

plt.imshow(table.T.numpy(), aspect="auto", cmap="RdBu", interpolation="nearest")
plt.colorbar()
plt.xlabel("position")
plt.ylabel("channel")
plt.title("Sinusoids: fast channels above, slow ones below")
picture("04_sinusoids")

# %% [markdown]
# One property is worth a number. The product of two rows says how alike two positions are:

# %%
for t, s in ((5, 2), (50, 47), (100, 97), (50, 40)):
    print(f"positions {t:3} and {s:3}, distance {t - s:2}: product {table[t] @ table[s]:.4f}")

# %% [markdown]
# The first three are equal up to rounding: the product depends on the distance t - s alone.
#
# **Exercise 4.1** Write `product_at(n, w)`: the product of two rows of such a table at distance n, from the
# frequencies w (C / 2,), without making a table. Remember $\sin a \sin b + \cos a \cos b = \cos(a - b)$.


# %% tags=["4.1"]
def product_at(n, w):
    return None  # a number


check("4.1", product_at)

# %% [markdown]
# ## RoPE: rotate instead of add
#
# **RoPE** (rotary position embedding) takes that property to where it is needed, the product of query and
# key. Nothing is added to the stream. Instead each pair of channels of a query or key is rotated by the angle
# of its position, $t\,w_i$:
#
# $$y_1 = x_1\cos(t\,w_i) - x_2\sin(t\,w_i), \qquad y_2 = x_2\cos(t\,w_i) + x_1\sin(t\,w_i)$$
#
# A rotation changes the direction of a vector and not its length. The same key at positions 0 to 5, for one
# pair with a frequency of 0.5 radians per position:

# %%
key = torch.tensor([1.0, 0.3])
plt.figure(figsize=(4.2, 4.0))
for s in range(6):
    cos, sin = math.cos(0.5 * s), math.sin(0.5 * s)
    tip = (key[0] * cos - key[1] * sin, key[1] * cos + key[0] * sin)
    x1, x2 = (coordinate.item() for coordinate in tip)
    plt.arrow(0, 0, x1, x2, head_width=0.05, length_includes_head=True)
    plt.text(1.22 * x1, 1.15 * x2, f"s = {s}", ha="center", va="center")
    print(f"s = {s}: ({x1:6.3f}, {x2:6.3f}), length {math.hypot(x1, x2):.3f}")
plt.axis([-1.6, 1.6, -0.4, 1.4])
plt.gca().set_aspect("equal")
plt.xlabel("first channel of the pair")
plt.ylabel("second channel")
plt.title("One key at positions 0 to 5")
picture("04_rotation")

# %% [markdown]
# If query and key are both rotated, the angle between them changes by the difference of their angles,
# $(t - s)\,w_i$. The product of two vectors depends on their lengths and on the angle between them. So the
# score knows the distance, and nothing else about the two positions.
#
# In the code, channel i is paired with channel i + D / 2. This is the function, and beside it the same with
# complex numbers: a pair as
# $x_1 + \mathrm{i}\,x_2$, times $e^{\mathrm{i}\,t\,w}$.

# %%
source(apply_rope)

# %%
D = 16
config = GPTConfig(vocab_size=65, block_size=2048, n_head=4, n_embd=4 * D, pos="rope")
w = rope_frequencies(config)  # (D / 2,)
by_hand = config.rope_theta ** (-torch.arange(0, D, 2) / D)
print("frequencies, largest difference from the formula:", (w - by_hand).abs().max().item())


def rotation_at(positions):
    return rope_rotation(positions[:, None, None] * w)  # two of (T, 1, D)


positions = torch.arange(T)
x = torch.randn(1, T, 4, D)  # (B, T, H, D)
rotated = apply_rope(x, *rotation_at(positions))
turns = torch.polar(torch.ones(T, D // 2), positions[:, None] * w)[:, None]  # (T, 1, D / 2)
as_complex = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turns  # (B, T, H, D / 2)
as_real = torch.cat([as_complex.real, as_complex.imag], dim=-1)
print("largest difference from complex numbers:", (rotated - as_real).abs().max().item())

# %% [markdown]
# **Exercise 4.2** Write `rotate(x, positions, w)`: x (T, D) rotated to its positions (T,), with frequencies w
# (D / 2,), from the two formulas for $y_1$ and $y_2$ with cos and sin. Channel i pairs with i + D / 2. It is
# compared with `apply_rope`.


# %% tags=["4.2"]
def rotate(x, positions, w):
    return None  # (T, D)


check("4.2", rotate)

# %% [markdown]
# ## Distance alone decides
#
# One query and one key, put at different places:

# %%
q, k = torch.randn(2, D)


def score(t, s):
    at_t, at_s = rotation_at(torch.tensor([t])), rotation_at(torch.tensor([s]))
    rotated_q = apply_rope(q.view(1, 1, 1, D), *at_t).flatten()
    rotated_k = apply_rope(k.view(1, 1, 1, D), *at_s).flatten()
    return (rotated_q @ rotated_k / D**0.5).item()


for t, s in ((10, 7), (110, 107), (1010, 1007), (10, 6), (10, 0)):
    print(f"query at {t:4}, key at {s:4}, distance {t - s:2}: score {score(t, s):8.5f}")

# %% [markdown]
# The first three have the same distance and the same score, up to the rounding of the angles. The others
# differ.
#
# **Exercise 4.3** Prove it in numbers. Write `score_at(q, k, n, w)`: the score q k / sqrt(D) of a query that
# stands n positions after its key, for q and k (D,), from n alone: neither t nor s is given. It is compared
# with queries and keys that are both rotated, at many places.


# %% tags=["4.3"]
def score_at(q, k, n, w):
    return None  # a number


check("4.3", score_at)

# %% [markdown]
# ## In a layer of the model
#
# Now a whole layer, with four heads and larger weights than an untrained one has, so that its scores differ.
# All positions are moved by 500, and the layer gives the same output up to rounding. If distances are
# doubled, it does not. Values are not rotated: they are what is handed over, not what is compared.

# %%
model = GPT(GPTConfig(vocab_size=65, block_size=32, n_layer=1, n_head=4, n_embd=64, pos="rope"))
attention = model.blocks[0].attn
for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
    torch.nn.init.normal_(projection.weight, std=0.2)
x = torch.randn(1, 32, 64)
positions, mask = torch.arange(32), causal_mask(torch.arange(32), 32)
with torch.no_grad():
    here, there = (
        attention(x, positions, model.pos_emb(x, positions + shift)[1], mask) for shift in (0, 500)
    )
    apart = attention(x, positions, model.pos_emb(x, 2 * positions)[1], mask)
print("moved by 500:       largest difference", (there - here).abs().max().item())
print("distances doubled:  largest difference", (apart - here).abs().max().item())
print("parameters of its positions:", sum(p.numel() for p in model.pos_emb.parameters()))

# %% [markdown]
# ## Theta sets the slowest pair
#
# In $w_i = \theta^{-2i/D}$ the base is called **theta**. A pair with frequency w comes back to the same angle
# after $2\pi/w$ positions, its **wavelength**. Two distances that differ by a wavelength look alike to that
# pair. So the slow pairs must not come round within the context. RoFormer and Llama 2 have theta = 10,000;
# Llama 3 has 500,000.

# %%
llama3 = PRESETS["llama3-8b"]
plt.figure()
for theta in (10_000.0, llama3.rope_theta):
    shape = GPTConfig(n_head=1, n_embd=128, pos="rope", rope_theta=theta)
    wavelengths = 2 * math.pi / rope_frequencies(shape)  # (64,)
    n_longer = int((wavelengths > llama3.block_size).sum())
    print(
        f"theta {theta:9,.0f}: wavelengths from {wavelengths[0]:.2f} to {wavelengths[-1]:,.0f} "
        f"positions; {n_longer} of 64 pairs turn less than once in {llama3.block_size:,}"
    )
    plt.semilogy(wavelengths.numpy(), label=f"theta = {theta:,.0f}")
plt.axhline(llama3.block_size, color="black", linestyle="--", label="8,192 positions")
plt.xlabel("pair of channels")
plt.ylabel("wavelength in positions")
plt.title("A larger theta: more pairs that do not come round in 8,192 positions")
plt.legend()
picture("04_wavelengths")

# %% [markdown]
# ## Llama 3.1: a longer context
#
# Llama 3 reads 8,192 positions, Llama 3.1 reads 131,072. At position 100,000 a slow pair has an angle that it never
# has within the first 8,192. So Llama 3.1 slows the slow pairs down by a factor of 8. That alone is not enough, since
# 131,072 / 8 is still 16,384; the model was also trained on, on long texts. It leaves the fast ones as they are: they
# have been all the way round already, and near tokens must look as they did. What decides is how many turns a pair
# makes within 8,192 positions, $n = 8192\,w / 2\pi$:
#
# - more than 4 turns (`high_freq_factor`): w stays,
# - less than 1 turn (`low_freq_factor`): w becomes w / 8,
# - between them: a mix, $r\,w + (1 - r)\,w/8$ with $r = (n - 1) / (4 - 1)$.

# %%
source(rope_frequencies)

# %%
scaled = PRESETS["llama3.1-8b"]
print(scaled.rope_scaling)
before, after = rope_frequencies(llama3), rope_frequencies(scaled)
ratio = after / before  # (64,)
same_as_before = int((ratio > 0.999).sum())
divided = int((ratio < 0.126).sum())
print(f"kept {same_as_before}, divided by 8: {divided}, mixed {64 - same_as_before - divided}")

plt.plot(ratio.numpy(), marker=".")
plt.xlabel("pair of channels")
plt.ylabel("frequency after / before")
plt.title("Llama 3.1 slows the slow pairs down")
picture("04_scaling")

# %% [markdown]
# **Exercise 4.4** Three pairs have wavelengths of 1,000, 4,096 and 10,000 positions. Which wavelengths have
# they after Llama 3.1's scaling? Give a tuple of three numbers.

# %% tags=["4.4"]
scaled_wavelengths = None

check("4.4", scaled_wavelengths)

# %% [markdown]
# ## QK-norm
#
# A rotation leaves the length of queries and keys as it is, and long ones make large scores. **QK-norm**
# divides each by its root mean square, so each has the length $\sqrt{D}$, and a score $q k / \sqrt{D}$ lies
# between $-\sqrt{D}$ and $\sqrt{D}$, whatever training does to the projections. Here queries become 100 times
# longer:

# %%
source(normalise)

# %%
q, k = torch.randn(2, 1, T, 4, D)  # (B, T, H, D) each
for factor in (1, 100):
    plain = factor * q, k
    normed = normalise(factor * q, k, None)
    found = []
    for queries, keys in (plain, normed):
        scores = queries.transpose(1, 2) @ keys.permute(0, 2, 3, 1) / D**0.5  # (B, H, T, T)
        found += [scores.abs().max().item(), F.softmax(scores, -1).max(-1).values.mean().item()]
    print(
        f"queries x {factor:3}: largest score {found[0]:6.1f}, mean of the largest weights {found[1]:.2f}; "
        f"with QK-norm {found[2]:.2f}, {found[3]:.2f}"
    )
by_hand = q / q.square().mean(dim=-1, keepdim=True).sqrt()
print("largest difference by hand:", (by_hand - normalise(q, k, None)[0]).abs().max().item())
rotation = rotation_at(torch.arange(T))
normed_first = apply_rope(normalise(q, k, None)[0], *rotation)
rotated_first = normalise(apply_rope(q, *rotation), k, None)[0]
print("norm first or rotation first:", (normed_first - rotated_first).abs().max().item())

# %% [markdown]
# With QK-norm the scores of long queries are those of short ones. The last line shows that the order of norm
# and rotation does not matter, because a rotation keeps the length.
#
# ## Break it
#
# First, rotate the queries and not the keys. Then the score depends on the position of the query, even where
# the distance is the same. In `model.py`, let `rotate` give back
# `apply_rope(q.float(), *rotation).to(q.dtype), k`, and run
# `python -m pytest test_all.py -k greedy_tokens_of_transformers` (it needs `requirements-dev.txt`). Which of
# its settings fail, and which do not?

# %%
q, k = torch.randn(2, D)
for t, s in ((10, 7), (110, 107), (1010, 1007)):
    rotated_q = apply_rope(q.view(1, 1, 1, D), *rotation_at(torch.tensor([t]))).flatten()
    print(f"query at {t:4}, distance {t - s}: score {(rotated_q @ k / D**0.5).item():8.5f}")

# %% [markdown]
# Second, take the wrong pairs. Meta's own files pair channel 2i with 2i + 1; Hugging Face's pair i with i + D
# / 2. Both are RoPE, but weights that were trained with the one are wrong with the other, and no shape gives
# that away. If the channels of queries and keys are put into the other order first, the scores are the same
# again.

# %%
positions = torch.arange(T)
q, k = torch.randn(2, T, D)
cos, sin = (positions[:, None] * w).cos(), (positions[:, None] * w).sin()  # (T, D / 2)


def side_by_side_pairs(x):
    x1, x2 = x[:, 0::2], x[:, 1::2]
    return torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).view(T, D)


def scores_of_model(q, k):
    rotation = rotation_at(positions)
    q, k = (apply_rope(each.view(1, T, 1, D), *rotation).view(T, D) for each in (q, k))
    return q @ k.T / D**0.5


meta = side_by_side_pairs(q) @ side_by_side_pairs(k).T / D**0.5
reordered = [each.view(T, D // 2, 2).transpose(1, 2).reshape(T, D) for each in (q, k)]
print(
    "wrong pairs: largest difference of a score", (scores_of_model(q, k) - meta).abs().max().item()
)
print(
    "reordered:   largest difference of a score",
    (scores_of_model(*reordered) - meta).abs().max().item(),
)

# %% [markdown]
# ## Where it happens
#
# | what | where |
# |---|---|
# | learned positions | `model.py`: `LearnedPositions` |
# | frequencies, theta, Llama 3.1's scaling | `model.py`: `rope_frequencies` |
# | the rotation | `model.py`: `RotaryPositions`, `rope_rotation`, `apply_rope` |
# | where queries and keys are rotated, normalised | `model.py`: `QUERIES_KEYS`, `rotate`, `normalise` |
# | shapes of published models | `model.py`: `PRESETS` |
#
# ## To read
# - Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762: section 3.5, sinusoids.
# - Su et al. 2021, "RoFormer: enhanced transformer with rotary position embedding", arXiv:2104.09864.
# - Grattafiori et al. 2024, "The Llama 3 herd of models", arXiv:2407.21783: theta and long contexts.
# - Henry et al. 2020, "Query-key normalization for transformers", arXiv:2010.04245.
