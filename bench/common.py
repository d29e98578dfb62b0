"""What several programs share: running in turn, training scripts, limits of the machine, text.

torch is imported where it is used, so that tokenizers and prepare run without it.
"""

import functools
import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import bpe
from glass import sources

SCRATCH = Path("data/bench")  # files of the programs; some of them remove the whole folder


# Running in turn.


def in_turn(contestants, rounds):
    """Call each contestant (name to function) in turn, A B A B: name to the list of its results."""
    results = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            results[name].append(run())
    return results


def seconds_of(run):
    """Seconds that a call of `run` takes."""
    started_at = time.perf_counter()
    run()
    return time.perf_counter() - started_at


def seconds_in_turn(contestants, rounds):
    """Median seconds of each contestant (name to function), run in turn."""
    timed = {name: functools.partial(seconds_of, run) for name, run in contestants.items()}
    return {name: statistics.median(taken) for name, taken in in_turn(timed, rounds).items()}


def medians(runs):
    """The median of each figure over runs that gave the same figures, a tuple each."""
    return [statistics.median(values) for values in zip(*runs, strict=True)]


# Training scripts.


def words_of(settings):
    """Command-line words: name=value becomes --name=value, a config file stays as it is."""
    return [f"--{word}" if "=" in word else word for word in settings]


def run_script(script, arguments):
    """Run a training script in its folder, to its end -> (lines, peak memory in bytes).

    A line is (seconds since the start, text). Raises ValueError where the script fails.
    """
    started_at, lines = time.perf_counter(), []
    process = subprocess.Popen(
        [sys.executable, script.name, *arguments],
        cwd=script.resolve().parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        lines.append((time.perf_counter() - started_at, line))
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise ValueError(
            f"{script} ended with status {os.waitstatus_to_exitcode(status)}: {last_line(lines)}"
        )
    return lines, usage.ru_maxrss * 1024


def last_line(lines):
    """The text of the last line that run_script read."""
    return lines[-1][1].strip() if lines else "no output"


# Limits of the machine.


def product_rate(n, dtype, device, rounds=10):
    """Floating-point operations a second of multiplying two n x n matrices.

    The best of `rounds` means of three products.
    """
    import torch

    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(rounds):
        started_at = time.perf_counter()
        for _ in range(3):
            product = a @ b
        product[0, 0].item()  # waits for a GPU
        seconds.append((time.perf_counter() - started_at) / 3)
    return 2 * n**3 / min(seconds)


def memory_bandwidth(device):
    """Bytes a second of reading memory: the best of ten sums over 512 MB."""
    import torch

    numbers = torch.ones(128 * 1024 * 1024, device=device)
    seconds = [seconds_of(lambda: numbers.sum().item()) for _ in range(10)]
    return numbers.numel() * 4 / min(seconds)


# Text and its tokens.


def python_text(n_bytes):
    """Python source, n_bytes or a little more: the standard library, installed packages, repeat."""
    paths = sources.standard_library()
    for root in sys.path:
        if root.endswith("-packages"):
            paths += sorted(Path(root).rglob("*.py"))
    texts, size = [], 0
    for path in itertools.cycle(paths):
        if size >= n_bytes:
            break
        text = path.read_bytes().decode("utf-8", errors="ignore")
        texts.append(text)
        size += len(text.encode("utf-8"))
    return "".join(texts)


def encode_with_tiktoken(tiktoken, text):
    """The ids of each piece of about 200,000 characters, encoded on one thread."""
    return [tiktoken.encode_ordinary(piece) for piece in bpe.pieces_of(text, 200_000)]
