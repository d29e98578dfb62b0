"""The exercises of lesson 05."""

from dataclasses import replace

import torch
from desk import ask, exercise, expect, same
from torch.nn import functional as F

from model import GPT, PRESETS


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
    summed = x / (x.square().sum(-1, keepdim=True) + 1e-5).sqrt()
    expect(
        not torch.allclose(given, summed, atol=1e-4),
        "divide by the root of the mean, not of the sum",
    )
    tiny = ask(answer, torch.full((1, 16), 1e-3))
    same(
        given,
        expected,
        "it differs from torch's rms_norm: take the mean of the squares over the last dimension alone",
    )
    same(tiny, F.rms_norm(torch.full((1, 16), 1e-3), (16,), eps=1e-5), "add eps under the root")
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
    "Not tied: another V C for the head, which has no bias. No biases of q, k, v: 3 C less a block.",
)
def count(answer):
    for name in ("gpt2", "gpt2-medium", "gpt2-xl"):
        shape = PRESETS[name]
        C, L = shape.n_embd, shape.n_layer
        for tied, qkv_bias in ((True, True), (False, True), (True, False), (False, False)):
            given = ask(answer, C, L, tied, qkv_bias)
            with torch.device("meta"):  # shapes without memory
                needed = GPT(replace(shape, tie_weights=tied, qkv_bias=qkv_bias)).parameter_count()
            off = given - needed
            where = f"for C={C}, L={L}, tied={tied}, qkv_bias={qkv_bias} it gave {given:,}"
            expect(off != -50257 * C, f"{where}: the head that is not tied adds V C")
            expect(off != -2 * C, f"{where}: the final norm is missing")
            expect(off != -1024 * C, f"{where}: the positions are missing")
            expect(off != 3 * L * C, f"{where}: three biases of C in each block are too many")
            expect(off == 0, f"{where}, {abs(off):,} too {'many' if off > 0 else 'few'}")
    return "The same as model.py counts, for three sizes."


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
