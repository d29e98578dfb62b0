"""What glass/trace.py sees, for the terminal and as a picture: sample.py --show_lens and
--show_attention.
"""

from pathlib import Path

from glass import trace
from glass.progress import open_figure, save_figure

LABELLED = 64  # tokens, at most, that are written at the sides of a small map


def visible(text):
    """A token's text in one line."""
    return text.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "␣")


def draw_attention(model, tokenizer, idx, path):
    """Draw the attention of every head for a text, idx (T,), to a new .png file.

    Rows of maps are layers, columns heads; in a map, a row is a token and shows where it looks.
    Raises ValueError for another kind of file, and for a model without attention.
    """
    path = Path(path)
    if path.suffix != ".png" or path.exists():
        found = "is there already" if path.exists() else "does not end in .png"
        raise ValueError(f"show_attention={path} {found}: name a new .png file")
    L, H, T = len(model.blocks), model.config.n_head, len(idx)
    if not L:
        raise ValueError("show_attention needs layers, and this model has n_layer=0: use another")
    found = trace.trace(model, idx)
    size = 2.4 if T <= 24 else 1.6
    names = [visible(tokenizer.decode([i])).replace("$", r"\$") for i in idx.tolist()]
    pyplot, figure, axes = open_figure(
        nrows=L, ncols=H, squeeze=False, figsize=(size * H + 1, size * L + 1)
    )
    for layer in range(L):
        weights = found.attention(layer).cpu()  # (H, T, T)
        for head in range(H):
            each = axes[layer, head]
            each.imshow(weights[head].numpy(), cmap="Blues", vmin=0)
            each.set(xticks=[], yticks=[], title=f"layer {layer} head {head}")
            each.title.set_fontsize(8)
            if T <= LABELLED and head == 0:
                each.set_yticks(range(T), names, fontsize=6 if T <= 24 else 3)
            if T <= LABELLED and layer == L - 1:
                each.set_xticks(range(T), names, fontsize=6 if T <= 24 else 3, rotation=90)
    save_figure(pyplot, figure, path)


def lens_lines(model, tokenizer, idx, most=12):
    """The logit lens of a text's last tokens as lines of text: what would come after each part.

    A row is a part of the model, the end at the top; a column is a token, the last at the right.
    """
    T = len(idx)
    positions = list(range(max(0, T - most), T))
    ids, logprobs, _ = trace.lens(trace.trace(model, idx), positions, 1)
    stages = ["embedding"]
    for layer in range(len(model.blocks)):
        stages += [f"attention {layer}", f"MLP {layer}"]

    def cells(tokens):
        return " ".join(f"{visible(tokenizer.decode([i]))[:9]:9}" for i in tokens)

    lines = [f"{'after':13}" + cells(idx[positions].tolist())]
    for stage in reversed(range(len(stages))):
        lines.append(f"{stages[stage]:13}" + cells(ids[stage, :, 0].tolist()))
    last = logprobs[-1, -1, 0].exp().item()
    likeliest = visible(tokenizer.decode([int(ids[-1, -1, 0])]))
    lines.append(f"At the end {likeliest!r} is likeliest, with {last:.1%}.")
    return lines
