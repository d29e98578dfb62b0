"""Knowledge distillation: a model learns what others predict, beside what the text says.

After a short text, many next tokens are possible, and the text shows one. The mean prediction of
several models says more, and is hard to learn by heart. Sources: Hinton et al. 2015,
arXiv:1503.02531; an ensemble into one model of the same size where text is short, Kim et al. 2025,
arXiv:2509.14786.
"""

import torch
import torch.nn.functional as F

from glass.weights import load_model


class Teachers:
    """The trained models in `folders`, runs or published weights, which are only read."""

    def __init__(self, folders, tokenizer, block_size, device):
        """Raises ValueError if one has other tokens than `tokenizer`, or a shorter block."""
        self.models = []
        for folder in folders:
            model, own, _ = load_model(folder)
            if own.to_dict() != tokenizer.to_dict():
                raise ValueError(
                    f"teachers: {folder} has other tokens than the dataset: name its own"
                )
            if model.config.block_size < block_size:
                raise ValueError(
                    f"teachers: {folder} has block_size={model.config.block_size}, and this run "
                    f"{block_size}: add --block_size={model.config.block_size}"
                )
            self.models.append(model.to(device).eval().requires_grad_(False))

    @torch.no_grad()
    def probs(self, idx):
        """Their mean probabilities of each next token: idx (B, T) -> (B, T, V) float32."""
        return sum(model(idx)[0].softmax(-1) for model in self.models) / len(self.models)


def distillation_loss(logits, targets, probs, weight):
    """(1 - weight) x cross-entropy of the targets + weight x that of the teachers' probs, in nats.

    logits and probs (B, T, V), targets (B, T), all scored; a mean over tokens.
    """
    logprobs = logits.log_softmax(-1)
    of_text = F.nll_loss(logprobs.flatten(0, 1), targets.flatten())
    of_teachers = -(probs * logprobs).sum(-1).mean()
    return (1 - weight) * of_text + weight * of_teachers
