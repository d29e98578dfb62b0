"""The exercises of lesson 14."""

import torch
from desk import ask, exercise, expect, same

from glass.trace import switched_off
from model import GPT, GPTConfig


def small_model():
    """A random model whose heads matter: weights ten times as large as at the start of training."""
    torch.manual_seed(5)
    config = GPTConfig(vocab_size=11, block_size=12, n_layer=2, n_head=3, n_embd=24)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 10
    return model


@exercise(
    "14.1",
    "The token at position 25 stood n positions earlier too.",
    "25 - 20 = 5 is the earlier copy. The token after it is wanted.",
)
def looks_at(answer):
    expect(int(answer) != 5, "at 5 stands the earlier copy itself; what followed it?")
    expect(int(answer) != 26, "26 is what has to be predicted: it is not there yet")
    expect(int(answer) == 6, "25 - n is the earlier copy, and the next position follows it")
    return "In general t - n + 1: `head_badges` measures the weight at that place."


@exercise(
    "14.2",
    "t = torch.arange(n, 2 * n) are the rows; which column belongs to each?",
    "weights[t, t - n + 1].mean()",
)
def induction_score(answer):
    random = torch.Generator().manual_seed(1)
    weights = torch.rand(14, 14, generator=random).tril()
    t = torch.arange(7, 14)
    given = ask(answer, weights, 7)
    expect(torch.as_tensor(given).ndim == 0, "one number is asked for: take the mean")
    at_copy = weights[t, t - 7].mean()
    reason = "this is the weight on the earlier copy itself; the token after it is wanted"
    expect(not torch.isclose(torch.as_tensor(given), at_copy), reason)
    same(given, weights[t, t - 6].mean(), "take rows n to 2n - 1, and of row t column t - n + 1")
    return "`head_badges` does the same for all heads at once."


@exercise(
    "14.3",
    "The mask is (L, H + 1) bool: torch.zeros(len(model.blocks), model.config.n_head + 1) as bool.",
    "Inside `with switched_off(model, mask):` call model(idx[:, :-1], idx[:, 1:]), which gives "
    "(logits, loss).",
)
@torch.no_grad()
def loss_without(answer):
    model = small_model()
    idx = torch.randint(11, (3, 12), generator=torch.Generator().manual_seed(2))
    for layer, head in ((0, 2), (1, 1)):
        given = torch.as_tensor(ask(answer, model, idx, layer, head)).detach()
        whole = model(idx[:, :-1], idx[:, 1:])[1]
        mask = torch.zeros(2, 4, dtype=torch.bool)
        mask[layer, head] = True
        with switched_off(model, mask):
            expected = model(idx[:, :-1], idx[:, 1:])[1]
        reason = "this is the loss of the whole model: call it inside the `with`"
        expect(not torch.allclose(given, whole, atol=1e-6), reason)
        same(given, expected, f"with head {head} of layer {layer} off the loss is another")
    return "Heads and MLPs are switched by the same mask on the page of serve.py."


@exercise(
    "14.4",
    "The head never reads the stream as it is: what stands before it in GPT.hidden?",
    "model.head(model.final_norm(stream)) are the logits; softmax makes them probabilities.",
)
@torch.no_grad()
def lens_probability(answer):
    model = small_model()
    stream = 3 * torch.randn(24, generator=torch.Generator().manual_seed(3))
    given = torch.as_tensor(ask(answer, model, stream, 4))
    logits = model.head(model.final_norm(stream))
    unnormalised = model.head(stream).softmax(-1)[4]
    expect(given.ndim == 0, "one probability is asked for, that of the token")
    expect(not torch.isclose(given, unnormalised), "the final norm is missing")
    expect(not torch.isclose(given, logits[4]), "this is a logit: softmax makes it a probability")
    same(given, logits.softmax(-1)[4], "compare with the source of `lens`")
    return "At the last stage the lens is the model itself."
