"""The exercises of lesson 05."""

import torch
from desk import ask, exercise, expect, same
from torch.nn import functional as F


@exercise(
    "5.1",
    "The mean of the squares: x.square().mean(dim=-1, keepdim=True).",
    "Add eps to the mean square, then take the root.",
)
def rms_norm(answer):
    x = 2 * torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1)) + 1
    given, expected = ask(answer, x), F.rms_norm(x, (16,), eps=1e-5)
    centred = F.layer_norm(x, (16,), eps=1e-5)
    expect(given.shape == x.shape, f"for x of shape (3, 4, 16) it gave {tuple(given.shape)}")
    expect(not torch.allclose(given, centred, atol=1e-4), "this is LayerNorm: leave the mean in")
    tiny = ask(answer, torch.full((1, 16), 1e-3))
    same(given, expected, "it differs from torch's rms_norm: is the mean over the last dimension?")
    same(tiny, F.rms_norm(torch.full((1, 16), 1e-3), (16,), eps=1e-5), "eps goes under the root")
    return "One mean less than LayerNorm."


@exercise(
    "5.2",
    "A value is dropped to zero, or it is kept and divided by 1 - p.",
    "0.6 / 0.8 with probability 0.8.",
)
def after_dropout(answer):
    smaller, larger, mean = answer
    expect(smaller == 0, "a dropped value is zero")
    same(float(larger), 0.75, "a kept value is divided by 1 - 0.2")
    same(float(mean), 0.6, "dividing by 1 - p keeps the mean as it was")
    return "So the next layer need not know whether dropout was on."


@exercise(
    "5.3",
    "A linear layer of n inputs and m outputs has n m weights and m biases.",
    "Attention: four layers C to C. MLP: C to 4 C, and back. A norm: weight and bias of C.",
    "Not tied: another V C for the head, which has no bias.",
)
def count_gpt2(answer):
    tied, untied = ask(answer, True), ask(answer, False)
    expect(untied - tied == 50257 * 768, "the head that is not tied adds V C parameters")
    off = tied - 124_439_808
    expect(off != -2 * 768, "the final norm is missing")
    expect(off != -1024 * 768, "the positions are missing")
    expect(
        off == 0, f"tied it is {tied:,}, which is {abs(off):,} too {'many' if off > 0 else 'few'}"
    )
    return "124,439,808, as published."


@exercise(
    "5.4",
    "Keys and values: two matrices of C x 8 * 128. Queries and output: two of C x C.",
    "SwiGLU has three matrices of C x F. A block has two norms of C.",
    "The embedding and the head: 2 V C.",
)
def llama3_8b(answer):
    C, F, V = 4096, 14336, 128256
    block = 2 * C * C + 2 * C * 1024 + 3 * C * F + 2 * C
    expected = 32 * block + C + 2 * V * C
    expect(answer != expected - V * C, "the head is not tied: count its matrix too")
    expect(answer != expected - C, "the final norm is missing")
    full = 32 * (4 * C * C + 3 * C * F + 2 * C) + C + 2 * V * C
    expect(answer != full, "keys and values have 8 heads of 128 channels, not 32")
    expect(answer == expected, f"it is not {answer:,}; a block alone has {block:,}")
    return "8,030,261,248: this is the 8 in its name."
