"""The dataset tasks: small instructions, each with one right answer that can be checked."""

import random

WORDS = (
    "apple river stone cloud tiger paper green seven light music bread chair dance eagle flame "
    "grape house ivory jelly knife lemon mouse night ocean piano queen robot sugar table uncle "
    "violin water yellow zebra basket candle dragon"
).split()

# Additional items of the training split, for the kinds that take a model the most examples to
# learn.
MORE_TASKS = {"add": 28_000, "subtract": 28_000, "sort": 14_000, "largest": 14_000}


def task_records(items_of_each_kind=2_500, more=6_000):
    """Yield small instructions with answers that can be checked.

    Each is a dict with the keys kind, instruction, input and output. First come equally many of
    each kind, then more for the training split, in unequal numbers.
    """
    rng, seen = random.Random(1337), set()

    def new_ones(kind, count):
        made = 0
        while made < count:
            instruction, given, answer = TASKS[kind](rng)
            if (instruction, given) not in seen:
                seen.add((instruction, given))
                made += 1
                yield {"kind": kind, "instruction": instruction, "input": given, "output": answer}

    for kind in TASKS:
        yield from new_ones(kind, items_of_each_kind)
    for kind in TASKS:
        yield from (
            {**record, "split": "train"} for record in new_ones(kind, MORE_TASKS.get(kind, more))
        )


# Each task draws (instruction, input, answer) with the random generator rng.


def some_words(rng, least, most):
    """A list of `least` to `most` random words."""
    return [rng.choice(WORDS) for _ in range(rng.randint(least, most))]


def reverse_task(rng):
    letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(4, 8)))
    return "Reverse the letters.", letters, letters[::-1]


def upper_task(rng):
    words = " ".join(some_words(rng, 4, 6))
    return "Write in upper case.", words, words.upper()


def count_task(rng):
    words = some_words(rng, 4, 8)
    return "Count the words.", " ".join(words), str(len(words))


def sort_task(rng):
    numbers = [rng.randint(0, 99) for _ in range(rng.randint(4, 6))]
    return "Sort the numbers.", " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))


def add_task(rng):
    a, b = rng.randint(0, 999), rng.randint(0, 999)
    return "Add the numbers.", f"{a} {b}", str(a + b)


def subtract_task(rng):
    a, b = sorted((rng.randint(0, 999), rng.randint(0, 999)), reverse=True)
    return "Subtract the second number from the first.", f"{a} {b}", str(a - b)


def largest_task(rng):
    numbers = [rng.randint(0, 999) for _ in range(rng.randint(3, 6))]
    return "Name the largest number.", " ".join(map(str, numbers)), str(max(numbers))


def last_task(rng):
    words = some_words(rng, 4, 8)
    return "Repeat the last word.", " ".join(words), words[-1]


def letters_task(rng):
    letter, word = rng.choice("abc"), "".join(rng.choices("abcdefg", k=rng.randint(6, 10)))
    return f"How often does the letter {letter} occur?", word, str(word.count(letter))


def initials_task(rng):
    words = some_words(rng, 4, 6)
    return (
        "Write the first letter of each word.",
        " ".join(words),
        "".join(word[0] for word in words),
    )


# Each draws from at least 10^5 possible items (37 words ^ 4, 26^4, 10^6 / 2 pairs of numbers ...).
TASKS = {
    "reverse": reverse_task,
    "upper": upper_task,
    "count": count_task,
    "sort": sort_task,
    "add": add_task,
    "subtract": subtract_task,
    "largest": largest_task,
    "last": last_task,
    "letters": letters_task,
    "initials": initials_task,
}
