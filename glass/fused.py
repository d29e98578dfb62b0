"""fused.c: what training on a CPU does beside the products, in fewer passes over memory.

    fuse(model)  # where there is a C compiler; else torch does the work

Each function here equals one of model.py, to rounding.
"""

import ctypes
import functools

import torch
from torch.autograd.function import once_differentiable

import model as parts
from glass import kernels

POINTER, LONG, FLOAT, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
DTYPES = (torch.float32, torch.bfloat16)


def fuse(model):
    """Let the fused functions replace the model's own, in place, where they are there."""
    if model.device.type != "cpu" or kernels.library() is None:
        return
    if model.cross_entropy is parts.cross_entropy:
        model.cross_entropy = cross_entropy
    for block in model.blocks:
        if block.attn.prepare is parts.normalise_and_rotate:
            block.attn.prepare = normalise_and_rotate
    if isinstance(model.block_input, parts.EmbedSkip):
        model.block_input.forward = functools.partial(embed_skip, model.block_input)


def call(name, *values):
    """A function of fused.c. Tensors are given by their address; the number of threads comes last."""
    kinds = {torch.Tensor: POINTER, int: LONG, float: FLOAT, bool: INT}
    types = [kinds[type(value)] for value in values]
    values = [kernels.address(v) if isinstance(v, torch.Tensor) else v for v in values]
    kernels.function(name, *types, INT)(*values, torch.get_num_threads())


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
