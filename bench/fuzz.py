"""Whether our own scripts end well on wrong settings and damaged files.

    python bench.py fuzz --cases=500 --seed=1

Makes a small world of input files once: texts, tables, a dataset, runs, a published model. Each
case copies it and runs one command there: one with generated settings, or one that reads a file
that was damaged. It may succeed, or be refused in one line that names what is wrong. Anything else
is a defect, and its folder is kept in data/bench/fuzz/ beside the command. Needs Linux: processes
are forked, and their memory is limited.
"""

import contextlib
import copy
import functools
import gzip
import importlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import sys
import tempfile
import time
import typing
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path

import evaluate
import finetune
import prepare
import sample
import train
from bench.common import SCRATCH
from glass.files import sha256_of
from glass.settings import HOME, choices_of, configure, errors_in_one_line
from glass.shards import folder_of

SCRIPTS = {"train": train, "finetune": finetune, "sample": sample, "prepare": prepare}
SCRIPTS["evaluate"] = evaluate
ALL_SETTINGS = {field.name for script in SCRIPTS.values() for field in fields(script.Settings)}
TINY = """
    --batch_size=4 --max_iters=4 --eval_interval=2 --log_interval=1 --warmup_iters=1
    --device=cpu --dtype=float32
""".split()
SHAPE = """
    --block_size=64 --n_layer=1 --n_head=2 --n_embd=16 --gradient_accumulation_steps=1
    --eval_iters=2 --lr_decay_iters=4 --sample_tokens=8
""".split()
TUNED = """
    --init_from=out/base --block_size=64 --test_items=4 --learning_rate=1e-3
""".split()
ANSWERED = "--template=markers --answer_tokens=4 --eval_answers=4".split()
AS_GPT2 = "--pos=learned --qk_norm=False --smear=False --embed_skip=False".split()
SMALL = ["--dataset=small", *SHAPE, *TINY]
DRAWN = "--max_new_tokens=8 --device=cpu".split()
MEASURED = "--out_dir=out/base --device=cpu --items=rows/items.jsonl".split()
TASKS = {"classify": "classes", "instruct": "orders", "prefer": "pairs", "reinforce": "orders"}


@dataclass
class Settings:
    cases: int = 500  # commands to run
    seed: int = 1  # of the cases
    seconds: float = 60.0  # time that a case may take

    def __post_init__(self):
        if self.cases < 1 or self.seconds <= 0:
            raise ValueError(
                f"cases={self.cases} and seconds={self.seconds} must be positive: raise them"
            )


@dataclass
class Case:
    """A command, and the file that is damaged before it runs."""

    script: str
    words: list  # the command line after the script
    changed: dict = field(default_factory=dict)  # the generated settings: name to text
    file: str | None = None  # the damaged file
    damage: str = ""  # what happened to it
    content: bytes = b""  # what it holds then

    def command(self):
        return shlex.join(["python", str(HOME / f"{self.script}.py"), *self.words])


@dataclass
class Result:
    """How a case ended."""

    case: Case
    kind: str  # ok | refused | long | the kind of a defect
    detail: str  # the last line that the command printed to stderr, or what else happened

    @property
    def is_defect(self):
        return self.kind not in ("ok", "refused", "long")


# The world that every case starts from.


def words_of_tuning(task, form="jsonl", rows=None, out="new"):
    """The command line of finetune.py for a task, on the rows of a format."""
    dataset = f"--dataset=rows/{rows or TASKS[task]}.{form}"
    answered = [] if task == "classify" else ANSWERED
    return [f"--task={task}", dataset, *TUNED, *answered, *TINY, f"--out_dir=out/{out}"]


def make_world():
    """Make every input file in the current folder: texts, tables, datasets, runs, weights."""
    write_texts()
    write_rows()
    calls = [
        ("prepare", ["small", "--input", "small.txt", "--tokenizer=char"]),
        ("prepare", ["pieces", "--input", "small.txt", "--tokenizer=train:280", "--workers=1"]),
        ("train", [*SMALL, "--pos=rope", "--out_dir=out/base"]),
        ("train", [*SMALL, *AS_GPT2, "--dataset=pieces", "--out_dir=out/gpt2"]),
        ("sample", ["--out_dir=out/gpt2", "--export=published"]),
        ("finetune", [*words_of_tuning("instruct", out="lora"), "--trainable=lora"]),
        ("finetune", words_of_tuning("classify", out="classes")),
    ]
    for script, words in calls:
        call(script, words)
    shutil.copy("out/base/tokenizer.json", "tokenizer.json")
    shutil.copytree("published", "sharded")
    split_weights(Path("sharded"))
    Path("short.py").write_text(
        "# two settings\nlearning_rate = 1e-3\nlr_shape = 'linear'\ndropout = 0.1\nbias = True\n"
    )
    Path("reward.py").write_text(
        "def reward(prompt, answer):\n    return float(len(answer)) / 10\n"
    )


def write_texts():
    """The same text as one file and as documents of every format."""
    line = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n"
    Path("small.txt").write_text(line * 40)
    Path("prompt.txt").write_text("To be")
    documents = [{"text": line + f"It was said {i} times.\n"} for i in range(30)]
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    Path("texts").mkdir()
    Path("texts/notes.txt").write_text(line * 20)
    Path("texts/notes.jsonl").write_text(lines)
    Path("texts/notes.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with contextlib.suppress(ImportError):
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(documents)
        pyarrow.parquet.write_table(table, "texts/notes.parquet")


def write_rows():
    """Supervised rows of every kind, in every format that can hold them."""
    words = "to be or not that is the question whether nobler in mind suffer".split()
    texts = [" ".join(words[i % 12 : i % 12 + 2 + i % 4]) + " be" * (i // 12) for i in range(60)]
    orders = [{"instruction": t, "output": "to"[: 1 + i % 2]} for i, t in enumerate(texts)]
    asked = [{"role": "user", "content": text} for text in texts]
    answered = {"role": "assistant", "content": "to be"}
    rows = {
        "classes": [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)],
        "orders": orders,
        "chats": [{"messages": [question, answered]} for question in asked],
        "pairs": [{"instruction": t, "chosen": "to be", "rejected": "nor"} for t in texts],
    }
    Path("rows").mkdir()
    asked = [{"query": text, "choices": ["to be", "nor"], "gold": 0} for text in texts[:9]]
    Path("rows/items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in asked))
    for name, items in rows.items():
        path = Path("rows") / name
        path.with_suffix(".json").write_text(json.dumps(items))
        path.with_suffix(".jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
        if name == "chats":
            continue
        cells = [list(items[0]), *(list(item.values()) for item in items)]
        for form, delimiter in (("csv", ","), ("tsv", "\t")):
            text = "".join(delimiter.join(row) + "\n" for row in cells)
            path.with_suffix(f".{form}").write_text(text)


def split_weights(folder):
    """Turn the only safetensors file of a published model into two, with an index."""
    from safetensors.torch import load_file, save_file

    single = folder / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


# Cases of settings.

STRINGS = [
    *("", " ", "missing", "./missing/file.txt", "small.txt", "data/small", "out/base", "."),
    *("two words", "naïve ☃", "caf\udce9", "x" * 300, "a=b", "None", "0", "[", "*", "-", "~", "%s"),
]
OF_NAME = {  # more values for these settings
    "device": ["cpu:0", "cuda", "cuda:99", "tpu", "meta"],
    "template": ["markers", "alpaca", "llama3", "chatml"],
    "tokenizer": ["char", "word", "train:300", "train:0", "train:9x", "tokenizer.json"],
    "freeze": ["blocks.*", "*", "head* nothing"],
    "lora_targets": ["q_proj", "q_proj k_proj", "lm_head"],
    "start": ["FILE:missing", "FILE:small.txt", "FILE:data", "FILE:", "To be " * 500],
    "init_from": ["resume", "auto", "published", "./published/config.json"],
    "out_dir": ["out/new one", "small.txt/out", "/proc/none/out"],
    "export": ["published", "out/base/export", "small.txt/export"],
    "adapter": ["out/lora/adapter.safetensors", "published/model.safetensors"],
    "errors": ["replace", "ignore"],
    "stop": ["To", "\n"],
}
INTS = [-1, 0, 1, 2, 3, 7, 64, 10**9, 2**63]
FLOATS = ["nan", "inf", "1e999", -1.0, 0.0, 0.5, 1e-40, 1e40, 1]
WRONG = ["None", "[]", "{}", "(1,", "1.5", "True", "text", "'", "", "1_0", "0x10", "1e3"]
# settings whose large values ask for much work, which may take longer than a case may
WORK = set(
    """max_iters batch_size gradient_accumulation_steps eval_iters sample_tokens max_new_tokens
    num_samples answer_tokens eval_answers test_items group_size block_size n_layer n_embd n_inner
    head_dim vocab_size lora_rank workers tokenizer updates_per_sample warmup_iters""".split()
)
LEFT_OUT = {  # slow to compile, or in need of the network
    "compile": {"True"},
    "core": {"True", "None"},  # reads all of Python's documentation
    "wandb_log": {"True"},
    "input": {"*", ".", ""},  # these read files that the command did not mean
}


def values_of(name, hint):
    """Texts that a command line may give for a setting of this type, right ones and wrong ones."""
    values = list(WRONG)
    for choice in choices_of(hint):
        if typing.get_origin(choice) is typing.Literal:
            values += [*typing.get_args(choice)] * 4
        elif choice is int:
            values += INTS * 3
        elif choice is float:
            values += FLOATS * 3
        elif choice is bool:
            values += ["True", "False"] * 8
        elif choice is str or typing.get_origin(choice) is list:
            values += STRINGS * 2 + OF_NAME.get(name, []) * 4
        elif choice is type(None):
            values += ["None"] * 2
        elif choice is dict:
            values += ["{'factor': 8.0}", "{'factor': 'x'}", rope_scaling(8.0), rope_scaling(0)]
    texts = map(str, values)
    return [text for text in texts if text not in LEFT_OUT.get(name, ())]


def rope_scaling(factor):
    """A dict with the keys of Llama 3.1's settings of RoPE."""
    rest = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"factor": factor, **rest, "original_max_position_embeddings": 32}


def settings_case(rng):
    """A valid small command line with one or two settings generated."""
    name = rng.choice(["train", "train", *TASKS, "sample", "sample", "prepare", "evaluate"])
    if name == "train":
        script, words = "train", [*SMALL, "--out_dir=out/new"]
        if rng.random() < 0.25:
            words = ["--init_from=resume", "--out_dir=out/base"]
    elif name == "sample":
        script, words = "sample", [*DRAWN, "--out_dir=out/base"]
        if rng.random() < 0.3:
            words = [*DRAWN, "--init_from=published"]
    elif name == "evaluate":
        script, words = "evaluate", [*MEASURED]
    elif name == "prepare":
        script = "prepare"
        words = ["--name=mine", "--input=small.txt", "--tokenizer=char", "--workers=1"]
    else:
        script, words = "finetune", words_of_tuning(name)
    hints = typing.get_type_hints(SCRIPTS[script].Settings)
    names = rng.sample(sorted(hints), rng.choice([1, 1, 2]))
    changed = {name: rng.choice(values_of(name, hints[name])) for name in names}
    words = words + [f"--{name}={text}" for name, text in changed.items()]
    return Case(script, words, changed)


# Cases of files.

OWN_TEXT = ["mine", "--tokenizer=char", "--workers=1", "--input"]
RESUME = ["--init_from=resume", "--max_iters=6"]
FROM = [*SMALL, "--dataset=pieces", "--out_dir=out/new"]


def readers():
    """Triples of a pattern of files, a script and the command line that reads such a file."""
    tables = [(f"rows/{r}.*", "finetune", task) for task, r in TASKS.items() if task != "reinforce"]
    tables = [(pattern, script, [task]) for pattern, script, task in tables]
    own_words = ["mine", "--input=small.txt", "--workers=1", "--tokenizer=tokenizer.json"]
    adapted = [*DRAWN, "--out_dir=out/base", "--adapter=out/lora/adapter.safetensors"]
    return [
        *tables * 2,
        ("rows/chats.*", "finetune", ["instruct"]),
        *[("rows/items.jsonl", "evaluate", MEASURED)] * 2,
        *[("texts/*", "prepare", [*OWN_TEXT, "FILE"])] * 3,
        ("tokenizer.json", "prepare", own_words),
        *[("data/small/meta.json", "train", [*SMALL, "--out_dir=out/new"])] * 2,
        ("data/small/*.bin", "train", [*SMALL, "--out_dir=out/new"]),
        *[("published/*", "sample", [*DRAWN, "--init_from=published"])] * 2,
        ("published/*", "train", [*FROM, "--init_from=published"]),
        ("sharded/*", "sample", [*DRAWN, "--init_from=sharded"]),
        ("out/base/ckpt_*.pt", "train", [*RESUME, "--out_dir=out/base"]),
        ("out/lora/ckpt_*.pt", "finetune", [*RESUME, "--out_dir=out/lora"]),
        ("out/base/best.pt", "sample", [*DRAWN, "--out_dir=out/base"]),
        ("out/classes/best.pt", "sample", ["--classify=to be", "--out_dir=out/classes"]),
        ("out/base/metrics.jsonl", "train", [*RESUME, "--out_dir=out/base"]),
        ("out/lora/metrics.jsonl", "finetune", [*RESUME, "--out_dir=out/lora"]),
        ("out/lora/adapter.safetensors", "sample", adapted),
        ("short.py", "train", ["short.py", *SMALL, "--out_dir=out/new"]),
        ("reward.py", "finetune", [*words_of_tuning("reinforce"), "--reward=reward.py"]),
        ("prompt.txt", "sample", [*DRAWN, "--out_dir=out/base", "--start=FILE:prompt.txt"]),
    ]


def files_case(rng, world):
    """A command that reads one of the world's files, damaged."""
    pattern, script, words = rng.choice(readers())
    path = rng.choice(sorted(world.glob(pattern)))
    name = str(path.relative_to(world))
    if words[0] in TASKS:
        form = path.suffix[1:]
        words = words_of_tuning(words[0], form, path.stem)
    words = [name if word == "FILE" else word for word in words]
    if rng.random() < 0.05:
        others = [other for other in world.rglob("*") if other.is_file()]
        other = rng.choice(sorted(others))
        damage, content = f"holds {other.relative_to(world)}", other.read_bytes()
    else:
        damage, content = damaged(rng, name, path.read_bytes())
    return Case(script, words, file=name, damage=damage, content=content)


def damaged(rng, name, content):
    """(what happened, the content then) of a file, damaged in a way that its format suggests."""
    ways = [damage_bytes]
    if name.endswith((".txt", ".py", ".jsonl", ".csv", ".tsv")):
        ways.append(damage_lines)
    if name.endswith((".csv", ".tsv")):
        ways += [damage_table] * 2
    if name.endswith(".json"):
        ways += [damage_json] * 3
    if name.endswith(".jsonl"):
        ways += [damage_json_line] * 2
    if name.endswith(".safetensors"):
        ways += [damage_header] * 2
    if name.endswith(".gz") and rng.random() < 0.7:
        what, inside = damaged(rng, name.removesuffix(".gz"), gzip.decompress(content))
        return what, gzip.compress(inside)
    return rng.choice(ways)(rng, content)


def damage_bytes(rng, content):
    """Truncate, empty or overwrite bytes, or insert some that are not UTF-8."""
    at = rng.randrange(len(content) + 1)
    ways = {
        f"cut at byte {at}": content[:at],
        "emptied": b"",
        f"8 bytes from {at} flipped": content[:at]
        + bytes(255 - byte for byte in content[at : at + 8])
        + content[at + 8 :],
        f"NULs inserted at byte {at}": content[:at] + bytes(3) + content[at:],
        f"not UTF-8 at byte {at}": content[:at] + b"\xff\xfe\xc3" + content[at:],
        "a byte-order mark first": b"\xef\xbb\xbf" + content,
        "as UTF-16": content.decode("latin-1").encode("utf-16"),
    }
    return rng.choice(list(ways.items()))


def damage_lines(rng, content):
    """Duplicate, tear, remove or blank a line."""
    lines = content.splitlines(keepends=True) or [b""]
    i = rng.randrange(len(lines))
    line = lines[i]
    ways = {
        "twice": [line, line],
        "torn": [line[: len(line) // 2]],
        "removed": [],
        "blank": [b"\n"],
        "broken in two": [line[: len(line) // 2], b"\n", line[len(line) // 2 :]],
        "ending in CR": [line.rstrip(b"\n"), b"\r"],
    }
    what, new = rng.choice(list(ways.items()))
    return f"line {i + 1} {what}", b"".join([*lines[:i], *new, *lines[i + 1 :]])


def damage_table(rng, content):
    """Insert a quote, a delimiter or a control character, in the header one time in four."""
    end = content.find(b"\n") if rng.random() < 0.25 else len(content)
    at = rng.randrange(end + 1)
    new = rng.choice([b'"', b",", b"\t", b'""', b"'", b"\r", b"\\", b'","', b"\x1a", b"\n\n"])
    return f"{new} inserted at byte {at}", content[:at] + new + content[at:]


VALUES = [None, True, -1, 0, 2.5, 10**30, math.inf, math.nan, "", "text", "\ud800", "\0", [], {}]
VALUES += [[1], {"a": 1}, [None], "9" * 400, -(2**63), [[["deep"]]]]


def change_json(rng, value):
    """(what happened, a copy of the value with one place in it changed)."""
    value = copy.deepcopy(value)
    new, place = copy.deepcopy(rng.choice(VALUES)), value
    if not value or rng.random() < 0.1:
        return f"all of it is {new!r:.40}", new
    names = []
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        names.append(str(key))
        inside = place[key]
        if not isinstance(inside, dict | list) or not inside or rng.random() < 0.4:
            break
        place = inside
    where = "/".join(names)
    if rng.random() < 0.25:
        del place[key]
        return f"{where} removed", value
    place[key] = new
    return f"{where} is {new!r:.40}", value


def damage_json(rng, content):
    what, value = change_json(rng, json.loads(content))
    return what, json.dumps(value).encode()


def damage_json_line(rng, content):
    lines = content.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    what, value = change_json(rng, json.loads(lines[i]))
    lines[i] = json.dumps(value).encode() + b"\n"
    return f"line {i + 1}: {what}", b"".join(lines)


def damage_header(rng, content):
    """Change a value in the JSON that a safetensors file begins with."""
    length = struct.unpack("<Q", content[:8])[0]
    what, header = change_json(rng, json.loads(content[8 : 8 + length]))
    text = json.dumps(header).encode()
    return f"header: {what}", struct.pack("<Q", len(text)) + text + content[8 + length :]


# Running a case.


def call(script, words):
    """Run a script as its command line does, in this process. Ends by SystemExit if it fails."""
    sys.argv = [f"{script}.py", *words]
    main = SCRIPTS[script].main
    with errors_in_one_line():
        status = main(words)
    if status:
        raise SystemExit(status)


def run_in_child(work, folder, logs, seconds):
    """The exit status of a forked process that runs `work` in a folder; None if it ran too long.

    What it prints goes to `stdout` and `stderr` in the folder `logs`.
    """

    def child():
        import torch

        os.setpgrp()
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
        torch.set_num_threads(1)
        os.chdir(folder)
        work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(seconds)
    status = process.exitcode
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its workers too
    process.join()
    return status


def digests(folder):
    """The sha256 of every file in a folder, by its name there."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): sha256_of(path) for path in paths}


def run_case(case, world, folder, seconds):
    """The Result of a case that runs in a copy of the world."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world, folder / "world")
    if case.file:
        (folder / "world" / case.file).write_bytes(case.content)
    before = digests(folder / "world")
    asks_for_much = any(name in WORK and large(text) for name, text in case.changed.items())
    limit = min(seconds, 5) if asks_for_much else seconds
    work = functools.partial(call, case.script, case.words)
    status = run_in_child(work, folder / "world", folder, limit)
    errors = (folder / "stderr").read_text(encoding="utf-8", errors="replace")
    kind, detail = judge(case, status, errors)
    if kind == "hang" and asks_for_much:
        kind = "long"
    after = digests(folder / "world")
    touched = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    foreign = sorted(name for name in touched if not may_write(case, name, name not in before))
    if foreign and kind in ("ok", "refused", "long"):
        kind, detail = "wrote elsewhere", f"status {status}, changed {' '.join(foreign[:5])}"
    return Result(case, kind, detail)


def large(text):
    """Whether a setting's value asks for work that never ends."""
    return bool(re.search(r"\d{4}|e4", text))


def judge(case, status, errors):
    """(kind, detail) of a command, by its exit status and what it printed to stderr."""
    lines = errors.strip().splitlines() or [""]
    whole, last = lines[-1], lines[-1][:300]
    if status is None:
        return "hang", f"still running at the limit; {last}"
    if status == 0:
        return "ok", ""
    if status < 0:
        return "signal", f"{signal.Signals(-status).name}; {last}"
    if "Traceback (most recent" in errors:
        out_of_memory = "MemoryError" in errors or "allocate memory" in errors
        raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)] or [last]
        kind = "memory" if out_of_memory else "traceback"
        return kind, f"{raised[-1][:300]}{raised_in(lines)}"
    if status != 2:
        return "status", f"status {status}; {last}"
    if not last.startswith("error: "):
        return "no error line", last
    if not names_cause(case, whole):
        return "names nothing", last
    return "refused", last


def raised_in(lines):
    """The last of our own lines in a traceback, in brackets."""
    ours = [line for line in lines if re.match(rf'  File "{re.escape(str(HOME))}/(?!bench)', line)]
    if not ours:
        return ""
    path, number, name = re.match(r'  File "(.*)", line (\d+), in (.*)', ours[-1]).groups()
    return f" [{Path(path).relative_to(HOME)}:{number} {name}]"


def names_cause(case, refusal):
    """Whether a refusal names a generated setting, its value, or the damaged file or its folder.

    Any setting that it shows as name=value will do, since the cause may lie between two of them.
    """
    if ALL_SETTINGS & set(re.findall(r"(\w+)=", refusal)):
        return True
    if any(word.startswith("--start=") for word in case.words) and "the prompt" in refusal:
        return True  # what everybody calls that setting
    names = list(case.changed)
    if case.file:
        path = Path(case.file)
        names += [path.name, path.parent.name or path.name]
    shown = re.split(r"[\s'\"]+", refusal)
    values = [*case.changed.values(), *(str(Path(text)) for text in case.changed.values())]
    folders = [str(Path(text).parent) for text in case.changed.values()]
    names += [value for value in values + folders if len(value) > 2]
    # a task that was generated may not fit the rows, which are then what the refusal names
    names += [w.removeprefix("--dataset=") for w in case.words if w.startswith("--dataset=rows/")]
    return any(name in refusal for name in names) or any(value in shown for value in values)


def may_write(case, name, is_new):
    """Whether a command may write the file `name`: in its own folder, where it is new or reused."""
    given = dict(word[2:].partition("=")[::2] for word in case.words if word.startswith("--"))
    if case.script == "evaluate":
        return name in (f"{given['out_dir']}/eval.json", given.get("save"), given.get("report"))
    if case.script == "prepare":
        dataset = given.get("name") or case.words[0]
        own, reuses = folder_of(dataset), "overwrite" in given
    else:
        own = Path(given.get("export" if case.script == "sample" else "out_dir", "/nowhere"))
        reuses = given.get("init_from") in ("resume", "auto") or "overwrite" in given
        reuses = reuses or "export" in given
    numbered = rf"{re.escape(str(own))}(-\d+)?"
    parents = [str(parent) for parent in Path(name).parents]
    is_inside = any(re.fullmatch(numbered, parent) for parent in parents)
    return is_inside and (is_new or reuses)


# All cases.


def run_cases(cases, seed, folder, seconds=60.0, heard=lambda result: None):
    """The Results of `cases` cases. Folders of defects are kept in `folder`, numbered.

    heard: called with each Result as it comes.
    """
    import_early()
    results, rng = [], random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        world = scratch / "world"
        world.mkdir()
        if run_in_child(make_world, world, scratch, 300) != 0:
            last = (scratch / "stderr").read_text().strip().splitlines()[-1]
            raise ValueError(f"the files to start from cannot be made: {last}")
        for number in range(cases):
            is_of_file = rng.random() < 0.5
            case = files_case(rng, world) if is_of_file else settings_case(rng)
            result = run_case(case, world, scratch / "case", seconds)
            if result.is_defect:
                keep(result, world, scratch / "case", folder / f"{number:04d}")
            results.append(result)
            heard(result)
    return results


def import_early():
    """Import what scripts import late, once: each case would take a second longer."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("torch._dynamo", "matplotlib.pyplot", "pyarrow.parquet", "safetensors.torch"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def keep(result, world, ran, folder):
    """Keep what reproduces a defect: the files before the command, the command, what it printed."""
    case = result.case
    shutil.copytree(world, folder / "world")
    if case.file:
        (folder / "world" / case.file).write_bytes(case.content)
    for name in ("stdout", "stderr"):
        shutil.copy(ran / name, folder / name)
    command = f"cd {(folder / 'world').resolve()} && {case.command()}\n"
    (folder / "command").write_text(command, encoding="utf-8", errors="surrogateescape")


def print_defect(result):
    """Print a line for a defect, and nothing for other results."""
    case = result.case
    if not result.is_defect:
        return
    cause = f"{case.file}: {case.damage}; " if case.file else ""
    line = f"{result.kind}: {cause}python {case.script}.py {shlex.join(case.words)}"
    line += f"\n    {result.detail}"
    print(line.encode("utf-8", "backslashreplace").decode(), flush=True)


def main(argv):
    s = configure(Settings, argv)
    if not hasattr(os, "fork") or sys.platform != "linux":
        raise ValueError(f"platform={sys.platform} is not supported: run it on Linux")
    folder, started_at = SCRATCH / "fuzz", time.perf_counter()
    results = run_cases(s.cases, s.seed, folder, s.seconds, print_defect)
    seconds = time.perf_counter() - started_at
    for kind, count in Counter(result.kind for result in results).most_common():
        print(f"{count:6} {kind}")
    held = sum(not result.is_defect for result in results)
    print(f"{held} of {len(results)} cases hold ({held / len(results):.1%}), {seconds:.0f} s")
    if held < len(results):
        print(f"the folders of the others are in {folder}/")
        raise SystemExit(1)
