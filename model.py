"""GPT-2 and Llama 3 as settings of the same parts, from token ids to logits and to generated text.

Read downwards: settings, presets, positions (RoPE), KV cache, attention, MLP, block, model, generation, device.
Shapes: B sequences, T new positions, S attended positions (cached + new), C channels, H query heads, Hkv key/value
heads, D channels per head, F MLP channels, V vocabulary, L layers.

GPT-2: Radford et al. 2019. Llama 3: arXiv:2407.21783. RoPE: arXiv:2104.09864. RMSNorm: arXiv:1910.07467. SwiGLU and
its kin: arXiv:2002.05202. Grouped-query attention: arXiv:2305.13245. QK-norm: arXiv:2010.04245.
"""

import contextlib
import math
import typing
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute


@dataclass
class GPTConfig:
    """A model's shape and parts. None means: derived from the others, in __post_init__. Raises ValueError if impossible."""

    # model: the defaults are GPT-2 124M without biases
    vocab_size: int = 50257  # tokens; train.py takes it from the tokenizer
    block_size: int = 1024  # tokens of context
    n_layer: int = 12  # blocks; 0 makes the bigram model
    n_head: int = 12  # query heads of each attention
    n_kv_head: int | None = None  # key/value heads, n_head where None: fewer is grouped-query, 1 multi-query attention
    n_embd: int = 768  # channels
    head_dim: int | None = None  # channels of a head, n_embd / n_head where None
    n_inner: int | None = None  # MLP channels; where None 4 n_embd, for swiglu 8/3 n_embd rounded up to a multiple of 64
    dropout: float = 0.0  # share of embeddings and of every part's output dropped in training
    attn_dropout: float | None = None  # share of attention weights dropped in training, `dropout` where None
    bias: bool = False  # biases in linear layers and LayerNorms
    qkv_bias: bool | None = None  # biases of the query, key and value projections, as `bias` where None
    o_bias: bool | None = None  # bias of the output projection of attention, as `bias` where None
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # before attention, before the MLP, before the head
    norm_eps: float = 1e-5  # added to the variance or mean square
    mlp: Literal["gelu", "gelu_exact", "swiglu", "relu2"] = "gelu"  # gelu is GPT-2's, by tanh; relu2 is ReLU squared
    pos: Literal["learned", "rope"] = "learned"  # positions: an embedding, or a rotation of queries and keys
    rope_theta: float = 10000.0  # slowest wavelength of the rotation is about 2 pi rope_theta positions
    rope_scaling: dict | None = None  # Llama 3.1's, a dict with the keys of `llama3` below
    qk_norm: bool = False  # queries and keys divided by their root mean square, without a weight
    tie_weights: bool = True  # the head uses the token embedding's matrix
    smear: bool = False  # to each token's embedding comes a learned share of the one before it
    embed_skip: bool = False  # each block reads the residual stream and the embedding again, each with a learned weight
    zero_init: bool = False  # output projections, and an untied head, start at zero: at first a block changes nothing
    loss_chunk: int | None = None  # tokens whose logits are there at once in training; None: all, and forward returns them
    attention: Literal["auto", "sdpa", "explicit"] = "auto"  # auto: the explicit product for short blocks on CPU, else sdpa
    lora_rank: int | None = None  # of the trained products beside frozen matrices (LoRA); None: no LoRA
    lora_alpha: float = 16.0  # LoRA's products are scaled by lora_alpha / lora_rank
    lora_targets: str = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"  # the linear layers that get LoRA
    n_classes: int | None = None  # classes of a classification head on the last token; None: no such head

    def __post_init__(self):
        for field in fields(GPTConfig):
            options, value = typing.get_args(field.type), getattr(self, field.name)
            if typing.get_origin(field.type) is Literal and value not in options:
                raise ValueError(f"{field.name}={value!r} must be one of {' '.join(options)}")
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        for name in ("vocab_size", "block_size", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        self.attn_dropout = self.dropout if self.attn_dropout is None else self.attn_dropout
        for name in ("dropout", "attn_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if self.n_layer < 0:
            raise ValueError(f"n_layer={self.n_layer} must not be negative")
        names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
        if self.lora_rank is not None and (self.lora_rank < 1 or not set(self.lora_targets.split()) <= set(names)):
            found = f"lora_rank={self.lora_rank} lora_targets={self.lora_targets!r}"
            raise ValueError(f"{found}: the rank must be at least 1, the targets some of {' '.join(names)}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}: change either")
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(
                    f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}, so that heads get equal channels: "
                    "change either, or set head_dim"
                )
            self.head_dim = self.n_embd // self.n_head
        if self.pos == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even, since RoPE rotates pairs: change n_embd or n_head")
        if self.n_inner is None:
            self.n_inner = 64 * math.ceil(8 * self.n_embd / 3 / 64) if self.mlp == "swiglu" else 4 * self.n_embd
        self.qkv_bias = self.bias if self.qkv_bias is None else self.qkv_bias
        self.o_bias = self.bias if self.o_bias is None else self.o_bias


def gpt2(**shape):
    return GPTConfig(vocab_size=50257, block_size=1024, bias=True, **shape)


def llama3(factor=None, **shape):
    """Published constants of Llama 3; `factor` is the context extension of 3.1 (8) and of the small 3.2 models (32)."""
    scaling = factor and {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    parts = dict(norm="rmsnorm", mlp="swiglu", pos="rope", rope_theta=500000.0, rope_scaling=scaling, n_kv_head=8)
    return GPTConfig(vocab_size=128256, block_size=131072 if factor else 8192, **parts, **shape)


def modern(**shape):
    """The parts that won in RECIPE.md's measurements, for models trained from scratch."""
    parts = dict(norm="rmsnorm", pos="rope", qk_norm=True, tie_weights=False, zero_init=True, smear=True, embed_skip=True)
    return GPTConfig(vocab_size=50257, block_size=1024, **parts, **shape)


# Shapes of published models: Radford et al. 2019, table 2; arXiv:2407.21783, table 3; Llama 3.2's config.json.
PRESETS = {
    "gpt2": gpt2(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": gpt2(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": gpt2(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": gpt2(n_layer=48, n_head=25, n_embd=1600),  # 1558M
    "llama3-8b": llama3(n_layer=32, n_head=32, n_embd=4096, n_inner=14336, tie_weights=False),
    "llama3-70b": llama3(n_layer=80, n_head=64, n_embd=8192, n_inner=28672, tie_weights=False),
    "llama3.1-8b": llama3(8.0, n_layer=32, n_head=32, n_embd=4096, n_inner=14336, tie_weights=False),
    "llama3.1-70b": llama3(8.0, n_layer=80, n_head=64, n_embd=8192, n_inner=28672, tie_weights=False),
    "llama3.2-1b": llama3(32.0, n_layer=16, n_head=32, n_embd=2048, n_inner=8192),
    "llama3.2-3b": llama3(32.0, n_layer=28, n_head=24, n_embd=3072, n_inner=8192),
    "modern-124m": modern(n_layer=12, n_head=6, n_embd=768),  # nobody's weights: GPT-2's shape with heads of 128 channels
    "modern-355m": modern(n_layer=24, n_head=8, n_embd=1024),
}


def rope_frequencies(config):
    """Radians per position of each rotated pair of channels, (D / 2,) float32 on the CPU.

    Llama 3.1's scaling keeps the pairs that turn often within the original context, divides the frequency of those that
    turn less than once by `factor`, and blends between. Source: arXiv:2104.09864; Meta's llama-models, apply_scaling.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim  # (D / 2,)
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return frequencies
    scaling = config.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1 keeps the frequency, 0 divides it
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


def rope_rotation(angles):
    """The cosines, and the sines with the sign that apply_rope needs: angles (..., D / 2) in radians -> 2 x (..., D)."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x, cos, sin):
    """Rotate pairs of channels by the angle of their position: x (B, T, H, D) -> (B, T, H, D).

    cos, sin (T, 1, D) or (B, T, 1, D) as rope_rotation gives them: x1 cos - x2 sin and x2 cos + x1 sin.
    Channel i pairs with i + D / 2, as in Hugging Face checkpoints; in Meta's, 2i pairs with 2i + 1.
    Source: RoFormer, arXiv:2104.09864.
    """
    x1, x2 = x.chunk(2, dim=-1)  # (B, T, H, D / 2) each
    return torch.addcmul(x * cos, torch.cat([x2, x1], dim=-1), sin)


class KVCache:
    """Keys and values of the positions seen so far, for every layer; row b has seen `lengths[b]` of at most max_len.

    Rows may differ in length: a batch of prompts is right-padded, prefilled at once, and the lengths are then set to the
    true ones. What lies beyond a row's length is never attended to, and is overwritten as the row grows. With `static`
    all of max_len is attended to, masked, and no Python number changes from step to step: shapes for torch.compile.
    """

    def __init__(self, config, batch_size, max_len, device, dtype):
        shape = (batch_size, config.n_kv_head, max_len, config.head_dim)
        # a tensor for each layer: of one for all, a compiled step would copy the whole to change a slice
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]  # (B, Hkv, max_len, D)
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.ids = torch.zeros(batch_size, max_len, dtype=torch.int64, device=device)
        self.device, self.max_len, self.static = device, max_len, False
        self.length = 0  # positions of the longest row
        self.lengths = None  # (B,) where rows differ or the cache is static; None where all have `length`

    def set_rows(self, lengths, source, static=False):
        """Row b becomes what row source[b] is, of which lengths[b] positions are real and the rest padding: (B,) each."""
        if len(self.ids) < len(lengths):  # rows of the prefill were equal
            self.k, self.v = ([store[source] for store in stores] for stores in (self.k, self.v))
            self.ids = self.ids[source]
        self.length, self.static = int(lengths.max()), static
        self.lengths = lengths.clone() if static or bool((lengths != self.length).any()) else None

    def positions(self, T):
        """Where the next T tokens stand: (T,), or (B, T) where rows differ. Raises ValueError where they do not fit."""
        if not self.static and self.length + T > self.max_len:
            raise ValueError(f"{self.length + T} positions do not fit in a cache of max_len={self.max_len}: make it longer")
        new = torch.arange(T, device=self.device)
        return self.length + new if self.lengths is None else self.lengths[:, None] + new

    def attended(self, T):
        """How many positions the next T tokens attend to at most: S."""
        return self.max_len if self.static else self.length + T

    def append(self, layer, k, v, positions):
        """Store k, v (B, Hkv, T, D) at `positions`; all keys and values that are attended to, (B, Hkv, S, D) each."""
        S = self.attended(k.shape[2])
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            if self.lengths is None:
                store[:, :, self.length : S] = new
            else:
                rows = torch.arange(len(new), device=new.device)[:, None]  # (B, 1)
                store[rows, :, positions] = new.transpose(1, 2).to(store.dtype)  # (B, T, Hkv, D)
        return self.k[layer][:, :, :S], self.v[layer][:, :, :S]

    def previous(self, idx, positions):
        """Note the tokens idx (B, T) at `positions`; the token before each, (B, T), arbitrary at position 0."""
        rows = torch.arange(len(idx), device=idx.device)[:, None]  # (B, 1)
        self.ids[rows, positions] = idx
        return self.ids[rows, (positions - 1).clamp(min=0)]

    def advance(self, T):
        if self.lengths is not None:
            self.lengths += T
        if not self.static:
            self.length += T


def causal_mask(positions, S):
    """0 where a position may attend to one at or before it, -inf elsewhere: (T, S), or (B, 1, T, S) where rows differ."""
    later = torch.arange(S, device=positions.device) > positions[..., None]  # (T, S) or (B, T, S)
    mask = torch.zeros(later.shape, device=positions.device).masked_fill(later, float("-inf"))
    return mask if mask.ndim == 2 else mask[:, None]


def attention_weights(q, k, mask):
    """Softmax of the scaled products: q (B, H, T, D), k (B, Hkv, S, D), mask of causal_mask or None -> (B, H, T, S)."""
    B, H, T, D = q.shape
    Hkv, S = k.shape[1:3]
    q = (q * D**-0.5).reshape(B, Hkv, H // Hkv * T, D)  # the query heads of a group stand under each other
    scores = (q @ k.transpose(-2, -1)).view(B, H, T, S)
    return F.softmax(scores if mask is None else scores + mask.to(scores.dtype), dim=-1)


class Dropout(nn.Dropout):
    """nn.Dropout that draws a byte for each value on a CPU, so p is rounded to 1/256: torch draws 8 bytes, in one thread,
    25 ms of a step of 185 (3.2M parameters, 8 x 256 tokens)."""

    def forward(self, x):
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        dropped = round(256 * self.p)  # of 256
        numbers = torch.empty(math.ceil(x.numel() / 8), dtype=torch.int64).random_(-(2**63), None)
        keep = numbers.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
        return x * (keep * (256 / (256 - dropped))).to(x.dtype)


class LoRALinear(nn.Linear):
    """nn.Linear with a product of low rank beside its matrix: x W^T + x A^T B^T alpha / r. B starts at zero, so at first
    nothing changes; W is to be frozen. Source: LoRA, arXiv:2106.09685."""

    def __init__(self, n_in, n_out, bias, rank, alpha):
        super().__init__(n_in, n_out, bias)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, n_in))
        self.lora_b = nn.Parameter(torch.zeros(n_out, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self):
        """An nn.Linear that computes the same: W + B A alpha / r, summed in float32."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        product = self.scale * self.lora_b.float() @ self.lora_a.float()
        linear.weight = nn.Parameter((self.weight.float() + product).to(self.weight.dtype))
        linear.bias = self.bias
        return linear


def make_linear(config, name, n_in, n_out, bias):
    """The linear layer called `name` of a block, with LoRA where the config asks for it."""
    if config.lora_rank is None or name not in config.lora_targets.split():
        return nn.Linear(n_in, n_out, bias)
    return LoRALinear(n_in, n_out, bias, config.lora_rank, config.lora_alpha)


class Attention(nn.Module):
    """Causal self-attention: multi-head, grouped-query (n_kv_head < n_head) or multi-query (n_kv_head = 1)."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.kind = layer, config.attention
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.rope, self.qk_norm = config.pos == "rope", config.qk_norm
        C, D = config.n_embd, config.head_dim
        self.q_proj = make_linear(config, "q_proj", C, config.n_head * D, config.qkv_bias)
        self.k_proj = make_linear(config, "k_proj", C, config.n_kv_head * D, config.qkv_bias)
        self.v_proj = make_linear(config, "v_proj", C, config.n_kv_head * D, config.qkv_bias)
        self.qkv_proj = None  # the three in one, while decoding: see decode.speed_up
        self.o_proj = make_linear(config, "o_proj", config.n_head * D, C, config.o_bias)
        self.attn_dropout, self.o_dropout = Dropout(config.attn_dropout), Dropout(config.dropout)

    def queries_keys_values(self, x, rotation):
        """x (B, T, C) -> q (B, H, T, D) and k, v (B, Hkv, T, D), normalised and rotated where the config says so."""
        B, T, _ = x.shape
        if self.qkv_proj is None:
            q, k, v = (proj(x).view(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        else:
            qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H + 2 Hkv, D)
            q, k, v = qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)
        if self.qk_norm or self.rope:  # both at once, in float32: half the operations
            qk = torch.cat([q, k], dim=2).float()  # (B, T, H + Hkv, D)
            qk = F.rms_norm(qk, (self.head_dim,)) if self.qk_norm else qk
            qk = apply_rope(qk, *rotation) if self.rope else qk
            q, k = qk.to(v.dtype).split([self.n_head, self.n_kv_head], dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, positions, rotation, mask, cache=None):
        B, T, _ = x.shape
        q, k, v = self.queries_keys_values(x, rotation)
        if cache is not None:
            k, v = cache.append(self.layer, k, v, positions)  # (B, Hkv, S, D)
        S = k.shape[2]
        # a training step on two cores, explicit against SDPA: 17 and 28 ms (0.8M parameters, T 64), 149 and 178 (3.2M, T 256)
        if self.kind == "explicit" or self.kind == "auto" and x.device.type == "cpu" and T * S <= 1024 * 1024:
            weights = self.attn_dropout(attention_weights(q, k, mask))  # (B, H, T, S)
            groups = weights.view(B, self.n_kv_head, -1, S)
            y = (groups @ v).view(B, self.n_head, T, self.head_dim)  # (B, H, T, D)
        else:
            causal = mask is not None and mask.ndim == 2 and T == S  # SDPA's own mask is right only where T equals S
            attn_mask = None if causal or mask is None else mask.to(q.dtype)
            gqa = self.n_kv_head != self.n_head
            dropout = self.attn_dropout.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal=causal, enable_gqa=gqa)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H * D)
        return self.o_dropout(self.o_proj(y))  # (B, T, C)


class MLP(nn.Module):
    """Two layers with a nonlinearity between: GELU by tanh (GPT-2) or exact, which takes a third of the time on a CPU, or
    ReLU squared (arXiv:2109.08668)."""

    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        self.up_proj = make_linear(config, "up_proj", config.n_embd, config.n_inner, config.bias)
        self.down_proj = make_linear(config, "down_proj", config.n_inner, config.n_embd, config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        x = self.up_proj(x)  # (B, T, F)
        if self.kind == "relu2":
            x = F.relu(x).square()
        else:
            x = F.gelu(x, approximate="tanh" if self.kind == "gelu" else "none")
        return self.dropout(self.down_proj(x))  # (B, T, C)


class SwiGLU(nn.Module):
    """The gated MLP of Llama: silu(gate) * up, then down. Meta's names are w1 (gate), w3 (up), w2 (down)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = make_linear(config, "gate_proj", config.n_embd, config.n_inner, config.bias)
        self.up_proj = make_linear(config, "up_proj", config.n_embd, config.n_inner, config.bias)
        self.down_proj = make_linear(config, "down_proj", config.n_inner, config.n_embd, config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        x = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (B, T, F)
        return self.dropout(self.down_proj(x))  # (B, T, C)


def norm(config):
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)


class Block(nn.Module):
    """Attention, then the MLP, each on a normalised copy of the residual stream and added back to it."""

    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = norm(config)
        self.attn = Attention(config, layer)
        self.mlp_norm = norm(config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else MLP(config)

    def forward(self, x, positions, rotation, mask, cache=None):
        x = x + self.attn(self.attn_norm(x), positions, rotation, mask, cache)  # (B, T, C)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """A decoder-only language model: idx (B, T) -> logits (B, T, V)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Embedding(config.block_size, config.n_embd) if config.pos == "learned" else None
        self.smear = nn.Parameter(torch.zeros(config.n_embd)) if config.smear else None
        self.stream_share = nn.Parameter(torch.ones(config.n_layer)) if config.embed_skip else None
        self.embed_share = nn.Parameter(torch.zeros(config.n_layer)) if config.embed_skip else None
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = norm(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.head.weight = self.tok_emb.weight
        self.classifier = nn.Linear(config.n_embd, config.n_classes) if config.n_classes else None
        # no buffer: .to(bfloat16) would round its angles, and DDP would broadcast it at every forward
        self.frequencies = rope_frequencies(config) if config.pos == "rope" else None  # (D / 2,)
        if self.tok_emb.weight.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Fresh weights, in reading order: GPT-2's N(0, 0.02), biases zero, norms one."""
        std = 0.02
        # 2 L sums into the residual stream keep its scale
        residual_std = 0.0 if self.config.zero_init else std / math.sqrt(2 * max(1, len(self.blocks)))
        nn.init.normal_(self.tok_emb.weight, std=std)
        if self.pos_emb is not None:
            nn.init.normal_(self.pos_emb.weight, std=std)
        for block in self.blocks:
            inner = [block.attn.q_proj, block.attn.k_proj, block.attn.v_proj, block.mlp.up_proj]
            inner += [block.mlp.gate_proj] if isinstance(block.mlp, SwiGLU) else []
            for linear in inner:
                nn.init.normal_(linear.weight, std=std)
            for linear in (block.attn.o_proj, block.mlp.down_proj):
                nn.init.normal_(linear.weight, std=residual_std)
            for linear in (*inner, block.attn.o_proj, block.mlp.down_proj):
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
            block.attn_norm.reset_parameters()
            block.mlp_norm.reset_parameters()
        self.final_norm.reset_parameters()
        if not self.config.tie_weights:
            nn.init.normal_(self.head.weight, std=0.0 if self.config.zero_init else std)

    def embed(self, idx, cache=None):
        """What the first block reads: x (B, T, C); positions (T,) or (B, T); rotation, the cosines and sines of RoPE; mask."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit in block_size={self.config.block_size}: shorten the text or enlarge it")
        positions = torch.arange(T, device=idx.device) if cache is None else cache.positions(T)
        S = T if cache is None else cache.attended(T)
        mask = None if T == 1 and positions.ndim == 1 else causal_mask(positions, S)  # (T, S) or (B, 1, T, S)
        x = self.tok_emb(idx)  # (B, T, C)
        if self.smear is not None:
            if cache is None:
                before = F.pad(x[:, :-1], (0, 0, 1, 0))
            else:
                before = self.tok_emb(cache.previous(idx, positions)) * (positions > 0)[..., None]
            x = x + self.smear * before
        if self.pos_emb is not None:
            return self.dropout(x + self.pos_emb(positions)), positions, None, mask
        self.frequencies = self.frequencies.to(idx.device)
        angles = positions[..., None, None] * self.frequencies  # (T, 1, D / 2) or (B, T, 1, D / 2)
        return self.dropout(x), positions, rope_rotation(angles), mask

    def with_embedding(self, x, embedded, layer):
        """What a block reads where the config has embed_skip: the stream and the embedding, each with its learned weight."""
        return x if self.embed_share is None else self.stream_share[layer] * x + self.embed_share[layer] * embedded

    def hidden(self, idx, cache=None):
        """The normalised residual stream that the head reads: idx (B, T) -> (B, T, C). Appends to the cache, if any."""
        x, positions, rotation, mask = self.embed(idx, cache)
        embedded = x
        for layer, block in enumerate(self.blocks):
            x = block(self.with_embedding(x, embedded, layer), positions, rotation, mask, cache)  # (B, T, C)
        if cache is not None:
            cache.advance(idx.shape[1])
        return self.final_norm(x)

    def forward(self, idx, targets=None, cache=None):
        """Logits (B, T, V) in float32, None with targets and loss_chunk; the mean cross-entropy in nats, None without targets.

        idx (B, T) int64; targets (B, T), already shifted: targets[b, t] follows idx[b, t]; -100 is not scored.
        """
        x = self.hidden(idx, cache)  # (B, T, C)
        if targets is None:
            return self.head(x).float(), None
        x, targets = x.flatten(0, 1), targets.flatten()
        if self.config.loss_chunk is None:
            logits = self.head(x).float()
            total = cross_entropy_sum(logits, targets)
        else:  # the logits of a piece are dropped after it, and computed again in the backward pass
            logits, n = None, self.config.loss_chunk
            pieces = zip(x.split(n), targets.split(n), strict=True)
            total = sum(recompute(self.piece_loss, *piece, use_reentrant=False) for piece in pieces)
        # a mean over nothing would be NaN, so the count is at least 1
        return logits if logits is None else logits.view(*idx.shape, -1), total / (targets != -100).sum().clamp(min=1)

    def piece_loss(self, x, targets):
        return cross_entropy_sum(self.head(x).float(), targets)

    def classify(self, idx, lengths):
        """Class logits (B, n_classes) in float32, read at the last token of each right-padded row: idx (B, T), lengths (B,)."""
        return self.class_logits(self.hidden(idx), lengths)

    def class_logits(self, hidden, lengths):
        """The same from the hidden states (B, T, C)."""
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]  # (B, C)
        return self.classifier(last).float()

    def merge_lora(self):
        """Turn every LoRALinear into an nn.Linear that computes the same, in place."""
        for parent in list(self.modules()):
            for name, child in parent.named_children():
                if isinstance(child, LoRALinear):
                    setattr(parent, name, child.merged())
        self.config = replace(self.config, lora_rank=None)

    @torch.no_grad()
    def attention_maps(self, idx):
        """What each position attends to, by the explicit product: idx (B, T) -> (L, B, H, T, T), rows summing to 1."""
        x, positions, rotation, mask = self.embed(idx)
        maps, embedded = [], x
        for layer, block in enumerate(self.blocks):
            x = self.with_embedding(x, embedded, layer)
            q, k, _ = block.attn.queries_keys_values(block.attn_norm(x), rotation)
            maps.append(attention_weights(q, k, mask))  # (B, H, T, T)
            x = block(x, positions, rotation, mask)
        return torch.stack(maps)

    def new_cache(self, batch_size, max_len):
        """An empty KVCache for batch_size rows of at most max_len positions, in the dtype of the weights, or autocast's."""
        if max_len > self.config.block_size:
            raise ValueError(f"max_len={max_len} must be at most block_size={self.config.block_size}: shorten the text")
        autocasts = torch.is_autocast_enabled(self.device.type)
        dtype = torch.get_autocast_dtype(self.device.type) if autocasts else self.dtype
        return KVCache(self.config, batch_size, max_len, self.device, dtype)

    def decode(self, ids, cache):
        """One more token of every row: ids (B,) -> logits (B, V) in float32."""
        return self.head(self.hidden(ids[:, None], cache)[:, 0]).float()

    @torch.no_grad()
    def stream(
        self,
        idx,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        top_p=None,
        min_p=None,
        repetition_penalty=1.0,
        stop=(),
        lengths=None,
        generator=None,
        logprobs=False,
        compiled_decode=None,
    ):
        """Yield the next id of every row, (B,), until max_new_tokens are made or every row has given one of `stop`.

        idx (B, T); lengths (B,): how much of each right-padded row is real, all of it where None. A finished row repeats
        its stop id. With logprobs, yields (ids, log-probabilities (B, V)) of the model itself, before temperature, penalty
        and filters. Past block_size the last half of each row is kept and prefilled again. A row that equals the one before
        shares its prefill. Filters: see `sample`. compiled_decode: torch.compile(model.decode), for all but the prefill.
        """
        B, T = idx.shape
        block_size, device = self.config.block_size, idx.device
        lengths = torch.full((B,), T, device=device) if lengths is None else lengths.clone()
        text = torch.cat([idx, idx.new_zeros(B, max_new_tokens)], dim=1)  # (B, T + new), row b's text is its first lengths[b]
        rows, columns = torch.arange(B, device=device), torch.arange(T + max_new_tokens, device=device)
        seen = None
        if repetition_penalty != 1.0:
            V, real = self.config.vocab_size, columns < lengths[:, None]
            seen = torch.zeros(B, V + 1, dtype=torch.bool, device=device)
            seen = seen.scatter(1, text.masked_fill(~real, V), True)[:, :-1]  # (B, V)
        stops = torch.tensor(sorted(stop), device=device, dtype=torch.int64)
        finished = torch.zeros(B, dtype=torch.bool, device=device)
        cache, last_ids, longest = None, None, int(lengths.max())  # longest: positions of the longest row
        for step in range(max_new_tokens):
            if cache is None or longest > block_size:
                # prefill: the whole text or, where it does not fit, the last half block of it
                keep = lengths if longest <= block_size else lengths.clamp(max=max(1, block_size // 2))
                longest = int(keep.max())
                places = (lengths - keep)[:, None] + columns[:longest]  # (B, longest)
                window = text.gather(1, places.clamp(max=T + max_new_tokens - 1))
                distinct, source = torch.unique_consecutive(
                    torch.cat([keep[:, None], window], dim=1), dim=0, return_inverse=True
                )  # rows that equal the one before share its prefill: (b, 1 + longest), (B,)
                ends, window = distinct[:, 0] - 1, distinct[:, 1:]
                max_len = min(block_size, longest + max_new_tokens - step)
                if compiled_decode is not None:  # few different lengths, since each is compiled anew
                    max_len = min(block_size, 128 * math.ceil(max_len / 128))
                cache = self.new_cache(len(window), max_len)
                x = self.hidden(window, cache)[rows[: len(window)], ends]  # (b, C)
                cache.set_rows(keep, source, static=compiled_decode is not None)
                logits = self.head(x).float()[source]  # (B, V)
            else:
                logits = (compiled_decode or self.decode)(last_ids, cache)
            penalised = logits if seen is None else penalise(logits, seen, repetition_penalty)
            next_ids = sample(penalised, temperature, top_k, top_p, min_p, generator)  # (B,)
            if step and len(stops):
                next_ids = torch.where(finished, last_ids, next_ids)
            yield (next_ids, F.log_softmax(logits, dim=-1)) if logprobs else next_ids
            if len(stops):
                finished = finished | torch.isin(next_ids, stops)
                if bool(finished.all()):
                    return
            if seen is not None:
                seen[rows, next_ids] = True
            text[rows, lengths] = next_ids
            lengths, last_ids, longest = lengths + 1, next_ids, longest + 1

    def generate(self, idx, max_new_tokens, **options):
        """idx (B, T) -> (B, T + new): the prompts as given, then from column T on what `stream(**options)` yields."""
        new = list(self.stream(idx, max_new_tokens, **options))
        return torch.cat([idx, *(ids[:, None] for ids in new)], dim=1)

    @property
    def device(self):
        return self.tok_emb.weight.device

    @property
    def dtype(self):
        return self.tok_emb.weight.dtype

    @classmethod
    def from_pretrained(cls, name_or_folder, **overrides):
        """A model with published weights: a Hugging Face folder or hub name of the GPT-2 or Llama kind; see weights.py."""
        import weights

        return weights.load_pretrained(name_or_folder, **overrides)

    def save_pretrained(self, folder, tokenizer=None):
        """Write a folder that transformers loads (AutoModelForCausalLM; AutoTokenizer too where given); see weights.py."""
        import weights

        weights.save_pretrained(self, folder, tokenizer)

    def parameter_count(self):
        """Parameters, a tied matrix counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T=None):
        """Floating-point operations of training on one token in a sequence of T (block_size where None): 3 forward passes.

        Every weight that multiplies (not the embeddings that are looked up) costs 2 a pass, the two attention products
        4 H D T, the causal half not subtracted. Source: PaLM, arXiv:2204.02311, appendix B.
        """
        config, T = self.config, T or self.config.block_size
        looked_up = self.pos_emb.weight.numel() if self.pos_emb else 0
        looked_up += 0 if config.tie_weights else self.tok_emb.weight.numel()
        attention = 4 * config.n_layer * config.n_head * config.head_dim * T
        return 3 * (2 * (self.parameter_count() - looked_up) + attention)

    def summary(self):
        """One paragraph: the parts, parameters, FLOPs per token, and the memory of weights, training state and cache."""
        c, n = self.config, self.parameter_count()
        cache_bytes = 2 * c.n_layer * c.n_kv_head * c.head_dim * c.block_size * self.tok_emb.weight.element_size()
        return (
            f"{n:,} parameters: {c.n_layer} blocks of {c.n_head} heads ({c.n_kv_head} for keys and values) x {c.head_dim}, "
            f"{c.n_embd} channels, {c.n_inner} in {c.mlp}, {c.norm}, {c.pos} positions, vocabulary {c.vocab_size:,}\n"
            f"{self.flops_per_token() / 1e6:,.1f} MFLOP per trained token; memory: weights {4 * n / 1e6:,.0f} MB in float32, "
            f"{16 * n / 1e6:,.0f} MB with gradients and Adam's moments, "
            f"cache {cache_bytes / 1e6:,.1f} MB a sequence of {c.block_size}"
        )


def cross_entropy_sum(logits, targets):
    """Summed cross-entropy in nats: logits (N, V), targets (N,), of which -100 is not scored."""
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def penalise(logits, seen, penalty):
    """Make seen ids less likely: positive logits divided by the penalty, negative multiplied. Source: CTRL, arXiv:1909.05858.

    logits (B, V); seen (B, V) bool.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, generator=None):
    """Draw an id from each row: logits (B, V) -> (B,); temperature 0 takes the likeliest.

    In this order: top_k keeps the k likeliest; min_p those at least min_p times as likely as the likeliest
    (arXiv:2407.01082); top_p the fewest that hold top_p of the probability (arXiv:1904.09751).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    ids = None  # the candidates, likeliest first, where they are not all ids in order
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)  # (B, k)
    elif top_p is not None:
        logits, ids = logits.sort(dim=-1, descending=True)  # (B, V)
    probs = F.softmax(logits / temperature, dim=-1)
    if min_p is not None:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
    if top_p is not None:
        before = probs.cumsum(-1) - probs  # what the likelier ones hold
        probs = probs.masked_fill(before >= top_p * probs.sum(-1, keepdim=True), 0.0)
    # the first candidate whose cumulative probability passes a uniform number: on a CPU far faster than torch.multinomial
    cumulative = probs.double().cumsum(-1)
    uniform = torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device, generator=generator)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)  # (B, 1)
    drawn = drawn.clamp(max=probs.shape[-1] - 1)  # logits of a model that diverged are NaN
    return (drawn if ids is None else ids.gather(-1, drawn))[:, 0]


def choose_device(name="auto"):
    """A torch.device for 'auto' (cuda, else mps, else cpu) or for the name given. Raises ValueError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is not a device: use auto, cpu, cuda, cuda:1 or mps") from error
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, True):
        found = f"device={name} is not available to this torch ({torch.__version__})"
        raise ValueError(f"{found}: use --device=cpu, or install a torch for it")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device={name} but there are {torch.cuda.device_count()} GPUs, counted from 0: choose one of them")
    return device


def choose_dtype(name, device):
    """The dtype of matrix products for 'auto', 'float32', 'bfloat16' or 'float16'. auto is bfloat16 where it is fast.

    On a CPU that is where the processor multiplies bfloat16 itself: emulated, it is slower than float32.
    """
    if name != "auto":
        names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if name not in names:
            raise ValueError(f"dtype={name!r} must be one of auto {' '.join(names)}")
        return names[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def autocast(device, dtype):
    """A context in which matrix products run in dtype and the float32 weights stay as they are."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
