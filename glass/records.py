"""Rows of supervised data for finetune.py: read, checked, split in three, and dealt out in steps.

A row is a pair (where, fields): its place in the file, for errors, and a dict.
"""

import functools
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import prepare
from glass import sources
from glass.chat import MARKERS
from glass.files import reading
from glass.progress import say
from glass.shards import META, folder_of

SPLITS = ("train", "val", "test")
READ = set("text label instruction input output messages chosen rejected kind".split())  # keys
DATASET_KIND = {  # the kind of dataset that a task needs
    "classify": "classification",
    "instruct": "instructions",
    "reinforce": "instructions",
    "prefer": "preferences",
}


@dataclass
class Records:
    """Rows of supervised data in three splits."""

    splits: dict  # "train", "val" and "test": a list of rows each
    sha256: str  # of the fields of all rows


def read_records(settings):
    """The Records of a dataset or file, split as the settings ask.

    Raises ValueError, with the place, for a row that does not fit the task.
    """
    s, path = settings, Path(settings.dataset)
    splits_anew = s.val_share is not None or s.test_share is not None
    if path.suffix.lower() in sources.TABLES:
        if not path.is_file():
            raise ValueError(
                f"dataset={path} does not exist: name a file, or a dataset under data/"
            )
        splits = {"train": list(sources.read_table(path)), "val": [], "test": []}
        splits_anew = True
    else:
        splits = read_prepared(s)
    all_rows = [row for split in SPLITS for row in splits[split]]
    if unread := sorted({key for _, fields in all_rows for key in fields} - READ):
        say(f"of {s.dataset}'s rows, {', '.join(unread)[:200]} is not read")
    for where, fields in all_rows:
        check_row(where, fields, s.task)
    shuffle = random.Random(s.seed)
    if splits_anew:
        splits = split_anew(all_rows, s, shuffle)
    elif s.balance == "undersample":
        splits = {split: undersample(rows, shuffle) for split, rows in splits.items()}
    for split in ("train", "val"):
        if not splits[split]:
            raise ValueError(
                f"dataset={s.dataset} leaves no row for {split}: "
                "add rows, or change val_share and test_share"
            )
    fields = {split: [fields for _, fields in rows] for split, rows in splits.items()}
    digest = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    return Records(splits, digest)


def read_prepared(settings):
    """The splits of a dataset under data/, a dict of lists of rows.

    The dataset is prepared first if it is not there. Raises ValueError if the task needs another
    kind.
    """
    name, task = settings.dataset, settings.task
    folder = folder_of(name)
    if not (folder / META).is_file():
        if name not in sources.SOURCES:
            known = [other for other, source in sources.SOURCES.items() if source.records]
            raise ValueError(
                f"dataset={name} is neither prepared nor a file that ends in "
                f"{' '.join(sources.TABLES)}: name such a file, or one of {' '.join(known)}"
            )
        say(f"dataset {name} is not there yet: preparing it")
        prepare.prepare(prepare.Settings(name=name))
    with reading(folder / META, f"run python prepare.py {name} again with --overwrite=True"):
        kind = json.loads((folder / META).read_text(encoding="utf-8"))["kind"]
    if kind != DATASET_KIND[task]:
        raise ValueError(
            f"dataset={name} is of kind={kind} but task={task} needs kind={DATASET_KIND[task]}: "
            "choose another dataset"
        )
    return {split: list(sources.read_table(folder / f"{split}.jsonl")) for split in SPLITS}


def check_row(where, fields, task):
    """Raise ValueError, with the place, for a row that lacks what the task needs."""
    if not isinstance(fields.get("kind", ""), str):
        raise ValueError(
            f"{where}: kind={fields['kind']!r} must be a text: correct it, or leave it out"
        )
    if task == "classify":
        sources.check_keys(where, fields, ("text", "label"))
    elif task == "prefer":
        sources.check_keys(where, fields, ("instruction", "chosen", "rejected"))
        check_input(where, fields)
        if fields["chosen"] == fields["rejected"]:
            raise ValueError(
                f"{where}: chosen and rejected are the same text, so nothing is preferred: "
                "correct it, or remove the row"
            )
    elif "messages" in fields:
        check_messages(where, fields["messages"])
    else:
        sources.check_keys(where, fields, ("instruction", "output"))
        check_input(where, fields)


def check_input(where, fields):
    """Raise ValueError, with the place, for an input that is no text."""
    if not isinstance(fields.get("input") or "", str):
        raise ValueError(
            f"{where}: input={fields['input']!r:.40} must be a text: correct it, or leave it out"
        )


def check_messages(where, messages):
    """Raise ValueError, with the place, for a conversation that does not end with an answer."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(
            f"{where}: messages={messages!r:.40} must be a list of objects with role and content: "
            "correct it"
        )
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or not str(last.get("content", "")).strip():
        raise ValueError(
            f"{where}: messages must end with what the assistant says: "
            "add an answer, or remove the row"
        )
    for message in messages:
        role = message.get("role")
        if not isinstance(role, str) or role not in MARKERS:
            raise ValueError(
                f"{where}: role={role!r:.40} of a message must be system, user or "
                "assistant: correct it"
            )
    are_texts = all(isinstance(message.get("content"), str) for message in messages)
    if not any(message.get("role") == "user" for message in messages) or not are_texts:
        raise ValueError(
            f"{where}: messages must be texts of the user and then of the assistant: "
            "correct them, or remove the row"
        )


def split_anew(rows, settings, shuffle):
    """All rows in three new splits, drawn by the seed: a dict of lists of rows.

    Rows that ask the same go to one split.
    """
    s = settings
    rows = without_repeats(rows)
    if s.balance == "undersample":
        rows = undersample(rows, shuffle)
    groups = {}
    for row in rows:
        groups.setdefault(asked_in(row[1]), []).append(row)
    groups = list(groups.values())
    shuffle.shuffle(groups)
    val_share = 0.1 if s.val_share is None else s.val_share
    test_share = 0.1 if s.test_share is None else s.test_share
    n_val, n_test = round(val_share * len(groups)), round(test_share * len(groups))
    n_held_out = n_val + n_test
    parts = (groups[n_held_out:], groups[:n_val], groups[n_val:n_held_out])
    return {
        split: [row for group in part for row in group]
        for split, part in zip(SPLITS, parts, strict=True)
    }


def asked_in(fields):
    """What a row asks, as a text in small letters."""
    asked = fields.get("text")
    if not asked:
        pair = [fields.get("instruction"), fields.get("input")]
        messages = fields.get("messages")
        asked = json.dumps(messages[:-1] if messages else pair)
    return " ".join(asked.lower().split())


def without_repeats(rows):
    """The rows without those that ask and answer what an earlier one does, as a list; says so.

    Of a text with two labels, the first counts.
    """
    label_of, contradicted, distinct = {}, [], {}
    for where, fields in rows:
        asked = asked_in(fields)
        if "label" in fields and "text" in fields:
            label, first = label_of.setdefault(asked, (fields["label"], where))
            if label != fields["label"]:
                contradicted.append(
                    f"{where} has label={fields['label']!r:.40}, {first} label={label!r:.40}"
                )
        answers = [fields.get(key) for key in ("output", "chosen", "rejected", "messages")]
        distinct.setdefault((asked, json.dumps(answers)), (where, fields))
    if contradicted:
        say(
            f"{len(contradicted):,} texts have another label than before, which is left out: "
            f"{contradicted[0]}"
        )
    if n_repeated := len(rows) - len(distinct):
        say(f"{n_repeated:,} of {len(rows):,} rows repeat an earlier one and are left out")
    return list(distinct.values())


def undersample(rows, shuffle):
    """A list of as many rows of each label as the rarest label has."""
    by_label = {}
    for row in rows:
        by_label.setdefault(row[1]["label"], []).append(row)
    least = min(map(len, by_label.values()), default=0)
    kept = []
    for label in sorted(by_label):
        kept += shuffle.sample(by_label[label], least)
    return kept


def spread(examples, n):
    """At most n of the examples, evenly spaced, as a list."""
    if n >= len(examples):
        return examples
    return [examples[i * len(examples) // n] for i in range(n)]


class StepOrder:
    """Which examples each step takes. It depends on the seed and the step alone.

    An epoch is a permutation of the examples, cut into steps of `size`. Examples that do not fill a
    step are left for later epochs. A step holds examples of all lengths, sorted, so its micro-steps
    hold little padding. (Steps of one length each would hold few kinds of examples; they taught
    half as fast.)
    """

    def __init__(self, lengths, size, seed):
        self.lengths, self.size, self.seed = np.array(lengths), size, seed
        if len(lengths) < size:
            raise ValueError(
                f"batch_size x gradient_accumulation_steps={size} but there are only "
                f"{len(lengths)} training rows: lower batch_size"
            )
        self.steps_per_epoch = len(lengths) // size

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one object per run)
    def of_epoch(self, epoch):
        """The indices of the examples of each step of an epoch: (steps, size)."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
        steps = order[: self.steps_per_epoch * self.size].reshape(-1, self.size)
        by_length = self.lengths[steps].argsort(axis=1, kind="stable")
        return np.take_along_axis(steps, by_length, axis=1)

    def of_step(self, step):
        """The indices of the examples of one step: (size,)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.of_epoch(epoch)[place]
