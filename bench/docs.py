"""What a model of config/finetune_docs.py knows, beside TF-IDF on the same questions.

    python bench.py docs --run=out/finetune_docs --items=2000

Answers are compared with the test rows' to the letter. A reply refuses if it says that it does not
know, or if its mean log-probability lies below a threshold. Bits of fact are what a run that was
tuned on other things (--ignorant) is more surprised by the answers than this run: the sum over the
things asked about of log2 of the ratio of probabilities, as far as it is positive.
"""

import json
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from glass import weights
from glass.chat import encode_chat, messages_of
from glass.files import replacing
from glass.page import Faq
from glass.records import spread
from glass.settings import configure
from glass.shards import folder_of
from glass.stage import Answered, answer_logprobs, answer_text, ask, mean_logprobs

PICTURE = Path("pictures/docs.png")
LONGEST_ANSWER = 64  # tokens, as in finetune.py
FACTS = ("does", "arguments", "module", "which")  # kinds of questions whose answers are facts


@dataclass
class Settings:
    run: str = "out/finetune_docs"  # the folder of a run on docs
    runs: list[str] = field(default_factory=list)  # more of other seeds: the means are given too
    dataset: str = "docs"  # its test rows are asked
    items: int = 2000  # test rows
    ignorant: str | None = None  # a run on other things, for the bits of fact
    tfidf: bool = True  # TF-IDF over the training rows beside it
    picture: bool = False  # draw refusals over the threshold to pictures/docs.png
    questions: str | None = None  # a text file of questions to print the answers of


class Run:
    """A tuned model that can be asked."""

    def __init__(self, folder):
        self.model, self.tokenizer, state = weights.load_run(folder, "best")
        self.model.eval()
        self.template = state["task"]["template"]
        self.sure_above = state["task"].get("sure_above") or -math.inf

    def ask(self, rows):
        """(texts, mean log-probabilities) of the greedy answers to rows."""
        answers = ask(self.model, self.tokenizer, self.template, rows, LONGEST_ANSWER)
        texts = [answer_text(self.tokenizer, each) for each in answers]
        return texts, mean_logprobs(self.model, answers)

    @torch.no_grad()
    def bits(self, rows):
        """How surprising the reference answers of rows are, in bits: (rows,)."""
        found = []
        for first in range(0, len(rows), 64):
            batch = []
            for row in rows[first : first + 64]:
                messages = messages_of(row, self.template)
                ids, is_answer = encode_chat(self.tokenizer, messages, self.template)
                batch.append(Answered(ids, is_answer, row))
            logprobs, _ = answer_logprobs(self.model, batch)
            found.append(-logprobs.sum(1) / math.log(2))
        return torch.cat(found)


def read_rows(dataset, split):
    lines = (folder_of(dataset) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def reference(row):
    return messages_of(row, "markers")[-1]["content"]


def by_kind(rows, is_right):
    """(share of right answers, number) of each kind, of all real and of all made-up things: a dict."""
    right, asked = Counter(), Counter()
    for row, good in zip(rows, is_right, strict=True):
        kind = row["kind"]
        for name in (kind, "all real" if not kind.startswith("unknown") else "all made up"):
            right[name] += good
            asked[name] += 1
    return {name: (right[name] / asked[name], asked[name]) for name in sorted(asked)}


def ask_tfidf(dataset, rows):
    """(rows, answers, seconds, bytes): the answers of the most similar questions of training.

    Only rows of one question are asked, because TF-IDF knows no conversation.
    """
    faq = Faq(folder_of(dataset) / "train.jsonl")
    single = [row for row in rows if "instruction" in row]
    started_at = time.perf_counter()
    answers = [faq.find(row["instruction"])[1]["answer"] for row in single]
    return single, answers, time.perf_counter() - started_at, faq.nbytes


def refusals(rows, texts, sureness, thresholds):
    """For each threshold: the share of real and of made-up names that are refused, two lists."""
    shares = {True: [], False: []}
    is_real = [not row["kind"].startswith("unknown") for row in rows]
    named = [row["kind"] in ("does", "arguments", "exists") for row in rows]
    says_no = [text.startswith("I do not know") for text in texts]
    for threshold in thresholds:
        for real in shares:
            asked = [
                no or float(mean) < threshold
                for no, mean, kind, has_name in zip(says_no, sureness, is_real, named, strict=True)
                if kind == real and (has_name or not real)
            ]
            shares[real].append(sum(asked) / max(1, len(asked)))
    return shares[True], shares[False]


def draw_refusals(rows, texts, sureness, chosen):
    """Draw both shares over the threshold, with the chosen one, to PICTURE."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    thresholds = [-(10 ** (i / 20)) for i in range(10, -81, -1)]
    real, made_up = refusals(rows, texts, sureness, thresholds)
    figure, axes = plt.subplots(figsize=(6, 3.4))
    distances = [-threshold for threshold in thresholds]
    axes.plot(distances, made_up, label="made-up names refused")
    axes.plot(distances, real, label="real names refused")
    axes.axvline(-chosen, color="grey", linestyle=":", label="the chat's threshold")
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("refused from this mean surprise per token on (nats)")
    axes.set_ylabel("share")
    axes.legend()
    figure.tight_layout()
    with replacing(PICTURE) as partial:
        figure.savefig(partial, format="png", dpi=100)
    print(f"{PICTURE} shows refusals over the threshold")


def bits_of_fact(run, ignorant, rows):
    """(bits, things): what run knows more than ignorant of one question for each thing and kind."""
    once = {}
    for row in rows:
        if row["kind"] in FACTS:
            once.setdefault((row["kind"], reference(row)), row)
    chosen = list(once.values())
    gained = (ignorant.bits(chosen) - run.bits(chosen)).clamp(min=0)
    return gained.sum().item(), len(chosen)


def main(argv):
    s = configure(Settings, argv)
    all_rows = read_rows(s.dataset, "test")
    rows = spread(all_rows, s.items)
    tables = []
    for folder in [s.run, *s.runs]:
        run = Run(folder)
        started_at = time.perf_counter()
        texts, sureness = run.ask(rows)
        seconds = time.perf_counter() - started_at
        is_right = [t.strip() == reference(r).strip() for t, r in zip(texts, rows, strict=True)]
        tables.append(by_kind(rows, is_right))
        real, made_up = refusals(rows, texts, sureness, [-math.inf, run.sure_above])
        n_weights = run.model.parameter_count()
        print(f"{folder}: {1000 * seconds / len(rows):.1f} ms an answer, {4 * n_weights:,} bytes")
        for name, (share, n) in tables[-1].items():
            print(f"  {name:16} {share:6.1%} of {n}")
        for says, i in (("by its words", 0), (f"or less sure than {run.sure_above:.3f}", 1)):
            print(f"  refused {says}: {real[i]:.1%} of real, {made_up[i]:.1%} of made-up names")
        if s.picture and folder == s.run:
            draw_refusals(rows, texts, sureness, run.sure_above)
        if s.ignorant:
            bits, n = bits_of_fact(run, Run(s.ignorant), all_rows)
            print(f"  {bits:,.0f} bits of {n:,} facts, {bits / n_weights:.4f} a weight")
    if s.runs:
        for name in tables[0]:
            mean = sum(table[name][0] for table in tables) / len(tables)
            print(f"mean {name:16} {mean:6.1%}")
    if s.tfidf:
        single, answers, seconds, n_bytes = ask_tfidf(s.dataset, rows)
        is_right = [a == reference(r) for a, r in zip(answers, single, strict=True)]
        print(f"TF-IDF: {1000 * seconds / len(single):.1f} ms an answer, {n_bytes:,} bytes")
        for name, (share, n) in by_kind(single, is_right).items():
            print(f"  {name:16} {share:6.1%} of {n}")
        real, made_up = refusals(single, answers, [0.0] * len(single), [-math.inf])
        print(f"  refused by its words: {real[0]:.1%} of real, {made_up[0]:.1%} of made-up names")
    if s.questions:
        run = Run(s.run)
        lines = Path(s.questions).read_text(encoding="utf-8").splitlines()
        texts, sureness = run.ask([{"instruction": line} for line in lines])
        for line, text, mean in zip(lines, texts, sureness.tolist(), strict=True):
            doubt = "  (not sure)" if mean < run.sure_above else ""
            print(f"> {line}\n{text}{doubt}")
