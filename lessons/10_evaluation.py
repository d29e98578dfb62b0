# %% [markdown]
# # 10 How good is it?
#
# After this lesson you can
# - compare models with different tokenizers, by bits per byte,
# - score multiple choice from log-likelihoods, and say why the length of an answer matters,
# - put an interval beside every figure, and say whether two models differ,
# - say what chance and contamination do to a figure.
#
# You need lessons 02 (loss, bits per byte) and 08. Time: 40 minutes, exercises included.

# %%
import math
import random

import matplotlib.pyplot as plt
import numpy as np
import torch
from desk import check, hint, picture, source  # noqa: F401
from torch.nn import functional as F

import bpe
from glass.core import centred
from glass.intervals import paired_difference, wilson
from glass.score import encode_pair, score_endings
from model import GPT, GPTConfig

torch.manual_seed(0)
rng = random.Random(0)

# %% [markdown]
# ## Something to measure
#
# Two small models, trained here in seconds on made-up sentences. In them a subject and its verb agree: `the cat
# runs`, `the cats run`. Sometimes words stand between the two. One model is trained for longer than the other.

# %%
NOUNS = "cat dog bird horse girl king".split()
VERBS = "run sing sleep read swim wait".split()


def sentence():
    """(beginning, right verb, wrong verb)"""
    noun, verb = rng.choice(NOUNS), rng.choice(VERBS)
    near = rng.choice(["", "", " by the river", " of the old house", " with two hats"])
    if rng.random() < 0.5:
        return f"the {noun}s{near}", verb, f"{verb}s"
    return f"the {noun}{near}", f"{verb}s", verb


text = " ".join(
    f"{beginning} {right} ." for beginning, right, _ in (sentence() for _ in range(4000))
)
tokenizer = bpe.WordTokenizer.train([text])
ids = torch.tensor(tokenizer.encode(text))
print(text[:120])
print(len(ids), "tokens,", tokenizer.vocab_size, "in the vocabulary")


def trained(steps):
    torch.manual_seed(1)
    model = GPT(
        GPTConfig(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=32)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(len(ids) - 33, (32, 1))
        rows = ids[starts + torch.arange(33)]  # (B, T + 1)
        _, loss = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), loss.item()


(short, loss_short), (long, loss_long) = trained(130), trained(170)
print(f"training loss after 130 steps {loss_short:.3f}, after 170 {loss_long:.3f}")

# %% [markdown]
# ## Loss, and why bits per byte
#
# A loss is a mean over tokens. A tokenizer with longer tokens has fewer of them, and each is harder, so its loss is
# higher for an equally good model. The bits of the whole text, divided by its bytes, do not depend on how it was cut:
# $\mathrm{bits\ per\ byte} = \dfrac{\mathrm{loss} \cdot \mathrm{tokens}}{\ln 2 \cdot \mathrm{bytes}}$.

# %%
n_bytes, n_tokens = len(text.encode()), len(ids)
print(
    f"{loss_long:.3f} nats a token are {loss_long * n_tokens / math.log(2) / n_bytes:.3f} bits a byte"
)
print(
    f"with a token for each character the same bits would be {loss_long * n_tokens / n_bytes:.3f} nats a token"
)

# %% [markdown]
# ## Multiple choice from log-likelihoods
#
# A base model does not answer; it continues. So a question is scored by how likely the model finds each possible
# continuation: the sum of the log-probabilities of the ending's tokens after the context. The likeliest ending is the
# model's choice. **acc** counts how often it is right.

# %%
context, right, wrong = "the cats by the river", " sing", " sings"


def log_likelihood(model, context, ending):
    before, after = tokenizer.encode(context), tokenizer.encode(ending)
    with torch.no_grad():
        logprobs = F.log_softmax(model(torch.tensor([before + after]))[0][0], dim=-1)  # (T, V)
    places = range(len(before) - 1, len(before) + len(after) - 1)  # token t is predicted at t - 1
    return sum(logprobs[place, token].item() for place, token in zip(places, after, strict=True))


for ending in (right, wrong):
    pair = encode_pair(tokenizer, context, ending)
    theirs = score_endings(long, [pair])[0].logprob
    print(
        f"{ending!r}: {log_likelihood(long, context, ending):.4f} by hand, {theirs:.4f} by glass/score.py"
    )

# %%
items = [sentence() for _ in range(300)]


def is_right(model):
    pairs = [
        encode_pair(tokenizer, beginning, f" {verb}")
        for beginning, *verbs in items
        for verb in verbs
    ]
    scores = [score.logprob for score in score_endings(model, pairs)]
    return np.array([scores[i] > scores[i + 1] for i in range(0, len(scores), 2)])


right_short, right_long = is_right(short), is_right(long)
print(
    f"acc of 300 items: {right_short.mean():.3f} after 130 steps, {right_long.mean():.3f} after 170; chance 0.500"
)

# %% [markdown]
# Endings of different length are not alike: each further token multiplies by a probability below 1. **acc_norm**
# divides the log-likelihood by the ending's number of characters, and chooses the largest quotient.
#
# **Exercise 10.1** Three endings have the log-likelihoods -6.0, -9.0 and -8.0 nats, and 10, 30 and 16 characters.
# Which does acc choose, and which acc_norm? Give the two indices, counted from 0.

# %% tags=["10.1"]
chosen = None

check("10.1", chosen)

# %% [markdown]
# ## How sure?
#
# With 300 items, a model that is right with probability p is right in 300 p of them, more or less. How much more or
# less is the **interval**: a rule that gives low and high such that the true p lies between them in 95 of 100
# experiments. The rule here is Wilson's. For k of n right, with share s = k / n and z = 1.96, the distance from its
# mean, in standard deviations, within which a normal distribution has 95% of its draws:
#
# $$\frac{s + \frac{z^2}{2n} \pm z\sqrt{\frac{s(1-s)}{n} + \frac{z^2}{4n^2}}}{1 + \frac{z^2}{n}}$$

# %%
for name, flags in (("130 steps", right_short), ("170 steps", right_long)):
    low, high = wilson(flags.sum(), len(flags))
    print(f"{name}: {flags.mean():.3f}, 95% interval {low:.3f} to {high:.3f}")

covered = 0
for _ in range(2000):
    k = np.random.default_rng(_).binomial(100, 0.9)
    low, high = wilson(k, 100)
    covered += low <= 0.9 <= high
print(f"p = 0.9, n = 100: the interval held p in {covered / 2000:.3f} of 2,000 experiments")

# %% [markdown]
# **Exercise 10.2** The interval of 80 right of 100, to three decimals: (low, high). Do it by the formula.

# %% tags=["10.2"]
interval = None

check("10.2", interval)

# %% [markdown]
# **Exercise 10.3** For a share near 0.5 the interval is about s ± 1.96 sqrt(0.25 / n). How many items are needed for
# ± 0.01?

# %% tags=["10.3"]
items_needed = None

check("10.3", items_needed)

# %% [markdown]
# ## Do two models differ?
#
# Both models answered the same items. Items differ in difficulty, and both find the same ones hard, so the
# difference is known better than if each model had had items of its own: look at each item's difference, and take
# the interval of its mean. `evaluate.py --compare` does that. The interval is found by the **bootstrap**: draw 300
# of the items again and again, with repetition, take the mean of each draw, and keep the middle 95% of these means.

# %%
difference = right_long.mean() - right_short.mean()
low, high = paired_difference(right_long, right_short)
print(f"difference {difference:+.3f}, paired 95% interval {low:+.3f} to {high:+.3f}")
both_alone = [wilson(flags.sum(), len(flags)) for flags in (right_short, right_long)]

plt.figure(figsize=(5.5, 2.4))
for y, (flags, (low_alone, high_alone)) in enumerate(
    zip((right_short, right_long), both_alone, strict=True)
):
    plt.plot([low_alone, high_alone], [y, y], lw=3)
    plt.plot(flags.mean(), y, "ko")
plt.axvline(0.5, ls="--", color="grey")
plt.yticks([0, 1], ["130 steps", "170 steps"])
plt.xlabel("share right, 95% interval; dashed: chance")
plt.title("Agreement of subject and verb, 300 items")
picture("10_intervals")

# %% [markdown]
# ## Chance
#
# Half of two-way items are right by guessing, a quarter of four-way items. **Centred**, a figure is 0 for guessing
# and 1 for all right, so tasks with different chance levels can be averaged: (accuracy - chance) / (1 - chance).
# glassCORE is such a mean over seven kinds of tasks that `evaluate.py` makes itself, named after CORE, the mean
# over 22 tasks of Li et al. 2024 (arXiv:2406.11794).

# %%
print(
    "0.625 of four-way items:",
    centred(0.625, 0.25),
    "- 0.625 of two-way items:",
    centred(0.625, 0.5),
)

# %% [markdown]
# ## Contamination
#
# A test item that stands in the training text measures memory. The usual count is how many items share 13 words in a
# row with it. By hand, with 5 words since our sentences are short:


# %%
def grams(words, n):
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


seen = grams(text.split(), 5)
in_training = sum(
    bool(grams(f"{beginning} {verb} .".split(), 5) & seen) for beginning, verb, _ in items
)
n_long = sum(len(f"{beginning} {verb} .".split()) >= 5 for beginning, verb, _ in items)
print(
    f"{in_training} of the {n_long} items with 5 words or more share 5 words in a row with the training text"
)

# %% [markdown]
# There are so few of these made-up sentences that all were seen: the figure above says how well the model
# learned these sentences, not how well it knows English.
#
# **Exercise 10.4** Write `shares_words(item, text, n)`: whether an item (a text) and a text have n words in a row in
# common, upper and lower case alike.


# %% tags=["10.4"]
def shares_words(item, text, n):
    return None


check("10.4", shares_words)

# %% [markdown]
# ## Break it
#
# Let the context's last space stay with the context. Words begin with their space in most tokenizers, so the ending
# is then cut into tokens that the model never saw after such a context. With GPT-2's tokenizer `"The capital is "`
# + `"Paris"` is scored far lower than `"The capital is"` + `" Paris"`. `encode_pair` in `glass/score.py` moves the
# space; take that out, run this cell again after a restart of the kernel, and its last line ends the context with
# the space.

# %%
merges = bpe.BPETokenizer.train([text], 300)
for context, ending in (("the cats", " sing"), ("the cats ", "sing")):
    alone = merges.encode(context) + merges.encode(ending)
    print(
        repr(context),
        "+",
        repr(ending),
        "by themselves:",
        [merges.decode([token]) for token in alone],
    )
print(
    "encode_pair:",
    [
        [merges.decode([token]) for token in part]
        for part in encode_pair(merges, "the cats ", "sing")
    ],
)

# %% [markdown]
# ## Where it happens
#
# | what | where |
# |---|---|
# | log-likelihoods of endings | `glass/score.py`: `score_endings` |
# | acc, acc_norm | `evaluate.py`: `measure_items` |
# | intervals | `glass/intervals.py`: `wilson`, `bootstrap_ratio`, `paired_difference` |
# | our own suite | `glass/core.py`; `python evaluate.py` |
# | contamination | `glass/contamination.py` |
#
# ## To read
# - Brown et al. 2020, "Language models are few-shot learners", arXiv:2005.14165, appendix C: contamination.
# - Gao et al., lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness): how the field scores.
# - Miller 2024, "Adding error bars to evals", arXiv:2411.00640.
