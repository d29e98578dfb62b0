"""Whether runs that are killed end in the same bits as one that is left alone.

    python bench.py faults --kills=20

Kills runs with SIGKILL at random moments, resumes each with --init_from=auto, and compares the last
checkpoints. Needs Linux: processes are forked, and those of torchrun are found in /proc.
"""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import train
from bench.common import SCRATCH
from glass import checkpoint
from glass.settings import configure

LOG = SCRATCH / "log.txt"  # what the runs print
ARGUMENTS = """
    --block_size=64 --n_layer=2 --n_head=4 --n_embd=128 --dropout=0.1
    --batch_size=8 --gradient_accumulation_steps=2 --warmup_iters=5
    --eval_interval=10 --checkpoint_interval=2 --eval_iters=20 --log_interval=1
    --sample_tokens=None --compile=False --device=cpu
""".split()


@dataclass
class Settings:
    kills: int = 20  # kill -9 at random moments, over as many runs as it takes
    max_iters: int = 60  # steps of a run
    longest_life: float = 2.0  # seconds until a kill, at most
    seed: int = 0  # of the moments
    torchrun: bool = True  # also kill one of two processes under torchrun


def main(argv):
    s = configure(Settings, argv)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    arguments = [*ARGUMENTS, f"--max_iters={s.max_iters}", f"--lr_decay_iters={s.max_iters}"]
    folder = SCRATCH / "straight"
    train_in_child([*arguments, f"--out_dir={folder}"]).join()
    expected = state_digest(folder)
    print(f"undisturbed: {expected[:16]}")
    kill_at_random(s, arguments, expected)
    if s.torchrun:
        kill_under_torchrun(arguments)
    shutil.rmtree(SCRATCH)


def kill_at_random(settings, arguments, expected):
    """Start and kill runs, let each end, and print how many ended in the expected state."""
    s, moments = settings, random.Random(settings.seed)
    kills, in_writes, runs, same = 0, 0, 0, 0
    while kills < s.kills:
        folder, kills_before, finished = SCRATCH / f"killed-{runs}", kills, False
        while not finished:
            process = train_in_child([*arguments, "--init_from=auto", f"--out_dir={folder}"])
            process.join(moments.uniform(0, s.longest_life) if kills < s.kills else None)
            if process.is_alive():
                process.kill()
                process.join()
                kills += 1
                in_writes += bool(list(folder.glob("*.tmp")))
            finished = process.exitcode == 0
        digest = state_digest(folder)
        runs += 1
        same += digest == expected
        print(f"run {runs}: {kills - kills_before} kills, {digest[:16]}", flush=True)
    print(
        f"{kills} kills, {in_writes} of them while a checkpoint was written; "
        f"{same} of {runs} runs ended in the same bits"
    )


def train_in_child(arguments):
    """A forked process that trains. It need not import torch, so little of its life is start-up."""

    def quiet():
        sys.stdout = sys.stderr = open(LOG, "a")
        sys.exit(train.main(arguments))

    process = multiprocessing.get_context("fork").Process(target=quiet)
    process.start()
    return process


def state_digest(folder):
    """sha256 of step, weights and the optimizer's state in the last checkpoint."""
    digest = hashlib.sha256()

    def add(value):
        if hasattr(value, "numpy"):
            digest.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            add(list(value.items()))
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    state = checkpoint.load(folder)
    add([state["step"], state["model"], state["optimizer"]])
    return digest.hexdigest()


def kill_under_torchrun(arguments):
    """Train in two processes under torchrun, once left alone and once with one of them killed."""
    for name, kills_one in (("two", False), ("two-killed", True)):
        folder = SCRATCH / name
        run = [*arguments, "--init_from=auto", f"--out_dir={folder}"]
        status = run_under_torchrun(run, folder, kills_one)
        metrics = (folder / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line).get("val_loss") for line in metrics]
        val_loss = [loss for loss in losses if loss][-1]
        print(
            f"torchrun, {name}: status {status}, final val loss {val_loss:.6f}, "
            f"{state_digest(folder)[:16]}"
        )


def run_under_torchrun(arguments, folder, kills_one):
    """The exit status of two processes under torchrun, which restarts them where one is killed.

    With kills_one, one of them is killed once the folder has a checkpoint.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node=2", "--max-restarts=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(LOG, "a") as log:
        process = subprocess.Popen(
            [*torchrun, "train.py", *arguments], env=environment, stdout=log, stderr=log
        )
        if kills_one:
            while not list(folder.glob("ckpt_*.pt")):
                time.sleep(0.05)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
        process.wait()
    return process.returncode
