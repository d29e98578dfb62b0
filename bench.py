"""How far from the limit of this machine, measured side by side with others.

    python bench.py tokenizers                      # training and encoding, against tokenizers, rustbpe and tiktoken
    python bench.py prepare --gigabytes=1           # prepare.py with two workers, against tiktoken on one thread

Whatever is compared runs in turn, A B A B, and the median counts.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

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


COMMANDS = {"tokenizers": bench_tokenizers, "prepare": bench_prepare}


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        raise ValueError(f"command={sys.argv[1:2]} must be one of {' '.join(COMMANDS)}: add it")
    os.chdir(Path(__file__).resolve().parent)
    COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    with errors_in_one_line():
        main()
