"""Fine-tune any checkpoint, ours or a published one: `python finetune.py config/finetune_lines.py --key=value`.

    classify   a head on the last token names a class: spam or not, Python or English
    instruct   answers to instructions: the loss is on the answer alone
    prefer     of two answers the chosen one gains likelihood over the rejected one (DPO)
    reinforce  the model's own answers, those with a high reward become more likely (GRPO)

A stage is its rows, their loss and its evaluation; the loop, the optimizers, the checkpoints and the exact resumption are
train.py's. Every stage ends with figures on test data that it has not seen, before and after.
"""

import contextlib
import functools
import json
import math
import os
import runpy
import sys
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

import bpe
import checkpoint
import config
import train
import weights
from model import GPT, GPTConfig, autocast, choose_device, choose_dtype
from progress import Progress, described, draw_confusion, say
from records import read_records

# settings of the model that fine-tuning may choose; the rest comes with what is tuned
OURS = train.FREE | {"lora_rank", "lora_alpha", "lora_targets"}
MARKERS = (bpe.SYSTEM, bpe.USER, bpe.ASSISTANT, bpe.END)


@dataclass
class Settings(train.Settings):
    """train.py's settings, of which the architecture comes from the model that is tuned, and those of the stages."""

    # what to tune, and on what
    task: Literal["classify", "instruct", "prefer", "reinforce"] = "instruct"  # the stage
    init_from: str = "out/pydoc_char"  # a run's folder or published weights (gpt2, a folder); resume: go on in out_dir
    dataset: str = "tasks"  # a name under data/, or a .csv, .tsv, .jsonl or .json file, which is split by the seed
    out_dir: str = "out/finetune"  # the next free name is taken if it holds a run
    val_share: float | None = None  # of the rows; with test_share: all rows are pooled and split anew by the seed
    test_share: float | None = None  # of the rows; None: as prepared, or a tenth where the other is given or for a file
    test_items: int = 500  # test rows that are answered or compared, before and after
    # what is trained
    train: Literal["all", "last_block", "head", "lora"] = "all"  # head: with the last norm and, but for classify, the embedding
    freeze: str = ""  # names of parameters that stay as they are, as in "tok_emb* blocks.[0-2].*"
    # classify
    balance: Literal["none", "undersample", "weights"] = "none"  # classes of equal size, or of equal weight in the loss
    prefix_weight: float = 0.0  # weight of the loss of the class read at every token beside that at the last
    lm_weight: float = 0.0  # weight of the loss of the text itself beside that of the classes
    # instruct, prefer, reinforce
    template: str = "auto"  # markers | alpaca | llama3 | chatml; auto: what the tokenizer has markers of, else alpaca
    exact_match: bool | Literal["auto"] = "auto"  # score answers by equality; auto: where rows name their kind, as in tasks
    answer_tokens: int = 64  # longest answer that the model may give
    eval_answers: int = 200  # validation rows that are answered at an evaluation
    # prefer
    dpo_beta: float = 0.1  # how far the preferences may move the model from where it was
    # reinforce
    reward: str | None = None  # a Python file with reward(prompt, answer) -> float; None: 1 for an exact match, else 0
    group_size: int = 8  # answers to each prompt; batch_size counts prompts
    updates_per_sample: int = 1  # steps on the same answers
    clip: float = 0.2  # how far a token's probability ratio may move within them
    kl_coef: float = 0.0  # weight of the divergence from the model at the start
    # train.py's, with other defaults
    gradient_accumulation_steps: int = 1  # micro-steps of one step
    batch_size: int = 32  # rows of one micro-step
    learning_rate: float = 1e-4  # largest, of AdamW
    min_lr: float = 0.0  # where the cosine ends
    warmup_iters: int = 20  # steps of linear warm-up
    max_iters: int = 500  # steps of the run
    lr_decay_iters: int | None = None  # step at which the cosine reaches min_lr, max_iters where None
    eval_interval: int = 100  # steps between evaluations
    log_interval: int = 10  # steps between lines of metrics.jsonl
    weight_decay: float = 0.0  # of matrices and embeddings

    def __post_init__(self):
        if self.lora_rank and self.train != "lora":
            raise ValueError(f"lora_rank={self.lora_rank} needs train=lora, found train={self.train}: add --train=lora")
        if self.balance != "none" and self.task != "classify":
            raise ValueError(f"balance={self.balance} but task={self.task} has no classes: leave balance out")
        self.lr_decay_iters = self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters
        self.lora_rank = (self.lora_rank or 8) if self.train == "lora" else None
        super().__post_init__()
        for name in ("test_items", "answer_tokens", "eval_answers", "group_size", "updates_per_sample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("prefix_weight", "lm_weight", "dpo_beta", "clip", "kl_coef", "val_share", "test_share"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if (self.val_share or 0) + (self.test_share or 0) >= 1:
            raise ValueError(f"val_share={self.val_share} and test_share={self.test_share} leave nothing to train on")


MEANING = [*train.MEANING, "task", "train", "template", "val_share", "test_share", "balance", "kl_coef"]


def messages_of(row, template):
    """The conversation of an instruction row; in Alpaca's template an input has a heading of its own."""
    if "messages" in row:
        return row["messages"]
    between = "\n\n### Input:\n" if template == "alpaca" else "\n"
    asked = row["instruction"] + (between + row["input"] if row.get("input") else "")
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row.get("output", "")}]


def spread(examples, n):
    """At most n of the examples, evenly spaced."""
    return [examples[i * len(examples) // n] for i in range(n)] if n < len(examples) else examples


def padded(sequences, device):
    """Right-padded: idx (B, T) and lengths (B,). What the padding holds changes nothing, since attention is causal."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    idx = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
    for row, ids in enumerate(sequences):
        idx[row, : len(ids)] = torch.tensor(ids)
    return idx.to(device), lengths.to(device)


def token_logprobs(model, sequences, is_answer):
    """The log-probability of every answer token, given all before it: (B, T - 1), 0 where there is none, and which there
    are, (B, T - 1) bool. Only the positions that are scored are projected to the vocabulary."""
    idx, _ = padded(sequences, model.device)
    scored = padded(is_answer, model.device)[0][:, 1:].bool()  # (B, T - 1)
    logits = model.head(model.hidden(idx[:, :-1])[scored]).float()  # (scored, V)
    logprobs = -F.cross_entropy(logits, idx[:, 1:][scored], reduction="none")
    return torch.zeros(scored.shape, device=logprobs.device).masked_scatter(scored, logprobs), scored


@torch.no_grad()
def give_answers(model, prompts, stop, max_new_tokens, temperature, batch_size=128):
    """The ids that the model answers to each prompt, the stop id last where it gave one; prompts of similar length together."""
    was_training = model.training
    model.eval()
    answers = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        idx, lengths = padded([prompts[i] for i in chosen], model.device)
        new = model.generate(idx, max_new_tokens, temperature=temperature, stop=stop, lengths=lengths)[:, idx.shape[1] :]
        for i, ids in zip(chosen, new.tolist(), strict=True):
            ends = [place for place, token in enumerate(ids) if token in stop]
            answers[i] = ids[: ends[0] + 1] if ends else ids
    model.train(was_training)
    return answers


# The stages.


class Stage(train.Run):
    """What the four stages share: examples of every split, and the endless list of rows that the loop works through.

    Row r is a function of the seed and r alone. An epoch is a permutation of the examples, cut into steps; what does not
    fill a step is left to the next epoch's. Within a step the examples stand by length, so that its micro-steps hold little
    padding: a step of one length would hold few kinds of examples, and learn half as fast.

    A stage's loss(model, rows, all_rows) is that of the rows of a micro-step, divided by what all_rows, those of the whole
    step, hold, so that the micro-steps' losses add up to the step's.
    """

    def __init__(self, settings, records, model, tokenizer, state):
        s = settings
        super().__init__(s, records, None, state, is_main=True)
        self.model = model
        self.template = bpe.template_for(tokenizer) if s.template == "auto" else s.template
        self.stop = bpe.stop_ids(tokenizer)
        self.longest = min(s.block_size, model.config.block_size)
        self.examples = {split: self.encode(rows, split) for split, rows in records.splits.items()}
        for split in ("train", "val"):
            if not self.examples[split]:
                raise ValueError(f"no {split} row is left: raise block_size={s.block_size}, lower answer_tokens, or add rows")
        self.lengths = np.array([self.length(example) for example in self.examples["train"]])
        self.G = s.batch_size * s.gradient_accumulation_steps
        if len(self.lengths) < self.G:
            found = f"batch_size x gradient_accumulation_steps={self.G} but there are {len(self.lengths)} training rows"
            raise ValueError(f"{found}: lower batch_size")
        self.tokens_per_step = int(self.G * self.lengths.mean())
        self.noted = []  # figures of the steps since the last line of the log

    def note(self, **figures):
        self.noted.append(figures)

    def take_figures(self):
        """The means of what was noted since the last call."""
        noted, self.noted = self.noted, []
        return {name: sum(f[name] for f in noted) / len(noted) for name in (noted[0] if noted else ())}

    def length(self, example):
        return len(example[0])

    def rows(self, first, count):
        step = first // self.G
        epoch, place = divmod(step, len(self.lengths) // self.G)
        return [self.examples["train"][i] for i in self.steps_of(epoch)[place]]

    def steps_of(self, epoch):
        """The examples of each step of an epoch: (steps, G)."""
        shuffle = np.random.default_rng((self.settings.seed, epoch))
        steps = shuffle.permutation(len(self.lengths))[: len(self.lengths) // self.G * self.G].reshape(-1, self.G)
        return np.take_along_axis(steps, self.lengths[steps].argsort(axis=1, kind="stable"), axis=1)

    def batches(self, examples, batch_size=None):
        """Examples in batches of similar length, for an evaluation."""
        examples = sorted(examples, key=self.length)
        n = batch_size or 2 * self.settings.batch_size
        return [examples[i : i + n] for i in range(0, len(examples), n)]

    def say_left_out(self, rows, kept, split, why):
        if len(kept) < len(rows):
            say(f"{len(rows) - len(kept)} of {len(rows)} {split} rows are left out: {why} block_size={self.longest}")


class Classify(Stage):
    """Cross-entropy of the classes, read at the last token, the end of the text. An example is (ids, class).

    Two further losses keep the model from memorising a small training set. With prefix_weight every beginning of a text is
    to be classified too (target replication: arXiv:1511.03677). With lm_weight the model goes on learning to
    predict the text (GPT-1's auxiliary objective: Radford et al. 2018). Each is a mean over the tokens of all texts.
    """

    def encode(self, rows, split):
        self.labels = labels_of(self.dataset)
        examples, cut = [], 0
        for where, row in rows:
            if row["label"] not in self.labels:
                found = f"{where}: label={row['label']!r}"
                raise ValueError(f"{found} does not occur in the training rows, {' '.join(self.labels)} do: correct it")
            ids, is_cut = bpe.encode_for_class(self.tokenizer, row["text"], self.longest)
            examples.append((ids, self.labels.index(row["label"])))
            cut += is_cut
        if cut:
            say(f"{cut} of {len(rows)} {split} texts are cut to the block_size={self.longest}")
        return examples

    def further_state(self):
        return {"labels": self.labels}

    @functools.cached_property
    def class_weights(self):
        """What a row of each class weighs in the loss: (n_classes,)."""
        counts = Counter(label for _, label in self.examples["train"])
        balanced = self.settings.balance == "weights"
        return torch.tensor([1 / counts[i] if balanced else 1.0 for i in range(len(self.labels))], device=self.device)

    def loss(self, model, rows, all_rows):
        s, weights_ = self.settings, self.class_weights
        wanted = torch.tensor([label for _, label in rows], device=model.device)
        total = weights_[[label for _, label in all_rows]].sum()
        idx, lengths = padded([ids for ids, _ in rows], model.device)
        hidden = model.hidden(idx)  # (b, T, C)
        logits = model.class_logits(hidden, lengths)
        self.note(accuracy=(logits.argmax(-1) == wanted).float().mean().item())
        loss = F.cross_entropy(logits, wanted, weight=weights_, reduction="sum") / total
        real = torch.arange(idx.shape[1], device=idx.device) < lengths[:, None]  # (b, T)
        if s.prefix_weight:
            total = sum(weights_[label] * len(ids) for ids, label in all_rows)
            logits, of_each = model.classifier(hidden[real]).float(), wanted.repeat_interleave(lengths)
            loss = loss + s.prefix_weight / total * F.cross_entropy(logits, of_each, weight=weights_, reduction="sum")
        if s.lm_weight:
            total = max(1, sum(len(ids) - 1 for ids, _ in all_rows))
            logits, following = model.head(hidden[:, :-1][real[:, 1:]]).float(), idx[:, 1:][real[:, 1:]]
            loss = loss + s.lm_weight / total * F.cross_entropy(logits, following, reduction="sum")
        return loss

    @torch.no_grad()
    def predict(self, model, examples, context):
        """The class logits of examples, (n, n_classes), and their classes, (n,)."""
        model.eval()
        logits, wanted = [], []
        for batch in self.batches(examples):
            with context:
                logits.append(model.classify(*padded([ids for ids, _ in batch], model.device)).cpu())
            wanted += [label for _, label in batch]
        model.train()
        return torch.cat(logits), torch.tensor(wanted)

    def evaluate(self, model, context, rank=0, world_size=1):
        logits, wanted = self.predict(model, self.examples["val"], context)
        accuracy = (logits.argmax(-1) == wanted).float().mean().item()
        return {"val_loss": F.cross_entropy(logits, wanted).item(), "val_accuracy": accuracy}

    @functools.cached_property
    def baseline(self):
        """The accuracy of a bag of tokens, the same before and after training."""
        return bag_of_tokens(self.examples["train"], self.examples["test"], self.model.config.vocab_size)

    def test(self, model, context):
        """Accuracy, that of always naming the largest class, that of a bag of tokens, and each class's precision, recall
        and F1; confusion.png."""
        logits, wanted = self.predict(model, self.examples["test"], context)
        n = len(self.labels)
        confusion = torch.bincount(wanted * n + logits.argmax(-1), minlength=n * n).view(n, n)  # (true, predicted)
        draw_confusion(confusion.tolist(), self.labels, self.folder / "confusion.png")
        right, true, predicted = confusion.diag().float(), confusion.sum(1), confusion.sum(0)
        figures = {"accuracy": (right.sum() / confusion.sum()).item(), "majority": (true.max() / confusion.sum()).item()}
        figures["bag_of_tokens"] = self.baseline
        for i, label in enumerate(self.labels):
            figures[f"{label} precision"] = (right[i] / predicted[i].clamp(min=1)).item()
            figures[f"{label} recall"] = (right[i] / true[i].clamp(min=1)).item()
            figures[f"{label} F1"] = (2 * right[i] / (true[i] + predicted[i]).clamp(min=1)).item()
        return figures

    def sample(self, model):
        rows, chosen = self.dataset.splits["val"], self.examples["val"][:3]
        logits, _ = self.predict(model, chosen, autocast(self.device, torch.float32))
        order = sorted(range(len(chosen)), key=lambda i: self.length(chosen[i]))  # as predict has them
        named = [(rows[i][1]["text"], self.labels[p]) for i, p in zip(order, logits.argmax(-1).tolist(), strict=True)]
        return "\n".join(f"{label:12} {text[:100]!r}" for text, label in named) + "\n"


def bag_of_tokens(train_examples, test_examples, vocab_size):
    """Test accuracy of a logistic regression on 1 if a token occurs, else 0: what the order of the tokens adds is the rest."""

    def occurrences(examples):
        places = [(row, token) for row, (ids, _) in enumerate(examples) for token in {*ids, vocab_size}]  # the last: a bias
        shape = (len(examples), vocab_size + 1)
        return torch.sparse_coo_tensor(torch.tensor(places).T, torch.ones(len(places)), shape, check_invariants=True).coalesce()

    wanted, given = (torch.tensor([label for _, label in examples]) for examples in (train_examples, test_examples))
    seen, w = occurrences(train_examples), torch.zeros(vocab_size + 1, int(wanted.max()) + 1, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        total = F.cross_entropy(torch.sparse.mm(seen, w), wanted) + w.square().sum() / len(wanted)
        total.backward()
        return total

    solver.step(loss)
    return (torch.sparse.mm(occurrences(test_examples), w).argmax(-1) == given).float().mean().item()


class Instruct(Stage):
    """The loss of the answers' tokens, their end included. An example is (ids, is_answer, row)."""

    def encode(self, rows, split):
        examples = []
        for where, row in rows:
            ids, is_answer = bpe.encode_chat(self.tokenizer, messages_of(row, self.template), self.template)
            examples.append((ids, is_answer, row))
            if not any(is_answer):
                raise ValueError(f"{where}: the answer has no token: fill it in, or remove the row")
        kept = [example for example in examples if len(example[0]) <= self.longest]
        self.say_left_out(rows, kept, split, "longer than the")
        if split == "train":
            wanted = self.settings.exact_match
            self.exact = "kind" in rows[0][1] if wanted == "auto" else wanted
        return kept

    def loss(self, model, rows, all_rows):
        logprobs, _ = token_logprobs(model, [ids for ids, _, _ in rows], [answer for _, answer, _ in rows])
        return -logprobs.sum() / sum(sum(answer) for _, answer, _ in all_rows)

    @torch.no_grad()
    def answer_loss(self, model, examples, context):
        """Mean loss of the answers' tokens, in nats."""
        model.eval()
        total = scored = 0
        for batch in self.batches(examples):
            with context:
                logprobs, chosen = token_logprobs(model, [ids for ids, _, _ in batch], [answer for _, answer, _ in batch])
            total, scored = total - logprobs.sum().item(), scored + chosen.sum().item()
        model.train()
        return total / max(1, scored)

    def prompt(self, row):
        messages = messages_of(row, self.template)[:-1]
        return bpe.encode_chat(self.tokenizer, messages, self.template, reply=True)[0]

    def answers(self, model, rows):
        """The model's greedy answers, as text."""
        ids = give_answers(model, [self.prompt(row) for row in rows], self.stop, self.settings.answer_tokens, temperature=0)
        return [self.text_of(answer) for answer in ids]

    def text_of(self, answer):
        """The text of an answer's ids, without the one that ends it."""
        return self.tokenizer.decode([token for token in answer if token not in self.stop])

    def right_answers(self, model, examples):
        """Whether each greedy answer is the row's, surrounding space aside."""
        rows = [row for *_, row in examples]
        wanted = [messages_of(row, self.template)[-1]["content"].strip() for row in rows]
        return [given.strip() == right for given, right in zip(self.answers(model, rows), wanted, strict=True)]

    def evaluate(self, model, context, rank=0, world_size=1):
        figures = {"val_loss": self.answer_loss(model, self.examples["val"], context)}
        if self.exact:
            right = self.right_answers(model, spread(self.examples["val"], self.settings.eval_answers))
            figures["val_exact_match"] = sum(right) / len(right)
        return figures

    def test(self, model, context):
        """The loss of the answers and, where they can be checked, the share of exact matches, over all and by kind."""
        examples = spread(self.examples["test"], self.settings.test_items)
        figures = {"answer_loss": self.answer_loss(model, examples, context)}
        if self.exact:
            right = self.right_answers(model, examples)
            figures["exact_match"] = sum(right) / max(1, len(right))
            for kind in sorted({row.get("kind", "") for *_, row in examples} - {""}):
                of_kind = [r for r, (*_, row) in zip(right, examples, strict=True) if row.get("kind") == kind]
                figures[f"{kind} ({len(of_kind)})"] = sum(of_kind) / len(of_kind)
        return figures

    def sample(self, model):
        rows = [row for *_, row in spread(self.examples["val"], 3)]
        asked = [messages_of(row, "markers")[-2]["content"] for row in rows]
        pairs = zip(asked, self.answers(model, rows), strict=True)
        return "\n".join(f"> {question}\n{answer}" for question, answer in pairs) + "\n"


class Prefer(Instruct):
    """DPO: -log sigmoid of beta times how much more likely than at the start the chosen answer has become, compared to the
    rejected one. An example is (chosen ids, is_answer, rejected ids, is_answer, the two log-probabilities at the start, row),
    these summed over the answer. Source: arXiv:2305.18290."""

    def __init__(self, settings, records, model, tokenizer, state):
        self.reference = state["reference"] if state else {}
        super().__init__(settings, records, model, tokenizer, state)

    def encode(self, rows, split):
        examples = []
        for _, row in rows:
            pair = []
            for answer in (row["chosen"], row["rejected"]):
                pair += bpe.encode_chat(self.tokenizer, messages_of({**row, "output": answer}, self.template), self.template)
            examples.append((*pair, {**row, "output": row["chosen"]}))
        kept = [example for example in examples if self.length(example) <= self.longest]
        self.say_left_out(rows, kept, split, "an answer ends beyond the")
        if split not in self.reference:
            self.reference[split] = torch.zeros(len(kept), 2)
            self.model.eval()
            for first in range(0, len(kept), 16):
                with torch.no_grad(), autocast(self.device, choose_dtype(self.settings.dtype, self.device)):
                    self.reference[split][first : first + 16] = self.pair_logprobs(self.model, kept[first : first + 16]).cpu()
        return [(*pair, start, row) for (*pair, row), start in zip(kept, self.reference[split], strict=True)]

    def further_state(self):
        return {"reference": self.reference}

    def length(self, example):
        return max(len(example[0]), len(example[2]))

    def pair_logprobs(self, model, rows):
        """Summed log-probability of the chosen and of the rejected answers: (b, 2)."""
        sequences = [row[0] for row in rows] + [row[2] for row in rows]
        logprobs, _ = token_logprobs(model, sequences, [row[1] for row in rows] + [row[3] for row in rows])
        return logprobs.sum(-1).view(2, -1).T

    def loss(self, model, rows, all_rows):
        gained = self.pair_logprobs(model, rows) - torch.stack([row[4] for row in rows]).to(model.device)  # (b, 2)
        margins = self.settings.dpo_beta * (gained[:, 0] - gained[:, 1])
        self.note(margin=margins.mean().item(), accuracy=(margins > 0).float().mean().item())
        return -F.logsigmoid(margins).sum() / len(all_rows)

    @torch.no_grad()
    def preferences(self, model, examples, context):
        """Loss, accuracy and margin of the preferences, and the loss of a chosen answer's token, which should not rise far."""
        model.eval()
        margins, chosen = [], []
        for batch in self.batches(examples, 16):
            with context:
                now = self.pair_logprobs(model, batch).cpu()
            gained = now - torch.stack([row[4] for row in batch])
            margins.append(self.settings.dpo_beta * (gained[:, 0] - gained[:, 1]))
            chosen.append(now[:, 0])
        model.train()
        margins, chosen = torch.cat(margins), torch.cat(chosen)
        n_tokens = sum(sum(row[1]) for row in examples)
        figures = {"loss": -F.logsigmoid(margins).mean().item(), "accuracy": (margins > 0).float().mean().item()}
        return figures | {"margin": margins.mean().item(), "chosen_loss": -chosen.sum().item() / n_tokens}

    def evaluate(self, model, context, rank=0, world_size=1):
        return {f"val_{name}": value for name, value in self.preferences(model, self.examples["val"], context).items()}

    def test(self, model, context):
        return self.preferences(model, spread(self.examples["test"], self.settings.test_items), context)


class Reinforce(Instruct):
    """GRPO: of a group of answers to one prompt, those with a reward above the group's mean become more likely.

    The advantage of an answer is (reward - mean) / standard deviation over its group; the objective is clipped as in PPO
    and averaged over the tokens of all answers in groups whose rewards differ; kl_coef adds the divergence from the model
    at the start, over all answers. Source: arXiv:2402.03300; the mean over tokens, the choice of groups: arXiv:2503.14476.

    Prompts are drawn at random. Where rows name their kind, a kind is drawn as often as its groups differ, since what always
    succeeds or always fails teaches nothing.
    """

    def __init__(self, settings, records, model, tokenizer, state):
        s = settings
        if s.gradient_accumulation_steps > 1:
            found = f"gradient_accumulation_steps={s.gradient_accumulation_steps}"
            raise ValueError(f"{found} but the answers of a step are drawn at once: set it to 1 and lower batch_size")
        self.reward = read_reward(s.reward)
        self.sampled = state["sampled"] if state else None  # what draw returned, and the log-probabilities then
        self.start = None
        if s.kl_coef:
            self.start = GPT(model.config).to(model.device).eval()
            self.start.load_state_dict(state["start"] if state else model.state_dict())
        super().__init__(s, records, model, tokenizer, state)
        self.tokens_per_step *= s.group_size  # as if every answer were as long as the row's
        self.by_kind = {}
        for example in self.examples["train"]:
            self.by_kind.setdefault(example[2].get("kind"), []).append(example)
        self.differing = state["differing"] if state else dict.fromkeys(self.by_kind, 0.5)  # share of a kind's groups

    def further_state(self):
        start = self.start and self.start.state_dict()
        return {"sampled": self.sampled, "start": start, "differing": dict(self.differing)}

    def rows(self, first, count):
        """The prompts to draw answers to, a function of the seed, the step and `differing`; unused while old answers last."""
        # a little is added, so that a kind that once had no group that differs is still looked at
        kinds, chance = list(self.by_kind.values()), np.array([0.05 + self.differing[kind] for kind in self.by_kind])
        shuffle = np.random.default_rng((self.settings.seed, first // self.G))
        chosen = shuffle.choice(len(kinds), self.G, p=chance / chance.sum())
        return [kinds[i][shuffle.integers(len(kinds[i]))] for i in chosen]

    def encode(self, rows, split):
        examples = super().encode(rows, split)
        room = self.longest - self.settings.answer_tokens
        kept = [example for example in examples if len(self.prompt(example[2])) <= room]
        self.say_left_out(examples, kept, split, f"with answer_tokens={self.settings.answer_tokens} longer than the")
        return kept

    @torch.no_grad()
    def draw(self, model, rows):
        """A group of answers to the prompt of each row: the distinct ones of the groups whose rewards differ, or of all
        groups where all count for the divergence, with their advantages and how often each was given."""
        s, K = self.settings, self.settings.group_size
        prompts = [self.prompt(row) for *_, row in rows]
        answers = give_answers(model, [ids for ids in prompts for _ in range(K)], self.stop, s.answer_tokens, temperature=1.0)
        pairs = [(i // K, tuple(ids)) for i, ids in enumerate(answers)]  # a prompt's place, and an answer to it
        counts = Counter(pairs)
        reward = {(i, ids): self.reward_of(rows[i][-1], self.text_of(ids)) for i, ids in counts}
        rewards = torch.tensor([reward[pair] for pair in pairs]).view(-1, K)
        differ = rewards.amax(1) > rewards.amin(1)  # (batch_size,), which groups have a gradient at all
        self.note(
            reward=rewards.mean().item(),
            groups_that_differ=differ.float().mean().item(),
            answer_tokens=sum(map(len, answers)) / len(answers),
        )
        for kind, share in self.differing.items():  # a running mean over some 32 groups
            of_kind = [d for d, (*_, row) in zip(differ.tolist(), rows, strict=True) if row.get("kind") == kind]
            self.differing[kind] = (32 * share + sum(of_kind)) / (32 + len(of_kind))
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True, correction=0) + 1e-6)
        advantages = dict(zip(pairs, (advantages * differ[:, None]).flatten().tolist(), strict=True))
        kept = [(i, ids) for i, ids in counts if s.kl_coef or differ[i]] or list(counts)
        asked = [prompts[i] for i, _ in kept]
        return {
            "sequences": [[*prompt, *ids] for prompt, (_, ids) in zip(asked, kept, strict=True)],
            "is_answer": [[False] * len(prompt) + [True] * len(ids) for prompt, (_, ids) in zip(asked, kept, strict=True)],
            "advantages": torch.tensor([advantages[pair] for pair in kept]),
            "counts": torch.tensor([counts[pair] for pair in kept]),
        }

    def reward_of(self, row, answer):
        messages = messages_of(row, self.template)
        if self.reward is None:
            return float(answer.strip() == messages[-1]["content"].strip())
        value = self.reward(messages[-2]["content"], answer)
        with contextlib.suppress(TypeError, ValueError):
            if math.isfinite(float(value)):
                return float(value)
        found = f"reward={self.settings.reward} gave {value!r} for the answer {answer!r}"
        raise ValueError(f"{found}: it must return a finite number")

    def loss(self, model, rows, all_rows):
        if self.step % self.settings.updates_per_sample == 0:
            self.sampled = self.draw(model, rows)
        drawn = self.sampled
        logprobs, scored = token_logprobs(model, drawn["sequences"], drawn["is_answer"])  # (B, T - 1)
        before = drawn.setdefault("before", logprobs.detach()).to(model.device)
        start = None
        if self.start:
            with torch.no_grad():
                start = token_logprobs(self.start, drawn["sequences"], drawn["is_answer"])[0]
        weight = scored * drawn["counts"].to(model.device)[:, None]
        return grpo_loss(logprobs, before, drawn["advantages"].to(model.device), weight, self.settings, start)

    def evaluate(self, model, context, rank=0, world_size=1):
        """val_loss is the negative mean reward of greedy answers: lower is better, as everywhere."""
        rows = [row for *_, row in spread(self.examples["val"], self.settings.eval_answers)]
        answers = self.answers(model, rows)
        rewards = [self.reward_of(row, answer) for row, answer in zip(rows, answers, strict=True)]
        return {"val_loss": -sum(rewards) / len(rewards), "val_reward": sum(rewards) / len(rewards)}


def grpo_loss(logprobs, before, advantages, weight, settings, start=None):
    """The clipped objective, negative, averaged over the answers' tokens: logprobs now, when the answers were drawn and at
    the start, and how often each token was drawn, weight, 0 for the prompts' and padding, (B, T) each; advantages (B,)."""
    s, A = settings, advantages[:, None]
    ratio = (logprobs - before).exp()
    objective = torch.minimum(ratio * A, ratio.clamp(1 - s.clip, 1 + s.clip) * A)
    if start is not None:
        objective = objective - s.kl_coef * ((start - logprobs).exp() - (start - logprobs) - 1)
    return -(objective * weight).sum() / weight.sum().clamp(min=1)


def read_reward(path):
    """The function `reward` of a Python file, or None without one."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(f"reward={path} does not exist: give a Python file with reward(prompt, answer) -> float")
    reward = runpy.run_path(path).get("reward")
    if not callable(reward):
        raise ValueError(f"reward={path} has no function reward(prompt, answer): define it")
    return reward


STAGES = {"classify": Classify, "instruct": Instruct, "prefer": Prefer, "reinforce": Reinforce}


# The model: what it starts from, and which of its parameters are trained.


def labels_of(records):
    labels = sorted({row["label"] for _, row in records.splits["train"]})
    if len(labels) < 2:
        raise ValueError(f"the training rows have one class only, {labels[0]!r}: two are needed; add rows of another")
    return labels


def build_model(s, records, state):
    """(model, tokenizer): from the checkpoint's state, or the base with what the stage adds: LoRA, classes, markers."""
    if state:
        model, tokenizer = GPT(GPTConfig(**state["model_config"])), weights.load_tokenizer(state["tokenizer"])
        model.load_state_dict(state["model"])
    else:
        base, tokenizer, _ = weights.load_model(s.init_from, "best", torch.float32)
        if s.template == "markers" and s.task != "classify":
            tokenizer = bpe.with_special_tokens(tokenizer, MARKERS)
        changed = {name: getattr(s, name) for name in OURS}
        changed["n_classes"] = len(labels_of(records)) if s.task == "classify" else None
        changed["vocab_size"] = max(base.config.vocab_size, tokenizer.vocab_size)
        torch.manual_seed(s.seed)
        model = GPT(replace(base.config, **changed))
        old = {name: tensor for name, tensor in base.state_dict().items() if not name.startswith("classifier")}
        for name in ("tok_emb.weight", "head.weight"):  # a new token begins as the mean of all
            new = old[name].mean(0, keepdim=True).expand(changed["vocab_size"] - len(old[name]), -1)
            old[name] = torch.cat([old[name], new])
        missing = model.load_state_dict(old, strict=False).missing_keys
        assert all("lora_" in name or name.startswith("classifier") for name in missing), missing
    freeze(model, s)
    return model, tokenizer


def freeze(model, s):
    """Leave only those parameters trainable that --train and --freeze name."""
    last = f"blocks.{len(model.blocks) - 1}."
    head = ("classifier.", "final_norm.") if s.task == "classify" else ("head.", "tok_emb.", "final_norm.")
    trained = {"all": ("",), "head": head, "last_block": (last, *head), "lora": ("classifier.",)}[s.train]
    if s.task == "classify" and not model.config.tie_weights and not s.lm_weight:
        model.head.weight.requires_grad_(False)  # classes do not pass through it
    for name, parameter in model.named_parameters():
        if not (name.startswith(trained) or s.train == "lora" and ".lora_" in name):
            parameter.requires_grad_(False)
        if any(fnmatch(name, pattern) for pattern in s.freeze.split()):
            parameter.requires_grad_(False)
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not n:
        raise ValueError(f"train={s.train} freeze={s.freeze!r} leave nothing to train: freeze less")
    say(f"{n:,} of {model.parameter_count():,} parameters are trained ({n / model.parameter_count():.1%})")


def main(argv):
    given, _ = config.read_arguments(Settings, argv)
    given = {"init_from": Settings.init_from, **given}
    if named := ({f.name for f in fields(GPTConfig)} - OURS - {"block_size"}) & given.keys():
        raise ValueError(f"{' '.join(sorted(named))} come from the model that is tuned, {given['init_from']}: leave them out")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("finetune.py runs in one process: start it with python, not torchrun")
    s, state = train.resolve(given, Settings, MEANING)
    device = choose_device(s.device)
    dtype = choose_dtype(s.dtype, device)
    context = autocast(device, dtype)
    records = read_records(s)
    if state and state["data"] != records.sha256:
        raise ValueError(f"dataset={s.dataset} is not what {s.out_dir} was trained on: put that back, or start a new run")
    if device.type == "cpu":
        train.keep_freed_memory()
    model, tokenizer = build_model(s, records, state)
    model, records.tokenizer = model.to(device), tokenizer
    optimizers = train.make_optimizers(model, s)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if state:
        for optimizer, saved in zip(optimizers, state["optimizer"], strict=True):
            optimizer.load_state_dict(saved)
        scaler.load_state_dict(state["scaler"])
    stage = STAGES[s.task](s, records, model, tokenizer, state)
    s, lock = train.claim_folder(s, state)
    stage.settings, stage.folder = s, Path(s.out_dir)
    (stage.folder / "config.json").write_text(json.dumps(asdict(s), indent=1) + "\n")
    tokenizer.save(stage.folder / "tokenizer.json")
    sizes = ", ".join(f"{len(examples)} {split}" for split, examples in stage.examples.items())
    say(f"{s.task} on {s.dataset} ({sizes}), from {s.init_from}")
    say(model.summary())
    before = stage.test(model, context) if stage.examples["test"] and not state else {}
    if before:
        say(f"test, before: {described(before)}")
    progress = Progress(stage, model)
    stop = train.train(model, optimizers, scaler, stage, progress)
    progress.close(stop)
    lock.close()
    if stop:
        return 128 + stop
    model.load_state_dict(checkpoint.load(stage.folder, "best")["model"])
    if s.train == "lora":
        weights.save_adapter(model, stage.folder / "adapter.safetensors")
    if stage.examples["test"]:
        after = stage.test(model, context)
        say(f"test, with the best checkpoint: {described(after)}")
        (stage.folder / "test.json").write_text(json.dumps({"before": before, "after": after}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    with config.errors_in_one_line():
        sys.exit(main(sys.argv[1:]))
