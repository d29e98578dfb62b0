"""Knowledge distillation: a model learns what others predict, beside what the text says.

Many tokens could come next at each place, and the text shows one. What several models
predict on average, or the counts of n-grams elsewhere in the text, says more, and is hard to learn
by heart. Sources: Hinton et al. 2015, arXiv:1503.02531; an ensemble into one model of the same size
where text is short, Kim et al. 2025, arXiv:2509.14786.
"""

import difflib
from pathlib import Path

import torch
import torch.nn.functional as F

from glass.device import free_memory
from glass.ngrams import ngram_probs
from glass.weights import load_model

NGRAMS = "ngrams"


class Teachers:
    """Trained models, runs or published weights, which are only read; and counts of n-grams."""

    def __init__(self, names, tokenizer, windows, device):
        """names: folders of models, or "ngrams" for counts of the text that `windows` are cut from.

        Raises ValueError if a model has other tokens than `tokenizer` or a shorter block, or if
        there is no memory for the counts.
        """
        self.models, self.by_counts, block_size = [], None, windows.T
        for folder in names:
            if folder == NGRAMS:
                continue
            check_name(folder, names)
            model, its_tokenizer, _ = load_model(folder)
            if its_tokenizer.to_dict() != tokenizer.to_dict():
                raise ValueError(
                    f"teachers: {folder} has other tokens than the dataset: name a run on this dataset"
                )
            if model.config.block_size < block_size:
                raise ValueError(
                    f"teachers: {folder} has block_size={model.config.block_size}, and this run "
                    f"{block_size}: add --block_size={model.config.block_size}"
                )
            self.models.append(model.to(device).eval().requires_grad_(False))
        if NGRAMS in names:
            check_counts(sum(map(len, windows.shards)), tokenizer.vocab_size)
            text = torch.from_numpy(windows.text())
            self.by_counts = ngram_probs(text, tokenizer.vocab_size)  # (tokens, V) float16

    @torch.no_grad()
    def probs(self, idx, places):
        """Their mean probabilities of each next token: idx (B, T) -> (B, T, V) float32.

        places (B,): where in the training text the rows begin.
        """
        found = [model(idx)[0].softmax(-1) for model in self.models]  # (B, T, V) each
        if self.by_counts is not None:
            following = places[:, None] + torch.arange(1, idx.shape[1] + 1)  # (B, T)
            found.append(self.by_counts[following].to(idx.device).float())
        return sum(found) / len(found)


def check_name(name, names):
    """ValueError for a name of a teacher that was mistyped."""
    if not name:
        raise ValueError(f"teachers={','.join(names)} has an empty name: leave out a comma")
    if not Path(name).exists() and difflib.get_close_matches(name.lower(), [NGRAMS]):
        raise ValueError(f"teachers: {name} is no folder: did you mean {NGRAMS}?")


def check_counts(n_tokens, vocab_size):
    """ValueError where ngram_probs would need more memory than there is."""
    needed, free = 12 * n_tokens * vocab_size, free_memory(torch.device("cpu"))
    if free is not None and needed > free:
        raise ValueError(
            f"teachers: {NGRAMS} of {n_tokens:,} tokens of {vocab_size:,} kinds need "
            f"{needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free: take a shorter text, or "
            "characters"
        )


def distillation_loss(logits, targets, probs, weight):
    """(1 - weight) x cross-entropy of the targets + weight x that of the teachers' probs, in nats.

    logits and probs (B, T, V), targets (B, T), all scored; a mean over tokens.
    """
    logprobs = logits.log_softmax(-1)
    of_text = F.nll_loss(logprobs.flatten(0, 1), targets.flatten())
    of_teachers = -(probs * logprobs).sum(-1).mean()
    return (1 - weight) * of_text + weight * of_teachers
