"""Text to shards of tokens, data/NAME/train_000000.bin ..., and meta.json, which says what is in them.

    python prepare.py pydoc                                          # always there: no network
    python prepare.py shakespeare_char                               # one token per character
    python prepare.py shakespeare                                    # GPT-2's tokens
    python prepare.py mytext --input notes.txt more/ 'logs/*.jsonl'  # your own text: .txt .jsonl .jsonl.gz .parquet
    python prepare.py mytext --input notes.txt --tokenizer train:4096

A shard is raw little-endian uint16 (uint32 above 65,536 ids) without a header. meta.json is written last: without it
there is no dataset. A document is a .txt file, a JSON line or a table row; end-of-text stands between documents.
Fewer than 100 documents: the last tenth of the characters are validation, as in nanoGPT. More: by a hash of the
document, so that a document stays in its split when others are added.
"""

import ast
import hashlib
import inspect
import json
import os
import sys
import urllib.request
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import bpe
from config import errors_in_one_line, read_arguments

DATA = Path("data")


@dataclass
class Settings:
    name: str = ""  # the dataset: a name of the table below, or your own with --input
    input: list[str] | None = None  # files, folders or globs to read; None: what the table says
    tokenizer: str | None = None  # char | word | gpt2 | FILE of a tokenizer | train:VOCAB_SIZE; None: the table's, or gpt2
    text_key: str = "text"  # where the text stands in a JSON line or table row
    errors: str = "strict"  # strict: bytes that are not UTF-8 are an error; replace: they become the replacement character
    val_fraction: float = 0.1  # share of the text that is validation
    shard_tokens: int = 100_000_000  # tokens of one shard
    overwrite: bool = False  # make a dataset again that is there


@dataclass(frozen=True)
class Download:
    url: str
    file: str  # its name in the dataset's folder
    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Source:
    about: str  # what it is, licence
    tokenizer: str = "gpt2"
    downloads: tuple = ()
    build: object = None  # a function that gives the documents, for what needs no network


def pydoc_documents():
    """The documentation that every Python carries: help topics and the docstrings of the standard library, each once,
    one document per topic or module; only what is ASCII."""
    import pydoc_data.topics

    seen = set()
    yield from (text for name, text in sorted(pydoc_data.topics.topics.items()) if text.isascii())
    for path in standard_library():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning of old escapes
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
        docs = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node)
                if doc and doc.isascii() and doc not in seen:
                    seen.add(doc)
                    docs.append(inspect.cleandoc(doc))
        if docs:
            yield "\n\n".join(docs) + "\n"


def standard_library():
    """The source files of the standard library in alphabetical order, without its tests and installed packages."""
    root = Path(os.__file__).parent
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not left_out.intersection(path.relative_to(root).parts))


TINY_SHAKESPEARE = Download(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "input.txt",
    1_115_394,
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
SOURCES = {
    "pydoc": Source("the documentation that every Python carries", "char", build=pydoc_documents),
    "shakespeare_char": Source("Tiny Shakespeare, public domain", "char", (TINY_SHAKESPEARE,)),
    "shakespeare": Source("Tiny Shakespeare, public domain", "gpt2", (TINY_SHAKESPEARE,)),
}


@dataclass
class Dataset:
    """A dataset as open_dataset found it."""

    folder: Path
    tokenizer: object
    tokenizer_dict: dict
    meta: dict
    splits: dict  # 'train' and 'val': a list of 1-D memory maps of tokens each
    bytes_per_token: dict  # of each split, for bits per byte
    sha256: str  # of all shards together


def folder_of(name):
    """Where a dataset lies: a name with a slash is a folder itself."""
    return Path(name) if "/" in str(name) else DATA / name


def open_dataset(name):
    """The Dataset in data/NAME, checked against its meta.json. Raises FileNotFoundError where nothing is prepared and
    ValueError where the files are not what meta.json says."""
    folder = folder_of(name)
    if not (folder / "meta.json").is_file():
        raise FileNotFoundError(f"dataset {name} is not in {folder}: run python prepare.py {name}")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    splits = {}
    for split in ("train", "val"):
        splits[split] = []
        for shard in meta["splits"][split]["shards"]:
            path = folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["tokens"] * np.dtype(meta["dtype"]).itemsize:
                raise ValueError(f"{path} is not the shard of {shard['tokens']:,} tokens that meta.json names: run prepare.py again")
            splits[split].append(np.memmap(path, dtype=meta["dtype"], mode="r"))
    check_tokens(folder, splits, meta["vocab_size"])
    return Dataset(
        folder,
        bpe.load_tokenizer(meta["tokenizer"]),
        meta["tokenizer"],
        meta,
        splits,
        {split: about["bytes"] / max(1, about["tokens"]) for split, about in meta["splits"].items()},
        meta["sha256"],
    )


def check_tokens(folder, splits, vocab_size):
    """ValueError where the first million tokens of a split go beyond the vocabulary."""
    for split, shards in splits.items():
        largest = max((int(shard[:1_000_000].max()) for shard in shards[:1]), default=0)
        if largest >= vocab_size:
            raise ValueError(f"{folder} holds token {largest} in {split} but vocab_size={vocab_size}: run prepare.py again")


def download_bytes(name):
    """How many bytes prepare would download for this dataset: 0 where nothing is missing."""
    source = SOURCES.get(name)
    return sum(file.bytes for file in source.downloads if not find_input(name, file)) if source else 0


def find_input(name, file):
    """Where a file of a dataset lies already, or None."""
    shared = [DATA / "shakespeare_char" / "input.txt"] if file is TINY_SHAKESPEARE else []
    return next((path for path in [folder_of(name) / file.file, *shared] if path.is_file()), None)


def fetch(name, file):
    """The path of a dataset's file, downloaded first if it is not there."""
    if found := find_input(name, file):
        return found
    path = folder_of(name) / file.file
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {file.bytes / 1e6:.1f} MB from {file.url}")
    try:
        with urllib.request.urlopen(file.url, timeout=30) as response:
            data = response.read()
    except OSError as error:
        raise OSError(f"no network for {file.url} ({error}): put that file at {path}") from error
    if file.sha256 and hashlib.sha256(data).hexdigest() != file.sha256:
        raise ValueError(f"{file.url} is not the file it was (sha256 differs): put the right one at {path}")
    path.write_bytes(data)
    return path


def documents_of(settings):
    """The texts to prepare, one after the other."""
    if settings.input:
        paths = [Path(path) for path in settings.input]
    elif settings.name in SOURCES:
        source = SOURCES[settings.name]
        if source.build:
            yield from source.build()
            return
        paths = [fetch(settings.name, file) for file in source.downloads]
    else:
        raise ValueError(f"dataset {settings.name!r} is unknown: add --input FILE, or take one of {' '.join(sorted(SOURCES))}")
    for path in paths:
        yield bpe.read_text(path)


def make_tokenizer(settings, documents):
    choice = settings.tokenizer or (SOURCES[settings.name].tokenizer if settings.name in SOURCES else "gpt2")
    if choice == "char":
        return bpe.CharTokenizer.train(documents)
    if choice == "word":
        return bpe.WordTokenizer.train(documents)
    if choice == "gpt2":
        return bpe.BPETokenizer.from_gpt2()
    return bpe.load_tokenizer(choice)


def split_documents(documents, val_fraction):
    """{'train': texts, 'val': texts}: by characters for fewer than 100 documents, else by a hash of each."""
    splits = {"train": [], "val": []}
    if len(documents) >= 100:
        for text in documents:
            share = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:6], "big") / 2**48
            splits["val" if share < val_fraction else "train"].append(text)
        return splits
    left = int(sum(map(len, documents)) * (1 - val_fraction))
    for text in documents:
        splits["train"] += [text[:left]] if left else []
        splits["val"] += [text[left:]] if text[left:] else []
        left = max(0, left - len(text))
    return splits


def prepare(settings):
    """Make one dataset and write its meta.json; gives back its folder."""
    folder = folder_of(settings.name)
    if (folder / "meta.json").is_file() and not settings.overwrite:
        print(f"{folder} is there already: --overwrite=True makes it again")
        return folder
    documents = list(documents_of(settings))
    if not any(documents):
        raise ValueError(f"the text of {settings.name} is empty: give files with text in them")
    tokenizer = make_tokenizer(settings, documents)
    dtype = "<u2" if tokenizer.vocab_size <= 65_536 else "<u4"
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"format": 1, "kind": "text", "name": settings.name, "dtype": dtype, "vocab_size": tokenizer.vocab_size, "splits": {}}
    for split, texts in split_documents(documents, settings.val_fraction).items():
        ids = []
        for text in tqdm(texts, desc=split, leave=False, disable=not sys.stderr.isatty()):
            ids += [tokenizer.special_tokens[bpe.END_OF_TEXT]] if ids else []
            ids += tokenizer.encode(text)
        shards = []
        for start in range(0, len(ids), settings.shard_tokens):
            shard = np.array(ids[start : start + settings.shard_tokens], dtype=dtype).tobytes()
            file = f"{split}_{len(shards):06d}.bin"
            (folder / file).write_bytes(shard)
            tokens = len(shard) // np.dtype(dtype).itemsize
            shards.append({"file": file, "tokens": tokens, "sha256": hashlib.sha256(shard).hexdigest()})
        n_bytes = sum(len(text.encode("utf-8")) for text in texts)
        characters = sum(map(len, texts))
        meta["splits"][split] = {"tokens": len(ids), "documents": len(texts), "characters": characters, "bytes": n_bytes, "shards": shards}
        print(f"{split}: {len(texts):,} documents, {characters:,} characters, {len(ids):,} tokens")
    digests = [shard["sha256"] for split in meta["splits"].values() for shard in split["shards"]]
    meta["sha256"] = hashlib.sha256("".join(digests).encode()).hexdigest()
    meta["settings"] = asdict(settings)
    meta["tokenizer"] = tokenizer.to_dict()
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return folder


def main():
    given, names = read_arguments(Settings, sys.argv[1:], positional="NAME")
    if len(names) == 1:
        given["name"] = names[0]
    if len(names) > 1 or not given.get("name"):
        raise ValueError(f"names={names} must be one dataset: python prepare.py NAME, one of {' '.join(sorted(SOURCES))} or your own with --input")
    prepare(Settings(**given))


if __name__ == "__main__":
    with errors_in_one_line():
        main()
