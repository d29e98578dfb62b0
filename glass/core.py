"""glassCORE: seven kinds of multiple choice, made from a seed, that need no download.

Each kind tests one ability that a small model may have, in ASCII, with 1,000 distinct items, and
has wrong answers that counting tokens or pairs of tokens does not tell from the right one. A score
is centred, as in DCLM's CORE (arXiv:2406.11794): (accuracy - chance) / (1 - chance), so that
guessing gives 0 and knowing gives 1.
"""

import functools
import math
import random
import re
from collections import Counter

from glass import sources
from glass.items import Item

N_ITEMS = 1000  # of each kind

NOUNS = "river stone cloud tiger paper engine window garden letter bridge doctor farmer".split()
OBJECTS = "table door box road house boat field lamp wall tree".split()
NAMES = "Ann Bob Eva Tom Mia Max Zoe Leo Ida Sam Amy Dan".split()
SENTENCE = re.compile(r"[A-Z][a-z][^.:\n]*(?:\n[^.:\n]+)*\.(?=\s)")
KEYS = "red blue green black white brown grey pink gold dark".split()


def item(kind, number, context, answers, gold):
    """An Item whose answers follow the context as they are, without a space between them."""
    pairs = [(context, answer) for answer in answers]
    return Item(f"{kind} {number}", pairs, gold, answers, "")


def shuffled(rng, right, wrong):
    """(answers, index of the right one): all in random order."""
    answers = [right, *wrong]
    rng.shuffle(answers)
    return answers, answers.index(right)


def copying(rng):
    """The second time, a list of words goes on as the first time. Wrong: its other words."""
    words = rng.sample(NOUNS, 4)
    context = f"{' '.join(words)}. {' '.join(words[:-1])}"
    wrong = [f" {word}" for word in words[:-1]]
    return context, *shuffled(rng, f" {words[-1]}", wrong)


def brackets(rng):
    """The bracket opened last is closed first. Wrong: what closes the others."""
    closing = {"(": ")", "[": "]", "{": "}"}
    opened = rng.sample(sorted(closing), 3)
    inner = [f"{rng.choice('abcxyz')}{rng.randint(0, 9)}" for _ in range(4)]
    text = f"{inner[0]} = {opened[0]}{inner[1]}, {opened[1]}{inner[2]}, {opened[2]}{inner[3]}"
    n_closed = rng.randint(0, 2)
    text += "".join(closing[bracket] for bracket in reversed(opened[3 - n_closed :]))
    right = closing[opened[2 - n_closed]]
    return text, *shuffled(rng, right, sorted(set(closing.values()) - {right}))


def agreement(rng):
    """A verb agrees with its subject, not with the noun before it. Wrong: the other number."""
    subject, other = rng.choice(NOUNS), rng.choice(OBJECTS)
    is_plural = rng.random() < 0.5
    link = rng.choice(["near", "behind", "beside", "with"])
    # the noun before the verb has the other number
    context = (
        f"The {subject}s {link} the {other}" if is_plural else f"The {subject} {link} the {other}s"
    )
    singular, plural = rng.choice([("is", "are"), ("was", "were"), ("has", "have"), ("does", "do")])
    rest = rng.choice([" not", " never", " always", " often"])
    right, wrong = (plural, singular) if is_plural else (singular, plural)
    return context, *shuffled(rng, f" {right}{rest}", [f" {wrong}{rest}"])


def arithmetic(rng):
    """A sum of two numbers below 50. Wrong: sums that are off by 1, 2 or 10."""
    a, b = rng.randint(2, 49), rng.randint(2, 49)
    wrong = [a + b + off for off in rng.sample([-10, -2, -1, 1, 2, 10], 3)]
    examples = "".join(f"{c} + {d} = {c + d}\n" for c, d in ((3, 4), (20, 15)))
    return f"{examples}{a} + {b} =", *shuffled(rng, f" {a + b}", [f" {n}" for n in wrong])


def formats(rng):
    """A line has the form of those before it. Wrong: what ends the line's other part."""
    closing = {"(": ")", "[": "]", "<": ">", "{": "}"}
    first, second = rng.sample(sorted(closing), 2)
    triples = [rng.sample(words, 4) for words in (NOUNS, KEYS, OBJECTS)]
    lines = [
        f"{noun} {first}{colour}{closing[first]} {second}{place}{closing[second]}\n"
        for noun, colour, place in zip(*triples, strict=True)
    ]
    cut, other = (first, second) if rng.random() < 0.5 else (second, first)
    last = lines[-1][: lines[-1].index(closing[cut])]
    return "".join(lines[:-1]) + last, *shuffled(rng, closing[cut], [closing[other]])


def recall(rng):
    """What stood beside a name before stands beside it again. Wrong: what stood beside others."""
    names, colours = rng.sample(NAMES, 4), rng.sample(KEYS, 4)
    told = ", ".join(f"{name} {colour}" for name, colour in zip(names, colours, strict=True))
    asked = rng.randrange(4)
    wrong = [f" {colour}" for colour in colours if colour != colours[asked]]
    return f"{told}. {names[asked]}", *shuffled(rng, f" {colours[asked]}", wrong)


@functools.cache
def documentation():
    """(training text, endings) of Python's documentation, split as prepare.py splits it.

    endings: (beginning, end) of sentences from the validation documents, by words in the end.
    """
    from prepare import PIECE, hash_share

    val_fraction = sources.SOURCES["pydoc"].val_fraction
    training, held_out = [], []
    for text in sources.pydoc_documents():
        is_held_out = hash_share(text[:PIECE]) < val_fraction
        (held_out if is_held_out else training).append(text)
    training = "\n".join(training)
    by_length = {}
    seen = set(SENTENCE.findall(training))
    for sentence in SENTENCE.findall("\n".join(held_out)):
        words = sentence.split()
        if 10 <= len(words) <= 30 and sentence not in seen:
            cut = len(words) * 2 // 3
            ending = " " + " ".join(words[cut:])
            by_length.setdefault(len(words) - cut, []).append((" ".join(words[:cut]), ending))
    return training, by_length


def endings(rng):
    """How a held-out sentence of Python's documentation goes on. Wrong: ends of other sentences."""
    by_length = {n: found for n, found in documentation()[1].items() if len(found) >= 4}
    lengths = sorted(by_length)
    n = rng.choices(lengths, [len(by_length[length]) for length in lengths])[0]
    (context, right), *others = rng.sample(by_length[n], 4)
    return context, *shuffled(rng, right, [ending for _, ending in others])


KINDS = {
    "copying": copying,
    "brackets": brackets,
    "agreement": agreement,
    "arithmetic": arithmetic,
    "formats": formats,
    "recall": recall,
    "endings": endings,
}


def core_items(kind, n=N_ITEMS, seed=1337):
    """n distinct Items of a kind, always the same for a seed."""
    rng, made, items = random.Random(f"{kind} {seed}"), set(), []
    while len(items) < n:
        context, answers, gold = KINDS[kind](rng)
        if len(set(answers)) == len(answers) and (context, tuple(sorted(answers))) not in made:
            made.add((context, tuple(sorted(answers))))
            items.append(item(kind, len(items) + 1, context, answers, gold))
    return items


def chance(items):
    """The expected accuracy of guessing."""
    return sum(1 / len(item.pairs) for item in items) / len(items)


def centred(accuracy, guessing):
    return (accuracy - guessing) / (1 - guessing)


# What counting alone gets, for comparison: characters of the text so far, or pairs of characters.


def bag_logprob(context, ending):
    """The log-probability of an ending if its characters are drawn from those of the context."""
    counts, total = Counter(context), len(context)
    return sum(math.log((counts[character] + 1) / (total + 128)) for character in ending)


@functools.cache
def pair_counts():
    """(counts of pairs, counts of characters) in the training part of Python's documentation."""
    text = documentation()[0]
    return Counter(zip(text, text[1:], strict=False)), Counter(text)


def bigram_logprob(context, ending):
    """The log-probability of an ending by the pairs of characters of Python's documentation."""
    pairs, singles = pair_counts()
    text = context[-1:] + ending
    return sum(
        math.log((pairs[pair] + 1) / (singles[pair[0]] + 128))
        for pair in zip(text, text[1:], strict=False)
    )


def counting_accuracy(items, logprob):
    """The accuracy of a way to count, by mean log-probability a character. Ties count as guesses."""
    right = 0.0
    for one in items:
        scores = [logprob(context, ending) / len(ending) for context, ending in one.pairs]
        best = [i for i, score in enumerate(scores) if score >= max(scores) - 1e-12]
        right += (one.gold in best) / len(best)
    return right / len(items)
