# %% [markdown]
# # 05 The block
#
# After this lesson you can
# - write LayerNorm, RMSNorm, GELU and SwiGLU out, and check each against torch,
# - draw the residual stream, and say what each part reads from it and adds to it,
# - say what dropout and weight tying do, in numbers,
# - count the parameters of GPT-2 and of Llama 3 by formula.
#
# You need lessons 03 (attention) and 04 (positions). Time: 45 minutes, exercises included.
#
# Letters, as in the code: B sequences, T positions, C channels, H heads, F channels inside the MLP, V
# vocabulary, L layers.

# %%
import matplotlib.pyplot as plt
import torch
from desk import check, hint, picture, source  # noqa: F401
from torch import nn
from torch.nn import functional as F

from model import GPT, PRESETS, Block, Dropout, GPTConfig, SwiGLU, gelu_by_tanh

torch.manual_seed(0)

# %% [markdown]
# ## The whole model on one page
#
# A position holds a vector of C channels, from the embedding to the end: the **residual stream**. Every part
# reads the stream and adds what it found. Nothing is ever replaced, so a gradient reaches the embedding
# through the sums alone.
#
# ```
#   ids (B, T)
#     |
#   embedding                        x (B, T, C)
#     |
#     +--> norm --> attention --+
#     |                         |
#     + <-----------------------+    x = x + attention(norm(x))
#     |
#     +--> norm --> MLP --------+
#     |                         |
#     + <-----------------------+    x = x + mlp(norm(x))
#     |
#    ... L blocks ...
#     |
#   final norm, head                 logits (B, T, V)
# ```
#
# This is a block in the code, and it is no longer than the drawing:

# %%
source(Block)

# %% [markdown]
# ## LayerNorm
#
# The stream grows as parts add to it. Each part therefore reads a normalised copy. **LayerNorm** takes one
# vector $x$ of C channels, subtracts its mean $m$ and divides by its standard deviation:
#
# $$y_i = \frac{x_i - m}{\sqrt{v + \epsilon}} w_i$$
#
# $$m = \frac{1}{C}\sum_i x_i, \qquad v = \frac{1}{C}\sum_i (x_i - m)^2$$
#
# $w$ is learned and starts at 1. Each position is normalised by itself: no other position and no other
# sequence has a part in it.

# %%
C = 64
x = 3 * torch.randn(2, 5, C) + 1  # (B, T, C)
eps = 1e-5


def layer_norm(x):
    mean = x.mean(dim=-1, keepdim=True)
    variance = (x - mean).square().mean(dim=-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt()


own = layer_norm(x)
theirs = nn.LayerNorm(C, eps)(x)
print(
    "mean and standard deviation before:",
    round(x[0, 0].mean().item(), 3),
    round(x[0, 0].std().item(), 3),
)
print(
    "mean and standard deviation after: ",
    round(own[0, 0].mean().item(), 3),
    round(own[0, 0].std().item(), 3),
)
print("largest difference from torch:", (own - theirs).abs().max().item())

# %% [markdown]
# ## RMSNorm
#
# **RMSNorm** leaves the mean in and divides by the root mean square alone. It is what Llama uses: one pass
# over the channels less, and models are as good.
#
# **Exercise 5.1** Write `rms_norm(x)` for x (..., C) with eps 1e-5, without a learned weight.


# %% tags=["5.1"]
def rms_norm(x):
    return None  # (..., C)


check("5.1", rms_norm)

# %% [markdown]
# ## The MLP
#
# Attention moves information between positions. The **MLP** works on one position at a time: it widens the C
# channels to F = 4 C, applies a nonlinearity, and narrows them again. Two thirds of a block's weights are
# here.
#
# **GELU** is the nonlinearity of GPT-2: $x$ times the probability that a normal number is below $x$,
# $\mathrm{gelu}(x) = x \, \Phi(x)$. GPT-2 was trained with an approximation by tanh, so its weights need that one.

# %%
z = torch.linspace(-4, 4, 200)
exact = z * 0.5 * (1 + torch.erf(z / 2**0.5))
print("by hand against torch:", (exact - F.gelu(z)).abs().max().item())
print("the approximation by tanh is off by at most", (gelu_by_tanh(z) - exact).abs().max().item())

plt.figure(figsize=(5, 3))
for name, y in {
    "ReLU": F.relu(z),
    "GELU": exact,
    "SiLU": F.silu(z),
    "ReLU squared / 4": F.relu(z) ** 2 / 4,
}.items():
    plt.plot(z.numpy(), y.numpy(), label=name)
plt.legend()
plt.xlabel("x")
plt.title("What an MLP does to each channel")
picture("05_nonlinearities")

# %% [markdown]
# **SwiGLU** is Llama's MLP. One projection gates another: a channel passes as far as its gate lets it.
#
# $$\mathrm{mlp}(x) = W_{down} \, (\mathrm{silu}(W_{gate}\, x) \odot W_{up}\, x)$$
#
# $$\mathrm{silu}(z) = \frac{z}{1 + e^{-z}}$$

# %%
config = GPTConfig(vocab_size=65, block_size=32, n_layer=1, n_head=4, n_embd=C, mlp="swiglu")
mlp = SwiGLU(config).eval()
with torch.no_grad():
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T  # (B, T, F)
    by_hand = (gate * torch.sigmoid(gate) * up) @ mlp.down_proj.weight.T
    print("largest difference from model.py:", (by_hand - mlp(x)).abs().max().item())
print(
    "F =",
    config.n_inner,
    "for C =",
    C,
    "- about 8/3 C, so that three matrices hold what two of 4 C would",
)

# %% [markdown]
# ## Norm before, or norm after?
#
# The first transformer normalised the sum: `x = norm(x + part(x))`. GPT-2 and all models since normalise what a
# part reads, and leave the stream alone. Below are untrained stacks of simple parts, and the gradient of a loss
# in the weights of the first part, in both ways.

# %%
width = 64


def gradient_of_first_part(depth, after):
    torch.manual_seed(depth)
    parts = [nn.Linear(width, width) for _ in range(depth)]
    stream, head = torch.randn(64, width), torch.randn(width, 64)
    for part in parts:
        if after:
            stream = layer_norm(stream + F.relu(part(stream)))
        else:
            stream = stream + F.relu(part(layer_norm(stream)))
    F.cross_entropy(layer_norm(stream) @ head, torch.arange(64)).backward()
    return parts[0].weight.grad.norm().item()


for depth in (6, 24, 96):
    before_part, after_sum = (gradient_of_first_part(depth, after) for after in (False, True))
    print(
        f"{depth:3} parts: norm before each part {before_part:6.1f}, norm after each sum {after_sum:6.1f}"
    )

# %% [markdown]
# With the norm after the sum, the gradient grows with the depth, so deep models of that kind need a long warm-up
# (lesson 06). With the norm before each part it hardly grows.

# %% [markdown]
# ## Dropout
#
# In training, **dropout** sets each value to zero with probability p and divides the others by 1 - p, so that the
# expected value stays. In evaluation it does nothing. A model with it cannot rely on a single channel, which
# helps when the same small text is read many times.

# %%
dropout = Dropout(0.25)
ones = torch.ones(100_000)
dropped = dropout(ones)
print(
    f"zeros: {(dropped == 0).float().mean():.3f}; others: {dropped.max():.4f}; mean: {dropped.mean():.3f}"
)
print("in evaluation nothing changes:", torch.equal(dropout.eval()(ones), ones))

# %% [markdown]
# **Exercise 5.2** After `norm` and the MLP, a block's dropout has p = 0.2. A channel of the MLP's output is 0.6.
# Which two values can it have after dropout, and what is the mean of a great many of them? Give a tuple of three
# numbers: the smaller value, the larger value, the mean.

# %% tags=["5.2"]
after_dropout = None

check("5.2", after_dropout)

# %% [markdown]
# ## The head, and weight tying
#
# The **head** turns C channels into V logits: a matrix V x C. The embedding is also V x C. In **weight tying**
# they are the same matrix: a token's logit is the product of the stream with the token's own embedding. For GPT-2
# that saves 38.6 million parameters of 163.0.

# %%
tied = GPT(GPTConfig(vocab_size=65, block_size=32, n_layer=1, n_head=4, n_embd=C, tie_weights=True))
print("the same tensor:", tied.head.weight is tied.tok_emb.weight)
print(f"GPT-2: {50257 * 768:,} parameters in its {50257} x 768 matrix")

# %% [markdown]
# ## Counting parameters
#
# GPT-2 (124M) has V = 50,257, C = 768, 12 blocks, a block size of 1,024, learned positions, biases in every linear
# layer and LayerNorm, and tied weights. Its **parameter count**, part by part:
#
# | part | formula |
# |---|---|
# | token embedding | V C |
# | positions | 1024 C |
# | attention of a block | 4 C C + 4 C |
# | MLP of a block | 2 C (4 C) + 4 C + C |
# | two norms of a block | 2 (2 C) |
# | final norm | 2 C |

# %%
shape = PRESETS["gpt2"]
with torch.device("meta"):  # shapes without memory
    gpt2 = GPT(shape)
for name, n in {
    "token embedding": gpt2.tok_emb.weight.numel(),
    "attention of a block": sum(p.numel() for p in gpt2.blocks[0].attn.parameters()),
    "MLP of a block": sum(p.numel() for p in gpt2.blocks[0].mlp.parameters()),
    "whole block": sum(p.numel() for p in gpt2.blocks[0].parameters()),
}.items():
    print(f"{name:22} {n:12,}")

# %% [markdown]
# **Exercise 5.3** Write `count_gpt2(tied)`: the number of parameters of GPT-2 by the formula, with the head's
# matrix counted again where it is not tied. The published numbers are 124,439,808 and, not tied, 163,037,184;
# with the query, key and value projections without biases it is 163,009,536, which takes 622 MiB in float32.


# %% tags=["5.3"]
def count_gpt2(tied):
    return None


check("5.3", count_gpt2)

# %% [markdown]
# **Exercise 5.4** Llama 3 8B: V = 128,256, C = 4,096, 32 blocks, 32 query heads and 8 heads of keys and values of
# 128 channels, F = 14,336 (SwiGLU), RMSNorm with a weight of C, no biases, no positions to learn, a head that is not
# tied. How many parameters has it?

# %% tags=["5.4"]
llama3_8b = None

check("5.4", llama3_8b)

# %% [markdown]
# ## Break it
#
# Leave the residual sum out and let a block give back the last part alone. After 12 untrained blocks, how much of
# the difference between two tokens is left? In `model.py`, change `return x + self.mlp(...)` in `Block.forward` to
# `return self.mlp(self.mlp_norm(x))`, run `python train.py config/llama3_tiny.py --max_iters=100`, and
# compare the losses.

# %%
model = GPT(GPTConfig(vocab_size=65, block_size=32, n_layer=12, n_head=4, n_embd=C)).eval()
idx = torch.tensor([[1], [2]])  # two sequences of one token
with torch.no_grad():
    for residual in (True, False):
        stream, positions, rotation, mask = model.embed(idx, None)
        for block in model.blocks:
            attended = stream + block.attn(block.attn_norm(stream), positions, rotation, mask)
            last = block.mlp(block.mlp_norm(attended))
            stream = attended + last if residual else last
        distance = (stream[0] - stream[1]).norm().item()
        print(
            f"residual sums {residual!s:5}: distance of the two tokens after 12 blocks {distance:.2e}"
        )

# %% [markdown]
# ## Where it happens
#
# | what | where |
# |---|---|
# | the block, the stream | `model.py`: `Block`, `GPT.hidden` |
# | LayerNorm, RMSNorm | `model.py`: `make_norm` |
# | MLP, SwiGLU, nonlinearities | `model.py`: `MLP`, `SwiGLU`, `ACTIVATIONS` |
# | dropout | `model.py`: `Dropout` |
# | parameters, FLOPs, bytes | `model.py`: `GPT.summary` |
#
# ## To read
# - Ba et al. 2016, "Layer normalization", arXiv:1607.06450; Zhang and Sennrich 2019, RMSNorm, arXiv:1910.07467.
# - Hendrycks and Gimpel 2016, GELU, arXiv:1606.08415; Shazeer 2020, "GLU variants improve transformer",
#   arXiv:2002.05202.
# - Xiong et al. 2020, "On layer normalization in the transformer architecture", arXiv:2002.04745: before or after.
# - Press and Wolf 2017, "Using the output embedding to improve language models", arXiv:1608.05859: weight tying.
