"""The named datasets: where each comes from, and the generators of those that need no network.

This knows nothing about tokens; prepare.py turns any text into tokens.
"""

import ast
import csv
import io
import json
import os
import random
import time
import tokenize
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from glass.files import sha256_of

BOOK = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main"
HUGGING_FACE = "https://huggingface.co/datasets"
TABLES = (".csv", ".tsv", ".jsonl", ".json")  # files of supervised data


@dataclass(frozen=True)
class Download:
    """One file of a dataset."""

    url: str
    file: str  # its name in the dataset's folder
    bytes: int  # to download, approximately
    sha256: str | None = None  # of the file in the folder; None if the file may change
    member: str | None = None  # the part of a zip archive that is kept


@dataclass(frozen=True)
class Source:
    """A row of the table. It has downloads or a generator, never both."""

    about: str  # what it is, and its licence
    downloads: tuple = ()
    documents: Callable | None = None  # generates texts without a network
    records: Callable | None = None  # supervised data: reads a file, or generates without arguments
    kind: str = "text"  # text | classification | instructions | preferences | choices
    tokenizer: str = "gpt2"
    val_fraction: float = 0.1


def standard_library():
    """A sorted list of the source files of the standard library.

    Leaves out its tests and installed packages.
    """
    root = Path(os.__file__).parent
    left_out = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "__pycache__",
    }
    files = []
    for path in root.rglob("*.py"):
        if not left_out.intersection(path.relative_to(root).parts):
            files.append(path)
    return sorted(files)


def python_sources():
    """Yield (path, text, syntax tree) of each file of the standard library that is Python in UTF-8.

    The path is relative to the library's folder.
    """
    root = Path(os.__file__).parent
    for path in standard_library():
        try:
            text = path.read_bytes().decode("utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about old escapes in string literals
                tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        yield path.relative_to(root), text, tree


def pydoc_documents():
    """Yield the documentation that every Python carries, as texts in ASCII.

    The first documents are the help topics. Then there is one document for each module of the
    standard library, with all of its docstrings that no earlier module has.
    """
    import pydoc_data.topics

    for _, topic in sorted(pydoc_data.topics.topics.items()):
        yield ascii_text(topic)
    seen = set()
    for _, _, tree in python_sources():
        docs = [ascii_text(doc) for doc in docstrings_of(tree)]
        new = list(dict.fromkeys(doc for doc in docs if doc not in seen))
        seen.update(new)
        if new:
            yield "\n\n".join(new) + "\n"


def docstrings_of(tree):
    """The docstrings in a syntax tree, as a list."""
    places = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, places))
    return [doc for doc in docs if doc]


def ascii_text(text):
    """text in ASCII: typographic quotes and dashes are replaced, other characters are dropped."""
    replaced = text.translate(str.maketrans("‘’“”–—…", "''\"\"--."))
    return replaced.encode("ascii", "ignore").decode("ascii")


def stdlib_documents():
    """Yield the standard library's source, one document per file."""
    for path in standard_library():
        try:
            yield path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue


def line_records():
    """Yield single lines labelled `python` or `english`, as many of one as of the other.

    The Python is code without comments and docstrings; the English is from docstrings. No line
    occurs twice.
    """
    python, english = {}, {}
    for _, text, tree in python_sources():
        hidden = set()  # numbers of the lines with comments or with strings that may be docstrings
        try:
            for token in tokenize.generate_tokens(io.StringIO(text).readline):
                is_comment = token.type == tokenize.COMMENT
                is_string = token.type == tokenize.STRING and token.string.rstrip("\"'")
                may_be_docstring = is_string and '"""' in token.string
                begins_with_quote = token.line.lstrip().startswith(("'", '"'))
                if is_comment or may_be_docstring or begins_with_quote:
                    hidden.update(range(token.start[0], token.end[0] + 1))
        except (tokenize.TokenError, IndentationError):
            continue
        lines = (line.strip() for i, line in enumerate(text.splitlines(), 1) if i not in hidden)
        python.update(dict.fromkeys(line for line in lines if len(line) >= 20 and line.isascii()))
        for doc in docstrings_of(tree):
            lines = (line.strip() for line in doc.splitlines())
            english.update(dict.fromkeys(line for line in lines if is_prose(line)))
    english = [line for line in english if line not in python]
    chosen = random.Random(1337).sample(list(python), min(len(english), len(python)))
    for label, lines in (("english", english[: len(chosen)]), ("python", chosen)):
        yield from ({"label": label, "text": line} for line in lines)


def is_prose(line):
    """Whether a line has four words or more and none of the characters that are typical of code."""
    code_only = set("=()[]{}<>_*\\|@#$%^&`~+/")
    is_long = len(line) >= 20 and len(line.split()) >= 4
    return is_long and line.isascii() and not set(line) & code_only


def task_records():
    """Yield small instructions with answers that can be checked: see glass/tasks.py."""
    from glass import tasks

    yield from tasks.task_records()


def total_records():
    """Yield sums of three numbers: see glass/tasks.py."""
    from glass import tasks

    yield from tasks.total_records()


def docs_records(*objects):
    """Yield questions about Python's standard library: see glass/docs.py."""
    from glass import docs

    yield from docs.docs_records(*objects)


def read_spam(path):
    """Yield the records of the SMS collection. A line is a label, a tab and a message, unquoted."""
    with open(path, encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
            if len(row) != 2 or row[0] not in ("ham", "spam"):
                raise ValueError(
                    f"{path} line {number} is {row!r:.60} but must be ham or spam, a tab and the "
                    "message: correct it"
                )
            yield {"label": row[0], "text": row[1]}


def read_instructions(path):
    """Yield the instructions of a table as records."""
    for where, item in read_table(path):
        check_keys(where, item, ("instruction", "output"))
        yield {
            "instruction": item["instruction"],
            "input": item.get("input", ""),
            "output": item["output"],
        }


def read_preferences(path):
    """Yield the preferences of a table as records."""
    for where, item in read_table(path):
        check_keys(where, item, ("instruction", "chosen", "rejected"))
        yield {key: item.get(key, "") for key in ("instruction", "input", "chosen", "rejected")}


def read_table(path):
    """Yield (where, row) for each row of a table; row is a dict.

    The table is a .csv or .tsv file with a header, a .jsonl file, or a .json list. Raises
    ValueError, with the place, for what cannot be read.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in TABLES:
        raise ValueError(
            f"{path} ends in {path.suffix!r} but must end in one of {' '.join(TABLES)}: "
            "save it as such a table"
        )
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if suffix in (".csv", ".tsv"):
                yield from read_cells(path, file)
            elif suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        where = f"{path} line {number}"
                        yield where, parse_json(line, where, dict)
            else:
                for number, item in enumerate(parse_json(file.read(), path, list), 1):
                    where = f"{path} item {number}"
                    yield where, check_is(item, where, dict)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason}): save it as UTF-8, as Excel's 'CSV UTF-8' does"
        ) from error


def read_cells(path, file):
    """Yield (where, row) for each row of a table with a header; row is a dict.

    In a .tsv, a quote is text like any other. A .csv is read strictly. Raises ValueError for a row
    with more or fewer cells than the header.
    """
    csv.field_size_limit(1 << 30)  # Python's own limit is 131,072 characters
    if path.suffix.lower() == ".csv":
        reader = csv.reader(file, strict=True)
    else:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        header = [name.strip() for name in next(reader, [])]
        if len({*header, ""}) <= len(header):
            raise ValueError(
                f"{path} line 1 names the columns {header}, needed are distinct names: correct it"
            )
        for cells in reader:
            if not cells:
                continue
            where = f"{path} line {reader.line_num}"
            if len(cells) != len(header):
                raise ValueError(
                    f"{where} has {len(cells)} cells but the header has {len(header)} "
                    f"({', '.join(header)}): correct it; in a .csv, quote a text with commas"
                )
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{path} line {reader.line_num} is no CSV ({error}): correct it"
        ) from error


def parse_json(text, where, kind):
    """What JSON text holds. Raises ValueError, with the place, for anything but a `kind`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}): correct it") from error
    if "\\ud" in text.lower():  # half of a pair of escapes stands for no character
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise ValueError(f"{where} holds {half}, which is no character: correct it") from error
    return check_is(value, where, kind)


def check_is(value, where, kind):
    """value, if it is a `kind`: dict or list. Raises ValueError, with the place, if it is not."""
    if not isinstance(value, kind):
        names = {dict: "an object", list: "a list"}
        shown = names.get(type(value), f"{value!r:.40}")
        raise ValueError(f"{where} is {shown}, needed is {names[kind]}: correct it")
    return value


def check_keys(where, item, keys):
    """Raise ValueError, with the place, if a row lacks one of the keys or has no text there."""
    for key in keys:
        if key not in item:
            raise ValueError(
                f"{where} has no {key}, only {' '.join(sorted(item)) or 'nothing'}: add it"
            )
        if not isinstance(item[key], str) or not item[key].strip():
            raise ValueError(
                f"{where}: {key}={item[key]!r} must be a text that is not empty: "
                "fill it in, or remove the row"
            )


TINY_SHAKESPEARE = Download(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "input.txt",
    1_115_394,
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
THE_VERDICT = Download(
    f"{BOOK}/ch02/01_main-chapter-code/the-verdict.txt",
    "the-verdict.txt",
    20_479,
    "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
)
SPAM = Download(
    "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
    "sms_spam.tsv",
    203_415,
    "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
    member="SMSSpamCollection",
)
INSTRUCTIONS = Download(
    f"{BOOK}/ch07/01_main-chapter-code/instruction-data.json",
    "instruction-data.json",
    203_524,
    "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
)
PREFERENCES = Download(
    f"{BOOK}/ch07/04_preference-tuning-with-dpo/instruction-data-with-preference.json",
    "instruction-data-with-preference.json",
    386_968,
    "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
)

HELLASWAG = Download(
    "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    "hellaswag_val.jsonl",
    12_246_618,
)
PIQA_URL = "https://yonatanbisk.com/piqa/data"
PIQA = (
    Download(f"{PIQA_URL}/valid.jsonl", "piqa_valid.jsonl", 495_929),
    Download(f"{PIQA_URL}/valid-labels.lst", "piqa_valid-labels.lst", 3_676),
)
LAMBADA = Download(
    "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
    "lambada_test.jsonl",
    1_819_752,
)
WINOGRANDE = Download(
    "https://storage.googleapis.com/ai2-mosaic/public/winogrande/winogrande_1.1.zip",
    "winogrande_dev.jsonl",
    3_400_000,
    member="winogrande_1.1/dev.jsonl",
)
COPA = Download(
    "https://dl.fbaipublicfiles.com/glue/superglue/data/v2/COPA.zip",
    "copa_val.jsonl",
    44_000,
    member="COPA/val.jsonl",
)


def parquet_files(address, name, count, n_bytes):
    """Downloads, a tuple, of the first `count` files of a dataset on Hugging Face.

    name: a format string for the number of a file.
    """
    names = [name.format(i) for i in range(count)]
    return tuple(Download(f"{HUGGING_FACE}/{address}/{file}", file, n_bytes) for file in names)


# The branch where Hugging Face keeps a parquet version of every dataset.
CONVERTED = "resolve/refs%2Fconvert%2Fparquet"
TINYSTORIES = parquet_files(
    f"roneneldan/TinyStories/{CONVERTED}/default/train", "{:04d}.parquet", 4, 250_000_000
)
OPENWEBTEXT = parquet_files(
    f"Skylion007/openwebtext/{CONVERTED}/plain_text/partial-train",
    "{:04d}.parquet",
    10,
    300_000_000,
)
FINEWEB_EDU = parquet_files(
    "karpathy/fineweb-edu-100b-shuffle/resolve/main", "shard_{:05d}.parquet", 20, 95_000_000
)

SOURCES = {
    "pydoc": Source(
        "documentation of Python itself (PSF licence)", documents=pydoc_documents, tokenizer="char"
    ),
    "pydoc_bpe": Source(
        "the same in byte pairs (PSF licence)", documents=pydoc_documents, tokenizer="train:2048"
    ),
    "stdlib": Source(
        "source of Python's standard library (PSF licence)", documents=stdlib_documents
    ),
    "shakespeare_char": Source(
        "Tiny Shakespeare (public domain)", (TINY_SHAKESPEARE,), tokenizer="char"
    ),
    "shakespeare": Source("Tiny Shakespeare (public domain)", (TINY_SHAKESPEARE,)),
    "the_verdict": Source(
        "The Verdict, a short story by Edith Wharton (public domain)", (THE_VERDICT,)
    ),
    "tinystories": Source(
        "TinyStories, made by GPT-3.5 and GPT-4 (CDLA-Sharing-1.0)", TINYSTORIES, val_fraction=0.01
    ),
    "openwebtext": Source(
        "a sample of OpenWebText: 10 files of 80 (CC0)", OPENWEBTEXT, val_fraction=0.005
    ),
    "fineweb_edu": Source(
        "a sample of FineWeb-Edu: 20 files of 1,823 (ODC-By)", FINEWEB_EDU, val_fraction=0.005
    ),
    "tasks": Source(
        "small instructions with checkable answers", records=task_records, kind="instructions"
    ),
    "totals": Source("sums of three numbers", records=total_records, kind="instructions"),
    "docs": Source(
        "questions about the standard library, with its answers (PSF licence)",
        records=docs_records,
        kind="instructions",
    ),
    "lines": Source(
        "lines of Python and of English (PSF licence)", records=line_records, kind="classification"
    ),
    "spam": Source(
        "SMS Spam Collection (CC BY 4.0)", (SPAM,), records=read_spam, kind="classification"
    ),
    "instruct": Source(
        "1,100 instructions (Apache 2.0)",
        (INSTRUCTIONS,),
        records=read_instructions,
        kind="instructions",
    ),
    "preferences": Source(
        "1,100 pairs of answers (Apache 2.0)",
        (PREFERENCES,),
        records=read_preferences,
        kind="preferences",
    ),
    "hellaswag": Source("HellaSwag: how a scene goes on (MIT)", (HELLASWAG,), kind="choices"),
    "piqa": Source("PIQA: which way works (AFL 3.0)", PIQA, kind="choices"),
    "lambada": Source("LAMBADA: the last word (CC BY 4.0)", (LAMBADA,), kind="choices"),
    "winogrande": Source("Winogrande: whom a pronoun means (CC BY)", (WINOGRANDE,), kind="choices"),
    "copa": Source("COPA: cause or effect (BSD)", (COPA,), kind="choices"),
}


def find_file(folder, download):
    """Where a file of a dataset already is, or None. Two datasets share Tiny Shakespeare."""
    paths = [folder / download.file]
    if download is TINY_SHAKESPEARE:
        paths.append(folder.parent / "shakespeare_char" / download.file)
    return next((path for path in paths if path.is_file()), None)


def fetch(folder, download, attempts=5):
    """The path of a dataset's file, after downloading it to `folder`.

    An interrupted download goes on where it stopped. A failed one is tried again after 1, 2, 4 ...
    seconds. Raises OSError if it fails for good, and ValueError if the file is not the expected
    one.
    """
    path = folder / download.file
    partial = path.with_name(path.name + ".part")
    folder.mkdir(parents=True, exist_ok=True)
    for attempt in range(attempts):
        try:
            copy_from(download.url, partial)
            break
        except OSError as error:
            gone = isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404)
            offline = isinstance(getattr(error, "reason", None), OSError) and not partial.is_file()
            if gone or offline or attempt == attempts - 1:
                raise OSError(
                    f"{download.url} cannot be downloaded ({error}): "
                    f"get it elsewhere and put {download.member or 'it'} at {path}"
                ) from error
            time.sleep(2**attempt)
    if download.member:
        with zipfile.ZipFile(partial) as archive:
            partial_bytes = archive.read(download.member)
        partial.write_bytes(partial_bytes)
    if download.sha256 and sha256_of(partial) != download.sha256:
        partial.unlink()
        raise ValueError(
            f"{download.url} has changed (its sha256 differs): put the right file at {path}"
        )
    partial.replace(path)
    return path


def copy_from(url, partial):
    """Append to the file `partial` what it lacks of the file at url.

    Raises OSError if the connection ends too early.
    """
    have = partial.stat().st_size if partial.is_file() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send
            return
        raise
    with response:
        continues = response.status == 206
        have = have if continues else 0
        expected = have + int(response.headers.get("Content-Length") or 0)
        from tqdm import tqdm

        bar = tqdm(total=expected, initial=have, unit="B", unit_scale=True, desc=partial.stem)
        with bar, open(partial, "ab" if continues else "wb") as file:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    if expected and partial.stat().st_size < expected:
        raise OSError(f"the connection ended at byte {partial.stat().st_size} of {expected}")
