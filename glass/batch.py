"""Continuous batching: texts of many requests grow together, one token a step.

A text is a row of its model's cache. Rows join and leave between steps. A prompt is run through the
model in a cache of its own, in pieces, so that the other rows wait for one piece at most; then its
keys and values are copied into the rows' cache.

Shapes as in model.py: B rows, T positions, S attended positions, C channels, V vocabulary.
"""

import copy
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn import functional as F

from glass.device import free_memory
from glass.generate import TextStream, padded, penalise, sample
from glass.loading import Drawing

PIECE = 256  # tokens of prompts that are run through the model between two steps, at most


class Likely(NamedTuple):
    """A token's log-probability, in nats, and the likeliest tokens there: (id, logprob) pairs."""

    logprob: float
    top: list


class Made(NamedTuple):
    """A token of a row, the text that it makes certain, and why the row ends, if it does."""

    token: int
    text: str
    finish: str | None  # stop: by a stop id or string; length: by max_new_tokens
    likely: Likely | None  # where the row asks for it


class Scored(NamedTuple):
    """The prompt's tokens as the model expected them: a Likely each, but None for the first."""

    likely: list


class Failed(NamedTuple):
    """The row ends without a result, for a reason that a person can read."""

    reason: str


@dataclass(eq=False)
class Row:
    """A text that grows, and how."""

    ids: list  # of the prompt; what is made is appended
    max_new_tokens: int
    drawing: Drawing
    text: TextStream
    n_top: int | None = None  # how many likeliest tokens to name; None: no log-probabilities either
    scores_prompt: bool = False
    index: int = 0  # which text of its request
    listener: object = None  # whom serve.py tells
    cancelled: bool = False  # set by any thread: nobody listens any more
    n_made: int = 0
    generator: torch.Generator = field(init=False)
    seen: torch.Tensor | None = None  # (V,) bool, which ids the text holds; for a penalty only

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.drawing.seed)

    @property
    def length(self):
        """Positions in the cache: all of the text but its last token, which the next step reads."""
        return len(self.ids) - 1

    @property
    def needs(self):
        """Positions that the text has at its end, at most."""
        return len(self.ids) + self.max_new_tokens - self.n_made

    def penalised(self, logits):
        """The logits (1, V) of the next token, less for the ids that the text holds: (1, V)."""
        if self.drawing.repetition_penalty == 1.0:
            return logits
        if self.seen is None:
            self.seen = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            self.seen[torch.tensor(self.ids, device=logits.device)] = True
        self.seen[self.ids[-1]] = True
        return penalise(logits, self.seen[None], self.drawing.repetition_penalty)


class Prefill:
    """Prompts on their way into the cache: one of any length, or several short ones, padded."""

    def __init__(self, model, rows):
        prompts = list(dict.fromkeys(tuple(row.ids) for row in rows))  # equal ones only once
        self.rows, self.model = rows, model
        self.source = [prompts.index(tuple(row.ids)) for row in rows]  # row i has prompt source[i]
        self.idx, self.lengths = padded(prompts, model.device)  # (b, T), (b,)
        self.cache = model.new_cache(*self.idx.shape)
        self.scores = [[None] for _ in prompts]  # of the prompts' tokens, as far as they are run
        self.logits = None  # (b, V), of the tokens that follow the prompts

    def run_piece(self):
        """Run one piece of the prompts through the model; True once that was the last one."""
        b, T = self.idx.shape
        start = self.cache.length
        end = min(T, start + max(1, PIECE // b))
        x = self.model.hidden(self.idx[:, start:end], self.cache)  # (b, end - start, C)
        for i, rows_of_prompt in enumerate(self.rows_of_prompts()):
            if any(row.scores_prompt for row in rows_of_prompt):
                n_top = max(row.n_top or 0 for row in rows_of_prompt)
                self.score(i, x[i], start, n_top)
        if end < T:
            return False
        last = x[torch.arange(b, device=x.device), self.lengths - 1 - start]  # (b, C)
        self.logits = self.model.head(last).float()  # (b, V)
        return True

    def rows_of_prompts(self):
        """The rows of each distinct prompt, a list of lists."""
        found = [[] for _ in self.scores]
        for row, i in zip(self.rows, self.source, strict=True):
            found[i].append(row)
        return found

    def score(self, i, x, start, n_top):
        """Append to scores[i]: x (T, C) of prompt i from position `start` expects what follows."""
        ids = self.idx[i, start + 1 : int(self.lengths[i])][: len(x)]  # (t,), t <= T
        logprobs = F.log_softmax(self.model.head(x[: len(ids)]).float(), dim=-1)  # (t, V)
        self.scores[i] += likely_tokens(logprobs, ids, n_top)


def likely_tokens(logprobs, ids, n_top):
    """A Likely for each of ids (t,), whose log-probabilities are among logprobs (t, V)."""
    of_ids = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    top = logprobs.topk(min(n_top, logprobs.shape[1]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        Likely(logprob, list(zip(*pair, strict=True)))
        for logprob, pair in zip(of_ids, pairs, strict=True)
    ]


class Batch:
    """The rows of one model: those in the cache, those whose prompt is run, those that wait.

    Row i of the cache is rows[i]. Only the engine's thread may use a Batch.
    """

    def __init__(self, loaded, max_rows):
        self.loaded, self.model, self.max_rows = loaded, loaded.model, max_rows
        config = self.model.config
        per_position = 2 * config.n_layer * config.n_kv_head * config.head_dim
        per_position = max(1, per_position * self.model.dtype.itemsize)  # bytes
        free = free_memory(self.model.device)
        room = config.block_size * max_rows if free is None else free // 2 // per_position
        self.max_positions = room  # of all rows together
        self.longest = max(1, min(config.block_size, room))  # positions of a text, at most
        self.rows, self.waiting = [], deque()
        self.cache = self.prefill = None

    @property
    def has_work(self):
        return bool(self.rows or self.waiting or self.prefill)

    @torch.no_grad()
    def advance(self):
        """Run a piece of a prefill, then make a token of every row in the cache.

        Yields lists of (row, event) as they come.
        """
        self.drop_cancelled()
        if self.prefill is None:
            self.start_prefill()
        if self.prefill is not None and self.prefill.run_piece():
            yield self.finish_prefill()
        if self.rows:
            yield self.step()

    def drop_cancelled(self):
        """Let go of the rows that nobody listens to."""
        if any(row.cancelled for row in self.waiting):
            self.waiting = deque(row for row in self.waiting if not row.cancelled)
        if self.prefill and all(row.cancelled for row in self.prefill.rows):
            self.prefill = None
        for row in [row for row in self.rows if row.cancelled]:
            self.remove(row)
        if not self.has_work:
            self.cache = None  # gives its memory back

    def fail(self, reason):
        """End every row: a list of (row, event)."""
        running = self.prefill.rows if self.prefill else []
        ended = dict.fromkeys([*self.rows, *running, *self.waiting])
        self.rows, self.waiting, self.prefill, self.cache = [], deque(), None, None
        return [(row, Failed(reason)) for row in ended if not row.cancelled]

    # Joining.

    def start_prefill(self):
        """Take the next rows that wait, as many as one piece and the cache have room for."""
        taken, prompts = [], set()
        for row in self.waiting:
            together = prompts | {tuple(row.ids)}
            tokens = len(together) * max(map(len, together))
            if (taken and tokens > PIECE) or not self.has_room([*self.rows, *taken, row]):
                break
            taken.append(row)
            prompts = together
        if taken:
            self.prefill = Prefill(self.model, taken)
            for _ in taken:
                self.waiting.popleft()

    def has_room(self, rows):
        """Whether the cache may hold these rows. A single row always fits."""
        positions = len(rows) * max(row.needs for row in rows)
        fits = len(rows) <= self.max_rows and positions <= self.max_positions
        return fits or len(rows) == 1

    def finish_prefill(self):
        """Draw the first token of the rows whose prompts were run, and let them join."""
        done, events = self.prefill, []
        for row, i in zip(done.rows, done.source, strict=True):
            if row.scores_prompt:
                events.append((row, Scored(done.scores[i])))
        drawn = self.draw(done.rows, done.logits[done.source])
        for row, i in zip(done.rows, done.source, strict=True):
            if drawn[row].finish is None and not row.cancelled:
                self.join(row, done.cache, i)
        self.prefill = None
        return events + list(drawn.items())

    def join(self, row, prefilled, i):
        """Put a row into the cache: what it has seen is row i of the cache `prefilled`."""
        self.reserve([*self.rows, row])
        slot, n = len(self.rows), row.length
        for own, new in ((self.cache.k, prefilled.k), (self.cache.v, prefilled.v)):
            for layer in range(len(own)):
                own[layer][slot, :, :n] = new[layer][i, :, :n]
        self.cache.ids[slot, :n] = prefilled.ids[i, :n]
        self.rows.append(row)

    def reserve(self, rows):
        """Make the cache large enough for these rows, and keep what it holds."""
        is_static = self.loaded.compiled_decode is not None
        needed = max(row.needs for row in rows)
        # few different shapes: rows a power of two, lengths a multiple of 128
        max_len = min(self.longest, 128 * -(-needed // 128))
        max_len = self.longest if is_static else max_len
        n_rows = 1 << (len(rows) - 1).bit_length()
        old = self.cache
        if old is not None:
            grown = max(n_rows, len(old.ids)), max(max_len, old.max_len)
            if grown[0] * grown[1] <= self.max_positions:
                n_rows, max_len = grown
            if (n_rows, max_len) == tuple(old.ids.shape):
                return
        self.cache = self.model.new_cache(n_rows, max_len)
        self.cache.static = is_static
        if old is not None:
            n, S = len(self.rows), min(old.max_len, max_len)
            for own, new in ((old.k, self.cache.k), (old.v, self.cache.v)):
                for layer in range(len(own)):
                    new[layer][:n, :, :S] = own[layer][:n, :, :S]
            self.cache.ids[:n, :S] = old.ids[:n, :S]

    def remove(self, row):
        """Take a row out of the cache; the last row moves to its place."""
        slot, last = self.rows.index(row), self.rows.pop()
        if last is row:
            return
        self.rows[slot], n, end = last, last.length, len(self.rows)
        for store in (*self.cache.k, *self.cache.v):
            store[slot, :, :n] = store[end, :, :n]
        self.cache.ids[slot, :n] = self.cache.ids[end, :n]

    # Growing.

    def step(self):
        """Make a token of every row: a list of (row, event)."""
        B = len(self.rows)
        is_static = self.cache.static
        n = 1 << (B - 1).bit_length() if is_static else B  # compiled for a few numbers of rows
        padding = [0] * (n - B)
        ids = torch.tensor([row.ids[-1] for row in self.rows] + padding, device=self.model.device)
        view = self.view([row.length for row in self.rows] + padding)
        decode = self.loaded.compiled_decode or self.model.decode
        logits = decode(ids, view)[:B]  # (B, V)
        drawn = self.draw(self.rows, logits)
        for row in [row for row, made in drawn.items() if made.finish is not None]:
            self.remove(row)
        return list(drawn.items())

    def view(self, lengths):
        """The first rows of the cache, which have seen `lengths` positions, as a KVCache."""
        n, view = len(lengths), copy.copy(self.cache)
        view.k, view.v = [k[:n] for k in self.cache.k], [v[:n] for v in self.cache.v]
        view.ids, view.length, view.lengths = self.cache.ids[:n], max(lengths), None
        if view.static or len(set(lengths)) > 1:
            view.lengths = torch.tensor(lengths, device=self.model.device)
        return view

    def draw(self, rows, logits):
        """Draw and append the next token of each row, from logits (B, V): a dict, row to Made."""
        n_known = self.loaded.tokenizer.vocab_size  # a model may have more ids, which have no text
        alike = {}  # rows that are drawn in one call
        for i, row in enumerate(rows):
            alike.setdefault(tuple(row.drawing.filters().items()), []).append(i)
        tokens = [0] * len(rows)
        for filters, chosen in alike.items():
            each = [rows[i].penalised(logits[i : i + 1])[:, :n_known] for i in chosen]
            generators = [rows[i].generator for i in chosen]
            ids = sample(torch.cat(each), **dict(filters), generator=generators)  # (b,)
            for i, token in zip(chosen, ids.tolist(), strict=True):
                tokens[i] = token
        likely = self.likely(rows, logits, tokens)
        return {
            row: self.append(row, token, likely.get(row))
            for row, token in zip(rows, tokens, strict=True)
        }

    def likely(self, rows, logits, tokens):
        """A dict from each row that asks for log-probabilities to the Likely of its token."""
        chosen = [i for i, row in enumerate(rows) if row.n_top is not None]
        if not chosen:
            return {}
        n_known = self.loaded.tokenizer.vocab_size
        logprobs = F.log_softmax(logits[chosen], dim=-1)[:, :n_known]  # (b, V)
        ids = torch.tensor([tokens[i] for i in chosen], device=logits.device)
        n_top = max(rows[i].n_top for i in chosen)
        found = likely_tokens(logprobs, ids, n_top)
        return {rows[i]: likely for i, likely in zip(chosen, found, strict=True)}

    def append(self, row, token, likely):
        """Append a token to its row -> Made."""
        row.n_made += 1
        if row.max_new_tokens == 0:  # only the prompt was to be scored
            return Made(token, "", "length", None)
        row.ids.append(token)
        if token in self.loaded.ends:
            return Made(token, row.text.rest(), "stop", likely)
        text, finish = row.text.add(token), None
        if row.text.stopped:
            finish = "stop"
        elif row.n_made == row.max_new_tokens:
            text, finish = text + row.text.rest(), "length"
        return Made(token, text, finish, likely)
