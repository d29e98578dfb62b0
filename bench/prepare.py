"""MB/s and peak memory of prepare.py with GPT-2's tokens, beside tiktoken on one thread.

    python bench.py prepare --gigabytes=1

Memory is read from /proc, so this needs Linux.
"""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import bpe
from bench.common import SCRATCH, encode_with_tiktoken, python_text, seconds_in_turn
from glass.settings import configure


@dataclass
class Settings:
    gigabytes: float = 1.0  # of text, in one file
    workers: int = 2  # processes that tokenize
    rounds: int = 1  # how often each contestant runs


def main(argv):
    s = configure(Settings, argv)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    path = SCRATCH / "input.txt"
    block = python_text(100_000_000).encode("utf-8")
    write_repeatedly(block, path, int(s.gigabytes * 1e9))
    sample = block[:20_000_000].decode("utf-8", errors="ignore")
    tiktoken = bpe.BPETokenizer.from_gpt2().to_tiktoken()
    command = [sys.executable, "prepare.py", f"./{SCRATCH.as_posix()}/tokens", f"--input={path}"]
    command += ["--overwrite=True", f"--workers={s.workers}"]
    peaks = []
    contestants = {
        "tiktoken": lambda: encode_with_tiktoken(tiktoken, sample),
        "prepare.py": lambda: peaks.append(peak_memory_of(command)),
    }
    seconds = seconds_in_turn(contestants, s.rounds)
    sample_megabytes = len(sample.encode("utf-8")) / 1e6
    print_results(s, seconds, sample_megabytes, path.stat().st_size / 1e6, max(peaks))
    shutil.rmtree(SCRATCH)


def write_repeatedly(block, path, n_bytes):
    """Fill a file with copies of a block, up to n_bytes."""
    with open(path, "wb") as file:
        while file.tell() < n_bytes:
            file.write(block[: n_bytes - file.tell()])


def peak_memory_of(command):
    """Run a command; the sum in bytes of the peaks (VmHWM) of it and its children. Linux only."""
    process = subprocess.Popen(command)
    peaks = {}
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        pids = [str(process.pid)]
        if children.is_file():
            pids += children.read_text().split()
        for pid in pids:
            status = Path(f"/proc/{pid}/status")
            lines = status.read_text().splitlines() if status.is_file() else []
            for line in lines:
                if line.startswith("VmHWM:"):
                    peaks[pid] = int(line.split()[1]) * 1024
        time.sleep(0.2)
    if process.returncode:
        raise ValueError(
            f"{' '.join(command)} ended with status {process.returncode}: see its message above"
        )
    return sum(peaks.values())


def print_results(settings, seconds, sample_megabytes, megabytes, peak_bytes):
    """seconds: of tiktoken on sample_megabytes, and of prepare.py on megabytes."""
    s, used = settings, os.times()
    one_thread = sample_megabytes / seconds["tiktoken"]
    ours = megabytes / seconds["prepare.py"]
    share = ours / (one_thread * s.workers)
    cpu_seconds = used.children_user + used.children_system
    by_cpu_time = s.rounds * megabytes / cpu_seconds
    print(f"tiktoken, one thread: {one_thread:.1f} MB/s")
    print(
        f"prepare.py, {s.workers} workers: {ours:.1f} MB/s, {share:.0%} of {s.workers} such threads"
    )
    print(
        f"the same by CPU time: {by_cpu_time:.1f} MB/s, {by_cpu_time / one_thread:.0%} of tiktoken"
    )
    print(f"peak memory of all processes together: {peak_bytes / 1e6:.0f} MB")
