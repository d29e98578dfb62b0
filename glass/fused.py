"""fused.c: what training on a CPU does beside the products, in fewer passes over memory.

    fuse(model)  # where there is a C compiler; else torch does the work

Each function here equals one of model.py, to rounding.
"""

import ctypes
import functools

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import model as parts
from glass import kernels

POINTER, LONG, FLOAT, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
DTYPES = (torch.float32, torch.bfloat16)
PIECE = 256  # queries at a time, of a long sequence


def fuse(model):
    """Let the fused functions replace the model's own, in place, where they are there.

    Then model(idx, targets) gives the loss alone, without logits.
    """
    if model.device.type != "cpu" or kernels.library("fused") is None:
        return
    if model.cross_entropy is parts.cross_entropy:
        model.cross_entropy = cross_entropy
    for block in model.blocks:
        if block.attn.prepare is parts.normalise_and_rotate:
            block.attn.prepare = normalise_and_rotate
        if block.attn.attend is parts.auto_attention:
            block.attn.attend = attention
    if isinstance(model.block_input, parts.EmbedSkip):
        model.block_input.forward = functools.partial(embed_skip, model.block_input)


def call(name, *values):
    """A function of fused.c. Tensors are given by their address; the number of threads comes last."""
    kinds = {torch.Tensor: POINTER, int: LONG, float: FLOAT, bool: INT}
    types = [kinds[type(value)] for value in values]
    values = [kernels.address(v) if isinstance(v, torch.Tensor) else v for v in values]
    kernels.function(name, *types, INT, file="fused")(*values, torch.get_num_threads())


def is_half(x):
    return x.dtype == torch.bfloat16


class NormalisedRotation(torch.autograd.Function):
    """x (B, T, H, D) over the root mean square of each head, then rotated by cos and sin (T, 1, D)."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        B, T, H, D = x.shape
        y, scale = x.new_empty(B, H, T, D), cos.new_empty(B, T, H)
        eps = torch.finfo(torch.float32).eps  # that of F.rms_norm
        call("turn_heads", x.contiguous(), y, scale, cos, sin, B, T, H, D, eps, is_half(x))
        ctx.save_for_backward(y, scale, cos, sin)
        return y.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, *rest = ctx.saved_tensors
        B, H, T, D = y.shape
        grad, x_grad = grad.transpose(1, 2).contiguous(), y.new_empty(B, T, H, D)
        call("turn_heads_back", grad, y, *rest, x_grad, B, T, H, D, is_half(y))
        return x_grad, None, None


def normalise_and_rotate(q, k, rotation):
    if rotation[0].ndim != 3 or q.dtype not in DTYPES:  # each row has its own positions: decoding
        return parts.normalise_and_rotate(q, k, rotation)
    return tuple(NormalisedRotation.apply(x, *rotation) for x in (q, k))


class LongAttention(torch.autograd.Function):
    """Causal attention by torch; its gradient by products, which are fast in bfloat16.

    q, k and v (B, H, T, D). The backward pass takes PIECE queries at a time, with the keys up to
    the last of them, and computes their weights again, so none of T x T are kept. 61 ms instead of
    76 for 2 x 12 heads, T 1,024, D 64; at T 4,096 nothing is gained.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        shape, T, D = grad.shape, *grad.shape[2:]
        q, k, v, grad = (x.reshape(-1, T, D) for x in (*ctx.saved_tensors, grad))  # (B H, T, D)
        q_grad, k_grad, v_grad = torch.empty_like(q), *torch.zeros(2, *k.shape)
        for first in range(0, T, PIECE):
            last = min(first + PIECE, T)
            own, seen = slice(first, last), slice(0, last)
            weights = q[:, own] @ k[:, seen].mT  # of which the call makes weights
            scores_grad = grad[:, own] @ v[:, seen].mT
            call("attention_back", weights, scores_grad, *weights.shape, D**-0.5, is_half(q))
            q_grad[:, own] = scores_grad @ k[:, seen]
            k_grad[:, seen] += scores_grad.mT @ q[:, own]
            v_grad[:, seen] += weights.mT @ grad[:, own]
        return tuple(x.to(q.dtype).view(shape) for x in (q_grad, k_grad, v_grad))


def attention(q, k, v, mask, dropout):
    """model.auto_attention; in bfloat16 and where it is torch's, LongAttention."""
    is_causal = mask is not None and mask.ndim == 2 and q.shape == k.shape
    dropping, pays = dropout.training and dropout.p > 0, 512 < q.shape[2] <= 2048
    if is_causal and pays and not dropping and q.dtype == torch.bfloat16:
        return LongAttention.apply(q, k, v)
    return parts.auto_attention(q, k, v, mask, dropout)


class Mix(torch.autograd.Function):
    """share x + share_e e of x and e (B, T, C) float32; the shares are tensors of one value."""

    @staticmethod
    def forward(ctx, x, e, share, share_e):
        x, e, shares = x.contiguous(), e.contiguous(), (share.item(), share_e.item())
        y = torch.empty_like(x)
        call("mix", x, e, y, *shares, x.numel())
        ctx.save_for_backward(x, e)
        ctx.shares = shares
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, e = ctx.saved_tensors
        C = x.shape[-1]
        given = torch.empty_like(x), torch.empty_like(x), *grad.new_empty(2, x.numel() // C)
        call("mix_back", grad.contiguous(), x, e, *given, *ctx.shares, x.numel() // C, C)
        x_grad, e_grad, *of_shares = given
        return x_grad, e_grad, *(each.sum() for each in of_shares)


def embed_skip(own, x, embedded, layer):
    """The forward pass of `own`, a model.EmbedSkip."""
    if x.dtype != torch.float32 or embedded.dtype != torch.float32:
        return type(own).forward(own, x, embedded, layer)
    return Mix.apply(x, embedded, own.stream_share[layer], own.embed_share[layer])


class CrossEntropy(torch.autograd.Function):
    """The summed loss of x (N, C), whose logits, of `dtype`, become their gradients in place."""

    @staticmethod
    def forward(ctx, x, weight, targets, dtype):
        trains = any(ctx.needs_input_grad)
        kept = x.to(dtype), weight.to(dtype)
        logits = kept[0] @ kept[1].T
        losses = torch.empty(len(x))
        call("cross_entropies", logits, targets, losses, *logits.shape, trains, is_half(logits))
        if trains:
            ctx.save_for_backward(*kept, logits)
        ctx.dtypes = x.dtype, weight.dtype
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, logits_grad = ctx.saved_tensors
        x_grad, weight_grad = logits_grad @ weight, logits_grad.T @ x
        of_x, of_weight = ctx.dtypes
        return x_grad.to(of_x).mul_(grad), weight_grad.to(of_weight).mul_(grad), None, None


def cross_entropy(head, x, targets):
    """model.cross_entropy, without the logits. IndexError if a target is no token."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if dtype not in DTYPES:
        return parts.cross_entropy(head, x, targets)
    if targets.max() >= len(head.weight):
        raise IndexError(f"target {targets.max()} must be below {len(head.weight)}, the vocabulary")
    return CrossEntropy.apply(x, head.weight, targets.contiguous(), dtype), None
