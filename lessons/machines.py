"""What lesson 15 runs in processes of their own: python lessons/machines.py RANK N FOLDER [apart].

Each of N processes trains the same tiny model on its share of the rows. With `apart` they do not
exchange gradients. The weights of each go to FOLDER/RANK.pt, with the losses.
"""

import subprocess
import sys
from pathlib import Path

import desk  # noqa: F401 (the way to model.py)
import torch
from torch import distributed

from model import GPT, GPTConfig

ROWS, BLOCK, VOCABULARY, STEPS = 8, 16, 32, 5  # rows are those of a step, over all processes
LEARNING_RATE = 0.3


def make_model():
    """The same weights in every process, since every process has the same seed."""
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCABULARY, block_size=BLOCK, n_layer=1, n_head=2, n_embd=32)
    return GPT(GPTConfig(**shape))


def rows_of_step(step):
    """The rows of a step, the same for any number of processes: (ROWS, BLOCK + 1).

    Each counts up from a random number, and begins again after the vocabulary's last.
    """
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(VOCABULARY, (ROWS, 1), generator=generator)
    return (first + torch.arange(BLOCK + 1)) % VOCABULARY


def train(rank, n, exchange=True):
    """(model, losses) of one of n processes, after STEPS steps of gradient descent on its rows."""
    model, losses, share = make_model(), [], ROWS // n
    for step in range(STEPS):
        rows = rows_of_step(step)[rank * share : (rank + 1) * share]
        _, loss = model(rows[:, :-1], rows[:, 1:])
        model.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            if n > 1 and exchange:
                distributed.all_reduce(parameter.grad)  # the sum over processes, in every process
                parameter.grad /= n
            parameter.data -= LEARNING_RATE * parameter.grad
        losses.append(loss.item())
    return model, losses


def run_processes(n, folder, *options):
    """Start n processes and wait for them. Gives what each saved: a list of (weights, losses)."""
    command = [sys.executable, str(Path(__file__).resolve())]
    words = [str(n), str(folder), *options]
    children = [subprocess.Popen([*command, str(rank), *words]) for rank in range(n)]
    if any([child.wait() for child in children]):
        raise RuntimeError(f"a process of {n} failed: see its message above")
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(n)]


def main(rank, n, folder, *options):
    rank, n, meeting_point = int(rank), int(n), Path(folder).resolve() / "meeting_point"
    distributed.init_process_group(
        "gloo", init_method=meeting_point.as_uri(), rank=rank, world_size=n
    )
    model, losses = train(rank, n, exchange="apart" not in options)
    torch.save((model.state_dict(), losses), Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
