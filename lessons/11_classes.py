# %% [markdown]
# # 11 From a base to a use: classes
#
# After this lesson you can
# - read a class off a language model's last token, and say why the last,
# - fine-tune all of a model, its head alone, or a LoRA, and say what each costs,
# - compute precision, recall and F1, and judge a classifier beside baselines.
#
# You need lessons 06 (training) and 10 (intervals). Time: 40 minutes, exercises included.
#
# Letters: B sequences, T positions, C channels, r the rank of a LoRA.

# %%
import argparse
import copy
import inspect
import itertools
import json.decoder
import random
import tarfile

import matplotlib.pyplot as plt
import torch
from desk import check, hint, once, picture, source  # noqa: F401
from torch.nn import functional as F

import bpe
from glass.intervals import wilson
from glass.sources import is_prose, pydoc_documents
from glass.stage import bag_of_tokens
from model import GPT, GPTConfig, LoRALinear

torch.manual_seed(0)

# %% [markdown]
# ## The task
#
# A line of text: is it Python or English? The lines come from the documentation and the source that your Python
# carries. A **classification** names one of a few classes for each text.

# %%
documents = list(itertools.islice(pydoc_documents(), 60))
english = {
    line.strip() for text in documents for line in text.splitlines() if is_prose(line.strip())
}
code = "\n".join(inspect.getsource(module) for module in (argparse, json.decoder, tarfile))
lines = {line.strip() for line in code.splitlines()}
python = {
    line for line in lines if len(line) >= 20 and line[0] not in "#\"'" and set(line) & set("=([")
}

n = min(len(english), len(python), 1500)
rng = random.Random(0)
rows = [(line, 0) for line in rng.sample(sorted(english), n)] + [
    (line, 1) for line in rng.sample(sorted(python), n)
]
rng.shuffle(rows)
held_out, training = rows[:400], rows[400:800]
print(f"{len(training)} lines to learn from, {len(held_out)} to test on")
for line, label in training[:4]:
    print(label, line)

# %% [markdown]
# ## The base
#
# **Fine-tuning** begins with a model that was trained on something else: here a small one on all of these texts,
# without classes, to predict the next character. (The test lines are left out of its text. It is trained once and
# kept.)

# %%
LENGTH, STEPS = 32, 60
tested = {line for line, _ in held_out}
plain = "\n".join(line for line in sorted(english) + sorted(python) if line not in tested)
tokenizer = bpe.CharTokenizer.train([plain, *tested])
ids = torch.tensor(tokenizer.encode(plain))
shape = dict(
    vocab_size=tokenizer.vocab_size,
    block_size=LENGTH + 1,
    n_layer=2,
    n_head=2,
    n_embd=48,
    pos="rope",
)


def pretrain():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        starts = torch.randint(len(ids) - LENGTH - 1, (32, 1))
        windows = ids[starts + torch.arange(LENGTH + 1)]
        _, loss = model(windows[:, :-1], windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.2f} nats a character")
    return model.state_dict()


base = once("11_base", pretrain)

# %% [markdown]
# ## The last token
#
# A head of two classes reads one vector of C channels. Which position? Only the last one has seen the whole line,
# because nothing looks ahead. A line is followed by the end-of-text token, so that the last position is the same
# token for each.

# %%
END = tokenizer.special_tokens[bpe.END_OF_TEXT]


def encoded(rows):
    """(idx (B, T) padded at the right, lengths (B,), labels (B,))"""
    texts = [tokenizer.encode(line)[:LENGTH] + [END] for line, _ in rows]
    idx = torch.zeros(len(rows), LENGTH + 1, dtype=torch.int64)
    for place, text in enumerate(texts):
        idx[place, : len(text)] = torch.tensor(text)
    return (
        idx,
        torch.tensor([len(text) for text in texts]),
        torch.tensor([label for _, label in rows]),
    )


# %% [markdown]
# **Exercise 11.1** Write `last_vectors(hidden, lengths)`: hidden (B, T, C) of right-padded rows, lengths (B,) -> (B,
# C), the vector at the last real position of each row.


# %% tags=["11.1"]
def last_vectors(hidden, lengths):
    return None


check("11.1", last_vectors)

# %% [markdown]
# The product does the same:

# %%
source(GPT.class_logits)

# %% [markdown]
# ## Three ways to tune
#
# - **all**: every weight is trained.
# - **head alone**: the new head is trained, everything else is frozen. **Freezing** costs no gradient and no moments.
# - **LoRA**: each matrix W stays, and a product of two thin matrices is added to it: $W + \frac{\alpha}{r} B A$,
#   with A of r rows and B of r columns. B starts at 0, so at first nothing changes. The number $\alpha$ is chosen
#   once (16 here): the division by r keeps the size of the change alike when another rank is tried.


# %%
def tune(way):
    torch.manual_seed(1)
    ranks = dict(lora_rank=4) if way == "LoRA" else {}
    model = GPT(GPTConfig(**shape, n_classes=2, **ranks))
    model.load_state_dict(base, strict=False)  # the head is new, and so are A and B
    for name, parameter in model.named_parameters():
        is_new = name.startswith("classifier.") or ".lora_" in name
        parameter.requires_grad_(way == "all" or is_new)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    generator = random.Random(1)
    for _ in range(STEPS):
        idx, lengths, labels = encoded(generator.sample(training, 32))
        loss = F.cross_entropy(model.classify(idx, lengths), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), sum(parameter.numel() for parameter in trained)


idx, lengths, labels = encoded(held_out)
right, tuned = {}, {}
for way in ("all", "LoRA", "head alone"):
    model, n_trained = tune(way)
    with torch.no_grad():
        predicted = model.classify(idx, lengths).argmax(-1)
    right[way], tuned[way] = (predicted == labels).float(), (model, predicted)
    low, high = wilson(right[way].sum().item(), len(labels))
    print(
        f"{way:10} {n_trained:6,} weights trained; accuracy {right[way].mean():.3f} ({low:.3f} to {high:.3f})"
    )

# %% [markdown]
# LoRA gets about as far as training everything, with a ninth of the weights. The head alone stays behind: the frozen
# model was trained to predict the next character, and its last vector holds mostly that. There are ways between, such
# as training the last block too (`--trainable=last_block`).
#
# Some pad every text with the end-of-text token to one length and read the last column. That works, because the last
# position sees the whole text. We read the last real token, so a result does not depend on how far a row was padded.
#
# ## Is that good? Baselines
#
# A figure means little alone. Two baselines: always the larger class, and a bag of tokens, which looks at which
# characters occur, in any order, and has no idea of words.

# %%
majority = max(labels.float().mean().item(), 1 - labels.float().mean().item())
pairs = [[(tokenizer.encode(line), label) for line, label in some] for some in (training, held_out)]
bag = bag_of_tokens(*pairs, tokenizer.vocab_size)
print(f"the larger class: {majority:.3f}; a bag of characters: {bag:.3f}")

plt.figure(figsize=(5.5, 2.6))
figures = {"larger class": majority, "bag of characters": bag}
figures |= {way: flags.mean().item() for way, flags in right.items()}
plt.barh(list(figures), list(figures.values()))
plt.xlim(0.4, 1)
plt.xlabel("accuracy on 400 unseen lines")
plt.title("Python or English, from 400 examples")
picture("11_accuracy")

# %% [markdown]
# The bag is hard to beat: brackets and `=` give Python away, and the bag is told every character of the line while
# the model sees the first 32. On a task that characters do not solve it falls behind. Always print a baseline.
#
# ## Precision, recall, F1
#
# Accuracy hides which errors are made. For one class: **precision** is the share of lines called Python that are
# Python, **recall** the share of Python lines that were called so, and **F1** is their harmonic mean, 2 P R / (P +
# R).

# %%
_, predicted = tuned["head alone"]
confusion = torch.zeros(2, 2, dtype=torch.int64)
for true, guess in zip(labels.tolist(), predicted.tolist(), strict=True):
    confusion[true, guess] += 1
precision = confusion[1, 1] / confusion[:, 1].sum()
recall = confusion[1, 1] / confusion[1].sum()
print("rows: true, columns: predicted (English, Python)\n", confusion.tolist())
print(
    f"Python: precision {precision:.3f}, recall {recall:.3f}, F1 {2 * precision * recall / (precision + recall):.3f}"
)

# %% [markdown]
# **Exercise 11.2** Of 1,000 messages 100 are spam. A filter calls 90 messages spam, of which 72 are. What are its
# precision, its recall and its F1 for spam? And what accuracy has a filter that calls nothing spam? Give the four
# numbers.

# %% tags=["11.2"]
spam_figures = None

check("11.2", spam_figures)

# %% [markdown]
# ## LoRA by hand
#
# After training the product can be added to the matrix, and no trace of LoRA is left: the same logits, as fast as
# before.

# %%
model, _ = tuned["LoRA"]
layer = next(module for module in model.modules() if isinstance(module, LoRALinear))
by_hand = layer.weight + layer.scale * layer.lora_b @ layer.lora_a
merged = copy.deepcopy(model)
merged.merge_lora()
with torch.no_grad():
    print("largest difference from merged():", (layer.merged().weight - by_hand).abs().max().item())
    before, after = model.classify(idx, lengths), merged.classify(idx, lengths)
    print(
        "largest difference of the class logits, merged and not:",
        (before - after).abs().max().item(),
    )

# %% [markdown]
# **Exercise 11.3** A matrix has 768 rows and 3,072 columns. How many weights does a LoRA of rank 8 train instead of
# it?

# %% tags=["11.3"]
lora_weights = None

check("11.3", lora_weights)

# %% [markdown]
# ## Break it
#
# Read the first token instead of the last, in the model that was trained to be read at the last. It has seen one
# character of the line, and was never trained to say anything there.

# %%
model, _ = tuned["all"]
with torch.no_grad():
    first = model.classify(idx, torch.ones_like(lengths)).argmax(-1)
print(f"accuracy from the first position: {(first == labels).float().mean():.3f}")

# %% [markdown]
# ## Where it happens
#
# | what | where |
# |---|---|
# | the head on the last token | `model.py`: `GPT.classify` |
# | the stage, its figures | `finetune.py`: `Classify` |
# | what is frozen | `glass/tuned.py`: `freeze` (`--trainable`, `--freeze`) |
# | LoRA | `model.py`: `LoRALinear` |
# | the bag of tokens | `glass/stage.py`: `bag_of_tokens` |
# | try it | `python train.py`, then `python finetune.py config/finetune_lines.py` |
#
# ## To read
# - Radford et al. 2018, "Improving language understanding by generative pre-training": GPT-1 as a classifier.
# - Hu et al. 2021, "LoRA", arXiv:2106.09685.
