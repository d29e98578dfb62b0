"""The machine: its device, the dtype of products, memory that is kept, and torchrun's processes."""

import contextlib
import ctypes
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

PEAK_FLOPS = {  # per second, dense bfloat16, from NVIDIA's data sheets
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
}


def choose_device(name="auto"):
    """The torch.device of that name; 'auto' takes cuda, else mps, else cpu.

    Raises ValueError for a device that this machine does not have.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        if cuda:
            name = "cuda"
        elif mps:
            name = "mps"
        else:
            name = "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"device={name!r} is not a device: use auto, cpu, cuda, cuda:1 or mps"
        ) from error
    if not {"cpu": True, "cuda": cuda, "mps": mps}.get(device.type, False):
        raise ValueError(
            f"device={name} is not available to this torch ({torch.__version__}): "
            "use --device=cpu, or install a torch that supports it"
        )
    n_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        raise ValueError(
            f"device={name} but there are {n_gpus} GPUs, counted from 0: choose one of these"
        )
    return device


def choose_dtype(name, device):
    """The torch.dtype of matrix products: 'auto', 'float32', 'bfloat16' or 'float16'.

    'auto' is bfloat16 where that is fast. On a CPU it is fast if the processor multiplies bfloat16
    natively; emulated, it is slower than float32. Raises ValueError for another name.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name in dtypes:
        return dtypes[name]
    if name != "auto":
        raise ValueError(f"dtype={name!r} must be one of auto {' '.join(dtypes)}")
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def autocast(device, dtype):
    """A context in which matrix products run in dtype; the float32 weights stay as they are."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def peak_flops(device):
    """The published bfloat16 FLOPs per second of a GPU, or None if the table lacks the device."""
    if device.type != "cuda":
        return None
    gpu = torch.cuda.get_device_name(device)
    return next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), None)


def free_memory(device):
    """Bytes that can be allocated on a device, or None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return None


def keep_freed_memory(kept=True):
    """Tell glibc to keep freed memory: handing pages back costs a third of a step on a CPU.

    Or to hand all of it back, where a model is shared because memory is short: what FSDP gathers
    and drops, in pieces of many sizes, otherwise leaves gaps that double a process.
    Sets M_TRIM_THRESHOLD and M_MMAP_MAX, or M_MMAP_THRESHOLD, of mallopt(3). Does nothing with
    another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
        if kept:
            mallopt(-1, -1)
            mallopt(-4, 0)
        else:
            mallopt(-3, 1 << 16)
    except (OSError, AttributeError, TypeError):  # TypeError: Windows cannot open None
        pass


@dataclass
class Processes:
    """The processes that train together. This one is `rank` of `size`; one process is 0 of 1."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self):
        return self.rank == 0

    def reduce(self, values, op=dist.ReduceOp.SUM):
        """values (n,), summed over all processes (or reduced by another op): (n,).

        The result is on the CPU if there are several processes.
        """
        if self.size == 1:
            return values
        dtype = torch.float32 if self.device.type == "mps" else values.dtype  # mps has no float64
        values = values.to(self.device, dtype)
        dist.all_reduce(values, op)
        return values.cpu()

    def together(self, own):
        """The items of all processes as one list, in turn: item i is from process i % size."""
        lists = [None] * self.size
        dist.all_gather_object(lists, own)
        n = sum(map(len, lists))
        return [lists[i % self.size][i // self.size] for i in range(n)]

    def wait(self):
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def leave(self):
        """Wait until every process is done, then leave the group."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def count_processes():
    """How many processes torchrun has started; 1 without torchrun.

    Raises ValueError if the environment is not as torchrun sets it.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    has_all = all(os.environ.get(name) for name in names)
    if not size.isdecimal() or int(size) < 1 or (int(size) > 1 and not has_all):
        raise ValueError(
            f"WORLD_SIZE={size!r} is set, but torchrun sets a number with {' '.join(names)}: "
            "unset it, or start with torchrun"
        )
    return int(size)


def join_processes(device, backend=None):
    """The Processes that torchrun started, with the device of this one.

    Without torchrun there is just this process. backend is torch.distributed's; None takes nccl on
    GPUs and gloo on CPUs.
    """
    if count_processes() == 1:
        return Processes(device=device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # After a restart, torchrun's store still holds the addresses of the dead processes. A prefix of
    # its own for each attempt hides them.
    store, rank, size = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return Processes(rank, size, device)
