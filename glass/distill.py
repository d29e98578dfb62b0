"""Knowledge distillation: a model learns what others predict, beside what the text says.

Many tokens could come next at each place, and the text shows one. What several models
predict on average, or the counts of n-grams elsewhere in the text, says more, and is hard to learn
by heart. Sources: Hinton et al. 2015, arXiv:1503.02531; an ensemble into one model of the same size
where text is short, Kim et al. 2025, arXiv:2509.14786.
"""

import difflib
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from glass.device import free_memory
from glass.ngrams import ngram_probs
from glass.starting import check_same_tokens
from glass.weights import load_model, weights_sha256

NGRAMS = "ngrams"


class Teachers:
    """Trained models, runs or published weights, which are only read; and counts of n-grams."""

    def __init__(self, names, tokenizer, windows, device):
        """names: folders of models, or "ngrams" for counts of the text that `windows` are cut from.

        Raises ValueError if a model has other tokens than `tokenizer` or a shorter block, or if
        there is no memory for the counts.
        """
        self.models, self.by_counts = {}, None
        for folder in names:
            if folder != NGRAMS:
                model = load_teacher(folder, tokenizer, windows.T)
                self.models[folder] = model.to(device).eval().requires_grad_(False)
        self.sha256 = {folder: weights_sha256(model) for folder, model in self.models.items()}
        if NGRAMS in names:
            check_counts(sum(map(len, windows.shards)), tokenizer.vocab_size)
            text = torch.from_numpy(windows.text())
            self.by_counts = ngram_probs(text, tokenizer.vocab_size)  # (tokens, V) float16

    @torch.no_grad()
    def probs(self, idx, places):
        """Their mean probabilities of each next token: idx (B, T) -> (B, T, V) float32.

        places (B,): where in the training text the rows begin.
        """
        found = [model(idx)[0].softmax(-1) for model in self.models.values()]
        if self.by_counts is not None:
            following = places[:, None] + torch.arange(1, idx.shape[1] + 1)  # (B, T)
            found.append(self.by_counts[following].to(idx.device).float())
        return sum(found) / len(found)  # of (B, T, V) each


def teacher_names(teachers):
    """The names that the setting joins by commas, as a list."""
    names = [name.strip() for name in teachers.split(",")]
    if "" in names:
        raise ValueError(f"teachers={teachers} has an empty name: leave out a comma")
    return names


def load_teacher(folder, tokenizer, block_size):
    """A model with the tokens of `tokenizer` and at least block_size positions, else ValueError."""
    if not Path(folder).exists() and difflib.get_close_matches(folder.lower(), [NGRAMS]):
        raise ValueError(f"teachers: {folder} is no folder: did you mean {NGRAMS}?")
    try:
        model, its_tokenizer, _ = load_model(folder)
        check_same_tokens(tokenizer, its_tokenizer, folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"teachers: {error}") from error
    config = model.config
    if config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"teachers: {folder} predicts {config.vocab_size:,} tokens, and the dataset has "
            f"{tokenizer.vocab_size:,}: name a run on this dataset"
        )
    if config.block_size < block_size:
        raise ValueError(
            f"teachers: {folder} has block_size={config.block_size}, and this run {block_size}: "
            f"add --block_size={config.block_size}"
        )
    return model


def check_counts(n_tokens, vocab_size):
    """ValueError where ngram_probs would need more memory than there is."""
    needed, free = 12 * n_tokens * vocab_size, free_memory(torch.device("cpu"))
    free = free and free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each process counts
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
