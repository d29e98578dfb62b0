"""A page of one run, or of two side by side, from the files that they left: one HTML file.

It reads config.json, about.json, metrics.jsonl, samples.jsonl, test.json, eval.json and the names
of checkpoints, and needs no torch. The page needs no script and nothing from elsewhere; pictures
are inline SVG. No script of the project calls this but evaluate.py --report.
"""

import html
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from glass.files import read_object, write_text
from glass.intervals import number_text

COLOURS = ("#0b6e99", "#c2410c")  # of the first run and of the second
WIDTH, HEIGHT, LEFT, BOTTOM = 560, 260, 52, 36  # of a picture, in pixels


@dataclass
class RunFiles:
    """What the folder of a run holds."""

    folder: Path
    config: dict  # every setting
    about: dict  # machine, versions, commands; see glass/about.py
    metrics: list  # of dicts
    samples: list  # of dicts with step and text
    test: dict
    figures: list  # of eval.json: dicts
    checkpoints: list  # of (name, bytes)

    @property
    def name(self):
        return self.folder.name


def read_run(folder):
    """The RunFiles of a folder. Torn lines and files that are not there are left out.

    Raises ValueError if the folder has no config.json.
    """
    folder = Path(folder)
    config = read_object(folder / "config.json")
    if not config:
        raise ValueError(f"{folder} holds no config.json of a run: name a folder under out/")
    evaluated = read_object(folder / "eval.json").get("figures")
    figures = list(evaluated.values()) if isinstance(evaluated, dict) else []
    checkpoints = [(path.name, path.stat().st_size) for path in sorted(folder.glob("*.pt"))]
    return RunFiles(
        folder,
        config,
        read_object(folder / "about.json"),
        [line for line in read_lines(folder / "metrics.jsonl") if type(line.get("step")) is int],
        [
            line
            for line in read_lines(folder / "samples.jsonl")
            if isinstance(line.get("text"), str)
        ],
        read_object(folder / "test.json"),
        [figure for figure in figures if is_figure(figure)],
        checkpoints,
    )


def read_lines(path):
    """The JSON objects of a file of lines."""
    lines = []
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def is_figure(figure):
    if not isinstance(figure, dict) or not {"value", "low", "high"} <= figure.keys():
        return False
    return all(isinstance(figure.get(name), str) for name in ("task", "metric"))


# Pictures.


def points_of(run, x, y):
    """The points (x, y) of the metrics, with a running sum of seconds and FLOPs as x."""
    points, seconds, before = [], 0.0, 0
    flops = run.about.get("flops_per_token")
    flops = flops if is_number(flops) else 0
    for line in run.metrics:
        if is_number(line.get("step_ms")):
            seconds += line["step_ms"] / 1e3 * max(0, line["step"] - before)
            before = line["step"]
        tokens = line["tokens"] if is_number(line.get("tokens")) else 0
        place = {"seconds": seconds, "flops": flops * tokens}.get(x, line.get(x))
        if is_number(place) and is_number(line.get(y)):
            points.append((place, line[y]))
    return points


def is_number(value):
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):  # no number, or one beyond a float
        return False


def ticks(low, high, count=5):
    """About `count` round numbers between low and high."""
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if step * factor * count >= high - low)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(number):
    """A number in few characters: 12k, 3.4M, 0.0021."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


def picture(title, curves, x_name):
    """An SVG of curves: (label, colour, is dashed, points). A figure without points is ""."""
    curves = [curve for curve in curves if curve[3]]
    if not curves:
        return ""
    xs = [x for *_, points in curves for x, _ in points]
    ys = sorted(y for *_, points in curves for _, y in points)
    left, right = min(xs), max(xs)
    low, high = ys[0], ys[min(len(ys) - 1, int(0.99 * len(ys)))]  # a first spike fills no picture
    high = high if high > low else low + 1

    def place(x, y):
        across = LEFT + (WIDTH - LEFT - 12) * (x - left) / max(right - left, 1e-12)
        up = (HEIGHT - BOTTOM - 14) * (min(y, high) - low) / (high - low)
        return f"{across:.1f},{HEIGHT - BOTTOM - up:.1f}"

    parts = []
    for tick in ticks(low, high):
        across, up = place(left, tick).split(",")
        parts.append(f'<path class="grid" d="M{across} {up}H{WIDTH - 12}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(up) + 4}" class="end">{short(tick)}</text>')
    for tick in ticks(left, right):
        across = place(tick, low).split(",")[0]
        parts.append(
            f'<text x="{across}" y="{HEIGHT - BOTTOM + 16}" class="mid">{short(tick)}</text>'
        )
    parts.append(f'<text x="{WIDTH - 12}" y="{HEIGHT - 4}" class="end">{escape(x_name)}</text>')
    keys = []
    for label, colour, dashed, points in curves:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        line = " ".join(place(x, y) for x, y in thinned(points))
        parts.append(f'<polyline fill="none" stroke="{colour}"{dash} points="{line}"/>')
        if len(points) <= 20 and not dashed:  # so that a single evaluation is seen too
            for point in line.split():
                x, y = point.split(",")
                parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        dashes = f'<svg viewBox="0 0 20 8"><path d="M0 4h20" stroke="{colour}"{dash}/></svg>'
        keys.append(f"<li>{dashes}{escape(label)}: {points[-1][1]:.4g} at the end</li>")
    body = "".join(parts)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escape(title)}">{body}</svg><ul>{"".join(keys)}</ul></figure>'
    )


def thinned(points, most=600):
    """At most `most` of the points, evenly spaced, with the last."""
    every = math.ceil(len(points) / most)
    return points[::every] + points[-1:]


def curves_of(runs, x, names):
    """The curves of several figures of all runs. names: (figure, label, is dashed)."""
    curves = []
    for run, colour in zip(runs, COLOURS, strict=False):
        for y, label, dashed in names:
            label = f"{run.name} {label}" if len(runs) > 1 else label
            curves.append((label, colour, dashed, points_of(run, x, y)))
    return curves


def pictures(runs):
    """All pictures: the loss by steps, tokens, seconds and FLOPs, then rate, speed and the rest."""
    main = "loss"
    for other in ("accuracy", "reward"):
        if any(f"val_{other}" in line for run in runs for line in run.metrics):
            main = other
    losses = [("loss", "training loss", True), ("val_loss", "validation loss", False)]
    made = [picture("Loss (nats per token)", curves_of(runs, "step", losses), "steps")]
    if main != "loss":
        names = [(main, f"training {main}", True), (f"val_{main}", f"validation {main}", False)]
        made.append(picture(main.capitalize(), curves_of(runs, "step", names), "steps"))
    units = {"tokens": "tokens", "seconds": "seconds of training", "flops": "FLOPs"}
    for x, name in units.items():
        made.append(picture(f"Loss by {name}", curves_of(runs, x, losses), name))
    others = {
        "lr": "Learning rate",
        "tokens_per_s": "Tokens per second",
        "grad_norm": "Norm of the gradient",
        "mfu": "Share of the GPU's peak (mfu)",
    }
    for name, title in others.items():
        made.append(picture(title, curves_of(runs, "step", [(name, name, False)]), "steps"))
    return "".join(made)


# Tables.


def escape(text):
    return html.escape(str(text))


def row(cells, tag="td"):
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def table(head, rows):
    """An HTML table; cells are texts that are escaped here."""
    body = "".join(row(map(escape, cells)) for cells in rows)
    return f'<div class="wide"><table>{row(map(escape, head), "th")}{body}</table></div>'


def by_run(runs, values):
    """A table with a column for each run. values: a list of (name, function of a run)."""
    rows = []
    for name, value_of in values:
        cells = [value_of(run) for run in runs]
        if any(cell not in (None, "") for cell in cells):
            rows.append([name, *("" if cell is None else cell for cell in cells)])
    return table(["", *(run.name for run in runs)], rows)


def last(run, key):
    """The last value of a figure in the metrics, or None."""
    values = [line[key] for line in run.metrics if is_number(line.get(key))]
    return values[-1] if values else None


def best(run):
    values = [
        (line["val_loss"], line["step"]) for line in run.metrics if is_number(line.get("val_loss"))
    ]
    return "{:.4f} at step {}".format(*min(values)) if values else None


def summary(runs):
    """What was reached, by what, at which cost."""

    def start(run):
        starts = run.about.get("starts")
        return starts[-1] if isinstance(starts, list) and starts else {}

    def machine(run):
        found = start(run).get("machine") or {}
        gpu = f"{found['gpu']}, " if "gpu" in found else ""
        return f"{gpu}{found.get('cpu')}, {found.get('cores')} cores" if found else None

    def versions(run):
        found = start(run)
        packages = found.get("packages") or {}
        words = [f"python {found['python']}"] if "python" in found else []
        return ", ".join(words + [f"{name} {version}" for name, version in packages.items()])

    def cost(run):
        tokens, flops = last(run, "tokens"), run.about.get("flops_per_token")
        if not (tokens and is_number(flops)):
            return None
        return f"{short(tokens)} tokens x {short(flops)}FLOP = {short(tokens * flops)}FLOP"

    def seconds(run):
        points = points_of(run, "seconds", "loss")
        return f"{points[-1][0]:,.1f} s in steps" if points else None

    def size(run):
        return f"{run.about['parameters']:,}" if is_number(run.about.get("parameters")) else None

    def memory(run):
        parameters = run.about.get("parameters")
        if not is_number(parameters):
            return None
        return (
            f"{short(4 * parameters)}B of weights in float32, {short(16 * parameters)}B in training"
        )

    def checkpoints(run):
        return ", ".join(f"{name} ({short(n)}B)" for name, n in run.checkpoints)

    return by_run(
        runs,
        [
            ("best validation loss", best),
            ("steps", lambda run: last(run, "step")),
            ("parameters", size),
            ("training", cost),
            ("time", seconds),
            ("weights and moments", memory),
            ("command", lambda run: start(run).get("command")),
            ("begun", lambda run: start(run).get("time")),
            ("starts", lambda run: len(run.about.get("starts") or []) or None),
            ("machine", machine),
            ("versions", versions),
            ("commit", lambda run: start(run).get("commit")),
            ("checkpoints", checkpoints),
        ],
    )


def settings_table(runs):
    """The settings that differ from the defaults in a run, or between the runs."""
    names = {name for run in runs for name in run.about.get("changed") or {}}
    for name in {name for run in runs for name in run.config}:
        values = {json.dumps(run.config[name]) for run in runs if name in run.config}
        if len(values) > 1:
            names.add(name)
    values = [(name, lambda run, name=name: run.config.get(name)) for name in sorted(names)]
    return by_run(runs, values)


def evaluations(runs):
    """eval.json of every run: each figure with its interval, n and chance."""
    keys = {}
    for run in runs:
        for figure in run.figures:
            keys.setdefault((figure["task"], figure["metric"]), {})[run.folder] = figure
    if not keys:
        return ""
    rows = []
    for (task, metric), found in keys.items():
        some = next(iter(found.values()))
        cells = [figure_text(found.get(run.folder)) for run in runs]
        guessing = some.get("chance")
        chance = f"{guessing:.3f}" if is_number(guessing) else ""
        rows.append([f"{task}, {metric}", *cells, some.get("n", ""), chance])
    head = ["", *(f"{run.name} (95% interval)" for run in runs), "n", "chance"]
    return "<h2>Evaluations</h2>" + table(head, rows)


def figure_text(figure):
    """A figure with its interval as text."""
    if figure is None or not all(is_number(figure[name]) for name in ("value", "low", "high")):
        return ""
    value, low, high = (number_text(figure[name]) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def tests(runs):
    """test.json of every run: figures before and after fine-tuning."""
    rows = []
    for run in runs:
        before, after = (run.test.get(when) for when in ("before", "after"))
        before, after = (each if isinstance(each, dict) else {} for each in (before, after))
        for name, value in after.items():
            numbers = (before.get(name), value)
            shown = [f"{number:.4f}" if is_number(number) else "" for number in numbers]
            rows.append([run.name, name, *shown])
    if not rows:
        return ""
    head = ["run", "on test data", "before training", "after"]
    return "<h2>Before and after fine-tuning</h2>" + table(head, rows)


def samples(runs, most=6):
    """Texts of the model through training, `most` of each run, evenly spaced."""
    parts = []
    for run in runs:
        count = len(run.samples)
        chosen = (
            sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)})
            if count
            else []
        )
        for i in chosen:
            sample = run.samples[i]
            heading = f"{run.name}, step {sample.get('step')}"
            text = f"<pre>{escape(sample['text'][:1500])}</pre>"
            parts.append(f"<section><h3>{escape(heading)}</h3>{text}</section>")
    return "<h2>Text through training</h2>" + "".join(parts) if parts else ""


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --rule: #d6dae0; --soft: #5b6470 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --paper: #14171b; --rule: #363c45; --soft: #9aa4b2 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1180px; margin: 0 auto; padding: 1rem }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 1rem }
figure { margin: 0 } figcaption, th { font-weight: 600; text-align: left }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif; stroke-width: 1.5 }
figure ul { list-style: none; padding: 0; margin: .2rem 0; font-size: 13px }
figure li svg { width: 20px; height: 8px; margin-right: .5rem }
svg text { fill: var(--ink) } .grid { stroke: var(--rule); stroke-width: 1 }
.end { text-anchor: end } .mid { text-anchor: middle }
.wide { overflow-x: auto } table { border-collapse: collapse; min-width: 50% }
td, th { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--rule); vertical-align: top }
td:first-child { color: var(--soft) } td { overflow-wrap: anywhere; min-width: 7rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--rule);
  padding-left: .8rem }
@media print { body { max-width: none; font-size: 11px } figure, section, tr { break-inside: avoid } }
"""


def page(runs):
    """The whole page as HTML."""
    title = "glassGPT: " + " beside ".join(run.name for run in runs)
    settings = settings_table(runs)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>"
        f"{summary(runs)}<h2>Curves</h2><div class=figures>{pictures(runs)}</div>"
        f"{evaluations(runs)}{tests(runs)}<h2>Settings other than the defaults</h2>{settings}"
        f"{samples(runs)}</html>\n"
    )


def write_report(path, folders):
    """Write the page of one or two runs to a new .html file, or in place of an earlier page.

    Raises ValueError for other numbers of runs, and for a file that is no such page.
    """
    if not 1 <= len(folders) <= 2:
        raise ValueError(
            f"--report={path} is for one or two runs, found {len(folders)}: "
            "write --report=FILE.html out/A [out/B]"
        )
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"report={path} must end in .html: rename it")
    if path.exists() and not re.search("<title>glassGPT: ", path.read_text(errors="replace")[:300]):
        raise ValueError(f"report={path} is there and no page of a run: name another file")
    write_text(path, page([read_run(folder) for folder in folders]))
    print(f"{path} is written: open it in a browser")
