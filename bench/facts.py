"""How much of the library a model of one size learns in one time, from ever more of it.

    python train.py config/docs.py && python bench.py facts

Tunes with config/finetune_docs.py on the N most used functions and classes, for each N for the same
number of steps, and draws what it then knows to pictures/facts.png. Runs stay in out/facts/ and are
not run again. Bits of fact: see docs.py; the run that knows none of the facts is tuned on the least used
ones, first. Once it is there, several processes may take an N each, and a last one draws.
"""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bench.docs import FACTS, Run, bits_of_fact, by_kind, read_rows, reference, refusals
from glass.docs import read_facts
from glass.files import lock, replacing, write_json
from glass.records import spread
from glass.settings import HOME, configure

PICTURE = Path("pictures/facts.png")
RUNS = Path("out/facts")
FIGURES = "figures.json"  # of a run, in its folder; written last
BASE = Path("out/docs")  # the run that each starts from
ITEMS = 1500  # test rows that each is asked
IGNORANT = -500  # the least used things, for the run that knows none of the others
IGNORANT_STEPS = 500  # in which it learns how to answer


@dataclass
class Settings:
    objects: list[str] = field(default_factory="500 1000 2000 4000 all".split)  # the most used ones
    max_iters: int = 1500  # steps of each run
    picture: str = str(PICTURE)  # where the figures are drawn


def main(argv):
    s = configure(Settings, argv)
    if not BASE.is_dir():
        raise ValueError(f"{BASE} is not there, needed is a base: python train.py config/docs.py")
    n_all, series = len(read_facts()), []
    for n in sorted({as_number(n, n_all) for n in s.objects}):
        known = folder_of(n, s.max_iters) / FIGURES
        if not known.is_file():
            write_json(known, figures_of(n, s.max_iters))
        figures = json.loads(known.read_text(encoding="utf-8"))
        shares = "  ".join(f"{kind} {share:.1%}" for kind, share in figures["right"].items())
        bits = f"{figures['bits']:,.0f} bits of {figures['facts']:,} facts"
        a_weight = figures["bits"] / figures["weights"]
        made_up, real = figures["refused"]
        print(f"{n:,} things: {shares}; {bits}, {a_weight:.4f} a weight", end="; ")
        print(f"refused {made_up:.1%} of made-up names, {real:.1%} of real ones", flush=True)
        series.append((n, figures["right"], a_weight))
    draw(series, s.picture)


def as_number(word, n_all):
    """A number of things from a word of --objects, at most n_all, which is what "all" says."""
    if word == "all":
        return n_all
    if not word.isdecimal() or not int(word):
        raise ValueError(f"objects={word} must be numbers from 1 on, or all")
    return min(int(word), n_all)


def folder_of(objects, max_iters):
    """Where a run on so many things for so many steps is."""
    return RUNS / f"{objects}_{max_iters}"


def figures_of(n, max_iters):
    """What a run tuned on the n most used things knows: a dict for FIGURES."""
    ignorant = Run(tuned(IGNORANT, IGNORANT_STEPS))
    run = Run(tuned(n, max_iters))
    rows = read_rows(str(folder_of(n, max_iters) / "data/docs"), "test")
    told = read_rows(str(folder_of(IGNORANT, IGNORANT_STEPS) / "data/docs"), "train")
    told = {message["content"] for row in told for message in row["messages"]}
    new = [row for row in rows if reference(row) not in told]
    asked = spread(rows, ITEMS)
    texts, sureness = run.ask(asked)
    real, made_up = refusals(asked, texts, sureness, [-math.inf])
    is_right = [text.strip() == reference(row) for text, row in zip(texts, asked, strict=True)]
    bits, n_facts = bits_of_fact(run, ignorant, new)
    right = {kind: share for kind, (share, _) in by_kind(asked, is_right).items()}
    return {
        "right": right,
        "refused": (*made_up, *real),
        "bits": bits,
        "facts": n_facts,
        "weights": run.model.parameter_count(),
    }


def tuned(objects, max_iters):
    """A run on so many things for so many steps, which is made if it is not there: its folder."""
    folder = folder_of(objects, max_iters)
    run = folder / "out"
    if not run.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder)
        call(folder, "prepare.py", "docs", f"--objects={objects}", "--overwrite=True")
        options = [f"--max_iters={max_iters}", f"--eval_interval={max_iters}", "--test_items=100"]
        options += [f"--init_from={BASE.resolve()}", "--out_dir=partial", "--overwrite=True"]
        call(folder, "finetune.py", HOME / "config/finetune_docs.py", *options)
        (folder / "partial").rename(run)
        held.release()
    return run


def call(folder, script, *arguments):
    """Run a script of ours in a folder. Raises ValueError where it fails."""
    command = [sys.executable, HOME / script, *arguments]
    status = subprocess.run(command, cwd=folder, stdout=sys.stderr).returncode
    if status:
        raise ValueError(f"{script} {' '.join(map(str, arguments))} ended with status {status}")


def draw(series, picture):
    """Draw series, a list of (things, share of right answers by kind, bits a weight)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    things = [n for n, _, _ in series]
    for kind in FACTS:
        left.plot(
            things, [shares.get(kind, math.nan) for _, shares, _ in series], marker="o", label=kind
        )
    left.set_ylabel("right to the letter")
    left.set_ylim(0, 1.02)
    left.legend()
    right.plot(things, [bits for _, _, bits in series], marker="o", color="black")
    right.set_ylabel("bits of fact a weight")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(things, [f"{n:,}" for n in things], rotation=45)
        axes.minorticks_off()
        axes.set_xlabel("functions and classes taught")
    figure.tight_layout()
    with replacing(Path(picture)) as partial:
        figure.savefig(partial, format="png", dpi=100)
    print(f"{picture} shows it")
