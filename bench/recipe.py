"""Validation loss against the wall-clock of the whole command, of configs and of nanoGPT.

    python bench.py recipe --configs config/a.py config/b.py
    python bench.py recipe --configs config/a.py --peer=NANOGPT --peer_settings config/b.py

Prints the curve of each run and draws all of them in one picture. NANOGPT is the folder of a
checkout.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from bench.common import SCRATCH, run_script, words_of
from glass.settings import configure

# the line of a whole evaluation, of either script; train.py also takes quick looks at a few rows,
# which are too noisy to compare
EVALUATION = re.compile(r"step [1-9]\d*: (?!.*a look at).*val loss ([\d.]+)")


@dataclass
class Settings:
    configs: list[str] = field(default_factory=list)  # of train.py: config/a.py config/b.py
    settings: list[str] = field(default_factory=list)  # more, of all configs: --settings seed=1
    peer: str | None = None  # also a nanoGPT checkout that has prepared the same dataset
    peer_settings: list[str] = field(default_factory=list)  # its config file and settings
    picture: str = "recipe.png"  # where the curves go


def main(argv):
    s = configure(Settings, argv)
    if not s.configs:
        raise ValueError("configs names no run: add --configs config/shakespeare_char.py ...")
    axes = Figure().subplots()
    for name, (script, arguments) in runs_of(s).items():
        lines, _ = run_script(script, arguments)
        curve = loss_curve(lines)
        shown = "  ".join(f"{seconds:.0f} s {loss:.4f}" for seconds, loss in curve)
        print(f"{name}, {lines[-1][0]:.0f} s in all:  {shown}", flush=True)
        axes.plot(*zip(*curve, strict=True), marker="o", label=name)
    axes.set_xlabel("seconds since the command began")
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend()
    axes.figure.savefig(s.picture, dpi=150)
    print(f"the curves are in {s.picture}")


def runs_of(settings):
    """The script and arguments of every run, by name."""
    s = settings
    ours = [
        f"--out_dir={(SCRATCH / 'recipe').resolve()}",
        "--overwrite=True",
        "--sample_tokens=None",
    ]
    runs = {}
    for path in s.configs:
        runs[Path(path).stem] = (Path("train.py"), [path, *words_of(s.settings), *ours])
    if s.peer:
        runs["nanoGPT"] = (Path(s.peer) / "train.py", words_of(s.peer_settings))
    return runs


def loss_curve(lines):
    """(seconds, validation loss) of every whole evaluation but that of step 0."""
    matches = [(seconds, EVALUATION.match(line)) for seconds, line in lines]
    return [(seconds, float(match[1])) for seconds, match in matches if match]
