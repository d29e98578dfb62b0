"""Where a text stands in the training data: the longest match before each token, by suffix array.

The index lies beside the shards, in data/NAME/index/, is built once and then memory-mapped: the
tokens of the training split in one file, and all their suffixes in alphabetical order.
"""

import re
from dataclasses import dataclass

import numpy as np

from glass.files import read_object, write_json
from glass.progress import say
from glass.shards import META, folder_of, open_dataset

LARGEST = 50_000_000  # tokens; sorting takes about 75 bytes of memory for each
LONGEST = 64  # suffixes are sorted by this many tokens, and matches are that long at most


@dataclass
class Index:
    """The suffixes of a training split in order."""

    dataset: object  # shards.Dataset
    tokens: np.ndarray  # (N,)
    suffixes: np.ndarray  # (N,) int32: where each suffix begins


def sort_suffixes(tokens, longest=LONGEST):
    """Where the suffixes of tokens (N,) begin, in order of their first `longest` tokens: (N,) int32.

    Prefix doubling: suffixes that are sorted by n tokens are sorted by 2 n, by the pair of their
    rank and that of the suffix n further (Manber and Myers 1990).
    """
    n_tokens = len(tokens)
    rank = tokens.astype(np.int64) + 1
    n = 1
    while True:
        after = np.zeros(n_tokens, np.int64)  # 0: the text ends before
        after[: max(0, n_tokens - n)] = rank[n:]
        keys = rank * (int(rank.max()) + 1) + after
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        is_new = np.concatenate([[1], (ordered[1:] != ordered[:-1]).astype(np.int64)])
        rank = np.empty(n_tokens, np.int64)
        rank[order] = np.cumsum(is_new)
        n *= 2
        if n >= longest or rank.max() == n_tokens:
            return order.astype(np.int32)


def is_dataset(name):
    """Whether data/ holds a prepared dataset of this name; a path is none."""
    return bool(re.fullmatch(r"\w[\w.-]*", name)) and (folder_of(name) / META).is_file()


def open_index(name):
    """The Index of a dataset, built if it is not there yet.

    Raises ValueError for a training split of more than LARGEST tokens.
    """
    dataset = open_dataset(name)
    shards = dataset.splits["train"]
    n_tokens = sum(map(len, shards))
    if n_tokens > LARGEST:
        raise ValueError(
            f"{name} has {n_tokens:,} training tokens, but at most {LARGEST:,} are searched: "
            "use a smaller dataset"
        )
    folder = dataset.folder / "index"
    paths = {kind: folder / f"{kind}.bin" for kind in ("tokens", "suffixes")}
    about = {"sha256": dataset.sha256, "tokens": n_tokens, "longest": LONGEST}
    marker = folder / "index.json"
    if not marker.is_file() or about != read_object(marker):
        say(f"building the index of {name}, {n_tokens:,} tokens, once")
        folder.mkdir(exist_ok=True)
        marker.unlink(missing_ok=True)
        tokens = np.concatenate(shards).astype(np.int32)
        tokens.tofile(paths["tokens"])
        sort_suffixes(tokens).tofile(paths["suffixes"])
        write_json(marker, about)
    tokens, suffixes = (np.memmap(path, np.int32, "r") for path in paths.values())
    return Index(dataset, tokens, suffixes)


def occurrences(index, ids):
    """(first, last) places in index.suffixes of those that begin with ids; first == last: none."""
    ids, n = np.asarray(ids), len(ids)

    def search(is_after):
        low, high = 0, len(index.suffixes)
        while low < high:
            middle = (low + high) // 2
            start = index.suffixes[middle]
            here = tuple(index.tokens[start : start + n].tolist())
            if is_after(here):
                high = middle
            else:
                low = middle + 1
        return low

    wanted = tuple(ids.tolist())
    return search(lambda here: here >= wanted), search(lambda here: here > wanted)


def longest_matches(index, ids):
    """For each token of ids, the longest text ending with it that the training split holds.

    Gives a list of (length, count): how many tokens match, at most LONGEST, and how often they
    occur.
    """
    found, start = [], 0
    for end in range(1, len(ids) + 1):
        start = max(start, end - LONGEST)
        first, last = occurrences(index, ids[start:end])
        while first == last and start < end:
            start += 1
            first, last = occurrences(index, ids[start:end]) if start < end else (0, 0)
        found.append((end - start, last - first))
    return found


def places(index, ids, most=5, around=40):
    """Up to `most` places of a text in the training split, with what stands around it.

    Gives dicts: offset (of the first token), before, match and after (texts).
    """
    first, last = occurrences(index, ids)
    decode, made = index.dataset.tokenizer.decode, []
    for start in sorted(index.suffixes[first : min(last, first + most)].tolist()):
        end = start + len(ids)
        made.append(
            {
                "offset": start,
                "before": decode(index.tokens[max(0, start - around) : start].tolist()),
                "match": decode(index.tokens[start:end].tolist()),
                "after": decode(index.tokens[end : end + around].tolist()),
            }
        )
    return made
