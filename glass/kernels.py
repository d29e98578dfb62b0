"""kernels.c and fused.c, built by this machine's C compiler at first use; and calls of kernels.c.

    if can_multiply(x):  # there is a compiler; else torch does the work
        y = multiply_rows(weight, x)

The library is kept in the user's cache, by its text, the compiler and the processor, so it is built
once, in two seconds. It runs on the threads that torch has: a second set would wait for the first.
"""

import contextlib
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

FOLDER = Path(__file__).parent
FLAGS = "-O3 -march=native -ffp-contract=fast -fopenmp -fPIC -c".split()
HUGE = 1 << 21  # bytes of a huge page
MOST_ROWS = 16  # above, torch's product of matrices is faster


@functools.cache
def library(name="kernels"):
    """NAME.c as a loaded library, or None where it cannot be built: no Linux, compiler or OpenMP."""
    compiler, openmp = shutil.which("cc") or shutil.which("gcc"), loaded_openmp()
    if compiler is None or openmp is None:
        return None
    source = FOLDER / f"{name}.c"
    text = source.read_text() + (FOLDER / "kernels.h").read_text()
    key = "\n".join([text, compiler, openmp, processor(), *FLAGS])
    path = cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    with contextlib.suppress(OSError):  # it is not there yet
        return ctypes.CDLL(str(path))
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        build(compiler, openmp, source, path)
        return ctypes.CDLL(str(path))
    return None


def build(compiler, openmp, source, path):
    """Compile source into a library at path, which appears only when it is whole."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = Path(folder, "compiled.o"), Path(folder, path.name)
        # linked without -fopenmp, which would bring a second OpenMP beside torch's
        for command in (
            [compiler, *FLAGS, str(source), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), openmp, "-lm", "-o", str(linked)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        os.replace(linked, path)


def cache_folder():
    """Where libraries are kept: in the user's cache, else a folder of this process."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "glassgpt")
        folder.mkdir(parents=True, exist_ok=True)
        is_ours = not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
        if is_ours and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home
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


class Norm(ctypes.Structure):
    """struct norm of kernels.c, for a norm of a model. It keeps the float32 weights that it names."""

    _fields_ = [
        ("kind", ctypes.c_int),
        ("eps", ctypes.c_float),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]

    def __init__(self, norm=None, kind=0, eps=0.0):
        if norm is None:
            super().__init__(kind, eps)
            return
        self.kept = [wide(norm.weight), wide(getattr(norm, "bias", None))]
        kind = 1 if isinstance(norm, torch.nn.LayerNorm) else 2
        super().__init__(kind, norm.eps, *map(address, self.kept))


class Linear(ctypes.Structure):
    """struct linear, for a RowLinear or Int8Linear of generate.py."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_long),
        ("k", ctypes.c_long),
        ("kind", ctypes.c_int),
    ]

    def __init__(self, linear, n=None):
        scale = getattr(linear, "wide_scale", None)
        self.kept = [linear.weight.detach(), scale, linear.wide_bias]
        N, K = linear.weight.shape
        super().__init__(*map(address, self.kept), n or N, K, KINDS[linear.weight.dtype])


class OneBlock(ctypes.Structure):
    """struct block, for a Block with joined products."""

    _fields_ = [(f"{name}_norm", Norm) for name in ("attn", "mlp", "q", "k")]
    _fields_ += [(name, Linear) for name in ("qkv", "o", "up", "down")]
    _fields_ += [("stream_share", ctypes.c_float), ("embed_share", ctypes.c_float)]


class Shape(ctypes.Structure):
    """struct shape."""

    _fields_ = [(name, ctypes.c_long) for name in ("h", "hkv", "d", "room")]
    _fields_ += [(name, ctypes.c_int) for name in ("activation", "cache_is_half")]


KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
NO_NORM = Norm()
ACTIVATIONS = {"gelu": 1, "gelu_exact": 2, "relu2": 3, "swiglu": 4}
ROWS = [ctypes.c_void_p] * 6 + [ctypes.c_long] * 3 + [ctypes.c_int] * 4  # arguments
RUN_BLOCKS = [ctypes.c_void_p] * 8 + [ctypes.c_long] * 3 + [ctypes.c_int]


def wide(tensor):
    """A tensor in float32, contiguous, without a gradient; None stays None."""
    return None if tensor is None else tensor.detach().float().contiguous()


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def function(name, *arguments, file="kernels"):
    """A C function of `file` by its name, with the types of its arguments."""
    found = getattr(library(file), name)
    found.argtypes, found.restype = arguments, None
    return found


def in_huge_pages(tensor):
    """A copy of a large CPU tensor in pages of 2 MB, where Linux gives them; else the tensor.

    Reading 500 MB of weights takes 17.5 instead of 20.8 ms on two cores of a Zen 3: in pages of 4 kB,
    looking up where they lie takes the rest.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    size = -(-tensor.nbytes // HUGE) * HUGE + HUGE
    space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a Linux that was built without them
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
        and not x.requires_grad
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def multiply_rows(weight, x, bias=None, scale=None, norm=NO_NORM):
    """norm(x) weight^T + bias: x (..., K), weight (N, K) -> (..., N), without gradients.

    weight: float32, bfloat16, or int8 with a scale (N,). bias and scale are float32. norm: a Norm.
    """
    (N, K), x = weight.shape, x.contiguous()
    y = x.new_empty(*x.shape[:-1], N)
    function(f"rows_{str(weight.dtype)[6:]}", *ROWS)(
        weight.data_ptr(),
        address(scale),
        x.data_ptr(),
        address(bias),
        y.data_ptr(),
        ctypes.byref(norm),
        N,
        K,
        x.numel() // K,
        False,  # no activation
        False,  # nothing is added to
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return y


class Blocks:
    """The blocks of a model, as kernels.c runs them on the next tokens of each row."""

    def __init__(self, model):
        config, kept = model.config, []
        self.weights = weights_of(model)
        shares = [(1.0, 0.0)] * config.n_layer
        if config.embed_skip:
            mix = model.block_input
            shares = list(zip(mix.stream_share.tolist(), mix.embed_share.tolist(), strict=True))
        self.blocks = (OneBlock * config.n_layer)()
        for own, block, share in zip(self.blocks, model.blocks, shares, strict=True):
            parts = [Norm(block.attn_norm), Norm(block.mlp_norm), *qk_norms(block, config)]
            parts += [Linear(block.attn.qkv_proj), Linear(block.attn.o_proj)]
            parts += [Linear(block.mlp.up_proj, config.n_inner), Linear(block.mlp.down_proj)]
            for (name, _), part in zip(OneBlock._fields_, parts, strict=False):
                setattr(own, name, part)
            own.stream_share, own.embed_share = share
            kept += parts  # they hold the tensors that the pointers name
        self.kept = kept
        self.shape = Shape(config.n_head, config.n_kv_head, config.head_dim)
        self.shape.activation = ACTIVATIONS[config.mlp]

    def are_of(self, model):
        """Whether the model still has the weights that it had here."""
        return self.weights == weights_of(model)

    def run(self, x, positions, rotation, cache):
        """The residual stream x (B, T, C) after all blocks: (B, T, C) float32.

        The cache gets the keys and values of the tokens, whose positions are (T,) or (B, T). Each
        token's result is to the bit what it is alone.
        """
        (B, T, _), D = x.shape, self.shape.d
        x = x.to(torch.float32, copy=True).contiguous()
        places = positions.expand(B, T).contiguous()
        angles = [wide(each.expand(B, T, 1, D)) for each in rotation] if rotation else [None, None]
        stores = [(ctypes.c_void_p * len(own))(*map(address, own)) for own in (cache.k, cache.v)]
        self.shape.room = cache.max_len
        self.shape.cache_is_half = cache.k[0].dtype == torch.bfloat16
        function("run_blocks", *RUN_BLOCKS)(
            ctypes.byref(self.blocks),
            ctypes.byref(self.shape),
            x.data_ptr(),
            *stores,
            *map(address, (places, *angles)),
            len(self.blocks),
            B * T,
            T,
            torch.get_num_threads(),
        )
        return x


def qk_norms(block, config):
    """The Norms of a block's queries and of its keys."""
    if config.qk_norm_weight:
        return Norm(block.attn.prepare.q_norm), Norm(block.attn.prepare.k_norm)
    eps = torch.finfo(torch.float32).eps  # that of F.rms_norm
    return [Norm(kind=2 if config.qk_norm else 0, eps=eps)] * 2


def weights_of(model):
    """What changes when a model gets other weights, or its weights another dtype."""
    return [
        address(model.tok_emb.weight),
        *map(address, (b.mlp.down_proj.weight for b in model.blocks)),
    ]
