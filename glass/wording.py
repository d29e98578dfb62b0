"""A question in other words: phrasings of the dataset docs, as they stand or put together.

phrasings.py has the lists. Training gets them put together and changed in many ways, validation and
test as they stand.
"""

import re

from glass.phrasings import (
    ABOUT_IT,
    FOLLOW_UPS,
    JOINED,
    KEYWORD_FORMS,
    KEYWORDS,
    MET,
    N_TEST,
    NAMED,
    QUESTIONS,
    SAME,
    TAILS,
    WANTED,
    WANTS,
)

BARE_SHARE, NOISY_SHARE = 0.15, 0.4  # of training's phrasings; see training_phrasing
NAMED_SHARE, TAIL_SHARE, SAME_SHARE = 0.2, 0.2, 0.25  # see varied
KEYWORD_SHARE = 0.12  # see neat_phrasing
SAME_AS = {word: group for group in SAME for word in group}
LONG = "|".join(word for word in SAME_AS if " " in word)
WORDS = re.compile(rf"\b(?:{LONG}|[a-z']+)\b", re.IGNORECASE)


def phrasings(kind, split):
    """The phrasings of a kind of question that a split may use as they stand, a list."""
    every = FOLLOW_UPS if kind == "conversation" else QUESTIONS[kind]
    of_split = {
        "train": every[: -N_TEST - 1],
        "val": every[-N_TEST - 1 : -N_TEST],
        "test": every[-N_TEST:],
    }
    return of_split[split]


def training_phrasing(kind, words, rng):
    """A phrasing for training, drawn with rng; often with words in it that say nothing.

    A model that has only seen neat questions refuses a name that is asked for in strange ones. Words
    alone, around a name, ask what it does.
    """
    way = rng.random()
    if kind == "does" and way < BARE_SHARE:
        return with_words("{}", rng.randint(1, 6), words, rng) + rng.choice(("?", ".", ""))
    phrasing = varied(neat_phrasing(kind, rng), kind, rng)
    if way < NOISY_SHARE:
        phrasing = with_words(phrasing, rng.randint(1, 3), words, rng)
    return phrasing


def varied(phrasing, kind, rng):
    """A phrasing in other words now and then: its own exchanged, the name's place, its end."""

    def other(match):
        word = match.group()
        if word.lower() not in SAME_AS or rng.random() > SAME_SHARE:
            return word
        new = rng.choice(SAME_AS[word.lower()])
        return new[0].upper() + new[1:] if word[0].isupper() else new

    phrasing = WORDS.sub(other, phrasing)
    if rng.random() < TAIL_SHARE and not phrasing.endswith("{}"):
        end = phrasing[-1] if phrasing[-1] in "?." else ""
        phrasing = phrasing.removesuffix(end) + rng.choice(TAILS) + end
    if rng.random() < NAMED_SHARE and kind != "which":
        phrasing = phrasing.replace("{}", rng.choice(NAMED))
    return phrasing


def with_words(phrasing, n, words, rng):
    """A phrasing with n of the words put in anywhere."""
    parts = phrasing.split(" ")
    for _ in range(n):
        parts.insert(rng.randint(0, len(parts)), rng.choice(words))
    return " ".join(parts)


def neat_phrasing(kind, rng):
    """A phrasing of the lists, or one put together from parts that they have."""
    way = rng.random()
    if way > 1 - KEYWORD_SHARE and (kind in KEYWORDS or kind == "conversation"):
        form = "..." if kind == "conversation" else rng.choice(KEYWORD_FORMS)
        keyword = rng.choice(KEYWORDS["arguments" if kind == "conversation" else kind])
        return form.replace("...", keyword) + rng.choice(("?", "", "", "."))
    if way < 0.3 and kind in WANTED:
        return rng.choice(WANTS).replace("...", rng.choice(WANTED[kind]))
    if way < 0.6 and kind in ABOUT_IT:
        join, question = rng.choice(JOINED), rng.choice(ABOUT_IT[kind])
        if join == ". ":
            question = question[0].upper() + question[1:]
        return rng.choice(MET) + join + question
    return rng.choice(phrasings(kind, "train"))
