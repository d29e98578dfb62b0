"""POST /trace: what glass/trace.py sees, as JSON. A request names a text, and parts to look at.

    {"text": "To be" (or ids, or messages), "parts": ["tokens", "lens"], "k": 10, ...}

| part | reads | gives |
|---|---|---|
| tokens | | list of {id, text, bytes, special}; `words`: how BPE merged each word |
| surprise | | logprob, rank, entropy of each token; null for the first |
| likeliest | k | ids, texts, logprobs of the next token after each position, T x k |
| logits | position, k | `row`: base64 of V little-endian float32; ids and texts of the k largest |
| thumbnails | layer | maps of the layer's heads, at most 24 x 24: base64 of H x n x n uint8, size |
| attention | layer, head, by_value | matrix T x T |
| lens | positions, k, token | ids, texts, logprobs (2 L + 1) x P x k; ranks (2 L + 1) x P |
| pushes | position, token | heads L x H, mlps L, others {name: number}, by_token T, logit |
| switched_off | mask | logprob of each token with these heads and MLPs off; likeliest after |
| badges | | previous, induction, first: L x H |
| compare | | logprob of each token by the other model |
| matches | dataset, position | length and count before each token; places of the one at position |
| class | token | labels, probs, and by_token: what each token pushed to the class |

A matrix is {"shape", "scale", "base64"}: uint8 that, times the scale, give the numbers.
"""

import base64
import math
import weakref

import numpy as np
import torch
from torch.nn import functional as F

from glass import trace as tracing
from glass.chat import MARKERS, encode_chat

THUMBNAIL = 24  # pixels of a small attention map
MOST_KEPT = 2**24  # logits of a trace that is kept for the next request
LARGE_VOCABULARY, MOST_POSITIONS = 8192, 32  # beyond, the lens takes 32 positions a request
BADGES = weakref.WeakKeyDictionary()  # of each model that was asked: they depend on no text


class Request:
    """A checked request. Every value that is wrong raises ValueError, in one line."""

    KEYS = set(
        "text ids messages parts k position positions layer head by_value token mask dataset model "
        "other".split()
    )

    def __init__(self, loaded, body):
        if unknown := sorted(body.keys() - self.KEYS):
            raise ValueError(f"{' '.join(unknown)[:200]} is no key of a trace: leave it out")
        self.loaded, self.body, self.model = loaded, body, loaded.model
        self.parts = self.check_parts(body.get("parts"))
        self.ids = self.read_ids(body)
        self.idx = torch.tensor(self.ids, device=self.model.device)

    def check_parts(self, parts):
        """The names of the parts."""
        are_names = isinstance(parts, list) and all(isinstance(part, str) for part in parts)
        if not are_names or not parts or not set(parts) <= PARTS.keys():
            raise ValueError(f"parts={parts!r:.100} must be a list of {' '.join(PARTS)}")
        return parts

    def read_ids(self, body):
        """The ids of the text: at least one, at most block_size."""
        tokenizer, longest = self.loaded.tokenizer, self.model.config.block_size
        if len({"text", "ids", "messages"} & body.keys()) != 1:
            raise ValueError("a trace needs either text, ids or messages: give one of them")
        ids = body.get("ids")
        if "messages" in body:
            ids = self.chat_ids(body["messages"])
        if "text" in body:
            if not isinstance(body["text"], str):
                raise ValueError(f"text={body['text']!r:.40} must be a text")
            if unknown := tokenizer.unknown_characters(body["text"]):
                shown = " ".join(map(repr, unknown[:10]))
                raise ValueError(f"the tokenizer does not know {shown}: leave them out")
            ids = tokenizer.encode(body["text"])
        vocab_size = self.model.config.vocab_size
        are_ids = isinstance(ids, list) and all(type(i) is int and 0 <= i < vocab_size for i in ids)
        if not are_ids:
            raise ValueError(f"ids={ids!r:.60} must be a list of ids below {vocab_size}")
        if not 1 <= len(ids) <= longest:
            raise ValueError(f"the text has {len(ids)} tokens, needed are 1 to {longest}")
        return ids

    def chat_ids(self, messages):
        """The ids of a conversation in the model's own template."""
        loaded = self.loaded
        are_messages = isinstance(messages, list) and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and message["role"] in MARKERS
            and isinstance(message.get("content"), str)
            for message in messages
        )
        if not are_messages or not messages:
            raise ValueError(f"messages={messages!r:.60} must be a list of {{role, content}}")
        template = loaded.chat_template
        if template is None:
            raise ValueError("this model was not tuned on conversations: give a text")
        return encode_chat(loaded.tokenizer, messages, template)[0]

    def integer(self, name, default, low, high):
        """An integer of the request in [low, high]."""
        value = self.body.get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name}={value!r:.40} must be an integer from {low} to {high}")
        return value

    @property
    def k(self):
        return self.integer("k", 10, 1, 100)

    @property
    def position(self):
        return self.integer("position", len(self.ids) - 1, 0, len(self.ids) - 1)

    def layer(self):
        if not len(self.model.blocks):
            raise ValueError("this model has no layer (n_layer=0), so no attention: choose another")
        return self.integer("layer", 0, 0, len(self.model.blocks) - 1)

    def token(self, position):
        """The token asked for; by default the one that comes next, or the likeliest."""
        config = self.model.config
        is_last = position == len(self.ids) - 1
        default = (
            int(self.found.logits_at(position).argmax()) if is_last else self.ids[position + 1]
        )
        return self.integer("token", default, 0, config.vocab_size - 1)

    @property
    def found(self):
        """The Trace, made once for all parts, and once for requests of one text in a row."""
        if not hasattr(self, "traced"):
            kept = self.loaded.last_trace
            is_same = kept is not None and kept.idx.tolist() == self.ids
            self.traced = kept if is_same else tracing.trace(self.model, self.idx)
            if len(self.ids) * self.model.config.vocab_size <= MOST_KEPT:
                self.loaded.last_trace = self.traced
        return self.traced


def texts_of(tokenizer, ids):
    """The text of each id of a nested list."""
    if isinstance(ids, list):
        return [texts_of(tokenizer, one) for one in ids]
    return tokenizer.decode([ids])


def numbers(tensor):
    """A tensor as nested lists; NaN and infinity, which JSON lacks, as None."""
    values = tensor.tolist()
    if tensor.isfinite().all():
        return values

    def finite(value):
        if isinstance(value, list):
            return [finite(one) for one in value]
        return value if math.isfinite(value) else None

    return finite(values)


def matrix(values):
    """A tensor of numbers >= 0 as uint8 in base64, with what multiplies them."""
    values = values.float().cpu()
    scale = float(values.max()) / 255 or 1.0
    rounded = (values / scale).round().to(torch.uint8).numpy()
    text = base64.b64encode(rounded.tobytes()).decode("ascii")
    return {"shape": list(values.shape), "scale": scale, "base64": text}


# The parts.


def tokens_part(r):
    """Every token, and for byte-level BPE how each word was merged."""
    tokenizer = r.loaded.tokenizer
    special = {i: name for name, i in tokenizer.special_tokens.items()}
    tokens = []
    for i in r.ids:
        data = tokenizer.decode_bytes([i])
        text = special.get(i) or data.decode("utf-8", errors="replace")
        tokens.append({"id": i, "text": text, "bytes": list(data), "special": i in special})
    return {"tokens": tokens, "words": merged_words(tokenizer, r.body.get("text"))}


def merged_words(tokenizer, text):
    """[{"word", "steps"}], steps being lists of texts, for a tokenizer that merges; else []."""
    from bpe import BPETokenizer, split_pretokens

    if not isinstance(tokenizer, BPETokenizer) or text is None:
        return []
    words = []
    for word in dict.fromkeys(split_pretokens(text, tokenizer.pattern)):
        steps = tokenizer.merge_steps(word.encode("utf-8"))
        shown = [[piece.decode("utf-8", errors="replace") for piece in step] for step in steps]
        words.append({"word": word, "steps": shown})
    return words


def surprise_part(r):
    logprob, rank, entropy = tracing.surprise(r.found.logits, r.idx)
    named = {"logprob": numbers(logprob), "rank": rank.tolist(), "entropy": numbers(entropy)}
    return {name: [None, *values] for name, values in named.items()}


def likeliest_part(r):
    ids, logprobs = tracing.likeliest(r.found.logits, r.k)
    texts = texts_of(r.loaded.tokenizer, ids.tolist())
    return {"ids": ids.tolist(), "texts": texts, "logprobs": numbers(logprobs)}


def logits_part(r):
    logits = r.found.logits[r.position]  # (V,)
    row = logits.cpu().numpy().astype("<f4")
    ids = tracing.likeliest(logits, r.k)[0].tolist()
    texts = texts_of(r.loaded.tokenizer, ids)
    encoded = base64.b64encode(row.tobytes()).decode("ascii")
    return {"position": r.position, "row": encoded, "ids": ids, "texts": texts}


def thumbnails_part(r):
    weights = r.found.attention(r.layer())  # (H, T, T)
    n = min(THUMBNAIL, weights.shape[-1])
    small = F.adaptive_max_pool2d(weights[None], n)[0]  # (H, n, n)
    return {"layer": r.layer(), "size": n, "maps": matrix(small)}


def attention_part(r):
    by_value = r.body.get("by_value", False)
    if not isinstance(by_value, bool):
        raise ValueError(f"by_value={by_value!r:.40} must be true or false")
    layer, head = r.layer(), r.integer("head", 0, 0, r.model.config.n_head - 1)
    weights = r.found.attention(layer, by_value)[head]
    return {"layer": layer, "head": head, "matrix": matrix(weights)}


def lens_part(r):
    T, vocab_size = len(r.ids), r.model.config.vocab_size
    most = MOST_POSITIONS if vocab_size > LARGE_VOCABULARY else T
    positions = r.body.get("positions", list(range(max(0, T - most), T)))
    are_positions = isinstance(positions, list) and all(
        type(p) is int and 0 <= p < T for p in positions
    )
    if not are_positions or not 1 <= len(positions) <= most:
        raise ValueError(f"positions={positions!r:.60} must be 1 to {most} integers below {T}")
    tokens = None
    if "token" in r.body:
        token = r.integer("token", 0, 0, vocab_size - 1)
        tokens = torch.full((len(positions),), token, device=r.model.device)
    ids, logprobs, ranks = tracing.lens(r.found, positions, min(r.k, 10), tokens)
    return {
        "positions": positions,
        "ids": ids.tolist(),
        "texts": texts_of(r.loaded.tokenizer, ids.tolist()),
        "logprobs": numbers(logprobs),
        "ranks": ranks.tolist(),
    }


def pushes_part(r):
    position = r.position
    token = r.token(position)
    heads, mlps, others = tracing.pushes(r.found, position, token)
    return {
        "position": position,
        "token": token,
        "text": r.loaded.tokenizer.decode([token]),
        "logit": float(r.found.logits_at(position)[token]),
        "heads": numbers(heads),
        "mlps": numbers(mlps),
        "others": others,
        "by_token": numbers(tracing.token_pushes(r.found, position, token)),
    }


def switched_off_part(r):
    config, mask = r.model.config, r.body.get("mask")
    shape = (len(r.model.blocks), config.n_head + 1)
    try:
        array = np.array(mask, dtype=bool)
    except (ValueError, TypeError):
        array = np.zeros(0)
    if array.shape != shape:
        raise ValueError(f"mask={mask!r:.60} must be {shape[0]} rows of {shape[1]} true or false")
    with torch.no_grad(), tracing.switched_off(r.model, torch.from_numpy(array)):
        logits = r.model(r.idx[None])[0][0]
    logprob, _, _ = tracing.surprise(logits, r.idx)
    ids, logprobs = tracing.likeliest(logits[-1], r.k)
    return {
        "logprob": [None, *numbers(logprob)],
        "ids": ids.tolist(),
        "texts": texts_of(r.loaded.tokenizer, ids.tolist()),
        "logprobs": numbers(logprobs),
    }


def badges_part(r):
    r.layer()
    if r.model not in BADGES:
        BADGES[r.model] = tracing.head_badges(r.model)
    named = zip(("previous", "induction", "first"), BADGES[r.model], strict=True)
    return {name: numbers(scores) for name, scores in named}


def compare_part(r):
    """The other model's view of the same tokens."""
    other = r.other
    if other is None:
        raise ValueError("compare needs another model: name it as other")
    if other.tokenizer.to_dict() != r.loaded.tokenizer.to_dict():
        raise ValueError("the two models have different tokenizers: compare models that share one")
    if len(r.ids) > other.model.config.block_size:
        raise ValueError(
            f"the text has {len(r.ids)} tokens but the other model has "
            f"block_size={other.model.config.block_size}: shorten it"
        )
    with torch.no_grad():
        logits = other.model(r.idx[None].to(other.model.device))[0][0]
    logprob, rank, _ = tracing.surprise(logits, r.idx.to(other.model.device))
    ids, logprobs = tracing.likeliest(logits[-1], r.k)
    texts = texts_of(r.loaded.tokenizer, ids.tolist())
    likeliest = {"ids": ids.tolist(), "texts": texts, "logprobs": numbers(logprobs)}
    return {"logprob": [None, *numbers(logprob)], "rank": [None, *rank.tolist()], **likeliest}


def matches_part(r):
    from glass import matches

    state = r.loaded.state
    name = r.body.get("dataset") or (state["settings"].get("dataset") if state else None)
    if not isinstance(name, str) or not matches.is_dataset(name):
        raise ValueError(f"dataset={name!r:.60} is no prepared text: prepare.py makes one")
    index = matches.open_index(name)
    if index.dataset.tokenizer.to_dict() != r.loaded.tokenizer.to_dict():
        raise ValueError(f"dataset={name} has another tokenizer than the model: name its own")
    found = matches.longest_matches(index, r.ids)
    length, _ = found[r.position]
    start = r.position + 1 - length
    places = matches.places(index, r.ids[start : r.position + 1]) if length else []
    lengths, counts = map(list, zip(*found, strict=True))
    return {"dataset": name, "lengths": lengths, "counts": counts, "places": places}


def class_part(r):
    """For a classifier: the probability of each class, and what each token pushed to one."""
    if not r.model.config.n_classes or not r.loaded.state:
        raise ValueError("class needs a classifier: finetune.py --task=classify makes one")
    labels = r.loaded.state["task"]["labels"]
    last = len(r.ids) - 1
    with torch.no_grad():
        logits = r.model.classify(r.idx[None], torch.tensor([last + 1], device=r.model.device))[0]
    chosen = r.integer("token", int(logits.argmax()), 0, len(labels) - 1)
    by_token = tracing.token_pushes(r.found, last, chosen)
    probs = numbers(logits.softmax(-1))
    return {"labels": labels, "probs": probs, "class": chosen, "by_token": numbers(by_token)}


PARTS = {
    "tokens": tokens_part,
    "surprise": surprise_part,
    "likeliest": likeliest_part,
    "logits": logits_part,
    "thumbnails": thumbnails_part,
    "attention": attention_part,
    "lens": lens_part,
    "pushes": pushes_part,
    "switched_off": switched_off_part,
    "badges": badges_part,
    "compare": compare_part,
    "matches": matches_part,
    "class": class_part,
}


def respond(loaded, body, other=None):
    """The answer to a request, a dict with the ids and one entry for each part.

    loaded, other: glass.loading.Loaded. Raises ValueError for a request that is not as the table says.
    """
    request = Request(loaded, body)
    request.other = other
    answer = {"ids": request.ids}
    return answer | {part: PARTS[part](request) for part in request.parts}
