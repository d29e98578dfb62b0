"""What counting says of each token of a text: an n-gram model whose counts leave out what it is asked.

The text is cut into parts, and the tokens of a part are predicted from counts of the other parts;
only a few weights of the mixture are fitted on the part itself. So these probabilities say which
tokens were possible, and a model cannot learn the text by heart from them. Source: deleted
interpolation, Jelinek and Mercer 1980, "Interpolated estimation of Markov source parameters from
sparse data".
"""

import torch

ORDER = 6  # tokens of the longest context: more add little to a megabyte of characters
PARTS = 4  # ten know too much of what is said nearby: a higher loss held out
MOST_KINDS = 16  # of successors, that are told apart
ROUNDS = 15  # of expectation maximisation


def ngram_probs(tokens, vocab_size):
    """Probabilities of the next token at each place of a text: (N,) int64 -> (N, V) float16.

    Row i is for token i, given up to ORDER tokens before it.

    After a context of n tokens they are w c + (1 - w) p, where c are the shares of what follows this
    context in the other parts, and p the probabilities after its last n - 1 tokens. The weight w
    depends on how often the context was seen and with how many successors, and makes the part as
    likely as can be. Takes 12 N V bytes while it runs.
    """
    N, V = len(tokens), vocab_size
    probs = torch.full((N, V), 1 / V)
    contexts = torch.zeros(N, dtype=torch.int64)
    for n in range(min(ORDER, N) + 1):
        if n:  # a shorter context and the token before it; V: none
            contexts = contexts * (V + 1) + torch.cat([torch.full((n,), V), tokens[:-n]])
        contexts = torch.unique(contexts, return_inverse=True)[1]  # from 0 on
        totals = count(contexts, tokens, V)
        for part in split(N):
            own, rows = torch.unique(contexts[part], return_inverse=True)
            counts = totals[own] - count(rows, tokens[part], V)  # in the other parts
            shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
            weights = interpolation(counts, shares, rows, tokens[part], probs[part])
            probs[part].lerp_(shares[rows], weights[:, None])
    return probs.half()


def split(N):
    """PARTS slices of about the same length that make up range(N), or N of length 1."""
    n = min(PARTS, N)
    edges = [N * part // n for part in range(n + 1)]
    return [slice(*pair) for pair in zip(edges, edges[1:], strict=False)]


def count(contexts, tokens, vocab_size):
    """How often each token follows each context: (N,) both -> (contexts, V) float32."""
    n_contexts = int(contexts.max()) + 1
    counts = torch.zeros(n_contexts * vocab_size)
    counts.index_add_(0, contexts * vocab_size + tokens, torch.ones(len(tokens)))
    return counts.view(n_contexts, vocab_size)


def interpolation(counts, shares, rows, tokens, probs):
    """The weight of the counts for each token, (N,): one for all contexts that were seen alike.

    counts and shares (contexts, V), rows (N,): the context of each token, probs (N, V) by shorter
    contexts. Expectation maximisation of the likelihood.
    """
    seen, kinds = counts.sum(1), (counts > 0).sum(1)  # tokens that followed, different ones
    half_octave = (2 * seen.clamp(min=1).log2()).long()
    alike = half_octave * (MOST_KINDS + 1) + kinds.clamp(max=MOST_KINDS)  # the number of a group
    alike = alike[rows]  # (N,)
    by_counts, by_shorter = shares[rows, tokens], probs.gather(1, tokens[:, None])[:, 0]
    size = torch.bincount(alike)
    weights = torch.full(size.shape, 0.5)
    for _ in range(ROUNDS):
        w = weights[alike]
        from_counts = w * by_counts / (w * by_counts + (1 - w) * by_shorter)
        weights = (torch.bincount(alike, from_counts) + 1) / (size + 2)
    return weights[alike] * (seen > 0)[rows]
