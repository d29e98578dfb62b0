"""How far from the limit of this machine, measured side by side with others.

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
import random
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


COMMANDS = {"tokenizers": bench_tokenizers, "prepare": bench_prepare, "generate": bench_generate, "faults": bench_faults}


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        raise ValueError(f"command={sys.argv[1:2]} must be one of {' '.join(COMMANDS)}: add it")
    os.chdir(Path(__file__).resolve().parent)
    COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    with errors_in_one_line():
        main()
