"""How much of the library a model of one size learns in one time, from ever more of it.

    python train.py config/docs.py && python bench.py facts

Tunes with config/finetune_docs.py on the N most used functions and classes, for each N for the same
number of steps, and draws what it then knows to pictures/facts.png. A run is in out/facts/N and is not
run again. Bits of fact: see docs.py; the run that knows none of the facts is tuned on the least used
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
IGNORANT, IGNORANT_STEPS = (
    -500,
    500,
)  # the least used things, and how long it takes to learn to answer


@dataclass
class Settings:
    objects: list[str] = field(default_factory="500 1000 2000 4000 all".split)  # the most used ones
    base: str = "out/docs"  # the run that each starts from
    max_iters: int = 1500  # steps of each run
    items: int = 1500  # test rows that each is asked
    picture: str = str(PICTURE)  # where the figures are drawn


def main(argv):
    s = configure(Settings, argv)
    if not Path(s.base).is_dir():
        raise ValueError(f"base={s.base} is not there: python train.py config/docs.py makes it")
    n_all, series = len(read_facts()), []
    for n in sorted({as_number(n, n_all) for n in s.objects}):
        known = RUNS / str(n) / FIGURES
        if not known.is_file():
            write_json(known, figures_of(n, s))
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


def figures_of(n, settings):
    """What a run tuned on the n most used things knows: a dict for FIGURES."""
    ignorant = Run(tuned(IGNORANT, IGNORANT_STEPS, settings.base))
    run = Run(tuned(n, settings.max_iters, settings.base))
    rows = read_rows(str(RUNS / str(n) / "data/docs"), "test")
    told = read_rows(str(RUNS / str(IGNORANT) / "data/docs"), "train")
    told = {message["content"] for row in told for message in row["messages"]}
    new = [row for row in rows if reference(row) not in told]
    asked = spread(rows, settings.items)
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


def tuned(objects, max_iters, base):
    """The folder of a run on so many things, which is made if it is not there."""
    folder = RUNS / str(objects)
    run = folder / "out"
    if not run.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder)
        call(folder, "prepare.py", "docs", f"--objects={objects}", "--overwrite=True")
        options = [f"--max_iters={max_iters}", f"--eval_interval={max_iters}", "--test_items=100"]
        options += [f"--init_from={Path(base).resolve()}", "--out_dir=partial", "--overwrite=True"]
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
