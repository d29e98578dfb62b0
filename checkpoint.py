"""One promise: what was saved is loaded whole, or the one before it is.

A checkpoint `ckpt_0002000.pt` is written to a temporary file, flushed to the disk, read back, renamed, and the folder's
entry flushed too; only then is an old one removed. Whatever interrupts this leaves the checkpoints that were there.
`best.pt` is a second name of the best one's file. Loading checks every byte (a torch file is a zip archive, which holds
a CRC of each tensor, but torch.load does not look at it) and accepts plain types only, never code.

State: version step model optimizer scaler best_val_loss settings model_config tokenizer data.
"""

import errno
import fcntl
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import torch

VERSION = 1


def checkpoint_path(folder, step):
    return Path(folder) / f"ckpt_{step:07d}.pt"


def saved_steps(folder):
    """The steps that have a checkpoint in the folder, ascending; whether each is whole shows when it is loaded."""
    found = (re.fullmatch(r"ckpt_(\d+)\.pt", path.name) for path in Path(folder).glob("ckpt_*.pt"))
    return sorted(int(match[1]) for match in found if match)


def save(folder, step, state, keep=2):
    """Write ckpt_STEP.pt, then remove all but the last `keep`. Raises OSError, the old ones untouched, if it cannot.

    state holds tensors and plain Python types only. Returns the path.
    """
    folder = Path(folder)
    path = checkpoint_path(folder, step)
    temporary = path.with_suffix(".tmp")
    try:
        needed, free = tensor_bytes(state) + (1 << 20), shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{free >> 20} MiB are free where the checkpoint needs {needed >> 20} MiB", str(folder))
        with open(temporary, "wb") as file:
            torch.save({"version": VERSION, "step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        if damaged := damage(temporary):
            raise OSError(errno.EIO, f"what was written does not read back ({damaged})", str(temporary))
        os.replace(temporary, path)
        sync_folder(folder)
    except RuntimeError as error:  # torch wraps the OSError of a failed write
        raise OSError(errno.EIO, f"the checkpoint could not be written ({first_line(error)})", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    for old in saved_steps(folder)[:-keep]:
        checkpoint_path(folder, old).unlink()
    return path


def mark_best(folder, step):
    """Make best.pt a second name of ckpt_STEP.pt: a hard link, or a copy where the file system has none."""
    folder = Path(folder)
    temporary = folder / "best.tmp"
    temporary.unlink(missing_ok=True)
    try:
        os.link(checkpoint_path(folder, step), temporary)
    except OSError:
        shutil.copyfile(checkpoint_path(folder, step), temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, folder / "best.pt")
    sync_folder(folder)


def load(folder, which="last"):
    """The state of the 'last' good checkpoint, of the 'best', or of one step, with its tensors on the CPU.

    For 'last' a damaged file is named on stderr and the one before it is taken. Raises FileNotFoundError if there is
    none, ValueError if none is whole or if a newer version of this program wrote it.
    """
    folder = Path(folder)
    if which == "last":
        paths = [checkpoint_path(folder, step) for step in reversed(saved_steps(folder))]
    else:
        paths = [folder / "best.pt" if which == "best" else checkpoint_path(folder, which)]
    if not paths or not paths[0].exists():
        have = ", ".join(map(str, saved_steps(folder))) or "none"
        found = f"{folder} holds no checkpoint ({which}; steps there: {have})"
        raise FileNotFoundError(f"{found}: train one first, or name its folder")
    for path in paths:
        problem = damage(path)
        if problem is None:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # what torch raises for a file that is no checkpoint differs by version
                problem = first_line(error)
        if problem is None:
            if not isinstance(state, dict) or "version" not in state:
                raise ValueError(f"{path} is a torch file but no checkpoint of this program: name another folder")
            if state["version"] > VERSION:
                found = f"{path} has version {state['version']}"
                raise ValueError(f"{found}, this program reads up to {VERSION}: update the program")
            return state
        print(f"WARNING: {path} is damaged ({problem}), looking for the one before it", file=sys.stderr, flush=True)
    names = ", ".join(path.name for path in paths)
    raise ValueError(f"{folder}: no checkpoint is whole ({names}): restore one, or train again")


def damage(path):
    """What is wrong with the archive, in words, or None if every record has the CRC that was stored with it."""
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
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(tensor_bytes(child) for child in children)


def sync_folder(folder):
    """Flush the folder's own entries, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest_run(root="."):
    """The folder with the newest checkpoint: out/ itself, its subfolders, and out-*/ as nanoGPT names them."""
    folders = [folder for pattern in ("out", "out/*", "out-*") for folder in Path(root).glob(pattern) if saved_steps(folder)]
    if not folders:
        advice = "python train.py makes one, or name its folder with --out_dir=FOLDER"
        raise FileNotFoundError(f"there is no run under out/ yet: {advice}")
    return max(folders, key=lambda folder: checkpoint_path(folder, saved_steps(folder)[-1]).stat().st_mtime)


def remove_run(folder):
    """Remove the checkpoints and metrics of an earlier run."""
    names = ["best.pt", "metrics.jsonl", *(checkpoint_path(folder, step).name for step in saved_steps(folder))]
    for name in names:
        (Path(folder) / name).unlink(missing_ok=True)


def lock(folder):
    """An open file that holds the folder until it is closed or its process ends. Raises ValueError if another run has it."""
    file = open(Path(folder) / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(f"out_dir={folder} is in use by a run that is still going: name another, or stop that run") from error
    return file
