"""What makes cached decoding fast: one-row products that use every core, int8 weights, and a compiled step.

A decoded token reads every weight once, so memory bandwidth is the limit, and fewer bytes a weight are more tokens a second.
The model's own nn.Linear is right but, for a single row on a CPU, runs in one thread. `speed_up` puts in its place:

    RowLinear    the same product in float32 or bfloat16, shared out to all cores
    Int8Linear   weights rounded to int8, with a scale for each output row
"""

import torch
import torch.nn as nn
from torch.nn import functional as F


class RowLinear(nn.Module):
    """nn.Linear with another way to multiply a single row: x (..., K) -> (..., N).

    On two cores, float32 (1, 768) x (768, 3072): F.linear 554 us (17 GB/s), halves as a batch 374 us (25 GB/s). Compiled,
    the elementwise product and sum become one loop over both cores: 245 us (38 GB/s), and in bfloat16 117 us (40 GB/s).
    """

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # (N, K), (N,)

    def forward(self, x):
        N, K = self.weight.shape
        if x.numel() != K or x.device.type != "cpu":
            return F.linear(x, self.weight, self.bias)
        if torch.compiler.is_compiling():
            y = row_product(self.weight, x).to(x.dtype)  # (N,)
        elif x.dtype == torch.float32:
            halves = self.weight[: N // 2 * 2].view(2, N // 2, K).transpose(1, 2)  # (2, K, N / 2)
            y = torch.bmm(x.reshape(1, 1, K).expand(2, 1, K), halves).flatten()  # (N,), or one less
            if N % 2:
                y = torch.cat([y, F.linear(x.reshape(K), self.weight[-1:])])
        else:
            return F.linear(x, self.weight, self.bias)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], N)


class Int8Linear(nn.Module):
    """nn.Linear with int8 weights and a scale for each output row: a quarter of float32's bytes.

    A weight is off by at most half a step, the step being about 1/127 of the largest weight of its row. On a CPU, where
    nothing is compiled, x is rounded to bfloat16.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()  # (N, K)
        scale = (weight.abs().amax(dim=1).clamp(min=1e-12) / 127).bfloat16()  # (N,), in the dtype that multiplies again
        self.register_buffer("weight", (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x):
        N, K = self.weight.shape
        if x.device.type == "cpu" and x.numel() == K and torch.compiler.is_compiling():
            y = row_product(self.weight, x.float()) * self.scale.float()
        elif x.device.type == "cpu":
            y = torch._weight_int8pack_mm(x.reshape(-1, K).bfloat16(), self.weight, self.scale)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], N).to(x.dtype)


def row_product(weight, x):
    """weight (N, K) times the one row of x, summed in float32, for the compiler: (N,). One loop over every core.

    as_strided makes the compiler store x: inlined, x (a norm, a GELU ...) would be computed again for each of the N rows.
    """
    K = weight.shape[1]
    return (weight.float() * x.contiguous().as_strided((1, K), (K, 1)).float()).sum(-1)


def join_qkv(attn):
    """Put the three projections of an Attention in one product: three short ones cost 0.8 ms a token of GPT-2 124M more."""
    parts = (attn.q_proj, attn.k_proj, attn.v_proj)
    attn.qkv_proj = nn.Linear(1, 1, device="meta")
    attn.qkv_proj.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    attn.qkv_proj.bias = None if parts[0].bias is None else nn.Parameter(torch.cat([part.bias for part in parts]))
    attn.q_proj = attn.k_proj = attn.v_proj = None


def speed_up(model, quantize=None, compile=False):
    """Put fast products in place of the model's, for generation only; returns `compiled_decode` for stream, or None.

    quantize 'int8' rounds the weights of every product (not the embedding that is looked up). With compile the first
    token after the prefill waits for the compiler; a GPU then replays the step as one CUDA graph.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={quantize!r} must be int8 or None")
    fast = RowLinear if quantize is None else Int8Linear
    if quantize or model.device.type == "cpu":
        for block in model.blocks:
            join_qkv(block.attn)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    setattr(parent, name, fast(child))
    if not compile:
        return None
    # the weights stay what they are, so looking for changes in every module, 0.4 ms a token of GPT-2 124M, is left out
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    if model.device.type == "cuda":
        options["triton.cudagraphs"] = True
    return torch.compile(model.decode, dynamic=False, fullgraph=True, options=options)
