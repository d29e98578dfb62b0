"""One promise: what was saved is loaded whole, or the one before it is.

A checkpoint `ckpt_0002000.pt` is written to a temporary file, flushed to the disk, read back,
renamed, and the folder's entry flushed too; only then is an old one removed. Whatever interrupts
this leaves the checkpoints that were there. `best.pt` is a second name of the best one's file.
Loading checks every byte (a torch file is a zip archive with a CRC of each tensor, which torch.load
ignores) and accepts plain types only, never code.

State: version step model optimizer scaler best_val_loss best_step evaluated_step
evaluations_without_better settings model_config tokenizer data task.
"""

import errno
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import torch

from glass.files import sync_folder

VERSION = 2
# what an earlier run may have left in a folder, beside its checkpoints
LEFT_BEHIND = "best.pt metrics.jsonl loss.png test.json confusion.png adapter.safetensors".split()


def checkpoint_path(folder, step):
    return Path(folder) / f"ckpt_{step:07d}.pt"


def saved_steps(folder):
    """The steps that have a checkpoint in the folder, ascending; loading shows whether each is
    whole.
    """
    names = (re.fullmatch(r"ckpt_(\d+)\.pt", path.name) for path in Path(folder).glob("ckpt_*.pt"))
    return sorted(int(match[1]) for match in names if match)


def save(folder, step, state, keep=2):
    """Write ckpt_STEP.pt, then remove all but the last `keep`; gives its path.

    state: tensors and plain Python types. Raises OSError, the old ones untouched, if it cannot.
    """
    folder = Path(folder)
    path = checkpoint_path(folder, step)
    temporary = path.with_suffix(".tmp")
    try:
        needed, free = tensor_bytes(state) + (1 << 20), shutil.disk_usage(folder).free
        if free < needed:
            problem = f"{free >> 20} MiB are free where the checkpoint needs {needed >> 20} MiB"
            raise OSError(errno.ENOSPC, problem, str(folder))
        with open(temporary, "wb") as file:
            torch.save({"version": VERSION, "step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        if damaged := damage(temporary):
            raise OSError(
                errno.EIO, f"what was written does not read back ({damaged})", str(temporary)
            )
        os.replace(temporary, path)
        sync_folder(folder)
    except RuntimeError as error:  # torch wraps the OSError of a failed write
        problem = f"the checkpoint could not be written ({first_line(error)})"
        raise OSError(errno.EIO, problem, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    for old in saved_steps(folder)[:-keep]:
        checkpoint_path(folder, old).unlink()
    return path


def mark_best(folder, step):
    """Make best.pt a second name of ckpt_STEP.pt: a hard link, or a copy where there are no links."""
    folder, source = Path(folder), checkpoint_path(folder, step)
    temporary = folder / "best.tmp"
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(temporary, folder / "best.pt")
    sync_folder(folder)


def load(folder, which="last"):
    """The state of the 'last' good checkpoint, of the 'best', or of one step, with tensors on the
    CPU.

    For 'last' a damaged file is named on stderr and the one before it is taken. Raises
    FileNotFoundError if there is none, ValueError if none is whole or a newer program wrote it.
    """
    folder = Path(folder)
    if which == "last":
        paths = [checkpoint_path(folder, step) for step in reversed(saved_steps(folder))]
    else:
        paths = [folder / "best.pt" if which == "best" else checkpoint_path(folder, which)]
    if not paths or not paths[0].exists():
        have = ", ".join(map(str, saved_steps(folder))) or "none"
        raise FileNotFoundError(
            f"{folder} holds no checkpoint ({which}; steps there: {have}): "
            "train one first, or name its folder"
        )
    for path in paths:
        state, problem = read(path)
        if problem is None:
            return upgraded(state)
        warning = f"WARNING: {path} is damaged ({problem}), looking for the one before it"
        print(warning, file=sys.stderr, flush=True)
    names = ", ".join(path.name for path in paths)
    raise ValueError(f"{folder}: no checkpoint is whole ({names}): restore one, or train again")


def read(path):
    """(state, None), or (None, what is wrong with the file). Raises ValueError for another
    program's.
    """
    if problem := damage(path):
        return None, problem
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # what torch raises for a file that is no checkpoint differs by version
        return None, first_line(error)
    if not isinstance(state, dict) or "version" not in state:
        raise ValueError(
            f"{path} is a torch file but no checkpoint of this program: name another folder"
        )
    if state["version"] > VERSION:
        raise ValueError(
            f"{path} has version {state['version']}, this program reads up to {VERSION}: "
            "update the program"
        )
    return state, None


def upgraded(state):
    """The state as this version writes it. Version 1 had other names, and settings with derived
    values.
    """
    if state["version"] == VERSION:
        return state
    moved = {
        "smear": "embed_tokens.smear",
        "stream_share": "block_input.stream_share",
        "embed_share": "block_input.embed_share",
    }

    def renamed(weights):
        return weights and {moved.get(name, name): tensor for name, tensor in weights.items()}

    settings = dict(state["settings"])
    if "train" in settings:
        settings["trainable"] = settings.pop("train")
    for name, source in (
        ("checkpoint_interval", "eval_interval"),
        ("attn_dropout", "dropout"),
        ("lr_decay_iters", "max_iters" if "task" in settings else None),
    ):
        if settings[name] == settings.get(source):
            settings[name] = None  # derived anew
    for group in (group for optimizer in state["optimizer"] for group in optimizer["param_groups"]):
        group.pop("largest_lr", None)
    task = {
        name: state[name]
        for name in ("labels", "reference", "sampled", "differing")
        if name in state
    }
    if "start" in state:
        task["reference_model"] = renamed(state["start"])
    if task.get("sampled") and "before" in task["sampled"]:
        task["sampled"]["old_logprobs"] = task["sampled"].pop("before")
    never = {"best_step": None, "evaluated_step": None}
    new = {"version": VERSION, "model": renamed(state["model"]), "settings": settings, "task": task}
    return {**never, **state, **new}


def damage(path):
    """What is wrong with the archive, in words, or None if every record matches its stored CRC."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        return bad and f"CRC of {bad} differs"
    except Exception as error:  # a torn zip directory raises many kinds
        return first_line(error)


def first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def tensor_bytes(state):
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        state = state.values()
    elif not isinstance(state, list | tuple):
        return 0
    return sum(map(tensor_bytes, state))


def newest_run(root="."):
    """The folder with the newest checkpoint: out/ itself, its subfolders, and nanoGPT's out-*/."""
    folders = [
        folder for pattern in ("out", "out/*", "out-*") for folder in Path(root).glob(pattern)
    ]
    runs = [folder for folder in folders if saved_steps(folder)]
    if not runs:
        raise FileNotFoundError(
            "there is no run under out/ yet: python train.py makes one, "
            "or name its folder with --out_dir=FOLDER"
        )
    return max(runs, key=lambda run: checkpoint_path(run, saved_steps(run)[-1]).stat().st_mtime)


def remove_run(folder):
    """Remove what an earlier run left in the folder."""
    checkpoints = [checkpoint_path(folder, step) for step in saved_steps(folder)]
    for path in [*checkpoints, *(Path(folder) / name for name in LEFT_BEHIND)]:
        path.unlink(missing_ok=True)
