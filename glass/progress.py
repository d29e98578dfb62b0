"""What a person sees of a run in training: lines or a bar, metrics.jsonl, loss.png, texts, W&B."""

import contextlib
import datetime
import json
import os
import shlex
import signal
import sys
import time
import types
from dataclasses import asdict

import torch

from glass.device import peak_flops
from glass.files import first_line, replacing, write_text

QUICK = "quick_"  # begins the name of a figure that comes from a few validation windows only


class Progress:
    """Shows and records a run. Only the main process does; the others do nothing."""

    def __init__(self, run):
        s, model = run.settings, run.model
        self.run, self.is_main = run, run.processes.is_main
        self.tokens_per_step = run.task.tokens_per_step
        self.flops_per_step = model.flops_per_token(s.block_size) * self.tokens_per_step
        peak = peak_flops(model.device)
        self.peak_flops = peak and peak * run.processes.size
        self.started_at = time.perf_counter()
        self.paused_s, self.logged_at, self.logged_step = 0.0, 0.0, run.step
        self.loss_sum = torch.zeros(1, device=model.device)  # of the steps since the last line
        self.train_losses = []  # since the last evaluation
        self.lines = []
        if self.is_main:
            self.metrics_path = run.folder / "metrics.jsonl"
            with warned_about(self.metrics_path):
                self.keep_metrics(self.metrics_path)
            with warned_about(run.folder / "samples.jsonl"):
                self.keep_samples(run.folder / "samples.jsonl")
            self.wandb = start_wandb(s) if s.wandb_log else None
            self.bar = None  # where nobody sees one, lines are printed instead
            if sys.stderr.isatty():
                from tqdm import tqdm

                bar = dict(total=s.max_iters, initial=run.step, unit="step", dynamic_ncols=True)
                self.bar = tqdm(**bar)

    def keep_metrics(self, path):
        """Take over the metrics of a resumed run, and remove those from after its checkpoint."""
        if path.exists():
            run = self.run
            evaluates_again = run.step % run.settings.eval_interval == 0
            for line in read_metrics(path):
                comes_again = f"{QUICK}val_loss" in line or ("val_loss" in line and evaluates_again)
                is_kept = line["step"] == run.step and not comes_again
                if line["step"] < run.step or is_kept:
                    self.lines.append(line)
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        write_text(path, text)

    def keep_samples(self, path):
        """Leave out the samples from after a resumed run's checkpoint: they are drawn again."""
        if not path.exists():
            return
        run, kept = self.run, []
        evaluates_again = run.step % run.settings.eval_interval == 0
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                step = json.loads(line)["step"]
                if step < run.step or (step == run.step and not evaluates_again):
                    kept.append(line)
        write_text(path, "".join(kept))

    def seconds(self):
        """Seconds since training began in this process."""
        return time.perf_counter() - self.started_at

    @contextlib.contextmanager
    def paused(self):
        """A context for time in which no step is made: saving, evaluating, sampling."""
        paused_at = self.seconds()
        yield
        self.paused_s += self.seconds() - paused_at

    def write(self, **values):
        """Append a line of values to metrics.jsonl and send it to W&B."""
        self.lines.append(values)
        with warned_about(self.metrics_path):
            with open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        if self.wandb:
            self.wandb.log(values, step=values["step"])

    def add(self, loss):
        """Add the loss of a micro-step to the sum for the next line."""
        self.loss_sum += loss

    def updated(self, step, grad_norm):
        """Write a line of the log if one is due after `step` updates."""
        s, processes = self.run.settings, self.run.processes
        if step % s.log_interval and step != s.max_iters:
            return
        total = processes.reduce(self.loss_sum).item() / processes.size
        self.loss_sum = torch.zeros_like(self.loss_sum)
        if self.is_main:
            self.log(step, total / (step - self.logged_step), grad_norm)

    def log(self, step, mean_loss, grad_norm):
        """Write a line of the log. mean_loss is the mean over the steps since the last line."""
        s, now = self.run.settings, self.seconds() - self.paused_s
        seconds_per_step = (now - self.logged_at) / (step - self.logged_step)
        if self.bar is not None:
            self.bar.update(step - self.logged_step)
        self.logged_at, self.logged_step = now, step
        self.train_losses.append(mean_loss)
        rate = self.tokens_per_step / seconds_per_step
        flops = self.flops_per_step / seconds_per_step
        speed = {
            "step_ms": round(1e3 * seconds_per_step, 3),
            "tokens_per_s": round(rate),
            "tflops": round(flops / 1e12, 4),
        }
        if self.peak_flops:
            speed["mfu"] = round(flops / self.peak_flops, 4)
        figures = self.run.task.take_figures()
        lr = self.run.optimizers[0].param_groups[0]["lr"]
        tokens = step * self.tokens_per_step
        self.write(
            step=step, tokens=tokens, loss=mean_loss, **figures, lr=lr, grad_norm=grad_norm, **speed
        )
        if self.bar is None:
            left = datetime.timedelta(seconds=round((s.max_iters - step) * seconds_per_step))
            shown = described({"loss": mean_loss, **figures})
            timing = f"{1e3 * seconds_per_step:.1f} ms, {rate:,.0f} tokens/s, {left} left"
            say(f"step {step}/{s.max_iters}: {shown}, {timing}")
        else:
            self.bar.set_postfix_str(f"loss {mean_loss:.3f}, {rate:,.0f} tokens/s")

    def evaluated(self, figures, text=None):
        """Report an evaluation, redraw loss.png and show a sample of text, if there is one.

        figures: the results by name.
        """
        if not self.is_main:
            return
        run, step = self.run, self.run.step
        seconds, parts, train_loss = self.seconds(), [], None
        if self.train_losses:
            train_loss = sum(self.train_losses) / len(self.train_losses)
            parts.append(f"train loss {train_loss:.4f} (mean since the last evaluation)")
        is_best = run.best_step == step
        parts.append(described(figures))
        parts.append("the best so far" if is_best else f"best {run.best_val_loss:.4f}")
        say(f"step {step}: {', '.join(parts)}, after {seconds:.1f} s")
        tokens = step * self.tokens_per_step
        self.write(step=step, tokens=tokens, train_loss=train_loss, **figures, seconds=seconds)
        self.train_losses = []
        if text is not None:
            say(text)
            with warned_about(run.folder / "samples.jsonl"):
                with open(run.folder / "samples.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, "text": text}) + "\n")
        with warned_about(run.folder / "loss.png"):
            draw_losses(self.lines, run.folder / "loss.png")

    def glanced(self, figures, n_rows):
        """Report an evaluation of only n_rows validation rows, for the curve."""
        if not self.is_main:
            return
        step = self.run.step
        say(f"step {step}: {described(figures)} (a look at {n_rows} validation rows)")
        quick = {QUICK + name: value for name, value in figures.items()}
        self.write(step=step, tokens=step * self.tokens_per_step, **quick)

    def close(self, stop):
        """Say how to go on from here.

        stop: the number of the signal that ended the run, or 0.
        """
        if not self.is_main:
            return
        if self.bar is not None:
            self.bar.close()
        run, script = self.run, self.run.task.script
        if stop:
            name = signal.Signals(stop).name
            say(f"stopped by {name} after step {run.step}; {run.last_checkpoint()}")
        folder = shlex.quote(str(run.folder))
        if run.step < run.settings.max_iters and run.saved_step is not None:
            say(f"to go on: python {script} --init_from=resume --out_dir={folder}")
        say(f"{self.seconds():.1f} s of training in all")
        if run.saved_step is not None:
            say(f"for text: python sample.py --out_dir={folder}")


def read_metrics(path):
    """The lines of metrics.jsonl, a list of dicts. Torn or foreign lines are left out."""
    lines, torn = [], 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            is_ours = isinstance(line, dict) and all(
                isinstance(value, int | float | types.NoneType) for value in line.values()
            )
            is_ours = is_ours and all(type(line.get(key)) is int for key in ("step", "tokens"))
        except (ValueError, RecursionError):
            is_ours = False
        if is_ours:
            lines.append(line)
        else:
            torn += 1
    if torn:
        say(f"{torn} lines of {path} are torn and left out")
    return lines


@contextlib.contextmanager
def warned_about(path):
    """A context that turns a failure to write the file `path` into a warning."""
    try:
        yield
    except Exception as error:  # matplotlib and safetensors raise errors of many kinds
        say(f"WARNING: {path} is not written ({first_line(error)}); the run goes on")


def described(figures):
    """Figures by name, in words: `val loss 1.2345, val bits per byte 1.8000`."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())


def say(text):
    """Print above the progress bar, if there is one; of several processes, the first alone prints.

    If nobody reads any more (a closed pipe, a terminal that is gone), further text is dropped.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        return
    try:
        if bars := sys.modules.get("tqdm"):
            bars.tqdm.write(str(text), file=sys.stdout)
        else:
            print(text)
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open to the end)


def open_figure(**options):
    """(pyplot, figure, axes), for drawing without a screen."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook names one that is often not there
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot, *pyplot.subplots(layout="constrained", **options)


def save_figure(pyplot, figure, path):
    """Write a figure as PNG and close it."""
    try:
        with replacing(path) as partial:
            figure.savefig(partial, format="png", dpi=120)
    finally:
        pyplot.close(figure)


def draw_losses(lines, path):
    """Draw loss.png: the training and validation loss by tokens.

    If the run has an accuracy or a reward, it draws that instead, by step. lines: the run's
    metrics, a list of dicts.
    """
    name, x, title = "loss", "tokens", "loss (nats per token)"
    for other in ("accuracy", "reward"):
        if any(other in line for line in lines):
            name, x, title = other, "step", f"mean {other}"
    curves = {
        name: ("training", "-"),
        f"{QUICK}val_{name}": ("validation, a few windows", ".--"),
        f"val_{name}": ("validation", "o-"),
    }
    pyplot, figure, axes = open_figure(figsize=(7, 4.5))
    for key, (label, style) in curves.items():
        points = [(line[x], line[key]) for line in lines if key in line]
        if points:
            label = f"{label} {points[-1][1]:.3f}"
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
    axes.set(xlabel=x, ylabel=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(pyplot, figure, path)


def draw_confusion(confusion, labels, path):
    """Draw how often each true class (row) was predicted as each class (column).

    confusion: a list of rows of counts.
    """
    labels = [label[:30] for label in labels]
    size = 2.5 + 0.6 * len(labels)
    pyplot, figure, axes = open_figure(figsize=(size + 0.5, size))
    axes.imshow(confusion, cmap="Blues")
    half = max(map(max, confusion)) / 2
    for true, row in enumerate(confusion):
        for predicted, count in enumerate(row):
            colour = "white" if count > half else "black"
            axes.text(predicted, true, count, ha="center", va="center", color=colour)
    places = range(len(labels))
    axes.set(xlabel="predicted", ylabel="true", xticks=places, yticks=places)
    texts = [label.replace("$", r"\$") for label in labels]  # else matplotlib sets them as formulas
    axes.set_xticklabels(texts)
    axes.set_yticklabels(texts)
    save_figure(pyplot, figure, path)


def import_wandb():
    """The package wandb. Raises ValueError if it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "wandb_log=True but wandb is not installed: pip install wandb, or leave it off"
        ) from error
    return wandb


def start_wandb(settings):
    """The package wandb, with a W&B run begun."""
    wandb = import_wandb()
    names = dict(project=settings.wandb_project, name=settings.wandb_run_name)
    wandb.init(config=asdict(settings), **names)
    return wandb
