"""The exercises of lesson 03."""

import torch
from desk import ask, exercise, expect, same

from model import GPT, GPTConfig, causal_mask


@exercise(
    "3.1",
    "torch.cumsum(x, dim=0) gives the running sum.",
    "How many positions are in row t? A tensor (T, 1) of 1, 2, ... T divides every channel.",
)
def past_mean(answer):
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    given = ask(answer, x)
    expected = torch.stack([x[: t + 1].mean(dim=0) for t in range(7)])
    shape = tuple(torch.as_tensor(given).shape)
    expect(shape == (7, 3), f"for x of shape (7, 3) it gave {shape}")
    same(given[:1], x[:1], "row 0 has a past of one position, itself, so it stays as it is")
    same(given, expected, "row 0 is right and a later one is not: divide row t by t + 1")
    return "It costs T additions a channel, where the triangle costs T * T."


@exercise(
    "3.2",
    "The variance of a sum of independent products is the sum of their variances.",
    "Each product has variance 4 * 1, and there are 64 of them. Divide by a standard deviation.",
)
def divisor(answer):
    expect(float(answer) != 8, "8 is the root of 64: that is for queries of variance 1")
    expect(float(answer) != 256, "256 is the variance of a score; what is its standard deviation?")
    same(answer, 16.0, "the variance of a score is 64 * 4")
    return "QK-norm (qk_norm in model.py) avoids the question: it sets the size of every query and key."


@exercise(
    "3.3",
    "Keys and values: two numbers for each channel of each head.",
    "2 (keys, values) * layers * heads * D * positions * 2 bytes.",
)
def cache_bytes(answer):
    is_pair = isinstance(answer, tuple | list) and len(answer) == 2
    expect(is_pair, "a tuple of two numbers is asked for")
    few, many = answer
    expected = 2 * 32 * 8 * 128 * 8192 * 2
    expect(2 * few != expected, "this is half of it: keys and values are both kept")
    same(float(few), float(expected), f"with 8 heads it is not {few:,}")
    same(float(many), 4.0 * expected, "with 32 heads it is four times as much as with 8")
    return "1 GiB against 4 GiB, for one sequence."


@exercise(
    "3.4",
    "q = attention.q_proj(x).view(T, H, D).transpose(0, 1) is (H, T, D).",
    "Scores (H, T, T), plus causal_mask(torch.arange(T), T), softmax over the last dimension.",
    "Join the heads by transpose(0, 1).reshape(T, C), then o_proj.",
)
def attend(answer):
    torch.manual_seed(3)
    config = GPTConfig(vocab_size=9, block_size=8, n_layer=1, n_head=4, n_embd=24)
    attention = GPT(config).blocks[0].attn.eval()
    x = torch.randn(8, 24)
    with torch.no_grad():
        given = ask(answer, x, attention)
        mask = causal_mask(torch.arange(8), 8)
        expected = attention(x[None], torch.arange(8), None, mask)[0]
        open_to_all = attention(x[None], torch.arange(8), None, None)[0]
        projection, attention.o_proj = attention.o_proj, torch.nn.Identity()
        before_projection = attention(x[None], torch.arange(8), None, mask)[0]
        attention.o_proj = projection
        attention.q_proj.weight *= 6**0.5  # D = 6
        unscaled = attention(x[None], torch.arange(8), None, mask)[0]
    shape = tuple(given.shape)
    expect(shape == (8, 24), f"for x of shape (8, 24) it gave {shape}")
    expect(not torch.allclose(given, open_to_all, atol=1e-5), "it looks ahead: add the mask")
    too_early = torch.allclose(given, before_projection, atol=1e-5)
    expect(not too_early, "it is right before o_proj: apply o_proj")
    expect(not torch.allclose(given, unscaled, atol=1e-5), "divide the scores by the root of D")
    same(
        given,
        expected,
        "are the channels split into heads, view(T, H, D).transpose(0, 1), and joined again?",
    )
    return "This is the whole of attention."
