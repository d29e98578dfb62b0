"""What makes cached decoding fast: one-row products that use every core, int8 weights, and a compiled step.

A decoded token reads every weight once, so memory bandwidth is the limit, and fewer bytes a weight are more tokens a second.
The model's own nn.Linear is right but, for a single row on a CPU, runs in one thread. `speed_up` puts in its place:

    RowLinear    the same product in float32 or bfloat16, shared out to all cores
    Int8Linear   weights rounded to int8, a scale for each output row; activations rounded too, a scale for each token
"""

import torch
import torch.nn as nn
from torch.nn import functional as F


class RowLinear(nn.Module):
    """nn.Linear with another way to multiply a single row: x (..., K) -> (..., N).

    On two cores, float32 (1, 768) x (768, 3072): F.linear 554 us (17 GB/s), halves as a batch 303 us (31 GB/s). Compiled,
    the elementwise product and sum become one loop over both cores at 40 to 60 GB/s, in bfloat16 too.
    """

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # (N, K), (N,)

    def forward(self, x):
        N, K = self.weight.shape
        if x.numel() != K or x.device.type != "cpu":
            return F.linear(x, self.weight, self.bias)
        if torch.compiler.is_compiling():
            y = (self.weight.float() * x.reshape(1, K).float()).sum(-1).to(x.dtype)  # (N,)
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
    """nn.Linear with int8 weights: a quarter of float32's bytes, within half a step of 1/127 of each row's largest weight.

    x is rounded per token in the same way, so that the product is one of integers. Source: LLM.int8(), arXiv:2208.07339,
    vector-wise quantization, without its outlier columns.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()  # (N, K)
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (N,)
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x):
        N, K = self.weight.shape
        rows = x.reshape(-1, K)  # (M, K)
        step = torch.linalg.vector_norm(rows, float("inf"), dim=-1, keepdim=True, dtype=torch.float32) / 127 + 1e-12  # (M, 1)
        integers = torch.round(rows / step).to(torch.int8)
        if x.device.type == "cpu":
            y = torch._int_mm(integers, self.weight.T) * self.scale  # (M, N), exact in int32 before the scales
        else:  # a GPU's _int_mm wants 17 rows at least
            y = F.linear(integers.to(x.dtype), self.weight.to(x.dtype)) * self.scale
        y = y * step if self.bias is None else torch.addcmul(self.bias, y, step)
        return y.view(*x.shape[:-1], N).to(x.dtype)


def speed_up(model, quantize=None, compile=False):
    """Put fast products in place of the model's, for generation only; returns `compiled_decode` for stream, or None.

    quantize 'int8' rounds the weights of every product (not the embedding that is looked up). With compile the first
    token after the prefill waits for the compiler; a GPU then replays the step as one CUDA graph.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={quantize!r} must be int8 or None")
    fast = RowLinear if quantize is None else Int8Linear
    if quantize or model.device.type == "cpu":
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    setattr(parent, name, fast(child))
    if not compile:
        return None
    mode = "reduce-overhead" if model.device.type == "cuda" else None
    return torch.compile(model.decode, dynamic=False, fullgraph=True, mode=mode)
