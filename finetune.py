"""Fine-tune any checkpoint, ours or a published one: `python finetune.py config/finetune_lines.py`.

    classify   a head on the last token names a class: spam or not, Python or English
    instruct   answers to instructions: the loss is on the answer alone
    prefer     of two answers the chosen one gains likelihood over the rejected one (DPO)
    reinforce  of the model's own answers, those with a high reward become more likely (GRPO)

Each stage is a class below, to be read from top to bottom: its examples, loss, evaluation and test.
The loop, the checkpoints and the exact resumption are train.py's. Every stage reports figures on
unseen test data, before and after training.
"""

import functools
import math
import sys
from collections import Counter
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import train
from glass import checkpoint, parallel, sharded, weights
from glass.chat import Template, encode_chat, encode_for_class, messages_of
from glass.device import (
    autocast,
    choose_device,
    choose_dtype,
    join_processes,
    keep_freed_memory,
)
from glass.files import read_function, write_json
from glass.fused import fuse
from glass.generate import answer, padded
from glass.progress import Progress, described, draw_confusion, say, warned_about
from glass.records import read_records, spread
from glass.run import settle
from glass.settings import errors_in_one_line, read_arguments
from glass.stage import (
    Answered,
    Stage,
    answer_logprobs,
    answer_text,
    ask,
    bag_of_tokens,
    labels_of,
    mean_logprobs,
    prompt_of,
)
from glass.tuned import CHOOSABLE, build_model, freeze
from model import Free, GPTConfig, Tunable, require

SETTINGS_OF_TASK = {  # settings that only one task uses
    "classify": {"balance", "prefix_weight", "lm_weight"},
    "instruct": {"exact_match"},
    "prefer": {"dpo_beta"},
    "reinforce": {"reward", "group_size", "updates_per_sample", "clip", "kl_coef"},
}


@dataclass
class Settings(train.Settings):
    """train.py's settings, then the stages'. The tuned model brings its architecture."""

    # what to tune, and on what
    task: Literal["classify", "instruct", "prefer", "reinforce"] = "instruct"  # the stage
    init_from: Free[str] = "out/pydoc_char"  # RUN_FOLDER | FOLDER | gpt2 | resume (in out_dir)
    dataset: str = "tasks"  # a name under data/, or a .csv, .tsv, .jsonl or .json file
    out_dir: Free[str] = "out/finetune"  # if it holds a run already, NAME-2, NAME-3 ...
    val_share: float | None = None  # of the rows; None: 0.1, or as prepared
    test_share: float | None = None  # of the rows, likewise; as prepared if both are None
    test_items: Free[int] = 500  # test rows that are answered or compared, before and after
    # what is trained
    trainable: Literal["all", "last_block", "head", "lora"] = "all"  # head: with the final norm
    freeze: str = ""  # names of parameters that stay as they are: "tok_emb* blocks.[0-2].*"
    # classify
    balance: Literal["none", "undersample", "weights"] = "none"  # equal class sizes or weights
    prefix_weight: Tunable[float] = 0.0  # weight of classifying every prefix of a text too
    lm_weight: float = 0.0  # weight of predicting the text itself, beside its class
    # instruct, prefer, reinforce
    template: Template = "auto"  # of a conversation; auto: by the tokenizer's markers
    exact_match: Free[bool | Literal["auto"]] = "auto"  # score exact matches; auto: by the rows
    answer_tokens: Tunable[int] = 64  # longest answer that the model may give
    eval_answers: Free[int] = 200  # validation rows that are answered at an evaluation
    # prefer
    dpo_beta: Tunable[float] = 0.1  # smaller: the preferences may move the model further
    # reinforce
    reward: Tunable[str | None] = None  # a file with reward(prompt, answer); None: exact match
    group_size: Tunable[int] = 8  # answers to each prompt; batch_size counts prompts
    updates_per_sample: Tunable[int] = 1  # steps on the same answers
    clip: Tunable[float] = 0.2  # probability ratios are clipped to 1 +- this
    kl_coef: float = 0.0  # weight of the divergence from the model at the start
    # defaults other than train.py's
    gradient_accumulation_steps: Tunable[int] = 1  # micro-steps of one step
    batch_size: Tunable[int] = 32  # rows of one micro-step
    learning_rate: Tunable[float] = 1e-4  # largest, of AdamW
    min_lr: Tunable[float] = 0.0  # where the decay ends
    warmup_iters: Tunable[int] = 20  # steps of linear warm-up
    max_iters: Free[int] = 500  # steps of the run
    lr_decay_iters: Tunable[int | None] = None  # step at which the decay ends; None: max_iters
    eval_interval: Free[int] = 100  # steps between evaluations
    log_interval: Free[int] = 10  # steps between lines of metrics.jsonl
    weight_decay: Tunable[float] = 0.0  # of matrices and embeddings

    EARLIER_NAMES = {"train": "trainable"}  # old name: present one

    def __post_init__(self):
        if self.lora_rank and self.trainable != "lora":
            raise ValueError(
                f"lora_rank={self.lora_rank} needs trainable=lora, found "
                f"trainable={self.trainable}: add --trainable=lora"
            )
        if self.task == "reinforce" and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} but the answers "
                "of a step are drawn at once: set it to 1 and lower batch_size"
            )
        if self.trainable == "lora" and self.lora_rank is None:
            self.lora_rank = 8
        super().__post_init__()
        counts = "test_items answer_tokens eval_answers group_size updates_per_sample"
        require(self, counts, lambda value: value >= 1, "be at least 1")
        require(self, "group_size", lambda value: value <= 4096, "be at most 4,096")
        if self.task == "reinforce" and self.group_size == 1:
            raise ValueError("group_size=1 has nothing to compare an answer with: give at least 2")
        require(self, "answer_tokens", lambda value: value <= 10**5, "be at most 100,000")
        not_negative = "prefix_weight lm_weight dpo_beta clip kl_coef val_share test_share"
        require(self, not_negative, lambda value: value >= 0, "not be negative")
        if (self.val_share or 0) + (self.test_share or 0) >= 1:
            raise ValueError(
                f"val_share={self.val_share} and test_share={self.test_share} leave nothing to "
                "train on: lower one of them"
            )


class Labelled(NamedTuple):
    ids: list  # tokens of the text, then the end-of-text token
    label: int


class Classify(Stage):
    """Classify texts: a head reads the end-of-text token, trained with cross-entropy.

    Two more losses, both means over tokens, keep the model from memorising a small training set.
    With prefix_weight it classifies every prefix of a text too (target replication,
    arXiv:1511.03677). With lm_weight it goes on predicting the text (GPT-1's auxiliary objective,
    Radford et al. 2018).
    """

    @functools.cached_property
    def labels(self):
        """The classes, sorted."""
        return labels_of(self.records)

    def encode(self, rows, split):
        examples, n_cut = [], 0
        for where, row in rows:
            if row["label"] not in self.labels:
                raise ValueError(
                    f"{where}: label={row['label']!r:.40} does not occur among the training rows, "
                    f"which have {' '.join(self.labels)[:200]}: add rows of it, or correct it"
                )
            ids, was_cut = encode_for_class(self.tokenizer, row["text"], self.longest)
            examples.append(Labelled(ids, self.labels.index(row["label"])))
            n_cut += was_cut
        if n_cut:
            say(f"{n_cut} of {len(rows)} {split} texts are cut to the block_size={self.longest}")
        return examples

    def state(self):
        # without a template: a classifier does not chat
        return super().state() | {"labels": self.labels, "template": None}

    @functools.cached_property
    def class_weights(self):
        """What an example of each class weighs in the loss: (n_classes,)."""
        counts = Counter(label for _, label in self.examples["train"])
        if self.settings.balance != "weights":
            return torch.ones(len(self.labels), device=self.device)
        return torch.tensor([1 / counts[i] for i in range(len(self.labels))], device=self.device)

    def loss(self, model, examples, step_examples, step):
        s, class_weights = self.settings, self.class_weights
        labels = torch.tensor([label for _, label in examples], device=self.device)  # (b,)
        idx, lengths = padded([ids for ids, _ in examples], self.device)
        hidden = model.hidden(idx)  # (b, T, C)
        logits = model.class_logits(hidden, lengths)  # (b, n_classes)
        self.note(accuracy=(logits.argmax(-1) == labels).float().mean().item())
        step_labels = [label for _, label in step_examples]
        total_weight = class_weights[step_labels].sum()
        loss = F.cross_entropy(logits, labels, class_weights, reduction="sum") / total_weight
        is_real = torch.arange(idx.shape[1], device=self.device) < lengths[:, None]  # (b, T)
        if s.prefix_weight:
            logits = model.classifier(hidden[is_real]).float()  # (tokens, n_classes)
            labels_of_tokens = labels.repeat_interleave(lengths)
            total_weight = sum(class_weights[label] * len(ids) for ids, label in step_examples)
            summed = F.cross_entropy(logits, labels_of_tokens, class_weights, reduction="sum")
            loss = loss + (s.prefix_weight / total_weight) * summed
        if s.lm_weight:
            is_target = is_real[:, 1:]
            logits = model.head(hidden[:, :-1][is_target]).float()  # (targets, V)
            n_targets = max(1, sum(len(ids) - 1 for ids, _ in step_examples))
            summed = F.cross_entropy(logits, idx[:, 1:][is_target], reduction="sum")
            loss = loss + (s.lm_weight / n_targets) * summed
        return loss

    @torch.no_grad()
    def predict(self, model, examples, context):
        """(class logits (n, n_classes), labels (n,)) of the examples, sorted by length."""
        model.eval()
        logits, labels = [], []
        for batch in self.batches(examples):
            idx, lengths = padded([ids for ids, _ in batch], self.device)
            with context:
                logits.append(model.classify(idx, lengths).cpu())
            labels += [label for _, label in batch]
        model.train()
        return torch.cat(logits), torch.tensor(labels)

    def evaluate(self, model, context, processes, n_rows=None):
        logits, labels = self.predict(model, self.val_examples(n_rows), context)
        accuracy = (logits.argmax(-1) == labels).float().mean().item()
        return {"val_loss": F.cross_entropy(logits, labels).item(), "val_accuracy": accuracy}

    @functools.cached_property
    def baseline(self):
        """The test accuracy of a bag of tokens: the same before and after training."""
        return bag_of_tokens(
            self.examples["train"], self.examples["test"], self.tokenizer.vocab_size
        )

    def test(self, model, context, folder=None):
        """Accuracy, that of two baselines, and each class's precision, recall and F1.

        The baselines: always the largest class, and a bag of tokens. Draws confusion.png if a
        folder is given.
        """
        logits, labels = self.predict(model, self.examples["test"], context)
        n = len(self.labels)
        pairs = labels * n + logits.argmax(-1)
        confusion = torch.bincount(pairs, minlength=n * n).view(n, n)  # (true, predicted)
        if folder:
            path = folder / "confusion.png"
            with warned_about(path):
                draw_confusion(confusion.tolist(), self.labels, path)
        right, true, predicted = confusion.diag().float(), confusion.sum(1), confusion.sum(0)
        figures = {
            "accuracy": (right.sum() / confusion.sum()).item(),
            "majority": (true.max() / confusion.sum()).item(),
            "bag_of_tokens": self.baseline,
        }
        for i, label in enumerate(self.labels):
            figures[f"{label} precision"] = (right[i] / predicted[i].clamp(min=1)).item()
            figures[f"{label} recall"] = (right[i] / true[i].clamp(min=1)).item()
            figures[f"{label} F1"] = (2 * right[i] / (true[i] + predicted[i]).clamp(min=1)).item()
        return figures

    def sample(self, model):
        """Three validation texts with the classes that the model gives them."""
        examples = sorted(self.examples["val"][:3], key=self.length)  # the order of predict
        logits, _ = self.predict(model, examples, autocast(self.device, torch.float32))
        lines = []
        for (ids, _), predicted in zip(examples, logits.argmax(-1).tolist(), strict=True):
            text = self.tokenizer.decode([token for token in ids if token not in self.stop])
            lines.append(f"{self.labels[predicted]:12} {text[:100]!r}")
        return "\n".join(lines) + "\n"


def count_answer_tokens(examples):
    return sum(sum(example.is_answer) for example in examples)


class Instruct(Stage):
    """Answers to instructions: the mean loss of the answers' tokens, their end included.

    Where answers are compared, an evaluation also finds how sure the model is of the right ones:
    SURE_SHARE of them have a mean log-probability above `sure_above`. A chat doubts those below.
    """

    SURE_SHARE = 0.98
    sure_above = None
    score_name = "exact_match"

    def encode(self, rows, split):
        examples = []
        for where, row in rows:
            ids, is_answer = encode_chat(
                self.tokenizer, messages_of(row, self.template), self.template
            )
            examples.append(Answered(ids, is_answer, row))
            if not any(is_answer):
                raise ValueError(f"{where}: the answer has no token: fill it in, or remove the row")
        kept = [example for example in examples if self.length(example) <= self.longest]
        self.say_left_out(len(rows), len(kept), split, f"longer than block_size={self.longest}")
        return kept

    @property
    def compares_answers(self):
        """Whether the model's answers are compared with the rows' reference answers."""
        wanted = self.settings.exact_match
        if wanted == "auto":
            return "kind" in self.examples["train"][0].row
        return wanted

    def state(self):
        sureness = {"compares_answers": self.compares_answers, "sure_above": self.sure_above}
        return super().state() | sureness

    def restore(self, model, saved):
        super().restore(model, saved)
        self.sure_above = saved.get("sure_above")

    def loss(self, model, examples, step_examples, step):
        logprobs, _ = answer_logprobs(model, examples)
        return -logprobs.sum() / count_answer_tokens(step_examples)

    @torch.no_grad()
    def answer_loss(self, model, examples, context):
        """Mean loss of the answers' tokens, in nats."""
        model.eval()
        total_loss = n_scored = 0
        for batch in self.batches(examples):
            with context:
                logprobs, is_scored = answer_logprobs(model, batch)
            total_loss += -logprobs.sum().item()
            n_scored += is_scored.sum().item()
        model.train()
        return total_loss / max(1, n_scored)

    def prompt(self, row):
        """The ids of a row's conversation up to where its answer begins."""
        return prompt_of(self.tokenizer, self.template, row)

    def answers(self, model, examples):
        """The model's greedy answers, as Answered."""
        rows = [example.row for example in examples]
        return ask(model, self.tokenizer, self.template, rows, self.settings.answer_tokens)

    def texts(self, model, examples):
        """The model's greedy answers, as text."""
        return [answer_text(self.tokenizer, each) for each in self.answers(model, examples)]

    def text_of(self, ids):
        """The text of an answer's ids, without the one that ends it."""
        return self.tokenizer.decode([token for token in ids if token not in self.stop])

    def reference_answer(self, row):
        """The row's reference answer."""
        return messages_of(row, self.template)[-1]["content"]

    def score(self, row, text):
        """1.0 for a text that equals the row's reference answer, space around it aside, or 0.0."""
        return float(text.strip() == self.reference_answer(row).strip())

    def scored_answers(self, model, examples):
        """(answers, scores): the model's greedy answers, as Answered, and the score of each."""
        answers = self.answers(model, examples)
        texts = [answer_text(self.tokenizer, each) for each in answers]
        return answers, [self.score(a.row, t) for a, t in zip(answers, texts, strict=True)]

    def evaluate(self, model, context, processes, n_rows=None):
        figures = {"val_loss": self.answer_loss(model, self.val_examples(n_rows), context)}
        if self.compares_answers and n_rows is None:
            chosen = spread(self.examples["val"], self.settings.eval_answers)
            answers, scores = self.scored_answers(model, chosen)
            figures["val_exact_match"] = sum(scores) / len(scores)
            if right := [each for each, good in zip(answers, scores, strict=True) if good]:
                sureness = mean_logprobs(model, right)
                self.sure_above = sureness.quantile(1 - self.SURE_SHARE).item()
        return figures

    def test(self, model, context, folder=None):
        """The answers' loss. Where answers are compared, their mean score too, overall and by kind."""
        examples = spread(self.examples["test"], self.settings.test_items)
        figures = {"answer_loss": self.answer_loss(model, examples, context)}
        if self.compares_answers:
            _, scores = self.scored_answers(model, examples)
            figures[self.score_name] = sum(scores) / max(1, len(scores))
            by_kind = {}
            for example, score in zip(examples, scores, strict=True):
                by_kind.setdefault(example.row.get("kind", ""), []).append(score)
            for kind in sorted(by_kind.keys() - {""}):
                of_kind = by_kind[kind]
                figures[f"{kind} ({len(of_kind)})"] = sum(of_kind) / len(of_kind)
        return figures

    def sample(self, model):
        """Three validation questions with the model's answers."""
        return self.sample_answers(model, spread(self.examples["val"], 3))

    def sample_answers(self, model, examples):
        lines = []
        for example, text in zip(examples, self.texts(model, examples), strict=True):
            question = messages_of(example.row, "markers")[-2]["content"]
            lines.append(f"> {question}\n{text}")
        return "\n".join(lines) + "\n"


class Pair(NamedTuple):
    chosen: Answered
    rejected: Answered
    reference: torch.Tensor | None = None  # their log-probabilities under the reference model, (2,)


class Prefer(Instruct):
    """DPO on pairs of answers: -log sigmoid(beta * (gain of the chosen - gain of the rejected)).

    An answer's gain is its log-probability, summed over its tokens, minus that under the reference
    model, which is the model before training. Source: arXiv:2305.18290.
    """

    compares_answers = False

    def encode(self, rows, split):
        pairs = []
        for _, row in rows:
            pair = []
            for text in (row["chosen"], row["rejected"]):
                row_of_answer = {**row, "output": text}
                messages = messages_of(row_of_answer, self.template)
                pair.append(
                    Answered(*encode_chat(self.tokenizer, messages, self.template), row_of_answer)
                )
            pairs.append(Pair(*pair))
        kept = [pair for pair in pairs if self.length(pair) <= self.longest]
        self.say_left_out(
            len(rows), len(kept), split, f"an answer ends after block_size={self.longest}"
        )
        return kept

    def length(self, pair):
        return max(len(pair.chosen.ids), len(pair.rejected.ids))

    @torch.no_grad()
    def begin(self, model):
        """Score all pairs by the reference model, once."""
        model.eval()
        context = autocast(self.device, choose_dtype(self.settings.dtype, self.device))
        for split, pairs in self.examples.items():
            logprobs = torch.zeros(len(pairs), 2)
            for first in range(0, len(pairs), 16):
                with context:
                    scored = self.pair_logprobs(model, pairs[first : first + 16])
                logprobs[first : first + 16] = scored.cpu()
            self.set_references(split, logprobs)

    def set_references(self, split, logprobs):
        """Give each pair of a split its reference log-probabilities: logprobs (pairs, 2)."""
        pairs = zip(self.examples[split], logprobs, strict=True)
        self.examples[split] = [pair._replace(reference=reference) for pair, reference in pairs]

    def state(self):
        references = {}
        for split, pairs in self.examples.items():
            rows = [pair.reference for pair in pairs]
            references[split] = torch.stack(rows) if rows else torch.zeros(0, 2)
        return super().state() | {"reference": references}

    def restore(self, model, saved):
        super().restore(model, saved)
        for split, logprobs in saved["reference"].items():
            self.set_references(split, logprobs)

    def pair_logprobs(self, model, pairs):
        """Summed log-probability of the chosen and of the rejected answers: (b, 2)."""
        answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        logprobs, _ = answer_logprobs(model, answers)
        chosen, rejected = logprobs.sum(-1).chunk(2)
        return torch.stack([chosen, rejected], dim=1)

    def margins(self, logprobs, pairs):
        """beta * (gain of the chosen - gain of the rejected): logprobs (b, 2) -> (b,)."""
        gains = logprobs - torch.stack([pair.reference for pair in pairs]).to(logprobs.device)
        return self.settings.dpo_beta * (gains[:, 0] - gains[:, 1])

    def loss(self, model, pairs, step_pairs, step):
        margins = self.margins(self.pair_logprobs(model, pairs), pairs)
        self.note(margin=margins.mean().item(), accuracy=(margins > 0).float().mean().item())
        return -F.logsigmoid(margins).sum() / len(step_pairs)

    @torch.no_grad()
    def preferences(self, model, pairs, context):
        """Loss, accuracy and margin of pairs, and the chosen answers' mean loss per token, in nats.

        chosen_loss should not rise much: DPO can also make both answers less likely, the rejected
        one more so.
        """
        model.eval()
        margins, chosen = [], []
        for batch in self.batches(pairs, 16):
            with context:
                logprobs = self.pair_logprobs(model, batch).cpu()  # (b, 2)
            margins.append(self.margins(logprobs, batch))
            chosen.append(logprobs[:, 0])
        model.train()
        margins, chosen = torch.cat(margins), torch.cat(chosen)
        n_tokens = count_answer_tokens(pair.chosen for pair in pairs)
        return {
            "loss": -F.logsigmoid(margins).mean().item(),
            "accuracy": (margins > 0).float().mean().item(),
            "margin": margins.mean().item(),
            "chosen_loss": -chosen.sum().item() / n_tokens,
        }

    def evaluate(self, model, context, processes, n_rows=None):
        figures = self.preferences(model, self.val_examples(n_rows), context)
        return {f"val_{name}": value for name, value in figures.items()}

    def test(self, model, context, folder=None):
        return self.preferences(
            model, spread(self.examples["test"], self.settings.test_items), context
        )

    def sample(self, model):
        pairs = spread(self.examples["val"], 3)
        return self.sample_answers(model, [pair.chosen for pair in pairs])


def grpo_loss(
    logprobs, old_logprobs, advantages, weight, settings, reference_logprobs=None, n_tokens=None
):
    """GRPO's clipped objective, negative, as a mean over answer tokens.

    logprobs, old_logprobs and reference_logprobs (B, T): of each token under the current model, the
    one that drew the answers, and the reference model. weight (B, T): how often each token was
    drawn, 0 for prompts and padding. advantages (B,). n_tokens: of the whole step, if other
    processes have a part of it.
    """
    s, A = settings, advantages[:, None]
    ratio = (logprobs - old_logprobs).exp()
    objective = torch.minimum(ratio * A, ratio.clamp(1 - s.clip, 1 + s.clip) * A)
    if reference_logprobs is not None:
        difference = reference_logprobs - logprobs
        kl_divergence = difference.exp() - difference - 1  # an estimate that is never negative
        objective = objective - s.kl_coef * kl_divergence
    total = weight.sum() if n_tokens is None else torch.tensor(n_tokens)
    return -(objective * weight).sum() / total.clamp(min=1)


class Reinforce(Instruct):
    """GRPO: the model answers each prompt several times, and the better answers become likelier.

    The answers to one prompt are a group. An answer's advantage is (reward - mean) / standard
    deviation over its group. The objective is clipped as in PPO, and averaged over the tokens of
    all groups with unequal rewards: equal ones teach nothing. With kl_coef, all groups are kept, and
    the loss gains kl_coef times the divergence from the reference model, which is the model before
    training.
    Source: arXiv:2402.03300; the mean over tokens and the choice of groups: arXiv:2503.14476.

    Where rows have a kind, kinds whose groups often have unequal rewards are drawn more often.
    """

    def __init__(self, settings, records, model, tokenizer, processes=None):
        # read first, so that a wrong one ends the run at once
        reward = read_function(settings.reward, "reward", "reward(prompt, answer) -> float")
        super().__init__(settings, records, model, tokenizer, processes)
        self.reward_function = reward
        if reward is not None:
            self.score_name = "reward"
        # an estimate: as if every drawn answer were as long as the row's reference answer
        self.tokens_per_step *= settings.group_size
        self.sampled = None  # what `draw` gave last
        self.reference_model = None
        self.by_kind = {}
        for example in self.examples["train"]:
            self.by_kind.setdefault(example.row.get("kind"), []).append(example)
        # the fraction of a kind's groups that differ
        self.differing = dict.fromkeys(self.by_kind, 0.5)

    @property
    def compares_answers(self):
        """Whether answers are scored: always where there is a reward function."""
        return self.reward_function is not None or super().compares_answers

    def encode(self, rows, split):
        examples, s = super().encode(rows, split), self.settings
        room = self.longest - s.answer_tokens
        kept = [example for example in examples if len(self.prompt(example.row)) <= room]
        why = f"with answer_tokens={s.answer_tokens} longer than block_size={self.longest}"
        self.say_left_out(len(examples), len(kept), split, why)
        return kept

    def begin(self, model):
        if self.settings.kl_coef:
            self.reference_model = parallel.copy_of(model, self.settings, self.processes).eval()

    def state(self):
        reference = None
        if self.reference_model is not None:
            reference = self.reference_model.state_dict()
        state = dict(
            sampled=self.sampled, differing=dict(self.differing), reference_model=reference
        )
        return super().state() | state

    def restore(self, model, saved):
        super().restore(model, saved)
        self.sampled, self.differing = saved["sampled"], saved["differing"]
        if saved["reference_model"]:
            self.reference_model = parallel.copy_of(model, self.settings, self.processes).eval()
            own = self.reference_model.state_dict()
            self.reference_model.load_state_dict(
                parallel.shards_like(saved["reference_model"], own)
            )

    def step_rows(self, step):
        """The prompts of a step: a function of the seed, the step and `differing`."""
        kinds = list(self.by_kind)
        # a little is added, so that a kind whose groups never differed is still looked at
        chances = np.array([0.05 + self.differing[kind] for kind in kinds])
        random = np.random.default_rng((self.settings.seed, step))
        chosen = random.choice(len(kinds), self.rows_per_step, p=chances / chances.sum())
        pools = [self.by_kind[kinds[i]] for i in chosen]
        return [pool[random.integers(len(pool))] for pool in pools]

    @torch.no_grad()
    def draw(self, model, examples, step=0):
        """Draw a group of answers to each example's prompt, reward them, and keep those that teach.

        Keeps the distinct answers of groups whose rewards differ, or with kl_coef those of all
        groups. Gives their sequences, is_answer, advantages (B,) and counts (B,): how often each
        was drawn. The answers of several processes are put together, so all give the same.
        """
        s, G = self.settings, self.settings.group_size
        prompts = [self.prompt(example.row) for example in examples]
        answers = self.draw_answers(model, prompts, step)
        # (place of the prompt, answer)
        pairs = [(i // G, tuple(ids)) for i, ids in enumerate(answers)]
        counts = Counter(pairs)
        reward_of_pair = {}
        for i, ids in counts:
            reward_of_pair[i, ids] = self.score(examples[i].row, self.text_of(ids))
        rewards = torch.tensor([reward_of_pair[pair] for pair in pairs]).view(-1, G)  # (prompts, G)
        differs = rewards.amax(1) > rewards.amin(1)  # (prompts,)
        self.note(
            reward=rewards.mean().item(),
            groups_that_differ=differs.float().mean().item(),
            answer_tokens=sum(map(len, answers)) / len(answers),
        )
        self.count_differing(examples, differs.tolist())
        mean, deviation = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True, correction=0)
        advantages = (rewards - mean) / (deviation + 1e-6)
        advantages = advantages * differs[:, None]  # rounding leaves a remainder
        advantage_of = dict(zip(pairs, advantages.flatten().tolist(), strict=True))
        kept = [(i, ids) for i, ids in counts if differs[i]]
        if s.kl_coef or not kept:  # a step without any answer would have no loss
            kept = list(counts)
        return {
            "sequences": [[*prompts[i], *ids] for i, ids in kept],
            "is_answer": [[False] * len(prompts[i]) + [True] * len(ids) for i, ids in kept],
            "advantages": torch.tensor([advantage_of[pair] for pair in kept]),
            "counts": torch.tensor([counts[pair] for pair in kept]),
        }

    def draw_answers(self, model, prompts, step):
        """group_size answers to each prompt, one after another, as a list of lists of ids.

        Every answer has a generator of its own, so it does not matter which process draws it.
        """
        G, processes = self.settings.group_size, self.processes
        n = len(prompts) * G
        numbers = range(n)
        if not parallel.is_shared(model):  # else every process draws all of them
            numbers = range(processes.rank, n, processes.size)
        seeds = [train.noise_seed(self.settings.seed, step, number) % 2**63 for number in numbers]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        own = answer(
            model,
            [prompts[number // G] for number in numbers],
            self.stop,
            self.settings.answer_tokens,
            temperature=1.0,
            generators=generators,
        )
        if len(numbers) == n:
            return own
        return processes.together(own)

    def count_differing(self, examples, differs):
        """Update each kind's fraction of groups that differ: a running mean over some 32 groups."""
        for kind, fraction in self.differing.items():
            of_kind = [
                d for d, e in zip(differs, examples, strict=True) if e.row.get("kind") == kind
            ]
            self.differing[kind] = (32 * fraction + sum(of_kind)) / (32 + len(of_kind))

    @torch.no_grad()  # a reward function may change the mode; this puts it back
    def score(self, row, text):
        """The value of the reward function. Without a function: 1 for an exact match, 0 otherwise."""
        if self.reward_function is None:
            return super().score(row, text)
        value = self.reward_function(messages_of(row, self.template)[-2]["content"], text)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):  # no number, or one beyond a float
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"reward={self.settings.reward} gave {value!r:.80} for the answer {text!r}: "
                "it must return a finite number"
            )
        return number

    def loss(self, model, examples, step_examples, step):
        if step % self.settings.updates_per_sample == 0:
            self.sampled = self.draw(model, step_examples, step)
        drawn = self.sampled
        with_masks = zip(drawn["sequences"], drawn["is_answer"], strict=True)
        answered = [Answered(ids, is_answer, row=None) for ids, is_answer in with_masks]
        advantages, counts = (drawn[name].to(self.device) for name in ("advantages", "counts"))
        n_tokens = sum(
            count * sum(each.is_answer)
            for count, each in zip(drawn["counts"].tolist(), answered, strict=True)
        )
        if self.processes.size > 1:
            own = list(range(self.processes.rank, len(answered), self.processes.size))
            counts = counts[own] if own else counts[:1] * 0  # every process has a backward pass
            own = own or [0]
            answered, advantages = [answered[i] for i in own], advantages[own]
        logprobs, is_scored = answer_logprobs(model, answered)  # (B, T - 1)
        if "old_logprobs" not in drawn:  # the first update on these answers
            drawn["old_logprobs"] = logprobs.detach()
        old_logprobs = drawn["old_logprobs"].to(self.device)
        reference_logprobs = None
        if self.reference_model:
            with torch.no_grad():
                reference_logprobs = answer_logprobs(self.reference_model, answered)[0]
        weight = is_scored * counts[:, None]
        return grpo_loss(
            logprobs, old_logprobs, advantages, weight, self.settings, reference_logprobs, n_tokens
        )

    def evaluate(self, model, context, processes, n_rows=None):
        """The mean reward of greedy answers; val_loss is its negative, so that lower is better."""
        n = self.settings.eval_answers if n_rows is None else n_rows
        examples = spread(self.examples["val"], n)
        _, rewards = self.scored_answers(model, examples)
        mean = sum(rewards) / len(rewards)
        return {"val_loss": -mean, "val_reward": mean}


STAGES = {"classify": Classify, "instruct": Instruct, "prefer": Prefer, "reinforce": Reinforce}


def check_given(given):
    """ValueError for settings that fine-tuning would not follow."""
    architecture = {field.name for field in fields(GPTConfig)} - CHOOSABLE - {"block_size"}
    if named := " ".join(sorted(architecture & given.keys())):
        raise ValueError(
            f"{named} come from the model that is tuned, {given['init_from']}: leave them out"
        )
    idle = {"eval_iters", "loss_chunk", "teachers", "teacher_weight"} & given.keys()
    if given.get("compile") is True:
        idle.add("compile")
    if given.get("task") == "classify":
        idle |= {"template", "answer_tokens", "eval_answers"} & given.keys()
    if given.get("trainable") != "lora" and given["init_from"] != "resume":
        idle |= {"lora_alpha", "lora_targets"} & given.keys()
    if idle:
        raise ValueError(
            f"{' '.join(sorted(idle))} would do nothing in fine-tuning: leave them out"
        )
    task = given.get("task", Settings.task)
    for other, names in SETTINGS_OF_TASK.items():
        named = " ".join(sorted(names & given.keys()))
        if given["init_from"] == "resume":
            continue
        if task == "reinforce" and other == "instruct":  # it compares answers too
            continue
        if named and task != other:
            raise ValueError(
                f"{named} would do nothing with task={task}, only with task={other}: leave it out"
            )


def check_processes(settings, processes):
    """ValueError for what several processes cannot do."""
    s, G = settings, settings.batch_size * settings.gradient_accumulation_steps
    if G % processes.size:
        raise ValueError(
            f"batch_size x gradient_accumulation_steps={G} must be a multiple of the "
            f"{processes.size} processes: change either"
        )
    if processes.size > 1 and s.task == "reinforce" and s.updates_per_sample > 1:
        raise ValueError(
            f"updates_per_sample={s.updates_per_sample} needs one process, found "
            f"{processes.size}: set it to 1"
        )


def finish(run, context, adapter):
    """Load the best checkpoint, write the adapter of a LoRA run, and test the model.

    Every process takes part, since a shared model runs in all or in none; the main one reports.
    """
    stage, model, is_main = run.task, run.model, run.processes.is_main
    run.processes.wait()  # until the checkpoint is written
    state = checkpoint.load(run.folder, "best", whole=run.processes.size == 1)
    run.load_weights(state)
    if adapter:
        with warned_about(run.folder / "adapter.safetensors"):
            weights.save_adapter(model, run.folder / "adapter.safetensors", writes=is_main)
    if stage.examples["test"]:
        with parallel.evaluating(run.way, model, run.settings):
            after = stage.test(model, context, run.folder if is_main else None)
    if stage.examples["test"] and is_main:
        say(f"test, with the checkpoint of step {state['step']}: {described(after)}")
        with warned_about(run.folder / "test.json"):
            write_json(run.folder / "test.json", {"before": stage.test_before, "after": after})


def main(argv):
    given = read_arguments(Settings, argv).given
    check_given({"init_from": Settings.init_from, **given})
    settings, chosen, state = settle(given, Settings, Stage.script)
    s, device = settings, choose_device(settings.device)
    context = autocast(device, choose_dtype(s.dtype, device))
    if not state and not checkpoint.checkpoint_files(s.init_from):
        # before a dataset is prepared for a base that is not there
        weights.find_folder(s.init_from)
    records = read_records(s)
    if state and state["data"] != records.sha256:
        raise ValueError(
            f"dataset={s.dataset}, split by seed={s.seed}, is not what {s.out_dir} was trained on: "
            "restore both, or start a new run"
        )
    processes = join_processes(device, s.backend)
    check_processes(s, processes)
    model, tokenizer, way = build_model(s, records, state, processes)
    if device.type == "cpu":
        keep_freed_memory(way not in parallel.SHARED)
    if given.get("block_size", 0) > model.config.block_size:
        raise ValueError(
            f"block_size={s.block_size} but the model that is tuned has "
            f"{model.config.block_size} positions: lower it, or leave it out"
        )
    freeze(model, s)
    stage = STAGES[s.task](s, records, model, tokenizer, processes)
    if processes.is_main:
        sizes = ", ".join(f"{len(examples)} {split}" for split, examples in stage.examples.items())
        say(f"{s.task} on {s.dataset} ({sizes}), from {s.init_from}")
        say(model.summary())
    if s.eval_only:
        return evaluate_only(stage, model, way, context, state, processes)
    run, lock = train.start(s, chosen, model, way, stage, processes, state)
    if stage.examples["test"] and not state:
        folder = run.folder if processes.is_main else None
        with parallel.evaluating(way, model, s):
            stage.test_before = stage.test(model, context, folder)
        if processes.is_main:
            say(f"test, before: {described(stage.test_before)}")
    progress = Progress(run)
    if way not in parallel.SHARED:
        fuse(model)
    stop = train.train(run, progress)
    progress.close(stop)
    run.check_saved()
    if not stop and run.step:
        finish(run, context, adapter=s.trainable == "lora")
    if lock:
        lock.release()
    processes.leave()
    return (128 + stop) if stop else 0  # as shells do for signals


def evaluate_only(stage, model, way, context, state, processes):
    """Print the figures of the validation and test rows, and stop."""
    if state:
        state = sharded.filled(state, sharded.parts_of(model, []))
        model.load_state_dict(parallel.shards_like(state["model"], model.state_dict()))
        stage.restore(model, state["task"])
    else:
        stage.begin(model)
    with parallel.evaluating(way, model, stage.settings):
        lines = [described(stage.evaluate(model, context, processes))]
        if stage.examples["test"]:
            lines.append(f"test: {described(stage.test(model, context))}")
    if processes.is_main:
        say("\n".join(lines))
    processes.leave()
    return 0


if __name__ == "__main__":
    with errors_in_one_line():
        sys.exit(main(sys.argv[1:]))
