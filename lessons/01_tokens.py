# %% [markdown]
# # 01 From text to tokens
#
# After this lesson you can
# - turn text into numbers by words, by characters and by bytes, and say what each way costs,
# - learn a byte-pair vocabulary merge by merge, as `bpe.py` does it,
# - encode a new word with these merges,
# - say what a vocabulary costs: rows of a matrix, and tokens of a text in other languages.
#
# You need Python: strings, lists, dicts. Time: 45 minutes, exercises included.

# %%
import re
from collections import Counter
from itertools import islice

import matplotlib.pyplot as plt
from desk import check, hint, picture, source  # noqa: F401

import bpe
from glass import sources
from model import PRESETS

# %% [markdown]
# ## By words
#
# A model computes with numbers, so text must become a list of integers first. The simplest way: cut the text
# into words and punctuation marks, and number the different ones. A piece is a **token**. The list of all
# different tokens is the **vocabulary**, and the place of a token in it is the token's **id**.

# %%
TEXT = (
    "The river runs to the sea. The rain runs to the river. The sea gives the rain back to the sky."
)

words = re.findall(r"\w+|[^\w\s]", TEXT)
vocabulary = sorted(set(words))
ids = {word: i for i, word in enumerate(vocabulary)}
print(f"{len(words)} tokens, of which {len(vocabulary)} are different:", vocabulary)
print("ids of the first sentence:", [ids[word] for word in words[:7]])

# %% [markdown]
# The vocabulary has 11 tokens, with ids from 0 to 10. `The` and `the` are two of them: to the model they are
# as different as `rain` and `sky`.
#
# Back from ids to text we join the words with spaces. The result is not the text that we began with: there is
# now a space before each full stop. And a word that is not in the vocabulary has no id at all.

# %%
print(" ".join(vocabulary[ids[word]] for word in words[:7]))
try:
    ids["lake"]
except KeyError as error:
    print("KeyError:", error)

# %% [markdown]
# **Exercise 1.1** Write `encode_words(text, ids)`: the ids of the words of a text, as a list. It cuts text as
# above. A word that is not in `ids` gets the id of `<|unk|>`, the **unknown token**. The `ids` of the check
# have it; those above do not.


# %% tags=["1.1"]
def encode_words(text, ids):
    return None  # a list of integers


check("1.1", encode_words)

# %% [markdown]
# `WordTokenizer` in `bpe.py` keeps the space with the word that follows it, so joining the tokens gives the
# text back. It has the unknown token too, and what becomes unknown is lost:

# %%
by_words = bpe.WordTokenizer.train(TEXT)
print(by_words.tokens)
print("the same text again:", by_words.decode(by_words.encode(TEXT)) == TEXT)
print(by_words.decode(by_words.encode("The river runs to the lake.")))

# %% [markdown]
# The word `lake` was not in the training text, so its place holds the unknown token now. The names in `<| |>`
# at the end of the vocabulary are **special tokens**: they are not made from text, the program adds them
# itself. We come back to them.
#
# ## By characters, by bytes
#
# In a long text, characters need a far smaller vocabulary than words, and no word is unknown any more. But a text has
# more tokens, and a character that the training text did not have is still unknown.
#
# Bytes end that. A file stores text as bytes, in the encoding **UTF-8**: one byte for a character of ASCII
# (English letters, digits, common signs), and two to four bytes for every other character. There are 256
# different bytes, so a vocabulary of 256 tokens can write every text there is.

# %%
by_characters = bpe.CharTokenizer.train(TEXT)
print(
    f"{len(by_words.encode(TEXT))} tokens by words, {len(by_characters.encode(TEXT))} by characters"
)
print(f"{len(by_characters.characters)} characters: {by_characters.characters!r}")
for character in "aéд中🙂":
    print(character, "code point", ord(character), "bytes", list(character.encode("utf-8")))

# %% [markdown]
# The same text has 24 tokens by words and 94 by characters. An `a` takes one byte, `é` and `д` take two, `中`
# takes three, the face takes four. The **code point** is the number of a character in Unicode, and it decides
# how many.
#
# **Exercise 1.2** Write `utf8_length(character)`: how many bytes a character takes, from `ord(character)` and
# without `encode`. Below 128 (2 to the power 7) it is one byte, below 2 to the power 11 two, below 2 to the
# power 16 three, and four for all others.


# %% tags=["1.2"]
def utf8_length(character):
    return None  # 1, 2, 3 or 4


check("1.2", utf8_length)

# %% [markdown]
# ## Byte-pair encoding: count, merge, count again
#
# **Byte-pair encoding** (BPE) stands between bytes and words. It begins with the 256 bytes as tokens. Then it
# counts all pairs of neighbours in a training text, and makes the most frequent pair one new token: a
# **merge**. After that it counts again, as often as you like. Frequent words become one token, and rare words
# stay in pieces.
#
# Pairs are counted only inside a word. So the text is cut into **pre-tokens** first: a word with the space
# before it, a number, or a run of signs. A merge never crosses from one pre-token into the next.

# %%
print(bpe.split_pretokens("In 2019, it rained: that's all.", "gpt2"))
pretokens = bpe.count_pretokens(TEXT, "gpt2")  # a Counter: pre-token to how often it occurs
print(pretokens)

# %% [markdown]
# Each pre-token as a tuple of parts, which are single bytes at first. A pair counts as often as its pre-token
# occurs.

# %%
parts_of = {word: tuple(bytes([byte]) for byte in word.encode("utf-8")) for word in pretokens}


def pair_counts(parts_of):
    counts = Counter()
    for word, parts in parts_of.items():
        for pair in zip(parts, parts[1:], strict=False):  # one shorter
            counts[pair] += pretokens[word]
    return counts


def merge_pair(parts, pair):
    merged = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


counts = pair_counts(parts_of)
print(counts.most_common(4))
print(merge_pair(parts_of[" rain"], (b" ", b"r")))

# %% [markdown]
# Two pairs occur seven times each: h and e, space and t. The last line shows ` rain` after a merge of its
# first two parts.
#
# Now the loop. Of equally frequent pairs, the pair with the lower ids is merged. That rule is a choice, but
# there must be one: otherwise two runs on the same text could learn two vocabularies.

# %%
tokens = [bytes([byte]) for byte in range(256)]
for _ in range(12):
    counts = pair_counts(parts_of)
    token_ids = {token: i for i, token in enumerate(tokens)}
    pair = min(counts, key=lambda p: (-counts[p], token_ids[p[0]], token_ids[p[1]]))
    tokens.append(pair[0] + pair[1])
    parts_of = {word: merge_pair(parts, pair) for word, parts in parts_of.items()}
    print(f"{pair} {counts[pair]} times -> {tokens[-1]}, id {len(tokens) - 1}")

n_parts = sum(len(parts) * pretokens[word] for word, parts in parts_of.items())
print(f"{len(TEXT)} bytes are now {n_parts} tokens")

# %% [markdown]
# Twelve merges have made 49 tokens of 94 bytes, and some of the tokens are whole words with their space.
#
# `bpe.py` has the same loop as `learn_tokens_plainly`, and `learn_tokens`, which learns the same tokens much
# faster, because it does not count everything again after a merge. All three agree on our text:

# %%
source(bpe.learn_tokens_plainly)
print()
print("as learn_tokens_plainly:", tokens == bpe.learn_tokens_plainly(pretokens, len(tokens)))
print("as learn_tokens:        ", tokens == bpe.learn_tokens(pretokens, len(tokens)))

# %% [markdown]
# **Exercise 1.3** On paper. A text has these pre-tokens: `cocoa` twice, `coconut` once, `nut` twice. Which
# three merges come first? Give the three new tokens as a list of strings. Ids of single bytes are their ASCII
# codes: a 97, c 99, n 110, o 111, t 116, u 117. New tokens begin at 256.

# %% tags=["1.3"]
first_merges = None  # for example ["ab", "abc", "de"]

check("1.3", first_merges)

# %% [markdown]
# ## Encoding with the merges
#
# A new word goes through the same merges in the same order. In a word as it now stands, find the neighbours
# whose joined bytes are a token; of several, take the token with the lowest id, which was learned first;
# merge; and repeat until no two neighbours are a token together. Here is a larger vocabulary, from the help
# texts that every Python carries, at work:

# %%
documents = list(islice(sources.pydoc_documents(), 70))  # English in ASCII
training, unseen = documents[:60], "\n".join(documents[60:])
tokenizer = bpe.BPETokenizer.train(training, vocab_size=2048)
for parts in tokenizer.merge_steps(b" statements"):
    print(bpe.paint(parts))

# %% [markdown]
# The first line is the single bytes, and each further line is one merge more. The pieces in the last line are the
# tokens.
#
# **Exercise 1.4** Write `encode_word(word, ranks)`: the ids of one word, given as bytes. `ranks` is a dict
# from the bytes of a token to its id; it has all 256 single bytes. Your function is compared with
# `BPETokenizer.merge` on many words.


# %% tags=["1.4"]
def encode_word(word, ranks):
    return None  # a list of ids


check("1.4", encode_word)

# %% [markdown]
# ## Special tokens
#
# Where one document ends and the next begins, the program puts a **special token**, `<|endoftext|>`. It gets
# an id of its own after all merges. If someone types these 13 characters into a text, they must stay text, or
# a user could end a document. So `encode` makes the special token only where it is told to:

# %%
end = bpe.END_OF_TEXT
print("special tokens:", tokenizer.special_tokens)
print("as text:   ", tokenizer.encode(end))
print("as special:", tokenizer.encode(end, allowed_special=[end]))

# %% [markdown]
# As text the 13 characters are several ordinary tokens. As a special token they are a single id.
#
# ## What a vocabulary costs
#
# More merges make texts shorter: fewer tokens to compute. But every token of the vocabulary has a row in the
# model's embedding matrix (lesson 02), so the model grows. The first n learned tokens are the vocabulary that
# a shorter training would have given, so one training serves for every size. The text that is counted is one
# that the tokenizer was not trained on.

# %%
learned = list(tokenizer.ranks)  # bytes, in the order they were learned
sizes = [256, 320, 512, 768, 1024, 1536, len(learned)]
lengths = [len(bpe.BPETokenizer(learned[:size], {}).encode(unseen)) for size in sizes]
bytes_per_token = [len(unseen) / length for length in lengths]  # in ASCII a character is a byte
for size, length, ratio in zip(sizes, lengths, bytes_per_token, strict=True):
    print(f"{size:5} tokens in the vocabulary: {length:6} in the text, {ratio:.2f} bytes per token")

plt.plot(sizes, bytes_per_token, marker="o")
plt.xlabel("tokens in the vocabulary")
plt.ylabel("bytes per token")
plt.title("Each further merge shortens a text by less")
picture("01_vocabulary")

# %% [markdown]
# Without merges a token is one byte. The first few hundred merges shorten the text most; each later one
# occurs less often, so it saves less. And this is the other side, the rows of the matrix, in a model with a
# large vocabulary:

# %%
gpt2 = PRESETS["gpt2"]
rows = f"{gpt2.vocab_size:,} tokens x {gpt2.n_embd} channels"
print(f"GPT-2's embedding: {rows} = {gpt2.vocab_size * gpt2.n_embd:,} numbers")

# %% [markdown]
# That is about a third of the 124 million parameters of this model.
#
# ## What it costs other languages
#
# Which pairs are merged depends on the text that the tokenizer was trained on. Ours has seen English in ASCII
# and nothing else. It can write every language, but not at the same price. The same sentence in six
# languages:

# %%
SENTENCES = {
    "English": "The sun rises in the east.",
    "German": "Die Sonne geht im Osten auf.",
    "Russian": "Солнце встаёт на востоке.",
    "Greek": "Ο ήλιος ανατέλλει στην ανατολή.",
    "Hindi": "सूरज पूर्व में उगता है।",
    "Chinese": "太阳从东方升起。",
}
n_tokens = {language: len(tokenizer.encode(text)) for language, text in SENTENCES.items()}
for language, text in SENTENCES.items():
    n_bytes = len(text.encode("utf-8"))
    print(f"{language:8} {len(text):3} characters {n_bytes:3} bytes {n_tokens[language]:3} tokens")

plt.barh(list(n_tokens), list(n_tokens.values()))
plt.gca().invert_yaxis()
plt.xlabel("tokens")
plt.title("The same sentence, by a tokenizer of English text")
picture("01_languages")

# %% [markdown]
# In the last four languages a sentence takes one token per byte: no merge has anything to do there. A user of
# these languages pays more for the same sentence, waits longer, and fits less into the model's context. The
# remedy is a tokenizer whose training text has these languages.
#
# **Exercise 1.5** Write your name (or any other) in four scripts that are not Latin, such as Cyrillic, Greek,
# Arabic, Devanagari, Hangul or Han, and say how many tokens `tokenizer` makes of each. Count first, with
# exercise 1.2 in mind, and only then ask `tokenizer.encode`. No spaces, no Latin letters. (If your keyboard has only
# one script, copy these: Анна, Άννα, 안나, अन्ना.)

# %% tags=["1.5"]
names = None  # {"first spelling": number of tokens, ...}, four scripts

check("1.5", names)

# %% [markdown]
# ## Break it
#
# First, another rule of encoding: from left to right, always take the longest token that fits. The text still
# comes back from these tokens, but many words are cut at other places. A model must get its text cut by the
# rule by which its training text was cut: it has hardly seen the other pieces side by side.
#
# In `bpe.py`, change `min(candidates)` to `max(candidates)` in `merge_steps`, so that the pair learned last
# is merged first, and run `python -m pytest test_all.py -k merging_with_a_heap`. For which text does it fail?


# %%
def longest_first(word, ranks):
    parts = []
    while word:
        n = next(n for n in range(len(word), 0, -1) if word[:n] in ranks)
        parts.append(word[:n])
        word = word[n:]
    return parts


different = []
for word in sorted(set(bpe.split_pretokens(unseen, "gpt2"))):
    *_, parts = tokenizer.merge_steps(word.encode())
    if word.strip().isalpha() and longest_first(word.encode(), tokenizer.ranks) != parts:
        different.append(word)
print(f"{len(different)} words are cut in another way")
for word in different[:4]:
    *_, parts = tokenizer.merge_steps(word.encode())
    print(bpe.paint(parts), "by merges,", bpe.paint(longest_first(word.encode(), tokenizer.ranks)))

# %% [markdown]
# Second, a text that is cut inside a character. A token can be a part of a character, and a part is no text:
# it becomes the character U+FFFD, which most fonts draw as a question mark. So a program that prints token by
# token must wait for the whole character. Below, `ï` takes two tokens and `中` three.

# %%
pieces = tokenizer.encode("naïve 中")
for n in range(1, len(pieces) + 1):
    print(n, tokenizer.decode(pieces[:n]))

# %% [markdown]
# ## Where it happens
#
# | what | where |
# |---|---|
# | words, characters | `bpe.py`: `WordTokenizer`, `CharTokenizer` |
# | cutting into pre-tokens | `bpe.py`: `split_pretokens`, `PATTERNS` |
# | learning merges, plainly and fast | `bpe.py`: `learn_tokens_plainly`, `learn_tokens` |
# | encoding | `bpe.py`: `BPETokenizer.merge_steps`, `BPETokenizer.merge` |
# | special tokens | `bpe.py`: `Tokenizer.encode`, `SPECIAL_TOKENS` |
# | whole characters only, while text is printed | `glass/generate.py`: `TextStream` |
# | by command | `python bpe.py train`, `python bpe.py show "a text"` |
#
# ## To read
# - Sennrich, Haddow and Birch 2016, "Neural machine translation of rare words with subword units",
#   arXiv:1508.07909: BPE for text.
# - Radford et al. 2019, "Language models are unsupervised multitask learners" (GPT-2), section 2.2: BPE on bytes.
# - Petrov et al. 2023, "Language model tokenizers introduce unfairness between languages", arXiv:2305.15425.
