"""A dataset made in parts, on several hosts say: prepare.py --part=3/16, then --join.

A part is a dataset of its own, in data/NAME/part_03_of_16/, made of its share of the files. Joining
moves the shards of all parts up into data/NAME/ and writes its meta.json, last. So a part that is
stopped goes on like any dataset, and joining may be interrupted and repeated.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from glass.files import reading, write_json
from glass.shards import META, folder_of

ALIKE = ("format", "kind", "dtype", "vocab_size", "tokenizer", "listing")  # in all parts' meta.json


def parse_part(text):
    """(3, 16) for "3/16". Raises ValueError unless it is one of so many, counted from 1."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    part, n = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= n:
        raise ValueError(f"part={text} must be like 3/16: the third of sixteen, counted from 1")
    return part, n


def part_folder(name, part, n):
    """The folder of a part of a dataset."""
    return folder_of(name) / f"part_{part:0{len(str(n))}d}_of_{n}"


def files_of(files, part, n):
    """The files of a part, a list: as many in each part as in another, give or take one."""
    if len(files) < n:
        raise ValueError(
            f"part={part}/{n} shares files out and there are {len(files)}: "
            "split them, or make fewer parts"
        )
    return files[len(files) * (part - 1) // n : len(files) * part // n]


def listing(files):
    """A digest of the names and sizes of all files, which every part must agree on."""
    names = [[Path(path).name, Path(path).stat().st_size] for path in files]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def join(name):
    """Make one dataset of the parts in its folder, and give back its meta.json's content.

    Raises ValueError where a part is missing or was made otherwise.
    """
    folder = folder_of(name)
    found = sorted(folder.glob("part_*_of_*"))
    counts = {path.name.rpartition("_")[2] for path in found}
    if len(counts) != 1 or not next(iter(counts)).isdecimal():
        raise ValueError(
            f"{folder} holds parts of {' and '.join(sorted(counts)) or 'no'} parts: make all parts "
            "of one number with --part=1/N ... --part=N/N"
        )
    n = int(counts.pop())
    folders = [part_folder(name, part, n) for part in range(1, n + 1)]
    missing = [str(part) for part, path in enumerate(folders, 1) if not (path / META).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {n} parts ({' '.join(missing[:20])}): make them "
            f"with --part={missing[0]}/{n} ..., then join"
        )
    metas = [read_meta(path / META) for path in folders]
    for path, meta in zip(folders, metas, strict=True):
        for key in ALIKE:
            if meta[key] != metas[0][key]:
                raise ValueError(
                    f"{path} and {folders[0]} differ in {key}: make both from the same files "
                    "with the same settings"
                )
    splits = {split: joined(folder, folders, metas, split) for split in ("train", "val")}
    digests = [shard["sha256"] for about in splits.values() for shard in about["shards"]]
    files = [stats for meta in metas for stats in meta["source"]["files"]]
    meta = {
        **metas[0],
        "name": name,
        "source": {**metas[0]["source"], "name": name, "files": files, "parts": n},
        "splits": splits,
        "sha256": hashlib.sha256("".join(digests).encode()).hexdigest(),
    }
    write_json(folder / META, meta)
    for path in folders:
        shutil.rmtree(path)
    return meta


def read_meta(path):
    """The content of a part's meta.json."""
    with reading(path, "make this part again with --overwrite=True"):
        meta = json.loads(path.read_text(encoding="utf-8"))
        for key in (*ALIKE, "source", "splits"):
            meta[key]
    return meta


def joined(folder, folders, metas, split):
    """Move the shards of a split up into the folder; what meta.json says of the split, a dict."""
    about, shards = dict(tokens=0, documents=0, characters=0, bytes=0), []
    for number, (path, meta) in enumerate(zip(folders, metas, strict=True), 1):
        of_part = meta["splits"][split]
        for shard in of_part["shards"]:
            name = shard["file"].replace(split, f"{split}_{number:0{len(str(len(folders)))}d}")
            old, new = path / shard["file"], folder / name
            if old.exists():  # else an interrupted join has moved it
                os.replace(old, new)
            elif not new.exists():
                raise ValueError(f"{old} is gone: make this part again with --overwrite=True")
            shards.append({**shard, "file": name})
        for key in about:
            about[key] += of_part[key]
    return {**about, "shards": shards}
