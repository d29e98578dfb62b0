"""Checkpoints. What was saved is loaded whole, or else the one before it is.

A checkpoint `ckpt_0002000.pt` is written to a temporary file, flushed to the disk, read back and
renamed; then the folder's entry is flushed. Only after that is an old checkpoint removed. So an
interruption at any point leaves the checkpoints that were there. `best.pt` is a second name for the
file of the best one. Loading checks every byte: a torch file is a zip archive with a CRC of each
tensor, which torch.load ignores. It accepts plain types only, never code.

State: version step model optimizer scaler best_val_loss best_step evaluated_step
evaluations_without_better settings model_config tokenizer data task run_id.
"""

import errno
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import torch

from glass import sharded
from glass.files import first_line, sync_folder

VERSION = 2
BEST = "best.pt"
# what an earlier run may have left in its folder, besides checkpoints
LEFT_BEHIND = """
    best.pt metrics.jsonl samples.jsonl about.json eval.json loss.png test.json confusion.png
    adapter.safetensors
""".split()


class NoneIsWhole(ValueError):
    """Raised if there are checkpoints but all of them are damaged."""


def checkpoint_path(folder, step):
    """The path of the checkpoint of a step."""
    return Path(folder) / f"ckpt_{step:07d}.pt"


def saved_steps(folder):
    """The ascending list of steps that have a checkpoint in the folder.

    A checkpoint in it may be damaged; only loading shows that. Files that only have a similar name,
    say ckpt_5.pt, are not ours.
    """
    paths = [path for path in Path(folder).glob("ckpt_*.pt") if path.stem[5:].isdecimal()]
    steps = [int(path.stem[5:]) for path in paths if path.is_file()]
    return sorted(step for step in steps if checkpoint_path(folder, step) in paths)


def checkpoint_files(folder):
    """The paths of all checkpoints in the folder: the latest first, best.pt last."""
    paths = [checkpoint_path(folder, step) for step in reversed(saved_steps(folder))]
    best = Path(folder) / BEST
    return [*paths, best] if best.exists() else paths


def kept_path(folder, step):
    """The path of the weights that are kept of a step, beside the checkpoints."""
    return Path(folder) / f"kept_{step:07d}.pt"


def kept_steps(folder):
    """The ascending list of steps of which weights, or a whole checkpoint, are in the folder."""
    paths = [path for path in Path(folder).glob("kept_*.pt") if path.stem[5:].isdecimal()]
    kept = [int(path.stem[5:]) for path in paths if path.is_file()]
    return sorted(
        {step for step in kept if kept_path(folder, step) in paths} | {*saved_steps(folder)}
    )


def save(folder, step, state, keep=2):
    """Write ckpt_STEP.pt, remove all checkpoints but the last `keep`, and give back its path.

    state: a dict of tensors and plain Python types. Raises OSError if it cannot write; the old
    checkpoints then stay.
    """
    path = checkpoint_path(folder, step)
    write(path, {"version": VERSION, "step": step, **state})
    for old in saved_steps(folder)[:-keep]:
        checkpoint_path(folder, old).unlink(missing_ok=True)
    remove_unused_shards(folder)
    return path


def remove_unused_shards(folder):
    """Remove the shards that no checkpoint of the folder needs, set aside or not."""
    if any(Path(folder).glob("shards_*")):
        names = [re.match(r"ckpt_(\d+)\.pt", path.name) for path in Path(folder).glob("ckpt_*")]
        used = {sharded.shards_folder(folder, int(name[1])).name for name in names if name}
        best = Path(folder) / BEST
        if best.exists() and damage(best) is None:
            state = torch.load(best, map_location="cpu", weights_only=True, mmap=True)
            used.add(state.get("shards", {}).get("folder"))
        sharded.remove_unused(folder, used)


def keep_weights(folder, step, state):
    """Write kept_STEP.pt, which no later save removes: a state without optimizer, to look into."""
    write(kept_path(folder, step), {"version": VERSION, "step": step, **state})


def write(path, content):
    """Write a file of tensors and plain types, read it back, and only then give it its name.

    Raises OSError if it cannot write; a file of that name then stays as it was.
    """
    temporary = path.with_suffix(".tmp")
    try:
        needed, free = tensor_bytes(content) + (1 << 20), shutil.disk_usage(path.parent).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"{free >> 20} MiB are free but the checkpoint needs {needed >> 20} MiB",
                str(path.parent),
            )
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if damaged := damage(temporary):
            raise OSError(
                errno.EIO, f"the file does not read back as written ({damaged})", str(temporary)
            )
        os.replace(temporary, path)
        sync_folder(path.parent)
    except RuntimeError as error:  # torch wraps the OSError of a failed write
        raise OSError(
            errno.EIO, f"the checkpoint could not be written ({first_line(error)})", str(path)
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def mark_best(folder, step):
    """Make best.pt a second name for ckpt_STEP.pt, by a hard link, or by a copy without links."""
    folder, source = Path(folder), checkpoint_path(folder, step)
    temporary = folder / "best.tmp"
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(temporary, folder / BEST)
    temporary.unlink(missing_ok=True)  # a rename between two names of one file leaves both
    sync_folder(folder)


def load(folder, which="last", whole=True):
    """The state of a checkpoint, a dict, with tensors on the CPU, and the `path` it was read from.

    Without `whole`, tensors stay in their files until they are used: those of one file are mapped,
    and for those of shards see sharded.filled.

    which: 'last', 'best' or a step. A damaged or renamed file is named on stderr, and the one before
    it is taken instead, at last best.pt; instead of best.pt, the last. Raises FileNotFoundError if
    there is none, and ValueError if none is whole or a newer program wrote it.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"out_dir={folder} is a file: name its folder, {folder.parent}")
    paths = checkpoint_files(folder)
    if which == "best":
        paths = paths[-1:] + paths[:-1] if folder / BEST in paths else paths
    elif which != "last":
        paths = [path for path in paths if path == checkpoint_path(folder, which)]
        paths += [path for path in [kept_path(folder, which)] if path.exists()]
    if not paths:
        have = ", ".join(map(str, saved_steps(folder))) or "none"
        raise FileNotFoundError(
            f"out_dir={folder} holds no checkpoint ({which}; steps there: {have}): "
            "train one first, or name its folder"
        )
    for path in paths:
        state, problem = read(path, mapped=not whole)
        if problem is None:
            names = [make(folder, state["step"]).name for make in (checkpoint_path, kept_path)]
            if path.name in (BEST, *names):
                state = upgraded(state) | {"path": str(path)}
                return sharded.filled(state) if whole else state
            problem = f"it holds step {state['step']}: somebody renamed it"
        warning = f"WARNING: {path} is damaged ({problem}), looking for another one"
        print(warning, file=sys.stderr, flush=True)
    names = ", ".join(path.name for path in paths)
    raise NoneIsWhole(f"{folder}: no checkpoint is whole ({names}): restore one, or train again")


def read(path, mapped=False):
    """(state, None), or (None, what is wrong with the file). mapped: tensors stay in the file.

    Raises ValueError for a file of another program or of a newer version of this one.
    """
    if problem := damage(path):
        return None, problem
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # for a bad file, each torch version raises other errors
        return None, first_line(error)
    if isinstance(state, dict) and "shards" in state:
        if problem := sharded.damage(Path(path).parent, state["shards"]):
            return None, problem
    if not isinstance(state, dict) or "version" not in state:
        raise ValueError(
            f"{path} is a torch file but not a checkpoint of this program: name another folder"
        )
    if state["version"] > VERSION:
        raise ValueError(
            f"{path} has version {state['version']}, but this program reads up to {VERSION}: "
            "update the program"
        )
    return state, None


def upgraded(state):
    """The state as this version writes it.

    Version 1 had other names, and it kept derived values of settings.
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
    for optimizer in state["optimizer"]:
        for group in optimizer["param_groups"]:
            group.pop("largest_lr", None)
    names = ("labels", "reference", "sampled", "differing")
    task = {name: state[name] for name in names if name in state}
    if "start" in state:
        task["reference_model"] = renamed(state["start"])
    if task.get("sampled") and "before" in task["sampled"]:
        task["sampled"]["old_logprobs"] = task["sampled"].pop("before")
    absent = {"best_step": None, "evaluated_step": None}
    new = {"version": VERSION, "model": renamed(state["model"]), "settings": settings, "task": task}
    return {**absent, **state, **new}


def damage(path):
    """What is wrong with a checkpoint file, in words, or None if every record matches its CRC."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        return bad and f"CRC of {bad} differs"
    except Exception as error:  # a torn zip directory raises errors of many kinds
        return first_line(error)


def tensor_bytes(state):
    """The number of bytes of all tensors in nested dicts and lists."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        state = state.values()
    elif not isinstance(state, list | tuple):
        return 0
    return sum(map(tensor_bytes, state))


def newest_run(root="."):
    """The folder with the newest checkpoint: out/, a subfolder of it, or nanoGPT's out-*/.

    Raises FileNotFoundError if there is no run.
    """
    patterns = ("out", "out/*", "out-*")
    folders = [folder for pattern in patterns for folder in Path(root).glob(pattern)]
    runs = [folder for folder in folders if checkpoint_files(folder)]
    if not runs:
        raise FileNotFoundError(
            "there is no run under out/ yet: python train.py makes one, "
            "or name its folder with --out_dir=FOLDER"
        )
    return max(runs, key=lambda run: checkpoint_files(run)[0].stat().st_mtime)


def remove_half_written(folder):
    """Remove the temporary files that a killed run left in the folder."""
    for path in Path(folder).glob("*.tmp"):
        if re.fullmatch(r"(ckpt|kept)_\d+\.tmp|best\.tmp", path.name):
            path.unlink()
    remove_unused_shards(folder)


def set_aside(folder, loaded):
    """Rename the checkpoints that could not be loaded, so that they do not pass for the latest.

    They come before `loaded`, the path of the one that could. If it is None, none could, and the
    rest of what that run left is renamed too.
    """
    paths = checkpoint_files(folder)
    if loaded:
        paths = paths[: paths.index(Path(loaded))]
    elif paths:
        kept = [kept_path(folder, step) for step in kept_steps(folder)]
        paths = {*paths, *kept, *(Path(folder) / name for name in LEFT_BEHIND)}
    for path in paths:
        aside, number = path.with_name(f"{path.name}.damaged"), 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"{path.name}.damaged-{number}")
        if path.exists():
            path.rename(aside)


def remove_run(folder):
    """Remove what an earlier run left in the folder."""
    checkpoints = [checkpoint_path(folder, step) for step in saved_steps(folder)]
    checkpoints += [kept_path(folder, step) for step in kept_steps(folder)]
    others = [Path(folder) / name for name in LEFT_BEHIND]
    for path in checkpoints + others:
        path.unlink(missing_ok=True)
    remove_unused_shards(folder)
