# %% [markdown]
# # 07 What a run is
#
# After this lesson you can
# - say what decides a run: seeds, the order of the data, the noise of a step,
# - stop a run, go on, and show that it ends in the same bits,
# - say what a checkpoint holds, and which settings may change on resumption.
#
# You need lesson 06 (training). Time: 30 minutes, exercises included.

# %%
import contextlib
import io
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from desk import check, hint, picture, source  # noqa: F401

import prepare
import train
from glass import checkpoint
from glass.shards import Windows
from train import noise_seed

folder = tempfile.TemporaryDirectory()  # everything of this lesson is written here, and removed
TEXT = "To be, or not to be: that is the question. " * 200

# %% [markdown]
# ## A function of the settings and the step
#
# A **run** is a sequence of updates. Three things in it look random: the first weights, which windows of text a step
# takes, and dropout. In glassGPT the first weights come from the **seed**, the number from which a random generator
# starts, and windows and dropout from the seed and the number of the step: never from what happened before. So step 7
# is the same whether the run came there at once or was stopped at step 5.

# %%
source(noise_seed)
print([noise_seed(seed=1337, step=step, rank=0) for step in (0, 1, 2)])

# %% [markdown]
# An **epoch** is one pass over the whole text. Its windows are all windows in a shuffled order, which the seed and
# the number of the epoch decide. Step s takes rows s G to s G + G - 1 of it, G being the rows of a step. Nothing
# needs to be remembered:

# %%
shards = [torch.arange(1000).numpy()]
for start in ("from step 0", "from step 2"):
    windows = Windows(shards, block_size=10, seed=1337)
    steps = range(4) if start == "from step 0" else range(2, 4)
    print(start, {step: [int(row[0]) for row in windows.rows(step * 3, 3)] for step in steps})

# %% [markdown]
# Each number is the first token of a window. Steps 2 and 3 take the same windows in both lines.
#
# ## Stop and go on
#
# A run of 6 steps, and the same run with a stop after 3. `max_iters=3` stands for the kill. The learning rate of a
# step stays the same, because `lr_decay_iters` is set, so the decay does not depend on `max_iters`.

# %%
SMALL = (
    "--dataset=small --block_size=16 --n_layer=1 --n_head=2 --n_embd=16 --batch_size=4 --dropout=0.1 "
    "--gradient_accumulation_steps=1 --eval_interval=3 --eval_iters=2 --lr_decay_iters=6 --warmup_iters=1 "
    "--device=cpu --dtype=float32 --compile=False"
).split()


def run(*words):
    """What train.py prints, as `python train.py ...` in the lesson's folder would."""
    printed = io.StringIO()
    with contextlib.chdir(folder.name), contextlib.redirect_stdout(printed):
        status = train.main(list(words))
    return status, printed.getvalue()


with contextlib.chdir(folder.name), contextlib.redirect_stdout(io.StringIO()):
    Path("small.txt").write_text(TEXT)
    prepare.main(["small", "--input=small.txt", "--tokenizer=char", "--workers=1"])
run(*SMALL, "--out_dir=out/whole", "--max_iters=6")
run(*SMALL, "--out_dir=out/stopped", "--max_iters=3")
status, printed = run("--init_from=resume", "--out_dir=out/stopped", "--max_iters=6")


def weights_of(name):
    return checkpoint.load(Path(folder.name) / "out" / name)["model"]


whole, resumed = weights_of("whole"), weights_of("stopped")
print(
    "all weights equal, to the bit:", all(torch.equal(whole[name], resumed[name]) for name in whole)
)

# %% [markdown]
# ## What a checkpoint holds
#
# A **checkpoint** holds all that the next step depends on: the weights, the moments of the optimizer (lesson 06), the
# step and the settings. With the weights alone the moments would begin at zero again, and the run would go another
# way.

# %%
state = checkpoint.load(Path(folder.name) / "out" / "whole")
del state["path"]  # where it was read from
for name, value in state.items():
    print(f"{name:28} {type(value).__name__:6} {value if isinstance(value, (int, float)) else ''}")

# %% [markdown]
# **Exercise 7.1** A model has P parameters in float32 and AdamW, which keeps two moments for each. How many bytes has
# a checkpoint, about? Give it for P = 124,439,808.

# %% tags=["7.1"]
checkpoint_bytes = None

check("7.1", checkpoint_bytes)

# %% [markdown]
# ## Which settings may change?
#
# Some settings say what the weights mean: change them and the checkpoint is of another model. Others change where the
# run goes, and are said. Others change nothing.

# %%
for words in (["--n_embd=32"], ["--learning_rate=1e-4"], ["--log_interval=1"]):
    try:
        _, printed = run("--init_from=resume", "--out_dir=out/stopped", "--max_iters=7", *words)
        said = [line for line in printed.splitlines() if words[0].split("=")[0][2:] in line][:1]
        print(f"{words[0]:22} goes on; said: {said}")
    except ValueError as error:
        print(f"{words[0]:22} refused: {error}")

# %% [markdown]
# **Exercise 7.2** Which of these are refused on resumption: `n_layer`, `batch_size`, `qk_norm`, `eval_interval`,
# `dataset`, `weight_decay`? Give a set of names. Which of them, when changed, would give the saved weights another
# shape or meaning, or train them on other data?

# %% tags=["7.2"]
refused = None

check("7.2", refused)

# %% [markdown]
# ## A kill at the worst moment
#
# A file is broken if power fails while it is written. So a checkpoint is written under another name, read back, and
# only then renamed, which happens at once or not at all. The one before stays until then. A **checksum**, a number
# computed from all bytes, shows later damage:

# %%
run(*SMALL, "--out_dir=out/damaged", "--max_iters=6")
path = checkpoint.checkpoint_path(Path(folder.name) / "out" / "damaged", 6)
data = bytearray(path.read_bytes())
data[len(data) // 2] ^= 1  # one bit
path.write_bytes(data)
print("damage found:", checkpoint.damage(path) is not None)
warning = io.StringIO()
with contextlib.redirect_stdout(warning), contextlib.redirect_stderr(warning):
    used = checkpoint.load(path.parent)
print("the checkpoint that is used instead is of step", used["step"])

# %% [markdown]
# **Exercise 7.3** A run saves every 100 steps and is killed at a random moment of step 1,234, while nothing is
# written. From which step does it go on, and how many finished steps are done again? (Steps count from 0, so 1,234
# steps, 0 to 1,233, are finished.) Give both.

# %% tags=["7.3"]
after_a_kill = None

check("7.3", after_a_kill)

# %% [markdown]
# ## Break it
#
# Keep the weights and lose the moments: the run goes on, nothing fails, and it ends elsewhere. In `glass/run.py`,
# leave the line out that restores the optimizers and run `python -m pytest test_all.py -k change_no_bit`.

# %%
run(*SMALL, "--out_dir=out/forgetful", "--max_iters=3")
place = Path(folder.name) / "out" / "forgetful"
forgetful = checkpoint.load(place)
for optimizer in forgetful["optimizer"]:
    for moments in optimizer["state"].values():
        for value in moments.values():
            if torch.is_tensor(value):
                value.zero_()
checkpoint.save(place, 3, forgetful)
run("--init_from=resume", "--out_dir=out/forgetful", "--max_iters=6")
other = weights_of("forgetful")
distances = {name: (whole[name] - other[name]).abs().max().item() for name in whole}
print("largest difference of a weight from the run that was not stopped:", max(distances.values()))

plt.figure(figsize=(5, 3))
plt.barh(list(distances)[-6:], list(distances.values())[-6:])
plt.xlabel("largest difference")
plt.title("Resumed without the moments")
picture("07_forgotten_moments")
folder.cleanup()

# %% [markdown]
# ## Where it happens
#
# | what | where |
# |---|---|
# | windows of a step | `glass/shards.py`: `Windows` |
# | noise of a step | `train.py`: `noise_seed` |
# | writing, checking, falling back | `glass/checkpoint.py`: `save`, `load`, `damage` |
# | what may change | `glass/run.py`: `resumed_config` |
# | Ctrl-C, SIGTERM | `glass/run.py`: `StopSignals` |
#
# ## To read
# - PyTorch's notes on reproducibility: what may differ between machines and versions.
