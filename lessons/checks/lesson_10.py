"""The exercises of lesson 10."""

from desk import ask, exercise, expect, same

from glass.intervals import wilson


@exercise(
    "10.1",
    "acc takes the largest log-likelihood: the one nearest to 0.",
    "acc_norm: -6 / 10, -9 / 30, -8 / 16.",
)
def chosen(answer):
    by_sum, by_length = answer
    expect(by_sum == 0, "acc chooses the largest log-likelihood, and -6.0 is larger than -8.0")
    expect(by_length == 1, "the quotients are -0.6, -0.3 and -0.5; the largest is nearest to 0")
    return "A long answer that is good throughout can win only with the division."


@exercise(
    "10.2",
    "s = 0.8, n = 100, z = 1.96; z * z = 3.84.",
    "Numerator: 0.8 + 0.0192 plus or minus 1.96 * sqrt(0.0016 + 0.000096). Divide by 1.0384.",
)
def interval(answer):
    low, high = answer
    expect(abs(low - 0.722) > 1e-3, "0.722 to 0.878 is the normal approximation, without z * z / n")
    same([float(low), float(high)], list(wilson(80, 100)), "low or high is wrong", 2e-3)
    return "It is not symmetric: there is more room below 0.8 than above it."


@exercise("10.3", "1.96 * 0.5 / sqrt(n) = 0.01", "n = (1.96 * 0.5 / 0.01) ** 2")
def items_needed(answer):
    expect(abs(answer - 2401) > 1, "2,401 items give 0.02 to each side")
    same(float(answer), 9604.0, "it is (0.98 / 0.01) squared", 2e-3)
    return "Ten times as sure needs a hundred times as many items."


@exercise(
    "10.4",
    "Make the set of all tuples of n words of the text, and ask for each of the item's.",
    "words = text.lower().split()",
)
def shares_words(answer):
    text = "The old man went down to the sea and looked at the sky ."
    expect(ask(answer, "he went DOWN to the sea", text, 4), "case is not to matter")
    expect(not ask(answer, "he went to the sea down", text, 4), "the words must be in a row")
    expect(not ask(answer, "he old man went", text, 4), "`he` is not a word there: compare words")
    expect(not ask(answer, "under the sky .", text, 4), "four of its words must be in a row there")
    expect(not ask(answer, "went down", text, 4), "an item of fewer than n words shares none")
    expect(ask(answer, "at the sky .", text, 4), "the text's last n words count too")
    return "13 is long enough that ordinary phrases do not count."
