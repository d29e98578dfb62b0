"""The exercises of lesson 12."""

import torch
from desk import ask, exercise, expect, same
from torch.nn import functional as F


@exercise(
    "12.1",
    "The template writes the marker before the answer, so the model never has to.",
    "Each turn has three tokens: user 0 0 0, assistant 0 1 1.",
)
def flags(answer):
    answer = [int(flag) for flag in answer]
    expect(len(answer) == 12, f"four turns of three tokens are 12 flags, not {len(answer)}")
    expect(answer[3] == 0, "the marker before the answer is written by the template, not the model")
    expect(answer[5] == 1, "the end of the answer counts: the model has to write it")
    expect(answer == [0, 0, 0, 0, 1, 1] * 2, "both answers count, and nothing that the user says")
    return "In a conversation all answers are learned in one pass."


@exercise(
    "12.2",
    "logprobs = F.log_softmax(logits, dim=-1); gather those of the targets.",
    "Choose by counts before you take the mean.",
)
def masked_loss(answer):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 5, generator=generator)
    targets = torch.tensor([0, 3, 2, 4, 1, 1])
    counts = torch.tensor([False, False, True, True, False, True])
    given = ask(answer, logits, targets, counts)
    expected = F.cross_entropy(logits[counts], targets[counts])
    every = F.cross_entropy(logits, targets, reduction="none")
    tolerance = 1e-4
    expect(abs(float(given) - float(every.mean())) > tolerance, "this is the mean over all targets")
    spread = float((every * counts).mean())
    expect(abs(float(given) - spread) > tolerance, "divide by how many count, not by T")
    same(float(given), float(expected), "it differs from cross_entropy of the rows that count")
    return "In finetune.py the sum over a step is divided by what the whole step counts."


@exercise("12.3", "text.startswith(wanted)", "sum(...) / len(texts)")
def begins_right(answer):
    texts, wanted = ["BADBAD", "dab", "xBAD", "HE", "HEX"], ["BAD", "dab", "BAD", "HEAD", "HEAD"]
    given = ask(answer, texts, wanted)
    expect(given != 0.2, "this is the exact match")
    expect(given != 0.6, "the wanted text must be at the beginning")
    same(float(given), 0.4, "two of the five begin with the wanted text")
    return "It would give such a model nearly full marks. Exact match sees that it never stops."
