# %% [markdown]
# # 14 Looking inside
#
# After this lesson you can
# - train a small model in which an induction head forms, and watch it form,
# - find that head by a number, see it in its attention map, and switch it off,
# - read what a model would predict half-way, with the logit lens,
# - split a logit into what each part of the model pushed, and read `glass/trace.py`.
#
# You need lessons 03 (attention) and 05 (the block). Time: 50 minutes, exercises included.
#
# Letters, the same as in the code: B sequences, T positions, V vocabulary, L layers, H heads.

# %%
import matplotlib.pyplot as plt
import torch
from desk import check, hint, picture, source  # noqa: F401
from torch.nn import functional as F

from glass.optim import make_optimizers, set_learning_rates
from glass.trace import head_badges, lens, pushes, switched_off, trace
from model import GPT, SmearedEmbedding, model_config
from train import Settings

# %% [markdown]
# ## A text that can only be copied
#
# A row of this text is n random tokens, said again and again until T tokens are full. The length n differs from row
# to row, so counting positions does not help. The first n tokens cannot be predicted: with V = 16 tokens the best
# loss is ln 16. From token n + 1 on every token can be known: find the place where the text said the same before, and
# say what came next there. (One token often stands at several places, so the tokens before it help to choose.)

# %%
V, T = 16, 48
generator = torch.Generator().manual_seed(1)


def repeated(B, shortest=T // 4, longest=T // 2):
    """B rows of T random tokens that repeat, and the length n of what repeats: (B, T), (B, 1)."""
    n = torch.randint(shortest, longest + 1, (B, 1), generator=generator)
    tokens = torch.randint(V, (B, T), generator=generator)
    return tokens.gather(1, torch.arange(T) % n), n


rows, lengths = repeated(2)
for row, n in zip(rows.tolist(), lengths[:, 0].tolist(), strict=True):
    print(f"n = {n}:", *row)
print(f"ln {V} = {torch.tensor(float(V)).log().item():.3f}")

# %% [markdown]
# Each line shows a row: the same n tokens return. The last line is the loss of a model that knows nothing.
#
# **Exercise 14.1** A row repeats n = 20 tokens. The model is at position 25 (the first is position 0) and
# has to predict position 26. At which position stands the token that a copying head must look at? It is
# the one that came after the earlier copy of the present token.

# %% tags=["14.1"]
looks_at = None

check("14.1", looks_at)

# %% [markdown]
# ## Train, and watch
#
# The model has one block of four heads. Copying takes two steps: a position must know which token came
# before it, and a later position must look for that. The setting `smear` does the first step. It adds a
# learned fraction of the previous token's embedding to each embedding:

# %%
source(SmearedEmbedding)

# %% [markdown]
# While it trains, we measure two losses: of the tokens said for the first time, and of the repeated ones. And for
# each head one number, its **induction score**: on n random tokens said twice, the mean weight with which position
# t of the second half looks at position t - n + 1. That is the token after the earlier copy. A head with a high
# score is an **induction head**. Several heads may become one; below, the strongest is followed.

# %%
settings = Settings(
    **dict(n_layer=1, n_head=4, n_embd=64, n_inner=16, block_size=T, pos="rope", smear=True),
    **dict(optimizer="muon", learning_rate=3e-3, muon_lr=0.02, weight_decay=0.0),
    **dict(max_iters=240, warmup_iters=20, decay_lr=False),
)
torch.manual_seed(0)
model = GPT(model_config(settings, V))
optimizers = make_optimizers(model, settings)


@torch.no_grad()
def two_losses(model, rows, lengths):
    """Mean loss of tokens said for the first time, and of repeated ones."""
    logits = model(rows[:, :-1])[0]
    losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    losses = losses.view(len(rows), -1)  # (B, T - 1)
    is_repeated = torch.arange(1, T) >= lengths + 1  # nothing announces token n
    return losses[~is_repeated].mean().item(), losses[is_repeated].mean().item()


unseen = repeated(64)
steps, losses, scores = [], [], []
for step in range(settings.max_iters + 1):
    if step % 20 == 0:
        steps.append(step)
        losses.append(two_losses(model, *unseen))
        scores.append(head_badges(model)[1][0])  # (H,)
    rows, _ = repeated(16)
    set_learning_rates(optimizers, step, settings)
    model(rows[:, :-1], rows[:, 1:])[1].backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()

for step, (first, again), score in list(zip(steps, losses, scores, strict=True))[::3]:
    shown = " ".join(f"{each:.2f}" for each in score.tolist())
    print(f"step {step:3}: loss first {first:.2f}, repeated {again:.2f}; induction {shown}")

# %% [markdown]
# The loss of new tokens stays near ln 16 = 2.77 or above it: there is nothing to learn. The loss of
# repeated tokens falls slowly at first, then fast, and in the same steps a score rises.

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3))
axes[0].plot(steps, losses, label=["first time", "repeated"])
axes[0].set(title="the loss of repeated tokens falls", xlabel="step", ylabel="loss in nats")
axes[1].plot(steps, torch.stack(scores).numpy(), label=[f"head {h}" for h in range(4)])
axes[1].set(title="an induction head forms", xlabel="step", ylabel="induction score")
for axis in axes:
    axis.legend()
picture("14_induction_forms")

# %% [markdown]
# ## Find it
#
# `head_badges` gives three scores of every head. They are the badges that `serve.py` shows on its page.

# %%
source(head_badges)

# %%
previous, induction, first = head_badges(model)  # (L, H) each
for h in range(4):
    badges = (
        f"previous {previous[0, h]:.2f}, induction {induction[0, h]:.2f}, first {first[0, h]:.2f}"
    )
    print(f"head {h}: {badges}")
best = int(induction[0].argmax())
even_weight = (1 / torch.arange(25, 49)).mean().item()
print(
    f"the induction head is head {best}; a head that looks everywhere evenly has {even_weight:.2f}"
)

# %% [markdown]
# Each line is a head, with its mean weight on the token before, on the token after an earlier copy, and on
# the first token. The last line compares: an even average over the past gives far less.
#
# The same in its **attention map**, the matrix of the weights with which each position looks at each. Here
# 24 tokens are said twice. Look for the line in the lower half, 23 positions to the left of the diagonal.
# There is more than that line, since some tokens stand in the row several times: with 16 different tokens
# in a piece of 24, there are other earlier copies to look at.

# %%
row, _ = repeated(1, shortest=24)
found = trace(model, row[0])
maps = found.attention(0)  # (H, T, T)
plt.figure(figsize=(4.2, 3.6))
plt.imshow(maps[best].numpy())
plt.colorbar(label="weight")
plt.gca().set(title=f"head {best}: 24 tokens, twice", xlabel="looks at", ylabel="position")
picture("14_attention_map")

# %% [markdown]
# **Exercise 14.2** Write `induction_score(weights, n)` for the map of one head, weights (2n, 2n), of n
# tokens said twice: the mean weight of positions n to 2n - 1 on the token after their earlier copy.


# %% tags=["14.2"]
def induction_score(weights, n):
    return None


check("14.2", induction_score)

# %% [markdown]
# ## Switch it off
#
# A high score says where a head looks, not what it is good for. To know that, take it away:
# `switched_off` replaces what a head hands over by zeros, and the rest of the model runs as before.

# %%
source(switched_off)

# %%
print("all heads: first {:.2f}, repeated {:.2f}".format(*two_losses(model, *unseen)))
for h in range(4):
    mask = torch.zeros(1, 5, dtype=torch.bool)  # (L, H + 1), the last column switches MLPs
    mask[0, h] = True
    with switched_off(model, mask):
        first_loss, repeated_loss = two_losses(model, *unseen)
    mark = " <- the induction head" if h == best else ""
    print(f"without head {h}: first {first_loss:.2f}, repeated {repeated_loss:.2f}{mark}")

best_two = induction[0].topk(2).indices
mask = torch.zeros(1, 5, dtype=torch.bool)
mask[0, best_two] = True
with switched_off(model, mask):
    first_loss, repeated_loss = two_losses(model, *unseen)
print(f"without heads {best_two.tolist()}: first {first_loss:.2f}, repeated {repeated_loss:.2f}")

# %% [markdown]
# The first line is the whole model. In each other line one head is off; the rise of the second number is
# what this head was worth for copying. Heads can share the work, so the last line has the two heads with
# the highest scores off at once.
#
# The head is half of the circuit. The other half is `smear`: without it the keys do not say what came
# before. Set it to zero, and look at both numbers again.

# %%
smear = model.embed_tokens.smear.data
kept = smear.clone()
smear.zero_()
print("without smear: first {:.2f}, repeated {:.2f}".format(*two_losses(model, *unseen)))
print(f"without smear, induction score of head {best}: {head_badges(model)[1][0, best]:.2f}")
smear.copy_(kept)

# %% [markdown]
# The weights of the head are untouched, and yet its score and the copying are lost: a head is only as good
# as what the layers before it write. A model without `smear` needs a second layer for this: first a head
# that looks at the previous token, then the induction head.
#
# **Exercise 14.3** Write `loss_without(model, idx, layer, head)`: the model's mean loss on idx (B, T), each
# token predicted from those before it, with one head switched off. Give a number.


# %% tags=["14.3"]
def loss_without(model, idx, layer, head):
    return None


check("14.3", loss_without)

# %% [markdown]
# ## The logit lens
#
# Every part adds to the residual stream, and the head of the model reads the stream at the end. The **logit
# lens** lets the head read it earlier: after the embedding, after attention, after the MLP. It shows where
# in the model an answer appears. `trace` keeps the stream after every part, and `lens` reads it.

# %%
position = 40
answer = int(row[0, position + 1])
ids, logprobs, ranks = lens(found, [position], k=1)
print(f"at position {position} stands token {int(row[0, position])}; after it comes token {answer}")
for place, stage in enumerate(("embedding", "attention", "MLP")):
    says, p = int(ids[place, 0, 0]), logprobs[place, 0, 0].exp()
    print(
        f"after {stage:9}: token {says:2} with p = {p:.2f}; rank of {answer} is {ranks[place, 0]}"
    )

positions = list(range(24, 47))
ranks = lens(found, positions, k=1)[2].float().mean(1)  # (2 L + 1,)
print("mean rank of the right token, positions 24 to 46:", [round(r, 2) for r in ranks.tolist()])

# %% [markdown]
# The lines follow one position: the likeliest token after each part, and the rank of the right one (0 is
# the likeliest). After the embedding it is the present token itself, because the head of the model has the
# same matrix as the embedding (`tie_weights`). The last line is the mean of the ranks over the second half.
# A guess would have rank 7.5 in the mean. It is attention that brings the answer.
#
# **Exercise 14.4** Write `lens_probability(model, stream, token)`: the probability that the logit lens gives
# to a token, for a stream (C,) of one position. The model has `final_norm` and `head`.


# %% tags=["14.4"]
def lens_probability(model, stream, token):
    return None


check("14.4", lens_probability)

# %% [markdown]
# ## Who pushed the logit?
#
# The stream at the end is a sum, and the logit is a product with it. With the number by which the norm
# divides held fixed, a logit is a sum over all parts: each has its **push**.

# %%
heads, mlps, others = pushes(found, position, answer)
for h in range(4):
    print(f"head {h}: {heads[0, h]:+.2f}")
print(f"MLP:    {mlps[0]:+.2f}")
for name, push in others.items():
    print(f"{name}: {push:+.2f}")
total = heads.sum() + mlps.sum() + sum(others.values())
print(f"sum {total:.4f}, the logit itself {found.logits[position, answer]:.4f}")

# %% [markdown]
# One line a part, and the last line compares their sum with the logit that the model gives: they agree up
# to rounding. A push counts the direct way only. What a head did to the MLP after it counts as the MLP's.

# %% [markdown]
# ## Break it
#
# The head looks for tokens, not for distances: this is why it copies pieces of any length. Break the
# repetition instead: replace the token after the earlier copy by another one. If the head copies, the
# model now expects that one.

# %%
n = 24
changed = row[0].clone()
source_position = position - n + 1  # where position 40 looks
new = (answer + 1) % V
changed[source_position] = new
with torch.no_grad():
    before = model(row)[0][0, position].softmax(-1)
    after = model(changed[None])[0][0, position].softmax(-1)
print(f"as it was: p({answer}) = {before[answer]:.2f}, p({new}) = {before[new]:.2f}")
print(f"changed:   p({answer}) = {after[answer]:.2f}, p({new}) = {after[new]:.2f}")

# %% [markdown]
# The token at position 17, 23 positions back, was changed; the two lines give the probabilities of the old and of the
# new one after position 40. Now change a line yourself: train with `smear=False` above, and see in the printed losses
# what becomes of the induction head in as many steps.
#
# ## Where it happens
#
# | what | where |
# |---|---|
# | attention maps | `model.py`: `GPT.attention_maps`; of a trace: `glass/trace.py`: `Trace.attention` |
# | induction score | `glass/trace.py`: `head_badges` |
# | switching off | `glass/trace.py`: `switched_off` |
# | logit lens | `glass/trace.py`: `lens` |
# | pushes | `glass/trace.py`: `pushes` |
# | all of it on a page | `serve.py`, and `sample.py --show_attention=FILE.png` |
#
# ## To read
# - Olsson et al. 2022, "In-context learning and induction heads", arXiv:2209.11895.
# - nostalgebraist 2020, "interpreting GPT: the logit lens", on lesswrong.com.
# - Kobayashi et al. 2020, "Attention is not only a weight", arXiv:2004.10102: the weights alone can mislead.
