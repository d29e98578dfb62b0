"""The dataset docs: what the functions and classes of Python's standard library do, as questions.

    python prepare.py docs

Everything is read from the source of this Python with `ast`; nothing is imported. A fact is what is
known of one function, class or method; questions ask for it in many phrasings, of which the last
ones are kept for the test alone. Names that do not exist are made from real ones.
"""

import ast
import random
import re
from collections import Counter
from dataclasses import dataclass

from glass.chat import messages_of
from glass.phrasings import POLITE
from glass.sources import ascii_text, python_sources
from glass.wording import phrasings, training_phrasing

LEFT_OUT = {"idlelib", "turtledemo", "distutils", "pydoc_data", "ensurepip", "encodings"}
# modules that users know by another name; None: the same functions for another system
KNOWN_AS = {"posixpath": "os.path", "genericpath": "os.path", "ntpath": None}
SHORTEST, LONGEST = 15, 160  # characters of a first sentence
LONGEST_ARGUMENTS = 80  # characters; longer ones are not asked for
N_OBJECTS = 2000  # the most used ones, unless prepare.py --objects says otherwise


@dataclass(frozen=True)
class Fact:
    """What is known of one function, class or method."""

    name: str  # as users write it: os.path.join
    module: str  # the module to import: os.path
    arguments: str | None  # as in its definition, without self: (a, *p); None: it is a property
    sentence: str  # the first one of its docstring
    uses: int  # how often the last part of its name occurs in the library's own source


# of the training phrasings of each kind, how many are asked about one thing: the harder, the more
ASKED = {"does": 7, "arguments": 8, "module": 8, "which": 6, "exists": 4}
TYPED_SHARE = 0.3  # of training questions as people type them: small letters, nothing at the end
POLITE_SHARE = 0.2
UNKNOWN_ASKED = ("does", "arguments", "exists")  # of names that do not exist
UNKNOWN_ROUNDS = 3  # for training; each makes up a name of every kind from each real one
BEFORE = "get get_ set_ is_ is to_ from_ add_ un re do_ a new_".split()
AFTER = "s er ed _all all _to _file dir list _name 2 _at one".split()
LONGEST_TALK = 240  # characters of several questions and answers in one conversation
LATER_SHARE = 0.1  # of the questions of the test: asked after another one too
VAL_SHARE = 0.2  # of what could be asked for validation


def read_facts():
    """The Facts of this Python's standard library, the most used first; ties by name."""
    trees, words = {}, Counter()
    for path, text, tree in python_sources():
        parts = [*path.parts[:-1], path.stem]
        if parts[-1] == "__init__":
            parts.pop()
        if parts and parts[0] not in LEFT_OUT and parts[-1] != "__main__":
            trees[".".join(parts)] = tree
        words.update(re.findall(r"[A-Za-z_]\w*", text))
    names = public_names(trees)
    facts = {}
    for module, tree in trees.items():
        for node in definitions(tree.body):
            full_name = names.get((module, node.name))
            if full_name is None:
                continue
            home = full_name.rpartition(".")[0]
            for name, each in with_methods(full_name, node):
                fact = fact_of(name, home, each, words)
                if fact and name not in facts:
                    facts[name] = fact
        for name, node in methods_of_an_instance(tree):
            if (module, name) not in names and not is_private(module):
                fact = fact_of(f"{module}.{name}", module, node, words)
                if fact:
                    facts[fact.name] = fact
    return sorted(facts.values(), key=lambda fact: (-fact.uses, fact.name))


def definitions(body):
    """The functions and classes of a module, those under an `if` or `try` included."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node
        elif isinstance(node, ast.If):
            yield from definitions([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from definitions([*node.body, *node.orelse])


def methods_of_an_instance(tree):
    """Yield (name, node) of what a module offers as functions and are methods of an object of its own.

    So has random: _inst = Random(), then shuffle = _inst.shuffle.
    """
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    methods = {}
    for node in tree.body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        name, value = node.targets[0].id, node.value
        if isinstance(value, ast.Call) and getattr(value.func, "id", None) in classes:
            of_class = definitions(classes[value.func.id].body)
            methods[name] = {each.name: each for each in of_class}
        elif isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
            found = methods.get(value.value.id, {}).get(value.attr)
            if found and not name.startswith("_"):
                yield name, found


def with_methods(name, node):
    """Yield (full name, node) of a function or class and of the public methods of a class."""
    yield name, node
    if isinstance(node, ast.ClassDef):
        for each in definitions(node.body):
            if not isinstance(each, ast.ClassDef) and not each.name.startswith("_"):
                yield f"{name}.{each.name}", each


def public_names(trees):
    """How users write each definition: a dict of (module, name) to the full name.

    A module that imports names from a private module, or a package that imports them from one of
    its own, offers them under its own, shorter name.
    """
    names = {}
    for module, tree in trees.items():
        shown = KNOWN_AS.get(module, module)
        if shown and not is_private(shown):
            for node in definitions(tree.body):
                if not node.name.startswith("_"):
                    names[module, node.name] = f"{shown}.{node.name}"
    for module, tree in sorted(trees.items()):
        if is_private(module) or module in KNOWN_AS:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            source = absolute(module, node, trees)
            if source not in trees or not (is_private(source) or source.startswith(module + ".")):
                continue
            for original, name in imported(node, trees[source]):
                offered = f"{module}.{name}"
                present = names.get((source, original))
                if present is None or offered.count(".") < present.count("."):
                    names[source, original] = offered
    return names


def is_private(module):
    return any(part.startswith("_") for part in module.split("."))


def absolute(module, node, trees):
    """The full name of the module that `from ... import` names."""
    if not node.level:
        return node.module
    is_package = any(other.startswith(module + ".") for other in trees)
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def imported(node, tree):
    """Yield (name there, name here) of what `from ... import` takes from the module of a tree."""
    for alias in node.names:
        if alias.name != "*":
            name = alias.asname or alias.name
            if not name.startswith("_"):
                yield alias.name, name
            continue
        listed = listed_names(tree)
        for each in definitions(tree.body):
            if each.name in listed if listed else not each.name.startswith("_"):
                yield each.name, each.name


def listed_names(tree):
    """The names in a module's __all__, as far as they are written out."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            if isinstance(node.value, (ast.List, ast.Tuple)):
                return {getattr(element, "value", None) for element in node.value.elts}
    return set()


def fact_of(name, module, node, words):
    """The Fact of a definition, or None where its docstring has no usable first sentence."""
    sentence = first_sentence(ast.get_docstring(node) or "")
    if not sentence:
        return None
    return Fact(name, module, arguments_of(node), sentence, words[name.rpartition(".")[2]])


def first_sentence(doc):
    """The first sentence of a docstring on one line, or "" where it does not serve as an answer."""
    paragraph = " ".join(ascii_text(doc).split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0].rstrip(".")
    is_call = re.match(r"[\w.]+\(", sentence)  # it begins with how to call it
    is_prose = len(sentence.split()) >= 3 and sentence[:1].isalpha() and not is_call
    is_whole = (
        not sentence.endswith((":", ",", ";", " e.g", " i.e", " etc")) and "->" not in sentence
    )
    if SHORTEST <= len(sentence) <= LONGEST and is_prose and is_whole:
        return sentence + "."
    return ""


def arguments_of(node):
    """The arguments of a function, or of a class's __init__, as text: without self and types.

    None for a property.
    """
    if any(getattr(each, "id", "").endswith("property") for each in node.decorator_list):
        return None
    if isinstance(node, ast.ClassDef):
        found = [each for each in definitions(node.body) if each.name == "__init__"]
        if not found:
            return "()"
        node, is_method = found[0], True
    else:
        first = [*node.args.posonlyargs, *node.args.args][:1]
        is_method = bool(first) and first[0].arg in ("self", "cls")
    args = node.args
    for each in ast.walk(args):
        if isinstance(each, ast.arg):
            each.annotation = None
    text = ascii_text(ast.unparse(args))
    if is_method:
        text = text.partition(",")[2].strip().removeprefix("/").removeprefix(", ")
    return f"({text})"


# Questions and answers.


def docs_records(objects=N_OBJECTS, seed=1337):
    """Yield the questions about the `objects` most used Facts, with their answers and splits.

    A negative number takes the least used ones. Each row is a dict with the keys kind, instruction,
    output and split, or kind, messages and split.
    People ask one thing after another, so most questions for training stand in conversations, of
    which all answers are learned.
    """
    rng = random.Random(seed)
    rows = list(single_questions(objects, rng))
    training = [row for row in rows if row["split"] == "train"]
    rng.shuffle(training)
    yield from joined(training, rng)
    for row in rows:
        if row["split"] != "train":
            yield row
        if row["split"] == "test" and row["kind"] in ("does", "arguments", "module"):
            if rng.random() < LATER_SHARE:
                before = messages_of(rng.choice(training), "markers")
                both = [*before, *messages_of(row, "markers")]
                yield {"kind": "later", "messages": both, "split": "test"}


def joined(rows, rng):
    """Yield rows, some by themselves, others one after another in conversations."""
    waiting, wanted = [], 1
    for row in rows:
        messages = messages_of(row, "markers")
        length = sum(len(message["content"]) for message in [*waiting, *messages])
        if waiting and (len(waiting) >= 2 * wanted or length > LONGEST_TALK):
            yield {"kind": "several", "messages": waiting, "split": "train"}
            waiting, wanted = [], rng.choice((1, 2, 2, 3, 3))
        waiting = [*waiting, *messages]
    yield {"kind": "several", "messages": waiting, "split": "train"}


def single_questions(objects, rng):
    """Yield rows, a question each, or a question and what is then asked about its answer."""
    every = read_facts()
    facts = every[:objects] if objects > 0 else every[objects:]
    shared = Counter(asked_as("which", fact) for fact in every)
    shared.update(asked_as("module", fact) for fact in every)
    words = sorted({each for fact in every for each in re.findall(r"\b[a-z]{2,}\b", fact.sentence)})
    for fact in facts:
        for kind, answer in answers_of(fact):
            asked = asked_as(kind, fact)
            if shared[asked] <= 1:  # else it has several answers
                yield from phrased(kind, asked, answer, words, rng)
        if fits(fact.arguments):
            yield from conversations(fact, words, rng)
    for name, kind, split in made_up_names(facts, {fact.name for fact in every}, rng):
        phrasing = one_phrasing(rng.choice(UNKNOWN_ASKED), split, words, rng)
        if split == "train":
            phrasing = typed(phrasing, rng)
        yield row(kind, phrasing.format(name), f"I do not know {name}.", split)


def answers_of(fact):
    """(kind of question, answer) of all that can be asked about a Fact."""
    yield "does", fact.sentence
    if fits(fact.arguments):
        yield "arguments", fact.arguments
    yield "module", f"{fact.module}."
    if len(fact.sentence.split()) >= 5:
        yield "which", f"{fact.name}."
    yield "exists", f"Yes, in {fact.module}."


def fits(arguments):
    return arguments is not None and len(arguments) <= LONGEST_ARGUMENTS


def asked_as(kind, fact):
    """What a question says of a Fact: its name, its name without the module, or what it does.

    The last is its sentence without the first word, as someone who looks for the name says it.
    """
    if kind == "which":
        return fact.sentence.partition(" ")[2]
    if kind == "module":
        return fact.name.removeprefix(fact.module + ".")
    return fact.name


def row(kind, question, answer, split):
    return {"kind": kind, "instruction": question, "output": answer, "split": split}


def typed(phrasing, rng):
    """A phrasing as it stands or, now and then, as people type it."""
    if rng.random() < TYPED_SHARE and not phrasing.startswith("{}"):
        phrasing = phrasing[0].lower() + phrasing[1:].rstrip("?.")
    if rng.random() < POLITE_SHARE:
        phrasing = rng.choice(POLITE).replace("...", phrasing)
    return phrasing


def one_phrasing(kind, split, words, rng):
    """A phrasing of a kind of question for a split, drawn with rng; words: see training_phrasing."""
    if split == "train":
        return training_phrasing(kind, words, rng)
    return rng.choice(phrasings(kind, split))


def phrased(kind, asked, answer, words, rng):
    """Yield the rows of a question: in some phrasings for training, in each for the test."""
    for split in ("train", "val", "test"):
        chosen = phrasings(kind, split)
        if split == "train":
            drawn = [training_phrasing(kind, words, rng) for _ in range(ASKED[kind])]
            chosen = [typed(phrasing, rng) for phrasing in drawn]
        elif split == "val" and rng.random() > VAL_SHARE:
            continue
        for phrasing in chosen:
            yield row(kind, phrasing.format(asked), answer, split)


def conversations(fact, words, rng):
    """Yield conversations of two turns, the second about the arguments of what the first named."""
    for split in ("train", "train", "test"):
        said = (
            ("user", one_phrasing("does", split, words, rng).format(fact.name)),
            ("assistant", fact.sentence),
            ("user", one_phrasing("conversation", split, words, rng)),
            ("assistant", fact.arguments),
        )
        messages = [{"role": role, "content": content} for role, content in said]
        yield {"kind": "conversation", "messages": messages, "split": split}


def made_up_names(facts, known, rng):
    """Yield (name, kind, split) of names that do not exist, made from real ones.

    unknown: the module of one and the last part of another, two last parts joined or blended, a
    letter left out or doubled, something put before or after, two words of names joined; no name is
    in two splits. "unknown word" and "unknown letters" are for the test alone: the last part
    replaced by a word of a sentence, or two neighbouring letters exchanged.
    """
    last_parts = [fact.name.rpartition(".")[2] for fact in facts]
    words = sorted({word for fact in facts for word in re.findall(r"[a-z]{4,}", fact.sentence)})
    name_words = sorted({word for last in last_parts for word in re.findall(r"[a-z]{3,}", last)})
    made = set()
    for fact in facts:
        home, _, last = fact.name.rpartition(".")
        i = rng.randrange(max(1, len(last) - 1))
        begin, here, after, rest = last[:i], last[i : i + 1], last[i + 1 : i + 2], last[i + 2 :]
        candidates = [(rng.choice(words), "unknown word", "test")]
        candidates.append((begin + after + here + rest, "unknown letters", "test"))
        splits = (*[("train", 1)] * UNKNOWN_ROUNDS, ("test", 0.5), ("val", VAL_SHARE / 2))
        for split, share in splits:
            other = rng.choice(last_parts)
            for last_part in (
                last[: rng.randint(1, len(last))] + other[rng.randrange(len(other)) :],
                rng.choice(BEFORE) + last,
                last + rng.choice(AFTER),
                rng.choice(last_parts),
                last + rng.choice(last_parts),
                f"{last}_{rng.choice(last_parts)}",
                f"{rng.choice(name_words)}_{rng.choice(name_words)}",
                begin + after + rest,
                begin + here + here + after + rest,
            ):
                if rng.random() < share:
                    candidates.append((last_part, "unknown", split))
        for last_part, kind, split in candidates:
            name = f"{home}.{last_part}"
            if last_part and name not in known and name not in made:
                made.add(name)
                yield name, kind, split
