"""Tokens/s of cached generation, and their share of what the memory bandwidth allows.

    python bench.py generate --model=gpt2 --peer=transformers
    python bench.py generate --model=char --peer=FOLDER_OF_NANOGPT
    python bench.py generate --peer=llama.cpp             # pip install llama-cpp-python gguf
    python bench.py generate --batch_sizes 1 --quantize=int8 --compile=True

The first token, which waits for the whole prompt, is timed apart from the rest. Weights are
random, since speed depends on the shape of a model alone.
"""

import importlib.util
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from bench.common import in_turn, medians, memory_bandwidth, seconds_of
from glass import checkpoint
from glass.device import choose_device, choose_dtype
from glass.generate import speed_up, stream
from glass.settings import configure
from model import GPT, PRESETS, GPTConfig


@dataclass
class Settings:
    model: str = "gpt2"  # a preset, char (10.65M parameters, block 256), or the folder of a run
    dtype: str = "bfloat16"  # float32 | bfloat16, of the weights
    quantize: Literal["int8"] | None = None  # int8 weights
    compile: bool = False  # the one-token step
    context: int = 16  # tokens of the prompt
    new_tokens: int = 100  # tokens made
    batch_sizes: list[str] = field(default_factory=lambda: ["1", "8"])  # rows generated together
    rounds: int = 3  # how often each contestant runs
    peer: str | None = None  # transformers, llama.cpp, or the folder of a nanoGPT checkout


def main(argv):
    s, device = configure(Settings, argv), choose_device()
    dtype = choose_dtype(s.dtype, device)
    torch.manual_seed(0)
    model = GPT(config_of(s.model)).to(device, dtype).eval()
    n_parameters = model.parameter_count()
    gguf = write_gguf(model, s.quantize) if s.peer == "llama.cpp" else None
    compiled_decode = speed_up(model, s.quantize, s.compile)
    bandwidth = memory_bandwidth(device)
    print_header(s, device, n_parameters, bandwidth)
    for batch_size in map(int, s.batch_sizes):
        contestants = make_contestants(s, model, batch_size, dtype, compiled_decode, gguf)
        warm_up = seconds_of(contestants["glassGPT"])
        results = in_turn(contestants, s.rounds)
        steps_per_s = bandwidth / bytes_per_step(s, model, batch_size, dtype)
        print_results(s, batch_size, steps_per_s, warm_up, results)
    print(f"peak memory of the process: {peak_memory(device) / 1e6:,.0f} MB")
    if gguf:
        shutil.rmtree(gguf.parent)


def config_of(name):
    """The GPTConfig of a preset, of `char`, or of the run in a folder."""
    if name == "char":
        return GPTConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384)
    if name in PRESETS:
        return PRESETS[name]
    return GPTConfig(**checkpoint.load(name)["model_config"])


# Contestants: functions that generate once and return what `timed_tokens` does.


def make_contestants(settings, model, batch_size, dtype, compiled_decode, gguf):
    """Ours and, where asked for, the peer's, on the same prompts: name to function."""
    s, config, device = settings, model.config, model.device
    prompt = torch.randint(config.vocab_size, (batch_size, s.context), device=device)
    prompt[:, 0] = torch.arange(batch_size, device=device)  # rows differ, so each is prefilled
    options = dict(temperature=0.8, top_k=200, compiled_decode=compiled_decode)

    def ours():
        return timed_tokens(stream(model, prompt, s.new_tokens, **options))

    contestants = {"glassGPT": ours}
    if s.peer == "transformers":
        theirs = transformers_generator(config, dtype, prompt)
        contestants["transformers"] = lambda: timed_twice(theirs, s.new_tokens)
    elif gguf:
        theirs = LlamaCpp(gguf, prompt, s.new_tokens)
        contestants["llama.cpp"] = lambda: timed_tokens(theirs.tokens())
    elif s.peer:
        theirs = nanogpt_generator(s.peer, config, dtype, prompt)
        contestants[Path(s.peer).name] = lambda: timed_twice(theirs, s.new_tokens)
    return contestants


def timed_tokens(tokens):
    """Seconds until the first item of a generator, and from then until its end."""
    started_at = time.perf_counter()
    next(tokens)
    first_at = time.perf_counter()
    for _ in tokens:
        pass
    return first_at - started_at, time.perf_counter() - first_at


def timed_twice(generate, new_tokens):
    """The same two times for a function that makes n tokens and yields none before the last.

    It is called for one token, and again for all of them.
    """
    first = seconds_of(lambda: generate(1))
    whole = seconds_of(lambda: generate(new_tokens))
    return first, whole - first


def transformers_generator(config, dtype, prompt):
    """A function that makes n tokens with transformers' GPT-2 of the same shape."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(vocab_size=config.vocab_size, n_positions=config.block_size)
    shape |= dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
    theirs = GPT2LMHeadModel(GPT2Config(**shape)).to(prompt.device, dtype).eval()
    options = dict(do_sample=True, temperature=0.8, top_k=200, pad_token_id=0)

    def generate(n):
        mask = torch.ones_like(prompt)
        theirs.generate(prompt, attention_mask=mask, min_new_tokens=n, max_new_tokens=n, **options)

    return generate


def write_gguf(model, quantize):
    """A temporary file that llama.cpp runs: its path."""
    from glass.gguf_files import save_gguf

    if importlib.util.find_spec("llama_cpp") is None:
        raise OSError("peer=llama.cpp needs its package: pip install llama-cpp-python gguf")
    path = Path(tempfile.mkdtemp(prefix="glassgpt-bench-"), "model.gguf")
    save_gguf(model, path, quantize=quantize)
    return path


class LlamaCpp:
    """llama.cpp, through the C functions of the package llama-cpp-python, on all of torch's threads."""

    def __init__(self, path, prompt, new_tokens):
        import llama_cpp as api

        self.api, self.prompt, self.new_tokens = api, prompt.tolist(), new_tokens
        B, T = prompt.shape
        api.llama_backend_init()
        self.silence = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self.silence, None)
        self.model = api.llama_model_load_from_file(
            str(path).encode(), api.llama_model_default_params()
        )
        options = api.llama_context_default_params()
        options.n_ctx, options.n_seq_max = B * (T + new_tokens), B
        options.n_batch = options.n_ubatch = max(512, B * T)
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = api.llama_init_from_model(self.model, options)
        self.batch = api.llama_batch_init(B * T, 0, 1)

    def decode(self, rows, first):
        """Run rows (a list of lists of ids) at the positions from `first`: the likeliest id of each."""
        api, batch, ends = self.api, self.batch, []
        batch.n_tokens = 0
        for row, ids in enumerate(rows):
            for place, token in enumerate(ids):
                i = batch.n_tokens
                batch.token[i], batch.pos[i] = token, first + place
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
                batch.logits[i] = place == len(ids) - 1
                batch.n_tokens += 1
            ends.append(batch.n_tokens - 1)
        if api.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp could not decode")
        size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        logits = [api.llama_get_logits_ith(self.context, end) for end in ends]
        return [int(np.ctypeslib.as_array(each, (size,)).argmax()) for each in logits]

    def tokens(self):
        """Yield the next ids of all rows."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        ids = self.decode(self.prompt, 0)
        yield ids
        for place in range(self.new_tokens - 1):
            ids = self.decode([[each] for each in ids], len(self.prompt[0]) + place)
            yield ids


def nanogpt_generator(folder, config, dtype, prompt):
    """A function that makes n tokens with nanoGPT's code and a model of the same shape."""
    path = Path(folder) / "model.py"
    if not path.is_file():
        raise ValueError(
            f"peer={folder} has no model.py: give transformers, llama.cpp, or the folder of a "
            "nanoGPT checkout"
        )
    nano = load_module(path)
    shape = dict(vocab_size=config.vocab_size, block_size=config.block_size, n_embd=config.n_embd)
    shape |= dict(n_layer=config.n_layer, n_head=config.n_head, bias=config.bias, dropout=0.0)
    theirs = nano.GPT(nano.GPTConfig(**shape)).to(prompt.device, dtype).eval()
    return lambda n: theirs.generate(prompt, n, temperature=0.8, top_k=200)


def load_module(path):
    """A Python file as a module, without touching sys.path."""
    name = f"{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# Limits and results.


def bytes_per_step(settings, model, batch_size, dtype):
    """Bytes read to decode one token of every row: the weights of blocks and head, and the cache.

    The cache counts at its mean length.
    """
    s, c = settings, model.config
    tensors = [*model.blocks.parameters(), *model.blocks.buffers()]
    tensors += [*model.head.parameters(), *model.head.buffers()]
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    bytes_per_position = 2 * c.n_layer * c.n_kv_head * c.head_dim * dtype.itemsize
    mean_length = s.context + s.new_tokens / 2
    return weight_bytes + batch_size * mean_length * bytes_per_position


def peak_memory(device):
    """The most bytes that this process has held, of the GPU's memory if there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # Windows lacks it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_header(settings, device, n_parameters, bandwidth):
    s = settings
    weights = f"{s.dtype} with int8 weights" if s.quantize else s.dtype
    kind = "compiled" if s.compile else "eager"
    work = f"{s.context} + {s.new_tokens} tokens on {device}"
    print(
        f"{s.model}, {n_parameters / 1e6:.1f}M parameters, {weights}, {kind}, {work}; "
        f"memory reads at {bandwidth / 1e9:.0f} GB/s"
    )


def print_results(settings, batch_size, steps_per_s, warm_up, results):
    """steps_per_s: what the bandwidth allows; results: name to list of (first, rest) in seconds."""
    s = settings
    limit = batch_size * steps_per_s
    print(
        f"batch {batch_size}: the memory bandwidth allows {limit:,.0f} tokens/s; "
        f"first run, compiler included, {warm_up:.1f} s"
    )
    for name, runs in results.items():
        first, rest = medians(runs)
        rate = batch_size * (s.new_tokens - 1) / rest
        share = rate / limit
        prompt_rate = batch_size * s.context / first
        print(
            f"  {name:14} {rate:8,.0f} tokens/s, {share:4.0%} of the limit; "
            f"first token after {1e3 * first:,.0f} ms ({prompt_rate:,.0f} prompt tokens/s)"
        )
