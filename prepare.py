"""Turn text into shards of tokens: data/NAME/train_000000.bin ..., and a meta.json about them.

    python prepare.py pydoc                                          # needs no network
    python prepare.py shakespeare_char                               # one token per character
    python prepare.py mytext --input notes.txt more/ 'logs/*.jsonl'  # your own text
    python prepare.py mytext --input notes.txt --tokenizer train:4096
    python prepare.py web --input 'web/*.parquet' --part=3/16        # on a host; at last: --join

It reads .txt, .md, .jsonl, .jsonl.gz and .parquet. A document is a text file, a JSON line or a
table row; end-of-text stands between documents. If there are fewer than 100 documents, the last
tenth of the characters is for validation, as in nanoGPT. If there are 100 or more, a hash of each
document decides, so a document stays in its split when others are added.

A shard is raw little-endian uint16 (uint32 above 65,536 ids) without a header. meta.json is written
last; without it there is no dataset. Text of any size is read as a stream of pieces. Worker
processes tokenize, and this process writes. progress.json says how many pieces are done, so an
interrupted run continues there and ends with the same bytes.
"""

import codecs
import errno
import functools
import glob
import gzip
import hashlib
import itertools
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import bpe
from glass import parts
from glass.files import lock, read_object, reading, write_json
from glass.settings import check_type, errors_in_one_line, read_arguments
from glass.shards import MAKING, META, ShardWriter, folder_of, token_dtype
from glass.sources import SOURCES, fetch, find_file, parse_json

PIECE = 100_000  # characters that one call of a tokenizer gets
BATCH = 500_000  # characters that one call of a worker gets
BLOCK = 1 << 18  # bytes read from a file at a time
LONGEST_LINE = 1 << 28  # bytes of a JSON line, which is read whole
OTHER_FORMATS = {b"\x1f\x8b": "gzip", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
OTHER_FORMATS |= {b"PK": "a zip archive, as .docx and .xlsx are", b"%P": "a PDF"}  # they begin so
SAVE_SECONDS = 2.0  # between two writes of the progress
PROGRESS = "progress.json"  # how far an interrupted run got
TRAINED_ON = 100_000_000  # a tokenizer is trained on this many characters of a long text


@dataclass
class Settings:
    name: str = ""  # the dataset: one of the table in sources.py, or your own with --input
    input: list[str] | None = None  # files, folders or globs to read; None: what the table says
    tokenizer: str | None = None  # char | word | gpt2 | FILE | train:SIZE; None: the table's
    text_key: str = "text"  # the key of the text in a JSON line or table row
    errors: str = "strict"  # for bytes that are not UTF-8; strict: an error; replace: U+FFFD
    val_fraction: float | None = None  # share of validation text; None: the table's, or 0.1
    shard_tokens: int = 100_000_000  # tokens per shard
    workers: int | None = None  # processes that tokenize; None: one per core
    overwrite: bool = False  # make a dataset again that is there already
    objects: int | None = None  # of docs: functions and classes; None: 2,000; -N: the last N
    allow_unknown: bool = False  # even if a given tokenizer does not know a tenth of the text
    part: str | None = None  # 3/16: only the third of sixteen parts of the files, counted from 1
    join: bool = False  # make one dataset of all its parts

    def __post_init__(self):
        """Fill in what is None from the table. Raises ValueError for impossible settings."""
        if not self.name:
            raise ValueError(
                "no dataset is named: "
                f"add one of {' '.join(SOURCES)}, or any name with --input FILE"
            )
        if self.name not in SOURCES and not self.input and not self.join:
            raise ValueError(
                f"dataset {self.name!r} is unknown: "
                f"add --input FILE, or choose one of {' '.join(SOURCES)}"
            )
        source = SOURCES.get(self.name)
        if self.input and source and source.records and not source.downloads:
            raise ValueError(
                f"dataset {self.name} is generated, so it reads no --input: leave that out"
            )
        if self.part is not None:
            parts.parse_part(self.part)
            if not self.input or (self.tokenizer or "").split(":")[0] in ("char", "word", "train"):
                raise ValueError(
                    f"part={self.part} needs --input, and a tokenizer that is there already, gpt2 "
                    "or a FILE that python bpe.py train made: each part knows its own text only"
                )
        if self.objects is not None and (self.name != "docs" or not self.objects):
            raise ValueError(
                f"objects={self.objects} is for python prepare.py docs, and not 0: leave it out"
            )
        if self.input and source and source.kind == "choices":
            raise ValueError(
                f"{self.name} is downloaded for evaluate.py, which reads files of your own too: "
                f"python evaluate.py --items {self.input[0]}"
            )
        if source and (source.records or source.kind == "choices"):
            for name in ("tokenizer", "val_fraction"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)} would do nothing to {self.name}, which has "
                        "rows with splits of their own and no tokens: leave it out"
                    )
        if not self.tokenizer:
            self.tokenizer = source.tokenizer if source else "gpt2"
        if self.val_fraction is None:
            self.val_fraction = source.val_fraction if source else 0.1
        if self.errors not in ("strict", "replace"):
            raise ValueError(f"errors={self.errors!r} must be strict or replace")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must be at least 0 and below 1")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens={self.shard_tokens} must be at least 1")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1")


# Reading. Files give documents, and a document is an iterable of pieces that a tokenizer can take.


def input_files(settings):
    """The files to read, as a list, in order.

    A folder stands for the text files in it. Without --input, downloads what the table names.
    Raises FileNotFoundError or ValueError if there is nothing to read.
    """
    if settings.input is None:
        folder = folder_of(settings.name)
        downloads = SOURCES[settings.name].downloads
        missing = [file for file in downloads if not find_file(folder, file)]
        if missing:
            megabytes = sum(file.bytes for file in missing) / 1e6
            print(f"downloading {SOURCES[settings.name].about}, about {megabytes:,.1f} MB")
        return [find_file(folder, file) or fetch(folder, file) for file in downloads]
    files = []
    for name in settings.input:
        if Path(name).exists():
            found = [Path(name)]
        else:
            found = sorted(map(Path, glob.glob(name, recursive=True)))
        if not found:
            raise FileNotFoundError(f"input={name!r} is not there: give a file, a folder or a glob")
        for path in found:
            if path.is_dir():
                inside = sorted(path.rglob("*"))
                files += [file for file in inside if suffix_of(file) and not file.is_dir()]
            else:
                files.append(path)
    files = list({os.path.realpath(path): path for path in files}.values())  # each once
    for path in files:
        check_type("--input", str(path), str)
        if path.exists() and not path.is_file():
            raise ValueError(
                f"{path} is a pipe or a device, and text is read more than once: "
                "save it to a file, or leave it out"
            )
    if not files:
        raise ValueError(
            f"{' '.join(settings.input)} holds no file that ends in {' '.join(READERS)}: "
            "give another"
        )
    return files


def read_documents(path, settings):
    """The documents of a file, as an iterable.

    The pieces of one document must be read before the next document is taken.
    """
    with reading(path, "replace it, or leave it out"):
        yield from READERS[suffix_of(path) or ".txt"](path, settings)


def suffix_of(path):
    """The key of READERS that a file's name ends in, or None."""
    name = path.name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def read_txt(path, settings):
    """Yield the only document of a text file."""
    yield pieces_of_file(path, settings.errors)


def pieces_of_file(path, errors):
    """Yield the text of a file in the same pieces as if all of it were in memory."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)  # without a BOM
    rest, done = "", 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            try:
                rest += decoder.decode(block)
            except UnicodeDecodeError as error:
                raise not_utf8(path, f"byte {done + error.start:,}") from None
            done = file.tell() - len(decoder.getstate()[0])
            used = 0
            for piece in bpe.pieces_of(rest, PIECE):
                if len(rest) - used < PIECE + bpe.LONGEST_PIECE:
                    break  # the cut may depend on what follows
                yield piece
                used += len(piece)
            rest = rest[used:]
    try:
        rest += decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise not_utf8(path, f"byte {done:,}") from None
    yield from bpe.pieces_of(rest, PIECE)


def not_utf8(path, where):
    """A ValueError for a file that is not UTF-8 at a place."""
    with open(path, "rb") as file:
        if other := OTHER_FORMATS.get(file.read(2)):
            return ValueError(f"{path} is {other}: convert it to plain text in UTF-8")
    return ValueError(
        f"{path} is not UTF-8 at {where}: convert it to UTF-8, "
        "or let prepare.py --errors=replace take it as it is"
    )


def read_jsonl(path, settings):
    """Yield the text of each JSON line, in pieces. Raises ValueError, with the line, for others."""
    key = settings.text_key
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        lines = iter(lambda: file.readline(LONGEST_LINE + 1), b"")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if len(line) > LONGEST_LINE:
                raise ValueError(
                    f"{path} line {number} has more than {LONGEST_LINE:,} bytes: "
                    "spread its text over more lines"
                )
            try:
                text = line.decode("utf-8-sig", settings.errors)  # an editor may begin with a BOM
            except UnicodeDecodeError:
                raise not_utf8(path, f"line {number}") from None
            record = parse_json(text, f"{path} line {number}", dict)
            if key in record and not isinstance(record[key], str):
                raise ValueError(
                    f"{path} line {number}: {key}={record[key]!r:.40} must be a text: correct it"
                )
            if key not in record:
                raise ValueError(
                    f"{path} line {number} has no text under {key!r}, only {sorted(record)}: "
                    "name the key with --text_key"
                )
            yield bpe.pieces_of(record[key], PIECE)


def read_parquet(path, settings):
    """Yield the text of each row of a table, in pieces."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} needs the package pyarrow: pip install pyarrow") from None
    key = settings.text_key
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as table:
        columns = table.schema_arrow.names
        if key not in columns:
            raise ValueError(
                f"{path} has no column {key!r}, only {columns}: name the column with --text_key"
            )
        for rows in table.iter_batches(batch_size=256, columns=[key], use_threads=False):
            for text in rows.column(0).to_pylist():
                if not isinstance(text, str | None):
                    raise ValueError(
                        f"{path}: {key} holds {text!r:.40}, but must hold texts: "
                        "name another column with --text_key"
                    )
                yield bpe.pieces_of(text or "", PIECE)


READERS = {
    ".txt": read_txt,
    ".md": read_txt,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".parquet": read_parquet,
}


def all_documents(settings, files):
    """Yield every document of the dataset, as an iterable of pieces."""
    if settings.input is None and SOURCES[settings.name].documents:
        for text in generated_documents(settings.name):
            yield bpe.pieces_of(text, PIECE)
    for path in files:
        yield from read_documents(path, settings)


@functools.cache
def generated_documents(name):
    """The documents of a generated dataset, as a list. Kept, because they are read repeatedly."""
    return list(SOURCES[name].documents())


# Splitting, and the batches for the workers.


def train_characters(settings, files):
    """How many characters are for training, or None if there are 100 documents or more.

    Raises ValueError if there is no text.
    """
    characters = documents = 0
    for document in all_documents(settings, files):
        length = sum(map(len, document))
        characters += length
        documents += length > 0
        if documents == 100:
            return None
    if not characters:
        names = " ".join(map(str, files))
        raise ValueError(
            f"the text of {settings.name} is empty ({names}): give files that hold text"
        )
    return int(characters * (1 - settings.val_fraction))


def split_pieces(settings, files, left):
    """Yield (split, text, begins) for each piece, in order.

    begins: whether a document begins here that is not the first of its split, so that end-of-text
    comes before it. left: what train_characters gave. If that is None, the hash of a document's
    first piece decides on its split.
    """
    begun = {"train": False, "val": False}
    for document in all_documents(settings, files):
        in_document = set()
        by_hash = None
        for piece in document:
            if left is None:
                if by_hash is None:
                    by_hash = "val" if hash_share(piece) < settings.val_fraction else "train"
                parts = [(by_hash, piece)]
            else:
                parts = [("train", piece[:left]), ("val", piece[left:])]
                left = max(0, left - len(piece))
            for split, text in parts:
                if text:
                    yield split, text, begun[split] and split not in in_document
                    in_document.add(split)
                    begun[split] = True


def hash_share(text):
    """A number from 0 to 1 that depends on the text alone."""
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def batches_of(pieces):
    """Yield lists of pieces that have BATCH characters, or a little more, together."""
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[1])
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


WORKER = {}  # in a worker process: its tokenizer and dtype


def start_worker(tokenizer, dtype):
    """Keep what the worker needs for every batch."""
    WORKER.update(tokenizer=tokenizer, dtype=dtype)


def encode_batch(batch):
    """The tokens and counts of a batch of pieces, a dict by split.

    An entry is (tokens as bytes, documents begun, characters, bytes of text).
    """
    tokenizer, dtype = WORKER["tokenizer"], WORKER["dtype"]
    end_of_text = np.array([tokenizer.special_tokens[bpe.END_OF_TEXT]], dtype)
    results = {}
    for split, text, begins in batch:
        tokens, documents, characters, n_bytes = results.get(split, ([], 0, 0, 0))
        if begins:
            tokens.append(end_of_text)
        tokens.append(encode_to_array(tokenizer, text).astype(dtype))
        n_bytes += len(text.encode("utf-8"))
        results[split] = (tokens, documents + begins, characters + len(text), n_bytes)
    encoded = {}
    for split, (tokens, *counts) in results.items():
        encoded[split] = (np.concatenate(tokens).tobytes(), *counts)
    return encoded


def encode_to_array(tokenizer, text):
    """tokenizer.encode(text) as an array: (tokens,) uint32.

    tiktoken makes the array directly, without a list of Python ints.
    """
    is_fast = isinstance(tokenizer, bpe.BPETokenizer) and tokenizer.fast
    if is_fast and len(text) <= bpe.LONGEST_PIECE:
        return tokenizer.to_tiktoken().encode_to_numpy(text, disallowed_special=())
    return np.array(tokenizer.encode(text), np.uint32)


# Preparing.


def prepare(settings):
    """Make one dataset and give back its folder. A dataset that is there already is left alone.

    New files are made in a folder inside. They replace the old ones when all of them are whole.
    """
    folder, source = folder_of(settings.name), SOURCES.get(settings.name)
    if settings.part:
        folder = parts.part_folder(settings.name, *parts.parse_part(settings.part))
    if source and source.kind == "choices":
        for path in input_files(settings):
            print(f"{path}: for evaluate.py --items {settings.name}")
        return folder
    if is_prepared(folder, settings):
        return folder
    check_foreign(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder, str(folder))
    try:
        if is_prepared(folder, settings):  # by another process, while this one waited for the lock
            return folder
        check_making(folder / MAKING)
        files = input_files(settings)
        check_inputs(folder, files)
        (folder / MAKING).mkdir(exist_ok=True)
        if settings.part:
            digest = parts.listing(files)
            files = parts.files_of(files, *parts.parse_part(settings.part))
            meta = prepare_text(settings, files, folder / MAKING) | {"listing": digest}
        elif source and source.records:
            meta = prepare_records(settings, source, files)
        else:
            meta = prepare_text(settings, files, folder / MAKING)
        replace_files(folder, meta)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise OSError(
            f"no space is left for {folder}: free some and run the same command again, it continues"
        ) from error
    finally:
        held.release()
    print_splits(meta)
    return folder


def print_splits(meta):
    """Print what each split of a dataset holds."""
    for split, about in meta["splits"].items():
        counts = (f"{value:,} {key}" for key, value in about.items() if key != "shards")
        print(f"{split}: {', '.join(counts)}")


def join_parts(settings):
    """Make one dataset of the parts in its folder, and give back the folder."""
    folder = folder_of(settings.name)
    if is_prepared(folder, settings):
        return folder
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there: make its parts with --part=1/N ..., then join")
    held = lock(folder, str(folder))
    try:
        print_splits(parts.join(settings.name))
    finally:
        held.release()
    return folder


def is_prepared(folder, settings):
    """Whether the dataset is there, and is to stay; says so.

    Raises ValueError if it was made of another text, or otherwise, than the settings say.
    """
    if not (folder / META).is_file() or settings.overwrite:
        return False
    made = read_object(folder / META).get("source")
    if isinstance(made, dict) and not settings.join:
        for name in ("input", "tokenizer", "text_key", "val_fraction"):
            if made.get(name, getattr(settings, name)) != getattr(settings, name):
                raise ValueError(
                    f"{folder} is there already, made with {name}={made[name]!r:.100}, not "
                    f"{getattr(settings, name)!r:.100}: choose another name, or add --overwrite=True"
                )
    print(f"{folder} is prepared already: --overwrite=True makes it again")
    return True


def check_making(making):
    """Raise ValueError if the folder of unfinished files is none of ours, or holds others' files.

    What is in it is removed, or becomes part of the dataset.
    """
    if not making.exists() and not making.is_symlink():
        return
    if making.is_symlink() or not making.is_dir():
        raise ValueError(f"{making} is no folder that prepare.py made: move it away")
    own = {*made_files(making), making / PROGRESS, making / f"{PROGRESS}.part"}
    if others := sorted(set(making.iterdir()) - own):
        raise ValueError(
            f"{making} holds {others[0].name}, which prepare.py did not make: move it away"
        )


def made_files(folder):
    """The files of the folder that have a name of a dataset's file, as a list of paths."""
    patterns = ("train_*.bin", "val_*.bin", "train.jsonl", "val.jsonl", "test.jsonl")
    return [path for pattern in patterns for path in folder.glob(pattern)]


def check_foreign(folder, settings):
    """Raise ValueError if the folder holds another program's shards and overwrite is not set."""
    is_ours = any((folder / name).exists() for name in (META, MAKING, PROGRESS))
    if settings.overwrite or is_ours or not made_files(folder):
        return
    raise ValueError(
        f"{folder} holds {made_files(folder)[0].name}, which prepare.py did not make: "
        "choose another name, or let --overwrite=True replace it"
    )


def check_inputs(folder, files):
    """Raise ValueError if an input is a file that preparing replaces or removes."""
    taken = {*made_files(folder), *(folder / MAKING).glob("*"), folder / META}
    taken = {os.path.realpath(path) for path in taken}  # resolve() raises for a link to itself
    for path in files:
        if os.path.realpath(path) in taken:
            raise ValueError(
                f"--input {path} has the name of a file that preparing replaces: "
                "move it elsewhere, or choose another name for the dataset"
            )


def old_files(folder):
    """The files of the dataset that is there, as its meta.json names them: a list of paths."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["kind"] == "text":
            shards = [shard for about in meta["splits"].values() for shard in about["shards"]]
            names = [shard["file"] for shard in shards]
        else:
            names = [f"{split}.jsonl" for split in meta["splits"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none there, or torn
        names = []
    return [path for path in made_files(folder) if path.name in names]


def replace_files(folder, meta):
    """Put the new files in place of the old ones. meta.json comes last, in case of interruption."""
    making = folder / MAKING
    (making / PROGRESS).unlink(missing_ok=True)  # no longer true once files are moved
    old = old_files(folder)
    (folder / META).unlink(missing_ok=True)
    for path in old:
        path.unlink()
    for new in making.iterdir():
        new.replace(folder / new.name)
    write_json(folder / META, meta)
    (folder / PROGRESS).unlink(missing_ok=True)  # an earlier version kept it here
    making.rmdir()


def prepare_text(settings, files, making):
    """Write the shards of a text dataset, and give back the content of its meta.json, a dict.

    They go to the folder `making`. Continues where an interrupted run stopped.
    """
    progress = start_progress(settings, files, making)
    tokenizer = bpe.load_tokenizer(progress["tokenizer"])
    dtype = token_dtype(tokenizer.vocab_size)
    if dtype == "<u4":
        print(f"vocab_size={tokenizer.vocab_size} exceeds 65,536: tokens are written as uint32")
    writers = {}
    for split in ("train", "val"):
        about = progress["splits"].get(split)
        writers[split] = ShardWriter(making, split, dtype, settings.shard_tokens, about)
    write_shards(settings, files, progress, writers, (tokenizer, dtype), making)
    if stats_of(files) != progress["identity"]["files"]:
        raise ValueError(
            f"a file of {' '.join(map(str, files))} changed while it was read: "
            "run the same command again"
        )
    splits = {split: writer.about for split, writer in writers.items()}
    check_unknown(settings, tokenizer, making, splits, dtype)
    digests = [shard["sha256"] for about in splits.values() for shard in about["shards"]]
    is_named = settings.name in SOURCES and settings.input is None
    about = SOURCES[settings.name].about if is_named else "own text"
    return {
        "format": 1,
        "kind": "text",
        "name": settings.name,
        "source": {"about": about, **progress["identity"]},
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "splits": splits,
        "sha256": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "tokenizer": tokenizer.to_dict(),
    }


def check_unknown(settings, tokenizer, making, splits, dtype):
    """Print how many tokens of the text a given tokenizer does not know.

    Raises ValueError if it is more than a tenth, unless settings.allow_unknown is set.
    """
    unknown_id = tokenizer.special_tokens.get(bpe.UNKNOWN)
    tokens = sum(about["tokens"] for about in splits.values())
    if unknown_id is None or not Path(settings.tokenizer).is_file():
        return  # a tokenizer that was trained on this text knows all of it
    paths = [making / shard["file"] for about in splits.values() for shard in about["shards"]]
    unknown = sum(int((np.fromfile(path, dtype) == unknown_id).sum()) for path in paths)
    print(f"{unknown:,} of {tokens:,} tokens are unknown to {settings.tokenizer}")
    if unknown > tokens / 10 and not settings.allow_unknown:
        raise ValueError(
            f"tokenizer={settings.tokenizer} does not know {unknown / tokens:.0%} of the text: "
            "train one on it, or give --allow_unknown=True"
        )


def write_shards(settings, files, progress, writers, worker, making):
    """Tokenize the rest of the text. The workers tokenize; this process reads, writes and saves."""
    todo = batches_of(split_pieces(settings, files, progress["left"]))
    todo = itertools.islice(todo, progress["batches"], None)
    first = list(itertools.islice(todo, 2))
    if len(first) < 2:  # starting processes would take longer
        n_workers = 1
    else:
        n_workers = settings.workers or os.cpu_count()
    todo = itertools.chain(first, todo)
    results = bpe.map_in_processes(encode_batch, todo, n_workers, start_worker, worker)
    done = sum(writer.about["bytes"] for writer in writers.values())
    plain = [path for path in files if not path.name.endswith((".gz", ".parquet"))]
    total = sum(path.stat().st_size for path in plain) or None
    saved_at = time.monotonic()
    from tqdm import tqdm

    options = dict(unit="B", unit_scale=True, disable=None, desc=settings.name)
    with tqdm(total=total, initial=done, **options) as bar:
        for result in results:
            for split, encoded in result.items():
                writers[split].append(*encoded)
                bar.update(encoded[-1])
            progress["batches"] += 1
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save_progress(making, progress, writers)
                saved_at = time.monotonic()
    for writer in writers.values():
        writer.close_shard()


def stats_of(files):
    """What shows whether files have changed: a list of [name, bytes, time] of each."""
    stats = [(path, path.stat()) for path in files]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def start_progress(settings, files, making):
    """How far an interrupted run of the same settings and files got, or the start of a new one.

    Gives a dict with the keys identity, batches, left, splits and tokenizer.
    """
    identity = asdict(settings)
    del identity["workers"], identity["overwrite"]
    identity["files"] = stats_of(files)
    if progress := read_progress(making, identity):
        return progress
    for old in making.iterdir():
        old.unlink()
    left = None if settings.part else train_characters(settings, files)
    tokenizer = make_tokenizer(settings, files)
    progress = {"identity": identity, "batches": 0, "left": left, "splits": {}}
    return progress | {"tokenizer": tokenizer.to_dict()}


def read_progress(folder, identity):
    """What `save_progress` wrote for the same settings and files, or None."""
    path = folder / PROGRESS
    if not path.is_file():
        return None
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
        is_same = progress["identity"] == identity
        tokens = sum(about["tokens"] for about in progress["splits"].values())
    except (ValueError, TypeError, KeyError, AttributeError):  # torn, or not ours
        return None
    if not is_same:
        return None
    print(f"continuing after {tokens:,} tokens")
    return progress


def save_progress(folder, progress, writers):
    """Flush the shards to the disk, then note how far they are."""
    for split, writer in writers.items():
        writer.sync()
        progress["splits"][split] = writer.about
    write_json(folder / PROGRESS, progress)


def make_tokenizer(settings, files):
    """The tokenizer that settings.tokenizer names, trained on the text if it has to be."""
    choice = settings.tokenizer
    if choice == "gpt2":
        return bpe.BPETokenizer.from_gpt2()
    texts = (piece for document in all_documents(settings, files) for piece in document)
    if choice == "char":
        return bpe.CharTokenizer.train(texts)
    if choice == "word":
        return bpe.WordTokenizer.train(texts)
    if choice.startswith("train:"):
        if not choice[6:].isdecimal():
            raise ValueError(f"tokenizer={choice} must end in a vocabulary size: train:4096")
        beginning = itertools.islice(texts, TRAINED_ON // PIECE)
        size = int(choice[6:])
        return bpe.BPETokenizer.train(beginning, size, processes=settings.workers, progress=True)
    if not os.path.isfile(choice):  # unlike Path's, false for a name that is too long
        raise FileNotFoundError(
            f"tokenizer={choice} is not there: use char, word, gpt2, train:4096 or a file"
        )
    tokenizer = bpe.load_tokenizer(choice)
    is_bytes = isinstance(tokenizer, bpe.BPETokenizer)
    needed = {bpe.END_OF_TEXT} if is_bytes else {bpe.END_OF_TEXT, bpe.UNKNOWN}
    if missing := " ".join(sorted(needed - tokenizer.special_tokens.keys())):
        raise ValueError(
            f"tokenizer={choice} has no special token {missing}, which stands in a dataset: "
            "train one with python bpe.py train"
        )
    return tokenizer


def prepare_records(settings, source, files):
    """Write {train,val,test}.jsonl of supervised data, and give back the content of its meta.json.

    A record may name its split; for others, a hash of the text decides: 80% train, 10% val, 10%
    test. A text that occurs twice is kept once, so no two splits share it.
    """
    making, records = folder_of(settings.name) / MAKING, {}
    if files:
        found = itertools.chain.from_iterable(map(source.records, files))
    else:
        found = source.records(settings.objects) if settings.objects else source.records()
    for record in found:
        asked = [record[key] for key in ("text", "prompt", "instruction", "input") if key in record]
        asked += [message["content"] for message in record.get("messages", [])]
        normalised = " ".join("\n".join(asked).lower().split())
        records.setdefault(normalised, record)
    splits = {"train": [], "val": [], "test": []}
    for text, record in records.items():
        share = hash_share(text)
        if share < 0.1:
            split = "test"
        elif share < 0.2:
            split = "val"
        else:
            split = "train"
        splits[record.pop("split", split)].append(record)
    for split, chosen in splits.items():
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in chosen)
        (making / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    about = {split: {"records": len(chosen)} for split, chosen in splits.items()}
    return {
        "format": 1,
        "kind": source.kind,
        "name": settings.name,
        "source": source.about,
        "objects": settings.objects,
        "splits": about,
    }


def download_bytes(name):
    """How many bytes `prepare` would download for a dataset; 0 if nothing is missing."""
    downloads = SOURCES[name].downloads if name in SOURCES else ()
    return sum(file.bytes for file in downloads if not find_file(folder_of(name), file))


def main(argv):
    """Prepare the dataset that the command line names."""
    arguments = read_arguments(Settings, argv, positional="NAME")
    names = arguments.names
    if len(names) > 1:
        raise ValueError(
            f"{' '.join(names)} are {len(names)} datasets: prepare one at a time, and name files of "
            "text behind --input"
        )
    given = dict(arguments.given)
    if names and given.get("name", names[0]) != names[0]:
        raise ValueError(f"name={given['name']} and {names[0]} are two names: leave one out")
    if names:
        given["name"] = names[0]
    settings = Settings(**given)
    if settings.join:
        join_parts(settings)
    else:
        prepare(settings)


if __name__ == "__main__":
    with errors_in_one_line():
        main(sys.argv[1:])
