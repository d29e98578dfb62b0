"""How far from the limit of this machine, measured side by side with others.

    python bench.py limits                          # what this machine can do: matrix products, memory
    python bench.py train --peer FOLDER_OF_NANOGPT  # a step: tokens/s, FLOP/s, memory, start-up; --profile=True
    python bench.py recipe --configs config/a.py config/b.py     # loss against wall-clock, one picture
    python bench.py tokenizers                      # training and encoding, against tokenizers, rustbpe and tiktoken
    python bench.py prepare --gigabytes=1           # prepare.py with two workers, against tiktoken on one thread
    python bench.py generate --model=gpt2           # tokens/s against the memory bandwidth; --peer transformers | NANOGPT
    python bench.py faults --kills=20               # kill -9, resume, compare to the bit

Whatever is compared runs in turn, A B A B, and the median counts.
"""

import hashlib
import importlib.util
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import bpe
import sources
from config import configure, errors_in_one_line

SCRATCH = Path("data/bench")


def python_text(n_bytes):
    """n_bytes of Python: the standard library's source, then that of installed packages, then from the start again."""
    installed = [path for path in sys.path if path.endswith("-packages")]
    paths = [*sources.standard_library(), *(file for root in installed for file in sorted(Path(root).rglob("*.py")))]
    text, size = [], 0
    while size < n_bytes:
        for path in paths:
            text.append(path.read_bytes().decode("utf-8", errors="ignore"))
            size += len(text[-1].encode("utf-8"))
            if size >= n_bytes:
                break
    return "".join(text)


def in_turn(contestants, rounds):
    """Median seconds of each contestant (name to function), run in turn."""
    seconds = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            started_at = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started_at)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


@dataclass
class TokenizersSettings:
    rounds: int = 3  # how often each contestant runs
    large: bool = True  # also vocabulary 32,768 on 100 MB, which takes minutes


def bench_tokenizers(argv):
    """Seconds of training, and MB/s of encoding. tokenizers gets the text whole, which it counts in one thread, and in
    documents of 100,000 characters, which it shares out to all cores."""
    settings = configure(TokenizersSettings, argv)
    stdlib = "".join(sources.stdlib_documents())
    corpora = [("stdlib", stdlib, 4096)]
    if settings.large:
        corpora.append(("100 MB", python_text(100_000_000), 32_768))
    shakespeare = Path("data/shakespeare_char/input.txt")
    if shakespeare.is_file():
        corpora.insert(0, ("Tiny Shakespeare", bpe.read_text(shakespeare), 4096))
    for name, text, vocab_size in corpora:
        documents = documents_of(text)
        contestants = {
            "bpe.py": lambda text=text, size=vocab_size: bpe.BPETokenizer.train(text, size, special_tokens=()),
            "tokenizers, whole": lambda text=text, size=vocab_size: train_huggingface([text], size),
            "tokenizers, documents": lambda texts=documents, size=vocab_size: train_huggingface(texts, size),
            "rustbpe": lambda texts=documents, size=vocab_size: train_rustbpe(texts, size),
        }
        seconds = in_turn(contestants, settings.rounds)
        print(f"\ntraining, vocabulary {vocab_size:,} on {name}, {len(text.encode('utf-8')) / 1e6:.1f} MB")
        for contestant, taken in seconds.items():
            print(f"  {contestant:24} {taken:7.2f} s   bpe.py takes {seconds['bpe.py'] / taken:.2f} of it")
    held_out, seen = stdlib[:2_000_000], stdlib[2_000_000:]
    ours, theirs = bpe.BPETokenizer.train(seen, 4096, special_tokens=()), train_huggingface(documents_of(seen), 4096)
    n_ours, n_theirs = len(ours.encode(held_out)), len(theirs.encode(held_out).ids)
    print(f"\ntokens of other text: bpe.py {n_ours:,}, tokenizers {n_theirs:,}, {n_ours / n_theirs - 1:+.2%}")

    text = stdlib[:5_000_000]
    megabytes = len(text.encode("utf-8")) / 1e6
    fast, plain = bpe.BPETokenizer.from_gpt2(), bpe.BPETokenizer.from_gpt2()
    plain.fast = False
    tiktoken = fast.to_tiktoken()
    contestants = {
        "tiktoken": lambda: [tiktoken.encode_ordinary(piece) for piece in bpe.pieces_of(text, 200_000)],
        "bpe.py, through tiktoken": lambda: fast.encode(text),
        "bpe.py, plain Python": lambda: (plain.cache.clear(), plain.encode(text)),
    }
    print(f"\nencoding {megabytes:.1f} MB of stdlib with GPT-2's tokens, one thread, cold cache")
    for contestant, taken in in_turn(contestants, 2 * settings.rounds + 1).items():
        print(f"  {contestant:24} {megabytes / taken:7.1f} MB/s")


def documents_of(text):
    return [text[i : i + 100_000] for i in range(0, len(text), 100_000)]


def train_huggingface(texts, vocab_size):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's pattern
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_rustbpe(texts, vocab_size):
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=bpe.PATTERNS["gpt2"][0])


@dataclass
class PrepareSettings:
    gigabytes: float = 1.0  # of text, in one file
    workers: int = 2  # processes that tokenize
    rounds: int = 1  # how often each contestant runs


def bench_prepare(argv):
    """MB/s of prepare.py with GPT-2's tokens, tiktoken's on one thread, and the peak memory of prepare's processes."""
    settings = configure(PrepareSettings, argv)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    path = SCRATCH / "input.txt"
    block = python_text(100_000_000).encode("utf-8")
    with open(path, "wb") as file:
        while file.tell() < settings.gigabytes * 1e9:
            file.write(block[: int(settings.gigabytes * 1e9) - file.tell()])
    text = block[:20_000_000].decode("utf-8", errors="ignore")
    tiktoken = bpe.BPETokenizer.from_gpt2().to_tiktoken()
    command = [sys.executable, "prepare.py", "./data/bench/tokens", "--input", str(path), "--overwrite=True"]
    peaks = []
    contestants = {
        "tiktoken": lambda: [tiktoken.encode_ordinary(piece) for piece in bpe.pieces_of(text, 200_000)],
        "prepare.py": lambda: peaks.append(peak_memory_of([*command, f"--workers={settings.workers}"])),
    }
    seconds = in_turn(contestants, settings.rounds)
    one_thread = len(text.encode("utf-8")) / 1e6 / seconds["tiktoken"]
    ours = path.stat().st_size / 1e6 / seconds["prepare.py"]
    print(f"tiktoken, one thread: {one_thread:.1f} MB/s")
    share = ours / (one_thread * settings.workers)
    used = os.times()
    per_cpu_second = settings.rounds * path.stat().st_size / 1e6 / (used.children_user + used.children_system)
    print(f"prepare.py, {settings.workers} workers: {ours:.1f} MB/s, {share:.0%} of {settings.workers} such threads")
    print(f"the same by CPU time: {per_cpu_second:.1f} MB/s, {per_cpu_second / one_thread:.0%} of tiktoken")
    print(f"peak memory of all processes together: {max(peaks) / 1e6:.0f} MB")
    shutil.rmtree(SCRATCH)


def peak_memory_of(command):
    """Run a command; the sum of the peaks (VmHWM) of it and its children in bytes. Linux only."""
    process = subprocess.Popen(command)
    peaks = {}
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        for pid in [str(process.pid), *(children.read_text().split() if children.is_file() else [])]:
            status = Path(f"/proc/{pid}/status")
            lines = status.read_text().splitlines() if status.is_file() else []
            peaks.update((pid, int(line.split()[1]) * 1024) for line in lines if line.startswith("VmHWM:"))
        time.sleep(0.2)
    if process.returncode:
        raise ValueError(f"{' '.join(command)} ended with status {process.returncode}: see its message above")
    return sum(peaks.values())


@dataclass
class GenerateSettings:
    model: str = "gpt2"  # a preset's shape, char (10.65M parameters, block 256), or the folder of a run
    dtype: str = "bfloat16"  # float32 | bfloat16, of the weights
    quantize: Literal["int8"] | None = None  # int8 weights
    compile: bool = False  # the one-token step
    context: int = 16  # tokens of the prompt
    new_tokens: int = 100  # tokens made
    batch_sizes: list[str] = field(default_factory=lambda: ["1", "8"])  # rows generated together
    rounds: int = 3  # how often each contestant runs
    peer: str | None = None  # also measure: transformers, or the folder of a nanoGPT checkout


def bench_generate(argv):
    """Tokens a second after the first, the time of the first, and the share of what the memory bandwidth allows."""
    import torch

    import checkpoint
    from decode import speed_up
    from model import GPT, PRESETS, GPTConfig, choose_device

    s, device = configure(GenerateSettings, argv), choose_device()
    dtype = getattr(torch, s.dtype)
    if s.model == "char":
        config = GPTConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384)
    else:
        config = PRESETS.get(s.model) or GPTConfig(**checkpoint.load(s.model)["model_config"])
    torch.manual_seed(0)
    model = GPT(config).to(device, dtype).eval()
    n_parameters = model.parameter_count()
    compiled_decode = speed_up(model, s.quantize, s.compile)
    bandwidth = memory_bandwidth(device)
    kind = f"{s.dtype}{' with int8 weights' if s.quantize else ''}, {'compiled' if s.compile else 'eager'}"
    print(f"{s.model}, {n_parameters / 1e6:.1f}M parameters, {kind}, ", end="")
    print(f"{s.context} + {s.new_tokens} tokens on {device}; memory reads at {bandwidth / 1e9:.0f} GB/s")
    bytes_per_step = sum(t.numel() * t.element_size() for t in [*model.blocks.parameters(), *model.blocks.buffers()])
    bytes_per_step += sum(t.numel() * t.element_size() for t in [*model.head.parameters(), *model.head.buffers()])
    for batch_size in map(int, s.batch_sizes):
        prompt = torch.randint(config.vocab_size, (batch_size, s.context), device=device)
        prompt[:, 0] = torch.arange(batch_size, device=device)  # rows differ, so each is prefilled
        options = dict(temperature=0.8, top_k=200, compiled_decode=compiled_decode)

        def ours(prompt=prompt, options=options):
            return timed_tokens(model.stream(prompt, s.new_tokens, **options))

        contestants = {"glassGPT": ours}
        if s.peer:
            peer = Path(s.peer).name if s.peer != "transformers" else s.peer
            contestants[peer] = peer_generator(s.peer, config, dtype, device, prompt, s.new_tokens)
        started_at = time.perf_counter()
        ours()
        warm_up = time.perf_counter() - started_at
        results = {name: [] for name in contestants}
        for _ in range(s.rounds):
            for name, run in contestants.items():
                results[name].append(run())
        cache_bytes = 2 * config.n_layer * config.n_kv_head * config.head_dim * (s.context + s.new_tokens / 2) * batch_size
        limit = bandwidth / (bytes_per_step + cache_bytes * torch.finfo(dtype).bits / 8)
        allowed = f"the memory bandwidth allows {batch_size * limit:,.0f} tokens/s"
        print(f"batch {batch_size}: {allowed}; first run, compiler included, {warm_up:.1f} s")
        for name, runs in results.items():
            first, rest = (statistics.median(values) for values in zip(*runs, strict=True))
            rate = batch_size * (s.new_tokens - 1) / rest
            print(
                f"  {name:14} {rate:8,.0f} tokens/s, {rate / batch_size / limit:4.0%} of the limit; first token after "
                f"{1e3 * first:,.0f} ms ({batch_size * s.context / first:,.0f} prompt tokens/s)"
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak
    print(f"peak memory of the process: {peak / 1e6:,.0f} MB")


def timed_tokens(stream):
    """Seconds until the first item of a generator, and from there to its end."""
    started_at = time.perf_counter()
    next(stream)
    first_at = time.perf_counter()
    for _ in stream:
        pass
    return first_at - started_at, time.perf_counter() - first_at


def memory_bandwidth(device):
    """Bytes a second of reading memory: the best of ten sums over 512 MB."""
    import torch

    numbers = torch.ones(128 * 1024 * 1024, device=device)
    seconds = []
    for _ in range(10):
        started_at = time.perf_counter()
        numbers.sum().item()
        seconds.append(time.perf_counter() - started_at)
    return numbers.numel() * 4 / min(seconds)


def peer_generator(peer, config, dtype, device, prompt, new_tokens):
    """A function that generates with transformers' GPT-2 or nanoGPT's code, of the same shape, and gives back the two times."""
    import torch

    if peer == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = dict(vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd)
        theirs = GPT2LMHeadModel(GPT2Config(**shape, n_layer=config.n_layer, n_head=config.n_head)).to(device, dtype).eval()

        def generate(n):
            options = dict(min_new_tokens=n, max_new_tokens=n, do_sample=True, temperature=0.8, top_k=200, pad_token_id=0)
            theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    else:
        path = Path(peer) / "model.py"
        if not path.is_file():
            raise ValueError(f"peer={peer} has no model.py: give transformers, or the folder of a nanoGPT checkout")
        nano = load_module(path)
        shape = dict(vocab_size=config.vocab_size, block_size=config.block_size, n_embd=config.n_embd, dropout=0.0)
        shape |= dict(n_layer=config.n_layer, n_head=config.n_head, bias=config.bias)
        theirs = nano.GPT(nano.GPTConfig(**shape)).to(device, dtype).eval()

        def generate(n):
            theirs.generate(prompt, n, temperature=0.8, top_k=200)

    def run():
        started_at = time.perf_counter()
        generate(1)
        first = time.perf_counter() - started_at
        generate(new_tokens)
        return first, time.perf_counter() - started_at - 2 * first

    return run


def load_module(path):
    """A Python file as a module, without touching sys.path."""
    spec = importlib.util.spec_from_file_location(Path(path).parent.name + "_" + Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@dataclass
class LimitsSettings:
    rounds: int = 10  # of each measurement; the best counts


def bench_limits(argv):
    """What this machine can do: matrix products by size and dtype, and reading memory."""
    import torch

    from model import choose_device

    s, device = configure(LimitsSettings, argv), choose_device()
    print(f"{device}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads")
    for dtype in (torch.float32, torch.bfloat16):
        rates = [f"{n}: {product_rate(n, dtype, device, s.rounds) / 1e9:,.0f}" for n in (256, 512, 1024, 2048, 4096)]
        print(f"GFLOP/s of a square matrix product in {str(dtype).removeprefix('torch.')}, by size: {', '.join(rates)}")
    print(f"reading memory: {memory_bandwidth(device) / 1e9:.0f} GB/s")


def product_rate(n, dtype, device, rounds=10):
    """Floating-point operations a second of the product of two n x n matrices: the best of some rounds of three."""
    import torch

    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(rounds):
        started_at = time.perf_counter()
        for _ in range(3):
            product = a @ b
        product[0, 0].item()  # waits for a GPU
        seconds.append((time.perf_counter() - started_at) / 3)
    return 2 * n**3 / min(seconds)


# the work, in settings that train.py and nanoGPT's share
SHAPES = {
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12),  # nanoGPT's CPU line
    "char": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=16),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=4),
}


@dataclass
class TrainSettings:
    model: str = "char"  # tiny (0.8M parameters), char (10.65M) or gpt2 (124M): all with GPT-2's parts, on random tokens
    settings: list[str] = field(default_factory=list)  # further ones of train.py: --settings dtype=float32 compile=True
    batch_size: int | None = None  # sequences of a step, the shape's where None
    steps: int = 30  # of one run; the median of the last two thirds counts
    rounds: int = 3  # how often each contestant runs, in turn
    peer: str | None = None  # also measure the folder of a nanoGPT checkout
    peer_compile: bool = False  # and that once more, compiled
    profile: bool = False  # print where the time of our steps goes instead


def bench_train(argv):
    """train.py as a program, and a peer's, on the same work in turn: step, tokens/s, FLOP/s, memory, start-up."""
    import torch

    from model import GPT, GPTConfig, choose_device

    s, device = configure(TrainSettings, argv), choose_device()
    if s.model not in SHAPES:
        raise ValueError(f"model={s.model!r} must be one of {' '.join(SHAPES)}")
    work = SHAPES[s.model] | dict(gradient_accumulation_steps=1, dropout=0.0, bias=False, eval_iters=1, log_interval=1)
    work["batch_size"] = s.batch_size or work["batch_size"]
    vocab_size = 50257 if s.model == "gpt2" else 65
    folder = random_tokens(vocab_size)
    ours = ["config/gpt2_124m.py", *(f"--{name}={value}" for name, value in work.items()), f"--dataset={folder}"]
    ours += ["--mlp=gelu_exact"]  # as nanoGPT's
    ours += [f"--out_dir={SCRATCH / 'train'}", "--overwrite=True", f"--max_iters={s.steps}", "--sample_tokens=None"]
    ours += words_of(s.settings)
    if s.profile:
        return profile_training(ours)
    contestants = {"glassGPT": (Path("train.py"), ours)}
    if s.peer:
        script = Path(s.peer) / "train.py"
        if not script.is_file():
            raise ValueError(f"peer={s.peer} has no train.py: give the folder of a nanoGPT checkout")
        theirs = [f"--{name}={value}" for name, value in work.items()] + [f"--dataset={folder}", f"--max_iters={s.steps}"]
        theirs += [f"--device={device}", f"--out_dir={folder / 'peer'}"]
        contestants["nanoGPT"] = (script, [*theirs, "--compile=False"])
        if s.peer_compile or device.type == "cuda":
            contestants["nanoGPT, compiled"] = (script, [*theirs, "--compile=True"])
    results = {name: [] for name in contestants}
    for _ in range(s.rounds):
        for name, (script, arguments) in contestants.items():
            results[name].append(timed_run(script, arguments, s.steps))

    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=vocab_size, bias=False, **{name: work[name] for name in list(work)[:4]}))
    tokens, product = work["batch_size"] * work["block_size"], product_rate(2048, torch.bfloat16, device)
    flops = model.flops_per_token() * tokens  # of a step
    shape = f"{work['batch_size']} x {work['block_size']} tokens a step"
    print(f"{s.model}, {model.parameter_count() / 1e6:.2f}M parameters, {shape}")
    print(f"the bfloat16 product of two 2048 x 2048 matrices: {product / 1e9:,.0f} GFLOP/s")
    medians = {name: [statistics.median(values) for values in zip(*runs, strict=True)] for name, runs in results.items()}
    for name, (step, start, peak) in medians.items():
        print(
            f"  {name:18}{1e3 * step:9,.1f} ms a step, {tokens / step:9,.0f} tokens/s, {flops / step / 1e9:7,.0f} GFLOP/s = "
            f"{flops / step / product:3.0%} of the product; first step at {start:4.1f} s; peak {peak / 1e6:6,.0f} MB; "
            f"glassGPT is {step / medians['glassGPT'][0]:.2f}x as fast"
        )


def random_tokens(vocab_size):
    """A folder of random tokens that train.py reads by its meta.json, and nanoGPT by its file names and meta.pkl."""
    import numpy as np

    folder = (SCRATCH / f"random_{vocab_size}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = bpe.WordTokenizer([f"w{i}" for i in range(vocab_size)], special_tokens=())
    splits = {}
    for seed, split in enumerate(("train", "val")):
        tokens = np.random.default_rng(seed).integers(vocab_size, size=2_000_000 >> 3 * seed, dtype=np.uint16)
        tokens.tofile(folder / f"{split}.bin")
        shard = {"file": f"{split}.bin", "tokens": len(tokens)}
        splits[split] = {"shards": [shard], "tokens": len(tokens), "bytes": len(tokens)}
    meta = {"kind": "text", "splits": splits, "dtype": "uint16", "vocab_size": vocab_size, "sha256": "random"}
    (folder / "meta.json").write_text(json.dumps(meta | {"tokenizer": tokenizer.to_dict()}))
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    return folder


def run_script(script, arguments):
    """Run a training script to its end: its lines, each with the seconds since the start, and its peak memory in bytes."""
    started_at, lines = time.perf_counter(), []
    command, folder = [sys.executable, script.name, *arguments], script.resolve().parent
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        lines.append((time.perf_counter() - started_at, line))
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        last = lines[-1][1].strip() if lines else "no output"
        raise ValueError(f"{script} ended with status {os.waitstatus_to_exitcode(status)}: {last}")
    return lines, usage.ru_maxrss * 1024


def timed_run(script, arguments, steps):
    """Run a training script: median seconds of a late step, seconds until its first step began, bytes of memory at most."""
    lines, peak = run_script(script, arguments)
    found = [(at, re.match(r"(step|iter) \d+.*?([\d,.]+) ?ms", line)) for at, line in lines]
    ends = [(at, float(match[2].replace(",", "")) / 1e3) for at, match in found if match]  # (end, length) of each step
    if len(ends) < steps // 2:
        raise ValueError(f"{script} printed the time of {len(ends)} of {steps} steps: {lines[-1][1].strip()}")
    return statistics.median(length for _, length in ends[len(ends) // 3 :]), ends[0][0] - ends[0][1], peak


def profile_training(arguments):
    """One table of the operations that our steps spend the most time in, the start of the run included."""
    import torch

    import train

    on_gpu = [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *on_gpu]) as profile:
        train.main(arguments)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=50))


@dataclass
class RecipeSettings:
    configs: list[str] = field(default_factory=list)  # of train.py, to compare: --configs config/a.py config/b.py
    settings: list[str] = field(default_factory=list)  # further ones for all of them: --settings eval_interval=100 seed=1
    peer: str | None = None  # also the folder of a nanoGPT checkout that has prepared the same dataset
    peer_settings: list[str] = field(default_factory=list)  # its config file and settings
    picture: str = "recipe.png"  # where the curves go


def bench_recipe(argv):
    """Validation loss against the wall-clock of the whole command, of configs and of a peer: one picture, one table."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    s = configure(RecipeSettings, argv)
    out = [f"--out_dir={(SCRATCH / 'recipe').resolve()}", "--overwrite=True", "--sample_tokens=None"]
    runs = {Path(path).stem: (Path("train.py"), [path, *words_of(s.settings), *out]) for path in s.configs}
    if s.peer:
        runs["nanoGPT"] = (Path(s.peer) / "train.py", words_of(s.peer_settings))
    for name, (script, arguments) in runs.items():
        lines, _ = run_script(script, arguments)
        found = [(at, re.match(r"step [1-9]\d*: .*val loss ([\d.]+)", line)) for at, line in lines]
        curve = [(at, float(match[1])) for at, match in found if match]
        print(f"{name}, {lines[-1][0]:.0f} s in all: ", "  ".join(f"{at:.0f} s {loss:.4f}" for at, loss in curve), flush=True)
        plt.plot(*zip(*curve, strict=True), marker="o", label=name)
    plt.xlabel("seconds since the command began")
    plt.ylabel("validation loss (nats per token)")
    plt.legend()
    plt.savefig(s.picture, dpi=150)
    print(f"the curves are in {s.picture}")


def words_of(settings):
    """Config files as they are, name=value as --name=value."""
    return [f"--{word}" if "=" in word else word for word in settings]


@dataclass
class FaultsSettings:
    kills: int = 20  # kill -9 at random moments, over as many runs as it takes
    max_iters: int = 60  # steps of a run
    longest_life: float = 2.0  # seconds until a kill, at most
    seed: int = 0  # of the moments
    torchrun: bool = True  # also kill one of two processes under torchrun


FAULTS_RUN = """--block_size=64 --n_layer=2 --n_head=4 --n_embd=128 --batch_size=8 --gradient_accumulation_steps=2 --dropout=0.1
--eval_interval=10 --checkpoint_interval=2 --eval_iters=20 --log_interval=1 --warmup_iters=5 --sample_tokens=None
--compile=False --device=cpu""".split()


def bench_faults(argv):
    """Kill runs at random moments, resume each with init_from=auto, and compare the last state, to the bit, with that of a
    run that was left alone."""
    s = configure(FaultsSettings, argv)
    moments = random.Random(s.seed)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    run = [*FAULTS_RUN, f"--max_iters={s.max_iters}", f"--lr_decay_iters={s.max_iters}"]
    train_in_child([*run, f"--out_dir={SCRATCH / 'straight'}"]).join()
    expected = state_digest(SCRATCH / "straight")
    print(f"undisturbed: {expected[:16]}")
    kills, in_writes, runs, same = 0, 0, 0, 0
    while kills < s.kills:
        folder, finished, kills_before = SCRATCH / f"killed-{runs}", False, kills
        while not finished:
            process = train_in_child([*run, "--init_from=auto", f"--out_dir={folder}"])
            process.join(moments.uniform(0, s.longest_life) if kills < s.kills else None)
            if process.is_alive():
                process.kill()
                process.join()
                kills, in_writes = kills + 1, in_writes + bool(list(folder.glob("*.tmp")))
            finished = process.exitcode == 0
        runs, same = runs + 1, same + (state_digest(folder) == expected)
        print(f"run {runs}: {kills - kills_before} kills, {state_digest(folder)[:16]}", flush=True)
    print(f"{kills} kills, {in_writes} of them while a checkpoint was written; {same} of {runs} runs ended in the same bits")
    if s.torchrun:
        torchrun_kill(run)
    shutil.rmtree(SCRATCH)


def train_in_child(words):
    """A forked process that trains: it has torch imported already, so that little of its life is start-up."""
    import train

    def quiet():
        sys.stdout = sys.stderr = open(SCRATCH / "log.txt", "a")
        sys.exit(train.main(words))

    SCRATCH.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=quiet)
    process.start()
    return process


def state_digest(folder):
    """sha256 of the weights and the optimizer's state in the last checkpoint."""
    import checkpoint

    digest = hashlib.sha256()

    def add(value):
        if hasattr(value, "numpy"):
            digest.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict | list | tuple):
            for item in value.items() if isinstance(value, dict) else value:
                add(item)
        else:
            digest.update(repr(value).encode())

    state = checkpoint.load(folder)
    add([state["step"], state["model"], state["optimizer"]])
    return digest.hexdigest()


def torchrun_kill(run):
    """Two processes under torchrun with restarts, one of them killed in the middle, against two that are left alone."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("two", "two-killed"):
        folder = SCRATCH / name
        words = [*torchrun, "train.py", *run, "--init_from=auto", f"--out_dir={folder}"]
        with open(SCRATCH / "log.txt", "a") as log:
            process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
            while name == "two-killed" and not list(folder.glob("ckpt_*.pt")):
                time.sleep(0.05)
            if name == "two-killed":
                worker = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
                os.kill(int(worker), signal.SIGKILL)
            process.wait()
        losses = [json.loads(line).get("val_loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
        val_loss = [loss for loss in losses if loss][-1]
        print(f"torchrun, {name}: status {process.returncode}, final val loss {val_loss:.6f}, {state_digest(folder)[:16]}")


COMMANDS = {
    "limits": bench_limits,
    "train": bench_train,
    "recipe": bench_recipe,
    "generate": bench_generate,
    "tokenizers": bench_tokenizers,
    "prepare": bench_prepare,
    "faults": bench_faults,
}


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        raise ValueError(f"command={sys.argv[1:2]} must be one of {' '.join(COMMANDS)}: add it")
    os.chdir(Path(__file__).resolve().parent)
    COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    with errors_in_one_line():
        main()
