"""The exercises of lesson 11."""

import torch
from desk import ask, exercise, expect, same


@exercise(
    "11.1",
    "The last real position of a row is its length minus 1.",
    "hidden[torch.arange(B), lengths - 1]",
)
def last_vectors(answer):
    hidden = torch.arange(24.0).view(2, 4, 3)
    lengths = torch.tensor([2, 4])
    given = ask(answer, hidden, lengths)
    expect(tuple(given.shape) == (2, 3), f"its shape is {tuple(given.shape)}, not (2, 3)")
    expect(
        not torch.equal(given, hidden[:, -1]), "this is the last column: padding, for the first row"
    )
    same(given, torch.stack([hidden[0, 1], hidden[1, 3]]), "row 0 has two tokens: take position 1")
    return "As model.py's class_logits does."


@exercise(
    "11.2",
    "Precision: 72 of the 90 that were called spam. Recall: 72 of the 100 that are.",
    "F1: 2 * P * R / (P + R). The lazy filter is right in all that is not spam.",
)
def spam_figures(answer):
    precision, recall, f1, lazy = (float(x) for x in answer)
    expect(not (precision == 0.72 and recall == 0.8), "precision and recall are exchanged")
    same(precision, 0.8, "precision is 72 / 90")
    same(recall, 0.72, "recall is 72 / 100")
    expect(abs(f1 - 0.76) > 1e-4, "0.76 is the mean; F1 is the harmonic mean")
    same(f1, 2 * 0.8 * 0.72 / 1.52, "F1 is 2 P R / (P + R)", 1e-3)
    same(lazy, 0.9, "the lazy filter is right in 900 of 1,000")
    return "An accuracy of 0.9 without finding a single one."


@exercise("11.3", "A has 8 rows of 3,072, B has 768 rows of 8.", "8 * (768 + 3072)")
def lora_weights(answer):
    expect(answer != 8 * 768 * 3072, "the two thin matrices are counted, not their product")
    expect(answer == 8 * (768 + 3072), f"it is not {answer:,}")
    return "30,720 instead of 2,359,296: 1.3%."
