# %% [markdown]
# # 02 Counting pairs: the bigram model
#
# After this lesson you can
# - cut a text into windows of inputs and targets,
# - build the smallest language model from counts, and write text with it,
# - say what logits, softmax, cross-entropy, perplexity and bits per byte are, with a number for each,
# - get the same model by gradient descent, with the class that also makes GPT-2.
#
# You need lesson 01 (tokens) and a little of torch: tensors and indexing. Time: 45 minutes, exercises
# included.
#
# Letters, as in the code: B sequences, T positions, C channels, V tokens in the vocabulary.

# %%
import math
import re
from itertools import islice

import matplotlib.pyplot as plt
import numpy as np
import torch
from desk import check, hint, picture, source  # noqa: F401
from torch.nn import functional as F

import bpe
from glass import shards, sources
from model import GPT, GPTConfig, embed_tokens

# %% [markdown]
# ## A text of 27 characters
#
# The text is from the help pages that every Python carries. To keep the tables small, we make all letters
# small and turn everything else into a space. One character is one token. The last tenth is put aside: this
# **validation** text is not used to build the model, only to judge it.

# %%
torch.manual_seed(0)
documents = "\n".join(islice(sources.pydoc_documents(), 60))
text = re.sub("[^a-z]+", " ", documents.lower())
tokenizer = bpe.CharTokenizer.train(text, special_tokens=[bpe.UNKNOWN])
V = tokenizer.vocab_size
ids = torch.tensor(tokenizer.encode(text))  # (N,)
n_training = len(ids) * 9 // 10
training, validation = ids[:n_training], ids[n_training:]
print(repr(text[1000:1060]))
print(f"{len(training):,} training tokens, {len(validation):,} for validation, V = {V}")

# %% [markdown]
# V is 28: the space, 26 letters, and the unknown token, which does not occur here.
#
# ## Windows: inputs and targets
#
# A language model predicts the next token. So a **target** is the token that follows its input: the same text, one
# place later. A model reads a window of at most T tokens at once, and T is called the **block size**. One window
# holds T predictions, because each of its positions has a target. The tokens up to a position are the **context** of
# that prediction. The longest context that a model can use is its **block size**.

# %%
T = 6
for t in range(T):
    context, target = training[: t + 1], training[t + 1]
    print(repr(tokenizer.decode(context.tolist())), "->", repr(tokenizer.decode([target.item()])))

# %% [markdown]
# A long text gives many windows. The **stride** is the step from the start of a window to the start of the next. With
# a stride of T every token but the first is a target once, but for a rest at the end. With a smaller stride windows
# overlap, and tokens are used repeatedly.


# %%
def windows(ids, T, stride):
    starts = range(0, len(ids) - T, stride)  # T inputs and one more target must follow
    inputs = torch.stack([ids[start : start + T] for start in starts])
    targets = torch.stack([ids[start + 1 : start + 1 + T] for start in starts])
    return inputs, targets  # (windows, T) each


inputs, targets = windows(validation, 64, 64)
theirs = next(
    shards.evaluation_batches([validation.numpy()], block_size=64, batch_size=len(inputs))
)
print("shapes", tuple(inputs.shape), tuple(targets.shape))
print("the same inputs as glass/shards.py: ", np.array_equal(inputs, theirs[0]))
print("the same targets as glass/shards.py:", np.array_equal(targets, theirs[1]))
print("windows of 10 tokens, T = 4: stride 4", len(windows(torch.arange(10), 4, 4)[0]), end=", ")
print("stride 1", len(windows(torch.arange(10), 4, 1)[0]))

# %% [markdown]
# Our windows are those that the project evaluates with. From 10 tokens, windows of 4 come twice with a stride
# of 4, and six times with a stride of 1. A rest that is too short for a whole window is left out here.
#
# **Exercise 2.1** Write `n_windows(N, T, stride)`: how many whole windows a text of N tokens gives, by a
# formula without a loop or `range`. N is at least T + 1.


# %% tags=["2.1"]
def n_windows(N, T, stride):
    return None  # an integer


check("2.1", n_windows)

# %% [markdown]
# ## A table of counts
#
# The **bigram** model looks at one token only, the last. How often does token j follow token i? Count all
# pairs of neighbours in the training text, in a table N with V rows and V columns.

# %%
rows = [[0.0] * V for _ in range(V)]
for i, j in zip(training[:-1].tolist(), training[1:].tolist(), strict=True):
    rows[i][j] += 1
N = torch.tensor(rows)  # (V, V)

quicker = torch.bincount(training[:-1] * V + training[1:], minlength=V * V).view(V, V)
print("counted in one go, the same:", torch.equal(N, quicker.float()))
q, u = tokenizer.encode("qu")
print(f"q occurs {int(N[q].sum())} times, and {int(N[q, u])} times u follows it")

# %% [markdown]
# The loop and the count in one go give the same table, and q is nearly always followed by u.
#
# Row i divided by its sum gives the probability P of each next token. We add 1 to every count first.
# Otherwise a pair that the training text does not have would be impossible, and the first such pair in
# another text would cost infinitely much, as we will see.

# %%
P = (N + 1) / (N + 1).sum(dim=1, keepdim=True)  # (V, V), each row sums to 1
print(
    "likeliest after q:",
    [(tokenizer.decode([j]), round(P[q, j].item(), 2)) for j in P[q].topk(3).indices.tolist()],
)

names = list("_" + "abcdefghijklmnopqrstuvwxyz")  # _ is the space
plt.figure(figsize=(5.4, 4.6))
plt.imshow(P[:27, :27].numpy())
plt.xticks(range(27), names, fontsize=7)
plt.yticks(range(27), names, fontsize=7)
plt.xlabel("next token")
plt.ylabel("last token")
plt.colorbar(fraction=0.046)
plt.title("Probability of the next character (_ is a space)")
picture("02_counts")

# %% [markdown]
# A bright square is a pair that the text likes. With one more in each of 28 places, the share of u after q is
# smaller than in the counts: that is the price of the 1 where counts are few.
#
# ## Writing with it
#
# This table is a language model. Begin with a space, draw the next token from the row of the last one, and go
# on.

# %%
written = tokenizer.encode(" ")
for _ in range(100):
    written.append(torch.multinomial(P[written[-1]], 1).item())
print(repr(tokenizer.decode(written)))
uniform = torch.randint(27, (100,)).tolist()
print("for comparison, all characters alike:", repr(tokenizer.decode(uniform)))

# %% [markdown]
# The first line has spaces and vowels where English could have them. In the second they stand anywhere.
#
# ## How good is it? Cross-entropy
#
# A good model gives the tokens that really come a high probability. The loss of one prediction is $-\ln p$,
# where p is the probability of the right token: 0 if the model was certain and right, and large if it held it
# for unlikely. The mean over all predictions is the **cross-entropy**. Its unit is the nat, because it uses
# the natural logarithm.
#
# $$\mathrm{loss} = -\frac{1}{n}\sum_{t=1}^{n} \ln P[x_t, x_{t+1}]$$

# %%
last, following = validation[:-1], validation[1:]
loss = -P[last, following].log().mean()
frequency = torch.bincount(training, minlength=V) + 1.0
unigram_loss = -(frequency / frequency.sum())[following].log().mean()
print(f"all {V} tokens alike:           {math.log(V):.3f} nats (ln V)")
print(f"by frequency alone:           {unigram_loss:.3f}")
print(f"by the token before (bigram): {loss:.3f}")

# %% [markdown]
# Each line uses more of what is known about the text, and its loss is lower.
#
# Models do not give probabilities. They give scores, one for each token of the vocabulary, of any size and
# sign: **logits**. **Softmax** makes probabilities of them, positive and with a sum of 1:
#
# $$\mathrm{softmax}(z)_j = \frac{e^{z_j}}{\sum_k e^{z_k}}$$
#
# The logarithms of our probabilities are logits that fit: softmax gives P back. Torch's `cross_entropy` takes
# logits.

# %%
z = P.log()  # (V, V): logits of the next token
by_hand = z.exp() / z.exp().sum(dim=1, keepdim=True)
print("largest difference from P:", (by_hand - P).abs().max().item())
print(
    "largest difference if all logits rise by 5:", (F.softmax(z + 5, dim=1) - P).abs().max().item()
)
theirs = F.cross_entropy(z[last], following)
print("difference from torch's cross_entropy:", (theirs - loss).abs().item())

# %% [markdown]
# Adding the same number to all logits changes nothing: only differences count.
#
# ## Perplexity, and bits per byte
#
# **Perplexity** is $e^{\mathrm{loss}}$: the model is as uncertain as if it had to choose among so many
# equally likely tokens. Divided by ln 2, the loss is in bits. And divided by the bytes of the text instead of
# its tokens, it is **bits per byte**. Only that can be compared between tokenizers: a token of a large
# vocabulary holds more bytes, so it is harder to predict.

# %%
print(f"perplexity {math.exp(loss):.2f}, of {V} for a model that knows nothing")
print(
    f"{loss / math.log(2):.3f} bits per token; a character here is one byte, so also bits per byte"
)

# %% [markdown]
# **Exercise 2.2** On paper. A model has given the three tokens that really came the probabilities 1/2, 1/4
# and 1/8. What is its loss in nats, its perplexity, and its loss in bits per token? Give a tuple of three
# numbers.

# %% tags=["2.2"]
three_measures = None

check("2.2", three_measures)

# %% [markdown]
# **Exercise 2.3** Write `bits_per_byte(losses, text)`: `losses` (n,) are the losses of all tokens of the text
# in nats, and a character of the text may take more than one byte. It is compared with what `evaluate.py`
# reports.


# %% tags=["2.3"]
def bits_per_byte(losses, text):
    return None  # a number


check("2.3", bits_per_byte)

# %% [markdown]
# ## Embedding: a row of a matrix
#
# Counting works for pairs. With a context of two tokens the table would have $V^2$ rows, with three $V^3$, and nearly
# all counts would be 0. So the logits must come from a computation whose **parameters**, its numbers, are learned.
# Its first part is the **embedding**, a matrix with a row for each token. A row is a vector of C numbers; each place
# in it is called a **channel**.
#
# Taking row i is the same as a product with a **one-hot** vector, which is 1 at place i and 0 elsewhere. Nobody
# computes the product, but it shows that an embedding is a **linear layer**, a product with a learned matrix, like
# any other.

# %%
C = 32
model = GPT(
    GPTConfig(
        vocab_size=V, block_size=64, n_layer=0, n_head=1, n_embd=C, pos="rope", tie_weights=False
    )
)
W = model.tok_emb.weight.detach()  # (V, C)
idx = torch.tensor([tokenizer.encode("the")])  # (1, 3)
one_hot = F.one_hot(idx, V).float()  # (1, 3, V)
looked_up = embed_tokens(model.tok_emb, idx, None, None)  # (1, 3, C)
print("one-hot", tuple(one_hot.shape), "embedded", tuple(looked_up.shape))
print("largest difference:", (one_hot @ W - looked_up).abs().max().item())

# %% [markdown]
# The three tokens have become three rows of 32 channels, the same in both ways.
#
# ## The same model, learned
#
# This is the project's GPT with `n_layer=0`: no attention and no MLP (the other parts of a GPT, lessons 03 and 05). A
# token's embedding is normalised (lesson 05), and the **head**, a matrix of V rows and C channels, turns it into V
# logits. So the logits depend on the last token alone: a bigram model again, and `config/bigram.py` trains it by
# command.
#
# Nothing is counted now. The **gradient** of the loss says, for each parameter, how fast the loss rises when that
# parameter rises. Torch finds it by itself: `loss.backward()` computes it for all parameters, `optimizer.step()`
# moves each parameter a little against its gradient, and `optimizer.zero_grad()` clears the gradients, since
# `backward()` adds to them. Where no gradient is needed, `torch.no_grad()` or `.detach()` says so. We take windows at
# random places, compute the loss, and move all parameters a little in the direction in which the loss falls. The
# optimizer AdamW does that, with smaller and smaller moves (lesson 06). With C at least as large as V, embedding
# times head can give nearly any table of logits. (The other settings below do not matter here; later lessons explain
# them.)

# %%
source(GPT.forward)

# %%
starts = torch.randint(len(training) - 64, (400, 32))  # of 32 windows in each of 400 steps
places = starts[..., None] + torch.arange(65)  # (400, 32, 65)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 400)
losses = []
for rows in training[places]:
    _, step_loss = model(rows[:, :-1], rows[:, 1:])
    optimizer.zero_grad()
    step_loss.backward()
    optimizer.step()
    schedule.step()
    losses.append(step_loss.item())

with torch.no_grad():
    _, validation_loss = model(inputs, targets)
print(f"loss of the first step {losses[0]:.3f}; ln V is {math.log(V):.3f}")
print(f"validation loss: learned {validation_loss:.3f}, counted {loss:.3f}")

plt.plot(losses, label="learned, batches of training text")
plt.axhline(loss.item(), color="black", linestyle="--", label="counted, validation text")
plt.xlabel("step")
plt.ylabel("loss in nats")
plt.title("Learning arrives where counting was")
plt.legend()
picture("02_learned")

# %% [markdown]
# The loss begins near ln V, the loss of a model that knows nothing, and comes close to that of the table. Are
# the probabilities the same, too? Row i of the learned table is what the model says after token i.

# %%
with torch.no_grad():
    learned = F.softmax(model(torch.arange(V)[:, None])[0][:, 0], dim=1)  # (V, V)
distance = (learned - P).abs().sum(dim=1) / 2  # (V,), from 0, the same, to 1
share = N.sum(dim=1) / N.sum()
print(f"distance of a learned row from the counted one, on average {(share * distance).sum():.3f}")
print(
    "learned, after q:",
    [
        (tokenizer.decode([j]), round(learned[q, j].item(), 2))
        for j in learned[q].topk(3).indices.tolist()
    ],
)
generated = model.generate(torch.zeros(1, 1, dtype=torch.int64), 100)
print(repr(tokenizer.decode(generated[0].tolist())))

# %% [markdown]
# The distance is 0 where two rows are the same, and 1 where they share no token. The rows agree closely.
# Where counts are few, as after q, the 1 that we added to each count makes a difference: the learned model
# has no such 1.
#
# ## What the gradient says
#
# Why does a model that never counts end at the counts? The gradient of the loss with respect to the logits of one
# prediction is the probability of each token, minus 1 at the right one. So each step lowers all logits in proportion
# to their probability and raises the right one. That stops, on average, where probability and frequency are equal.
#
# **Exercise 2.4** Write `logits_gradient(z, target)`: the gradient of the cross-entropy in the logits z (V,),
# for one target (an integer), without autograd. It is compared with `backward`.


# %% tags=["2.4"]
def logits_gradient(z, target):
    return None  # (V,)


check("2.4", logits_gradient)

# %% [markdown]
# ## Break it
#
# Two mistakes that are often made. First, targets that are not shifted: the model has to predict the token
# that it has just read. The loss becomes very small, and the model is worthless. In the training cell above,
# write `rows[:, :-1]` twice instead of `rows[:, 1:]`, run it, and let the model write. Here with the table,
# which needs no training:

# %%
copied = torch.diag(torch.bincount(training, minlength=V)) + 1.0  # each token "follows" itself
copied = copied / copied.sum(dim=1, keepdim=True)
print(f"loss on targets that are not shifted: {-copied[last, last].log().mean():.3f}")
print(f"loss on the next token:               {-copied[last, following].log().mean():.3f}")
written = [tokenizer.encode("t")[0]]
for _ in range(20):
    written.append(torch.multinomial(copied[written[-1]], 1).item())
print(repr(tokenizer.decode(written)))

# %% [markdown]
# Second, without the 1 that we added to the counts, a pair that the training text does not have gets the
# probability 0. A single such pair makes the whole loss infinite.

# %%
unsmoothed = N / N.sum(dim=1, keepdim=True).clamp(min=1)
new_pairs = tokenizer.encode(" jqx ")
for smoothed, table in ((True, P), (False, unsmoothed)):
    pair_loss = -table[new_pairs[:-1], new_pairs[1:]].log().mean()
    print(f"smoothed {smoothed!s:5}: loss of ' jqx ' {pair_loss:.3f}")

# %% [markdown]
# ## Where it happens
#
# | what | where |
# |---|---|
# | windows for training, for evaluation | `glass/shards.py`: `Windows`, `evaluation_batches` |
# | embedding, head, logits | `model.py`: `embed_tokens`, `GPT.forward` |
# | cross-entropy | `model.py`: `cross_entropy` |
# | loss, perplexity, bits per byte of a run | `train.py`: `Pretraining.evaluate` |
# | the same of any text | `evaluate.py`: `measure_text` |
# | this model by command | `python train.py config/bigram.py` |
#
# ## To read
# - Shannon 1948, "A mathematical theory of communication": section 3 writes English from counts of letters and words.
# - Bengio et al. 2003, "A neural probabilistic language model", Journal of Machine Learning Research 3: embeddings.
