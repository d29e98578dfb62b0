"""Fast text from a model: cached decoding of many rows, sampling filters, and one-row products.

`stream` yields ids as they are made, `generate` gives all of them at once. `speed_up` puts faster
products into a model that only generates. `GPT.generate` in model.py is the plain version.
"""

import math
import threading

import torch
import torch.nn as nn
from torch.nn import functional as F

from glass import kernels
from glass.draft import PromptLookup
from model import Attention, SwiGLU, draw

# Drawing the next token.


def penalise(logits, seen, penalty):
    """Logits that make the ids seen so far less likely: logits (B, V), seen (B, V) bool -> (B, V).

    Divides positive logits by the penalty and multiplies negative ones. Source: CTRL,
    arXiv:1909.05858.
    """
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised, logits)


def sample(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, generator=None):
    """Draw an id from each row: logits (B, V) -> (B,). temperature=0 takes the likeliest id.

    The filters apply in this order. top_k keeps the k likeliest ids. min_p keeps those at least
    min_p times as likely as the likeliest (arXiv:2407.01082). top_p keeps the fewest that hold
    top_p of the probability (arXiv:1904.09751).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    ids = None  # the candidates, likeliest first; None: all ids in order
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)  # (B, k)
    elif top_p is not None:
        logits, ids = logits.sort(dim=-1, descending=True)  # (B, V)
    probs = F.softmax(logits / temperature, dim=-1)
    if min_p is not None:
        least = min_p * probs.amax(-1, keepdim=True)
        probs = probs.masked_fill(probs < least, 0.0)
    if top_p is not None:
        held_by_likelier = probs.cumsum(-1) - probs
        nucleus = top_p * probs.sum(-1, keepdim=True)
        probs = probs.masked_fill(held_by_likelier >= nucleus, 0.0)
    drawn = draw(probs, generator)  # (B, 1)
    if ids is not None:
        drawn = ids.gather(-1, drawn)
    return drawn[:, 0]


# Many rows at once.


class Rows:
    """The texts of a batch while they grow: row b is the first lengths[b] ids of text[b]."""

    def __init__(self, idx, lengths, room):
        B, T = idx.shape
        self.text = torch.cat([idx, idx.new_zeros(B, room)], dim=1)  # (B, T + room)
        if lengths is None:
            self.lengths = torch.full((B,), T, device=idx.device)
        else:
            self.lengths = lengths.clone()
        self.longest = int(self.lengths.max())  # a Python int, so no later step waits for the GPU
        self.rows = torch.arange(B, device=idx.device)
        self.columns = torch.arange(T + room, device=idx.device)

    def append(self, ids):
        """Append one id to every row: ids (B,)."""
        self.text[self.rows, self.lengths] = ids
        self.lengths, self.longest = self.lengths + 1, self.longest + 1

    def seen(self, vocab_size):
        """Which ids each row holds: (B, V) bool, V = vocab_size."""
        is_padding = self.columns >= self.lengths[:, None]
        ids = self.text.masked_fill(is_padding, vocab_size)
        seen = torch.zeros(len(ids), vocab_size + 1, dtype=torch.bool, device=ids.device)
        return seen.scatter(1, ids, True)[:, :-1]

    def last(self, lengths):
        """The last lengths[b] ids of each row b, right-padded: (B, longest of lengths)."""
        first = self.lengths - lengths
        places = first[:, None] + self.columns[: int(lengths.max())]
        return self.text.gather(1, places.clamp(max=self.text.shape[1] - 1))


def prefill(model, rows, room, static):
    """(cache, logits): a cache of the rows' texts, and the logits (B, V) of their next tokens.

    If the longest text exceeds the block, each text is cut to at most its last half block.
    Consecutive equal rows share one forward pass. room: how many tokens are still to come. static:
    give the cache one of a few lengths, for a compiled decoder.
    """
    block_size, kept = model.config.block_size, rows.lengths
    if rows.longest > block_size:
        kept = kept.clamp(max=max(1, block_size // 2))
    rows.longest = int(kept.max())  # from now on, the longest text in the cache
    keyed = torch.cat([kept[:, None], rows.last(kept)], dim=1)  # (B, 1 + longest)
    distinct, source = torch.unique_consecutive(keyed, dim=0, return_inverse=True)
    ends, window = distinct[:, 0] - 1, distinct[:, 1:]  # (b,), (b, longest)
    max_len = min(block_size, rows.longest + room)
    if static:  # each length is compiled separately
        max_len = min(block_size, 128 * math.ceil(max_len / 128))
    cache = model.new_cache(len(window), max_len)
    x = model.hidden(window, cache)[rows.rows[: len(window)], ends]  # (b, C)
    cache.set_rows(kept, source, static)
    return cache, model.head(x).float()[source]


@torch.no_grad()
def stream(
    model,
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
    draft=None,
):
    """Yield the next id of every row, (B,), up to max_new_tokens times.

    idx: (B, T); with lengths (B,), row b is its first lengths[b] ids and the rest is padding. Stops
    when every row has given an id of `stop`; a finished row repeats its stop id. With logprobs,
    yields (ids, log-probabilities (B, V)). They are the model's own, before temperature, penalty
    and filters (see `sample`). Beyond block_size, only the last half block of each row is kept.
    compiled_decode: what `speed_up` gave back; it does all but the prefill. draft='prompt' guesses
    ahead, for one text and without compiled_decode: see glass/draft.py.
    """
    rows, decode = Rows(idx, lengths, max_new_tokens), compiled_decode or model.decode
    if draft is not None:
        if len(idx) > 1:
            raise ValueError(f"draft={draft} is for one text, found {len(idx)}: leave it out")
        if compiled_decode is not None:
            raise ValueError(f"draft={draft} does not go with compile: leave one of them out")
        decode = PromptLookup(decode, rows)
    seen = rows.seen(model.config.vocab_size) if repetition_penalty != 1.0 else None
    stops = torch.tensor(sorted(stop), device=idx.device, dtype=torch.int64)
    finished = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    cache, last_ids = None, None
    for step in range(max_new_tokens):
        if cache is None or rows.longest > model.config.block_size:
            room = max_new_tokens - step
            cache, logits = prefill(model, rows, room, static=compiled_decode is not None)
        else:
            logits = decode(last_ids, cache)  # (B, V)
        penalised = logits if seen is None else penalise(logits, seen, repetition_penalty)
        ids = sample(penalised, temperature, top_k, top_p, min_p, generator)  # (B,)
        if step and len(stops):
            ids = torch.where(finished, last_ids, ids)
        yield (ids, F.log_softmax(logits, dim=-1)) if logprobs else ids
        if len(stops):
            finished = finished | torch.isin(ids, stops)
            if bool(finished.all()):
                return
        if seen is not None:
            seen[rows.rows, ids] = True
        rows.append(ids)
        last_ids = ids


def generate(model, idx, max_new_tokens, **options):
    """The prompts followed by what `stream` yields: idx (B, T) -> (B, T + new)."""
    new = list(stream(model, idx, max_new_tokens, **options))
    return torch.cat([idx, *(ids[:, None] for ids in new)], dim=1)


def padded(sequences, device):
    """(idx, lengths) of lists of ids: idx (B, T), right-padded with 0, and lengths (B,).

    The value of the padding does not matter, because attention is causal.
    """
    lengths = torch.tensor([len(ids) for ids in sequences])
    idx = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
    for row, ids in enumerate(sequences):
        idx[row, : len(ids)] = torch.tensor(ids)
    return idx.to(device), lengths.to(device)


def answer(model, prompts, stop, max_new_tokens, temperature, batch_size=128, generators=None):
    """The model's answer to each prompt, both as lists of ids.

    If a stop id came, it is the last id of the answer. Prompts of similar length are answered
    together. generators: one for each prompt, so that its draws do not depend on the others. The
    model is in evaluation mode meanwhile.
    """
    was_training = model.training
    model.eval()
    answers = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(prompts), batch_size):
        chosen = by_length[first : first + batch_size]
        idx, lengths = padded([prompts[i] for i in chosen], model.device)
        options = dict(temperature=temperature, stop=stop, lengths=lengths)
        if generators is not None:
            options["generator"] = [generators[i] for i in chosen]
        new = generate(model, idx, max_new_tokens, **options)[:, idx.shape[1] :]
        for i, ids in zip(chosen, new.tolist(), strict=True):
            ends = [place for place, token in enumerate(ids) if token in stop]
            answers[i] = ids[: ends[0] + 1] if ends else ids
    model.train(was_training)
    return answers


class TextStream:
    """Turns ids into text, as soon as the text is certain.

    Holds back an unfinished UTF-8 character and what may be the beginning of a stop string.
    """

    def __init__(self, tokenizer, stop):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self.ids, self.shown = [], 0  # the last ids; how many characters of their text were given

    def add(self, token):
        """The text that this id makes certain.

        A complete stop string sets `stopped` and is left out.
        """
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        places = [text.find(stop, self.shown) for stop in self.stop]
        if found := [place for place in places if place >= 0]:
            self.stopped, text = True, text[: min(found)]
        certain = len(text) if self.stopped else len(text) - self.held_back(text)
        certain = max(self.shown, certain)
        new, self.shown = text[self.shown : certain], certain
        if len(self.ids) > 256 and certain == len(text):  # so that each decode takes constant time
            self.ids = self.ids[-16:]
            self.shown = len(self.tokenizer.decode(self.ids))
        return new

    def held_back(self, text):
        """How many characters at the end of text may still change."""
        if text.endswith("\ufffd"):
            return 1
        starts = (stop[:n] for stop in self.stop for n in range(1, len(stop)))
        return max((len(start) for start in starts if text.endswith(start)), default=0)

    def rest(self):
        """The text that was still held back, once no more ids follow."""
        return "" if self.stopped else self.tokenizer.decode(self.ids)[self.shown :]


# Faster products. Decoding a token reads every weight once, so memory bandwidth is the limit: fewer
# bytes per weight give more tokens per second. nn.Linear multiplies a single row on one CPU thread.


class RowLinear(nn.Module):
    """nn.Linear that multiplies a single row on all cores: x (..., K) -> (..., N).

    Up to kernels.MOST_ROWS rows are multiplied by kernels.c. The rest is for where it cannot be built,
    and for more rows.

    On two cores, for float32 (1, 768) x (768, 3072): F.linear takes 554 us (17 GB/s). Two halves as
    a batch take 374 us (25 GB/s). Compiled, product and sum are one loop, which takes 245 us (38
    GB/s), or 117 us (40 GB/s) in bfloat16.

    A few rows times a large matrix, as the head's, are multiplied as (N, K) x (K, b): for eight rows
    of float32 and (50304, 768), F.linear takes 65 ms on two cores of a Zen 3, this 28 ms.

    Several rows in bfloat16, on a CPU that does not multiply it natively, are multiplied in float32,
    256 outputs at a time, so that the converted weights stay in the cache. On two cores of a Zen 3,
    (16, 768) x (768, 3072): F.linear takes 4.4 ms, this 2.7 ms; for 128 rows 34 ms and 6.9 ms. For
    eight rows or fewer it does not pay.
    """

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # (N, K), (N,)
        self.wide_bias = kernels.wide(linear.bias)
        self.converts = linear.weight.device.type == "cpu" and emulates_bfloat16()

    def forward(self, x):
        if kernels.can_multiply(x):
            return self.by_kernel(x)
        N, K = self.weight.shape
        is_row = x.numel() == K and x.device.type == "cpu"
        if is_row and torch.compiler.is_compiling():
            y = row_product(self.weight, x).to(x.dtype)  # (N,)
        elif is_row and x.dtype == torch.float32:
            halves = self.weight[: N // 2 * 2].view(2, N // 2, K).transpose(1, 2)  # (2, K, N / 2)
            y = torch.bmm(x.reshape(1, 1, K).expand(2, 1, K), halves).flatten()
            if N % 2:
                y = torch.cat([y, F.linear(x.reshape(K), self.weight[-1:])])
        elif self.turns_product(x):
            y = (self.weight @ x.reshape(-1, K).T).T.contiguous()  # (b, N)
        elif self.converts_rows(x):
            pieces = [F.linear(x.float(), piece.float()) for piece in self.weight.split(256)]
            y = torch.cat(pieces, dim=-1).to(x.dtype)  # (..., N)
        else:
            return F.linear(x, self.weight, self.bias)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], N)

    def by_kernel(self, x, norm=kernels.NO_NORM):
        """The product, of what a kernels.Norm makes of x, by kernels.multiply_rows."""
        return kernels.multiply_rows(self.weight, x, self.wide_bias, norm=norm)

    def turns_product(self, x):
        """Whether x has few rows, and the matrix is so large that weights times rows is faster."""
        is_few = x.numel() <= 64 * x.shape[-1]
        is_eager = not torch.compiler.is_compiling()
        on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
        return on_cpu and is_eager and is_few and len(self.weight) >= 8192

    def converts_rows(self, x):
        """Whether x has so many rows that it pays to convert the weights to float32."""
        several = x.numel() >= 16 * x.shape[-1]
        is_eager = not torch.compiler.is_compiling()
        return self.converts and x.dtype == torch.bfloat16 and several and is_eager


class Int8Linear(nn.Module):
    """nn.Linear with weights rounded to int8 and one scale per output row: x (..., K) -> (..., N).

    A weight is off by at most half a step; a step is about 1/127 of the largest weight of its row.
    On a CPU, the kernel rounds x to 15 bits and a sign, torch to bfloat16; compiled, x stays as it is.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()  # (N, K)
        largest = weight.abs().amax(dim=1).clamp(min=1e-12)
        scale = (largest / 127).bfloat16()  # (N,), in the dtype of the later product
        rounded = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.wide_scale, self.wide_bias = scale.float(), kernels.wide(linear.bias)

    def forward(self, x):
        if kernels.can_multiply(x):
            return self.by_kernel(x)
        N, K = self.weight.shape
        if x.device.type != "cpu":
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        elif x.numel() == K and torch.compiler.is_compiling():
            y = row_product(self.weight, x.float()) * self.scale.float()
        else:
            y = torch._weight_int8pack_mm(x.reshape(-1, K).bfloat16(), self.weight, self.scale)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], N).to(x.dtype)

    def by_kernel(self, x, norm=kernels.NO_NORM):
        """As RowLinear's."""
        return kernels.multiply_rows(self.weight, x, self.wide_bias, self.wide_scale, norm)


def row_product(weight, x):
    """weight (N, K) times the only row of x, summed in float32: (N,). For compiled code.

    as_strided makes the compiler store x first. Otherwise it would inline whatever computes x (a
    norm, a GELU) and compute that N times.
    """
    K = weight.shape[1]
    x = x.contiguous().as_strided((1, K), (K, 1))
    return (weight.float() * x.float()).sum(-1)


def joined(*linears):
    """One nn.Linear that gives the results of several side by side."""
    linear = nn.Linear(1, 1, device="meta")
    weight = torch.cat([each.weight for each in linears])
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), None
    if linears[0].bias is not None:
        linear.bias = nn.Parameter(torch.cat([each.bias for each in linears]), requires_grad=False)
    return linear


def emulates_bfloat16():
    """Whether this CPU multiplies bfloat16 so slowly that converting to float32 pays."""
    return not torch.cpu._is_avx512_bf16_supported()


def in_float32(attend):
    """An attention function that takes several tokens of bfloat16 on a CPU in float32."""

    def converting(q, k, v, mask, dropout):
        if q.dtype != torch.bfloat16 or q.device.type != "cpu" or q.shape[2] == 1:
            return attend(q, k, v, mask, dropout)
        return attend(q.float(), k.float(), v.float(), mask, dropout).to(q.dtype)

    return converting


class JoinedSwiGLU(SwiGLU):
    """SwiGLU with one product for the gate and what it gates."""

    def __init__(self, mlp):
        nn.Module.__init__(self)
        self.up_proj = joined(mlp.gate_proj, mlp.up_proj)
        self.down_proj, self.dropout = mlp.down_proj, mlp.dropout

    def forward(self, x):
        gate, up = self.up_proj(x).chunk(2, dim=-1)
        return self.dropout(self.down_proj(F.silu(gate) * up))


class JoinedAttention(Attention):
    """Attention with one product for q, k and v: saves 0.8 ms per token of GPT-2 124M."""

    def __init__(self, attn):
        nn.Module.__init__(self)  # Attention.__init__ would make new parts; these are attn's
        self.layer, self.head_dim = attn.layer, attn.head_dim
        self.n_head, self.n_kv_head = attn.n_head, attn.n_kv_head
        self.qkv_proj = joined(attn.q_proj, attn.k_proj, attn.v_proj)
        self.o_proj, self.prepare = attn.o_proj, attn.prepare
        self.attend = in_float32(attn.attend) if emulates_bfloat16() else attn.attend
        self.attn_dropout, self.o_dropout = attn.attn_dropout, attn.o_dropout

    def project(self, x):
        """(q, k, v) of x (B, T, C): (B, T, H, D), and twice (B, T, Hkv, D)."""
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H + 2 Hkv, D)
        return qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)


class FastDecode:
    """model.decode by kernels.c: all blocks in one call. Where it cannot be, the model's own."""

    def __init__(self, model):
        self.model, self.blocks = model, None

    def __call__(self, ids, cache):
        model = self.model
        idx = ids if ids.ndim == 2 else ids[:, None]  # (B, T)
        like_rows = model.tok_emb.weight.detach()[: idx.numel()]  # of what is embedded below
        has_cache = cache.k[0].dtype in (torch.float32, torch.bfloat16)
        by_kernel = kernels.can_multiply(like_rows) and has_cache and not model.training
        if not by_kernel or self.is_watched():
            return type(model).decode(model, ids, cache)
        embedded, positions, rotation, _ = model.embed(idx, cache)
        if self.blocks is None or not self.blocks.are_of(model):
            self.blocks, self.norm = kernels.Blocks(model), kernels.Norm(model.final_norm)
        x = self.blocks.run(embedded, positions, rotation, cache)
        cache.advance(idx.shape[1])
        logits = model.head.by_kernel(x, norm=self.norm)  # (B, T, V)
        return logits.view(*ids.shape, -1)

    def is_watched(self):
        """Whether hooks look at parts of the model, or change them."""
        parts = [each for b in self.model.blocks for each in (b, b.attn, b.attn.o_proj, b.mlp)]
        return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def speed_up(model, quantize=None, compile=False):
    """Put faster products into a model that only generates; gives `compiled_decode` for `stream`.

    Gives None without compile. LoRA is merged first. quantize='int8' rounds the weights of every
    product; the token embedding stays as it is. With compile, the first token after the prefill
    waits for the compiler, and a GPU then replays each step as one CUDA graph. On a CPU for which
    kernels.c can be built, it does the step, with compile or without: it is as fast, and there at once.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={quantize!r} must be int8 or None")
    model.merge_lora()
    is_cpu = model.device.type == "cpu"
    building = threading.Thread(target=kernels.library)  # while the weights move
    if is_cpu:
        building.start()
    fast = RowLinear if quantize is None else Int8Linear
    if quantize or is_cpu:
        for block in model.blocks:
            block.attn = JoinedAttention(block.attn).train(model.training)
            if model.config.mlp == "swiglu":
                block.mlp = JoinedSwiGLU(block.mlp).train(model.training)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    setattr(parent, name, fast(child))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = kernels.in_huge_pages(tensor.detach())
    if is_cpu:
        building.join()
    by_kernel = is_cpu and kernels.library() is not None
    if by_kernel and model.config.n_layer:
        model.decode = FastDecode(model)
    if by_kernel or not compile:
        return None
    # The weights do not change. Checking every module for changes would cost 0.4 ms per token of
    # GPT-2 124M.
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    if model.device.type == "cuda":
        options["triton.cudagraphs"] = True
    return torch.compile(model.decode, dynamic=False, fullgraph=True, options=options)
