"""How good a model is, how sure that is, and beside what: `python evaluate.py`, the newest run.

Measures text (bits per byte), multiple choice, answers, classes, and glassCORE, a suite of its own
that needs no download. Every figure has the number of items, a 95% interval and what guessing gets;
--compare=OUT_DIR adds another model on the same items, paired. Results go to eval.json.
`python evaluate.py --report=FILE.html out/A [out/B]` makes a page of runs from their files alone.
"""

import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from glass import core, intervals, items
from glass.contamination import count_contamination
from glass.files import read_function, reading, write_json
from glass.settings import errors_in_one_line, read_arguments

CONTAMINATION = (
    13  # words in a row that an item shares with training text, as GPT-3's authors count
)


@dataclass
class Settings:
    """Which model, what to measure, and beside which other model."""

    # model
    init_from: str = "resume"  # resume: a checkpoint of out_dir; else gpt2... or a folder
    out_dir: str | None = None  # folder of the run; None: the newest under out/
    which: Literal["best", "last"] = "best"  # the lowest validation loss, or the last
    compare: str | None = None  # another run or published folder, measured on the same items
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"  # of the weights
    # what to measure; without any of these, core and what the run was trained on
    core: bool | None = None  # glassCORE; None: if nothing else is named
    text: list[str] | None = None  # files of text: .txt .md .jsonl .jsonl.gz .parquet
    dataset: str | None = None  # the validation split of this dataset, as one text
    items: list[str] | None = None  # multiple choice: .jsonl files, or what prepare.py NAME got
    answers: str | None = None  # a dataset or file of instructions, answered greedily
    classes: str | None = None  # a dataset or file of labelled texts, for a classifier
    # how
    stride: int | None = None  # tokens that a window of text scores; None: all of its block
    one_stream: bool = False  # texts are one after the other, else each begins anew
    shots: int = 0  # items of a file that stand as examples before the others
    checker: str | None = None  # a Python file with check(row, answer) -> bool; None: exact match
    answer_tokens: int = 64  # longest answer
    limit: int | None = None  # items of each kind, at most
    # results
    save: str | None = None  # file of the results; None: eval.json in the run's folder
    report: str | None = None  # write a page of the runs named by words to this .html file

    def __post_init__(self):
        from model import require

        for name, what in (("save", "file"), ("compare", "run or folder")):
            if getattr(self, name) == "":
                raise ValueError(f"{name}='' names no {what}: give one, or leave it out")

        require(self, "stride answer_tokens limit", lambda value: value >= 1, "be at least 1")
        require(self, "shots", lambda value: value >= 0, "not be negative")


@dataclass
class Figure:
    """One measured number, and what it was made of."""

    task: str
    metric: str
    value: float
    interval: tuple  # low, high: 95%
    n: int  # items, or units of text
    chance: float | None = None  # what guessing gets
    parts: list = field(default_factory=list, repr=False)  # the figure of each item
    weights: list | None = field(default=None, repr=False)  # what each item counts; None: 1
    notes: dict = field(default_factory=dict)  # further numbers, by name

    @property
    def key(self):
        return f"{self.task} {self.metric}"


def share(task, metric, parts, chance=None, **notes):
    """The Figure of a share of items, with Wilson's interval. parts: 0 or 1 for each item."""
    value = sum(parts) / max(1, len(parts))
    interval = intervals.wilson(sum(parts), len(parts))
    return Figure(task, metric, value, interval, len(parts), chance, list(parts), None, notes)


def ratio(task, metric, numerators, denominators, **notes):
    """The Figure of a ratio of sums over units of text, with a bootstrap interval."""
    numerators, denominators = np.asarray(numerators, float), np.asarray(denominators, float)
    value = numerators.sum() / denominators.sum()
    interval = intervals.bootstrap_ratio(numerators, denominators)
    parts = (numerators / denominators).tolist()
    weights = denominators.tolist()
    return Figure(task, metric, value, interval, len(parts), None, parts, weights, notes)


# Text.

UNIT_BYTES = 1000  # units of a text that is compared or resampled, where documents are few


def measure_text(task, loaded, texts, settings):
    """Figures of texts: bits per byte and character, perplexity per token and per word.

    Bytes, characters and words are those of the original, so models with other tokenizers can be
    compared. Words are split at white space, as lm-evaluation-harness does. The interval is over
    documents, or, if there are fewer than 30, over pieces of 1,000 bytes.
    """
    from glass.score import text_logprobs

    texts = [text for text in texts if text]
    nats, sizes, n_tokens, n_words, n_characters, unknown = [], [], 0, 0, 0, {}
    for text in texts:
        unknown |= dict.fromkeys(loaded.tokenizer.unknown_characters(text))
        ids, logprobs = text_logprobs(loaded.model, loaded.tokenizer, text, settings.stride)
        n_tokens += len(ids)
        n_words += len(re.split(r"\s+", text))
        n_characters += len(text)
        n_bytes = len(text.encode("utf-8"))
        units = 1 if len(texts) >= 30 else max(1, n_bytes // UNIT_BYTES, min(20, n_bytes // 20))
        lengths = [len(loaded.tokenizer.decode_bytes([token])) for token in ids]
        ends = np.cumsum(lengths)
        places = np.minimum((ends - 1) * units // max(1, ends[-1] if len(ends) else 1), units - 1)
        nats += np.bincount(places, -logprobs.numpy(), units).tolist()
        sizes += np.bincount(places, lengths, units).tolist()
    if not n_tokens:
        raise ValueError(f"{task} holds no text that can be scored: give another file")
    total, size = sum(nats), sum(len(text.encode("utf-8")) for text in texts)
    bits = [value / math.log(2) for value in nats]
    scale = size / sum(sizes)  # 1, but for tokenizers that change the text
    sizes = [max(1.0, value * scale) for value in sizes]
    notes = {"documents": len(texts), "bytes": size}
    if unknown:  # each counts as one token, so the text looks easier than it is
        notes["unknown characters"] = len(unknown)
    main = ratio(task, "bits_per_byte", bits, sizes, **notes)
    main.value = total / math.log(2) / size
    others = {
        "bits_per_character": (total / math.log(2) / n_characters, size / n_characters, None),
        "token_perplexity": (total / n_tokens, size / n_tokens, perplexity),
        "word_perplexity": (total / n_words, size / n_words, perplexity),
    }
    figures = [main]
    for metric, (value, bytes_each, change) in others.items():
        ends = [end * bytes_each for end in main.interval]
        if change:  # bits per byte, in nats per token or word, as a perplexity
            ends = [change(end * math.log(2)) for end in ends]
            value = change(value)
        figures.append(Figure(task, metric, value, tuple(ends), main.n))
    return figures


def perplexity(nats):
    """exp(nats), or infinity where a float cannot hold it."""
    return math.exp(nats) if nats < 709 else math.inf


def texts_of_files(settings):
    """The documents of settings.text as a list of texts."""
    import prepare

    reader = prepare.Settings(name="text", input=settings.text)
    texts = []
    for path in prepare.input_files(reader):
        texts += ["".join(pieces) for pieces in prepare.read_documents(path, reader)]
    return ["\n\n".join(texts)] if settings.one_stream else [text for text in texts if text]


def validation_text(name):
    """The validation split of a dataset as a list of one text."""
    from glass.shards import open_dataset

    dataset = open_dataset(name)
    ids = [token for shard in dataset.splits["val"] for token in shard.tolist()]
    return [dataset.tokenizer.decode(ids)]


# Multiple choice.


def measure_items(task, loaded, asked, **notes):
    """Figures of multiple choice: acc, and acc_norm and acc_bytes where answers differ in length.

    acc takes the answer with the highest log-probability, acc_norm the highest per character,
    acc_bytes per byte, as in lm-evaluation-harness. Items that only predict give acc (greedy) and
    perplexity. Items longer than the block are left out and counted.
    """
    from glass.score import encode_pair, score_endings

    tokenizer, block_size = loaded.tokenizer, loaded.model.config.block_size
    kept, pairs, too_long, unknown = [], [], 0, 0
    for item in asked:
        if any(tokenizer.unknown_characters(context + end) for context, end in item.pairs):
            unknown += 1
            continue
        encoded = [encode_pair(tokenizer, context, end) for context, end in item.pairs]
        if any(len(context) + len(end) > block_size + 1 for context, end in encoded):
            too_long += 1
            continue
        kept.append(item)
        pairs += encoded
    notes |= {"longer than the block": too_long, "with unknown characters": unknown}
    notes = {name: value for name, value in notes.items() if value}
    if not kept:
        return [Figure(task, "acc", math.nan, (0.0, 1.0), 0, None, [], None, notes)]
    for context, end in pairs:
        if not context or not end:
            raise ValueError(f"{task}: a context or an answer has no token: leave its item out")
    scores = iter(score_endings(loaded.model, pairs))
    scores = [[next(scores) for _ in item.pairs] for item in kept]
    if kept[0].gold is None:
        greedy = [float(score.is_greedy) for (score,) in scores]
        nats = [-score.logprob for (score,) in scores]
        mean = ratio(task, "perplexity", nats, [1.0] * len(nats))
        low, high = map(perplexity, mean.interval)
        mean.value, mean.interval = perplexity(mean.value), (low, high)
        return [share(task, "acc", greedy, 0.0, **notes), mean]
    guessing = core.chance(kept)
    rules = {
        "acc": lambda item: [1] * len(item.pairs),
        "acc_norm": lambda item: [len(answer) for answer in item.answers],
        "acc_bytes": lambda item: [len(answer.encode("utf-8")) for answer in item.answers],
    }
    figures = []
    for metric, lengths_of in rules.items():
        parts = []
        for item, found in zip(kept, scores, strict=True):
            by_length = zip(found, lengths_of(item), strict=True)
            values = [score.logprob / length for score, length in by_length]
            parts.append(float(values.index(max(values)) == item.gold))
        figures.append(share(task, metric, parts, guessing, **notes))
    return figures


def measure_core(loaded, limit):
    """Figures of glassCORE: the accuracy of each kind, and the mean of the centred accuracies."""
    figures, means, halves = [], [], []
    n = min(limit or core.N_ITEMS, core.N_ITEMS)
    for kind in core.KINDS:
        items = core.core_items(kind, n)
        counted = {
            "bag": core.counting_accuracy(items, core.bag_logprob),
            "bigram": core.counting_accuracy(items, core.bigram_logprob),
        }
        figure = measure_items(f"core {kind}", loaded, items, **counted)[0]
        figures.append(figure)
        if figure.n:
            guessing = figure.chance
            means.append(core.centred(figure.value, guessing))
            spread = (figure.interval[1] - figure.interval[0]) / (1 - guessing)
            halves.append(spread / 2)
    if means:
        half = math.sqrt(sum(half**2 for half in halves)) / len(means)  # independent kinds
        mean = sum(means) / len(means)
        notes = {"kinds": len(means)}
        interval = (mean - half, mean + half)
        figures.append(
            Figure(
                "glassCORE", "centred", mean, interval, sum(f.n for f in figures), 0.0, notes=notes
            )
        )
    return figures


# Answers and classes.


def read_rows(name, limit):
    """(task name, rows of the test split), from a dataset under data/ or a file."""
    from glass import sources
    from glass.shards import folder_of

    path = Path(name)
    if path.suffix.lower() not in sources.TABLES:
        path = folder_of(name) / "test.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name a dataset that is prepared, or a file")
    rows = list(sources.read_table(path))
    if not rows:
        raise ValueError(f"{path} has no row: add some, or name another")
    return Path(name).stem, rows[:limit]


def measure_answers(loaded, settings):
    """Figures of answers to instructions: the share that is right, over all and by kind."""
    from glass import chat, records
    from glass.generate import answer

    task, rows = read_rows(settings.answers, settings.limit)
    template = loaded.chat_template or "alpaca"
    check = read_checker(settings.checker)
    room = loaded.model.config.block_size - settings.answer_tokens
    prompts, kept, left_out, unknown = [], [], 0, 0
    find = loaded.tokenizer.unknown_characters
    for where, row in rows:
        records.check_row(where, row, "instruct")
        messages = chat.messages_of(row, template)
        ids, _ = chat.encode_chat(loaded.tokenizer, messages[:-1], template, reply=True)
        if len(ids) > room:
            left_out += 1
            continue
        unknown += any(find(message["content"]) for message in messages)
        prompts.append(ids)
        kept.append((row, messages[-1]["content"]))
    if not kept:
        raise ValueError(
            f"answers={settings.answers} leaves no question that fits into "
            f"block_size={loaded.model.config.block_size} with answer_tokens="
            f"{settings.answer_tokens}: lower answer_tokens"
        )
    made = answer(loaded.model, prompts, loaded.ends, settings.answer_tokens, temperature=0)
    parts, kinds = [], {}
    for (row, expected), ids in zip(kept, made, strict=True):
        ended = bool(ids) and ids[-1] in loaded.ends
        text = loaded.tokenizer.decode(ids[:-1] if ended else ids)
        is_right = check(row, text) if check else text.strip() == expected.strip()
        parts.append(float(is_right))
        kinds.setdefault(row.get("kind"), []).append(parts[-1])
    notes = {"longer than the block": left_out, "with unknown characters": unknown}
    notes = {name: value for name, value in notes.items() if value}
    figures = [share(f"answers {task}", "exact" if not check else "checked", parts, **notes)]
    for kind, found in kinds.items():
        if kind is not None and len(kinds) > 1:
            figures.append(share(f"answers {task}: {kind}", figures[0].metric, found))
    return figures


def read_checker(path):
    """The function `check` of a Python file, or None if path is None.

    What it gives must be True or False: anything else is a ValueError.
    """
    check = read_function(path, "checker", "check(row, answer)")

    def checked(row, text):
        is_right = check(row, text)
        if not isinstance(is_right, bool | np.bool_):
            raise ValueError(
                f"checker={path} gave {is_right!r:.40} for the answer {text!r:.40}: "
                "it must return True or False"
            )
        return is_right

    return check and checked


def measure_classes(loaded, settings):
    """The Figure of a classifier: how many texts get their class."""
    import torch

    from glass import sources
    from glass.chat import encode_for_class
    from glass.generate import padded
    from glass.loading import check_classifies

    check_classifies(loaded, loaded.name)
    task, rows = read_rows(settings.classes, settings.limit)
    labels = loaded.state["task"]["labels"]
    longest = min(loaded.state["settings"]["block_size"], loaded.model.config.block_size)
    parts = []
    for first in range(0, len(rows), 64):
        batch = rows[first : first + 64]
        for where, row in batch:
            sources.check_keys(where, row, ("text", "label"))
            if row["label"] not in labels:
                raise ValueError(
                    f"{where}: label={row['label']!r} is none of the classes that the model was "
                    f"trained on: use one of {' '.join(labels)}"
                )
        ids = [encode_for_class(loaded.tokenizer, row["text"], longest)[0] for _, row in batch]
        with torch.no_grad():
            predicted = loaded.model.classify(*padded(ids, loaded.model.device)).argmax(-1).tolist()
        found = zip(batch, predicted, strict=True)
        parts += [float(labels[i] == row["label"]) for (_, row), i in found]
    unknown = sum(bool(loaded.tokenizer.unknown_characters(row["text"])) for _, row in rows)
    notes = {"with unknown characters": unknown} if unknown else {}
    return [share(f"classes {task}", "acc", parts, 1 / len(labels), **notes)]


# All together.


def measure(loaded, settings):
    """The Figures that the settings ask for."""
    s, figures = with_defaults(settings, loaded.state), []
    check_used(s)
    trained_on = loaded.state["settings"].get("dataset") if loaded.state else None
    if s.text:
        name = " ".join(["text", *(Path(path).name for path in s.text)])
        figures += measure_text(name, loaded, texts_of_files(s), s)
    if s.dataset:
        figures += measure_text(f"{s.dataset} validation", loaded, validation_text(s.dataset), s)
    paths = [path for name in s.items or [] for path in items.files_of(name)]
    for name, count in Counter(path.stem for path in paths).items():
        if count > 1:
            raise ValueError(
                f"items={' '.join(s.items)} are {count} files called {name}, whose figures would "
                "have one name: rename one, or measure them one at a time"
            )
    for path in paths:
        asked = items.read_items(path, s.shots)[: s.limit]
        found = measure_items(path.stem, loaded, asked)
        texts = ["".join(item.pairs[item.gold or 0]) for item in asked]
        count_contamination(found, texts, trained_on)
        figures += found
    if s.answers:
        figures += measure_answers(loaded, s)
    if s.classes:
        figures += measure_classes(loaded, s)
    if s.core:
        figures += measure_core(loaded, s.limit)
    return figures


def with_defaults(settings, state):
    """The settings with something to measure: without any wish, core and the run's own data."""
    from dataclasses import replace

    from glass.shards import META, folder_of

    s = settings
    if s.core or s.text or s.dataset or s.items or s.answers or s.classes:
        return s
    dataset = state["settings"].get("dataset") if state else None
    task = state["settings"].get("task") if state else None
    if dataset is None or not (folder_of(dataset) / META).is_file():
        return replace(s, core=s.core is not False)
    if task is None:
        return replace(s, core=s.core is not False, dataset=dataset)
    if task == "classify":
        return replace(s, classes=dataset)
    if task == "prefer":
        return replace(s, core=s.core is not False)
    return replace(s, core=s.core is not False, answers=dataset)


def check_used(settings):
    """ValueError for a setting of how to measure that nothing which is measured looks at."""
    s = settings
    users = {
        "stride": ("text", "dataset"),
        "one_stream": ("text",),
        "shots": ("items",),
        "checker": ("answers",),
    }
    for name, kinds in users.items():
        if getattr(s, name) and not any(getattr(s, kind) for kind in kinds):
            wanted = " or ".join(f"--{kind}" for kind in kinds)
            raise ValueError(
                f"{name}={getattr(s, name)} would do nothing without {wanted}: leave it out"
            )


def compared(ours, theirs, name):
    """Add to each Figure of ours its difference to the same one of theirs, with its interval."""
    by_key = {figure.key: figure for figure in theirs}
    for figure in ours:
        other = by_key.get(figure.key)
        if other is None or not figure.parts or len(figure.parts) != len(other.parts):
            continue
        low, high = intervals.paired_difference(figure.parts, other.parts, figure.weights)
        figure.notes["compared with"] = name
        figure.notes["theirs"] = other.value
        figure.notes["difference"] = figure.value - other.value
        figure.notes["difference from"], figure.notes["difference to"] = low, high
        if low <= 0 <= high:
            figure.notes["verdict"] = "no difference shown"


def table(figures):
    """The figures as lines of text in columns."""
    width = max(len(figure.task) for figure in figures)
    lines = [
        f"{'':{width}}  {'metric':18} {'value':>9}  {'95% interval':>21} {'n':>6} {'chance':>7}"
    ]
    for figure in figures:
        value, low, high = map(intervals.number_text, (figure.value, *figure.interval))
        chance = "" if figure.chance is None else f"{figure.chance:.3f}"
        interval = f"{low} to {high}"
        line = f"{figure.task:{width}}  {figure.metric:18} {value:>9}  {interval:>21}"
        line += f" {figure.n:6} {chance:>7}"
        notes = dict(figure.notes)
        if "compared with" in notes:
            difference = [notes.pop(f"difference{end}") for end in ("", " from", " to")]
            line += f"  {notes.pop('compared with')}: {notes.pop('theirs'):.4f}, "
            line += "difference {:+.4f} ({:+.4f} to {:+.4f})".format(*difference)
            line += f": {notes.pop('verdict')}" if "verdict" in notes else ""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in notes.items())
        lines.append(f"{line}  {shown}".rstrip())
    return "\n".join(lines)


def save_figures(path, figures, model):
    """Put the figures into a JSON file, in place of earlier ones of the same task and metric."""
    content = read_figures(path)
    for figure in figures:
        low, high = figure.interval
        numbers = {"value": figure.value, "low": low, "high": high, "chance": figure.chance}
        numbers = {name: finite(value) for name, value in numbers.items()}
        content["figures"][figure.key] = {
            "task": figure.task,
            "metric": figure.metric,
            **numbers,
            "n": figure.n,
            "model": model,
            **{name: finite(value) for name, value in figure.notes.items()},
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def read_figures(path):
    """What a file of results holds, a dict. Raises ValueError for a file of another kind."""
    if not path.exists():
        return {"figures": {}}
    if not path.is_file():
        raise ValueError(f"{path} is no file that can be replaced: name another with --save")
    with reading(path, "it holds no results, name another with --save"):
        content = json.loads(path.read_text(encoding="utf-8"))
        content["figures"].keys()
    return content


def finite(value):
    """The value for JSON, which has no NaN and no infinity: None instead."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load(settings, init_from=None):
    """The Loaded of the model to measure, or of another that init_from names."""
    from glass.loading import ModelSettings, load_model

    s = settings
    options = {"which": s.which, "device": s.device, "dtype": s.dtype}
    if init_from is None:
        options |= {"init_from": s.init_from, "out_dir": s.out_dir}
    else:
        options |= {"init_from": init_from}
    return load_model(ModelSettings(**options))


def main(argv):
    arguments = read_arguments(Settings, argv, positional="[RUN ... of a --report]")
    if path := arguments.given.get("report"):
        from glass.report import write_report

        if others := " ".join(sorted(arguments.given.keys() - {"report"})):
            raise ValueError(
                f"{others} would do nothing with --report: leave it out, or measure first"
            )
        write_report(Path(path), arguments.names)
        return 0
    s = Settings(**arguments.given)
    if arguments.names:
        raise ValueError(
            f"{' '.join(arguments.names)} would do nothing: name a run by --out_dir, "
            "or make a page of runs with --report=FILE.html"
        )
    loaded = load(s)
    run = s.out_dir if s.init_from == "resume" else s.init_from
    if run is None:
        from glass import checkpoint

        run = checkpoint.newest_run()
    path = Path(s.save) if s.save else Path(run) / "eval.json"
    if not s.save and not Path(run).is_dir():
        path = Path("eval.json")
    read_figures(path)  # now, since measuring takes long
    other = load(s, s.compare) if s.compare else None
    figures = measure(loaded, s)
    if not figures:
        raise ValueError(
            f"core={s.core} leaves nothing to measure: name --text, --dataset, --items, --answers "
            "or --classes"
        )
    if s.compare:
        compared(figures, measure(other, s), s.compare)
    print(table(figures))
    step = "" if loaded.state is None else f", step {loaded.state['step']}"
    save_figures(path, figures, f"{run}{step}")
    print(f"saved in {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    with errors_in_one_line():
        sys.exit(main(sys.argv[1:]))
