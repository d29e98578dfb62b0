"""The exercises of lesson 09."""

import torch
from desk import ask, exercise, expect, same
from safetensors.torch import save

from model import apply_rope


@exercise(
    "9.1",
    "The header is read as in the cell above; header[name] has data_offsets and shape.",
    "begin, end = header[name]['data_offsets']; the numbers begin at 8 + n_header.",
    "Give the tensor its shape: .view(header[name]['shape']).",
)
def read_tensor(answer):
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(2, n, generator=generator) for name, n in (("a", 3), ("b", 4), ("c", 2))
    }
    data = save(tensors)
    for name, tensor in tensors.items():
        given = ask(answer, data, name)
        expect(given.numel() == tensor.numel(), f"tensor {name} has {tensor.numel()} numbers")
        expect(
            torch.equal(given.flatten(), tensor.flatten()),
            "these are other numbers: offsets are counted from the end of the header",
        )
        same(given, tensor, "the numbers are right, their order is not")
    return "That is all a loader needs: no class, no code, only offsets."


@exercise(
    "9.2",
    "c_attn is (C, 3C) for three matrices of C x C.",
    "up_proj goes from C = 32 to 4C = 128 channels, and Linear keeps (out, in).",
)
def our_shapes(answer):
    answer = [tuple(shape) for shape in answer]
    expect(len(answer) == 4, f"four shapes are asked for, not {len(answer)}")
    expect(answer[0] != (96, 32), "q_proj is only a third of c_attn")
    expect(answer[2] != (32, 128), "that is how the file has up_proj; Linear keeps (out, in)")
    expect(answer[3] == (50, 32), "an embedding is a table with a row for each token, in both")
    expect(answer == [(32, 32), (32, 32), (128, 32), (50, 32)], "look at C and at what each does")
    return (
        "Only up_proj and down_proj change their shape. The square ones hide their transposition."
    )


@exercise(
    "9.3",
    "c_attn.chunk(3, dim=1) gives the three blocks of columns.",
    "Transpose each: .T",
)
def split_qkv(answer):
    c_attn = torch.arange(48.0).view(4, 12)
    given = ask(answer, c_attn)
    expect(len(given) == 3, f"three matrices are asked for, not {len(given)}")
    q = given[0]
    expect(tuple(q.shape) == (4, 4), f"q has the shape {tuple(q.shape)}, not (4, 4)")
    expect(not torch.equal(q, c_attn[:, :4]), "the columns are right, but nothing is transposed")
    for i, (name, part) in enumerate(zip("qkv", given, strict=True)):
        same(part, c_attn[:, 4 * i : 4 * i + 4].T, f"{name} is not columns {4 * i} to {4 * i + 3}")
    return "q of x is x @ c_attn[:, :C]; nn.Linear computes x @ weight.T."


@exercise(
    "9.4",
    "A forgotten transpose shows only if the two sides differ.",
    "Which of them is square?",
)
def silent(answer):
    answer = {name.removeprefix("h.*.") for name in answer}
    expect("mlp.c_proj" not in answer, "mlp.c_proj is (4C, C): its two sides differ")
    expect("attn.c_attn" not in answer, "attn.c_attn is (C, 3C): its two sides differ")
    expect(answer == {"attn.c_proj"}, "only a square matrix loads either way")
    return "It moves the logits as far as anything in the picture, and no shape tells."


@exercise(
    "9.5",
    "View the rows as (n_head, D / 2, 2, C): the third index says which of a pair.",
    "Exchange the second and the third index, and reshape back.",
)
def to_halves(answer):
    n_head, D, C, T = 3, 8, 5, 7
    generator = torch.Generator().manual_seed(4)
    rows = torch.arange(24.0)[:, None].expand(24, C)
    given = ask(answer, rows.clone(), n_head)
    expect(tuple(given.shape) == (24, C), "the shape must stay (H x D, C)")
    expect(
        given[:8, 0].tolist() != [0, 2, 4, 6, 8, 10, 12, 14],
        "the heads are mixed: reorder within each head alone",
    )
    first = [int(row) for row in given[:8, 0]]
    expect(first == [0, 2, 4, 6, 1, 3, 5, 7], f"the rows 0 to 7 of head 0 become {first}")
    q, k = (torch.randn(n_head * D, C, generator=generator) for _ in range(2))
    x = torch.randn(T, C, generator=generator)
    angle = torch.arange(T)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])  # (T, D / 2)
    cos, sin = angle.cos(), angle.sin()

    def by_neighbours(w):  # as Meta's code rotates
        pairs = (x @ w.T).view(T, n_head, D // 2, 2)
        a, b, c, s = pairs[..., 0], pairs[..., 1], cos[:, None], sin[:, None]
        return torch.stack([a * c - b * s, a * s + b * c], dim=-1).view(T, n_head, D)

    def by_halves(w):  # as ours does
        heads = (x @ ask(answer, w, n_head).T).view(1, T, n_head, D)
        both = torch.cat([cos, cos], 1)[:, None], torch.cat([-sin, sin], 1)[:, None]
        return apply_rope(heads, *both)[0]

    scores = [torch.einsum("thd,shd->hts", f(q), f(k)) for f in (by_neighbours, by_halves)]
    same(scores[1], scores[0], "the scores of attention differ from Meta's", 1e-4)
    return "The scores are Meta's: a dot product does not mind the order of its channels."
