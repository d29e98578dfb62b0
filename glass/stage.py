"""What the stages of finetune.py share: their examples, the order of these, and two baselines.

A stage is a task as glass/run.py describes it. Its examples are made from rows of supervised data.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from glass.chat import encode_chat, messages_of, stop_ids, template_for
from glass.device import Processes
from glass.generate import answer, padded
from glass.progress import say
from glass.records import StepOrder, spread


class Stage:
    """A task on examples of three splits. The four stages of finetune.py extend it.

    `loss` gets the examples of a micro-step and those of the whole step. It divides by what the
    whole step holds, so the losses of the micro-steps add up to that of the step.
    """

    script = "finetune.py"

    def __init__(self, settings, records, model, tokenizer, processes=None):
        s = settings
        self.settings, self.records, self.device = s, records, model.device
        self.tokenizer, self.data_sha256 = tokenizer, records.sha256
        self.template = template_for(tokenizer) if s.template == "auto" else s.template
        self.stop = stop_ids(tokenizer)
        self.longest = min(s.block_size, model.config.block_size)  # tokens of an example
        self.test_before = {}  # figures of the test split before training
        self.noted = []  # figures of the steps since the last line of the log
        self.processes = processes or Processes()
        self.examples = {split: self.encode(rows, split) for split, rows in records.splits.items()}
        for split, rows in records.splits.items():
            self.say_unknown(rows, split)
        for split in ("train", "val"):
            if not self.examples[split]:
                raise ValueError(
                    f"no {split} row is left with block_size={s.block_size}: "
                    "raise it, lower answer_tokens, or add rows"
                )
        lengths = [self.length(example) for example in self.examples["train"]]
        self.rows_per_step = s.batch_size * s.gradient_accumulation_steps
        self.order = StepOrder(lengths, self.rows_per_step, s.seed)
        self.tokens_per_step = int(self.rows_per_step * np.mean(lengths))

    def begin(self, model):
        """Remember what the stage needs of the model at the start: by default, nothing."""

    def state(self):
        """What a checkpoint keeps of the stage, as a dict."""
        return {"template": self.template, "test_before": self.test_before}

    def restore(self, model, saved):
        """Take back what `state` gave."""
        self.test_before = saved.get("test_before", {})

    def note(self, **figures):
        """Keep the figures of a step for the next line of the log."""
        self.noted.append(figures)

    def take_figures(self):
        """The mean of each figure noted since the last call, as a dict by name."""
        noted, self.noted = self.noted, []
        names = noted[0] if noted else ()
        return {name: sum(figures[name] for figures in noted) / len(noted) for name in names}

    def length(self, example):
        """The number of tokens of an example."""
        return len(example.ids)

    def rows(self, first, count):
        """`count` examples from row `first` on, of one step, as a list."""
        step, place = divmod(first, self.rows_per_step)
        return self.step_rows(step)[place : place + count]

    def step_rows(self, step):
        """All examples of a step, over all processes, as a list."""
        return [self.examples["train"][i] for i in self.order.of_step(step)]

    def batches(self, examples, batch_size=None):
        """The examples in batches of similar length, for an evaluation: a list of lists."""
        examples = sorted(examples, key=self.length)
        n = batch_size or 2 * self.settings.batch_size
        return [examples[i : i + n] for i in range(0, len(examples), n)]

    def val_examples(self, n_rows):
        """The validation examples, or n_rows of them, evenly spaced."""
        examples = self.examples["val"]
        return examples if n_rows is None else spread(examples, n_rows)

    def say_unknown(self, rows, split):
        """Say how many rows hold characters that the tokenizer does not know, if any do."""
        find = self.tokenizer.unknown_characters
        unknown = [[each for text in texts_of(row) for each in find(text)] for _, row in rows]
        if n := sum(map(bool, unknown)):
            such = next(filter(None, unknown))[0]
            say(
                f"{n} of {len(rows)} {split} rows hold characters that the tokenizer does not know, "
                f"such as {such!r}"
            )

    def say_left_out(self, n_rows, n_kept, split, why):
        """Say how many rows of a split were left out, if any were, and why."""
        if n_kept < n_rows:
            left_out = f"{n_rows - n_kept} of {n_rows} {split} rows are left out"
            say(f"{left_out}: {why}")


def texts_of(row):
    """All that a row says, as a list of texts."""
    keys = ("text", "instruction", "input", "output", "chosen", "rejected")
    texts = [row.get(key) or "" for key in keys]
    return texts + [message["content"] for message in row.get("messages", ())]


class Answered(NamedTuple):
    """A conversation as tokens, for training on its answers."""

    ids: list  # tokens of the conversation
    is_answer: list  # one bool per token: whether the assistant says it
    row: dict  # the row it was made from


def answer_logprobs(model, examples):
    """(logprobs, is_scored) of Answered examples, (B, T - 1) each.

    logprobs holds the log-probability of every answer token, given all tokens before it, and 0
    where nothing is scored. Only scored positions are projected to the vocabulary.
    """
    idx, _ = padded([example.ids for example in examples], model.device)  # (B, T)
    is_answer, _ = padded([example.is_answer for example in examples], model.device)  # (B, T)
    is_scored = is_answer[:, 1:].bool()  # (B, T - 1)
    logits = model.head(model.hidden(idx[:, :-1])[is_scored]).float()  # (scored, V)
    logprobs = -F.cross_entropy(logits, idx[:, 1:][is_scored], reduction="none")  # (scored,)
    zeros = torch.zeros(is_scored.shape, device=logprobs.device)
    return zeros.masked_scatter(is_scored, logprobs), is_scored


def prompt_of(tokenizer, template, row):
    """The ids of a row's conversation up to where its answer begins."""
    return encode_chat(tokenizer, messages_of(row, template)[:-1], template, reply=True)[0]


def ask(model, tokenizer, template, rows, longest):
    """The model's greedy answers to rows, each of at most `longest` tokens: a list of Answered.

    What a row answers itself is left out; the answer takes its place.
    """
    prompts = [prompt_of(tokenizer, template, row) for row in rows]
    answers = answer(model, prompts, stop_ids(tokenizer), longest, temperature=0)
    return [
        Answered(prompt + ids, [False] * len(prompt) + [True] * len(ids), row)
        for prompt, ids, row in zip(prompts, answers, rows, strict=True)
    ]


def answer_text(tokenizer, answered):
    """The text of the answers in an Answered, without the tokens that end them."""
    stop = stop_ids(tokenizer)
    pairs = zip(answered.ids, answered.is_answer, strict=True)
    return tokenizer.decode([token for token, counts in pairs if counts and token not in stop])


@torch.no_grad()
def mean_logprobs(model, answers):
    """The mean log-probability of the answers' tokens, for a list of Answered: (answers,).

    Of more tokens than the model's block, the last ones count. The model is in evaluation mode
    meanwhile.
    """
    was_training, T, means = model.training, model.config.block_size, []
    model.eval()
    for first in range(0, len(answers), 64):
        batch = [
            each._replace(ids=each.ids[-T:], is_answer=each.is_answer[-T:])
            for each in answers[first : first + 64]
        ]
        logprobs, is_scored = answer_logprobs(model, batch)  # (b, T - 1)
        means.append((logprobs.sum(1) / is_scored.sum(1).clamp(min=1)).cpu())
    model.train(was_training)
    return torch.cat(means)


def bag_of_tokens(train_examples, test_examples, vocab_size):
    """The test accuracy of a logistic regression on which tokens occur in a text, in any order.

    An example is a pair of ids and label.
    """

    def occurrences(examples):
        """Sparse (examples, V + 1): 1 where a token occurs. The last column, all 1, is a bias."""
        places = []
        for row, (ids, _) in enumerate(examples):
            places += [(row, token) for token in {*ids, vocab_size}]
        indices, ones = torch.tensor(places).T, torch.ones(len(places))
        shape = (len(examples), vocab_size + 1)
        return torch.sparse_coo_tensor(indices, ones, shape, check_invariants=True).coalesce()

    def labels(examples):
        """The labels of examples: (examples,) int64."""
        return torch.tensor([label for _, label in examples])

    seen, wanted = occurrences(train_examples), labels(train_examples)
    w = torch.zeros(vocab_size + 1, int(wanted.max()) + 1, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        """The regularised loss, with its gradient in w."""
        solver.zero_grad()
        fit = F.cross_entropy(torch.sparse.mm(seen, w), wanted)
        total = fit + w.square().sum() / len(wanted)
        total.backward()
        return total

    solver.step(loss)
    predicted = torch.sparse.mm(occurrences(test_examples), w).argmax(-1)
    return (predicted == labels(test_examples)).float().mean().item()


def labels_of(records):
    """The sorted list of classes of the training rows. Raises ValueError if there is only one."""
    labels = sorted({fields["label"] for _, fields in records.splits["train"]})
    if len(labels) < 2:
        raise ValueError(
            f"the training rows have one class only, {labels[0]!r}, but need at least two: "
            "add rows of another"
        )
    return labels
