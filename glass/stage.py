"""What the stages of finetune.py share: their examples, the steps these are dealt out in, and two
baselines.

A stage is a task as listed in glass/run.py. Its examples are made from the rows of supervised data.
"""

import runpy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from glass.chat import stop_ids, template_for
from glass.generate import padded
from glass.progress import say
from glass.records import StepOrder, spread


class Stage:
    """A task on examples of three splits; finetune.py's four stages extend it.

    Its `loss` gets the examples of a micro-step and those of the whole step, and divides by what
    the whole step holds, so that micro-steps add up.
    """

    script = "finetune.py"

    def __init__(self, settings, records, model, tokenizer):
        s = settings
        self.settings, self.records, self.device = s, records, model.device
        self.tokenizer, self.data_sha256 = tokenizer, records.sha256
        self.template = template_for(tokenizer) if s.template == "auto" else s.template
        self.stop = stop_ids(tokenizer)
        self.longest = min(s.block_size, model.config.block_size)  # tokens of an example
        self.test_before = {}  # the test's figures before training
        self.noted = []  # figures of the steps since the last line of the log
        self.examples = {split: self.encode(rows, split) for split, rows in records.splits.items()}
        for split in ("train", "val"):
            if not self.examples[split]:
                raise ValueError(
                    f"no {split} row is left: raise block_size={s.block_size}, lower answer_tokens, "
                    "or add rows"
                )
        lengths = [self.length(example) for example in self.examples["train"]]
        self.rows_per_step = s.batch_size * s.gradient_accumulation_steps
        self.order = StepOrder(lengths, self.rows_per_step, s.seed)
        self.tokens_per_step = int(self.rows_per_step * np.mean(lengths))

    def begin(self, model):
        pass

    def state(self):
        return {"template": self.template, "test_before": self.test_before}

    def restore(self, model, saved):
        self.test_before = saved.get("test_before", {})

    def note(self, **figures):
        """Keep figures of a step for the log."""
        self.noted.append(figures)

    def take_figures(self):
        """The means of what was noted since the last call."""
        noted, self.noted = self.noted, []
        names = noted[0] if noted else ()
        return {name: sum(figures[name] for figures in noted) / len(noted) for name in names}

    def length(self, example):
        """Tokens of an example."""
        return len(example.ids)

    def rows(self, first, count):
        """The examples of a whole step, which begins at row `first`."""
        places = self.order.of_step(first // self.rows_per_step)
        return [self.examples["train"][i] for i in places]

    def batches(self, examples, batch_size=None):
        """The examples in batches of similar length, for an evaluation."""
        examples = sorted(examples, key=self.length)
        n = batch_size or 2 * self.settings.batch_size
        return [examples[i : i + n] for i in range(0, len(examples), n)]

    def val_examples(self, few):
        """The validation examples, or a few of them, evenly spaced."""
        return self.examples["val"] if few is None else spread(self.examples["val"], few)

    def say_left_out(self, n_rows, n_kept, split, why):
        if n_kept < n_rows:
            say(
                f"{n_rows - n_kept} of {n_rows} {split} rows are left out: {why} block_size={self.longest}"
            )


class Answered(NamedTuple):
    ids: list  # tokens of the conversation
    is_answer: list  # which of them the assistant says: a bool each
    row: dict  # what it was made from


def answer_logprobs(model, examples):
    """Log-probability of every answer token of Answered examples, given all tokens before it.

    Gives (logprobs, is_scored), (B, T - 1) each; logprobs is 0 where nothing is scored. Only scored
    positions are projected to the vocabulary.
    """
    idx, _ = padded([example.ids for example in examples], model.device)  # (B, T)
    is_scored = padded([example.is_answer for example in examples], model.device)[0][:, 1:].bool()
    logits = model.head(model.hidden(idx[:, :-1])[is_scored]).float()  # (scored, V)
    logprobs = -F.cross_entropy(logits, idx[:, 1:][is_scored], reduction="none")  # (scored,)
    zeros = torch.zeros(is_scored.shape, device=logprobs.device)
    return zeros.masked_scatter(is_scored, logprobs), is_scored


def bag_of_tokens(train_examples, test_examples, vocab_size):
    """Test accuracy of a logistic regression that sees which tokens occur in a text, not their
    order.
    """

    def occurrences(examples):
        """1 where a token occurs in an example, in a sparse (examples, V + 1); the last column is a
        bias.
        """
        places = [
            (row, token) for row, (ids, _) in enumerate(examples) for token in {*ids, vocab_size}
        ]
        indices, ones = torch.tensor(places).T, torch.ones(len(places))
        shape = (len(examples), vocab_size + 1)
        return torch.sparse_coo_tensor(indices, ones, shape, check_invariants=True).coalesce()

    def labels(examples):
        return torch.tensor([label for _, label in examples])

    seen, wanted = occurrences(train_examples), labels(train_examples)
    w = torch.zeros(vocab_size + 1, int(wanted.max()) + 1, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        fit = F.cross_entropy(torch.sparse.mm(seen, w), wanted)
        total = fit + w.square().sum() / len(wanted)
        total.backward()
        return total

    solver.step(loss)
    predicted = torch.sparse.mm(occurrences(test_examples), w).argmax(-1)
    return (predicted == labels(test_examples)).float().mean().item()


def labels_of(records):
    """The classes of the training rows, sorted."""
    labels = sorted({fields["label"] for _, fields in records.splits["train"]})
    if len(labels) < 2:
        raise ValueError(
            f"the training rows have one class only, {labels[0]!r}: two are needed; "
            "add rows of another"
        )
    return labels


def read_reward(path):
    """The function `reward` of a Python file, or None without one."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(
            f"reward={path} does not exist: give a Python file with reward(prompt, answer) -> float"
        )
    reward = runpy.run_path(path).get("reward")
    if not callable(reward):
        raise ValueError(f"reward={path} has no function reward(prompt, answer): define it")
    return reward
