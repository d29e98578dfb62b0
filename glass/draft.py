"""Guesses of the next tokens from the text itself, which the model checks several at a time.

Reading all weights takes most of a decoding step, and eight tokens can share it. Where a text
repeats itself, what followed the last time is a good guess. The text is the same as without
guesses: a token is drawn at every position, from the same logits by the same random numbers, and a
guess counts where it equals what was drawn. The logits are the same to the bit where kernels.c makes
them, elsewhere up to rounding. Source: Saxena 2023,
github.com/apoorvumang/prompt-lookup-decoding, the simplest speculative decoding (arXiv:2211.17192).
"""

import torch

LOOKED_UP = (8, 3)  # the last tokens whose earlier occurrence is looked for, long ones first
FEW, MANY = 3, 7  # guesses: a step of at most eight tokens


class PromptLookup:
    """In the place of model.decode, for the one text of `rows` (glass/generate.py's Rows).

    `decode` takes ids (1, T) and a cache to logits (1, T, V).
    """

    def __init__(self, decode, rows):
        self.decode, self.rows = decode, rows
        self.cache = None
        self.ahead = []  # the guesses that are still open: (id, logits (1, V) of the token after it)
        self.was_right = False  # whether the last guesses were, to the end

    def __call__(self, ids, cache):
        """The logits (1, V) of the token after ids (1,), with the cache that `decode` has."""
        if cache is not self.cache:  # the text was read anew
            self.cache, self.ahead = cache, []
        if self.ahead and self.ahead[0][0] == int(ids):
            logits = self.ahead.pop(0)[1]
            self.was_right = not self.ahead
            return logits
        cache.length -= len(self.ahead)  # the keys and values of wrong guesses are overwritten
        self.was_right = self.was_right and not self.ahead
        room = cache.max_len - cache.length - 1
        guesses = self.guesses(max(0, min(room, MANY if self.was_right else FEW)))
        logits = self.decode(torch.cat([ids, guesses])[None], cache)[0]  # (1 + guesses, V)
        self.ahead = list(zip(guesses.tolist(), logits[1:, None], strict=True))
        return logits[:1]

    def guesses(self, most):
        """Up to `most` ids that followed where the text's last ids stood before, as (n,) int64.

        What reaches the end of the text goes on from there: a repetition goes on repeating.
        """
        text = self.rows.text[0, : int(self.rows.lengths)]
        for n in LOOKED_UP:
            if len(text) > n:
                earlier = text[:-1].unfold(0, n, 1)  # (len(text) - n, n)
                found = (earlier == text[-n:]).all(1).nonzero()
                if len(found):
                    first = int(found[-1]) + n
                    period = len(text) - first
                    return text[first + torch.arange(most, device=text.device) % period]
        return text[:0]
