"""Tokens on disk: shards, the meta.json beside them, and the rows that are read from them.

data/NAME/train_000000.bin, val_000000.bin ... hold raw little-endian uint16 (uint32 above 65,536
ids) without a header. meta.json describes them and holds the tokenizer. It is written last, so
without it there is no dataset. nanoGPT's train.bin and val.bin are also read, and llm.c's shards
with their header; both hold GPT-2's tokens. This file is all numpy; train.py makes tensors of it.
"""

import functools
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import bpe
from glass.files import reading, sha256_of

DATA = Path("data")
META = "meta.json"
MAKING = "making"  # the folder, inside a dataset's, of unfinished files
GPT2_VOCAB_SIZE = 50_257
LLMC_MAGIC = 20240520
LLMC_HEADER = 256  # int32 numbers: magic, version, number of tokens, then zeros


def folder_of(name):
    """The folder of a dataset. A name with a slash is a folder itself."""
    return Path(name) if "/" in str(name) else DATA / name


# Writing.


def token_dtype(vocab_size):
    """The numpy dtype of tokens on disk, as a string."""
    return "<u2" if vocab_size <= 65_536 else "<u4"


class ShardWriter:
    """Appends tokens to the shards of one split.

    `about` is a dict that describes what is written. With a saved `about`, a new writer goes on
    there.
    """

    def __init__(self, folder, split, dtype, shard_tokens, about=None):
        self.folder, self.split = folder, split
        self.itemsize, self.shard_tokens = np.dtype(dtype).itemsize, shard_tokens
        self.about = about or dict(tokens=0, documents=0, characters=0, bytes=0, shards=[])
        self.file = None
        last = self.about["shards"][-1] if self.about["shards"] else None
        if last and "sha256" not in last:  # it was still growing when `about` was saved
            self.file = open(folder / last["file"], "r+b")
            self.file.truncate(last["tokens"] * self.itemsize)  # drops what was written after that
            self.file.seek(0, os.SEEK_END)

    def append(self, tokens, documents, characters, n_bytes):
        """Append tokens, given as bytes, and count the documents, characters and bytes of text."""
        about = self.about
        begins_split = not about["tokens"]
        while tokens:
            if self.file is None:
                name = f"{self.split}_{len(about['shards']):06d}.bin"
                about["shards"].append({"file": name, "tokens": 0})
                self.file = open(self.folder / name, "wb")
            shard = about["shards"][-1]
            room = (self.shard_tokens - shard["tokens"]) * self.itemsize
            now, tokens = tokens[:room], tokens[room:]
            self.file.write(now)
            shard["tokens"] += len(now) // self.itemsize
            about["tokens"] += len(now) // self.itemsize
            if shard["tokens"] == self.shard_tokens:
                self.close_shard()
        about["documents"] += documents + begins_split
        about["characters"] += characters
        about["bytes"] += n_bytes

    def sync(self):
        """Flush the open shard to the disk."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close_shard(self):
        """Finish the open shard, if there is one, and note its sha256."""
        if self.file:
            self.sync()
            self.file.close()
            self.file = None
            shard = self.about["shards"][-1]
            shard["sha256"] = sha256_of(self.folder / shard["file"])


# Opening.


@dataclass
class Dataset:
    """A text dataset, opened."""

    folder: Path
    tokenizer: bpe.Tokenizer
    tokenizer_dict: dict
    meta: dict  # the content of meta.json
    splits: dict  # "train" and "val": a list of 1-D memory maps of tokens each
    bytes_per_token: dict  # of each split, for bits per byte
    sha256: str  # of all shards together


def open_dataset(name):
    """The Dataset in data/NAME, checked against its meta.json.

    Without a meta.json, nanoGPT's or llm.c's files are read. Raises FileNotFoundError if nothing is
    prepared, and ValueError if the files are not what meta.json says.
    """
    folder = folder_of(name)
    if not (folder / META).is_file():
        return open_foreign(name, folder)
    with reading(folder / META, f"run python prepare.py {name} again with --overwrite=True"):
        dataset = open_prepared(name, folder)
    check_tokens(dataset.splits, dataset.meta["vocab_size"])
    return dataset


def open_prepared(name, folder):
    """The Dataset in a folder with a meta.json."""
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    if meta["kind"] != "text":
        raise ValueError(
            f"dataset {name} is of kind={meta['kind']} but must be of kind=text: "
            "use it with finetune.py"
        )
    splits = {}
    bytes_per_token = {}
    for split in ("train", "val"):
        about = meta["splits"][split]
        paths = [(folder / shard["file"], shard["tokens"]) for shard in about["shards"]]
        splits[split] = [map_own_shard(path, tokens, meta["dtype"]) for path, tokens in paths]
        n_tokens = sum(map(len, splits[split]))
        if n_tokens and not 0 < about["bytes"] < math.inf:
            raise ValueError(f"{split} has {n_tokens:,} tokens of {about['bytes']} bytes")
        bytes_per_token[split] = about["bytes"] / max(1, n_tokens)
    tokenizer = bpe.load_tokenizer(meta["tokenizer"])
    if tokenizer.vocab_size != meta["vocab_size"]:
        raise ValueError(
            f"vocab_size={meta['vocab_size']} but the tokenizer has {tokenizer.vocab_size} ids"
        )
    return Dataset(
        folder, tokenizer, meta["tokenizer"], meta, splits, bytes_per_token, sha256=meta["sha256"]
    )


def map_own_shard(path, tokens, dtype):
    """A memory map of a shard: (tokens,). Raises ValueError if it has another number of tokens."""
    needed = tokens * np.dtype(dtype).itemsize
    n_bytes = path.stat().st_size if path.is_file() else 0
    if n_bytes != needed or not path.is_file():
        raise ValueError(f"{path} has {n_bytes:,} bytes, {META} says {needed:,}: prepare it again")
    return np.memmap(path, dtype, "r")


def open_foreign(name, folder):
    """The Dataset of nanoGPT's or llm.c's files, read as GPT-2's tokens.

    nanoGPT's are train.bin and val.bin, llm.c's *train*.bin and *val*.bin.
    """
    paths = {split: sorted(folder.glob(f"*{split}*.bin")) for split in ("train", "val")}
    all_paths = paths["train"] + paths["val"]
    is_llmc = paths["train"] and all(map(has_header, all_paths))
    is_nanogpt = all_paths == [folder / "train.bin", folder / "val.bin"]
    if (folder / "meta.pkl").is_file():
        raise ValueError(
            f"{folder}/meta.pkl can run code, so it is not read: "
            f"remove it and run python prepare.py {name}"
        )
    if (folder / MAKING).is_dir() or not (is_llmc or is_nanogpt):
        raise FileNotFoundError(
            f"dataset {name} is not prepared in {folder}: "
            f"run python prepare.py {name}, with --input FILE if it is your own text"
        )
    print(f"{folder} has no {META}: its tokens are taken to be GPT-2's")
    splits = {split: [map_foreign_shard(path) for path in found] for split, found in paths.items()}
    check_tokens(splits, GPT2_VOCAB_SIZE)
    tokenizer = bpe.BPETokenizer.from_gpt2()
    bytes_per_token = {}
    for split, shards in splits.items():
        ids = shards[0][:100_000] if shards else []
        bytes_per_token[split] = len(tokenizer.decode_bytes(ids)) / max(1, len(ids))
    sizes = {path.name: path.stat().st_size for path in all_paths}
    digest = hashlib.sha256(json.dumps(sizes).encode())
    for shard in splits["train"] + splits["val"]:
        digest.update(shard[:1_000_000].tobytes())
    meta = dict(kind="text", name=str(name), dtype="<u2", vocab_size=GPT2_VOCAB_SIZE, files=sizes)
    return Dataset(
        folder,
        tokenizer,
        tokenizer.to_dict(),
        meta,
        splits,
        bytes_per_token,
        sha256=digest.hexdigest(),
    )


def has_header(path):
    """Whether a file begins with llm.c's magic number."""
    with open(path, "rb") as file:
        return file.read(4) == np.array([LLMC_MAGIC], "<i4").tobytes()


def map_foreign_shard(path):
    """A memory map of the tokens in a file of nanoGPT or llm.c: (tokens,) uint16.

    Raises ValueError for a header or a size that does not fit.
    """
    n_bytes = path.stat().st_size
    if n_bytes == 0 or n_bytes % 2:
        raise ValueError(
            f"{path} has {n_bytes:,} bytes, but two are needed for each token: make it again"
        )
    if not has_header(path):
        return np.memmap(path, "<u2", "r")
    _, version, tokens = np.fromfile(path, "<i4", 3).tolist()
    if version != 1 or n_bytes != LLMC_HEADER * 4 + tokens * 2:
        raise ValueError(
            f"{path} has version={version} and {n_bytes:,} bytes for {tokens:,} tokens, but needs "
            "version=1, a header of 1,024 bytes and two bytes per token: download it again"
        )
    return np.memmap(path, "<u2", "r", offset=LLMC_HEADER * 4)


def check_tokens(splits, vocab_size):
    """Raise ValueError if the first million tokens of a shard hold one outside the vocabulary."""
    for shard in splits["train"] + splits["val"]:
        largest = int(shard[:1_000_000].max()) if len(shard) else 0
        if largest >= vocab_size:
            raise ValueError(
                f"{shard.filename} holds token {largest} but vocab_size={vocab_size}: "
                "run prepare.py again with --overwrite=True"
            )


# Reading.


class Windows:
    """The training split as an endless list of rows of block_size + 1 tokens.

    Row r depends on the seed and r alone. An epoch goes through the shards in a seeded order, and
    through the windows of each shard in a seeded order, without replacement. In each epoch, the
    orders differ and each shard has its own offset, so windows are cut at other places.
    """

    def __init__(self, shards, block_size, seed):
        self.T, self.seed = block_size, seed
        self.shards = [shard for shard in shards if len(shard) > block_size]
        self.n_left_out = len(shards) - len(self.shards)
        self.offsets = np.cumsum([0, *map(len, self.shards)])  # where each begins in text()
        # One window fewer than fits, so that every offset below block_size leaves room for all.
        self.counts = [max(1, len(shard) // block_size - 1) for shard in self.shards]
        self.epoch_rows = sum(self.counts)
        if not self.epoch_rows:
            longest = max((len(shard) for shard in shards), default=0)
            raise ValueError(
                f"block_size={block_size} needs {block_size + 1} tokens of training text in a row, and the "
                f"longest shard has {longest}: lower block_size or add text"
            )

    @functools.lru_cache(maxsize=4)  # noqa: B019 (one object per run)
    def order(self, epoch):
        """(shards, begins) of an epoch: the order of the shards, and the row where each begins.

        begins has one entry more, the row where the last shard ends.
        """
        shards = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))
        return shards, np.cumsum([0, *(self.counts[s] for s in shards)])

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def starts(self, epoch, shard):
        """The index of the first token of each window of a shard, in the order of that epoch."""
        T, count = self.T, self.counts[shard]
        random = np.random.default_rng((self.seed, epoch, shard))
        offset = random.integers(min(T, len(self.shards[shard]) - count * T))
        return offset + T * random.permutation(count)

    def text(self):
        """All tokens that the rows are cut from, as one array: (N,) int64."""
        return np.concatenate(self.shards).astype(np.int64)

    def places(self, first, count):
        """Where in text() the rows from `first` on begin: (count,) int64."""
        cuts = self.cuts(first, count)
        return np.concatenate([self.offsets[shard] + starts for shard, starts in cuts])

    def rows(self, first, count):
        """The rows from `first` on: (count, T + 1) int64. Inputs are [:, :-1], targets [:, 1:]."""
        pieces = [
            self.shards[shard][starts[:, None] + np.arange(self.T + 1)]
            for shard, starts in self.cuts(first, count)
        ]
        return np.concatenate(pieces).astype(np.int64)

    def cuts(self, first, count):
        """Where `count` rows are cut: pairs of a shard's number and indices of first tokens."""
        while count:
            epoch, row = divmod(first, self.epoch_rows)
            shards, begins = self.order(epoch)
            place = int(np.searchsorted(begins, row, side="right")) - 1
            shard = int(shards[place])
            starts = self.starts(epoch, shard)[row - begins[place] :][:count]
            yield shard, starts
            first, count = first + len(starts), count - len(starts)


def evaluation_batches(shards, block_size, batch_size, n_batches=None):
    """Yield (idx, targets), each (batch_size, T) int64, over a split; T is block_size.

    Window i of a shard is its tokens iT to iT + T, so every token but a shard's first is scored
    once. The last window may be shorter and the last batch smaller; what is missing has targets of
    -100. n_batches: how many batches, evenly spaced; None takes all.
    """
    starts = [(shard, start) for shard in shards for start in range(0, len(shard) - 1, block_size)]
    batches = [starts[i : i + batch_size] for i in range(0, len(starts), batch_size)]
    if n_batches is not None and n_batches < len(batches):
        batches = [batches[i * len(batches) // n_batches] for i in range(n_batches)]
    for batch in batches:
        idx = np.zeros((batch_size, block_size), np.int64)
        targets = np.full((batch_size, block_size), -100, np.int64)
        for row, (shard, start) in enumerate(batch):
            tokens = shard[start : start + block_size + 1].astype(np.int64)
            length = len(tokens) - 1
            idx[row, :length] = tokens[:-1]
            targets[row, :length] = tokens[1:]
        yield idx, targets
