"""Train a model: `python train.py config/shakespeare_char.py --key=value`, or under torchrun.

A run is a function of (settings, step): the rows of step s, its dropout noise and its learning rate
come from the seed and s alone. So evaluating more often changes nothing, and a run that is killed
and resumed ends with the same weights as one that is not. `train` holds the whole training step.
"""

import itertools
import math
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

import prepare
from glass import optim, parallel, sharded
from glass.about import write_about
from glass.device import (
    autocast,
    choose_device,
    choose_dtype,
    count_processes,
    join_processes,
    keep_freed_memory,
)
from glass.distill import Teachers, distillation_loss, teacher_names
from glass.files import first_line, write_json
from glass.fused import fuse
from glass.generate import generate
from glass.progress import Progress, described, import_wandb, say
from glass.run import Run, StopSignals, claim_folder, settle
from glass.settings import errors_in_one_line, read_arguments, read_config_file, with_role
from glass.shards import Windows, evaluation_batches, open_dataset
from glass.starting import FRESH, build_model, check_dataset, check_memory
from model import Free, GPTConfig, Tunable, require

DEFAULT_CONFIG = Path(__file__).resolve().parent / "config" / "pydoc_char.py"
# the settings that published weights bring along
WITH_WEIGHTS = {field.name for field in fields(GPTConfig)} - {"block_size"}
WITH_WEIGHTS -= with_role(GPTConfig, "tunable") | with_role(GPTConfig, "free")


@dataclass
class Settings(GPTConfig):
    """Everything a run depends on: the model's settings, then these, named as in nanoGPT."""

    # what to train, and where it goes
    init_from: Free[str] = "scratch"  # scratch | resume | auto (resume if possible) | gpt2 | FOLDER
    dataset: str = "openwebtext"  # a name under data/, or a folder
    out_dir: Free[str] = "out"  # of all output; NAME-2 if it holds a run already, then NAME-3 ...
    overwrite: Free[bool] = False  # reuse an out_dir that holds another run
    seed: Tunable[int] = 1337  # of weights, data order and noise
    # evaluation and logging
    eval_interval: Free[int] = 2000  # steps between evaluations
    eval_iters: Free[int | None] = 200  # evenly spaced batches of the validation split; None: all
    eval_only: Free[bool] = False  # evaluate once and stop
    log_interval: Free[int] = 1  # steps between lines of metrics.jsonl
    checkpoint_interval: Free[int | None] = None  # steps between checkpoints; None: eval_interval
    keep_every: Free[int | None] = None  # steps between weights that stay, to look into later
    always_save_checkpoint: Free[bool] = True  # no effect: the last two and the best are kept
    sample_tokens: Free[int | None] = 100  # length of the text sampled after an evaluation, or None
    wandb_log: Free[bool] = False  # log to Weights & Biases too
    wandb_project: Free[str] = "glassgpt"  # its project
    wandb_run_name: Free[str] = "run"  # its run
    # one step
    batch_size: Tunable[int] = 12  # sequences of one micro-step
    gradient_accumulation_steps: Tunable[int] = 40  # micro-steps of one step, over all processes
    grad_clip: Tunable[float] = 1.0  # largest norm of the gradient; 0: no limit
    # whom to learn from, beside the text: other runs with the same tokens, counts of n-grams
    teachers: Tunable[str | None] = None  # folders of runs or the word ngrams, joined by commas
    teacher_weight: Tunable[float] = 0.8  # of what they predict, in the loss; the text has the rest
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices alone
    learning_rate: Tunable[float] = 6e-4  # peak learning rate of AdamW
    muon_lr: Tunable[float] = 0.02  # peak learning rate of Muon; follows the same schedule
    momentum: Tunable[float] = 0.95  # of Muon
    muon_weight_decay: Tunable[float] = 0.0  # of Muon's matrices
    muon_beta2: Tunable[float] = 0.0  # above 0: NorMuon, the decay of the mean square of its rows
    weight_decay: Tunable[float] = 0.1  # of the other matrices and embeddings
    beta1: Tunable[float] = 0.9  # decay of AdamW's mean
    beta2: Tunable[float] = 0.95  # decay of AdamW's mean square
    max_iters: Free[int] = 600000  # steps (updates) of the run
    decay_lr: Tunable[bool] = True  # warm up and decay; else learning_rate throughout
    warmup_iters: Tunable[int] = 2000  # steps of linear warm-up
    lr_shape: Tunable[Literal["cosine", "linear"]] = "cosine"  # of the decay
    cooldown: Tunable[float] = 1.0  # final fraction of the steps, over which lr_shape=linear decays
    lr_decay_iters: Tunable[int | None] = 600000  # step at which the decay ends; None: max_iters
    min_lr: Tunable[float] = 6e-5  # AdamW's learning rate where the decay ends
    patience: Free[int | None] = None  # stop after this many evaluations without a better one
    max_minutes: Free[float | None] = None  # stop, with a checkpoint, after this time
    # machine
    device: Free[str] = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Tunable[Literal["auto", "float32", "bfloat16", "float16"]] = "auto"  # of products
    compile: Free[bool | Literal["auto"]] = "auto"  # torch.compile; auto: on a GPU
    backend: Free[str | None] = None  # of torch.distributed; None: nccl on GPUs, gloo on CPUs
    # several processes: a copy of the model in each, or shared between all, or within a machine
    parallel: Free[Literal["auto", "ddp", "fsdp", "hsdp"]] = "auto"  # auto: ddp where that fits
    sharded_checkpoint: Free[bool | Literal["auto"]] = "auto"  # each process its part; auto: large

    def __post_init__(self):
        super().__post_init__()
        if self.checkpoint_interval is None:
            self.checkpoint_interval = self.eval_interval
        counts = "eval_interval eval_iters log_interval checkpoint_interval batch_size"
        counts += " gradient_accumulation_steps sample_tokens patience keep_every"
        require(self, counts, lambda value: value >= 1, "be at least 1")
        not_negative = "max_iters grad_clip warmup_iters min_lr weight_decay muon_weight_decay "
        not_negative += "max_minutes"
        require(self, not_negative, lambda value: value >= 0, "not be negative")
        require(self, "learning_rate muon_lr", lambda value: value > 0, "be positive")
        require(
            self, "beta1 beta2 momentum muon_beta2", lambda value: 0 <= value < 1, "lie in [0, 1)"
        )
        require(self, "cooldown", lambda value: 0 < value <= 1, "lie in (0, 1]")
        require(self, "teacher_weight", lambda value: 0 <= value <= 1, "lie in [0, 1]")
        require(self, "max_iters", lambda value: value <= 10**9, "be at most 1,000,000,000")
        if self.teachers and self.loss_chunk:
            raise ValueError(
                f"loss_chunk={self.loss_chunk} does not go with teachers={self.teachers}, which "
                "are compared with all logits: leave one out"
            )
        if not self.out_dir:
            raise ValueError("out_dir='' names no folder: give one, or leave it out")
        if self.decay_lr and self.min_lr > self.learning_rate:
            raise ValueError(
                f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}, so the rate would "
                f"rise where it should decay: add --min_lr={self.learning_rate / 10}"
            )
        require(self, "sample_tokens", lambda value: value <= 10**7, "be at most 10,000,000")
        require(self, "seed", lambda value: 0 <= value < 2**63, "lie in [0, 2^63)")


class Pretraining:
    """The task of predicting the next token. glass/run.py lists what a task has."""

    script = "train.py"

    def __init__(self, settings, dataset, device):
        s = settings
        self.settings, self.dataset, self.device = s, dataset, device
        self.tokenizer, self.data_sha256 = dataset.tokenizer, dataset.sha256
        self.tokens_per_step = s.batch_size * s.gradient_accumulation_steps * s.block_size
        self.windows = Windows(dataset.splits["train"], s.block_size, s.seed)
        if n := self.windows.n_left_out:
            say(f"{n} training shards are no longer than block_size={s.block_size}: left out")
        self.teachers = None
        if s.teachers and not s.eval_only:
            names = teacher_names(s.teachers)
            self.teachers = Teachers(names, dataset.tokenizer, self.windows, device)
            say(f"teachers={s.teachers} make {s.teacher_weight:.0%} of the train loss")

    def begin(self, model):
        pass

    def state(self):
        return {"teachers": self.teachers.sha256} if self.teachers else {}

    def restore(self, model, saved):
        """ValueError where a teacher is no longer what it was: the run would end in other weights."""
        now = self.teachers.sha256 if self.teachers else {}
        for name, sha256 in saved.get("teachers", {}).items():
            if now.get(name, sha256) != sha256:
                raise ValueError(
                    f"teachers: {name} has changed since this run learned from it: give it back "
                    "as it was, or name a folder with other teachers"
                )

    def take_figures(self):
        return {}

    def rows(self, first, count):
        """Windows of the training split, each after its place there: (count, 1 + T + 1) int64."""
        places, tokens = self.windows.places(first, count), self.windows.rows(first, count)
        return torch.from_numpy(np.column_stack([places, tokens]))

    def step_rows(self, step):
        """The numbers of the rows of a step, over all processes."""
        G = self.settings.batch_size * self.settings.gradient_accumulation_steps
        return range(step * G, (step + 1) * G)

    def loss(self, model, rows, step_rows, step):
        """The mean loss of `rows`, (b, 1 + T + 1), times their fraction of the step's rows."""
        places, rows = rows[:, 0], rows[:, 1:]
        if self.device.type == "cuda":  # copied without waiting
            rows = rows.pin_memory().to(self.device, non_blocking=True)
        rows = rows.to(self.device)
        idx, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()  # (b, T) each
        if self.teachers:
            probs = self.teachers.probs(idx, places)
            loss = distillation_loss(model(idx)[0], targets, probs, self.settings.teacher_weight)
        else:
            loss = model(idx, targets)[1]
        return loss * (len(rows) / len(step_rows))

    def evaluate(self, model, context, processes, n_rows=None):
        """Loss, perplexity and bits per byte on the validation split.

        Takes eval_iters evenly spaced batches, or n_rows windows if given.
        """
        s, shards = self.settings, self.dataset.splits["val"]
        batch_size, n_batches = s.batch_size, s.eval_iters
        if n_rows is not None:
            batch_size = min(n_rows, s.batch_size)
            n_batches = n_rows // batch_size
        batches = evaluation_batches(shards, s.block_size, batch_size, n_batches)
        val_loss = estimate_loss(model, batches, context, processes)
        # bits per byte, unlike nats per token, can be compared across tokenizers
        bits_per_byte = val_loss / math.log(2) / self.dataset.bytes_per_token["val"]
        perplexity = math.exp(min(val_loss, 700.0))  # exp overflows float64 at 709.8
        return {
            "val_loss": val_loss,
            "val_perplexity": perplexity,
            "val_bits_per_byte": bits_per_byte,
        }

    def sample(self, model):
        """A text of sample_tokens tokens after a newline. Leaves training's random state alone."""
        s, was_training = self.settings, model.training
        model.eval()
        idx = torch.tensor([self.tokenizer.encode("\n")], device=model.device)
        generator = torch.Generator().manual_seed(s.seed)
        new = generate(model, idx, s.sample_tokens, temperature=0.8, top_k=200, generator=generator)
        model.train(was_training)
        return self.tokenizer.decode(new[0].tolist()) + "\n"


@torch.no_grad()
def estimate_loss(model, batches, context, processes):
    """Mean cross-entropy in nats over all scored tokens.

    batches: pairs of numpy arrays, idx and targets, (B, T) each. The processes take them in turn;
    all get the mean.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)  # summed loss, scored tokens
    batches = iter(batches)
    while turn := list(itertools.islice(batches, processes.size)):
        is_ours = processes.rank < len(turn)
        batch = turn[processes.rank if is_ours else 0]  # a shared model runs in all or in none
        idx, targets = (torch.from_numpy(array).to(model.device) for array in batch)
        n_scored = int((batch[1] != -100).sum()) if is_ours else 0
        with context:
            loss = model(idx, targets)[1]
        total += torch.tensor([loss.item() * n_scored, n_scored], dtype=torch.float64)
    model.train(was_training)
    summed_loss, n_scored = processes.reduce(total).tolist()
    return summed_loss / n_scored


def noise_seed(seed, step, rank):
    """A seed for the dropout noise of one step in one process."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


def train(run, progress):
    """Update the model from run.step to max_iters. Gives the signal that stopped it, or 0."""
    s, model, task, processes = run.settings, run.model, run.task, run.processes
    optimizers, scaler = run.optimizers, run.scaler
    signals, context = StopSignals(), autocast(model.device, choose_dtype(s.dtype, model.device))
    G = s.batch_size * s.gradient_accumulation_steps  # sequences of one step, over all processes
    share = G // processes.size  # of this process
    wrapped = parallel.wrap(model, run.way)
    rows = task.rows(run.step * G + processes.rank * share, share)
    model.train()

    for step in range(run.step, s.max_iters + 1):
        run.step = step  # updates done
        with progress.paused():
            stop, ends = between_updates(run, context, progress, signals)
        if ends:
            return stop

        # one update: rate and noise depend on the step alone; the gradient is the mean over G rows
        optim.set_learning_rates(optimizers, step, s)
        torch.manual_seed(noise_seed(s.seed, step, processes.rank))
        step_rows = task.step_rows(step)
        for first in range(0, share, s.batch_size):
            parallel.exchange(wrapped, run.way, is_last=first + s.batch_size >= share)
            with context:
                loss = wrapped(task.loss, rows[first : first + s.batch_size], step_rows, step)
                loss = loss * processes.size  # the exchange takes the mean over processes
            scaler.scale(loss).backward()
            progress.add(loss.detach())
        # read while the GPU is still busy
        rows = task.rows((step + 1) * G + processes.rank * share, share)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = parallel.clip_gradients(model, s.grad_clip)
        for optimizer in optimizers:
            if math.isfinite(grad_norm):  # else no optimizer moves, and a scaler lowers its scale
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()

        run.count_skipped(grad_norm)
        progress.updated(step + 1, grad_norm)


def between_updates(run, context, progress, signals):
    """Between two updates: save, evaluate, and see whether the run ends here.

    Gives (the signal received or 0, whether to end). Saves first, since an evaluation can run out
    of memory.
    """
    s, step, task, processes = run.settings, run.step, run.task, run.processes
    out_of_time = s.max_minutes is not None and progress.seconds() > 60 * s.max_minutes
    flags = torch.tensor([signals.received, out_of_time])
    stop, out_of_time = processes.reduce(flags, dist.ReduceOp.MAX).tolist()  # all end together
    ends = bool(step == s.max_iters or stop or out_of_time)
    if step and (ends or step % s.checkpoint_interval == 0):
        run.save()
    if step and s.keep_every and step % s.keep_every == 0:
        run.keep_weights()
    glance_interval, n_rows = glances(s)
    if step and not stop and (ends or step % s.eval_interval == 0):
        with parallel.evaluating(run.way, run.model, s):
            figures = task.evaluate(run.model, context, processes)
        run.note_evaluation(figures["val_loss"], is_final=ends)
        takes_part = processes.is_main or run.way in parallel.SHARED
        with parallel.evaluating(run.way, run.model, s):
            text = task.sample(run.model) if s.sample_tokens and takes_part else None
        progress.evaluated(figures, text)
    elif step and not stop and n_rows and step % glance_interval == 0:
        with parallel.evaluating(run.way, run.model, s):
            progress.glanced(task.evaluate(run.model, context, processes, n_rows), n_rows)
    is_stuck = s.patience is not None and run.evaluations_without_better >= s.patience
    return stop, ends or is_stuck


def glances(settings):
    """(steps between two glances at the validation split, rows of a glance; 0: none).

    Glances only give the loss curve its points: ten a run, of at most eight batches. A forward pass
    costs a third of a training step, and all glances together at most a fiftieth of the run.
    """
    s = settings
    interval = max(1, s.max_iters // 10)
    trained_rows = interval * s.batch_size * s.gradient_accumulation_steps
    affordable_rows = trained_rows * 3 // 50
    n_rows = min(8 * s.batch_size, affordable_rows)
    if s.eval_interval <= interval:  # the evaluations themselves are as frequent
        n_rows = 0
    return interval, n_rows


def speed_up(run):
    """Compile the model if asked to, or on a GPU by 'auto'. Where that fails, say so and go on.

    On a CPU that does not compile, a C file does part of the work.
    """
    s, model = run.settings, run.model
    if s.compile is False or (s.compile == "auto" and model.device.type != "cuda"):
        if run.way not in parallel.SHARED:
            fuse(model)
        return
    rows = run.task.rows(0, s.batch_size)
    compiled = model.blocks if run.way in parallel.SHARED else [model]
    for module in compiled:
        module.compile(dynamic=False)
    try:
        with autocast(model.device, choose_dtype(s.dtype, model.device)):
            run.task.loss(model, rows, rows, 0).backward()
    except Exception as error:  # a missing part of the compiler can raise any type
        for module in compiled:
            module._compiled_call_impl = None  # undo compile(): torch has no call for it
        say(f"compile failed, training goes on without it ({first_line(error)})")
    model.zero_grad(set_to_none=True)


def open_or_prepare(name):
    """The dataset; if it is not there, and needs no large download, it is prepared first."""
    try:
        return open_dataset(name)
    except FileNotFoundError:
        source, is_large = prepare.SOURCES.get(name), prepare.download_bytes(name) > 100e6
        if count_processes() > 1 or is_large or source is None:
            raise
        if source.kind != "text":
            script = "evaluate.py --items" if source.kind == "choices" else "finetune.py --dataset"
            raise ValueError(f"dataset={name} is for {script} {name}: train on a text") from None
    say(f"dataset {name} is not there yet: preparing it")
    prepare.prepare(prepare.Settings(name=name))
    return open_dataset(name)


def say_settings(settings):
    """Print the settings that are not the defaults."""
    defaults = asdict(type(settings)())
    changed = {name: value for name, value in asdict(settings).items() if value != defaults[name]}
    shown = " ".join(f"{name}={value}" for name, value in changed.items())
    say(f"settings other than the defaults: {shown}")


def start(settings, chosen, model, way, task, processes, state):
    """(Run, lock of its folder): a new run, or the one of `state`, ready to train.

    chosen: the settings as given, before anything is derived. way: how processes share the model.
    """
    lock = None
    if settings.wandb_log and processes.is_main:
        import_wandb()
    if (
        settings.overwrite
        and Path(settings.init_from).resolve() == Path(settings.out_dir).resolve()
    ):
        raise ValueError(
            f"overwrite=True would remove {settings.out_dir}, which init_from names: "
            "choose another out_dir"
        )
    if settings.teachers and (settings.overwrite or state):
        folders = [Path(name).resolve() for name in teacher_names(settings.teachers)]
        if Path(settings.out_dir).resolve() in folders:
            raise ValueError(
                f"teachers={settings.teachers} names {settings.out_dir}, which this run writes: "
                "choose another out_dir"
            )
    if processes.is_main:
        settings, lock = claim_folder(settings, state)
    run = Run(settings, chosen | {"out_dir": settings.out_dir}, model, way, task, processes)
    if state:
        run.restore(state)
    else:
        task.begin(model)
    if processes.is_main:
        # fine-tuning's settings have defaults where the model brings its own
        write_json(
            run.folder / "config.json", asdict(settings) | asdict(model.config) | {"run_id": run.id}
        )
        task.tokenizer.save(run.folder / "tokenizer.json")
        write_about(run)
    return run, lock


def read_settings(argv):
    """(the settings that argv gives, the names of those given on the command line itself).

    Without a config file, config/pydoc_char.py comes first.
    """
    arguments = read_arguments(Settings, argv)
    given, paths = arguments.given, arguments.config_files
    if named := " ".join(sorted({"n_classes", "lora_rank"} & given.keys())):
        raise ValueError(f"{named} would train nothing here: they are finetune.py's")
    if not paths and given.get("init_from") != "resume":
        say("no config file is named, so config/pydoc_char.py comes first")
        paths = [DEFAULT_CONFIG]
    from_files = {}
    for path in paths:
        from_files |= read_config_file(Settings, path)
    # `given` merges both: a value that differs from the files' is from the command line
    options = {name for name in given if (name, given[name]) not in from_files.items()}
    return from_files | given, options


def with_model(settings, chosen, config, options):
    """(settings, chosen), both with the architecture of published weights (config, a GPTConfig).

    chosen: the settings as given, before anything is derived; see glass.run.settle. Raises
    ValueError where the command line asks for another architecture.
    """
    architecture = {name: getattr(config, name) for name in WITH_WEIGHTS - {"vocab_size"}}
    for name in sorted(architecture.keys() & options):
        if getattr(settings, name) != architecture[name]:
            raise ValueError(
                f"{name}={getattr(settings, name)} but the weights of {settings.init_from} have "
                f"{name}={architecture[name]}: leave it out"
            )
    return replace(settings, **architecture), chosen | architecture


def main(argv):
    given, options = read_settings(argv)
    settings, chosen, state = settle(given, Settings, Pretraining.script)
    if "teacher_weight" in options and not settings.teachers:
        raise ValueError(
            f"teacher_weight={settings.teacher_weight} does nothing without teachers: name them "
            "with --teachers, or leave it out"
        )
    G = settings.batch_size * settings.gradient_accumulation_steps
    if G % count_processes():
        raise ValueError(
            f"batch_size x gradient_accumulation_steps={G} must be a multiple of the "
            f"{count_processes()} processes: change either"
        )
    device = choose_device(settings.device)
    choose_dtype(settings.dtype, device)  # raises early for a wrong name
    dataset = open_or_prepare(settings.dataset)
    check_dataset(settings, dataset, given, state)
    if settings.init_from in FRESH and not state:
        check_memory(settings, dataset.tokenizer.vocab_size, device)
    processes = join_processes(device, settings.backend)
    model, way = build_model(settings, dataset.tokenizer, state, processes)
    if device.type == "cpu":
        keep_freed_memory(way not in parallel.SHARED)
    if settings.init_from not in FRESH and not state:
        settings, chosen = with_model(settings, chosen, model.config, options)
    task = Pretraining(settings, dataset, processes.device)
    if processes.is_main:
        say_settings(settings)
        say(model.summary())
    if settings.eval_only:
        if state:
            state = sharded.filled(state, sharded.parts_of(model, []))
            model.load_state_dict(parallel.shards_like(state["model"], model.state_dict()))
        context = autocast(model.device, choose_dtype(settings.dtype, model.device))
        figures = task.evaluate(model, context, processes)
        if processes.is_main:
            say(described(figures))
        processes.leave()
        return 0
    run, lock = start(settings, chosen, model, way, task, processes, state)
    speed_up(run)
    progress = Progress(run)
    stop = train(run, progress)
    progress.close(stop)
    if lock:
        lock.release()
    processes.leave()
    run.check_saved()
    return (128 + stop) if stop else 0  # as shells do for signals


if __name__ == "__main__":
    with errors_in_one_line():
        try:
            sys.exit(main(sys.argv[1:]))
        except torch.cuda.OutOfMemoryError as error:
            raise ValueError(
                "the GPU's memory is full: lower batch_size (and raise "
                "gradient_accumulation_steps) or block_size"
            ) from error
