"""What a model computes for a text, made visible: attention, logit lens, pushes, heads switched off.

`trace` runs one forward pass with hooks and keeps what passes by; everything else is computed from
that with the model's own modules. model.py and train.py know nothing of this file, and a model
that is not traced runs the same instructions as before. Shapes: T tokens, L blocks, H heads, C
channels, V vocabulary. Batches have one row. glass/looking.py makes JSON of it.
"""

import contextlib
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from model import attention_weights


@dataclass
class Trace:
    """One forward pass: what every part read and wrote, in the dtype of the weights."""

    model: torch.nn.Module
    idx: Tensor  # (T,)
    hidden: Tensor  # (T, C): what the head reads
    embedded: Tensor  # (T, C): what the first block reads, and what embed_skip adds again
    inputs: list  # of each block: (T, C), the stream that it reads
    head_values: list  # of each block: (T, H * D), what o_proj reads
    attention_outputs: list  # of each block: (T, C)
    mlp_outputs: list  # of each block: (T, C)
    outputs: list  # of each block: (T, C)
    rotation: object  # as the blocks got it
    mask: Tensor | None

    @functools.cached_property
    @torch.no_grad()
    def logits(self):
        """(T, V) in float32: the model's own, computed where they are asked for."""
        return self.model.head(self.hidden).float()

    @torch.no_grad()
    def logits_at(self, position):
        """The logits after one position, (V,) in float32."""
        return self.model.head(self.hidden[position]).float()

    @property
    def streams(self):
        """The residual stream after the embedding, each attention and each MLP: (2 L + 1, T, C)."""
        stages = [self.embedded]
        for x, attended, output in zip(
            self.inputs, self.attention_outputs, self.outputs, strict=True
        ):
            stages += [x + attended, output]
        return torch.stack(stages)

    @torch.no_grad()
    def attention(self, layer, by_value=False):
        """The attention weights of a layer, (H, T, T); rows sum to 1.

        by_value: each weight times the norm of the value that it carries (arXiv:2004.10102).
        """
        block = self.model.blocks[layer]
        x = block.attn_norm(self.inputs[layer][None])
        q, k, v = block.attn.queries_keys_values(x, self.rotation)
        weights = attention_weights(q, k, self.mask)[0].float()  # (H, T, T)
        if by_value:
            norms = v[0].float().norm(dim=-1)  # (Hkv, T)
            groups = len(weights) // len(norms)
            weights = weights * norms.repeat_interleave(groups, 0)[:, None]
        return weights


@contextlib.contextmanager
def hooks(pairs):
    """A context in which hooks are set: pairs of a function that sets one, and the hook."""
    handles = [register(hook) for register, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def trace(model, idx):
    """The Trace of a text: idx (T,) int64, 1 to block_size tokens."""
    embedded, inputs, head_values, attended, mlps, outputs, context = ([] for _ in range(7))

    def keep_first(store):
        return lambda module, arguments: store.append(arguments[0][0])

    def keep_output(store):
        return lambda module, arguments, output: store.append(output[0])

    def keep_context(module, arguments):
        context[:] = arguments[2:4]  # rotation, mask

    pairs = [(model.dropout.register_forward_hook, keep_output(embedded))]
    for block in model.blocks:
        pairs += [
            (block.register_forward_pre_hook, keep_first(inputs)),
            (block.register_forward_pre_hook, keep_context),
            (block.attn.o_proj.register_forward_pre_hook, keep_first(head_values)),
            (block.attn.register_forward_hook, keep_output(attended)),
            (block.mlp.register_forward_hook, keep_output(mlps)),
            (block.register_forward_hook, keep_output(outputs)),
        ]
    with hooks(pairs):
        hidden = model.hidden(idx[None])[0]  # (T, C)
    rotation, mask = context or (None, None)
    parts = (embedded[0], inputs, head_values, attended, mlps, outputs, rotation, mask)
    return Trace(model, idx, hidden, *parts)


def surprise(logits, idx):
    """(log-probability, rank, entropy) of each token but the first: three (T - 1,) tensors.

    Nats; the likeliest token has rank 0. The entropy is that of the prediction, before the token
    came. logits (T, V), idx (T,).
    """
    logprobs = logits[:-1].float().log_softmax(-1)  # (T - 1, V)
    came = logprobs.gather(1, idx[1:, None])  # (T - 1, 1)
    rank = (logprobs > came).sum(1)
    entropy = -(logprobs.exp() * logprobs).nan_to_num(0.0).sum(1)
    return came[:, 0], rank, entropy


def likeliest(logits, k):
    """(ids, log-probabilities) of the k likeliest next tokens: two (..., k) tensors."""
    logits = logits.float()
    largest, ids = logits.topk(min(k, logits.shape[-1]))
    return ids, largest - logits.logsumexp(-1, keepdim=True)


@torch.no_grad()
def lens(found, positions, k, tokens=None):
    """The logit lens: what the head would predict from the stream after every part.

    positions: a list of P. tokens (P,): whose ranks to give; None: those that come next, or the
    likeliest at the end. Gives ids and log-probabilities, (2 L + 1, P, k) each, and ranks (2 L + 1,
    P). Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    model, streams = found.model, found.streams[:, positions]  # (2 L + 1, P, C)
    if tokens is None:
        after = found.idx.roll(-1)
        after[-1] = found.logits_at(-1).argmax()
        tokens = after[positions]
    ids, logprobs, ranks = [], [], []
    for some in streams.split(8):  # as many at once as memory easily holds
        logits = model.head(model.final_norm(some)).float()  # (8, P, V)
        top_ids, top_logprobs = likeliest(logits, k)
        ids.append(top_ids)
        logprobs.append(top_logprobs)
        chosen = logits.gather(2, tokens.expand(len(some), -1)[..., None])  # (8, P, 1)
        ranks.append((logits > chosen).sum(-1))
    return torch.cat(ids), torch.cat(logprobs), torch.cat(ranks)


# Who pushed a logit. The final norm divides by one number, so with that number held fixed the
# logit is a sum over everything that was ever added to the residual stream.


def mixing(model):
    """How much of what a block adds, and of the embedding, reaches the end of the stream.

    Gives (shares of each block (L,), share of the embedding), all 1 without embed_skip.
    """
    L = len(model.blocks)
    if not model.config.embed_skip:
        return torch.ones(L), 1.0
    keep, again = model.block_input.stream_share.float(), model.block_input.embed_share.float()
    embedding, shares = 1.0, torch.ones(L)
    for layer in range(L):
        embedding = float(keep[layer]) * embedding + float(again[layer])
        shares[layer] = keep[layer + 1 :].prod()
    return shares, embedding


def direction(model, token, whole):
    """(u (C,), b): whatever adds x to the final stream `whole` (C,) pushes the logit by x u.

    b: what biases add to the logit, a dict of name to number. For a classifier, `token` is a class.
    """
    head, norm, whole = model.classifier or model.head, model.final_norm, whole.float()
    w = head.weight[token].float()
    if head.weight.dtype == torch.int8:
        w = w * head.scale[token].float()
    biases = {}
    if getattr(norm, "bias", None) is not None:
        biases["final norm bias"] = float(norm.bias.float() @ w)
    if head.bias is not None:
        biases["head bias"] = float(head.bias[token])
    u = norm.weight.float() * w
    if isinstance(norm, torch.nn.LayerNorm):
        scale = (whole.var(unbiased=False) + norm.eps).rsqrt()
        u = u - u.mean()  # the norm subtracts the mean
    else:
        scale = (whole.square().mean() + norm.eps).rsqrt()
    return scale * u, biases


def along(linear, u):
    """What each input channel of a linear layer adds along u (C,), without its bias: (K,)."""
    weight = linear.weight  # (C, K)
    if weight.dtype == torch.int8:
        return weight.float().T @ (linear.scale.float() * u)
    added = weight.float().T @ u
    if hasattr(linear, "lora_a"):
        added += linear.scale * (linear.lora_a.float().T @ (linear.lora_b.float().T @ u))
    return added


def embedding_parts(found, position):
    """What the embedding of a position is made of: name to (C,)."""
    model, idx = found.model, found.idx
    token = model.tok_emb(idx[position])
    parts = {"token": token}
    if model.config.smear and position:
        parts["token before (smear)"] = model.embed_tokens.smear * model.tok_emb(idx[position - 1])
    if model.config.pos == "learned":
        parts["position"] = found.embedded[position] - sum(parts.values())
    return parts


@torch.no_grad()
def pushes(found, position, token):
    """Who pushed the logit of `token` (or of a class) at a position.

    Gives (heads (L, H), MLPs (L,), others: a dict of name to number). All of them sum to the logit.
    The others are the parts of the embedding, and biases where the model has any.
    """
    model, H = found.model, found.model.config.n_head
    u, biases = direction(model, token, found.streams[-1, position])
    shares, embedding_share = mixing(model)
    others = {
        name: float(embedding_share * (part.float() @ u))
        for name, part in embedding_parts(found, position).items()
    }
    heads, mlps = torch.zeros(len(shares), H), torch.zeros(len(shares))
    for layer, block in enumerate(model.blocks):
        share, o_proj = shares[layer], block.attn.o_proj
        each_channel = found.head_values[layer][position].float() * along(o_proj, u)  # (H * D,)
        heads[layer] = share * each_channel.view(H, -1).sum(1).cpu()
        mlps[layer] = share * (found.mlp_outputs[layer][position].float() @ u).cpu()
        if o_proj.bias is not None:
            others[f"attention bias {layer}"] = float(share * (o_proj.bias.float() @ u))
    return heads, mlps, others | biases


@torch.no_grad()
def token_pushes(found, position, token):
    """What every earlier token pushed to a logit through attention: (T,).

    A head carries a weighted sum of values, one for each token, so its push is a sum over tokens.
    The direct path alone is counted: what a token did to later layers counts where it is read.
    """
    model = found.model
    u, _ = direction(model, token, found.streams[-1, position])
    shares, _ = mixing(model)
    total, seen = torch.zeros(len(found.idx)), position + 1
    for layer, block in enumerate(model.blocks):
        attn = block.attn
        x = block.attn_norm(found.inputs[layer][None])
        q, k, v = attn.queries_keys_values(x, found.rotation)
        weights = attention_weights(q[:, :, position:seen], k[:, :, :seen], None)  # (1, H, 1, seen)
        v = v[0, :, :seen].float().repeat_interleave(attn.n_head // attn.n_kv_head, 0)
        carried = v @ along(attn.o_proj, u).view(attn.n_head, -1, 1)  # (H, seen, 1)
        pushed = (weights[0, :, 0].float() * carried[..., 0]).sum(0)  # (seen,)
        total[:seen] += (shares[layer] * pushed).cpu()
    return total


def switched_off(model, mask):
    """A context in which heads and MLPs write nothing: mask (L, H + 1) bool, the last column MLPs.

    A head that is off gives zeros to o_proj; an MLP that is off adds nothing, its bias included.
    """
    pairs = []
    for block, off in zip(model.blocks, mask.tolist(), strict=True):
        *heads, mlp = off
        if any(heads):
            pairs.append((block.attn.o_proj.register_forward_pre_hook, without_heads(heads)))
        if mlp:
            pairs.append(
                (block.mlp.register_forward_hook, lambda module, x, y: torch.zeros_like(y))
            )
    return hooks(pairs)


def without_heads(off):
    """A hook that replaces what heads give to o_proj by zeros. off: a list of bools."""

    def hook(module, arguments):
        values = arguments[0]  # (B, T, H * D)
        kept = ~torch.tensor(off, device=values.device)[:, None]  # (H, 1)
        heads = values.unflatten(-1, (len(off), -1)) * kept
        return (heads.flatten(-2), *arguments[1:])

    return hook


@torch.no_grad()
def head_badges(model, seed=1337, rows=4, length=64):
    """How much each head looks at the token before, after an earlier copy, and at the first token.

    Three (L, H) tensors of mean attention weights, on random tokens that are repeated once:
    previous-token, induction (arXiv:2209.11895), and sink scores.
    """
    n = max(1, min(length, model.config.block_size // 2))
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(model.config.vocab_size, (rows, n), generator=generator)
    maps = model.attention_maps(torch.cat([half, half], 1).to(model.device)).float()
    T = 2 * n
    t = torch.arange(1, T)
    previous = maps[..., t, t - 1].mean((1, -1))  # (L, H)
    second = torch.arange(n, T)
    induction = maps[..., second, second - n + 1].mean((1, -1))
    first = maps[..., t, 0].mean((1, -1))
    return previous, induction, first
