"""The exercises of lesson 13."""

import math

import torch
from desk import ask, exercise, expect, same


@exercise(
    "13.1",
    "The probability is 1 / (1 + exp(-(1.5 - 0.5))).",
    "The other way round: ln(0.9 / 0.1).",
)
def bradley_terry(answer):
    probability, difference = answer
    expect(abs(probability - 0.75) > 1e-3, "1.5 / (1.5 + 0.5) is for strengths, not for scores")
    same(float(probability), 1 / (1 + math.exp(-1)), "the probability is sigma(1)", 1e-3)
    same(float(difference), math.log(9), "the difference is ln(0.9 / 0.1)", 1e-3)
    return "Each step of about 2.2 makes the odds nine times as high."


@exercise(
    "13.2",
    "torch.where(p > 0, ...) chooses after both sides are computed: 0 * -inf is NaN, and is left out.",
    "torch.xlogy(p, p) is 0 where p is 0.",
)
def kl(answer):
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    given = float(ask(answer, p, q))
    expect(not math.isnan(given), "it gives NaN where p is 0")
    expect(abs(given + math.log(2)) > 1e-4, "the sign: ln(p / q), not ln(q / p)")
    same(given, math.log(2), "for p = (1/2, 1/2, 0) and q = (1/4, 1/4, 1/2) it is ln 2", 1e-4)
    same(float(ask(answer, q, q)), 0.0, "of a distribution with itself it is 0", 1e-6)
    both = float(ask(answer, p, p.clone()))
    expect(not math.isnan(both), "it gives NaN where p and q are both 0")
    same(both, 0.0, "of a distribution with itself it is 0, zeros included", 1e-6)
    return "Where q is 0 and p is not, it is infinite: the reference would never say that."


@exercise(
    "13.3",
    "First pair: gains of 2 and -5. Second pair: gains of 0 and 4.",
    "Margins 0.1 * 7 and 0.1 * -4; the loss is ln(1 + exp(-margin)).",
)
def dpo_losses(answer):
    first, second = answer
    without = math.log(1 + math.exp(-1.0))
    expect(abs(first - without) > 1e-3, "subtract the reference's log-probabilities")
    same(
        float(first),
        math.log(1 + math.exp(-0.7)),
        "the first loss is ln(1 + exp(-0.7)), to three decimals",
        1e-3,
    )
    same(
        float(second),
        math.log(1 + math.exp(0.4)),
        "the second loss is ln(1 + exp(0.4)), to three decimals",
        1e-3,
    )
    return "The second is above ln 2: that pair went the wrong way."


@exercise(
    "13.4",
    "Mean 0.75; the deviations are 0.25, 0.25, 0.25, -0.75.",
    "Standard deviation: the root of (3 * 0.0625 + 0.5625) / 4.",
)
def group_advantages(answer):
    mixed, alike = answer
    expect(
        max(abs(x) for x in alike) == 0, "where all rewards are alike, no answer is above the mean"
    )
    expect(abs(mixed[3] + 1.5) > 1e-3, "-1.5 is with a division by 3 instead of 4")
    expected = [0.25 / math.sqrt(0.1875)] * 3 + [-0.75 / math.sqrt(0.1875)]
    same([float(x) for x in mixed], expected, "0.577 three times, and -1.732", 1e-2)
    return "A group whose rewards are all alike teaches nothing."
