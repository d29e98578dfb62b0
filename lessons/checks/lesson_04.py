"""The exercises of lesson 04."""

import math

import torch
from desk import ask, exercise, expect, same

from model import apply_rope, rope_rotation


def rotated(x, position, w):
    """x (D,) at one position: channel i pairs with i + D / 2, in the dtype of x."""
    rotation = rope_rotation(torch.as_tensor(position) * w.to(x.dtype))
    return apply_rope(x, *rotation)


@exercise(
    "4.1",
    "Each pair contributes sin(t w) sin(s w) + cos(t w) cos(s w).",
    "That is cos((t - s) w) for each frequency; add them up.",
)
def product_at(answer):
    w = 100.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)  # (4,)
    for t, s in ((0, 0), (3, 1), (7, 7), (20, 5), (50, 47)):
        at_t, at_s = (torch.cat([(p * w).sin(), (p * w).cos()]) for p in (t, s))
        given = torch.as_tensor(ask(answer, t - s, w))
        expect(given.numel() == 1, f"one number is asked for, not {given.numel()}: add them up")
        where = f"for distance {t - s} it gave {given.item():.4f}"
        same(given.reshape(()), at_t @ at_s, f"{where}, and the product is {at_t @ at_s:.4f}")
    return "At distance 0 it is C / 2, its largest value."


@exercise(
    "4.2",
    "x1, x2 = x.chunk(2, dim=-1) are the first and the second channels of all pairs.",
    "angles = positions[:, None] * w is (T, D / 2), as x1 and x2 are.",
    "torch.cat([y1, y2], dim=-1) puts them back.",
)
def rotate(answer):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    w = 100.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    positions = torch.tensor([0, 1, 2, 7, 300])
    given = ask(answer, x, positions, w).double()
    expected = torch.stack([rotated(row, p, w) for row, p in zip(x, positions, strict=True)])
    backwards = torch.stack([rotated(row, -p, w) for row, p in zip(x, positions, strict=True)])
    expect(given.shape == x.shape, f"for x of shape (5, 8) it gave {tuple(given.shape)}")
    same(
        given[0],
        x[0],
        "at position 0 the row must come back unchanged: are the channels in their places (torch.cat)?",
    )
    expect(not torch.allclose(given, x), "nothing is rotated: each row has a position of its own")
    same(given.norm(dim=1), x.norm(dim=1), "a rotation keeps the length of each row")
    expect(not torch.allclose(given, backwards), "it rotates the other way: look at the signs")
    same(given, expected, "it is a rotation, but of other pairs: channel i pairs with i + D / 2")
    return "The same as apply_rope, for one head."


@exercise(
    "4.3",
    "Only the difference of the two rotations counts. So rotate one of the two, by n.",
    "Put the key at position 0, where nothing is rotated, and the query at position n.",
    "Do not forget to divide by the root of D.",
)
def score_at(answer):
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    w = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    for n in (0, 1, 5, 40):
        given = torch.as_tensor(ask(answer, q, k, n, w), dtype=torch.float64)
        expect(given.numel() == 1, "one number is asked for")
        reverse = rotated(q, 0, w) @ rotated(k, n, w) / 4
        is_reverse = n > 0 and torch.isclose(given, reverse)
        expect(not is_reverse, "here the key is n positions after the query: turn the angle round")
        for s in (0, 1, 13, 5000):
            score = rotated(q, s + n, w) @ rotated(k, s, w) / 4
            expect(not torch.isclose(given, 4 * score), "it is not divided by the root of D")
            expect(
                torch.isclose(given, score, atol=1e-8),
                f"a query at {s + n} and a key at {s} score {score:.5f}; it gave {given:.5f}",
            )
    return "The same for keys at 0, 1, 13 and 5,000, to 1e-8: distance alone decides."


@exercise(
    "4.4",
    "How many turns in 8,192 positions? 8,192 divided by the wavelength.",
    "4,096 makes 2 turns, so r = (2 - 1) / 3. The mixed frequency is r w + (1 - r) w / 8.",
    "Frequencies are mixed, not wavelengths; the wavelength is 2 pi over the result.",
)
def scaled_wavelengths(answer):
    expect(len(tuple(answer)) == 3, "a tuple of three numbers is asked for")
    first, second, third = map(float, answer)
    same(first, 1000.0, "a pair that turns 8.2 times in 8,192 positions stays as it is", 1e-3)
    same(third, 80_000.0, "a pair that turns 0.8 times has 1 / 8 of its frequency", 1e-3)
    r = 1 / 3
    mixed_wavelengths = r * 4096 + (1 - r) * 4096 * 8
    expect(
        not math.isclose(second, mixed_wavelengths, rel_tol=1e-3),
        "for 4,096, frequencies are mixed and not wavelengths",
    )
    same(second, 4096 / (r + (1 - r) / 8), "4,096 makes 2 turns: it gets a mix, r = 1 / 3", 1e-3)
    return "Together they keep the order: a slower pair stays slower."
