"""Tokenizers from scratch: characters, words, and byte-level byte-pair encoding (BPE).

A tokenizer turns text into ids from 0 to vocab_size - 1 and back. The three kinds follow one
protocol (class Tokenizer), so a caller need not know which kind it has. They are saved as JSON.

    tokenizer = BPETokenizer.train(Path("input.txt"), vocab_size=4096)
    ids = tokenizer.encode("lowest newest widest")
    text = tokenizer.decode(ids)
    tokenizer.save("data/tok.json")
    tokenizer = load_tokenizer("data/tok.json")

    python bpe.py train --input input.txt --vocab_size 4096 --out data/tok.json
    python bpe.py show "lowest newest widest" --tokenizer data/tok.json    # merge by merge
    python bpe.py tokens input.txt --tokenizer data/tok.json               # coloured by token

BPE is from Sennrich, Haddow and Birch, arXiv:1508.07909. BPE on bytes is from Radford et al.,
"Language Models are Unsupervised Multitask Learners" (GPT-2), 2019.
"""

import argparse
import gc
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from heapq import heapify, heappop, heappush
from itertools import chain, cycle, islice
from operator import add
from pathlib import Path

from glass.files import write_text
from glass.settings import check_type, errors_in_one_line

# Ordinary text never becomes one of these special tokens.
PAD, UNKNOWN = "<|pad|>", "<|unk|>"
END_OF_TEXT = "<|endoftext|>"  # stands between documents
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"  # begin a turn of a chat
END = "<|end|>"  # ends a turn of a chat
SPECIAL_TOKENS = (PAD, UNKNOWN, END_OF_TEXT, SYSTEM, USER, ASSISTANT, END)
BPE_SPECIAL_TOKENS = (PAD, END_OF_TEXT, SYSTEM, USER, ASSISTANT, END)  # bytes can spell any text

# How text is cut into pre-tokens. BPE merges only inside a pre-token. Each name has two patterns.
# The first is the published one, for the package regex. The second is for the standard library's
# re: it cuts ASCII text the same way in half the time. Under re.ASCII, \s matches the same six
# characters.
CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
PATTERNS = {
    "gpt2": (
        CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r" ?[A-Za-z]+|'(?:s|t|re|ve|m|ll|d)| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
    ),
    "llama3": (
        rf"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        rf"(?i:{CONTRACTIONS})|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{{1,3}}"
        r"| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}

# Text can be cut at a space that follows a non-space: every pattern above starts a pre-token there.
SAFE_CUT = re.compile(r"(?<=\S) ")
LONGEST_SHOWN = 1_000  # characters of a pre-token whose merges `show` prints, one a line
LONGEST_PIECE = 400_000  # characters; tiktoken 0.14 fails on a run of a million spaces
CACHED_PRETOKENS = 500_000  # a larger cache is emptied


def texts_of(texts):
    """Yield strings one after the other.

    A str is text, a Path is a UTF-8 file, anything else is an iterable of either.
    """
    if isinstance(texts, str):
        yield texts
    elif isinstance(texts, Path):
        yield read_text(texts)
    else:
        for text in texts:
            yield from texts_of(text)


def read_text(path):
    """The text of a UTF-8 file, with its line endings unchanged and without a byte order mark.

    Raises FileNotFoundError if there is no such file, and ValueError, with the byte offset, if it
    is not UTF-8.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file: give the path of a UTF-8 text file")
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 at byte {error.start}: convert it to UTF-8"
        ) from error


def pieces_of(text, size):
    """Yield text in pieces of `size` characters or a little more, cut between pre-tokens.

    If no safe cut is found within LONGEST_PIECE characters, the text is cut there anyway.
    """
    start = 0
    while len(text) - start > size:
        found = SAFE_CUT.search(text, start + size, start + max(size, LONGEST_PIECE))
        end = found.start() if found else start + max(size, LONGEST_PIECE)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def split_pretokens(text, pattern):
    """The pre-tokens of text in order, as a list of strings. Joined, they give text again.

    pattern: a name in PATTERNS or a regular expression. Text that is not ASCII is matched in short
    pieces, because most of the pieces are ASCII.
    """
    if pattern not in PATTERNS:
        import regex

        return regex.findall(pattern, text)
    unicode_pattern, ascii_pattern = PATTERNS[pattern]
    if text.isascii():
        return re.findall(ascii_pattern, text, re.ASCII)
    pretokens = []
    pieces = pieces_of(text, 2_000) if len(text) < LONGEST_PIECE else [text]
    for piece in pieces:
        if piece.isascii():
            pretokens += re.findall(ascii_pattern, piece, re.ASCII)
        else:
            import regex  # not needed for text in ASCII

            pretokens += regex.findall(unicode_pattern, piece)
    return pretokens


def map_in_processes(work, items, processes, initializer=None, initargs=()):
    """Yield work(item) for each item, in order.

    Only a few items per process are in flight, so memory stays constant. initializer(*initargs)
    runs once in each process first. With processes=1, this process does the work. Raises
    ChildProcessError if a process dies.
    """
    if processes == 1:
        if initializer:
            initializer(*initargs)
        yield from map(work, items)
        return
    # Forking a process takes 10 ms, starting a new one 100 ms.
    start_method = "fork" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(start_method)
    with ProcessPoolExecutor(processes, context, start_worker, (initializer, initargs)) as pool:
        pending = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > processes + 1:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process was killed, perhaps because memory was full: "
                "run the same command again, prepare.py with fewer --workers"
            ) from error


def start_worker(initializer, initargs):
    """Run first in each worker: it then ends when the main process is gone, however that died.

    Ctrl-C, which reaches every process of a terminal, is left to the main process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if initializer:
        initializer(*initargs)


class Tokenizer:
    """What the three kinds share.

    A kind has `tokens` (the text or bytes of each id, specials included), `special_tokens` (name to
    id), `encode_ordinary` (the ids of text in which nothing is special), `to_dict` (plain types for
    JSON) and `from_dict`, its inverse.
    """

    @property
    def vocab_size(self):
        """Number of ids, specials included."""
        return len(self.tokens)

    def encode(self, text, allowed_special=()):
        """The ids of text, as a list.

        The string of a special token becomes that token only if `allowed_special` names it or is
        "all". Otherwise it is text like any other. Raises ValueError for a name that is no special
        token.
        """
        allowed = self.special_tokens if allowed_special == "all" else allowed_special
        if unknown := set(allowed) - self.special_tokens.keys():
            raise ValueError(
                f"allowed_special={sorted(unknown)} must be special tokens of this tokenizer: "
                f"choose from {sorted(self.special_tokens)}"
            )
        if not allowed:
            return self.encode_ordinary(text)
        longest_first = sorted(allowed, key=len, reverse=True)
        separator = "(" + "|".join(map(re.escape, longest_first)) + ")"
        ids = []
        # re.split keeps what the group matched: text at even places, special tokens at odd ones.
        for i, part in enumerate(re.split(separator, text)):
            if i % 2:
                ids.append(self.special_tokens[part])
            else:
                ids += self.encode_ordinary(part)
        return ids

    def encode_batch(self, texts, allowed_special=()):
        """A list of ids for each text."""
        return [self.encode(text, allowed_special) for text in texts]

    def decode(self, ids):
        """The text of ids. Bytes that are not UTF-8 become the replacement character U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):
        """The exact bytes of ids. Raises ValueError for an id outside the vocabulary."""
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(
                f"ids from {min(ids)} to {max(ids)} but vocab_size={self.vocab_size}: "
                "decode with the tokenizer that made them"
            )
        parts = [self.tokens[i] for i in ids]
        if isinstance(self.tokens[0], bytes):
            return b"".join(parts)
        return "".join(parts).encode("utf-8")

    def unknown_characters(self, text):
        """The parts of text that encode to UNKNOWN, each once, in order.

        BPE has none, because it has every byte.
        """
        return []

    def save(self, path):
        """Write the tokenizer to path as JSON, and make the folders above it."""
        document = json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(path, document)


class CharTokenizer(Tokenizer):
    """One token per character: the sorted characters of the training text, then the specials.

    The characters get the same ids as in nanoGPT.
    """

    def __init__(self, characters, special_tokens=SPECIAL_TOKENS):
        self.characters = characters
        self.tokens = list(characters) + list(special_tokens)
        self.special_tokens = {name: len(characters) + i for i, name in enumerate(special_tokens)}
        self.ids = {character: i for i, character in enumerate(characters)}

    @classmethod
    def train(cls, texts, special_tokens=SPECIAL_TOKENS):
        """A tokenizer with a token for each character that occurs in texts (see `texts_of`)."""
        characters = set()
        for text in texts_of(texts):
            characters.update(text)
        return cls("".join(sorted(characters)), special_tokens)

    def encode_ordinary(self, text):
        unknown = self.special_tokens[UNKNOWN]
        return [self.ids.get(character, unknown) for character in text]

    def unknown_characters(self, text):
        return [character for character in dict.fromkeys(text) if character not in self.ids]

    def to_dict(self):
        return {
            "type": "char",
            "characters": self.characters,
            "special_tokens": list(self.special_tokens),
        }

    @classmethod
    def from_dict(cls, saved):
        return cls(saved["characters"], saved["special_tokens"])


class WordTokenizer(Tokenizer):
    """One token per word with the space before it, or per punctuation mark.

    The most frequent word comes first, the specials come last. Every character belongs to exactly
    one token, so decoding joins the tokens.
    """

    PATTERN = re.compile(r" ?\w+| ?[^\w\s]|\s")

    def __init__(self, words, special_tokens=SPECIAL_TOKENS):
        self.words = words
        self.tokens = list(words) + list(special_tokens)
        self.special_tokens = {name: len(words) + i for i, name in enumerate(special_tokens)}
        self.ids = {word: i for i, word in enumerate(words)}

    @classmethod
    def train(cls, texts, vocab_size=None, special_tokens=SPECIAL_TOKENS):
        """A tokenizer of the vocab_size most frequent words, specials included.

        None keeps all words. Equally frequent words are in alphabetical order.
        """
        counts = Counter()
        for text in texts_of(texts):
            counts.update(cls.PATTERN.findall(text))
        words = sorted(counts, key=lambda word: (-counts[word], word))
        if vocab_size is not None:
            words = words[: vocab_size - len(special_tokens)]
        return cls(words, special_tokens)

    def encode_ordinary(self, text):
        unknown = self.special_tokens[UNKNOWN]
        return [self.ids.get(word, unknown) for word in self.PATTERN.findall(text)]

    def unknown_characters(self, text):
        return [word for word in dict.fromkeys(self.PATTERN.findall(text)) if word not in self.ids]

    def to_dict(self):
        return {"type": "word", "words": self.words, "special_tokens": list(self.special_tokens)}

    @classmethod
    def from_dict(cls, saved):
        return cls(saved["words"], saved["special_tokens"])


def printable_bytes():
    """A dict from each of the 256 bytes to a visible character, in GPT-2's order.

    A printable byte becomes the character of that number; the others become the characters from 256
    on. A space is written as Ġ.
    """
    visible = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in visible]
    characters = {byte: chr(byte) for byte in visible}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return characters


class BPETokenizer(Tokenizer):
    """Byte-level BPE: 256 bytes, then one token per merge in the order learned, then the specials.

    A regular expression cuts text into pre-tokens. In each pre-token, encoding merges the two
    neighbours whose joined bytes are the token with the lowest id. Of several such places, the
    leftmost is first. It repeats this until no two neighbours form a token. This is tiktoken's
    rule. With `fast`, tiktoken does the work; `merge` does the same in plain Python.
    """

    def __init__(self, tokens, special_tokens, pattern="gpt2", fast=True):
        """A tokenizer of the given tokens.

        tokens: the bytes of every ordinary token, in merge order. They take the ids that
        special_tokens (name to id) leaves free. pattern: a name in PATTERNS or a regular
        expression. Raises ValueError if a byte has no token, a token occurs twice, or the ids have
        a gap.
        """
        names = {i: name.encode("utf-8") for name, i in special_tokens.items()}
        size = len(tokens) + len(names)
        if missing := {bytes([byte]) for byte in range(256)} - set(tokens):
            raise ValueError(
                f"bytes={sorted(missing)} have no token, but a byte-level tokenizer needs all 256: "
                "add them"
            )
        has_duplicates = len(set(tokens)) < len(tokens) or len(names) < len(special_tokens)
        if has_duplicates or max(names, default=0) >= size:
            raise ValueError(
                f"{len(tokens)} tokens and special_tokens={special_tokens} must have the ids 0 to "
                f"{size - 1} once each: renumber them"
            )
        ordinary = iter(tokens)
        self.tokens = [names[i] if i in names else next(ordinary) for i in range(size)]
        self.special_tokens = dict(special_tokens)
        self.pattern = pattern
        self.fast = fast
        self.ranks = {token: i for i, token in enumerate(self.tokens) if i not in names}
        self.cache = {}  # pre-token to ids
        self.tiktoken = None

    @classmethod
    def train(
        cls,
        texts,
        vocab_size,
        pattern="gpt2",
        special_tokens=BPE_SPECIAL_TOKENS,
        processes=None,
        progress=False,
        on_merge=None,
    ):
        """A tokenizer of vocab_size tokens learned from texts, the bytes and specials included.

        It has fewer tokens if no pair is left to merge. The most frequent pair of neighbours is
        merged first; of equally frequent pairs, the one with the lower ids. So the result does not
        depend on the number of processes (None: one per core if the text is long). progress shows a
        bar. on_merge: see `learn_tokens`.
        """
        learned = vocab_size - len(special_tokens)
        if learned < 256:
            raise ValueError(
                f"vocab_size={vocab_size} must be at least {256 + len(special_tokens)}, "
                "to hold every byte and special token: raise it"
            )
        counts = count_pretokens(texts, pattern, processes)
        if not counts:
            raise ValueError("the text to train a tokenizer on is empty: give files that hold text")
        tokens = learn_tokens(counts, learned, progress, on_merge)
        special_ids = {name: len(tokens) + i for i, name in enumerate(special_tokens)}
        return cls(tokens, special_ids, pattern)

    def encode_ordinary(self, text):
        if len(text) > LONGEST_PIECE:
            pieces = pieces_of(text, LONGEST_PIECE // 2)
            return list(chain.from_iterable(map(self.encode_ordinary, pieces)))
        if self.fast:
            return self.to_tiktoken().encode_ordinary(text)
        if len(self.cache) > CACHED_PRETOKENS:
            self.cache.clear()
        pretokens = split_pretokens(text, self.pattern)
        for pretoken in set(pretokens) - self.cache.keys():
            self.cache[pretoken] = self.merge(pretoken.encode("utf-8"))
        return list(chain.from_iterable(map(self.cache.__getitem__, pretokens)))

    def merge(self, pretoken):
        """The ids of one pre-token, given as bytes. Takes n log n steps."""
        ranks = self.ranks
        if pretoken in ranks:
            return [ranks[pretoken]]
        # A part becomes b"" when it is merged into the one before it. before and after give the
        # nearest parts that are not b"".
        parts = [pretoken[i : i + 1] for i in range(len(pretoken))]
        before = list(range(-1, len(parts) - 1))
        after = list(range(1, len(parts) + 1))
        pairs = map(add, parts, parts[1:])
        candidates = [(ranks[pair], i) for i, pair in enumerate(pairs) if pair in ranks]
        heapify(candidates)
        while candidates:
            rank, i = heappop(candidates)
            j = after[i]
            if not parts[i] or j == len(parts) or ranks.get(parts[i] + parts[j]) != rank:
                continue  # one of the two has been merged with another neighbour
            parts[i], parts[j] = parts[i] + parts[j], b""
            after[i] = after[j]
            if after[i] < len(parts):
                before[after[i]] = i
            for left in (before[i], i):
                if left >= 0 and after[left] < len(parts):
                    pair = parts[left] + parts[after[left]]
                    if pair in ranks:
                        heappush(candidates, (ranks[pair], left))
        return [ranks[part] for part in parts if part]

    def merge_steps(self, pretoken):
        """Yield the parts of a pre-token, a list of bytes, at the start and after each merge.

        This is the definition of BPE encoding; `merge` gives the same ids faster.
        """
        parts = [pretoken[i : i + 1] for i in range(len(pretoken))]
        yield parts
        while True:
            pairs = map(add, parts, parts[1:])
            candidates = [(self.ranks[p], i) for i, p in enumerate(pairs) if p in self.ranks]
            if not candidates:
                return
            _, i = min(candidates)
            parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]
            yield parts

    def to_tiktoken(self):
        """This tokenizer as a tiktoken.Encoding, built at the first call."""
        if self.tiktoken is None:
            import tiktoken

            pattern = PATTERNS[self.pattern][0] if self.pattern in PATTERNS else self.pattern
            self.tiktoken = tiktoken.Encoding(
                "glassgpt",
                pat_str=pattern,
                mergeable_ranks=self.ranks,
                special_tokens=self.special_tokens,
            )
        return self.tiktoken

    @classmethod
    def from_gpt2(cls):
        """OpenAI's GPT-2 tokenizer, from tiktoken, which downloads its two files once.

        Raises OSError if they cannot be downloaded.
        """
        import tiktoken

        try:
            encoding = tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise OSError(
                f"GPT-2's tokenizer cannot be downloaded ({type(error).__name__}): "
                "connect to the network once, "
                "or set TIKTOKEN_CACHE_DIR to a folder with tiktoken's copies of its two files"
            ) from error
        ranks = encoding._mergeable_ranks
        return cls(sorted(ranks, key=ranks.get), encoding._special_tokens, "gpt2")

    def written_tokens(self):
        """The ordinary tokens in visible characters, in order of id: "Ġthe" for b" the"."""
        character = printable_bytes()
        return ["".join(map(character.__getitem__, token)) for token in self.ranks]

    def to_dict(self):
        tokens = " ".join(self.written_tokens())
        return {
            "type": "bpe",
            "pattern": self.pattern,
            "tokens": tokens,
            "special_tokens": self.special_tokens,
        }

    @classmethod
    def from_dict(cls, saved):
        tokens = list(map(read_token, saved["tokens"].split(" ")))
        return cls(tokens, saved["special_tokens"], saved["pattern"])

    def to_huggingface(self):
        """The content of a tokenizer.json for the package tokenizers, as a dict.

        In that package a merge is a pair of tokens. Here, any pair that joins to a token merges. So
        each way to split a token into two tokens is written as a merge, in the order of the tokens.
        """
        written = dict(zip(self.ranks, self.written_tokens(), strict=True))
        merges = []
        for token in self.ranks:
            for i in range(1, len(token)):
                left, right = token[:i], token[i:]
                if left in self.ranks and right in self.ranks:
                    merges.append([written[left], written[right]])
        pattern = PATTERNS[self.pattern][0] if self.pattern in PATTERNS else self.pattern
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        split = {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        plain = {
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        special = self.special_tokens
        added_tokens = [{"id": i, "content": name, **plain} for name, i in special.items()]
        vocab = {written[token]: i for token, i in self.ranks.items()} | special
        return {
            "version": "1.0",
            "added_tokens": added_tokens,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
        }

    @classmethod
    def from_huggingface(cls, saved):
        """The tokenizer described by the content of a tokenizer.json, a dict.

        Raises ValueError unless it is byte-level BPE of GPT-2's or Llama 3's kind.
        """
        model = saved["model"]
        pre_tokenizer = saved.get("pre_tokenizer") or {}
        listed = pre_tokenizer.get("pretokenizers", [pre_tokenizer] if pre_tokenizer else [])
        steps = {step["type"]: step for step in listed}
        if model.get("type") != "BPE" or "ByteLevel" not in steps or saved.get("normalizer"):
            raise ValueError(
                f"tokenizer.json has model={model.get('type')}, pre_tokenizer={sorted(steps)}, "
                f"normalizer={saved.get('normalizer')}, but must be byte-level BPE of GPT-2's or "
                "Llama 3's kind: choose another"
            )
        if steps["ByteLevel"].get("add_prefix_space"):
            raise ValueError(
                "tokenizer.json has add_prefix_space=True, which is not supported: "
                "set it to false if that fits"
            )
        pattern = steps["Split"]["pattern"]["Regex"] if "Split" in steps else PATTERNS["gpt2"][0]
        names = {published: name for name, (published, _) in PATTERNS.items()}
        pattern = names.get(pattern, pattern)
        special_tokens = {token["content"]: token["id"] for token in saved["added_tokens"]}
        check_distinct({**model["vocab"], **special_tokens})
        written = sorted(model["vocab"].keys() - special_tokens.keys(), key=model["vocab"].get)
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merged = list(dict.fromkeys(left + right for left, right in merges))
        if merged != sorted(merged, key=model["vocab"].get):
            raise ValueError(
                "tokenizer.json lists its merges in another order than the ids, but here the ids "
                "give the order of merging: renumber the tokens"
            )
        return cls(list(map(read_token, written)), special_tokens, pattern)


def check_distinct(ids):
    """Raise ValueError if two tokens have one id: ids is a dict from token to id."""
    token_of = {}
    for token, i in ids.items():
        if token_of.setdefault(i, token) != token:
            raise ValueError(
                f"the tokens {token_of[i]!r} and {token!r} have one id, {i}: give each its own"
            )


BYTE_OF = {character: byte for byte, character in printable_bytes().items()}


def read_token(written):
    """The bytes of a token that is written in visible characters.

    Raises ValueError for a character that stands for no byte.
    """
    try:
        return bytes(map(BYTE_OF.__getitem__, written))
    except KeyError as error:
        raise ValueError(
            f"token={written!r} holds {error}, which stands for no byte: use a byte-level BPE"
        ) from None


def count_pretokens(texts, pattern, processes=None):
    """How often each pre-token occurs in texts, as a Counter.

    processes: how many count a long text; None takes one per core. A short text is counted in this
    process.
    """
    jobs = ((piece, pattern) for text in texts_of(texts) for piece in pieces_of(text, 1_000_000))
    first = list(islice(jobs, 3))
    if len(first) < 3:
        processes = 1
    else:
        processes = processes or os.cpu_count()
    counts = Counter()
    for part in map_in_processes(count_piece, chain(first, jobs), processes):
        counts.update(part)
    return counts


def count_piece(job):
    """How often each pre-token occurs in a (piece, pattern), as a Counter."""
    piece, pattern = job
    parts = pieces_of(piece, 100_000)
    return Counter(chain.from_iterable(split_pretokens(part, pattern) for part in parts))


def learn_tokens_plainly(pretokens, size):
    """The bytes of the tokens that BPE learns from pre-tokens and their counts, a list of `size`.

    The 256 single bytes come first. This is the definition of BPE: count every pair of neighbours,
    merge the most frequent pair everywhere, count again. Of equally frequent pairs, the one with
    the lower ids is merged. `learn_tokens` learns the same tokens, thousands of times faster.
    """
    words = {}
    for pretoken in pretokens:
        words[pretoken] = [bytes([byte]) for byte in pretoken.encode("utf-8")]
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < size:
        counts = Counter()
        for pretoken, parts in words.items():
            for pair in zip(parts, parts[1:]):  # noqa: B905 (one shorter)
                counts[pair] += pretokens[pretoken]
        if not counts:
            break
        ids = {token: i for i, token in enumerate(tokens)}
        left, right = min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))
        if left + right not in ids:
            tokens.append(left + right)
        for parts in words.values():
            # Merging shortens the list, so the last places find nothing.
            for i in range(len(parts) - 1):
                if parts[i : i + 2] == [left, right]:
                    parts[i : i + 2] = [left + right]
    return tokens


def count_pairs(words, frequency):
    """(counts, where): how often each pair of characters occurs, and the indices of its words.

    words: a list of strings; frequency(w): how often word w occurs in the text.
    """
    where = defaultdict(list)
    for w, word in enumerate(words):
        for left, right in zip(word, word[1:]):  # noqa: B905 (one shorter)
            where[left + right].append(w)
    counts = {pair: sum(map(frequency, holders)) for pair, holders in where.items()}
    return defaultdict(int, counts), where


def learn_tokens(pretokens, size, progress=False, on_merge=None):
    """The bytes of the tokens that BPE learns from a dict of pre-token to count, a list of `size`.

    The list is shorter if no pair is left to merge. See `learn_tokens_plainly` for the definition.
    A word is a string with one character per token, chr(id), so merging a pair replaces two
    characters by one. Only the words that hold the merged pair are touched. If the joined bytes are
    already a token, the pair becomes that token. on_merge(left, right, count, id) is called at each
    merge, with the bytes of the two tokens.
    """
    words = [pretoken.encode("utf-8").decode("latin-1") for pretoken in pretokens]
    frequency = list(pretokens.values()).__getitem__
    tokens = [bytes([byte]) for byte in range(256)]
    ids = {token: i for i, token in enumerate(tokens)}
    counts, where = count_pairs(words, frequency)
    most_frequent = [(-count, pair) for pair, count in counts.items()]
    heapify(most_frequent)

    from tqdm import tqdm

    progress_bar = tqdm(total=size - 256, desc="merges", disable=not progress)
    collecting = gc.isenabled()
    gc.disable()  # the many short lists hold no cycles; collecting would take a fifth of the time
    while len(tokens) < size and most_frequent:
        count, pair = heappop(most_frequent)
        if counts.get(pair, 0) != -count:
            if counts.get(pair, 0) > 0:  # it has become rarer since it was pushed
                heappush(most_frequent, (-counts[pair], pair))
            continue
        a, b = pair
        joined = tokens[ord(a)] + tokens[ord(b)]
        new = chr(ids.setdefault(joined, len(tokens)))
        if on_merge:
            on_merge(tokens[ord(a)], tokens[ord(b)], -count, ord(new))
        if ord(new) == len(tokens):
            tokens.append(joined)
            progress_bar.update()
        grown = replace_pair(pair, new, words, frequency, counts, where)
        for other in grown:
            heappush(most_frequent, (-counts[other], other))
    if collecting:
        gc.enable()
    progress_bar.close()
    return tokens


def replace_pair(pair, new, words, frequency, counts, where):
    """Replace a pair by the character `new` in all words, and update counts and where in place.

    Gives back the set of pairs that have become more frequent.
    """
    a, b = pair
    before, after, grown = defaultdict(list), defaultdict(list), set()
    for w in where.pop(pair):
        left, found, right = words[w].partition(pair)
        if not found:
            continue  # the pair has been merged away with another neighbour
        if pair in right:
            grown |= recount(w, words, frequency(w), pair, new, counts, where)
            continue
        words[w] = left + new + right
        if left:
            before[left[-1]].append(w)
        if right:
            after[right[0]].append(w)

    # The neighbours of the pair are now neighbours of `new`.
    old_and_new = [(x + a, x + new, holders) for x, holders in before.items()]
    old_and_new += [(b + x, new + x, holders) for x, holders in after.items()]
    for old_pair, new_pair, holders in old_and_new:
        moved = sum(map(frequency, holders))
        counts[old_pair] -= moved
        counts[new_pair] += moved
        where[new_pair] += holders
        grown.add(new_pair)
    counts.pop(pair, None)
    return grown


def recount(w, words, count, pair, new, counts, where):
    """Replace a pair that occurs more than once in word w, and count all pairs of the word again.

    Gives back the set of the word's pairs that hold `new`.
    """
    old, words[w] = words[w], words[w].replace(pair, new)
    for left, right in zip(old, old[1:]):  # noqa: B905 (one shorter)
        counts[left + right] -= count
    grown = set()
    for left, right in zip(words[w], words[w][1:]):  # noqa: B905 (one shorter)
        counts[left + right] += count
        if new in (left, right):
            where[left + right].append(w)
            grown.add(left + right)
    return grown


TOKENIZERS = {"char": CharTokenizer, "word": WordTokenizer, "bpe": BPETokenizer}


def load_tokenizer(saved):
    """The tokenizer that `saved` describes.

    saved: the path of a file that `save` wrote or of Hugging Face's tokenizer.json, or the dict
    that either holds. Raises FileNotFoundError or ValueError.
    """
    if not isinstance(saved, dict):
        path = Path(saved)
        if path.exists() and not path.is_file():
            raise ValueError(
                f"tokenizer {path} is no file: name one, in a folder its tokenizer.json"
            )
        if not path.is_file():
            raise FileNotFoundError(
                f"tokenizer {path} does not exist: "
                f"train one with python bpe.py train --input FILE --out {path}"
            )
        try:
            return load_tokenizer(json.loads(read_text(path)))
        except Exception as error:  # what others wrote can be wrong in any way
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"tokenizer {path} is not as it should be ({reason}): "
                "train one with python bpe.py train"
            ) from error
    if "model" in saved:
        return BPETokenizer.from_huggingface(saved)
    if saved.get("type") not in TOKENIZERS:
        raise ValueError(
            f"type={saved.get('type')!r} of a tokenizer must be one of {sorted(TOKENIZERS)}: "
            "train one with python bpe.py train"
        )
    return TOKENIZERS[saved["type"]].from_dict(saved)


def with_special_tokens(tokenizer, names):
    """The tokenizer with `names` as further special tokens, which take the ids from vocab_size on.

    Raises ValueError for a kind of tokenizer that cannot take any.
    """
    new = [name for name in names if name not in tokenizer.special_tokens]
    if not new:
        return tokenizer
    saved = tokenizer.to_dict()
    if type(tokenizer) not in TOKENIZERS.values():
        raise ValueError(
            f"a {type(tokenizer).__name__} cannot take {' '.join(new)} as special tokens: "
            "use a template whose markers it has"
        )
    if isinstance(saved["special_tokens"], dict):
        added = {name: tokenizer.vocab_size + i for i, name in enumerate(new)}
        saved["special_tokens"] = {**saved["special_tokens"], **added}
    else:
        saved["special_tokens"] = [*saved["special_tokens"], *new]
    return load_tokenizer(saved)


def paint(tokens):
    """Tokens (bytes or text) as one line of text.

    On a terminal each token has its own background colour; in a pipe, | stands between tokens.
    """
    texts = []
    for token in tokens:
        is_bytes = isinstance(token, bytes)
        texts.append(token.decode("utf-8", errors="backslashreplace") if is_bytes else token)
    if not sys.stdout.isatty():
        return "|".join(texts)
    colours = cycle((44, 42, 45, 46, 43))  # ANSI backgrounds: blue, green, magenta, cyan, yellow
    return "".join(f"\x1b[30;{next(colours)}m{text}\x1b[0m" for text in texts)


def show_merges(text, tokenizer):
    """Print how each pre-token of text is merged, step by step, with the id of each new token."""
    pretokens = list(split_pretokens(text, tokenizer.pattern))
    longest = max(map(len, pretokens), default=0)
    if longest > LONGEST_SHOWN:
        raise ValueError(
            f"text holds a pre-token of {longest:,} characters, and each of its merges would be a "
            f"line: show one of at most {LONGEST_SHOWN:,}"
        )
    for pretoken in pretokens:
        steps = list(tokenizer.merge_steps(pretoken.encode("utf-8")))
        print(paint(steps[0]))
        for earlier, later in zip(steps, steps[1:]):  # noqa: B905 (one shorter)
            compared = enumerate(zip(earlier, later, strict=False))
            i = next(i for i, (old, new) in compared if old != new)
            pair, joined = paint(earlier[i : i + 2]), paint([later[i]])
            print(f"{paint(later)}    {pair} -> {joined}, id {tokenizer.ranks[later[i]]}")
    ids = tokenizer.encode(text)
    print(f"{len(text.encode('utf-8'))} bytes, {len(ids)} tokens: {' '.join(map(str, ids))}")


def merge_printer(n):
    """A function for on_merge of `learn_tokens` that prints the first n merges.

    It prints the number, the pair, the count, and the new token with its id.
    """
    printed = 0

    def show(left, right, count, new_id):
        nonlocal printed
        printed += 1
        if printed <= n:
            pair, new = paint([left, right]), paint([left + right])
            print(f"{printed:4}  {pair}  {count:,} times  ->  {new}, id {new_id}")

    return show


def train_and_compare(paths, vocab_size, pattern, out, n_shown):
    """Train a tokenizer on files, save it, and print its bytes per token beside GPT-2's."""
    progress = sys.stderr.isatty() and not n_shown
    on_merge = merge_printer(n_shown) if n_shown else None
    tokenizer = BPETokenizer.train(paths, vocab_size, pattern, progress=progress, on_merge=on_merge)
    tokenizer.save(out)
    pieces = (piece for text in texts_of(paths) for piece in pieces_of(text, LONGEST_PIECE))
    sample = next(pieces, "")
    n_bytes = len(sample.encode("utf-8"))
    bytes_per_token = n_bytes / len(tokenizer.encode(sample))
    print(f"{out}: {tokenizer.vocab_size} tokens, {bytes_per_token:.3f} bytes per token")
    if tokenizer.vocab_size < vocab_size:
        print(f"fewer than vocab_size={vocab_size}: every pre-token of this text is one token")
    try:
        gpt2 = BPETokenizer.from_gpt2()
    except OSError as error:
        print(error)
    else:
        bytes_per_token = n_bytes / len(gpt2.encode(sample))
        print(f"GPT-2's: {gpt2.vocab_size} tokens, {bytes_per_token:.3f} bytes per token")


def read_command_line():
    """The command line as an argparse.Namespace."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level BPE tokenizer, or watch one at work."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="learn a tokenizer from text files")
    train.add_argument("--input", nargs="+", type=Path, required=True, help="UTF-8 text files")
    train.add_argument(
        "--vocab_size", type=int, default=4096, help="tokens, 256 bytes and specials included"
    )
    train.add_argument(
        "--pattern", choices=PATTERNS, default="gpt2", help="how text is cut into pre-tokens"
    )
    train.add_argument(
        "--out", type=Path, default=Path("data/tok.json"), help="where to save the tokenizer"
    )
    train.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    train.add_argument("--show", type=int, default=0, metavar="N", help="print the first N merges")
    show = commands.add_parser("show", help="merge a text step by step")
    show.add_argument("text")
    tokens = commands.add_parser("tokens", help="print a text file, coloured by token")
    tokens.add_argument("file", type=Path)
    show.add_argument(
        "--tokenizer", default="gpt2", help="gpt2, or the file of a byte-level BPE tokenizer"
    )
    tokens.add_argument("--tokenizer", default="gpt2", help="gpt2, or the file of any tokenizer")
    return parser.parse_args()


def main():
    """Run one of the three commands: train, show, tokens."""
    given = read_command_line()
    if given.command == "train":
        if given.out.is_dir():
            raise ValueError(f"--out={given.out} is a folder: name a file")
        if given.out.exists() and not given.overwrite:
            raise ValueError(
                f"--out={given.out} is there already: name another file, or add --overwrite"
            )
        if given.out.exists() and any(given.out.samefile(path) for path in given.input):
            raise ValueError(f"--out={given.out} is the text itself: name another file")
        given.out.parent.mkdir(parents=True, exist_ok=True)
        train_and_compare(given.input, given.vocab_size, given.pattern, given.out, given.show)
        return
    is_gpt2 = given.tokenizer == "gpt2"
    tokenizer = BPETokenizer.from_gpt2() if is_gpt2 else load_tokenizer(given.tokenizer)
    if given.command == "show":
        check_type("text", given.text, str)
    if given.command == "tokens":
        ids = tokenizer.encode(read_text(given.file))
        print(paint(tokenizer.tokens[i] for i in ids))
    elif isinstance(tokenizer, BPETokenizer):
        show_merges(given.text, tokenizer)
    else:
        raise ValueError(
            f"--tokenizer={given.tokenizer} is not byte-level BPE, so it merges nothing: "
            "train one with python bpe.py train"
        )


if __name__ == "__main__":
    with errors_in_one_line():
        main()
