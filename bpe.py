"""Tokenizers from scratch: characters, words, and byte-level byte-pair encoding (BPE).

A tokenizer turns text into ids from 0 to vocab_size - 1 and back. The three share one protocol (class Tokenizer), so
that nothing that uses one asks which it has. Stored as JSON, never pickled:

    tokenizer = BPETokenizer.train(Path("input.txt"), vocab_size=4096)
    ids = tokenizer.encode("lowest newest widest")
    text = tokenizer.decode(ids)
    tokenizer.save("data/tok.json")
    tokenizer = load_tokenizer("data/tok.json")

    python bpe.py train --input input.txt --vocab_size 4096 --out data/tok.json
    python bpe.py show "lowest newest widest" --tokenizer data/tok.json      # merge by merge
    python bpe.py tokens input.txt --tokenizer data/tok.json                 # the text, coloured by token

BPE: Sennrich, Haddow and Birch, arXiv:1508.07909; on bytes: Radford et al., "Language Models are Unsupervised
Multitask Learners" (GPT-2), 2019.
"""

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import regex

# Special tokens: in the vocabulary, but never made from ordinary text. END_OF_TEXT stands between documents.
PAD, UNKNOWN, END_OF_TEXT = "<|pad|>", "<|unk|>", "<|endoftext|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"  # the turns of a chat
SPECIAL_TOKENS = (PAD, UNKNOWN, END_OF_TEXT, SYSTEM, USER, ASSISTANT, END)

# How text is cut into pre-tokens, inside which BPE merges: as published, and the same for ASCII text as the standard
# library's re, which is twice as fast as the package regex (under re.ASCII, \s means the same six characters).
PATTERNS = {
    "gpt2": (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
    ),
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}


def texts_of(texts):
    """Strings, one after the other: a str is text, a Path is a UTF-8 file, anything else an iterable of either."""
    if isinstance(texts, str):
        yield texts
    elif isinstance(texts, Path):
        yield read_text(texts)
    else:
        for text in texts:
            yield from texts_of(text)


def read_text(path):
    """The text of a file, line ends as they are. Raises ValueError with the byte offset where it is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}: convert it to UTF-8") from error


class Tokenizer:
    """What the three kinds share. A kind has `tokens` (text or bytes of each id, specials included), `special_tokens`
    (name to id), `encode_ordinary`, `to_dict` and `from_dict`."""

    @property
    def vocab_size(self):
        """Number of ids, specials included."""
        return len(self.tokens)

    def encode(self, text, allowed_special=()):
        """The ids of text. The string of a special token becomes that token only where `allowed_special` names it
        (or is "all"); otherwise it is text like any other."""
        allowed = self.special_tokens if allowed_special == "all" else allowed_special
        if unknown := set(allowed) - self.special_tokens.keys():
            raise ValueError(f"allowed_special={sorted(unknown)} are no special tokens here: there are {sorted(self.special_tokens)}")
        if not allowed:
            return self.encode_ordinary(text)
        longest_first = sorted(allowed, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        ids = []
        for i, part in enumerate(parts):  # texts at even places, the specials between them at odd ones
            ids += [self.special_tokens[part]] if i % 2 else self.encode_ordinary(part)
        return ids

    def encode_batch(self, texts, allowed_special=()):
        """One list of ids for each text."""
        return [self.encode(text, allowed_special) for text in texts]

    def decode(self, ids):
        """The text of ids; what is not UTF-8 becomes the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):
        """The exact bytes of ids. Raises ValueError for an id outside of the vocabulary."""
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"ids from {min(ids)} to {max(ids)} but vocab_size={self.vocab_size}: use the tokenizer that made them")
        joined = [self.tokens[i] for i in ids]
        return b"".join(joined) if isinstance(self.tokens[0], bytes) else "".join(joined).encode("utf-8")

    def unknown_characters(self, text):
        """The parts of text that encode to UNKNOWN, each once, in order: none for BPE, which has every byte."""
        return []

    def save(self, path):
        """Write the tokenizer as JSON."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


class CharTokenizer(Tokenizer):
    """One token per character: the sorted characters of the training text (nanoGPT's ids), then the specials."""

    def __init__(self, characters, special_tokens=SPECIAL_TOKENS):
        self.characters = characters
        self.tokens = list(characters) + list(special_tokens)
        self.special_tokens = {name: len(characters) + i for i, name in enumerate(special_tokens)}
        self.ids = {character: i for i, character in enumerate(characters)}

    @classmethod
    def train(cls, texts, special_tokens=SPECIAL_TOKENS):
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
        return {"type": "char", "characters": self.characters, "special_tokens": list(self.special_tokens)}

    @classmethod
    def from_dict(cls, saved):
        return cls(saved["characters"], saved["special_tokens"])


class WordTokenizer(Tokenizer):
    """One token per word with the space before it, or per punctuation mark: the most frequent first, then the specials.

    Every character belongs to one token, so decoding is joining.
    """

    PATTERN = re.compile(r" ?\w+| ?[^\w\s]|\s")

    def __init__(self, words, special_tokens=SPECIAL_TOKENS):
        self.words = words
        self.tokens = list(words) + list(special_tokens)
        self.special_tokens = {name: len(words) + i for i, name in enumerate(special_tokens)}
        self.ids = {word: i for i, word in enumerate(words)}

    @classmethod
    def train(cls, texts, vocab_size=None, special_tokens=SPECIAL_TOKENS):
        """The vocab_size most frequent words, specials included (None: all of them); ties in alphabetical order."""
        counts = Counter()
        for text in texts_of(texts):
            counts.update(cls.PATTERN.findall(text))
        words = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(words if vocab_size is None else words[: vocab_size - len(special_tokens)], special_tokens)

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
    """GPT-2's way to write each of the 256 bytes as a visible character: a dict from byte to character, in GPT-2's order.

    Printable ones stand for themselves, the others for the characters from 256 on; so a space is written as Ġ.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {**{byte: chr(byte) for byte in visible}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


class BPETokenizer(Tokenizer):
    """Byte-level BPE: 256 bytes, then one token for each merge in the order of their learning, then the specials.

    Text is cut into pre-tokens by a regular expression; in each, the two neighbours whose joined bytes are the token
    with the lowest id are merged, leftmost first, until no two neighbours make a token. That is tiktoken's rule, and
    tiktoken does the work where it is installed (`fast`); the same in plain Python is `merge`.
    """

    def __init__(self, tokens, special_tokens, pattern="gpt2", fast=True):
        """tokens: bytes of every ordinary token in order of merging; they take the ids that special_tokens
        (name to id) leave free. pattern: a name in PATTERNS or a regular expression."""
        taken = {i: name.encode("utf-8") for name, i in special_tokens.items()}
        ordinary = iter(tokens)
        size = len(tokens) + len(taken)
        self.tokens = [taken[i] if i in taken else next(ordinary) for i in range(size)]
        self.special_tokens = dict(special_tokens)
        self.pattern = pattern
        self.fast = fast
        self.ranks = {token: i for i, token in enumerate(self.tokens) if i not in taken}
        self.cache = {}
        self.tiktoken = None

    def encode_ordinary(self, text):
        if self.fast:
            return self.to_tiktoken().encode_ordinary(text)
        pretokens = split_pretokens(text, self.pattern)
        for pretoken in set(pretokens) - self.cache.keys():
            self.cache[pretoken] = self.merge(pretoken.encode("utf-8"))
        return list(chain.from_iterable(map(self.cache.__getitem__, pretokens)))

    def merge(self, pretoken):
        """The ids of one pre-token (bytes)."""
        ranks = self.ranks
        if pretoken in ranks:
            return (ranks[pretoken],)
        parts = [pretoken[i : i + 1] for i in range(len(pretoken))]
        while len(parts) > 1:
            best, i = min((ranks.get(parts[i] + parts[i + 1], len(self.tokens)), i) for i in range(len(parts) - 1))
            if best == len(self.tokens):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return tuple(ranks[part] for part in parts)

    def to_tiktoken(self):
        """The same tokenizer as a tiktoken.Encoding, made once."""
        if self.tiktoken is None:
            import tiktoken

            pattern = PATTERNS[self.pattern][0] if self.pattern in PATTERNS else self.pattern
            self.tiktoken = tiktoken.Encoding(
                "glassgpt", pat_str=pattern, mergeable_ranks=self.ranks, special_tokens=self.special_tokens
            )
        return self.tiktoken

    @classmethod
    def from_gpt2(cls):
        """OpenAI's GPT-2 tokenizer, through tiktoken, which downloads its two files once."""
        import tiktoken

        try:
            encoding = tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise OSError(
                f"GPT-2's tokenizer could not be downloaded ({type(error).__name__}): connect to the network once, or set "
                "TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's copies of its two files"
            ) from error
        ranks = encoding._mergeable_ranks
        return cls(sorted(ranks, key=ranks.get), encoding._special_tokens, "gpt2")

    def to_dict(self):
        character = printable_bytes()
        written = ("".join(character[byte] for byte in token) for token in self.ranks)
        return {"type": "bpe", "pattern": self.pattern, "tokens": " ".join(written), "special_tokens": self.special_tokens}

    @classmethod
    def from_dict(cls, saved):
        byte_of = {character: byte for byte, character in printable_bytes().items()}
        tokens = [bytes(map(byte_of.__getitem__, token)) for token in saved["tokens"].split(" ")]
        return cls(tokens, saved["special_tokens"], saved["pattern"])


def split_pretokens(text, pattern):
    """The pre-tokens of text, in order; joined they are the text."""
    if pattern in PATTERNS:
        if text.isascii():
            return re.findall(PATTERNS[pattern][1], text, re.ASCII)
        pattern = PATTERNS[pattern][0]
    return regex.findall(pattern, text)


KINDS = {"char": CharTokenizer, "word": WordTokenizer, "bpe": BPETokenizer}


def load_tokenizer(saved):
    """The tokenizer of a file written by `save`, or of the dict that `to_dict` gave."""
    if not isinstance(saved, dict):
        path = Path(saved)
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer {path} does not exist: train one with python bpe.py train --input FILE --out {path}")
        saved = json.loads(read_text(path))
    kind = saved.get("type")
    if kind not in KINDS:
        raise ValueError(f"type={kind!r} of a tokenizer must be one of {sorted(KINDS)}")
    return KINDS[kind].from_dict(saved)
