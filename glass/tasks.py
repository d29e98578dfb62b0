"""The datasets tasks and totals: small instructions, each with an answer that can be checked.

Sums and differences are worked out as on paper, digit by digit from the right, before the result:
"7+8=15, 4+8+1=13, 3+2+1=6: 635". A small model learns each of these steps in minutes, and the bare
result hardly at all, whose first digit depends on all carries.

Sums of three numbers are shown in two ways: one training row in three works them out, the others
name the bare result. The dataset totals holds such sums. `reward` counts their result only, so
reinforcing on them has something to find out: working it out pays.
"""

import random
import re

WORDS = (
    "apple river stone cloud tiger paper green seven light music bread chair dance eagle flame "
    "grape house ivory jelly knife lemon mouse night ocean piano queen robot sugar table uncle "
    "violin water yellow zebra basket candle dragon"
).split()

# Additional items of the training split, more of the kinds that take a model the most examples to
# learn.
MORE = dict.fromkeys("reverse upper count last initials".split(), 4_000)
MORE |= {"add": 8_000, "subtract": 8_000, "sort": 14_000, "largest": 14_000, "letters": 18_000}
TAUGHT_TOTALS, TOTALS = 18_000, 10_000  # rows of the dataset tasks, and of the dataset totals


def task_records(items_of_each_kind=2_500):
    """Yield small instructions with answers that can be checked.

    Each is a dict with the keys kind, instruction and output; the instruction is one line, as it is
    typed in a chat. First come equally many of each kind, then more for the training split, in
    unequal numbers, and sums of three numbers.
    """
    rng, seen = random.Random(1337), set()

    def new_ones(kind, count):
        made = 0
        while made < count:
            request, given, answer = TASKS[kind](rng)
            instruction = f"{request} {given}"
            if instruction not in seen:
                seen.add(instruction)
                made += 1
                yield {"kind": kind, "instruction": instruction, "output": answer}

    for kind in TASKS:
        yield from new_ones(kind, items_of_each_kind)
    for kind in TASKS:
        yield from ({**record, "split": "train"} for record in new_ones(kind, MORE[kind]))
    for i, numbers in enumerate(three_numbers(0, TAUGHT_TOTALS)):
        answer = worked_sum(numbers) if i % 3 == 0 else str(sum(numbers))
        yield {**total_record(numbers, answer), "split": "train"}


def total_records():
    """Yield sums of three numbers, none of which is in the dataset tasks, worked out."""
    for numbers in three_numbers(TAUGHT_TOTALS, TAUGHT_TOTALS + TOTALS):
        yield total_record(numbers, worked_sum(numbers))


def three_numbers(first, end):
    """Those from `first` to before `end` of a list of different triples of numbers."""
    rng, drawn = random.Random(1338), {}
    while len(drawn) < end:
        drawn[tuple(rng.randint(0, 999) for _ in range(3))] = None
    return list(drawn)[first:]


def total_record(numbers, answer):
    instruction = f"Add the three numbers. {' '.join(map(str, numbers))}"
    return {"kind": "total", "instruction": instruction, "output": answer}


def reward(prompt, answer):
    """1.0 if the last number of the answer is the sum of those of the prompt, else 0.0."""
    numbers = [int(number) for number in re.findall(r"\d+", prompt)]
    return float(re.findall(r"\d+", answer)[-1:] == [str(sum(numbers))])


def worked_sum(numbers):
    """The sum of numbers, digit by digit: (347, 288) -> "7+8=15, 4+8+1=13, 3+2+1=6: 635"."""
    steps, carried = [], 0
    for place in range(len(str(max(numbers)))):
        digits = [number // 10**place % 10 for number in numbers if place < len(str(number))]
        digits += [carried] if carried else []
        steps.append(f"{'+'.join(map(str, digits))}={sum(digits)}")
        carried = sum(digits) // 10
    return f"{', '.join(steps)}: {sum(numbers)}"


def worked_difference(a, b):
    """a - b, digit by digit: (635, 288) -> "15-8=7, 12-8=4, 5-2=3: 347"."""
    steps, borrowed = [], 0
    for place in range(len(str(a))):
        upper, lower = a // 10**place % 10 - borrowed, b // 10**place % 10
        borrowed = int(upper < lower)
        upper += 10 * borrowed
        steps.append(f"{upper}-{lower}={upper - lower}")
    return f"{', '.join(steps)}: {a - b}"


# Each task draws (request, what it is about, answer) with the random generator rng.


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
    return "Add the numbers.", f"{a} {b}", worked_sum((a, b))


def subtract_task(rng):
    a, b = sorted((rng.randint(0, 999), rng.randint(0, 999)), reverse=True)
    return "Subtract the second number from the first.", f"{a} {b}", worked_difference(a, b)


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
