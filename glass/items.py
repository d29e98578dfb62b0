"""Items of multiple choice from JSON lines, in the forms that published benchmarks have.

An Item is a list of (context, ending) pairs of which one is right. These forms are understood:

    query choices gold                   one context, several endings (nanochat's CORE)
    context_options continuation gold    several contexts, one ending
    context continuation                 an ending that is to be predicted, greedily

and the files of HellaSwag, ARC, PIQA, Winogrande, COPA and LAMBADA as their authors publish them,
put into the words that lm-evaluation-harness puts them in.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from glass.files import reading
from glass.shards import folder_of
from glass.sources import SOURCES, check_is, parse_json


@dataclass
class Item:
    """A question, how it may be answered, and which answer is right."""

    where: str  # its file and line
    pairs: list  # (context, ending), two texts, for each answer
    gold: int | None  # the index of the right pair; None: the only pair is to be greedy
    answers: list  # the text of each answer, whose length acc_norm divides by
    shot: str  # the item with its right answer, as an example before others


def files_of(name):
    """The files of items that a name stands for, a list of paths: a file, or a dataset's files.

    Raises ValueError if there is none.
    """
    if Path(name).suffix == ".jsonl":
        return [Path(name)]
    folder = folder_of(name)
    found = sorted(folder.glob("*.jsonl"))
    if not found:
        raise ValueError(f"items={name} is no .jsonl file, and {folder} has none: {advice(name)}")
    return found


def advice(name):
    """How to come by a dataset of items."""
    known = [key for key, source in SOURCES.items() if source.kind == "choices"]
    if name in known:
        return f"run python prepare.py {name}, which downloads it"
    return f"name a file, or one of {' '.join(known)}"


def read_items(path, n_shots=0):
    """The Items of a file of JSON lines, each after n_shots others as examples.

    The examples are the file's first items, which are then not scored themselves. Raises
    ValueError, with the line, for what is no item.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"items={path} does not exist: give a .jsonl file of items")
    labels, n_lines = read_labels(path), 0
    items = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a text may hold U+2028
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}): convert it") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        row = parse_json(line, where, dict)
        if labels is not None:
            if number > len(labels):
                raise ValueError(f"{where} has no label in {labels_path(path)}: add it")
            row["label"] = labels[number - 1]
        n_lines = number
        items.append(item_of(row, where))
        if (items[0].gold is None) != (items[-1].gold is None):
            raise ValueError(
                f"only one of {items[0].where} and line {number} has answers to choose from: "
                "put the two kinds of items into two files"
            )
    if labels is not None and len(labels) > n_lines:
        raise ValueError(
            f"{labels_path(path)} has {len(labels)} labels but {path} only {n_lines} lines, so they "
            "are of two files: put those beside each other that belong together"
        )
    if len(items) <= n_shots:
        raise ValueError(f"{path} has {len(items)} items, but needs more than shots={n_shots}")
    examples = "".join(item.shot + "\n\n" for item in items[:n_shots])
    for item in items[n_shots:]:
        item.pairs = [(examples + context, ending) for context, ending in item.pairs]
    return items[n_shots:]


def labels_path(path):
    """Where PIQA keeps the labels of a file: valid.jsonl has valid-labels.lst beside it."""
    for name in (f"{path.stem}-labels.lst", f"{path.stem}_labels.lst"):
        if (path.parent / name).is_file():
            return path.parent / name
    return None


def read_labels(path):
    """The labels that stand in a file of their own beside the items, a list of ints, or None."""
    found = labels_path(path)
    if found is None:
        return None
    with reading(found, "it must hold a number per line"):
        words = found.read_text(encoding="utf-8").split()
    if wrong := [word for word in words if not (word.isascii() and word.isdigit())]:
        raise ValueError(f"{found} holds {wrong[0]!r:.40}, but must hold a number per line")
    return [int(word) for word in words]


def item_of(row, where):
    """The Item of one JSON object. Raises ValueError, with the place, if it is none."""
    for keys, make in FORMS:
        if set(keys) <= row.keys():
            try:
                return make(row, where)
            except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
                if isinstance(error, ValueError) and where in str(error):
                    raise
                raise ValueError(
                    f"{where} is no item with {' '.join(keys)} "
                    f"({type(error).__name__}: {str(error)[:80]}): correct it"
                ) from error
    known = "; ".join(" ".join(keys) for keys, _ in FORMS[:3])
    raise ValueError(f"{where} has {' '.join(sorted(row))[:200]}, but an item has {known}")


def choice(where, context, answers, gold):
    """An Item with one context and several answers, which follow it after a space."""
    answers = [check_text(answer, where) for answer in check_is(answers, where, list)]
    check_text(context, where)
    if type(gold) is not int or not 0 <= gold < len(answers) or len(answers) < 2:
        raise ValueError(
            f"{where}: gold={gold!r} must be the index of one of {len(answers)} answers "
            "(two or more): correct it"
        )
    pairs = [(context, ending_of(context, answer)) for answer in answers]
    return Item(where, pairs, gold, answers, "".join(pairs[gold]))


def ending_of(context, answer):
    """An answer as it follows the context: after a space, if nothing separates them yet."""
    return answer if not context or context[-1].isspace() else " " + answer


def check_text(value, where):
    """value, if it is a text that is not empty. Raises ValueError, with the place, if it is not."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {value!r:.40} must be a text that is not empty: correct it")
    return value


def query_item(row, where):
    return choice(where, row["query"], row["choices"], row["gold"])


def schema_item(row, where):
    """Several contexts with one ending: which context makes the ending likeliest?"""
    options = row["context_options"]
    if not isinstance(options, list) or len(options) < 2:
        raise ValueError(
            f"{where}: context_options={options!r:.40} must be a list of several texts: correct it"
        )
    contexts = [check_text(text, where) for text in options]
    ending, gold = check_text(row["continuation"], where), row["gold"]
    if type(gold) is not int or not 0 <= gold < len(contexts):
        raise ValueError(f"{where}: gold={gold!r} must be the index of a context: correct it")
    pairs = [(context, ending_of(context, ending)) for context in contexts]
    return Item(where, pairs, gold, [ending] * len(pairs), "".join(pairs[gold]))


def prediction_item(row, where):
    context, ending = check_text(row["context"], where), check_text(row["continuation"], where)
    pair = (context, ending_of(context, ending.lstrip()))
    return Item(where, [pair], None, [ending], "".join(pair))


def lambada_item(row, where):
    """LAMBADA: the last word of a passage is to be predicted."""
    context, space, word = check_text(row["text"], where).rpartition(" ")
    if not space or not word:
        raise ValueError(f"{where} must end in a word that follows a space: correct it")
    return Item(where, [(context, " " + word)], None, [word], row["text"])


def piqa_item(row, where):
    context = f"Question: {row['goal']}\nAnswer:"
    return choice(where, context, [row["sol1"], row["sol2"]], row["label"])


def hellaswag_item(row, where):
    def cleaned(text):
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [cleaned(text) for text in row["endings"]]
    return choice(where, cleaned(context), endings, int(row["label"]))


def arc_item(row, where):
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):  # the authors' own files; Hugging Face's have two lists
        choices = question["choices"]
        choices = {key: [entry[key] for entry in choices] for key in ("text", "label")}
        question = question["stem"]
    gold = choices["label"].index(row["answerKey"])
    return choice(where, f"Question: {question}\nAnswer:", choices["text"], gold)


def winogrande_item(row, where):
    """The blank is filled in two ways, and the rest of the sentence is scored after each."""
    before, _, after = row["sentence"].partition("_")
    contexts = [before + row["option1"], before + row["option2"]]
    gold, ending = int(row["answer"]) - 1, " " + after.strip()
    if gold not in (0, 1):
        raise ValueError(f"{where}: answer={row['answer']!r} must be 1 or 2: correct it")
    pairs = [(context, ending) for context in contexts]
    return Item(where, pairs, gold, [ending] * 2, "".join(pairs[gold]))


def copa_item(row, where):
    link = {"cause": "because", "effect": "therefore"}[row["question"]]
    context = f"{row['premise'].strip()[:-1]} {link}"
    answers = [text[0].lower() + text[1:] for text in (row["choice1"], row["choice2"])]
    return choice(where, context, answers, row["label"])


FORMS = [  # the keys of a row, and what makes an Item of it
    (("query", "choices", "gold"), query_item),
    (("context_options", "continuation", "gold"), schema_item),
    (("context", "continuation"), prediction_item),
    (("goal", "sol1", "sol2", "label"), piqa_item),
    (("ctx_a", "ctx_b", "endings", "label", "activity_label"), hellaswag_item),
    (("question", "answerKey"), arc_item),
    (("sentence", "option1", "option2", "answer"), winogrande_item),
    (("premise", "choice1", "choice2", "question", "label"), copa_item),
    (("text",), lambada_item),
]
