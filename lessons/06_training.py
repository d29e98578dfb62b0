# %% [markdown]
# # 06 Training
#
# After this lesson you can
# - say what the loss of an untrained model must be, and see that it is,
# - make one step of SGD, AdamW and Muon by hand,
# - explain warm-up, cosine decay, gradient clipping and gradient accumulation,
# - see overfitting in two curves, and stop in time,
# - fit a small scaling law to runs of your own.
#
# You need lessons 02 (cross-entropy) and 05 (the block). Time: 50 minutes, exercises included.
#
# Letters: B sequences, T positions, V vocabulary, w a weight, g its gradient, t the number of a step.

# %%
import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from desk import check, hint, picture, source  # noqa: F401

from glass.optim import Muon, lr_multiplier, make_optimizers, orthogonalise, set_learning_rates
from glass.sources import pydoc_documents
from model import GPT, GPTConfig
from train import Settings, train

text = "".join(itertools.islice(pydoc_documents(), 40))
characters = sorted(set(text))
ids = torch.tensor([characters.index(character) for character in text])
n_val = len(ids) // 10
train_ids, val_ids = ids[:-n_val], ids[-n_val:]
V, T = len(characters), 32
print(f"{len(ids):,} characters of Python's help, {V} different ones; the last {n_val:,} validate")

# %% [markdown]
# ## The loss before the first step
#
# The **loss** is the mean of -ln p over all predicted tokens, p being the probability that the model gave
# to the token that came. A fresh model knows nothing, so it should give every token about 1 / V. Its loss
# is then $-\ln(1/V) = \ln V$. If yours starts far above, something is wrong before training begins.
# A little above is normal: logits of variance s cost about s / 2 more. (GPT-2's shape begins near 10.98, and
# ln 50,257 is 10.82.)


# %%
def batch_of(ids, n, generator):
    """n windows at random places: idx and targets, (n, T) each."""
    places = torch.randint(len(ids) - T, (n, 1), generator=generator)
    rows = ids[places + torch.arange(T + 1)]  # (n, T + 1)
    return rows[:, :-1], rows[:, 1:]


torch.manual_seed(0)
model = GPT(GPTConfig(vocab_size=V, block_size=T, n_layer=1, n_head=2, n_embd=32))
idx, targets = batch_of(train_ids, 16, torch.Generator().manual_seed(0))
loss = model(idx, targets)[1]
print(f"loss {loss.item():.3f}, ln V {math.log(V):.3f}")

# %% [markdown]
# ## One step of SGD
#
# The **gradient** g of a weight w says how much the loss rises when w rises a little. So step against it:
# $w \leftarrow w - \eta g$, where $\eta$ is the **learning rate**. This is stochastic gradient descent,
# SGD: stochastic, because each step looks at a few random windows only.

# %%
eta = 0.5
loss.backward()
weight = model.head.weight  # (V, C)
by_hand = (weight - eta * weight.grad).detach()

torch.optim.SGD(model.parameters(), lr=eta).step()
print("largest difference from torch's SGD:", (weight - by_hand).abs().max().item())
print(
    f"loss of the same windows: {loss.item():.3f}, a step later {model(idx, targets)[1].item():.3f}"
)

# %% [markdown]
# ## Too large a learning rate
#
# Take the simplest loss, a parabola: $\frac{1}{2} a w^2$. Its gradient is $a w$, so a step gives
# $w - \eta a w = (1 - \eta a) w$. Each step multiplies w by the same number. If that number is between -1
# and 1, w goes to 0, the minimum. If not, every step is longer than the one before: training **diverges**.
# `a` is the **curvature**. Below it is 4.

# %%
a = 4.0
for eta in (0.1, 0.4, 0.6):
    w = 1.0
    for _ in range(10):
        w = w - eta * a * w
    print(
        f"learning rate {eta}: each step multiplies w by {1 - eta * a:4.1f}; w after ten: {w:10.6f}"
    )

# %% [markdown]
# **Exercise 6.1** A loss has two weights: $\frac{1}{2} (1 \cdot w_1^2 + 50 \cdot w_2^2)$. Both get the same
# learning rate. At and above which learning rate does SGD no longer reach the minimum? Give a number.

# %% tags=["6.1"]
limit = None

check("6.1", limit)

# %% [markdown]
# At that limit $w_1$ still moves slowly, because its curvature is small. One learning rate for all weights
# must suit the steepest of them. This is what the next optimizer changes.
#
# ## AdamW: a step of about the same size for every weight
#
# Adam keeps two running averages for each weight, its **moments**: m of its gradients and v of their squares.
#
# $m \leftarrow \beta_1 m + (1 - \beta_1) g$, $\quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2$
#
# Both begin at 0, so at first they are too small. After step t = 1, 2, ... a correction removes this:
# $\hat{m} = m / (1 - \beta_1^t)$, $\hat{v} = v / (1 - \beta_2^t)$. Then
#
# $w \leftarrow w - \eta \lambda w - \eta \, \hat{m} / (\sqrt{\hat{v}} + \epsilon)$
#
# The term $\eta \lambda w$ is **weight decay**: it pulls each weight towards 0. In Adam with a W it is
# outside of the averages ("decoupled"). The rest is a mean divided by a typical size, so it is between -1
# and 1 or close to it, however large the gradients are. In step 1 it is $g / |g|$: +1 or -1.

# %%
gradients = torch.tensor([100.0, 1.0, -0.001])
w = torch.nn.Parameter(torch.zeros(3))
optimizer = torch.optim.AdamW([w], lr=0.01)
w.grad = gradients
optimizer.step()
print("gradients  ", [round(value, 6) for value in gradients.tolist()])
print("AdamW moves", [round(value, 6) for value in w.tolist()])
print("SGD moves  ", [round(value, 6) for value in (-0.01 * gradients).tolist()])

# %% [markdown]
# **Exercise 6.2** Write one step of AdamW. `w`, `g`, `m`, `v` are tensors of one shape and t counts steps
# from 1. Give back the new w, m and v. Three steps of it are compared with `torch.optim.AdamW`, to 1e-6.


# %% tags=["6.2"]
def adamw(w, g, m, v, t, eta=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1):
    return None  # (w, m, v)


check("6.2", adamw)

# %% [markdown]
# ## Muon: a step of the same size in every direction
#
# A matrix is more than its numbers. It stretches some directions more than others, and its **singular values** say
# how much. The gradient of a matrix often has a few large singular values and many small ones, so a step moves in few
# directions. **Muon** makes all singular values about 1 before it steps. The exact way is the singular value
# decomposition, $g = U S V^\top$: U and V are rotations or mirrorings, S holds the singular values. Only $U V^\top$
# is kept. Muon comes close with a few products, which are faster on a GPU: four polynomials, one after another, take
# every singular value that is not tiny to near 1.

# %%
torch.manual_seed(0)
model.zero_grad()
model(idx, targets)[1].backward()
matrix = model.blocks[0].mlp.up_proj.weight  # (F, C) = (128, 32)
g = matrix.grad
U, S, Vt = torch.linalg.svd(g, full_matrices=False)
exact = U @ Vt
quick = orthogonalise(g[None])[0].float()
for name, tensor in (("gradient", g), ("U V^T", exact), ("Muon's", quick)):
    values = torch.linalg.svdvals(tensor)  # (32,), largest first
    print(
        f"{name:9} singular values: largest {values[0]:.4f}, 16th {values[15]:.4f}, 31st {values[30]:.4f}"
    )

# %% [markdown]
# The gradient's largest value is many times its 31st. Muon's lie between 0.75 and 1.25: that is close enough to
# 1. (There is a 32nd. In the gradient it is 0, because the input of this matrix comes from a LayerNorm, whose outputs
# have a mean of 0. In float32 it stays 0; where the processor multiplies bfloat16 numbers, which have three digits,
# rounding makes something of it.) Now the whole first step, beside the real one. The update
# is scaled by $\sqrt{\max(1, rows / columns)}$, so that a learning rate means the same for every shape. `Muon` also
# averages gradients over time; in the first step this only changes the length.

# %%
eta = 0.02
rows, columns = matrix.shape
average = torch.zeros_like(g).lerp(g, 1 - 0.95)  # the running average, which begins at 0
ahead = g.lerp(average, 0.95)  # a step ahead of it (Nesterov): here g, but shorter
step = orthogonalise(ahead[None])[0].float()
by_hand = matrix.detach() - eta * max(1, rows / columns) ** 0.5 * step
Muon([matrix], lr=eta).step()
print("largest difference from Muon:", (matrix - by_hand).abs().max().item())
assert torch.allclose(matrix, by_hand, atol=1e-5)

# %% [markdown]
# In glassGPT, Muon takes the matrices of the blocks, and AdamW takes the rest: embeddings, norms, head. With
# `muon_beta2` above 0 each row of a step is also divided by its root mean square over time, so that no output of a
# matrix moves much faster than the others (NorMuon).
#
# ## Warm-up and decay
#
# At the start the averages of AdamW rest on few gradients, and the loss is steep. So the learning rate rises
# from near 0: the **warm-up**. At the end it must become small, so that w settles instead of jumping about
# the minimum. The decay in between follows half a **cosine**. For step s from the end of the warm-up to the
# end of the decay, with progress p from 0 to 1:
#
# $\eta = \eta_{min} + (\eta_{max} - \eta_{min}) \cdot \frac{1}{2} (1 + \cos \pi p)$

# %%
shape = dict(learning_rate=1e-3, min_lr=1e-4, warmup_iters=20, lr_decay_iters=100, max_iters=120)
for name in ("cosine", "linear"):
    settings = Settings(**shape, lr_shape=name)
    rates = [settings.learning_rate * lr_multiplier(step, settings) for step in range(120)]
    plt.plot(rates, label=name)
plt.title("Warm-up until step 20, decay until step 100")
plt.xlabel("step")
plt.ylabel("learning rate")
plt.legend()
picture("06_learning_rate")

# %% [markdown]
# **Exercise 6.3** What is the learning rate of the cosine in step 60 of the picture? Calculate it from the
# formula. p is the part of the way from step 20 to step 100.

# %% tags=["6.3"]
rate = None

check("6.3", rate)

# %% [markdown]
# ## Clipping the gradient
#
# Some batches have a much larger gradient than others. **Gradient clipping** looks at the gradient of all
# weights together as one long vector. If its length is above a limit, all of it is multiplied by one number,
# so that the length is the limit. The direction stays.

# %%
model.zero_grad()
(100 * model(idx, targets)[1]).backward()
before = torch.cat([p.grad.flatten() for p in model.parameters()])
length = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
after = torch.cat([p.grad.flatten() for p in model.parameters()])
cosine = torch.nn.functional.cosine_similarity(before, after, dim=0)
print(f"length before {length:.2f}, after {after.norm():.2f}")
print(f"cosine of the angle between them {cosine:.4f}: 1 means the same direction")

# %% [markdown]
# ## Accumulation: a large batch in pieces
#
# A batch of many sequences may not fit in memory. So the gradient is added up over several **micro-steps**,
# and only then comes one step of the optimizer. `backward()` adds to `.grad`, so nothing else is needed,
# except one thing, which the exercise is about.
#
# **Exercise 6.4** Write `accumulate(model, idx, targets, n)`: it calls `backward()` n times, each time for
# one n-th of the rows, so that every `.grad` ends as after one `backward()` of the mean loss of all rows. It
# gives back that mean loss, as a number. The rows are a multiple of n, and the gradient is 0 at the start.


# %% tags=["6.4"]
def accumulate(model, idx, targets, n):
    return None  # a float


check("6.4", accumulate)

# %% [markdown]
# ## A run, and overfitting
#
# Now all parts together. Training on plain text, to predict what comes next, is called **pretraining**. `fit` is the
# loop of `train.py` without its clipping, accumulation, checkpoints and many machines. Every few steps it measures
# the loss of the windows it trains on and of the **validation** text, which it never trains on. It draws windows at
# random and counts steps, where books often count epochs: passes over all windows. `zero_init` lets the last matrix of
# each part start at 0, so that a fresh block adds nothing. Muon is its default; `optimizer="adamw"` is the other.


# %%
def fit(train_ids, n_embd=32, learning_rate=1e-2, optimizer="muon", steps=150, every=15):
    """Train a model of one block. Gives the model, and (step, training loss, validation loss)."""
    torch.manual_seed(1)
    parts = dict(pos="rope", qk_norm=True, zero_init=True, tie_weights=False)
    model = GPT(GPTConfig(vocab_size=V, block_size=T, n_layer=1, n_head=2, n_embd=n_embd, **parts))
    rates = dict(learning_rate=learning_rate, warmup_iters=10, max_iters=steps, lr_decay_iters=None)
    settings = Settings(optimizer=optimizer, **rates)
    optimizers, generator = make_optimizers(model, settings), torch.Generator().manual_seed(1)
    fixed = [batch_of(ids, 64, torch.Generator().manual_seed(2)) for ids in (train_ids, val_ids)]
    curve = []
    for step in range(steps + 1):
        if step % every == 0:
            with torch.no_grad():
                curve.append((step, *(model(*rows)[1].item() for rows in fixed)))
        set_learning_rates(optimizers, step, settings)
        model(*batch_of(train_ids, 16, generator))[1].backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    return model, np.array(curve)


figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
for axis, n in zip(axes, (1000, len(train_ids)), strict=True):
    _, curve = fit(train_ids[:n])
    axis.plot(curve[:, 0], curve[:, 1], label="training")
    axis.plot(curve[:, 0], curve[:, 2], label="validation")
    axis.set(title=f"trained on {n:,} characters", xlabel="step", ylabel="loss (nats a character)")
    axis.legend()
    best = curve[curve[:, 2].argmin()]
    last = curve[-1]
    print(
        f"{n:7,} characters: validation loss lowest, {best[2]:.2f}, at step {best[0]:.0f}; at the end "
        f"{last[2]:.2f}, with a training loss of {last[1]:.2f}"
    )
picture("06_overfitting")

# %% [markdown]
# On the left the model learns 1,000 characters by heart. The training loss goes on falling, and the
# validation loss turns and rises: this is **overfitting**. On the right there is too much text to learn by
# heart in 150 steps, and the two curves stay close. The remedy on the right is more data. Another is
# **early stopping**: keep the weights of the lowest validation loss. `train.py` keeps them as its best
# checkpoint, and `patience` ends the run after so many evaluations without a better one.
#
# ## How the loss falls with size
#
# Train models of several sizes on the same windows, and draw the loss against the number of weights, both
# axes logarithmic. The points often lie near a line. A line between logarithms is a power:
# $L = c \, N^{-\alpha}$. This is a **scaling law**. People fit it to small runs, and predict a large one.

# %%
widths = (4, 8, 16, 32)
sizes, losses = [], []  # of the models; losses after the last step
for width in widths:
    fitted, curve = fit(train_ids, width, every=75)
    sizes.append(fitted.parameter_count())
    losses.append(curve[-1, 2])
slope, offset = np.polyfit(np.log(sizes[:3]), np.log(losses[:3]), 1)
predicted = math.exp(offset) * sizes[3] ** slope
for size, found in zip(sizes, losses, strict=True):
    print(f"{size:7,} weights: validation loss {found:.3f}")
print(
    f"fit of the first three: L = {math.exp(offset):.2f} N^({slope:.3f}); for the fourth it says {predicted:.3f}"
)

plt.loglog(sizes[:3], losses[:3], "o", label="fitted")
plt.loglog(sizes[3:], losses[3:], "s", label="to be predicted")
plt.loglog(sizes, math.exp(offset) * np.array(sizes) ** slope, label="the power")
plt.title("Validation loss after 150 steps")
plt.xlabel("weights N")
plt.ylabel("loss L (nats)")
plt.legend()
picture("06_scaling")

# %% [markdown]
# Compare the prediction with what the fourth model reached. Three points are few, and each model saw only 150 steps
# of 512 characters: the larger ones are further from the lowest loss that they could reach. The law of such short
# runs is not the law of long ones. The loss also falls with more text. Below: the last of these models after 75
# steps, and after all 150.

# %%
for step, _, found in curve[1:]:
    print(f"{int(step) * 16 * T:8,} characters seen: validation loss {found:.3f}")

# %% [markdown]
# ## Break it
#
# AdamW's step has about the size of the learning rate, whatever the gradient is. So a learning rate that is
# far too large moves every weight far in each step. Change 10.0 below and find where it begins to go wrong.

# %%
for learning_rate in (1e-2, 10.0):
    _, curve = fit(train_ids, 32, learning_rate, "adamw", steps=30, every=10)
    path = " ".join(f"{value:8.2f}" for value in curve[:, 2])
    print(f"learning rate {learning_rate:5}: validation loss {path}; ln V is {math.log(V):.2f}")

# %% [markdown]
# The second run goes far above ln V: worse than a model that knows nothing. The decay of the learning rate
# does not bring it back to the first run's loss.
#
# ## Where it happens
#
# The real loop is on one screen. You know its core: rate, loss, backward, clipping, step. Pass over `scaler` and
# `autocast` (numbers of fewer bits), `parallel` and `processes` (lesson 15), and `signals` (a stop by Ctrl-C,
# lesson 07).

# %%
source(train)

# %% [markdown]
# | what | where |
# |---|---|
# | loss | `model.py`: `cross_entropy`, `GPT.forward` |
# | the loop, clipping, accumulation | `train.py`: `train` |
# | warm-up, cosine | `glass/optim.py`: `lr_multiplier` |
# | which weights decay, AdamW | `glass/optim.py`: `make_optimizers` |
# | Muon | `glass/optim.py`: `Muon`, `orthogonalise` |
# | early stopping | `train.py`: `between_updates` (`patience`) |
#
# ## To read
# - Kingma, Ba 2014, "Adam", arXiv:1412.6980: algorithm 1.
# - Loshchilov, Hutter 2017, "Decoupled weight decay regularization", arXiv:1711.05101: the W.
# - Jordan et al. 2024, "Muon", kellerjordan.github.io/posts/muon.
# - Amsel et al. 2025, "The Polar Express", arXiv:2505.16932: the polynomials.
# - Li et al. 2025, "NorMuon", arXiv:2510.05491.
# - Kaplan et al. 2020, "Scaling laws for neural language models", arXiv:2001.08361.
# - Hoffmann et al. 2022, "Training compute-optimal large language models", arXiv:2203.15556.
