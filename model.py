"""GPT-2 and Llama 3 as settings of the same parts: from token ids to logits and to text.

Read downwards: settings, positions (RoPE), KV cache, attention, MLP, block, GPT with its plain
`generate`, the shapes of published models. Shapes: B sequences, T new positions, S attended
positions (cached + new), C channels, H query heads, Hkv key/value heads, D channels per head,
F MLP channels, V vocabulary, L layers.

GPT-2: Radford et al. 2019. Llama 3: arXiv:2407.21783. RoPE: arXiv:2104.09864. RMSNorm:
arXiv:1910.07467. SwiGLU and its kin: arXiv:2002.05202. Grouped-query attention: arXiv:2305.13245.
QK-norm: arXiv:2010.04245.
"""

import functools
import math
import typing
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal, TypeVar

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

# The role of a setting when a run is resumed. An unmarked one is fixed, since the saved weights and
# state depend on it. A Tunable one may change, and the change is reported. A Free one may change
# silently.
T_ = TypeVar("T_")
Tunable = Annotated[T_, "tunable"]
Free = Annotated[T_, "free"]

LINEAR_LAYERS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"  # of a block
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def require(settings, names, is_possible, requirement):
    """ValueError for the first named setting that is given but not possible.

    `requirement` completes the error's "must ...", as in "be at least 1".
    """
    for name in names.split():
        value = getattr(settings, name)
        if value is not None and not is_possible(value):
            raise ValueError(f"{name}={value} must {requirement}")


@dataclass
class GPTConfig:
    """Shape and parts of a model; the defaults are GPT-2 124M without biases.

    Where a comment does not say what None means, __post_init__ derives the value. It raises
    ValueError for an impossible combination.
    """

    # model
    vocab_size: int = 50257  # tokens; train.py takes it from the tokenizer
    block_size: int = 1024  # tokens of context
    n_layer: int = 12  # blocks; 0 makes the bigram model
    n_head: int = 12  # query heads
    n_kv_head: int | None = None  # key/value heads; None: n_head; 1: multi-query attention
    n_embd: int = 768  # channels
    head_dim: int | None = None  # channels of a head; None: n_embd / n_head
    n_inner: int | None = None  # MLP channels; None: 4 n_embd, or about 8/3 n_embd for swiglu
    dropout: Tunable[float] = 0.0  # dropout rate of embeddings and of attention and MLP outputs
    attn_dropout: Tunable[float | None] = None  # dropout rate of attention weights
    bias: bool = False  # biases in linear layers and LayerNorms
    qkv_bias: bool | None = None  # biases of the query, key and value projections; None: bias
    o_bias: bool | None = None  # bias of attention's output projection; None: bias
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # before attention, MLP and head
    norm_eps: float = 1e-5  # added to the variance or mean square
    mlp: Literal["gelu", "gelu_exact", "swiglu", "relu2"] = "gelu"  # gelu: by tanh, as in GPT-2
    pos: Literal["learned", "rope"] = "learned"  # an embedding, or rotated queries and keys
    rope_theta: float = 10000.0  # the longest wavelength is about 2 pi rope_theta positions
    rope_scaling: dict | None = None  # Llama 3.1's: a dict with the keys of ROPE_SCALING
    qk_norm: bool = False  # divide queries and keys by their root mean square
    qk_norm_weight: bool = False  # the same, and times a weight for each channel of a head
    tie_weights: bool = True  # the head uses the token embedding's matrix
    smear: bool = False  # add a learned fraction of the previous token's embedding
    embed_skip: bool = False  # each block reads a learned mix of residual stream and embedding
    zero_init: bool = False  # output projections and an untied head start at zero
    loss_chunk: Free[int | None] = None  # compute the loss this many tokens at a time: less memory
    attention: Free[Literal["auto", "sdpa", "explicit"]] = "auto"  # auto: the faster one
    recompute: Free[bool] = False  # keep only what blocks read, and run them again in backward
    lora_rank: int | None = None  # rank of LoRA's matrices; None: no LoRA
    lora_alpha: float = 16.0  # LoRA's products are scaled by lora_alpha / lora_rank
    lora_targets: str = LINEAR_LAYERS  # the linear layers that get LoRA
    n_classes: int | None = None  # classes of a head on the last token; None: no such head

    def __post_init__(self):
        self.check_values()
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.head_dim is None and self.n_embd % self.n_head == 0:
            self.head_dim = self.n_embd // self.n_head
        if self.n_inner is None:
            swiglu_size = 64 * math.ceil(8 * self.n_embd / 3 / 64)
            self.n_inner = swiglu_size if self.mlp == "swiglu" else 4 * self.n_embd
        if self.attn_dropout is None:
            self.attn_dropout = self.dropout
        self.qkv_bias = self.bias if self.qkv_bias is None else self.qkv_bias
        self.o_bias = self.bias if self.o_bias is None else self.o_bias
        self.check_fit()

    def check_values(self):
        """ValueError where a setting is impossible by itself."""
        for name, hint in typing.get_type_hints(GPTConfig).items():  # strips Tunable, Free
            options, value = typing.get_args(hint), getattr(self, name)
            if typing.get_origin(hint) is Literal and value not in options:
                raise ValueError(f"{name}={value!r} must be one of {' '.join(options)}")
        floats = [name for name, value in vars(self).items() if type(value) is float]
        most = 3e38  # the largest of float32, about
        require(self, " ".join(floats), lambda value: abs(value) < most, "be a finite number")
        sizes = "vocab_size block_size n_head n_kv_head n_embd head_dim n_inner n_classes"
        require(self, sizes + " loss_chunk lora_rank", lambda value: value >= 1, "be at least 1")
        require(self, "n_layer", lambda value: value >= 0, "not be negative")
        require(self, "dropout attn_dropout", lambda value: 0 <= value <= 0.99, "lie in [0, 0.99]")
        require(self, "norm_eps rope_theta", lambda value: value > 0, "be positive")
        if unknown := set(self.lora_targets.split()) - set(LINEAR_LAYERS.split()):
            names = " ".join(sorted(unknown))
            raise ValueError(f"lora_targets has {names}: choose from {LINEAR_LAYERS}")
        if self.rope_scaling is not None and set(self.rope_scaling) != set(ROPE_SCALING):
            raise ValueError(
                f"rope_scaling={self.rope_scaling} must have the keys {' '.join(ROPE_SCALING)}"
            )

    def check_fit(self):
        """ValueError where settings do not fit each other."""
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}: "
                "change either"
            )
        if self.qk_norm_weight and not self.qk_norm:
            raise ValueError("qk_norm_weight=True needs qk_norm=True: set both, or neither")
        if self.head_dim is None:
            raise ValueError(
                f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}, "
                "so that heads get equal channels: change either, or set head_dim"
            )
        if self.pos == "rope" and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even, since RoPE rotates pairs: "
                "change n_embd or n_head"
            )


# Positions.


def rope_frequencies(config):
    """Radians per position of each rotated pair of channels, (D / 2,) float32 on the CPU.

    Llama 3.1's scaling leaves the fast pairs as they are, divides the frequency of pairs that turn
    less than once in the original context by `factor`, and interpolates in between.
    Source: arXiv:2104.09864; Meta's llama-models, apply_scaling.
    """
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / config.rope_theta ** (channels / config.head_dim)  # (D / 2,)
    if config.rope_scaling is None:
        return frequencies
    scaling = config.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1 keeps the frequency, 0 divides it
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


def rope_rotation(angles):
    """The cos and sin that apply_rope takes: angles (..., D / 2) -> two tensors (..., D).

    The first half of sin is negated, so that one addcmul does the rotation.
    """
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x, cos, sin):
    """Rotate pairs of channels by the angle of their position: x (B, T, H, D) -> (B, T, H, D).

    cos, sin: (T, 1, D) or (B, T, 1, D) from rope_rotation. Gives x1 cos - x2 sin, x2 cos + x1 sin.
    Channel i pairs with i + D / 2, as in Hugging Face checkpoints; in Meta's, 2i pairs with 2i + 1.
    Source: RoFormer, arXiv:2104.09864.
    """
    x1, x2 = x.chunk(2, dim=-1)  # (B, T, H, D / 2) each
    return torch.addcmul(x * cos, torch.cat([x2, x1], dim=-1), sin)


class LearnedPositions(nn.Embedding):
    """GPT-2's positions: adds a learned vector per position to the token embedding."""

    def forward(self, x, positions):
        """x (B, T, C), positions (T,) or (B, T) -> x with positions, (B, T, C), and no rotation."""
        return x + super().forward(positions), None


class RotaryPositions(nn.Module):
    """Llama's positions: nothing is added, and attention gets the rotation of each position."""

    def __init__(self, config):
        super().__init__()
        # no buffer: .to(bfloat16) would round the angles, and DDP would broadcast them
        self.frequencies = rope_frequencies(config)  # (D / 2,)

    def forward(self, x, positions):
        """x (B, T, C), positions (T,) or (B, T) -> x as it is, and rope_rotation of the angles."""
        self.frequencies = self.frequencies.to(x.device)
        angles = positions[..., None, None] * self.frequencies  # (T, 1, D / 2) or (B, T, 1, D / 2)
        return x, rope_rotation(angles)


class KVCache:
    """Keys and values of the positions seen so far, in every layer, for decoding.

    Row b has seen `lengths[b]` of at most max_len positions. Rows of different lengths are
    right-padded and prefilled together, then get their true lengths by `set_rows`. The mask hides
    what lies beyond a row's length, and the row overwrites it as it grows. With `static`, keys and
    values always have max_len positions, so that shapes stay the same for torch.compile.
    """

    def __init__(self, config, batch_size, max_len, device, dtype):
        shape = (batch_size, config.n_kv_head, max_len, config.head_dim)
        # One tensor per layer: with a single tensor for all layers, a compiled step would copy all
        # of it to update a slice.
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.ids = torch.zeros(batch_size, max_len, dtype=torch.int64, device=device)
        self.device, self.max_len, self.static = device, max_len, False
        self.length = 0  # positions of the longest row
        self.lengths = (
            None  # (B,) where rows differ or the cache is static; None: all have `length`
        )

    def set_rows(self, lengths, source, static=False):
        """Set the true lengths (B,). Where fewer rows were prefilled, row b copies row source[b]."""
        if len(self.ids) < len(lengths):  # several rows share one prompt, prefilled once
            self.k = [k[source] for k in self.k]
            self.v = [v[source] for v in self.v]
            self.ids = self.ids[source]
        self.length, self.static = int(lengths.max()), static
        rows_differ = bool((lengths != self.length).any())
        self.lengths = lengths.clone() if static or rows_differ else None

    def positions(self, T):
        """The positions of the next T tokens: (T,), or (B, T) where rows differ.

        Raises ValueError where they do not fit.
        """
        if not self.static and self.length + T > self.max_len:
            raise ValueError(
                f"{self.length + T} positions do not fit in a cache of max_len={self.max_len}: "
                "make it longer"
            )
        new = torch.arange(T, device=self.device)
        if self.lengths is None:
            return self.length + new
        return self.lengths[:, None] + new

    def attended(self, T):
        """S, the number of positions that the next T tokens attend to at most."""
        return self.max_len if self.static else self.length + T

    def append(self, layer, k, v, positions):
        """Store k, v (B, Hkv, T, D) at `positions`. Gives all keys and values, (B, Hkv, S, D)."""
        S = self.attended(k.shape[2])
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            if self.lengths is None:
                store[:, :, self.length : S] = new
            else:
                rows = torch.arange(len(new), device=new.device)[:, None]  # (B, 1)
                # two index tensors with a slice between them: the left side is (B, T, Hkv, D)
                store[rows, :, positions] = new.transpose(1, 2).to(store.dtype)
        return self.k[layer][:, :, :S], self.v[layer][:, :, :S]

    def previous(self, idx, positions):
        """Store idx (B, T) at `positions`. Gives the id before each, (B, T)."""
        rows = torch.arange(len(idx), device=idx.device)[:, None]  # (B, 1)
        self.ids[rows, positions] = idx
        return self.ids[rows, (positions - 1).clamp(min=0)]

    def advance(self, T):
        """Count T more positions as seen, once all layers have stored theirs."""
        if self.lengths is not None:
            self.lengths += T
        if not self.static:  # a changing Python number would make torch.compile compile again
            self.length += T


# Attention.


def causal_mask(positions, S):
    """0 up to a position itself, -inf after it: (T, S), or (B, 1, T, S) where rows differ."""
    later = torch.arange(S, device=positions.device) > positions[..., None]  # (T, S) or (B, T, S)
    mask = torch.zeros(later.shape, device=positions.device).masked_fill(later, float("-inf"))
    return mask if mask.ndim == 2 else mask[:, None]


def attention_weights(q, k, mask):
    """Softmax of q k^T / sqrt(D): q (B, H, T, D), k (B, Hkv, S, D) -> (B, H, T, S)."""
    B, H, T, D = q.shape
    Hkv, S = k.shape[1:3]
    group_size = H // Hkv
    # the queries that share a key/value head, stacked along T
    q = (q * D**-0.5).reshape(B, Hkv, group_size * T, D)
    scores = (q @ k.transpose(-2, -1)).view(B, H, T, S)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    return F.softmax(scores, dim=-1)


def explicit_attention(q, k, v, mask, dropout):
    """Attention as it is defined: q (B, H, T, D), k and v (B, Hkv, S, D) -> (B, H, T, D)."""
    weights = dropout(attention_weights(q, k, mask))  # (B, H, T, S)
    B, Hkv, S, _ = k.shape
    groups = weights.view(B, Hkv, -1, S)  # (B, Hkv, H / Hkv * T, S)
    return (groups @ v).view(q.shape)


def sdpa_attention(q, k, v, mask, dropout):
    """Attention by torch's fused kernels, which never hold the whole matrix of weights."""
    is_square = q.shape[2] == k.shape[2]  # the kernels' own causal mask is only right where T == S
    causal = mask is not None and mask.ndim == 2 and is_square
    needs_mask = mask is not None and not causal
    attn_mask = mask.to(q.dtype) if needs_mask else None
    p = dropout.p if dropout.training else 0.0
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask, p, is_causal=causal, enable_gqa=gqa)


def auto_attention(q, k, v, mask, dropout):
    """The faster of the two: explicit on a CPU for short bfloat16 and for dropout, sdpa otherwise.

    Forward and backward on one core of a Zen 5, explicit against sdpa, 8 x 6 heads, T 256, D 64:
    14 against 33 ms in bfloat16, 43 against 32 in float32; 2 x 12 heads, T 768: 104 against 82 and
    199 against 106. With dropout torch has no fused kernel for a CPU.
    """
    short = q.shape[2] * k.shape[2] <= 512 * 512 and v.dtype is torch.bfloat16
    dropping = dropout.training and dropout.p > 0
    explicit = q.device.type == "cpu" and (short or dropping)
    attend = explicit_attention if explicit else sdpa_attention
    return attend(q, k, v, mask, dropout)


ATTENTION = {"auto": auto_attention, "sdpa": sdpa_attention, "explicit": explicit_attention}


def keep(q, k, rotation):
    return q, k


def rotate(q, k, rotation):
    return tuple(apply_rope(x.float(), *rotation).to(x.dtype) for x in (q, k))


def normalise(q, k, rotation):
    return tuple(F.rms_norm(x.float(), x.shape[-1:]).to(x.dtype) for x in (q, k))


class NormalisedRotation(torch.autograd.Function):
    """A head divided by its root mean square, then rotated: x (B, T, H, D) -> the same.

    A rotation keeps lengths. So the result is the rotated x over rms(x), and the backward pass
    needs only the result and 1 / rms(x): that of a norm, then a rotation back.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        wide, eps = x.float(), torch.finfo(torch.float32).eps  # as in F.rms_norm
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
        scale = (mean_square + eps).rsqrt()  # (B, T, H, 1)
        y = apply_rope(wide * scale, cos, sin).to(x.dtype)
        ctx.save_for_backward(y, scale, cos, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, scale, cos, sin = ctx.saved_tensors
        wide, y = grad.float(), y.float()
        share = (wide * y).mean(-1, keepdim=True)  # of y in the gradient, which the norm takes out
        wide = torch.addcmul(wide, y, share, value=-1) * scale
        return apply_rope(wide, cos, -sin).to(grad.dtype), None, None


def normalise_and_rotate(q, k, rotation):
    return tuple(NormalisedRotation.apply(x, *rotation) for x in (q, k))


QUERIES_KEYS = {  # by (qk_norm, pos): what happens to queries and keys before their product
    (False, "learned"): keep,
    (False, "rope"): rotate,
    (True, "learned"): normalise,
    (True, "rope"): normalise_and_rotate,
}


class Dropout(nn.Dropout):
    """nn.Dropout that draws one byte per value on a CPU, so p is rounded to a multiple of 1/256.

    torch draws eight bytes per value in one thread, which took 25 of the 185 ms of a step (3.2M
    parameters, 8 x 256 tokens).
    """

    def forward(self, x):
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        dropped = round(256 * self.p)  # of 256
        # each random int64 supplies eight random bytes
        numbers = torch.empty(math.ceil(x.numel() / 8), dtype=torch.int64).random_(-(2**63), None)
        kept = numbers.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
        return x * (kept * (256 / (256 - dropped))).to(x.dtype)


class WeightedQKNorm(nn.Module):
    """QK-norm as in Qwen3 (arXiv:2505.09388): a weight for each channel of a head, and norm_eps.

    q (B, T, H, D), k (B, T, Hkv, D) -> the same shapes and dtype, rotated where there is RoPE.
    """

    def __init__(self, config):
        super().__init__()
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps)
        self.then = QUERIES_KEYS[False, config.pos]

    def reset_parameters(self):
        self.q_norm.reset_parameters()
        self.k_norm.reset_parameters()

    def forward(self, q, k, rotation):
        def normed(x, norm):
            weight = norm.weight.float()
            return F.rms_norm(x.float(), norm.normalized_shape, weight, norm.eps).to(x.dtype)

        return self.then(normed(q, self.q_norm), normed(k, self.k_norm), rotation)


class LoRALinear(nn.Linear):
    """nn.Linear plus a trained product of low rank: x W^T + x A^T B^T alpha / r, with W frozen.

    B starts at zero, so at first nothing changes. Source: LoRA, arXiv:2106.09685.
    """

    def __init__(self, n_in, n_out, bias, rank, alpha):
        super().__init__(n_in, n_out, bias)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, n_in))
        self.lora_b = nn.Parameter(torch.zeros(n_out, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x):
        low_rank = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return super().forward(x) + self.scale * low_rank

    @torch.no_grad()
    def merged(self):
        """An nn.Linear that computes the same: W + B A alpha / r, summed in float32."""
        has_bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, has_bias, device="meta")
        product = (self.scale * self.lora_b.float()) @ self.lora_a.float()
        linear.weight = nn.Parameter((self.weight.float() + product).to(self.weight.dtype))
        linear.bias = self.bias
        return linear


def make_linear(config, name, n_in, n_out, bias):
    """The linear layer called `name` of a block, with LoRA where the config asks for it."""
    if config.lora_rank is None or name not in config.lora_targets.split():
        return nn.Linear(n_in, n_out, bias)
    if config.lora_rank > config.n_embd:
        raise ValueError(f"lora_rank={config.lora_rank} must be at most n_embd={config.n_embd}")
    return LoRALinear(n_in, n_out, bias, config.lora_rank, config.lora_alpha)


class Attention(nn.Module):
    """Causal self-attention: multi-head, grouped-query (n_kv_head < n_head) or multi-query."""

    def __init__(self, config, layer):
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.layer, self.head_dim = layer, D
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.q_proj = make_linear(config, "q_proj", C, config.n_head * D, config.qkv_bias)
        self.k_proj = make_linear(config, "k_proj", C, config.n_kv_head * D, config.qkv_bias)
        self.v_proj = make_linear(config, "v_proj", C, config.n_kv_head * D, config.qkv_bias)
        self.o_proj = make_linear(config, "o_proj", config.n_head * D, C, config.o_bias)
        weighted = config.qk_norm_weight
        self.prepare = (
            WeightedQKNorm(config) if weighted else QUERIES_KEYS[config.qk_norm, config.pos]
        )
        self.attend = ATTENTION[config.attention]
        self.attn_dropout, self.o_dropout = Dropout(config.attn_dropout), Dropout(config.dropout)

    def project(self, x):
        """x (B, T, C) -> q (B, T, H, D), k and v (B, T, Hkv, D)."""
        B, T, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return tuple(projected.view(B, T, -1, self.head_dim) for projected in (q, k, v))

    def queries_keys_values(self, x, rotation):
        """x (B, T, C) -> q (B, H, T, D), k and v (B, Hkv, T, D); q and k as `prepare` makes them."""
        q, k, v = self.project(x)
        q, k = self.prepare(q, k, rotation)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, positions, rotation, mask, cache=None):
        B, T, _ = x.shape
        q, k, v = self.queries_keys_values(x, rotation)
        if cache is not None:
            k, v = cache.append(self.layer, k, v, positions)  # (B, Hkv, S, D)
        y = self.attend(q, k, v, mask, self.attn_dropout)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H * D)
        return self.o_dropout(self.o_proj(y))  # (B, T, C)


# MLP and block.


def gelu_by_tanh(x):
    return F.gelu(x, approximate="tanh")


def relu_squared(x):
    return F.relu(x).square()


ACTIVATIONS = {"gelu": gelu_by_tanh, "gelu_exact": F.gelu, "relu2": relu_squared}


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them.

    GPT-2's GELU is approximated by tanh; the exact GELU is three times as fast on a CPU.
    ReLU squared: arXiv:2109.08668.
    """

    def __init__(self, config):
        super().__init__()
        self.up_proj = make_linear(config, "up_proj", config.n_embd, config.n_inner, config.bias)
        self.down_proj = make_linear(
            config, "down_proj", config.n_inner, config.n_embd, config.bias
        )
        self.activation, self.dropout = ACTIVATIONS[config.mlp], Dropout(config.dropout)

    def forward(self, x):
        x = self.activation(self.up_proj(x))  # (B, T, F)
        return self.dropout(self.down_proj(x))  # (B, T, C)


class SwiGLU(nn.Module):
    """Llama's gated MLP: silu(gate) * up, then down. Meta's names: w1 gate, w3 up, w2 down."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = make_linear(
            config, "gate_proj", config.n_embd, config.n_inner, config.bias
        )
        self.up_proj = make_linear(config, "up_proj", config.n_embd, config.n_inner, config.bias)
        self.down_proj = make_linear(
            config, "down_proj", config.n_inner, config.n_embd, config.bias
        )
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        x = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (B, T, F)
        return self.dropout(self.down_proj(x))  # (B, T, C)


def make_norm(config):
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)


class Block(nn.Module):
    """Attention, then the MLP: each reads the normalised residual stream and adds to it."""

    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = make_norm(config)
        self.attn = Attention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else MLP(config)

    def forward(self, x, positions, rotation, mask, cache=None):
        x = x + self.attn(self.attn_norm(x), positions, rotation, mask, cache)  # (B, T, C)
        return x + self.mlp(self.mlp_norm(x))


class RecomputedBlock(Block):
    """A Block of which training keeps the input only; the backward pass runs it again.

    The noise of dropout is the same both times.
    """

    def forward(self, *inputs):
        if not torch.is_grad_enabled():
            return super().forward(*inputs)
        return recompute(super().forward, *inputs, use_reentrant=False)


# Three functions, each in two versions. The settings smear, embed_skip and loss_chunk choose.


def embed_tokens(tok_emb, idx, positions, cache):
    """The embedding of each token: idx (B, T) -> (B, T, C)."""
    return tok_emb(idx)


class SmearedEmbedding(nn.Module):
    """The embedding of each token plus a learned fraction of the previous token's: (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.smear = nn.Parameter(torch.empty(config.n_embd))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.smear)

    def forward(self, tok_emb, idx, positions, cache):
        x = tok_emb(idx)  # (B, T, C)
        if cache is None:
            previous = F.pad(x[:, :-1], (0, 0, 1, 0))  # zero before the first token
        else:
            is_first = (positions == 0)[..., None]
            previous = tok_emb(cache.previous(idx, positions)) * ~is_first
        return x + self.smear * previous


def residual_stream(x, embedded, layer):
    """What a block reads: the residual stream x (B, T, C)."""
    return x


class EmbedSkip(nn.Module):
    """What a block reads: a learned mix of the residual stream and the embedding, (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.stream_share = nn.Parameter(torch.empty(config.n_layer))
        self.embed_share = nn.Parameter(torch.empty(config.n_layer))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.stream_share)
        nn.init.zeros_(self.embed_share)

    def forward(self, x, embedded, layer):
        return self.stream_share[layer] * x + self.embed_share[layer] * embedded


def cross_entropy(head, x, targets):
    """(summed loss in nats, logits (N, V)) of x (N, C) and targets (N,); -100 is not scored."""
    logits = head(x).float()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"), logits


class ChunkedCrossEntropy(torch.autograd.Function):
    """The same summed loss, `chunk` tokens at a time.

    The gradient of a chunk is taken together with its loss, so that its logits need not wait for
    the backward pass, nor be computed twice.
    """

    @staticmethod
    def forward(ctx, head, chunk, x, targets, *weights):
        """weights: the parameters of head that are trained. x, targets: as above."""
        trains, total, x_grads = any(ctx.needs_input_grad), 0, []
        weight_grads = [torch.zeros_like(weight) for weight in weights] if trains else []
        for piece, piece_targets in zip(x.split(chunk), targets.split(chunk), strict=True):
            with torch.set_grad_enabled(trains):
                piece = piece.detach().requires_grad_(trains)
                loss, _ = cross_entropy(head, piece, piece_targets)
            total = total + loss.detach()
            if trains:
                x_grad, *grads = torch.autograd.grad(loss, [piece, *weights])
                x_grads.append(x_grad)
                for weight_grad, grad in zip(weight_grads, grads, strict=True):
                    weight_grad += grad
        if trains:
            ctx.save_for_backward(torch.cat(x_grads), *weight_grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # in place, since they are large: so there can be one backward pass
        x_grad, *weight_grads = (saved.mul_(grad) for saved in ctx.saved_tensors)
        return None, None, x_grad, None, *weight_grads


def chunked_cross_entropy(head, x, targets, chunk):
    """(the same loss, None), in less memory."""
    trains = torch.is_grad_enabled()  # apply() cannot see that of weights
    weights = [weight for weight in head.parameters() if weight.requires_grad and trains]
    return ChunkedCrossEntropy.apply(head, chunk, x, targets, *weights), None


def uniform_numbers(n, generator, device):
    """n numbers in [0, 1), float64: (n, 1). device: where they are drawn without a generator."""
    source = device if generator is None else generator.device
    return torch.rand(n, 1, dtype=torch.float64, device=source, generator=generator)


def draw(probs, generator=None):
    """Draw an id from each row of probs (B, V), which need not sum to 1 -> (B, 1).

    The first id whose cumulative probability passes a uniform number, in float64: on a CPU far
    faster than torch.multinomial. Apple's GPUs have no float64, so there the CPU draws. generator:
    one for all rows, or a list of one for each, so that a row's draws do not depend on the others.
    """
    device = torch.device("cpu") if probs.device.type == "mps" else probs.device
    cumulative = probs.to(device).double().cumsum(-1)  # (B, V)
    if isinstance(generator, list):
        uniform = torch.cat([uniform_numbers(1, each, device) for each in generator])
    else:
        uniform = uniform_numbers(len(probs), generator, device)  # (B, 1)
    drawn = torch.searchsorted(cumulative, uniform.to(device) * cumulative[:, -1:], right=True)
    # the NaN logits of a diverged model give an index out of range, which is clamped
    return drawn.clamp(max=probs.shape[-1] - 1).to(probs.device)


class GPT(nn.Module):
    """A decoder-only language model: idx (B, T) -> logits (B, T, V)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = SmearedEmbedding(config) if config.smear else embed_tokens
        self.block_input = EmbedSkip(config) if config.embed_skip else residual_stream
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        if config.pos == "learned":
            self.pos_emb = LearnedPositions(config.block_size, config.n_embd)
        else:
            self.pos_emb = RotaryPositions(config)
        self.dropout = Dropout(config.dropout)
        make_block = RecomputedBlock if config.recompute else Block
        self.blocks = nn.ModuleList(make_block(config, layer) for layer in range(config.n_layer))
        self.final_norm = make_norm(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.head.weight = self.tok_emb.weight
        self.classifier = nn.Linear(config.n_embd, config.n_classes) if config.n_classes else None
        self.cross_entropy = cross_entropy
        if config.loss_chunk is not None:
            self.cross_entropy = functools.partial(chunked_cross_entropy, chunk=config.loss_chunk)
        if self.tok_emb.weight.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, normal_=nn.init.normal_):
        """Draw fresh weights, from input to output: GPT-2's N(0, 0.02), biases zero, norms one.

        normal_(tensor, std=...) draws them.
        """
        std = 0.02
        # 2 L outputs are added to the residual stream: 1 / sqrt(2 L) keeps its variance
        residual_std = (
            0.0 if self.config.zero_init else std / math.sqrt(2 * max(1, len(self.blocks)))
        )
        normal_(self.tok_emb.weight, std=std)
        if isinstance(self.pos_emb, LearnedPositions):
            normal_(self.pos_emb.weight, std=std)
        for part in (self.embed_tokens, self.block_input):
            if isinstance(part, SmearedEmbedding | EmbedSkip):
                part.reset_parameters()
        for block in self.blocks:
            attn, mlp = block.attn, block.mlp
            inner = [attn.q_proj, attn.k_proj, attn.v_proj, mlp.up_proj]
            inner += [mlp.gate_proj] if isinstance(mlp, SwiGLU) else []
            for linear in inner:
                normal_(linear.weight, std=std)
            for linear in (attn.o_proj, mlp.down_proj):
                normal_(linear.weight, std=residual_std)
            for linear in (*inner, attn.o_proj, mlp.down_proj):
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
            if self.config.qk_norm_weight:
                attn.prepare.reset_parameters()
            block.attn_norm.reset_parameters()
            block.mlp_norm.reset_parameters()
        self.final_norm.reset_parameters()
        if not self.config.tie_weights:
            normal_(self.head.weight, std=0.0 if self.config.zero_init else std)

    def embed(self, idx, cache=None):
        """What the blocks read: x (B, T, C), positions (T,) or (B, T), rotation, mask."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(
                f"{T} tokens do not fit in block_size={self.config.block_size}: "
                "shorten the text or raise block_size"
            )
        positions = torch.arange(T, device=idx.device) if cache is None else cache.positions(T)
        S = T if cache is None else cache.attended(T)
        needs_mask = T > 1 or positions.ndim == 2
        mask = causal_mask(positions, S) if needs_mask else None  # (T, S) or (B, 1, T, S)
        x = self.embed_tokens(self.tok_emb, idx, positions, cache)  # (B, T, C)
        x, rotation = self.pos_emb(x, positions)
        return self.dropout(x), positions, rotation, mask

    def hidden(self, idx, cache=None):
        """The normalised residual stream, which the head reads: idx (B, T) -> (B, T, C).

        Appends to the cache, if there is one.
        """
        embedded, positions, rotation, mask = self.embed(idx, cache)
        x = embedded
        for layer, block in enumerate(self.blocks):
            x = self.block_input(x, embedded, layer)
            x = block(x, positions, rotation, mask, cache)  # (B, T, C)
        if cache is not None:
            cache.advance(idx.shape[1])
        return self.final_norm(x)

    def forward(self, idx, targets=None, cache=None):
        """(logits, loss): logits (B, T, V) in float32, and the mean cross-entropy in nats.

        idx (B, T) int64; targets (B, T), already shifted: targets[b, t] follows idx[b, t], and -100
        is not scored. Without targets, loss is None. With targets and loss_chunk, logits is None.
        """
        # not self.hidden, which gathers a shared model anew, for calls from outside
        x = type(self).hidden(self, idx, cache)  # (B, T, C)
        if targets is None:
            return self.head(x).float(), None
        total, logits = self.cross_entropy(self.head, x.flatten(0, 1), targets.flatten())
        n_scored = (targets != -100).sum().clamp(min=1)  # a mean over nothing would be NaN
        if logits is not None:
            logits = logits.view(*idx.shape, -1)
        return logits, total / n_scored

    def classify(self, idx, lengths):
        """Class logits (B, n_classes) in float32 of right-padded rows: idx (B, T), lengths (B,)."""
        return self.class_logits(self.hidden(idx), lengths)

    def class_logits(self, hidden, lengths):
        """Class logits (B, n_classes) in float32 from hidden states (B, T, C)."""
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]  # (B, C)
        return self.classifier(last).float()

    @torch.no_grad()
    def attention_maps(self, idx):
        """The attention weights of every head: idx (B, T) -> (L, B, H, T, T); rows sum to 1."""
        embedded, positions, rotation, mask = self.embed(idx)
        maps, x = [], embedded
        for layer, block in enumerate(self.blocks):
            x = self.block_input(x, embedded, layer)
            q, k, _ = block.attn.queries_keys_values(block.attn_norm(x), rotation)
            maps.append(attention_weights(q, k, mask))  # (B, H, T, T)
            x = block(x, positions, rotation, mask)
        return torch.stack(maps)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Extend each row of idx (B, T) by max_new_tokens ids -> (B, T + max_new_tokens).

        temperature=0 takes the likeliest id; top_k draws among the k likeliest. When the text
        outgrows block_size, the model goes on with its last block_size / 2 tokens. Each new token
        costs a whole forward pass: this is the reference for glass.generate.generate, which is
        fast and does more.
        """
        window = idx  # what the model sees of the text
        for _ in range(max_new_tokens):
            if window.shape[1] > self.config.block_size:
                window = window[:, -max(1, self.config.block_size // 2) :]
            logits = self.head(self.hidden(window)[:, -1]).float()  # (B, V)
            if top_k is not None:
                smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                new = draw(F.softmax(logits / temperature, dim=-1), generator)
            idx, window = torch.cat([idx, new], dim=1), torch.cat([window, new], dim=1)
        return idx

    def new_cache(self, batch_size, max_len):
        """An empty KVCache for batch_size rows of at most max_len positions.

        Its dtype is that of the weights, or autocast's where autocast is on.
        """
        if max_len > self.config.block_size:
            raise ValueError(
                f"max_len={max_len} must be at most block_size={self.config.block_size}: "
                "shorten the text"
            )
        device_type = self.device.type
        autocasts = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocasts else self.dtype
        return KVCache(self.config, batch_size, max_len, self.device, dtype)

    def decode(self, ids, cache):
        """Append tokens to every row of the cache: ids (B,) or (B, T) -> logits (..., V) in float32."""
        idx = ids if ids.ndim == 2 else ids[:, None]  # (B, T)
        return self.head(self.hidden(idx, cache)).float().view(*ids.shape, -1)

    def merge_lora(self):
        """Replace every LoRALinear by an nn.Linear that computes the same, in place."""
        for parent in list(self.modules()):
            for name, child in parent.named_children():
                if isinstance(child, LoRALinear):
                    setattr(parent, name, child.merged())
        self.config = replace(self.config, lora_rank=None)

    @property
    def device(self):
        return self.tok_emb.weight.device

    @property
    def dtype(self):
        return self.tok_emb.weight.dtype

    @classmethod
    def from_pretrained(cls, name_or_folder, **overrides):
        """A model with published GPT-2 or Llama weights: see glass/weights.py."""
        from glass import weights

        return weights.load_pretrained(name_or_folder, **overrides)

    def save_pretrained(self, folder, tokenizer=None):
        """Write a folder that transformers loads, tokenizer included: see glass/weights.py."""
        from glass import weights

        weights.save_pretrained(self, folder, tokenizer)

    def parameter_count(self):
        """Number of parameters, a tied matrix counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T=None):
        """Floating-point operations of training on one token of a sequence of T (None: block_size).

        One forward pass costs 2 per matrix weight, and 4 H D T per layer for attention, masked
        positions included. An embedding lookup costs nothing. Training costs three forward passes.
        Source: PaLM, arXiv:2204.02311, appendix B.
        """
        config, T = self.config, T or self.config.block_size
        looked_up = sum(p.numel() for p in self.pos_emb.parameters())
        if not config.tie_weights:  # a tied matrix is also the head, and multiplies
            looked_up += self.tok_emb.weight.numel()
        attention = 4 * config.n_layer * config.n_head * config.head_dim * T
        return 3 * (2 * (self.parameter_count() - looked_up) + attention)

    def summary(self):
        """Parts, number of parameters, FLOPs per token, and memory of the model, in a paragraph."""
        c, n = self.config, self.parameter_count()
        bytes_per_position = (
            2 * c.n_layer * c.n_kv_head * c.head_dim * self.tok_emb.weight.element_size()
        )
        return (
            f"{n:,} parameters: {c.n_layer} blocks of {c.n_head} heads ({c.n_kv_head} for keys and "
            f"values) x {c.head_dim}, {c.n_embd} channels, {c.n_inner} in {c.mlp}, {c.norm}, "
            f"{c.pos} positions, vocabulary {c.vocab_size:,}\n"
            f"{self.flops_per_token() / 1e6:,.1f} MFLOP per trained token; memory: weights "
            f"{4 * n / 1e6:,.0f} MB in float32, {16 * n / 1e6:,.0f} MB with gradients and Adam's "
            f"moments, cache {bytes_per_position * c.block_size / 1e6:,.1f} MB "
            f"a sequence of {c.block_size}"
        )


def count_parameters(config):
    """GPT(config).parameter_count(), by arithmetic alone: nothing is allocated."""
    c, C = config, config.n_embd
    norm = C * (2 if c.norm == "layernorm" and c.bias else 1)
    n_q, n_kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    attention = C * (n_q + 2 * n_kv) + n_q * C
    attention += (n_q + 2 * n_kv) * c.qkv_bias + C * c.o_bias + 2 * c.head_dim * c.qk_norm_weight
    n_up = 2 if c.mlp == "swiglu" else 1
    mlp = (n_up + 1) * C * c.n_inner + (n_up * c.n_inner + C) * c.bias
    total = c.n_layer * (2 * norm + attention + mlp) + norm + c.vocab_size * C
    total += 0 if c.tie_weights else c.vocab_size * C
    total += c.block_size * C if c.pos == "learned" else 0
    total += C * c.smear + 2 * c.n_layer * c.embed_skip
    return total + ((C + 1) * c.n_classes if c.n_classes else 0)


def model_config(settings, vocab_size):
    """The model's part of a script's settings, as a GPTConfig with the tokenizer's vocab_size."""
    shape = {field.name: getattr(settings, field.name) for field in fields(GPTConfig)}
    shape["vocab_size"] = vocab_size
    return GPTConfig(**shape)


# Shapes of published models: Radford et al. 2019, table 2; arXiv:2407.21783, table 3; Llama 3.2's
# config.json.


def gpt2(**shape):
    """The constants that all of GPT-2's sizes share."""
    return GPTConfig(vocab_size=50257, block_size=1024, bias=True, **shape)


def llama3(factor=None, **shape):
    """The constants of Llama 3. `factor` extends the context: 8 in 3.1, 32 in the small 3.2."""
    scaling = None
    if factor is not None:
        scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling["original_max_position_embeddings"] = 8192
    parts = dict(norm="rmsnorm", mlp="swiglu", pos="rope", rope_theta=500000.0, n_kv_head=8)
    block_size = 8192 if factor is None else 131072
    return GPTConfig(
        vocab_size=128256, block_size=block_size, rope_scaling=scaling, **parts, **shape
    )


def modern(**shape):
    """The parts of config/shakespeare_char.py, which lowered the loss in RECIPE.md."""
    parts = dict(mlp="gelu_exact", pos="rope", qk_norm=True, tie_weights=False)
    parts |= dict(zero_init=True, smear=True, embed_skip=True)
    return GPTConfig(vocab_size=50257, block_size=1024, **parts, **shape)


EIGHT_B = dict(n_layer=32, n_head=32, n_embd=4096, n_inner=14336, tie_weights=False)
SEVENTY_B = dict(n_layer=80, n_head=64, n_embd=8192, n_inner=28672, tie_weights=False)
PRESETS = {
    "gpt2": gpt2(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": gpt2(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": gpt2(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": gpt2(n_layer=48, n_head=25, n_embd=1600),  # 1558M
    "llama3-8b": llama3(**EIGHT_B),
    "llama3-70b": llama3(**SEVENTY_B),
    "llama3.1-8b": llama3(8.0, **EIGHT_B),
    "llama3.1-70b": llama3(8.0, **SEVENTY_B),
    "llama3.2-1b": llama3(32.0, n_layer=16, n_head=32, n_embd=2048, n_inner=8192),
    "llama3.2-3b": llama3(32.0, n_layer=28, n_head=24, n_embd=3072, n_inner=8192),
    # no published weights: sizes of GPT-2 with heads of 128 channels
    "modern-124m": modern(n_layer=12, n_head=6, n_embd=768),
    "modern-355m": modern(n_layer=24, n_head=8, n_embd=1024),
}
