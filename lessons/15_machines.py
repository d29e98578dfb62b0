# %% [markdown]
# # 15 Many machines
#
# After this lesson you can
# - train one model in two processes, and show that the run is that of one process,
# - do an all-reduce by hand, and say how many bytes it sends,
# - say what is kept where when weights, gradients and moments are sharded, and what it costs to fetch them,
# - judge whether a model fits on given devices before you rent them.
#
# You need lesson 06 (a step of training). Time: 40 minutes, exercises included.
#
# Letters: n processes (one for each device), P parameters.

# %%
import tempfile

import matplotlib.pyplot as plt
import torch
from desk import check, hint, picture, source  # noqa: F401
from machines import rows_of_step, run_processes, train

import train as training

# %% [markdown]
# ## Data parallel
#
# A step needs the mean gradient over its rows. A mean over 8 rows is the mean of two means over 4 rows. So two
# processes can share the work: both hold the same weights, each takes half of the rows, and before the weights
# change the gradients are averaged. This is **data parallel** training.
#
# The rows of this lesson count up from a random number, so there is something to learn. Here is the whole of it.
# Started processes cannot take a function from a notebook's cell, so it stands in a file:

# %%
source(train)

# %% [markdown]
# `all_reduce` gives every process the sum over all processes. Now in one process and in two (the two take a few
# seconds to start):

# %%
alone, losses_alone = train(rank=0, n=1)
with tempfile.TemporaryDirectory() as folder:
    (first, losses_first), (second, losses_second) = run_processes(2, folder)

print("the first row:", rows_of_step(0)[0].tolist())
print("loss of each step, one process: ", [round(loss, 4) for loss in losses_alone])
means = [(a + b) / 2 for a, b in zip(losses_first, losses_second, strict=True)]
print("mean of the two processes' losses:", [round(loss, 4) for loss in means])


def distance(weights, others):
    return max((weights[name] - others[name]).abs().max().item() for name in weights)


print("the two processes' weights differ by", distance(first, second))
print("from one process' weights they differ by", distance(first, alone.state_dict()))

# %% [markdown]
# The two processes agree to the bit: they started alike and added the same numbers. From one process they differ
# by rounding, because a sum was made in another order.
#
# In `train.py` (by `glass/parallel.py`) it is the same, with two savings: torch's `DistributedDataParallel` sends a
# layer's gradients while the backward pass still computes those before it, and with accumulation only the last
# micro-step sends. Which rows a process takes depends on the step and its rank alone, so one process and two make
# the same run:

# %%
source(training.Pretraining.rows)

# %% [markdown]
# **Exercise 15.1** A step takes 8 rows and begins at row `step * 8` of the epoch. Write `own_rows(step, rank, n)`:
# the numbers of the rows that a process takes, as a list, each process an equal slice in the order of the ranks.


# %% tags=["15.1"]
def own_rows(step, rank, n):
    return None


check("15.1", own_rows)

# %% [markdown]
# ## What is sent: a ring, by hand
#
# How do n processes get a sum without one of them receiving everything? In a **ring**, each sends to its right
# neighbour alone. The tensor is cut into n pieces. In n - 1 rounds every process passes a piece on and adds what
# it receives; then each holds one piece of the sum (**reduce-scatter**). In n - 1 more rounds the finished pieces go
# round (**all-gather**). Below the processes are rows of a list, and every number that is sent is counted.


# %%
def ring_all_reduce(tensors):
    n, sent = len(tensors), [0] * len(tensors)
    pieces = [list(tensor.clone().chunk(n)) for tensor in tensors]

    def pass_on(first_piece, combine):
        moving = [pieces[rank][(first_piece + rank) % n].clone() for rank in range(n)]
        for rank in range(n):
            right, place = (rank + 1) % n, (first_piece + rank) % n
            pieces[right][place] = combine(pieces[right][place], moving[rank])
            sent[rank] += moving[rank].numel()

    for turn in range(n - 1):
        pass_on(-turn, lambda own, received: own + received)
    for turn in range(n - 1):
        pass_on(1 - turn, lambda own, received: received)
    return [torch.cat(row) for row in pieces], sent


torch.manual_seed(0)
tensors = [torch.randn(1200) for _ in range(4)]
reduced, sent = ring_all_reduce(tensors)
expected = torch.stack(tensors).sum(dim=0)
print(
    "largest difference from the sum:",
    max((each - expected).abs().max().item() for each in reduced),
)
print("numbers sent by each of 4 processes, for a tensor of 1,200:", sent)

# %% [markdown]
# **Exercise 15.2** Write `ring_bytes(n_parameters, n)`: how many bytes each of n processes sends in an all-reduce
# of the gradients in float32. Then: GPT-2's 124,439,808 parameters, 8 devices, a link of 25 GB/s: how many
# milliseconds does the exchange take at least? The answer is the pair (ring_bytes, milliseconds).


# %% tags=["15.2"]
def ring_bytes(n_parameters, n):
    return None


milliseconds = None

check("15.2", (ring_bytes, milliseconds))

# %% [markdown]
# Each sends 2 (n - 1) / n times the gradients' size: nearly the same for 8 devices as for 8,000. What grows with n
# is the number of rounds, and with it the waiting.

# %%
n_devices = torch.tensor([2, 4, 8, 16, 32, 64, 128, 256])
plt.figure(figsize=(5, 3))
ring = 2 * (n_devices - 1) / n_devices
one_for_all = (n_devices - 1).float()
plt.loglog(n_devices.numpy(), ring.numpy(), "o-", label="ring: each process sends")
plt.loglog(n_devices.numpy(), one_for_all.numpy(), "s-", label="one collects: it receives")
plt.xlabel("processes")
plt.ylabel("times the gradients' size")
plt.title("Bytes through the busiest link")
plt.legend()
picture("15_ring")

# %% [markdown]
# ## When the model does not fit
#
# Data parallel keeps everything in every process. In training with AdamW a parameter takes, in float32, 4 bytes for
# itself, 4 for its gradient and 8 for its two moments: 16 bytes. Llama 3 8B takes 128 GB of that before any
# activation, and a large GPU of its day has 80.
#
# **Sharding** gives each process 1/n of it. The steps of the idea have the names of the paper that introduced them,
# ZeRO (zero redundancy optimizer):
#
# | sharded | bytes a parameter on each of n | sent a step, times the weights' size |
# |---|---|---|
# | nothing (data parallel) | 16 | 2 |
# | moments (ZeRO 1) | 8 + 8 / n | 2 |
# | moments and gradients (ZeRO 2) | 4 + 12 / n | 2 |
# | all three (ZeRO 3, fully sharded: FSDP) | 16 / n | 3 |
#
# With all three sharded, a layer's weights are gathered just before they are used, in the forward and again in the
# backward pass, and dropped after; gradients are reduce-scattered. That is three times the weights instead of two.

# %%
P = 8_030_261_248  # Llama 3 8B
for name, bytes_of in {
    "nothing": lambda n: 16,
    "moments": lambda n: 8 + 8 / n,
    "moments, gradients": lambda n: 4 + 12 / n,
    "all three": lambda n: 16 / n,
}.items():
    sizes = "".join(f"{P * bytes_of(n) / 1e9:9.1f}" for n in (1, 8, 64))
    print(f"sharded: {name:20} GB on each of 1, 8, 64 devices: {sizes}")

# %% [markdown]
# In memory it looks like this. Two processes, here two lists, each keep half of every matrix. A layer gathers its
# matrix, uses it, and lets it go. The result is that of the whole model, and the most that a process ever holds is
# its half and one whole layer.

# %%
layers = [torch.randn(32, 32) / 32**0.5 for _ in range(6)]
shards = [[matrix.chunk(2)[rank] for matrix in layers] for rank in (0, 1)]
x = torch.randn(4, 32)

whole, gathered, held = x, x, []
for layer, matrix in enumerate(layers):
    whole = torch.relu(whole @ matrix)
    all_of_it = torch.cat([shards[rank][layer] for rank in (0, 1)])  # all-gather
    gathered = torch.relu(gathered @ all_of_it)
    held.append(sum(half.numel() for half in shards[0]) + all_of_it.numel())
    del all_of_it
print("the same result:", torch.equal(whole, gathered))
print("numbers held at most:", max(held), "of", sum(matrix.numel() for matrix in layers))

# %% [markdown]
# **Exercise 15.3** Llama 3 8B, everything sharded over n devices of 80 GB, of which 30 GB are left free for
# activations and for the layers being gathered. What is the smallest n that is a power of two? (16 bytes a
# parameter, GB = 10^9 bytes.)

# %% tags=["15.3"]
n_devices_needed = None

check("15.3", n_devices_needed)

# %% [markdown]
# **Exercise 15.4** Process 0 has a row with 10 scored tokens, process 1 one with 30. The losses' sums are 25.0 and
# 60.0 nats. What is the loss of the step, as a mean over tokens? And what would the mean of the two processes' own
# means be? Give both, in this order. (It is why `finetune.py` divides by what the whole step holds.)

# %% tags=["15.4"]
losses = None

check("15.4", losses)

# %% [markdown]
# ## Break it
#
# Leave the exchange out. Nothing fails, nothing warns, and the losses still fall: there are simply two models now.

# %%
with tempfile.TemporaryDirectory() as folder:
    (first, losses_first), (second, losses_second) = run_processes(2, folder, "apart")
print("losses of the first process: ", [round(loss, 4) for loss in losses_first])
print("losses of the second process:", [round(loss, 4) for loss in losses_second])
print("the two processes' weights differ by", distance(first, second))

# %% [markdown]
# ## Where it happens
#
# | what | where |
# |---|---|
# | processes, their rank and group | `glass/device.py`: `Processes`, `join_processes` |
# | rows of a process | `train.py`: `Pretraining.rows`; the share: `train` |
# | exchange of gradients | `glass/parallel.py`: `wrap` (`DistributedDataParallel`), `exchange` |
# | sharding: parameters, Muon, checkpoints | `glass/parallel.py`: `shard`, `on_whole_matrices`; `glass/sharded.py` |
# | how much, before it is rented | `python bench.py plan` |
# | try it | `torchrun --standalone --nproc_per_node=2 train.py config/pydoc_char.py --gradient_accumulation_steps=2` |
#
# ## To read
# - Li et al. 2020, "PyTorch distributed: experiences on accelerating data parallel training", arXiv:2006.15704.
# - Rajbhandari et al. 2019, "ZeRO", arXiv:1910.02054: the idea of the table above, in mixed precision
#   (2, 2 and 12 bytes a parameter).
# - Zhao et al. 2023, "PyTorch FSDP", arXiv:2304.11277.
