"""The exercises of lesson 08."""

from desk import ask, exercise, expect, same


@exercise(
    "8.1",
    "The ratio of two probabilities is exp of the difference of their logits.",
    "exp(0.8 / temperature) = e",
)
def temperature(answer):
    expect(abs(answer - 1.25) > 1e-6, "1.25 is the other way round: logits are divided")
    same(float(answer), 0.8, "0.8 / temperature must be 1")
    return "Ratios of probabilities are differences of logits."


@exercise(
    "8.2",
    "top-k 4 keeps the first four. How much probability have the first three together?",
    "A token is kept while those likelier than it hold less than p.",
    "probs.cumsum(0)[2] is 0.8328...",
)
def smallest_p(answer):
    import torch

    logits = torch.tensor([4.0, 3.2, 2.6, 2.2, 1.5, 1.0, 0.4, -0.5, -1.5, -3.0])
    held = torch.softmax(logits, dim=0).cumsum(0)
    first_three, first_four = held[2].item(), held[3].item()
    if answer <= first_three:
        expect(False, f"with p = {answer} three tokens are enough: they hold {first_three:.4f}")
    expect(answer <= first_four, f"with p = {answer} a fifth token is kept too")
    smallest = int(first_three * 100) / 100 + 0.01
    same(float(answer), smallest, f"{answer} keeps the four, and a smaller p does so as well")
    return f"The first three hold {first_three:.4f}, the first four {first_four:.4f}."


@exercise(
    "8.3",
    "With the cache: the prompt, and one position for each further token.",
    "The last token that is written does not go through the model.",
    "Without it: prompt + (prompt + 1) + ... , n terms.",
)
def positions_computed(answer):
    cached = ask(answer, 10, 5, True)
    expect(cached != 15, "the last new token need not go through the model: nothing follows it")
    expect(cached == 14, f"a prompt of 10 and 5 new tokens: 10 + 4 with the cache, not {cached}")
    expect(ask(answer, 3, 20, True) == 22, "a prompt of 3 and 20 new tokens: 3 + 19 with the cache")
    plain = ask(answer, 10, 5, False)
    expect(plain == 60, f"without it: 10 + 11 + 12 + 13 + 14, not {plain}")
    expect(ask(answer, 1, 100, False) == 5050, "for a prompt of 1 and 100 tokens it is wrong")
    return "For 1,000 tokens it is a factor of 500."


@exercise(
    "8.4",
    "A step is the largest value / 127, and rounding is off by at most half a step.",
    "2.54 / 127 / 2",
)
def rounding_errors(answer):
    without, with_outlier = answer
    expect(abs(without - 0.02) > 1e-9, "0.02 is a whole step; the nearest one is half of it away")
    same(float(without), 0.01, "half of 2.54 / 127")
    same(float(with_outlier), 0.1, "with the outlier a step is 25.4 / 127")
    return (
        "One outlier makes the whole row ten times as coarse: so each row has a scale of its own."
    )
