"""A model over several processes: a copy in each (DDP), or a shard in each (FSDP2).

fully_shard makes every parameter a DTensor, of which each process holds some rows, with their
gradients and moments. A block is gathered just before it runs, in the forward and again in the
backward pass, and dropped after it. With hsdp, processes of one machine share the model, and
machines average their gradients. What follows is the same for all, because copies and shards meet
in a few functions: `whole` gathers a tensor, `shard_like` takes this process's rows of one.
"""

import contextlib
import copy
import itertools
import math
import os
import warnings

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from glass.device import autocast, choose_dtype, free_memory
from glass.progress import say
from model import GPT, LoRALinear, count_parameters

BYTES = 16  # of a trained parameter in float32: itself, its gradient and AdamW's two moments
SHARED = ("fsdp", "hsdp")


def choose_way(settings, n_parameters, processes):
    """How the processes share the model: None (there is one), "ddp", "fsdp" or "hsdp".

    auto takes ddp where a copy with its gradients and moments fits into what a process can have,
    else fsdp, and says why. Raises ValueError for what cannot be.
    """
    way, size = settings.parallel, processes.size
    if size == 1:
        if way in SHARED:
            say(f"parallel={way} has one process here, which holds the whole model")
        return None
    if way == "auto":
        needed, free = BYTES * n_parameters, free_memory(processes.device)
        if free is not None and processes.device.type == "cpu":
            free //= int(os.environ.get("LOCAL_WORLD_SIZE", size))
        way = "ddp"
        if free is not None and needed > free:
            way = "fsdp"
        if way == "fsdp" and processes.is_main:
            say(
                f"parallel=fsdp: weights, gradients and moments are {needed / 1e9:,.1f} GB and a "
                f"process has {free / 1e9:,.1f} GB"
            )
    if way == "hsdp" and size % group_size(size):
        raise ValueError(
            f"parallel=hsdp needs groups of equal size, found {size} processes in groups of "
            f"{group_size(size)}: start an even number, or take fsdp"
        )
    if way in SHARED and settings.dtype == "float16":
        raise ValueError(f"parallel={way} has no scaler for float16: take --dtype=bfloat16")
    return way


def group_size(size):
    """How many processes share one copy of the model with hsdp: those of a machine.

    On a single machine, half of them.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return local if local < size else max(2, size // 2)


def shard(model, way, processes, dtype):
    """Share the parameters of a model out, in place, where `way` asks for it.

    dtype: of matrix products. Parameters are gathered in it, and gradients are summed in float32.
    """
    if way not in SHARED:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    shape, names = (processes.size,), ("shard",)
    if way == "hsdp":
        n = group_size(processes.size)
        shape, names = (processes.size // n, n), ("copy", "shard")
    mesh = init_device_mesh(processes.device.type, shape, mesh_dim_names=names)
    precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the residual stream stays as autocast has it
    )
    # logits are a view of a larger tensor, and nothing here changes them in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)  # the rest: embedding, last norm, head
    for block, following in itertools.pairwise(model.blocks):
        block.set_modules_to_forward_prefetch([following])
    register_fsdp_forward_method(model, "hidden")  # it is called from outside too


def empty(config, way, processes, dtype):
    """A GPT whose shards, in the memory of this process, are still to be filled."""
    with torch.device("meta"):
        model = GPT(config)
    shard(model, way, processes, dtype)
    return model.to_empty(device=processes.device)


def make_model(config, settings, processes):
    """(model, way): fresh weights, drawn from the seed, and how the processes share them.

    A model that is shared out is never whole in a process.
    """
    way = choose_way(settings, count_parameters(config), processes)
    if way not in SHARED:
        torch.manual_seed(settings.seed)
        return GPT(config).to(processes.device), way
    model = empty(config, way, processes, choose_dtype(settings.dtype, processes.device))
    fill(model, settings.seed)
    return model, way


def copy_of(model, settings, processes):
    """A copy of a model, shared out as the model is."""
    if not is_shared(model):
        return copy.deepcopy(model)
    state = model.state_dict()
    way = "hsdp" if state["final_norm.weight"].device_mesh.ndim == 2 else "fsdp"
    dtype = choose_dtype(settings.dtype, processes.device)
    twin = empty(model.config, way, processes, dtype)
    twin.load_state_dict(state)
    return twin


def evaluating(way, model, settings):
    """A context for what runs a model outside of training's autocast: answers, samples of text.

    A shared model is gathered in the dtype of products, so it needs autocast there too. Always a new
    context, since one of torch's cannot be entered twice.
    """
    if way not in SHARED:
        return contextlib.nullcontext()
    return autocast(model.device, choose_dtype(settings.dtype, model.device))


class LossOf(torch.nn.Module):
    """LossOf(model)(loss, ...) is loss(model, ...): a module, so that DDP sees the forward pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, loss, *arguments):
        return loss(self.model, *arguments)


def wrap(model, way):
    """The LossOf a model whose backward pass exchanges gradients, as `way` wants it."""
    return DistributedDataParallel(LossOf(model)) if way == "ddp" else LossOf(model)


def exchange(wrapped, way, is_last):
    """Say whether the coming backward pass exchanges gradients: that of the last micro-step does."""
    if way == "ddp":
        wrapped.require_backward_grad_sync = is_last
    elif way in SHARED:
        wrapped.model.set_requires_gradient_sync(is_last)


def is_shared(model):
    """Whether the processes share a model, so that it runs in all of them or in none.

    Its parameters do not tell: those outside of the blocks stay gathered after an evaluation.
    """
    return hasattr(model, "unshard")  # FSDP2 gives it that


def is_shard(tensor):
    """Whether a tensor is this process's part of a larger one, a DTensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor):
    """The rows that this process holds: the tensor itself where it is not shared out."""
    return tensor.to_local() if is_shard(tensor) else tensor


def whole(value, kept=True, memo=None):
    """value, nested dicts and lists of tensors, with every shard gathered on the CPU.

    All processes must call it. Those that do not keep the result get None for a shard, so that the
    whole is in one process only.
    """
    memo = {} if memo is None else memo
    if isinstance(value, dict):
        return {name: whole(each, kept, memo) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(each, kept, memo) for each in value)
    if not is_shard(value):
        return value
    key = (value.to_local().data_ptr(), value.to_local().numel(), value.shape)
    if key[1] == 0 or key not in memo:  # a tied matrix has two names
        full = value.full_tensor()
        memo[key] = full.cpu() if kept else None
    return memo[key]


def shard_like(tensor, like):
    """This process's part of a whole tensor, shared out as `like` is; the tensor if that is whole."""
    if not is_shard(like) or is_shard(tensor):
        return tensor
    from torch.distributed.tensor import DTensor

    mesh = like.device_mesh["shard"]
    per_process = math.ceil(len(tensor) / mesh.size())
    first = per_process * mesh.get_local_rank()
    # every process has the whole, so nothing is sent; of a mapped file, only these rows are read
    rows = tensor[first : first + per_process]
    rows = rows.to(like.device, like.dtype, memory_format=torch.contiguous_format, copy=True)
    shape = (len(like), *tensor.shape[1:])  # moments may have other columns
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )


def shards_like(tensors, like):
    """`shard_like` for a dict of tensors, by name."""
    return {name: shard_like(tensor, like.get(name)) for name, tensor in tensors.items()}


@torch.no_grad()
def fill(model, seed):
    """Give a model of empty shards the weights that GPT(config) has after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    for module in model.modules():
        for name, tensor in constructed(module).items():  # one whole module is in memory at a time
            own = getattr(module, name)
            own.copy_(shard_like(tensor, own))
    model.init_weights(draw_normal)


def constructed(module):
    """What the constructor of a module with weights of its own draws: a dict of tensors by name."""
    if isinstance(module, LoRALinear):
        rank, has_bias = len(module.lora_a), module.bias is not None
        made = LoRALinear(module.in_features, module.out_features, has_bias, rank, alpha=1.0)
    elif isinstance(module, torch.nn.Linear):
        made = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
    elif isinstance(module, torch.nn.Embedding):
        made = torch.nn.Embedding(module.num_embeddings, module.embedding_dim)
    else:
        return {}
    return {name: tensor.detach() for name, tensor in made.named_parameters()}


def draw_normal(parameter, std):
    """Fill a parameter as nn.init.normal_ fills a whole one, from the same random numbers.

    One whole matrix is in memory at a time.
    """
    if not is_shard(parameter):
        torch.nn.init.normal_(parameter, std=std)
        return
    full = torch.nn.init.normal_(torch.empty(parameter.shape), std=std)
    parameter.copy_(shard_like(full, parameter))


def clip_gradients(model, max_norm):
    """Scale gradients down to a norm of at most max_norm; 0 means no limit. Gives their norm."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    return (norm.full_tensor() if is_shard(norm) else norm).item()


def on_whole_matrices(function, shards, like):
    """function(batch) for matrices of which each process holds some rows: their rows of the result.

    shards: this process's rows of matrices that all have the rows of `like`, a DTensor. Each
    matrix is gathered by one process of the group, in turn, goes through `function` there, as part
    of a batch (n, rows, columns), and its rows are sent back.
    """
    group = like.device_mesh.get_group("shard")
    size, rank, rows = dist.get_world_size(group), dist.get_rank(group), like.shape[0]
    per_process = math.ceil(rows / size)  # the last ones have fewer, as torch.chunk cuts
    padding = per_process - len(shards[0])
    own = []
    for i, matrix in enumerate(shards):
        matrix = F.pad(matrix, (0, 0, 0, padding)).contiguous()
        owner = i % size
        parts = [torch.empty_like(matrix) for _ in range(size)] if rank == owner else None
        dist.gather(matrix, parts, group=group, group_dst=owner)
        if rank == owner:
            own.append(torch.cat(parts)[:rows])
    done = iter(function(torch.stack(own)) if own else ())
    results = []
    for i in range(len(shards)):
        result, parts, owner = (
            torch.empty(per_process, shards[0].shape[1], dtype=like.dtype),
            None,
            i % size,
        )
        result = result.to(like.device)
        if rank == owner:
            filled = F.pad(next(done).to(like.dtype), (0, 0, 0, per_process * size - rows))
            parts = list(filled.contiguous().split(per_process))
        dist.scatter(result, parts, group=group, group_src=owner)
        results.append(result[: per_process - padding])
    return results
