"""The exercises of lesson 01."""

import functools
import re
import unicodedata
from itertools import islice

from desk import ask, exercise, expect

import bpe
from glass import sources


@exercise(
    "1.1",
    "Cut the text with re.findall and the pattern of the first cell.",
    "ids.get(word, other) gives `other` for a word that is not in ids.",
)
def encode_words(answer):
    ids = {"a": 0, "dog": 1, "sees": 2, ".": 3, "<|unk|>": 4}
    known = list(ask(answer, "a dog sees a dog.", dict(ids)))
    right = [0, 1, 2, 0, 1, 3]
    expect(known == right, f"for 'a dog sees a dog.' it gave {known}, not {right}")
    capital = list(ask(answer, "A dog", dict(ids)))
    expect(capital == [4, 1], "`A` and `a` are two words, and only one is known")
    given = list(ask(answer, "a cat sees 3 dogs.", dict(ids)))
    expect(len(given) == 6, f"'a cat sees 3 dogs.' has 6 tokens, and it gave {len(given)} ids")
    expect(given == [0, 4, 2, 4, 4, 3], f"for 'a cat sees 3 dogs.' it gave {given}")
    dashes = list(ask(answer, "a--dog", dict(ids)))
    expect(
        len(dashes) == 4, f"'a--dog' has 4 tokens by the first cell's pattern, not {len(dashes)}"
    )
    return "`cat`, `3` and `dogs` are one id now: what was there cannot be read back."


@exercise(
    "1.2",
    "2 to the power 11 is 2 ** 11 in Python, which is 2048.",
    "Three comparisons: if code < 128 return 1, and so on.",
)
def utf8_length(answer):
    for character in "a~\x7fé\x80\u07ffдअ\u0800中\uffff🙂\U00010000":
        given, needed = ask(answer, character), len(character.encode("utf-8"))
        reason = f"for code point {ord(character)} it gave {given}, and there are {needed} bytes"
        expect(given == needed, reason)
    return "The first bits of the first byte say how many bytes belong to the character."


@exercise(
    "1.3",
    "c o c o a, twice: the pair (c, o) is in it two times, so that is four, and coconut adds two.",
    "After `co`, three pairs occur three times each: (co, co), (n, u) and (u, t). "
    "Compare the ids: co has 256.",
)
def first_merges(answer):
    pretokens = {"cocoa": 2, "coconut": 1, "nut": 2}
    learned = bpe.learn_tokens_plainly(pretokens, 259)[256:]
    expected = [token.decode() for token in learned]
    given = [part.decode() if isinstance(part, bytes) else part for part in answer]
    expect(len(given) == 3, "three merges are asked for")
    expect(given[0] == expected[0], f"(c, o) occurs six times, more than the pair of {given[0]}")
    expect(given[1] != "coco", "(co, co) and (n, u) both occur three times: which has lower ids?")
    expect(given[1] == expected[1], f"the second merge does not make {given[1]}: count again")
    expect(given[2] == expected[2], f"the third merge does not make {given[2]}: compare the ids")
    return "Then comes `nut`, which ties with `coco` and has the higher ids."


@functools.cache
def trained():
    documents = list(islice(sources.pydoc_documents(), 12))
    return bpe.BPETokenizer.train(documents, vocab_size=700), "\n".join(documents[:3])


@exercise(
    "1.4",
    "Begin with parts = [word[i : i + 1] for i in range(len(word))].",
    "For each i, the joined bytes are parts[i] + parts[i + 1]. Take the i whose joined bytes have "
    "the lowest rank: min of a list of (rank, i).",
    "Stop when no joined bytes are in ranks. Then look up each part.",
)
def encode_word(answer):
    tokenizer, text = trained()
    words = [word.encode() for word in sorted(set(bpe.split_pretokens(text, "gpt2")))]
    words += [b"x", b"aaaaaaa", b"statementstatement", "中国".encode()]
    for word in words:
        given = list(ask(answer, word, dict(tokenizer.ranks)))
        expected = tokenizer.merge(word)
        if given == expected:
            continue
        known = all(i in range(len(tokenizer.tokens)) for i in given)
        expect(known, f"for {word} it gave {given}, which are no ids")
        whole = b"".join(tokenizer.tokens[i] for i in given)
        expect(whole == word, f"the tokens for {word} join to {whole}")
        expect(len(given) < len(word) or len(expected) == len(word), f"nothing is merged in {word}")
        shown = [tokenizer.tokens[i] for i in given]
        right = [tokenizer.tokens[i] for i in expected]
        expect(False, f"it gave {shown} where {right} is right: merge the lowest id first")
    return f"The same ids as bpe.py's for {len(words)} words."


@exercise(
    "1.5",
    "The tokenizer was trained on ASCII alone, so it can merge none of these bytes.",
    "One token per byte: the sum of the lengths of exercise 1.2. Cyrillic and Greek letters take "
    "two bytes each, Devanagari, Hangul and Han three.",
)
def names(answer):
    scripts = set()
    for spelling, count in dict(answer).items():
        expect(spelling and not re.search(r"[\s\x00-\x7f]", spelling), f"{spelling!r} has ASCII")
        script = unicodedata.name(spelling[0], "?").split()[0]
        expect(script != "LATIN", f"{spelling} is in Latin letters")
        scripts.add(script)
        n_bytes = len(spelling.encode("utf-8"))
        is_characters = count == len(spelling) != n_bytes
        expect(not is_characters, f"{spelling} has {count} characters, but how many bytes?")
        expect(count == n_bytes, f"{spelling} is not {count} tokens")
    expect(len(scripts) >= 4, f"four scripts are asked for, and these are {sorted(scripts)}")
    return "No merge fits, so there is one token for each byte."
