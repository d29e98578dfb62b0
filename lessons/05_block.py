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

from model import (
    GPT,
    PRESETS,
    Block,
    Dropout,
    GPTConfig,
    SwiGLU,
    attention_weights,
    causal_mask,
    gelu_by_tanh,
)

# %% [markdown]
# ## The whole model on one page
#
# A position holds a vector of C channels, from the embedding to the end: the **residual stream**. Every part
# reads the stream and adds what it found. Nothing is ever replaced, so a gradient can go back to the
# embedding through the sums alone, past every part.
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
# ## Inside attention
#
# Attention is the one part in which positions meet (lesson 03). Here is the way of queries, keys and values
# through its heads once more, with the shapes of a real layer: C channels are H heads of D channels each, and
# come together at the end.

# %%
torch.manual_seed(0)
config = GPTConfig(vocab_size=65, block_size=32, n_layer=1, n_head=4, n_embd=64)
attention = Block(config, 0).attn
x = torch.randn(2, 5, 64)  # (B, T, C)
q, k, v = attention.queries_keys_values(x, None)  # (B, H, T, D) each
weights = attention_weights(q, k, causal_mask(torch.arange(5), 5))  # (B, H, T, T)
handed_over = weights @ v  # (B, H, T, D)
joined = handed_over.transpose(1, 2).reshape(2, 5, 64)  # (B, T, C)

plt.figure(figsize=(8, 4.2))
PLACES = {  # name of a box: where it stands, and what is in it
    "x": (0, 1, x),
    "q_proj, heads: q": (1.2, 2, q),
    "k_proj, heads: k": (1.2, 1, k),
    "v_proj, heads: v": (1.2, 0, v),
    "softmax(q k / root D + mask)": (2.7, 1.5, weights),
    "weights times v": (2.7, 0.4, handed_over),
    "heads joined": (4.1, 0.4, joined),
    "o_proj": (4.1, 1.5, attention.o_proj(joined)),
}
ARROWS = "01 02 03 14 24 35 45 56 67"  # from box to box
boxes = []
for name, (left, up, value) in PLACES.items():
    text = f"{name}\n{tuple(value.shape)}"
    look = dict(boxstyle="round", facecolor="white")
    boxes.append(plt.text(left, up, text, ha="center", va="center", fontsize=8, bbox=look))
for start, end in ARROWS.split():
    first, second = boxes[int(start)], boxes[int(end)]
    ends = dict(patchA=first.get_bbox_patch(), patchB=second.get_bbox_patch(), shrinkB=2)
    arrow = dict(arrowstyle="->", **ends)
    plt.annotate("", second.get_position(), first.get_position(), arrowprops=arrow)
plt.axis([-0.4, 4.7, -0.5, 2.5])
plt.axis("off")
plt.title("Attention with B = 2, T = 5, C = 64, H = 4, D = 16")
picture("05_attention")

# %% [markdown]
# ## LayerNorm
#
# The stream grows as parts add to it. Each part therefore reads a normalised copy. **LayerNorm** takes one
# vector $x$ of C channels, subtracts its mean $m$ and divides by its standard deviation:
#
# $$y_i = \frac{x_i - m}{\sqrt{v + \epsilon}} w_i + b_i$$
#
# $$m = \frac{1}{C}\sum_i x_i, \qquad v = \frac{1}{C}\sum_i (x_i - m)^2$$
#
# The weight $w$ and the bias $b$ are learned and start at 1 and 0; $\epsilon$ is a small number against a
# division by 0. Each position is normalised by itself: no other position and no other sequence has a part in
# it.

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
    round(x[0, 0].std(correction=0).item(), 3),
)
print(
    "mean and standard deviation after: ",
    round(own[0, 0].mean().item(), 3),
    round(own[0, 0].std(correction=0).item(), 3),
)
print("largest difference from torch:", (own - theirs).abs().max().item())
norm = nn.LayerNorm(C, eps)
nn.init.normal_(norm.weight)
nn.init.normal_(norm.bias)
scaled = own * norm.weight + norm.bias
print("with a weight and a bias:     ", (scaled - norm(x)).abs().max().item())

# %% [markdown]
# ## RMSNorm
#
# **RMSNorm** leaves the mean in and divides by the root mean square alone. It is what Llama uses: one mean
# less to compute, and no bias.
#
# $$y_i = \frac{x_i}{\sqrt{\frac{1}{C}\sum_j x_j^2 + \epsilon}} w_i$$
#
# With a vector whose mean is 0 the two norms agree. Ours has another mean, so they differ:

# %%
centred = x - x.mean(dim=-1, keepdim=True)
both = nn.LayerNorm(C, eps), nn.RMSNorm(C, eps)
for name, vectors in {"as it is": x, "mean taken away": centred}.items():
    by_layer_norm, by_rms_norm = (norm(vectors) for norm in both)
    print(f"{name:15} largest difference {(by_layer_norm - by_rms_norm).abs().max().item():.1e}")

# %% [markdown]
# **Exercise 5.1** Write `rms_norm(x)` for x (..., C) with eps 1e-5, without a learned weight.


# %% tags=["5.1"]
def rms_norm(x):
    return None  # (..., C)


check("5.1", rms_norm)

# %% [markdown]
# ## The MLP
#
# Attention moves information between positions. The **MLP** (multi-layer perceptron: two linear layers with a curve
# between them) works on one position at a time: it widens the C channels to F = 4 C, applies a nonlinearity (a curve
# applied to each number, without which two linear layers would be one), and narrows them again. Two thirds of a
# block's weights are here.
#
# **GELU** is the nonlinearity of GPT-2: $x$ times the probability that a number drawn from the normal distribution
# (mean 0, standard deviation 1) is below $x$, $\mathrm{gelu}(x) = x \, \Phi(x)$. GPT-2 was trained with an
# approximation by tanh, so its weights need that one:
#
# $$\Phi(x) = \frac{1}{2}\left(1 + \mathrm{erf}\frac{x}{\sqrt{2}}\right)$$
#
# $$\Phi(x) \approx \frac{1}{2}\left(1 + \tanh\left(\sqrt{2/\pi}\,(x + 0.044715\,x^3)\right)\right)$$

# %%
z = torch.linspace(-4, 4, 200)
exact = z * 0.5 * (1 + torch.erf(z / 2**0.5))
print("by hand against torch:", (exact - F.gelu(z)).abs().max().item())
by_tanh = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
print("by tanh, by hand against model.py:", (by_tanh - gelu_by_tanh(z)).abs().max().item())
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
plt.ylabel("what becomes of it")
plt.title("What an MLP does to each channel")
picture("05_nonlinearities")

# %% [markdown]
# GPT-2's MLP is the plainest: a linear map to 4C channels, GELU, and a linear map back to C. **SwiGLU** is Llama's
# MLP ($\odot$ multiplies place by place). One projection gates another: a channel passes as far as its gate lets it.
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
two_matrices, three_matrices = 2 * C * 4 * C, 3 * C * config.n_inner
print(f"F = {config.n_inner} for C = {C}; 8/3 C is {8 * C / 3:.1f}")
print(f"three matrices of F: {three_matrices:,} weights; two of 4 C: {two_matrices:,}")

# %% [markdown]
# With F = 8/3 C the three matrices would hold as many weights as the two of GPT-2's MLP. `model.py` rounds F
# up to a multiple of 64; with only 64 channels the rounding shows.

# %% [markdown]
# ## Norm before, or norm after?
#
# The first transformer normalised the sum: `x = norm(x + part(x))`. GPT-2 and most models since normalise
# what a part reads, and leave the stream alone. Below are untrained stacks of simple parts, and the gradient
# of a loss in the weights of the first part, in both ways.

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
# With the norm after each sum the gradient grows strongly with the depth. With the norm before each part it grows
# little. Xiong et al. (below) study transformers, where it shows at the other end: with the norm after the sum the
# gradients near the output are large at first, so these models need a warm-up (lesson 06).

# %% [markdown]
# ## Dropout
#
# In training, **dropout** sets each value to zero with probability p and divides the others by 1 - p, so that
# the expected value stays. In evaluation it does nothing. A model with it cannot rely on a single channel,
# which helps when the same small text is read many times.

# %%
x = torch.randn(1000)
torch.manual_seed(1)
kept = torch.empty(1000).bernoulli_(1 - 0.25)  # 1 or 0
torch.manual_seed(1)
theirs = nn.Dropout(0.25)(x)
print("largest difference from torch:", (x * kept / (1 - 0.25) - theirs).abs().max().item())

dropout = Dropout(0.25)  # model.py's, which draws its zeros in another way
ones = torch.ones(100_000)
dropped = dropout(ones)
print(
    f"zeros: {(dropped == 0).float().mean():.3f}; others: {dropped.max():.4f}; mean: {dropped.mean():.3f}"
)
print("in evaluation nothing changes:", torch.equal(dropout.eval()(ones), ones))

# %% [markdown]
# **Exercise 5.2** The MLP's output goes through dropout with p = 0.2 before it is added to the stream. A channel
# of it is 0.6. Which two values can it have after dropout, and what is the mean of a great many of them? Give a tuple
# of three numbers: the smaller value, the larger value, the mean.

# %% tags=["5.2"]
after_dropout = None

check("5.2", after_dropout)

# %% [markdown]
# ## The head, and weight tying
#
# The **head** turns C channels into V logits: a matrix V x C. The embedding is also V x C. In **weight
# tying** they are the same matrix: a token's logit is the product of the stream with the token's own
# embedding. For GPT-2 that saves 38.6 million parameters of 163.0.

# %%
tied = GPT(GPTConfig(vocab_size=65, block_size=32, n_layer=1, n_head=4, n_embd=C, tie_weights=True))
print("the same tensor:", tied.head.weight is tied.tok_emb.weight)
print(f"GPT-2: {50257 * 768:,} parameters in its {50257} x 768 matrix")

# %% [markdown]
# ## Counting parameters
#
# GPT-2 (124M) has V = 50,257, C = 768, 12 blocks, a block size of 1,024, learned positions, biases in every
# linear layer and LayerNorm, and tied weights. Its **parameter count**, part by part:
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
# **Exercise 5.3** Write `count(C, L, tied, qkv_bias)`: the parameters of a GPT-2 with C channels and L blocks
# by these formulas. Where `tied` is false, the head has a matrix of its own. Where `qkv_bias` is false, the
# query, key and value projections have no biases. With C = 768 and L = 12 it must give 124,439,808 tied and
# with all biases, and 163,009,536 without both, which takes 622 MiB in float32. The check also tries the
# larger GPT-2 models. (Tied but without the biases of q, k and v it would be 124,412,160, a number that is also found
# in print: 12 x 3 x 768 = 27,648 fewer.)


# %% tags=["5.3"]
def count(C, L, tied, qkv_bias):
    return None  # an integer


check("5.3", count)

# %% [markdown]
# **Exercise 5.4** Llama 3 8B: V = 128,256, C = 4,096, 32 blocks, 32 query heads and 8 heads of keys and
# values of 128 channels, F = 14,336 (SwiGLU), RMSNorm with a weight of C, no biases, no positions to learn, a
# head that is not tied. How many parameters has it?

# %% tags=["5.4"]
llama3_8b = None

check("5.4", llama3_8b)

# %% [markdown]
# ## Break it
#
# Leave the residual sum around the MLP out, and let a block give back what the MLP found, and nothing else. What
# happens to the differences between positions? Below is the part of the vectors' length that is not common to
# positions 16 to 31 of a text: it is nearly 1 if they have nothing in common, and 0 if they are all the same. The
# model is untrained.

# %%
model = GPT(GPTConfig(vocab_size=65, block_size=32, n_layer=12, n_head=4, n_embd=C)).eval()
idx = torch.randint(65, (1, 32))  # (B, T)
with torch.no_grad():
    for residual in (True, False):
        stream, positions, rotation, mask = model.embed(idx, None)
        for number, block in enumerate(model.blocks, 1):
            attended = stream + block.attn(block.attn_norm(stream), positions, rotation, mask)
            last = block.mlp(block.mlp_norm(attended))
            stream = attended + last if residual else last  # (1, 32, C)
            if number in (1, 6, 12):
                late = stream[0, 16:]
                own_part = (late - late.mean(dim=0)).norm() / late.norm()
                print(f"sum {residual!s:5}, block {number:2}: {own_part:.2f} is not common")

# %% [markdown]
# With the sums the positions stay apart. Without this one they become more and more alike. The sum around attention
# is still there, but a block now hands on only the small output of an untrained MLP, and attention reads a normalised
# copy of it. So the average of the past that attention adds is a large part of the stream in every block. The head
# can then hardly tell positions apart.
#
# In `model.py`, change the last line of `Block.forward` to `return self.mlp(self.mlp_norm(x))`, run
# `python train.py config/llama3_tiny.py --dataset=pydoc --max_iters=100`, which takes about a minute, with
# and without the change, and compare the losses.

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
# - Dong et al. 2021, "Attention is not all you need: pure attention loses rank doubly exponentially with depth",
#   arXiv:2103.03404: what the residual stream prevents.
# - Press and Wolf 2017, "Using the output embedding to improve language models", arXiv:1608.05859: weight tying.
