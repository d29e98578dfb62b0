"""The exercises of lesson 02."""

import math
from types import SimpleNamespace

import torch
from desk import ask, exercise, expect, same
from torch.nn import functional as F

import bpe
import evaluate
from glass.score import text_logprobs
from model import GPT, GPTConfig


@exercise(
    "2.1",
    "The last window may start at N - T - 1 at the latest: T inputs and one more target follow.",
    "How many multiples of the stride lie from 0 to that place? // divides and rounds down.",
)
def n_windows(answer):
    for N, T, stride in ((10, 4, 4), (9, 4, 4), (8, 4, 4), (10, 4, 1), (5, 4, 3), (100, 7, 3)):
        given, needed = ask(answer, N, T, stride), len(range(0, N - T, stride))
        where = f"for N={N}, T={T}, stride={stride} it gave {given}"
        without_target = (N - T) // stride + 1
        expect(given == needed or given != without_target, f"{where}: the last target is missing")
        expect(given == needed, f"{where}, and there are {needed}")
        expect(isinstance(given, int), f"{where}, which is no integer: use //")
    return "With a stride of 1 there is one window for nearly every token, each of T predictions."


@exercise(
    "2.2",
    "-ln(1/2) is ln 2, -ln(1/4) is 2 ln 2. The loss is the mean of the three.",
    "Perplexity is e to the loss. Bits are the loss divided by ln 2.",
)
def three_measures(answer):
    loss, perplexity, bits = map(float, answer)
    arithmetic = -math.log((1 / 2 + 1 / 4 + 1 / 8) / 3)
    expect(abs(loss - arithmetic) > 1e-3, "take the mean of the logarithms, not of probabilities")
    same(
        loss,
        2 * math.log(2),
        "the loss in nats is the mean of ln 2, ln 4 and ln 8 (to three decimals)",
        1e-3,
    )
    same(perplexity, 4.0, "the perplexity is e to the loss in nats", 1e-3)
    same(bits, 2.0, "bits are nats divided by ln 2", 1e-3)
    return "On average like a choice among 4, which takes 2 bits."


@exercise(
    "2.3",
    "The sum of the losses, in bits, divided by the number of bytes of the text.",
    'len(text.encode("utf-8")) is the number of bytes.',
)
def bits_per_byte(answer):
    text = "Größe, Länge, Fläche: drei Maße für ein Stück Straße. "
    tokenizer = bpe.CharTokenizer.train(text)
    torch.manual_seed(2)
    config = GPTConfig(
        tokenizer.vocab_size, block_size=16, n_layer=0, n_head=1, n_embd=16, pos="rope"
    )
    loaded = SimpleNamespace(model=GPT(config).eval(), tokenizer=tokenizer)
    figures = evaluate.measure_text("text", loaded, [text], SimpleNamespace(stride=None))
    expected = {figure.metric: figure.value for figure in figures}
    losses = -text_logprobs(loaded.model, tokenizer, text)[1]
    given = float(ask(answer, losses, text))

    def near(value):
        return abs(given - value) < 1e-6

    in_nats = expected["bits_per_byte"] * math.log(2)
    expect(not near(expected["bits_per_character"]), "these are bits per character: count bytes")
    expect(not near(in_nats), "this is in nats: divide by ln 2")
    same(given, expected["bits_per_byte"], f"it gave {given:.4f}", 1e-6)
    return f"{given:.4f}, as evaluate.py says; per character it is higher."


@exercise(
    "2.4",
    "p = F.softmax(z, dim=0) are the probabilities.",
    "Subtract 1 at the place of the target: F.one_hot(torch.tensor(target), V).",
)
def logits_gradient(answer):
    generator = torch.Generator().manual_seed(4)
    for target in (0, 3):
        z = torch.randn(7, generator=generator, requires_grad=True)
        F.cross_entropy(z[None], torch.tensor([target])).backward()
        given = ask(answer, z.detach().clone(), target)
        same(torch.as_tensor(given).sum(), 0.0, "its entries must add up to 0")
        expect(not torch.allclose(given, -z.grad, atol=1e-5), "its sign is wrong")
        same(given, z.grad, "it differs from what backward gives")
    return "A logit is pushed down by its own probability, and the right one up by 1."
