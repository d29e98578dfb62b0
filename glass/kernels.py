"""kernels.c, built by this machine's C compiler at first use: products and attention of few rows.

    if can_multiply(x):  # there is a compiler; else torch does the work
        y = multiply_rows(weight, x)

The library is kept in the user's cache, by its text, the compiler and the processor, so it is built
once, in half a second. It runs on the threads that torch has: a second set would wait for the first.
"""

import ctypes
import functools
import hashlib
import mmap
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = "-O3 -march=native -ffp-contract=fast -fopenmp -fPIC -c".split()
HUGE = 1 << 21  # bytes of a huge page
MOST_ROWS = 16  # above, torch's product of matrices is faster


@functools.cache
def library():
    """The loaded library, or None where it cannot be built: no Linux, no compiler, no OpenMP."""
    compiler, openmp = shutil.which("cc") or shutil.which("gcc"), loaded_openmp()
    if compiler is None or openmp is None:
        return None
    text = SOURCE.read_text()
    key = "\n".join([text, compiler, openmp, processor(), *FLAGS])
    name = f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        path = cache_folder() / name
        if not path.exists():
            build(compiler, openmp, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


def build(compiler, openmp, path):
    """Compile SOURCE into a library at path, which appears only when it is whole."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = Path(folder, "kernels.o"), Path(folder, path.name)
        # linked without -fopenmp, which would bring a second OpenMP beside torch's
        for command in (
            [compiler, *FLAGS, str(SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), openmp, "-lm", "-o", str(linked)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        os.replace(linked, path)


def cache_folder():
    """Where libraries are kept: in the user's cache, else a folder of this process."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "glassgpt")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_ours = not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
        if is_ours and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="glassgpt-"))


def loaded_openmp():
    """The file of the OpenMP library that torch runs on, or None."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = re.search(r"/\S*/lib(?:gomp|iomp5|omp)[-.\w]*\.so[.\d]*", maps)
    return found and found[0]


def processor():
    """What distinguishes this machine's processor from others."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.machine()
    named = ("model name", "flags", "Features")
    return "\n".join(line for line in lines if line.startswith(named))


@functools.cache
def function(kind, dtype, n_tensors, n_sizes):
    """The C function of a kind for weights, or a cache, of a dtype; see `call`."""
    found = getattr(library(), f"{kind}_{str(dtype).removeprefix('torch.')}")
    found.argtypes = [ctypes.c_void_p] * n_tensors + [ctypes.c_long] * n_sizes
    found.argtypes += [ctypes.c_int] * 2
    found.restype = None
    return found


def call(kind, dtype, x, tensors, sizes):
    """Call a C function on contiguous tensors (or None) and sizes. x: float32 or bfloat16."""
    pointers = [each if each is None else each.data_ptr() for each in tensors]
    is_half = x.dtype == torch.bfloat16
    called = function(kind, dtype, len(tensors), len(sizes))
    called(*pointers, *sizes, is_half, torch.get_num_threads())


def in_huge_pages(tensor):
    """A copy of a large CPU tensor in pages of 2 MB, where Linux gives them; else the tensor.

    Reading 500 MB of weights takes 17.5 instead of 20.8 ms on two cores of a Zen 3: in pages of 4 kB,
    looking up where they lie takes the rest.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    size = -(-tensor.nbytes // HUGE) * HUGE + HUGE
    space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    space.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(space, dtype=torch.uint8)
    first = -memory.data_ptr() % HUGE
    placed = memory[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return placed.copy_(tensor)


def can_multiply(x):
    """Whether `multiply_rows` is there for x (..., K), and the faster way."""
    return (
        x.device.type == "cpu"
        and x.numel() <= MOST_ROWS * x.shape[-1]
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def multiply_rows(weight, x, bias=None, scale=None):
    """x (..., K) times weight (N, K) transposed, plus bias (N,) in float32 -> (..., N).

    weight: float32, bfloat16, or int8 with a scale (N,) in float32.
    """
    (N, K), x = weight.shape, x.contiguous()
    y = x.new_empty(*x.shape[:-1], N)
    tensors = (weight, x, bias, y) if scale is None else (weight, scale, x, bias, y)
    call("rows", weight.dtype, x, tensors, (N, K, x.numel() // K))
    return y


def attend(q, k, v, lengths):
    """Attention of one new token in each row: q (B, H, 1, D) -> (B, H, 1, D).

    k, v (B, Hkv, S, D): the first positions of larger tensors, a cache. lengths (B,): how many of
    them each row attends to; int64.
    """
    (B, H, _, D), q = q.shape, q.contiguous()
    y, room = torch.empty_like(q), k.stride(1) // D
    call("attend", k.dtype, q, (q, k, v, y, lengths), (B, H, k.shape[1], room, D))
    return y
