"""Seconds of training a tokenizer, and MB/s of encoding, beside tokenizers, rustbpe and tiktoken.

    python bench.py tokenizers

tokenizers gets the text twice: whole, which it counts in one thread, and in documents of 100,000
characters, which it distributes over all cores. Needs `pip install rustbpe tokenizers`.
"""

from dataclasses import dataclass
from pathlib import Path

import bpe
from bench.common import encode_with_tiktoken, python_text, seconds_in_turn
from glass import sources
from glass.settings import configure


@dataclass
class Settings:
    rounds: int = 3  # how often each contestant runs
    large: bool = True  # also vocabulary 32,768 on 100 MB, which takes minutes


def main(argv):
    s = configure(Settings, argv)
    stdlib = "".join(sources.stdlib_documents())
    for name, text, vocab_size in corpora_with(stdlib, s.large):
        compare_training(name, text, vocab_size, s.rounds)
    compare_token_counts(stdlib[2_000_000:], stdlib[:2_000_000])
    compare_encoding(stdlib[:5_000_000], 2 * s.rounds + 1)


def corpora_with(stdlib, large):
    """A list of (name, text, vocabulary size) to train on."""
    corpora = []
    shakespeare = Path("data/shakespeare_char/input.txt")
    if shakespeare.is_file():
        corpora.append(("Tiny Shakespeare", bpe.read_text(shakespeare), 4096))
    corpora.append(("stdlib", stdlib, 4096))
    if large:
        corpora.append(("100 MB", python_text(100_000_000), 32_768))
    return corpora


def documents_of(text):
    return [text[i : i + 100_000] for i in range(0, len(text), 100_000)]


# Training.


def compare_training(name, text, vocab_size, rounds):
    """Print the seconds that each trainer takes."""
    documents = documents_of(text)
    contestants = {
        "bpe.py": lambda: bpe.BPETokenizer.train(text, vocab_size, special_tokens=()),
        "tokenizers, whole": lambda: train_huggingface([text], vocab_size),
        "tokenizers, documents": lambda: train_huggingface(documents, vocab_size),
        "rustbpe": lambda: train_rustbpe(documents, vocab_size),
    }
    seconds = seconds_in_turn(contestants, rounds)
    megabytes = len(text.encode("utf-8")) / 1e6
    print(f"\ntraining, vocabulary {vocab_size:,} on {name}, {megabytes:.1f} MB")
    for contestant, taken in seconds.items():
        share = seconds["bpe.py"] / taken
        print(f"  {contestant:24} {taken:7.2f} s   bpe.py takes {share:.2f} of it")


def train_huggingface(texts, vocab_size):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)  # GPT-2's pattern
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_rustbpe(texts, vocab_size):
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=bpe.PATTERNS["gpt2"][0])


def compare_token_counts(seen, held_out):
    """Train on the text `seen`, and print how many tokens other text becomes."""
    ours = bpe.BPETokenizer.train(seen, 4096, special_tokens=())
    theirs = train_huggingface(documents_of(seen), 4096)
    n_ours = len(ours.encode(held_out))
    n_theirs = len(theirs.encode(held_out).ids)
    difference = n_ours / n_theirs - 1
    print(f"\ntokens of other text: bpe.py {n_ours:,}, tokenizers {n_theirs:,}, {difference:+.2%}")


# Encoding.


def compare_encoding(text, rounds):
    """Print the MB/s of encoding a text with GPT-2's tokens."""
    fast, plain = bpe.BPETokenizer.from_gpt2(), bpe.BPETokenizer.from_gpt2()
    plain.fast = False
    tiktoken = fast.to_tiktoken()

    def encode_plainly():
        plain.cache.clear()
        plain.encode(text)

    contestants = {
        "tiktoken": lambda: encode_with_tiktoken(tiktoken, text),
        "bpe.py, through tiktoken": lambda: fast.encode(text),
        "bpe.py, plain Python": encode_plainly,
    }
    megabytes = len(text.encode("utf-8")) / 1e6
    what = f"encoding {megabytes:.1f} MB of stdlib with GPT-2's tokens"
    print(f"\n{what}, one thread, cold cache")
    for contestant, taken in seconds_in_turn(contestants, rounds).items():
        print(f"  {contestant:24} {megabytes / taken:7.1f} MB/s")
