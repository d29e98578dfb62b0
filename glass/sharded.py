"""Checkpoints of which each process writes its own part, for models that no process holds whole.

ckpt_STEP.pt is then small: in place of each tensor of the model and the optimizers it has a name,
and "shards" says where they are: a folder shards_STEP of safetensors that torch.distributed.checkpoint
wrote, with the CRC of every file. It is written last, so without it there is no checkpoint, and all
that glass/checkpoint.py promises of files holds for these. The safetensors storage is used because
that of plain DCP keeps a pickle.
"""

import contextlib
import os
import re
import shutil
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed as dist

from glass.files import first_line, sync_folder
from glass.parallel import SHARED, is_shard, local

LARGE = 50e9  # bytes of weights and moments; above, 'auto' writes shards
TENSOR = "tensor of the shards"  # the key of a placeholder


def shards_folder(folder, step):
    """The folder with the tensors of a step."""
    return Path(folder) / f"shards_{step:07d}"


def is_wanted(setting, way, n_parameters):
    """Whether a run writes shards: as the setting says; 'auto': a shared model that is large."""
    if setting == "auto":
        return way in SHARED and 12 * n_parameters > LARGE
    return bool(setting) and way in SHARED


def taken_out(value, name, tensors, names):
    """value with a placeholder for each tensor, which goes into the dict `tensors` by its name.

    names: a dict, empty at first, of the first name of each piece of memory.
    """
    if isinstance(value, torch.Tensor):
        if local(value).numel():  # a tied matrix has two names, and is written once
            name = names.setdefault((local(value).data_ptr(), value.shape), name)
        tensors[name] = value
        return {TENSOR: name, "shape": list(value.shape), "dtype": str(value.dtype)[6:]}
    if isinstance(value, dict):
        return {
            key: taken_out(each, f"{name}.{key}", tensors, names) for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [taken_out(each, f"{name}.{i}", tensors, names) for i, each in enumerate(value)]
    return value


def put_back(value, tensors):
    """What `taken_out` was given."""
    if isinstance(value, dict):
        if TENSOR in value:
            return tensors[value[TENSOR]]
        return {key: put_back(each, tensors) for key, each in value.items()}
    if isinstance(value, list):
        return [put_back(each, tensors) for each in value]
    return value


def placeholders(value):
    """Yield every placeholder in a value."""
    if isinstance(value, dict):
        if TENSOR in value:
            yield value
        else:
            for each in value.values():
                yield from placeholders(each)
    elif isinstance(value, list):
        for each in value:
            yield from placeholders(each)


def save(folder, step, state, processes):
    """Write the tensors of state, each process its part; give back state without them, and "shards".

    All processes call it. Raises OSError where one of them cannot write.
    """
    import torch.distributed.checkpoint as dcp

    tensors, final = {}, shards_folder(folder, step)
    names = {}
    small = {key: taken_out(value, key, tensors, names) for key, value in state.items()}
    temporary, crc_of = final.with_suffix(".tmp"), {}

    def begin():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def end():
        for path in sorted(temporary.iterdir()):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            crc_of[path.name] = crc(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        sync_folder(folder)

    in_main(begin, processes, step)
    writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
    try:
        with quiet():
            dcp.save(tensors, storage_writer=writer)
    except Exception as error:  # of another process too
        raise cannot_write(step, error) from error
    in_main(end, processes, step)
    return small | {"shards": {"folder": final.name, "crc": crc_of}}


def in_main(function, processes, step):
    """Call a function in the main process; OSError in all of them if it fails there."""
    failed = None
    if processes.is_main:
        try:
            function()
        except OSError as error:
            failed = error
    is_well = processes.reduce(torch.tensor([failed is None]), dist.ReduceOp.MIN).item()
    if not is_well:
        raise cannot_write(step, failed or OSError("in the main process"))


def cannot_write(step, error):
    return OSError(f"the shards of step {step} cannot be written ({first_line(error)})")


@contextlib.contextmanager
def quiet():
    """A context without DCP's remark that one process loads alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def crc(path):
    """The CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def damage(folder, about):
    """What is wrong with the shards that "shards" of a checkpoint describes, or None."""
    found = re.fullmatch(r"shards_\d+", about["folder"])
    path = Path(folder) / about["folder"]
    if not found or not path.is_dir():
        return f"{about['folder']} is missing"
    for name, expected in about["crc"].items():
        if Path(name).name != name or not (path / name).is_file():
            return f"{about['folder']}/{name} is missing"
        if crc(path / name) != expected:
            return f"CRC of {about['folder']}/{name} differs"
    return None


def filled(state, like=None):
    """The state of a checkpoint with its tensors, if they lie in shards.

    like: for tensors that this process shall hold a part of only, a DTensor of the same shape by
    name, such as "model.head.weight" or "optimizer.0.state.3.exp_avg"; all processes call it then.
    Others are read whole.
    """
    if "shards" not in state:
        return state
    import torch.distributed.checkpoint as dcp

    tensors, like = {}, like or {}
    for each in placeholders({key: state[key] for key in state if key != "shards"}):
        name, dtype = each[TENSOR], getattr(torch, each["dtype"])
        template = like.get(name)
        if is_shard(template) and list(template.shape) == each["shape"]:
            tensors[name] = torch.empty_like(template, dtype=dtype)
        else:
            tensors[name] = torch.empty(each["shape"], dtype=dtype)
    folder = Path(state["path"]).parent / state["shards"]["folder"]
    reader = dcp.HuggingFaceStorageReader(str(folder))
    with quiet():
        dcp.load(tensors, storage_reader=reader, no_dist=not like)
    rest = {key: value for key, value in state.items() if key != "shards"}
    return put_back(rest, tensors)


def parts_of(model, optimizers):
    """The tensors that a run holds a part of, by their names in its checkpoint; see `filled`.

    A moment is shared out as its parameter is.
    """
    like = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for j, parameter in enumerate(parameters):
            for moment in ("exp_avg", "exp_avg_sq", "momentum"):
                like[f"optimizer.{i}.state.{j}.{moment}"] = parameter
            if parameter.ndim == 2:  # Muon's
                like[f"optimizer.{i}.state.{j}.row_squares"] = parameter.detach()[:, :1]
    return {name: tensor for name, tensor in like.items() if is_shard(tensor)}


def remove_unused(folder, used):
    """Remove the shards of the folder that no checkpoint names, and half-written ones."""
    for path in Path(folder).glob("shards_*"):
        if re.fullmatch(r"shards_\d+(\.tmp)?", path.name) and path.name not in used:
            shutil.rmtree(path, ignore_errors=True)
