"""A training step of train.py: its time, tokens/s, FLOP/s, memory and start-up; beside nanoGPT's.

    python bench.py train --peer=FOLDER_OF_NANOGPT
    python bench.py train --model=gpt2 --settings dtype=float32 compile=True
    python bench.py train --profile=True

Both scripts run as programs, in turn, on the same work.
"""

import functools
import json
import pickle
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import bpe
from bench.common import (
    SCRATCH,
    in_turn,
    last_line,
    medians,
    product_rate,
    run_script,
    words_of,
)
from glass.device import choose_device
from glass.settings import configure
from model import GPT, GPTConfig

# the work, in settings that train.py and nanoGPT share
SHAPES = {
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, block_size=64),  # what nanoGPT suggests for a CPU
    "char": dict(n_layer=6, n_head=6, n_embd=384, block_size=256),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024),
}
BATCH_SIZES = {"tiny": 12, "char": 16, "gpt2": 4}  # sequences of a step
VOCAB_SIZES = {"tiny": 65, "char": 65, "gpt2": 50257}
STEP_TIME = re.compile(r"(?:step|iter) \d+.*?([\d,.]+) ?ms")  # in the lines of both scripts


@dataclass
class Settings:
    model: str = "char"  # tiny (0.8M parameters), char (10.65M) or gpt2 (124M), with GPT-2's parts
    settings: list[str] = field(default_factory=list)  # more of train.py: --settings compile=True
    batch_size: int | None = None  # sequences of a step; None: the shape's
    steps: int = 30  # of one run; the median of the last two thirds counts
    rounds: int = 3  # how often each contestant runs, in turn
    peer: str | None = None  # also measure the folder of a nanoGPT checkout
    peer_compile: bool = False  # and that once more, compiled
    profile: bool = False  # print where the time of our steps goes instead


def main(argv):
    s, device = configure(Settings, argv), choose_device()
    if s.model not in SHAPES:
        raise ValueError(f"model={s.model!r} must be one of {' '.join(SHAPES)}")
    s.batch_size = s.batch_size or BATCH_SIZES[s.model]
    folder = random_tokens(VOCAB_SIZES[s.model])
    shared = shared_arguments(s, folder)
    ours = our_arguments(s, shared)
    if s.profile:
        profile_training(ours)
        return
    contestants = {"glassGPT": functools.partial(timed_run, Path("train.py"), ours, s.steps)}
    if s.peer:
        contestants |= peer_contestants(s, shared, device, folder / "peer")
    results = in_turn(contestants, s.rounds)
    print_results(s, device, results)


# The work.


def random_tokens(vocab_size):
    """A folder of random tokens. train.py reads meta.json; nanoGPT the file names and meta.pkl."""
    folder = (SCRATCH / f"random_{vocab_size}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for seed, (split, size) in enumerate({"train": 2_000_000, "val": 250_000}.items()):
        tokens = np.random.default_rng(seed).integers(vocab_size, size=size, dtype=np.uint16)
        tokens.tofile(folder / f"{split}.bin")
        shard = {"file": f"{split}.bin", "tokens": size}
        splits[split] = {"shards": [shard], "tokens": size, "bytes": size}
    tokenizer = bpe.WordTokenizer([f"w{i}" for i in range(vocab_size)], special_tokens=())
    meta = {
        "kind": "text",
        "splits": splits,
        "dtype": "uint16",
        "vocab_size": vocab_size,
        "sha256": "random",
        "tokenizer": tokenizer.to_dict(),
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    return folder


def shared_arguments(settings, folder):
    """The arguments that train.py and nanoGPT's train.py both take."""
    s = settings
    work = SHAPES[s.model] | dict(batch_size=s.batch_size, gradient_accumulation_steps=1)
    work |= dict(dropout=0.0, bias=False, eval_iters=1, log_interval=1)
    work |= dict(dataset=folder, max_iters=s.steps)
    return [f"--{name}={value}" for name, value in work.items()]


def our_arguments(settings, shared):
    return [
        "config/gpt2_124m.py",
        *shared,
        "--mlp=gelu_exact",  # as in nanoGPT
        f"--out_dir={SCRATCH / 'train'}",
        "--overwrite=True",
        "--sample_tokens=None",
        *words_of(settings.settings),
    ]


def peer_contestants(settings, shared, device, out_dir):
    """nanoGPT's training, eager and, where asked for or on a GPU, compiled: name to function."""
    s = settings
    script = Path(s.peer) / "train.py"
    if not script.is_file():
        raise ValueError(f"peer={s.peer} has no train.py: give the folder of a nanoGPT checkout")
    theirs = [*shared, f"--device={device}", f"--out_dir={out_dir}"]
    eager, compiled = [*theirs, "--compile=False"], [*theirs, "--compile=True"]
    contestants = {"nanoGPT": functools.partial(timed_run, script, eager, s.steps)}
    if s.peer_compile or device.type == "cuda":
        contestants["nanoGPT, compiled"] = functools.partial(timed_run, script, compiled, s.steps)
    return contestants


# Running.


def timed_run(script, arguments, steps):
    """Run a training script -> (seconds a step, seconds until the first step began, peak bytes).

    Seconds a step is the median of the last two thirds. Raises ValueError where fewer than half of
    the steps printed their time.
    """
    lines, peak_bytes = run_script(script, arguments)
    ends, step_seconds = [], []
    for seconds, line in lines:
        if match := STEP_TIME.match(line):
            ends.append(seconds)
            step_seconds.append(float(match[1].replace(",", "")) / 1e3)
    if len(ends) < steps // 2:
        raise ValueError(
            f"{script} printed the time of {len(ends)} of {steps} steps: {last_line(lines)}"
        )
    late_steps = step_seconds[len(step_seconds) // 3 :]
    return statistics.median(late_steps), ends[0] - step_seconds[0], peak_bytes


def profile_training(arguments):
    """Print which operations take the most time in a run of train.py, its start included."""
    import train  # the only time that it runs in this process

    has_gpu = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if has_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        train.main(arguments)
    order = "self_cuda_time_total" if has_gpu else "self_cpu_time_total"
    averages = profile.key_averages()
    print(averages.table(sort_by=order, row_limit=25, max_name_column_width=50))


# Printing.


def print_results(settings, device, results):
    """results: name to a list of what timed_run gave."""
    s, shape = settings, SHAPES[settings.model]
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=VOCAB_SIZES[s.model], bias=False, **shape))
    tokens = s.batch_size * shape["block_size"]  # of a step
    flops = model.flops_per_token() * tokens  # of a step
    product = product_rate(2048, torch.bfloat16, device)  # FLOPs a second
    n_parameters = model.parameter_count() / 1e6
    work = f"{s.batch_size} x {shape['block_size']} tokens a step"
    print(f"{s.model}, {n_parameters:.2f}M parameters, {work}")
    print(f"the bfloat16 product of two 2048 x 2048 matrices: {product / 1e9:,.0f} GFLOP/s")
    our_step_s, _, _ = medians(results["glassGPT"])
    for name, runs in results.items():
        step_s, start_s, peak_bytes = medians(runs)
        rate = flops / step_s
        print(
            f"  {name:18}{1e3 * step_s:9,.1f} ms a step, {tokens / step_s:9,.0f} tokens/s, "
            f"{rate / 1e9:7,.0f} GFLOP/s = {rate / product:3.0%} of the product; "
            f"first step at {start_s:4.1f} s; peak {peak_bytes / 1e6:6,.0f} MB; "
            f"glassGPT is {step_s / our_step_s:.2f}x as fast"
        )
