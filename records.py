"""The rows of supervised data for finetune.py: read, checked, and split in three. A row is (where it stands, its fields)."""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import bpe
import prepare
import sources
from progress import say

KINDS = {"classify": "classification", "instruct": "instructions", "reinforce": "instructions", "prefer": "preferences"}


@dataclass
class Records:
    """Rows of supervised data in three splits, `train`, `val` and `test`, and the sha256 of their fields."""

    splits: dict
    sha256: str
    tokenizer: bpe.Tokenizer | None = None  # the model's, once that is loaded


def read_records(s):
    """The Records of a dataset or file, split as the settings ask for. Raises ValueError naming the bad line."""
    path, anew = Path(s.dataset), (s.val_share, s.test_share) != (None, None)
    if path.suffix in (".csv", ".tsv", ".jsonl", ".json"):
        if not path.is_file():
            raise ValueError(f"dataset={s.dataset} does not exist: name a file, or a dataset under data/")
        splits, anew = {"train": list(sources.read_table(path)), "val": [], "test": []}, True
    else:
        splits = read_prepared(s)
    for where, row in (row for rows in splits.values() for row in rows):
        check_row(where, row, s.task)
    shuffle = random.Random(s.seed)
    if anew:
        shares = (0.1 if share is None else share for share in (s.val_share, s.test_share))
        splits = split_anew([row for rows in splits.values() for row in rows], *shares, s, shuffle)
    elif s.balance == "undersample":
        splits = {split: undersample(rows, shuffle) for split, rows in splits.items()}
    for split in ("train", "val"):
        if not splits[split]:
            raise ValueError(f"dataset={s.dataset} leaves no row for {split}: add rows, or change val_share and test_share")
    fields = {split: [row for _, row in rows] for split, rows in splits.items()}
    return Records(splits, hashlib.sha256(json.dumps(fields).encode()).hexdigest())


def read_prepared(s):
    """The splits of a dataset under data/, which is prepared first if it is not there."""
    folder = prepare.folder_of(s.dataset)
    if not (folder / "meta.json").is_file():
        say(f"dataset {s.dataset} is not there yet: preparing it")
        prepare.prepare(prepare.Settings(name=s.dataset))
    kind = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["kind"]
    if kind != KINDS[s.task]:
        raise ValueError(f"dataset={s.dataset} is of kind={kind} but task={s.task} needs {KINDS[s.task]}: choose another")
    return {split: list(sources.read_table(folder / f"{split}.jsonl")) for split in ("train", "val", "test")}


def check_row(where, row, task):
    """ValueError, naming the place, for a row that lacks what the task needs."""
    if not isinstance(row.get("kind", ""), str):
        raise ValueError(f"{where}: kind={row['kind']!r} must be a text: correct it, or leave it out")
    if task == "classify":
        sources.check_keys(where, row, ("text", "label"))
    elif task == "prefer":
        sources.check_keys(where, row, ("instruction", "chosen", "rejected"))
    elif "messages" not in row:
        sources.check_keys(where, row, ("instruction", "output"))
    else:
        messages = row["messages"]
        if not messages or messages[-1].get("role") != "assistant" or not str(messages[-1].get("content", "")).strip():
            raise ValueError(f"{where}: messages must end with what the assistant says: add it, or remove the row")
        if len(messages) < 2 or not all(isinstance(message.get("content"), str) for message in messages):
            raise ValueError(f"{where}: messages must be texts, of the user and then the assistant: correct it")


def split_anew(rows, val_share, test_share, s, shuffle):
    """All rows in three splits by the seed; the same text stands once, since it could stand in two splits otherwise."""
    distinct = {}
    for where, row in rows:
        asked = row.get("text") or json.dumps(row.get("messages", [row.get("instruction"), row.get("input")]))
        distinct.setdefault(" ".join(asked.lower().split()), (where, row))
    rows = list(distinct.values())
    rows = undersample(rows, shuffle) if s.balance == "undersample" else rows
    shuffle.shuffle(rows)
    n_val, n_test = round(val_share * len(rows)), round(test_share * len(rows))
    return {"train": rows[n_val + n_test :], "val": rows[:n_val], "test": rows[n_val : n_val + n_test]}


def undersample(rows, shuffle):
    """As many rows of each label as the rarest has."""
    by_label = {}
    for row in rows:
        by_label.setdefault(row[1]["label"], []).append(row)
    least = min(map(len, by_label.values()), default=0)
    return [row for label in sorted(by_label) for row in shuffle.sample(by_label[label], least)]
