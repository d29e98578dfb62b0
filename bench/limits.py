"""What this machine can do: matrix products by size and dtype, and reading memory.

    python bench.py limits

Each figure is the best of several measurements.
"""

import os
from dataclasses import dataclass

import torch

from bench.common import memory_bandwidth, product_rate
from glass.device import choose_device
from glass.settings import configure

SIZES = (256, 512, 1024, 2048, 4096)  # of the square matrices


@dataclass
class Settings:
    rounds: int = 10  # of each measurement; the best counts


def main(argv):
    s, device = configure(Settings, argv), choose_device()
    threads = torch.get_num_threads()
    print(f"{device}, {os.cpu_count()} cores, torch {torch.__version__} with {threads} threads")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        rates = {n: product_rate(n, dtype, device, s.rounds) for n in SIZES}
        shown = ", ".join(f"{n}: {rate / 1e9:,.0f}" for n, rate in rates.items())
        print(f"GFLOP/s of a square matrix product in {name}, by size: {shown}")
    print(f"reading memory: {memory_bandwidth(device) / 1e9:.0f} GB/s")
