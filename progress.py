"""What a person sees of a run while it trains: lines or a bar, metrics.jsonl, loss.png, samples of text, W&B."""

import json
import math
import signal
import sys
import time
from dataclasses import asdict

import torch
from tqdm import tqdm

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16, NVIDIA's data sheets: for mfu


class Progress:
    """What a person sees of a run: a bar or lines, metrics.jsonl, loss.png, a sample of text, W&B. Only rank 0 makes one."""

    def __init__(self, run, model):
        s, self.run, self.model = run.settings, run, model
        self.tokens_per_step = run.tokens_per_step
        self.flops_per_step = model.flops_per_token(s.block_size) * self.tokens_per_step
        self.peak_flops = next((peak for name, peak in PEAK_FLOPS.items() if name in device_name(model.device)), None)
        self.started_at = self.logged_at = time.perf_counter()
        self.logged_step, self.train_losses = run.step, []
        path = run.folder / "metrics.jsonl"
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        # a resumed run goes on where its checkpoint was written, and evaluates there again
        self.lines = [line for line in self.lines if (line["step"], "val_loss" in line) < (run.step, True)]
        path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self.file = open(path, "a", buffering=1)
        self.wandb = start_wandb(s) if s.wandb_log else None
        self.bar = tqdm(total=s.max_iters, initial=run.step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def seconds(self):
        return time.perf_counter() - self.started_at

    def write(self, **values):
        self.lines.append(values)
        self.file.write(json.dumps(values) + "\n")
        if self.wandb:
            self.wandb.log(values, step=values["step"])

    def logged(self, step, mean_loss, grad_norm, lr):
        """A line of the log: `step` updates are done, the loss is the mean over those since the last line."""
        s, now = self.run.settings, time.perf_counter()
        seconds = (now - self.logged_at) / (step - self.logged_step)  # a step
        self.bar.update(step - self.logged_step)
        self.logged_at, self.logged_step = now, step
        self.train_losses.append(mean_loss)
        rate, flops = self.tokens_per_step / seconds, self.flops_per_step / seconds
        speed = {"step_ms": round(1e3 * seconds, 3), "tokens_per_s": round(rate), "tflops": round(flops / 1e12, 4)}
        mfu = {"mfu": round(flops / self.peak_flops, 4)} if self.peak_flops else {}
        tokens = step * self.tokens_per_step
        further = self.run.take_figures()
        self.write(step=step, tokens=tokens, loss=mean_loss, **further, lr=lr, grad_norm=grad_norm, **speed, **mfu)
        if self.bar.disable:
            left = time.strftime("%H:%M:%S", time.gmtime((s.max_iters - step) * seconds))
            timing = f"{1e3 * seconds:.1f} ms, {rate:,.0f} tokens/s, {left} left"
            print(f"step {step}/{s.max_iters}: {described({'loss': mean_loss, **further})}, {timing}", flush=True)
        else:
            self.bar.set_postfix_str(f"loss {mean_loss:.3f}, {rate:,.0f} tokens/s")

    def evaluated(self, step, figures):
        """Report an evaluation, redraw loss.png, show a sample of text; the time this takes is no step's."""
        started_at, run = time.perf_counter(), self.run
        train_loss = sum(self.train_losses) / len(self.train_losses) if self.train_losses else None
        trained = f"train loss {train_loss:.4f} (mean since the last evaluation), " if self.train_losses else ""
        best = "the best so far" if run.best_val_loss == figures["val_loss"] else f"best {run.best_val_loss:.4f}"
        seconds = started_at - self.started_at
        say(f"step {step}: {trained}{described(figures)}, {best}, after {seconds:.1f} s")
        self.write(step=step, tokens=step * self.tokens_per_step, train_loss=train_loss, **figures, seconds=seconds)
        self.train_losses = []
        if run.settings.sample_tokens:
            say(run.sample(self.model))
        draw_losses(self.lines, run.folder / "loss.png")
        self.logged_at += time.perf_counter() - started_at


    def close(self, stop):
        """Last words: how to go on from here."""
        self.bar.close()
        run = self.run
        if stop:
            say(f"stopped by {signal.Signals(stop).name} after step {run.step}; {run.last_checkpoint()}")
        if run.step < run.settings.max_iters:
            say(f"to go on: python train.py --init_from=resume --out_dir={run.folder}")
        say(f"{self.seconds():.1f} s of training in all; for text: python sample.py --out_dir={run.folder}")


def bits_per_byte(loss, dataset):
    """A loss in nats per token, in bits per byte of the validation text: comparable across tokenizers."""
    return loss / math.log(2) / dataset.bytes_per_token["val"]


def described(figures):
    """Figures by name in words: `val loss 1.2345, val bits per byte 1.8`."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())


def say(text):
    """Print above the progress bar, if there is one."""
    tqdm.write(str(text), file=sys.stdout)
    sys.stdout.flush()


def sample_text(model, tokenizer, settings):
    """A text of sample_tokens tokens after a newline, from the model as it is; the noise of training is not touched."""
    was_training = model.training
    model.eval()
    idx = torch.tensor([tokenizer.encode("\n")], device=model.device)
    generator = torch.Generator(model.device).manual_seed(settings.seed)
    new = model.generate(idx, settings.sample_tokens, temperature=0.8, top_k=200, generator=generator)
    model.train(was_training)
    return tokenizer.decode(new[0].tolist()) + "\n"


def draw_losses(lines, path):
    """loss.png: training and validation loss over the tokens seen or, where a run has such, rewards or accuracy by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    key, x, title = "loss", "tokens", "loss (nats per token)"
    for shown in ("accuracy", "reward"):
        if any(shown in line for line in lines):
            key, x, title = shown, "step", f"mean {shown}"
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, label, style in ((key, "training", "-"), (f"val_{key}", "validation", "o-")):
        points = [(line[x], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=f"{label} {points[-1][1]:.3f}", linewidth=1, markersize=3)
    axes.set(xlabel=x, ylabel=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_confusion(confusion, labels, path):
    """A picture of how often each true class (row) was predicted as each class (column)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = 2.5 + 0.6 * len(labels)
    figure, axes = pyplot.subplots(figsize=(size + 0.5, size), layout="constrained")
    axes.imshow(confusion, cmap="Blues")
    for true, row in enumerate(confusion):
        for predicted, count in enumerate(row):
            dark = count > max(map(max, confusion)) / 2
            axes.text(predicted, true, count, ha="center", va="center", color="white" if dark else "black")
    axes.set(xlabel="predicted", ylabel="true", xticks=range(len(labels)), yticks=range(len(labels)))
    axes.set_xticklabels(labels)
    axes.set_yticklabels(labels)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def start_wandb(settings):
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb_log=True but wandb is not installed: pip install wandb, or leave it off") from error
    wandb.init(project=settings.wandb_project, name=settings.wandb_run_name, config=asdict(settings))
    return wandb


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
