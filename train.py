"""Train a model: `python train.py config/shakespeare_char.py --key=value`, or under torchrun on several devices.

A run is a function of (config, step): the rows of step s, its dropout noise and its learning rate come from the seed and
s alone. So evaluating more often changes nothing, and a run that was killed and resumed ends in the weights it would
have had. The step itself is in `train`, whole.
"""

import ctypes
import functools
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import config
import prepare
from model import GPT, GPTConfig, autocast, choose_device, choose_dtype
from progress import Progress, bits_per_byte, described, sample_text, say

HERE = Path(__file__).resolve().parent


@dataclass
class Settings(GPTConfig):
    """Everything a run depends on. GPTConfig's settings come first; names and defaults are nanoGPT's where it has one."""

    # what to train, and where it goes
    init_from: str = "scratch"  # scratch | resume (from out_dir) | auto (resume if there is a checkpoint) | gpt2... or a folder
    dataset: str = "openwebtext"  # a name under data/, or a folder
    out_dir: str = "out"  # checkpoints, metrics.jsonl, loss.png; the next free name is taken if it holds a run
    overwrite: bool = False  # reuse an out_dir that holds another run
    seed: int = 1337  # of weights, data order and noise
    # evaluation and logging
    eval_interval: int = 2000  # steps between evaluations
    eval_iters: int | None = 200  # evenly spaced batches of the validation split in one estimate; None takes the whole split
    eval_only: bool = False  # evaluate once and stop
    log_interval: int = 1  # steps between lines of metrics.jsonl
    checkpoint_interval: int | None = None  # steps between checkpoints, eval_interval where None
    always_save_checkpoint: bool = True  # nanoGPT's; here the last two checkpoints and the best are always kept
    sample_tokens: int | None = 100  # length of the text sampled at each evaluation; None for no text
    wandb_log: bool = False  # log to Weights & Biases too
    wandb_project: str = "glassgpt"  # its project
    wandb_run_name: str = "run"  # its run
    # one step
    batch_size: int = 12  # sequences of one micro-step
    gradient_accumulation_steps: int = 40  # micro-steps of one step, over all processes
    grad_clip: float = 1.0  # largest norm of the gradient; 0 for no limit
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks, AdamW for the rest
    learning_rate: float = 6e-4  # largest, of AdamW
    muon_lr: float = 0.02  # largest, of Muon; the warm-up and decay of learning_rate apply to it in proportion
    momentum: float = 0.95  # of Muon
    muon_weight_decay: float = 0.0  # of Muon's matrices
    weight_decay: float = 0.1  # of the other matrices and embeddings
    beta1: float = 0.9  # decay of AdamW's mean
    beta2: float = 0.95  # decay of AdamW's mean square
    max_iters: int = 600000  # steps (updates) of the run
    decay_lr: bool = True  # warm up and decay; else learning_rate throughout
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_shape: Literal["cosine", "linear"] = "cosine"  # of the decay after the warm-up
    cooldown: float = 1.0  # share of the steps, the last ones, in which linear decays; below 1: warm-up, stable, decay
    lr_decay_iters: int = 600000  # step at which the decay reaches min_lr
    min_lr: float = 6e-5  # where the decay ends, in units of learning_rate's
    patience: int | None = None  # stop after this many evaluations without a better one
    max_minutes: float | None = None  # stop, with a checkpoint, after this time; the schedule stays what it is
    # machine
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; weights stay float32
    compile: bool | Literal["auto"] = "auto"  # torch.compile; auto: on a GPU
    backend: str | None = None  # of torch.distributed; None: nccl on GPUs, gloo on CPUs

    def __post_init__(self):
        super().__post_init__()
        counts = "eval_interval eval_iters log_interval checkpoint_interval batch_size gradient_accumulation_steps"
        for name in (*counts.split(), "sample_tokens", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_iters < 0 or self.grad_clip < 0:
            raise ValueError(f"max_iters={self.max_iters} and grad_clip={self.grad_clip} must not be negative")
        if not 0 < self.cooldown <= 1:
            raise ValueError(f"cooldown={self.cooldown} must lie in (0, 1]: it is a share of the steps")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        if self.checkpoint_interval is None:
            self.checkpoint_interval = self.eval_interval


# settings of a model that its weights do not rest on
FREE = {"dropout", "attn_dropout", "attention", "loss_chunk"}
# what weights and optimizer state rest on: fixed once a run began
MEANING = [f.name for f in fields(GPTConfig) if f.name not in FREE] + ["dataset", "optimizer"]
# what may change on resumption, with a line that says so
CHANGES_RUN = """seed batch_size gradient_accumulation_steps dropout attn_dropout grad_clip learning_rate muon_lr momentum
muon_weight_decay weight_decay beta1 beta2 decay_lr warmup_iters lr_shape cooldown lr_decay_iters min_lr dtype""".split()


def model_config(settings, vocab_size):
    """The GPTConfig among the settings, with the tokenizer's vocabulary."""
    return GPTConfig(**{f.name: getattr(settings, f.name) for f in fields(GPTConfig)} | {"vocab_size": vocab_size})


MAX_SKIPPED = 20  # steps in a row without a finite gradient, after which a run stops


class Windows:
    """The training split as an endless list of rows (block_size + 1,): row r is a function of the seed and r alone.

    An epoch goes through the shards, and through the windows within a shard, in a seeded order without replacement; each
    epoch has its own order, and each shard in it its own offset, so that windows are cut elsewhere every time.
    """

    def __init__(self, shards, block_size, seed):
        self.T, self.seed = block_size, seed
        self.shards = [shard for shard in shards if len(shard) > block_size]
        # one window less than fit, so that every offset below block_size leaves as many
        self.counts = [max(1, len(shard) // block_size - 1) for shard in self.shards]
        self.epoch_rows = sum(self.counts)
        if not self.epoch_rows:
            longest = max((len(shard) for shard in shards), default=0)
            found = f"the training text has {longest} tokens but block_size={block_size} needs one more than that"
            raise ValueError(f"{found}: lower block_size or add text")

    @functools.lru_cache(maxsize=4)  # noqa: B019 (one object per run)
    def order(self, epoch):
        """The order of the shards in an epoch, and the row at which each begins and the last ends."""
        shards = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))
        return shards, np.cumsum([0, *(self.counts[s] for s in shards)])

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def starts(self, epoch, shard):
        """First token of each window of a shard, in the order of that epoch."""
        random, T = np.random.default_rng((self.seed, epoch, shard)), self.T
        offset = random.integers(min(T, len(self.shards[shard]) - self.counts[shard] * T))
        return offset + T * random.permutation(self.counts[shard])

    def rows(self, first, count):
        """Rows first to first + count - 1: (count, T + 1) int64 tensor; its inputs are [:, :-1], its targets [:, 1:]."""
        pieces = []
        while count:
            epoch, row = divmod(first, self.epoch_rows)
            shards, begins = self.order(epoch)
            place = int(np.searchsorted(begins, row, side="right")) - 1
            shard = int(shards[place])
            starts = self.starts(epoch, shard)[row - begins[place] :][:count]
            pieces.append(self.shards[shard][starts[:, None] + np.arange(self.T + 1)].astype(np.int64))
            first, count = first + len(starts), count - len(starts)
        return torch.from_numpy(np.concatenate(pieces))


def evaluation_batches(shards, block_size, batch_size, eval_iters):
    """Yield (idx, targets), each (batch_size, T), over a split: window i of a shard is its tokens iT to iT + T.

    Every token after a shard's first is scored once: a last window may be shorter and a last batch smaller, and what is
    missing has targets -100. With eval_iters, that many evenly spaced batches.
    """
    windows = [(shard, start) for shard in shards for start in range(0, len(shard) - 1, block_size)]
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    if eval_iters is not None and eval_iters < len(batches):
        batches = [batches[i * len(batches) // eval_iters] for i in range(eval_iters)]
    for batch in batches:
        idx = torch.zeros(batch_size, block_size, dtype=torch.int64)
        targets = torch.full((batch_size, block_size), -100)
        for row, (shard, start) in enumerate(batch):
            tokens = torch.from_numpy(shard[start : start + block_size + 1].astype(np.int64))
            idx[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        yield idx, targets


@torch.no_grad()
def estimate_loss(model, batches, context, rank=0, world_size=1):
    """Mean cross-entropy in nats over all scored tokens of the batches; each rank takes its share, all get the mean."""
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)  # summed loss, scored tokens
    for i, (idx, targets) in enumerate(batches):
        if i % world_size == rank:
            scored = int((targets != -100).sum())
            with context:
                loss = model(idx.to(model.device), targets.to(model.device))[1]
            total += torch.tensor([loss.item() * scored, scored], dtype=torch.float64)
    model.train(was_training)
    total = all_reduce(total, world_size, model.device)
    return (total[0] / total[1]).item()


def all_reduce(values, world_size, device, op=dist.ReduceOp.SUM):
    """values (n,) summed, or otherwise reduced, over all processes."""
    if world_size == 1:
        return values
    values = values.to(device, torch.float32 if device.type == "mps" else values.dtype)
    dist.all_reduce(values, op)
    return values.cpu()


def learning_rate_at(step, settings):
    """The share of the largest learning rate at which update `step` (from 0) is made: linear warm-up, then the decay."""
    s = settings
    if not s.decay_lr:
        return 1.0
    if step < s.warmup_iters:
        return (step + 1) / (s.warmup_iters + 1)
    lowest = s.min_lr / s.learning_rate
    progress = min(1.0, (step - s.warmup_iters) / max(1, s.lr_decay_iters - s.warmup_iters))
    if s.lr_shape == "linear":
        return lowest + (1 - lowest) * min(1.0, (1 - progress) / s.cooldown)
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def orthogonalise(matrices):
    """The nearest semi-orthogonal matrix to each of a batch (n, rows, columns), roughly: singular values become 0.7 to 1.2.

    Five steps of a quintic Newton-Schulz iteration in bfloat16, x = 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x,
    sums fused into the products (on two cores 23 ms instead of 47 for 16 matrices of 256 x 256).
    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    """
    x = matrices.bfloat16()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for the matrices of the blocks; matrices of one shape as one batch.

    Nesterov momentum; an update has the scale sqrt(max(1, rows / columns)) times lr, so that lr means the same for every
    shape. Decoupled weight decay. Source: as `orthogonalise`.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("momentum", torch.zeros_like(p))
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), same in by_shape.items():
                grads, momenta = [p.grad for p in same], [self.state[p]["momentum"] for p in same]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                ahead = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))  # (n, rows, columns), Nesterov's
                updates = orthogonalise(ahead)
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(same, list(updates.to(same[0].dtype)), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def make_optimizers(model, settings):
    """AdamW, with weight decay on matrices and embeddings only; with optimizer='muon' the blocks' matrices go to Muon."""
    s, weights = settings, [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2 and p.requires_grad] if s.optimizer == "muon" else []
    for_muon = set(matrices)
    groups = [
        {"params": [p for p in weights if p.dim() >= 2 and p not in for_muon], "weight_decay": s.weight_decay},
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=True)]
    optimizers += [Muon(matrices, s.muon_lr, s.momentum, s.muon_weight_decay)] if matrices else []
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["largest_lr"] = group["lr"]
    return optimizers


def keep_freed_memory():
    """Tell glibc to keep what is freed: handing pages back and faulting them in again is a third of a step on a CPU.

    M_TRIM_THRESHOLD, M_MMAP_MAX of mallopt(3). Elsewhere than on glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)
        mallopt(-4, 0)
    except (OSError, AttributeError):
        pass


class StopSignals:
    """Notes SIGINT, SIGTERM and SIGUSR1 (Slurm's warning), for the loop to save and stop; a second SIGINT exits at once."""

    def __init__(self):
        self.received = 0
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            signal.signal(getattr(signal, name), self.note)

    def note(self, number, frame):
        if number == self.received == signal.SIGINT:
            os._exit(128 + number)  # nothing is half written: checkpoints are renamed into place
        self.received = number


class Run:
    """What a run knows of itself beside model and optimizer: its place, its folder, its best loss, how to save; and its
    work: the rows of a step, their loss, the evaluation. This one pretrains; finetune.py's do other work."""

    def __init__(self, settings, dataset, windows, state, is_main):
        self.settings, self.dataset, self.is_main, self.folder = settings, dataset, is_main, Path(settings.out_dir)
        self.windows, self.tokenizer, self.device = windows, dataset.tokenizer, choose_device(settings.device)
        self.tokens_per_step = settings.batch_size * settings.gradient_accumulation_steps * settings.block_size
        self.step = state["step"] if state else 0
        self.best_val_loss = state["best_val_loss"] if state else math.inf
        self.evaluations_without_better = state["evaluations_without_better"] if state else 0
        self.saved_step = self.step if state else None

    def save(self, model, optimizers, scaler):
        """Write the checkpoint of this step, once, from the main process. A failure is reported and training goes on."""
        if not self.is_main or self.saved_step == self.step:
            return
        state = {
            "model": model.state_dict(),
            "optimizer": [optimizer.state_dict() for optimizer in optimizers],
            "scaler": scaler.state_dict(),
            "best_val_loss": self.best_val_loss,
            "evaluations_without_better": self.evaluations_without_better,
            "settings": asdict(self.settings),
            "model_config": asdict(model.config),
            "tokenizer": self.tokenizer.to_dict(),
            "data": self.dataset.sha256,
            **self.further_state(),
        }
        try:
            checkpoint.save(self.folder, self.step, state)
            self.saved_step = self.step
        except OSError as error:
            say(f"WARNING: no checkpoint at step {self.step}: {error}; training goes on, {self.last_checkpoint()}")

    def note_evaluation(self, val_loss, model, optimizers, scaler):
        """Count the evaluation, and where its loss is the lowest so far, make this step's checkpoint the best."""
        self.evaluations_without_better += 1
        if val_loss < self.best_val_loss:
            self.best_val_loss, self.evaluations_without_better = val_loss, 0
            self.save(model, optimizers, scaler)
            if self.is_main and self.saved_step == self.step:
                checkpoint.mark_best(self.folder, self.step)

    def further_state(self):
        """What the checkpoint of this kind of run holds beside the usual."""
        return {}

    def rows(self, first, count):
        """Rows first to first + count - 1 of the endless list that the run works through."""
        return self.windows.rows(first, count)

    def loss(self, model, rows, all_rows):
        """What some of this step's rows add to its mean loss."""
        return model(*make_batch(rows, self.device))[1] * (len(rows) / len(all_rows))

    def take_figures(self):
        """Further figures for a line of the log."""
        return {}

    def evaluate(self, model, context, rank=0, world_size=1):
        """The figures of an evaluation by name; `val_loss` decides which checkpoint is the best."""
        s = self.settings
        batches = evaluation_batches(self.dataset.splits["val"], s.block_size, s.batch_size, s.eval_iters)
        val_loss = estimate_loss(model, batches, context, rank, world_size)
        return {"val_loss": val_loss, "val_bits_per_byte": bits_per_byte(val_loss, self.dataset)}

    def sample(self, model):
        """Text to look at after an evaluation."""
        return sample_text(model, self.tokenizer, self.settings)

    def last_checkpoint(self):
        steps = checkpoint.saved_steps(self.folder)
        if not steps:
            return "there is no checkpoint yet"
        return f"the last checkpoint is {checkpoint.checkpoint_path(self.folder, steps[-1])}"


def noise_seed(seed, step, rank):
    """A seed for the dropout noise of one step of one process."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


def make_batch(rows, device):
    """rows (b, T + 1) -> idx (b, T) and targets (b, T) on the device, without waiting for the copy on a GPU."""
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    rows = rows.to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def train(model, optimizers, scaler, run, progress, rank=0, world_size=1):
    """Update the model from run.step to max_iters. Returns the number of the signal that stopped it, or 0.

    At the top of round `step`, `step` updates are done: there the run saves first, then evaluates.
    """
    s, device, signals = run.settings, model.device, StopSignals()
    context = autocast(device, choose_dtype(s.dtype, device))
    G = s.batch_size * s.gradient_accumulation_steps  # sequences of one step, over all processes
    share = G // world_size  # of them are this rank's
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    rows = run.rows(run.step * G + rank * share, share)  # (share, T + 1) where the run pretrains
    loss_sum, logged_step = torch.zeros(1, device=device), run.step  # of the steps since the last line of the log
    skipped_in_a_row, started_at = 0, time.perf_counter()
    model.train()

    for step in range(run.step, s.max_iters + 1):
        run.step, is_last = step, step == s.max_iters
        out_of_time = s.max_minutes is not None and time.perf_counter() - started_at > 60 * s.max_minutes
        flags = torch.tensor([signals.received, out_of_time])
        stop, out_of_time = all_reduce(flags, world_size, device, dist.ReduceOp.MAX).tolist()  # all ranks stop together
        ends = is_last or stop or out_of_time
        if step and (ends or step % s.checkpoint_interval == 0):
            run.save(model, optimizers, scaler)
        if step and not stop and (ends or step % s.eval_interval == 0):
            figures = run.evaluate(model, context, rank, world_size)
            run.note_evaluation(figures["val_loss"], model, optimizers, scaler)
            if progress:
                progress.evaluated(step, figures)
        if ends or (s.patience and run.evaluations_without_better >= s.patience):
            break

        # one update: learning rate and noise are functions of the step, the gradient is the mean over all G rows
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["largest_lr"] * learning_rate_at(step, s)
        torch.manual_seed(noise_seed(s.seed, step, rank))
        for first in range(0, share, s.batch_size):
            if world_size > 1:  # gradients are exchanged in the last backward pass only; DDP reads this in its forward
                wrapped.require_backward_grad_sync = first + s.batch_size >= share
            with context:
                loss = run.loss(wrapped, rows[first : first + s.batch_size], rows)
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        rows = run.rows((step + 1) * G + rank * share, share)  # read while a GPU still works
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf).item()
        for optimizer in optimizers:
            if math.isfinite(grad_norm) or scaler.is_enabled():  # a scaler skips such a step itself, and lowers its scale
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()

        skipped_in_a_row = 0 if math.isfinite(grad_norm) else skipped_in_a_row + 1
        if skipped_in_a_row == MAX_SKIPPED:
            raise ValueError(
                f"the gradient of {MAX_SKIPPED} steps in a row, up to {step}, is not finite: "
                f"lower learning_rate={s.learning_rate} and resume; {run.last_checkpoint()}"
            )
        if (step + 1) % s.log_interval == 0 or step + 1 == s.max_iters:
            mean_loss = all_reduce(loss_sum, world_size, device).item() / world_size / (step + 1 - logged_step)
            if progress:
                progress.logged(step + 1, mean_loss, grad_norm, lr=optimizers[0].param_groups[0]["lr"])
            loss_sum, logged_step = torch.zeros(1, device=device), step + 1
    return stop


def compile_in_place(model, run, context):
    """Compile the model in place if asked to, or by 'auto' on a GPU; where that fails, say so once and stay eager."""
    s = run.settings
    if s.compile is False or s.compile == "auto" and model.device.type != "cuda":
        return
    rows = run.windows.rows(0, s.batch_size)
    model.compile(dynamic=False)
    try:
        with context:
            model(*make_batch(rows, model.device))[1].backward()
    except Exception as error:  # whatever the compiler's parts raise where one is missing
        model._compiled_call_impl = None
        say(f"compile failed, training goes on without it ({checkpoint.first_line(error)})")
    model.zero_grad(set_to_none=True)


def open_or_prepare(name, world_size):
    """The dataset; if it is not there, and needs no large download, it is prepared first."""
    try:
        return prepare.open_dataset(name)
    except FileNotFoundError:
        if world_size > 1 or prepare.download_bytes(name) > 100e6:
            raise
    say(f"dataset {name} is not there yet: preparing it")
    prepare.prepare(prepare.Settings(name=name))
    return prepare.open_dataset(name)


def resolve(given, Settings=Settings, meaning=MEANING):
    """The settings of this run and the checkpoint state it goes on from, or None.

    On resumption the checkpoint's settings are the base, and given ones override them: those that change what the
    weights mean are refused, those that change the run are named in a line, the rest pass silently.
    """
    init_from = given.get("init_from", "scratch")
    if init_from != "resume" and not (init_from == "auto" and checkpoint.saved_steps(given.get("out_dir", Settings.out_dir))):
        return Settings(**given), None
    out_dir = given.get("out_dir") or checkpoint.newest_run()
    state = checkpoint.load(out_dir)
    before = state["settings"]
    changed = {key: value for key, value in given.items() if value != before[key]}
    for key in changed.keys() & set(meaning):
        found = f"{key}={changed[key]} but the run in {out_dir} has {key}={before[key]}"
        raise ValueError(f"{found}, which its state rests on: leave it, or start a new run")
    if named := [f"{key}={value} (was {before[key]})" for key, value in changed.items() if key in CHANGES_RUN]:
        say("resuming with " + ", ".join(named))
    return Settings(**{**before, **given, "out_dir": str(out_dir)}), state


def build_model(settings, dataset, state, device):
    """The model on its device: fresh, from the checkpoint's state, or with published weights."""
    if state:
        model = GPT(GPTConfig(**state["model_config"]))
        model.load_state_dict(state["model"])
    elif settings.init_from in ("scratch", "auto"):
        torch.manual_seed(settings.seed)
        model = GPT(model_config(settings, dataset.tokenizer.vocab_size))
    else:
        model = GPT.from_pretrained(settings.init_from, dtype=torch.float32, dropout=settings.dropout)
        found = f"block_size={settings.block_size} with tokens below {dataset.tokenizer.vocab_size}"
        if settings.block_size > model.config.block_size or dataset.tokenizer.vocab_size > model.config.vocab_size:
            wanted = f"at most block_size={model.config.block_size} and vocab_size={model.config.vocab_size}"
            advice = "lower block_size, or prepare the text with its tokenizer"
            raise ValueError(f"{found}, but {settings.init_from} takes {wanted}: {advice}")
    return model.to(device)


def claim_folder(settings, state):
    """settings with an out_dir that no other run has, made and locked; the lock is to be kept until the run ends."""
    folder, number = settings.out_dir, 1
    while not (state or settings.overwrite or settings.init_from == "auto") and (Path(folder) / "config.json").exists():
        number += 1
        folder = f"{settings.out_dir}-{number}"
    if number > 1:
        say(f"{settings.out_dir} holds a run already, so this one goes to {folder} (--overwrite=True reuses the folder)")
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = checkpoint.lock(folder)
    if settings.overwrite and not state:
        checkpoint.remove_run(folder)
    return replace(settings, out_dir=folder), lock


def check_dataset(settings, dataset, given, state):
    """ValueError where the dataset does not fit the settings, or is not the one that the checkpoint was trained on."""
    vocab_size = dataset.tokenizer.vocab_size
    if given.get("vocab_size", vocab_size) != vocab_size:
        found = f"vocab_size={given['vocab_size']} but the tokenizer of {dataset.folder} has {vocab_size} tokens"
        raise ValueError(f"{found}: leave the setting out")
    if state and (state["data"] != dataset.sha256 or state["tokenizer"] != dataset.tokenizer_dict):
        found = f"{dataset.folder} is not the data that {settings.out_dir} was trained on (sha256 or tokenizer differ)"
        raise ValueError(f"{found}: put that back, or start a new run")
    tokens = sum(map(len, dataset.splits["val"]))
    if tokens < 2:
        found = f"the validation split of {dataset.folder} has {tokens} tokens and 2 are needed"
        raise ValueError(f"{found}: add text, or raise --val_fraction of prepare.py")


def join_processes(settings, device):
    """Join the processes that torchrun started; the device of this one."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # after a restart torchrun's store still holds the addresses of the processes that died: look under another prefix
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore("attempt " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = settings.backend or ("nccl" if device.type == "cuda" else "gloo")
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return device


def main(argv):
    resuming = "--init_from=resume" in argv
    if not any(word.endswith(".py") for word in argv) and not resuming and not {"-h", "--help"} & set(argv):
        say("no config file is named, so config/pydoc_char.py comes first")
        argv = [str(HERE / "config" / "pydoc_char.py"), *argv]
    given, _ = config.read_arguments(Settings, argv)
    settings, state = resolve(given)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    G = settings.batch_size * settings.gradient_accumulation_steps
    if G % world_size:
        found = f"batch_size x gradient_accumulation_steps={G}"
        raise ValueError(f"{found} must be a multiple of the {world_size} processes: change either")
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    dataset = open_or_prepare(settings.dataset, world_size)
    check_dataset(settings, dataset, given, state)
    if world_size > 1:
        device = join_processes(settings, device)
    if device.type == "cpu":
        keep_freed_memory()

    model = build_model(settings, dataset, state, device)
    optimizers = make_optimizers(model, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if state:
        for optimizer, saved in zip(optimizers, state["optimizer"], strict=True):
            optimizer.load_state_dict(saved)
        scaler.load_state_dict(state["scaler"])
    if rank == 0:
        defaults = asdict(Settings())
        changed = {key: value for key, value in asdict(settings).items() if value != defaults[key]}
        say("settings other than the defaults: " + " ".join(f"{key}={value}" for key, value in changed.items()))
        say(model.summary())
    if settings.eval_only:
        run = Run(settings, dataset, None, state, is_main=False)
        say(described(run.evaluate(model, autocast(device, dtype), rank, world_size)))
        return 0

    windows, lock = Windows(dataset.splits["train"], settings.block_size, settings.seed), None
    if rank == 0:
        settings, lock = claim_folder(settings, state)
    run = Run(settings, dataset, windows, state, is_main=rank == 0)
    if rank == 0:
        (run.folder / "config.json").write_text(json.dumps(asdict(settings), indent=1) + "\n")
        dataset.tokenizer.save(run.folder / "tokenizer.json")
    compile_in_place(model, run, autocast(device, dtype))
    progress = Progress(run, model) if rank == 0 else None
    stop = train(model, optimizers, scaler, run, progress, rank, world_size)
    if rank == 0:
        progress.close(stop)
        lock.close()
    if world_size > 1:
        dist.barrier()  # no process leaves while another still talks to it
        dist.destroy_process_group()
    return 128 + stop if stop else 0


if __name__ == "__main__":
    with config.errors_in_one_line():
        try:
            sys.exit(main(sys.argv[1:]))
        except torch.cuda.OutOfMemoryError as error:
            advice = "lower batch_size (and raise gradient_accumulation_steps) or block_size"
            raise ValueError(f"the GPU's memory is full: {advice}") from error
