"""How likely a model finds given text: log-likelihoods of endings, and of whole texts in windows.

Both share what many items have in common. Endings of one context read its keys and values from one
cache, only positions that are scored reach the head, and rows of similar length share a batch. On
GPT-2's shape, four endings of 20 tokens after 100 take 2.7 times fewer tokens than four whole rows.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch

from glass.generate import padded

BATCH_TOKENS = 4096  # of one forward pass, padding included
HEAD_ROWS = 512  # positions whose logits exist at once: 100 MB for GPT-2's vocabulary


@dataclass
class Score:
    """What a model makes of one ending."""

    logprob: float  # summed over the ending's tokens, in nats
    is_greedy: bool  # whether each of its tokens was the likeliest


def encode_pair(tokenizer, context, ending):
    """(context ids, ending ids) of two texts that follow each other; the context may be empty.

    Spaces at the end of the context move to the ending, since tokens of words begin with them. The
    ids are those of the whole text, cut where the context alone would end, as lm-evaluation-harness
    does it. An empty context becomes the id that begins a text.
    """
    stripped = context.rstrip()
    ending = context[len(stripped) :] + ending
    if not stripped:
        return beginning(tokenizer), tokenizer.encode(ending)
    whole, n_context = tokenizer.encode(stripped + ending), len(tokenizer.encode(stripped))
    return whole[:n_context], whole[n_context:]


def beginning(tokenizer):
    """The id that begins a text, as a list: empty if the tokenizer has none."""
    names = ("<|endoftext|>", "<|begin_of_text|>", "<s>")
    special = tokenizer.special_tokens
    begins = getattr(tokenizer, "bos_id", None)
    if begins is not None:
        return [begins]
    return [special[name] for name in names if name in special][:1]


@torch.no_grad()
def token_logprobs(model, hidden, targets):
    """(log-probabilities (N,), is likeliest (N,)) of targets (N,) after hidden states (N, C).

    Both are on the CPU, the first in float64. The logits are float32.
    """
    logprobs, is_likeliest = [], []
    for x, target in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logits = model.head(x).float()  # (n, V)
        chosen = logits.gather(1, target[:, None])[:, 0]
        logprobs.append((chosen - logits.logsumexp(-1)).double().cpu())
        is_likeliest.append((logits.argmax(-1) == target).cpu())
    return torch.cat(logprobs), torch.cat(is_likeliest)


def batches_by_length(lengths):
    """Lists of indices of rows: similar lengths together, at most BATCH_TOKENS when padded."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    first = 0
    while first < len(order):
        rows = max(1, BATCH_TOKENS // max(1, lengths[order[first]]))
        yield order[first : first + rows]
        first += rows


@torch.no_grad()
def score_rows(model, rows):
    """The log-probabilities of the last tokens of each row.

    rows: a list of (ids, n), n of the ids at the end to be scored, at most len(ids) - 1. Gives a
    list of (log-probabilities (n,) float64, is likeliest (n,)).
    """
    scores = [None] * len(rows)
    for chosen in batches_by_length([len(ids) - 1 for ids, _ in rows]):
        idx, _ = padded([rows[i][0][:-1] for i in chosen], model.device)  # (B, T)
        x = model.hidden(idx)  # (B, T, C)
        counts = [rows[i][1] for i in chosen]
        hidden, targets = [], []
        for b, i in enumerate(chosen):
            ids, n = rows[i]
            hidden.append(x[b, len(ids) - 1 - n : len(ids) - 1])  # (n, C)
            targets += ids[len(ids) - n :]
        logprobs, is_likeliest = token_logprobs(
            model, torch.cat(hidden), torch.tensor(targets, device=model.device)
        )
        parts = zip(chosen, logprobs.split(counts), is_likeliest.split(counts), strict=True)
        for i, logprob, likeliest in parts:
            scores[i] = logprob, likeliest
    return scores


@torch.no_grad()
def score_endings(model, pairs):
    """The Score of each pair (context ids, ending ids), neither of them empty, as a list.

    A context with several endings is read once. A context and its ending must fit into the block.
    """
    endings_of = defaultdict(list)  # context: the indices of its pairs
    for i, (context, _) in enumerate(pairs):
        endings_of[tuple(context)].append(i)
    scores = [None] * len(pairs)
    alone = [group[0] for group in endings_of.values() if len(group) == 1]
    rows = [(pairs[i][0] + pairs[i][1], len(pairs[i][1])) for i in alone]
    for i, (logprobs, is_likeliest) in zip(alone, score_rows(model, rows), strict=True):
        scores[i] = Score(float(logprobs.sum()), bool(is_likeliest.all()))
    shared = [group for group in endings_of.values() if len(group) > 1]
    widths = [len(pairs[group[0]][0]) + sum(len(pairs[i][1]) for i in group) for group in shared]
    for chosen in batches_by_length(widths):
        for i, score in score_groups(model, pairs, [shared[g] for g in chosen]).items():
            scores[i] = score
    return scores


def score_groups(model, pairs, groups):
    """The Scores, by index into pairs, of groups of indices whose pairs share their context."""
    device = model.device
    longest = max(len(pairs[group[0]][0]) for group in groups)
    longest += max(len(pairs[i][1]) for group in groups for i in group) - 1
    if longest > model.config.block_size and len(groups) > 1:  # padded, they do not fit together
        return {
            i: score for group in groups for i, score in score_groups(model, pairs, [group]).items()
        }
    contexts, lengths = padded([pairs[group[0]][0] for group in groups], device)  # (G, Tc), (G,)
    members = [i for group in groups for i in group]  # of every group, in order: B in all
    source = torch.tensor([g for g, group in enumerate(groups) for _ in group], device=device)
    endings, counts = padded([pairs[i][1] for i in members], device)  # (B, Te), (B,)
    cache = model.new_cache(len(groups), longest)
    x = model.hidden(contexts, cache)  # (G, Tc, C)
    x = x[torch.arange(len(groups), device=device), lengths - 1][source][:, None]  # (B, 1, C)
    if endings.shape[1] > 1:
        cache.set_rows(lengths[source], source)
        x = torch.cat([x, model.hidden(endings[:, :-1], cache)], dim=1)  # (B, Te, C)
    is_scored = torch.arange(endings.shape[1], device=device) < counts[:, None]  # (B, Te)
    logprobs, is_likeliest = token_logprobs(model, x[is_scored], endings[is_scored])
    parts = zip(
        members, logprobs.split(counts.tolist()), is_likeliest.split(counts.tolist()), strict=True
    )
    return {i: Score(float(logprob.sum()), bool(greedy.all())) for i, logprob, greedy in parts}


def windows_of(ids, begin, block_size, stride):
    """Rows (ids, n) for `score_rows` that score every token of a text once.

    begin: the id before the text, as a list; without one, the first token is not scored. The first
    window scores all its tokens, each further one the next `stride`, with as many tokens before
    them as fit. With stride=block_size, these are lm-evaluation-harness's windows.
    """
    before = list(begin) or list(ids[:1])
    ids = list(ids) if begin else list(ids[1:])
    whole = before + ids
    done = min(block_size, len(ids))
    rows = [(whole[: done + 1], done)] if ids else []
    while done < len(ids):
        n = min(stride, len(ids) - done)
        done += n
        rows.append((whole[max(0, done - block_size) : done + 1], n))
    return rows


def text_logprobs(model, tokenizer, text, stride=None):
    """(ids, log-probabilities) of a text: every id that is scored, and a float64 tensor (n,)."""
    begin, ids = beginning(tokenizer), tokenizer.encode(text)
    block_size = model.config.block_size
    if stride and stride > block_size:
        raise ValueError(f"stride={stride} must be at most block_size={block_size}")
    rows = windows_of(ids, begin, block_size, stride or block_size)
    nothing = torch.empty(0, dtype=torch.float64)
    logprobs = torch.cat([nothing, *(logprobs for logprobs, _ in score_rows(model, rows))])
    return (ids if begin else ids[1:]), logprobs
