"""A run: where it stands, how it is saved, and how it is resumed.

A run trains a model at a task. train.py and finetune.py each bring a task. It has `script`,
`tokenizer`, `data_sha256`, `tokens_per_step` and

    begin(model)                         remembers what it needs of the model at the start
    rows(first, count)                   rows of the endless list that the run works through
    step_rows(step)                      all rows of a step, for their number or what they hold
    loss(model, rows, step_rows, step)   what `rows`, a part of the step's, add to its mean loss
    evaluate(model, context, processes, n_rows=None)   figures by name, val_loss among them
    sample(model)                        text to look at after an evaluation
    take_figures()                       figures of the steps since the last call
    state(), restore(model, saved)       what a checkpoint holds of the task
"""

import math
import os
import secrets
import shlex
import signal
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from glass import checkpoint, sharded
from glass.device import choose_dtype, count_processes
from glass.files import lock, read_object
from glass.optim import load_moments, make_optimizers
from glass.parallel import SHARED, shards_like, whole
from glass.progress import say, warned_about
from glass.settings import defaults_of, with_role
from model import GPTConfig

MAX_SKIPPED = 20  # a run ends after this many steps in a row without a finite gradient


def settle(given, Settings, script):
    """(settings, chosen, state): this run's settings, and the checkpoint it goes on from, or None.

    `chosen` is a dict of every setting as given or by default, with nothing derived. Checkpoints
    keep it, so a resumed run derives settings anew. When a run is resumed, given settings override
    those of the checkpoint: tunable ones are named in a line, free ones pass. Raises ValueError, by
    name, for any other setting that differs.
    """
    init_from = given.get("init_from", Settings.init_from)
    can_resume = checkpoint.checkpoint_files(given.get("out_dir", Settings.out_dir))
    resumes = init_from == "resume" or (init_from == "auto" and can_resume)
    if not resumes:
        chosen = defaults_of(Settings) | given
        return Settings(**chosen), chosen, None
    out_dir = str(given.get("out_dir") or checkpoint.newest_run())
    try:
        state = checkpoint.load(out_dir, whole=count_processes() == 1)
    except checkpoint.NoneIsWhole as error:
        if init_from == "resume":
            raise
        say(f"WARNING: {error}; init_from=auto starts anew and sets that run aside")
        chosen = defaults_of(Settings) | given
        return Settings(**chosen), chosen, None
    before = state["settings"]
    made_by = "finetune.py" if "task" in before else "train.py"
    if made_by != script:
        raise ValueError(
            f"the run in {out_dir} was made by {made_by}, not {script}: "
            f"python {made_by} --init_from=resume --out_dir={shlex.quote(out_dir)}"
        )
    check_owner(state, out_dir)
    tunable, free = with_role(Settings, "tunable"), with_role(Settings, "free")
    changed = {name: value for name, value in given.items() if value != before.get(name)}
    if changed.get("vocab_size") == state["model_config"]["vocab_size"]:
        del changed["vocab_size"]  # the tokenizer's, whatever the settings said
    for name in sorted(changed.keys() - tunable - free):
        raise ValueError(
            f"{name}={changed[name]} but the run in {out_dir} has {name}={before.get(name)}, "
            "which its weights and state depend on: leave it, or start a new run"
        )
    if named := sorted(changed.keys() & tunable):
        changes = (f"{name}={changed[name]} (was {before.get(name)})" for name in named)
        say("resuming with " + ", ".join(changes))
    max_iters = given.get("max_iters", before["max_iters"])
    if max_iters < state["step"]:
        raise ValueError(
            f"max_iters={max_iters} but the run in {out_dir} has made {state['step']} steps: "
            "give more, or start a new run"
        )
    origin = {"init_from": before["init_from"], "out_dir": out_dir, "overwrite": False}
    chosen = defaults_of(Settings) | before | given | origin
    return Settings(**chosen), chosen, state


def check_owner(state, folder):
    """Raise ValueError for a checkpoint that another run made: one copied into the folder, say."""
    own, found = run_config(folder).get("run_id"), state.get("run_id")
    if own and found and own != found:
        raise ValueError(
            f"{state['path']} is of another run (run_id={found}, {folder}/config.json says {own}): "
            "move it away"
        )


def resumed_config(state, settings):
    """The GPTConfig of a checkpoint's model, with the settings that this run may choose."""
    choosable = with_role(GPTConfig, "tunable") | with_role(GPTConfig, "free")
    chosen = {name: getattr(settings, name) for name in choosable}
    return GPTConfig(**state["model_config"] | chosen)


def claim_folder(settings, state):
    """(settings, lock): settings with the out_dir of this run, and a lock on that folder.

    The folder is made if it does not exist. A folder that holds a run is left alone, and the next
    free name is taken. But a resumed run, one with a checkpoint's state, keeps its folder, and
    overwrite removes the old run.
    """
    wanted = folder = str(Path(settings.out_dir))
    may_reuse = state or settings.overwrite or settings.init_from == "auto"
    if may_reuse and not state and holds_run(folder) and not run_config(folder):
        raise ValueError(
            f"{folder} holds files but no config.json of a run, so they may be others': "
            "name another folder, or remove them"
        )
    number = 1
    while not may_reuse and holds_run(folder):
        number += 1
        folder = f"{wanted}-{number}"
    if number > 1:
        advice = "--overwrite=True reuses it"
        say(f"{wanted} holds a run already, so this one goes to {folder} ({advice})")
    Path(folder).mkdir(parents=True, exist_ok=True)
    held = lock(folder, f"out_dir={folder}")
    checkpoint.remove_half_written(folder)
    if settings.overwrite and not state:
        checkpoint.remove_run(folder)
    checkpoint.set_aside(folder, state and state["path"])
    return replace(settings, out_dir=folder), held


def holds_run(folder):
    """Whether the folder holds any file that a run would write."""
    names = ("config.json", "tokenizer.json", *checkpoint.LEFT_BEHIND)
    has_files = any((Path(folder) / name).exists() for name in names)
    steps = checkpoint.saved_steps(folder) or checkpoint.kept_steps(folder)
    return has_files or bool(steps)


def run_config(folder):
    """The content of the folder's config.json, or {} if it is not that of a run.

    It may be a published model's, or torn, or not there.
    """
    config = read_object(Path(folder) / "config.json")
    return config if "out_dir" in config else {}


class Run:
    """All that a checkpoint holds: model, optimizers, scaler, task, step and best loss."""

    def __init__(self, settings, chosen, model, way, task, processes):
        self.settings, self.chosen, self.folder = settings, chosen, Path(settings.out_dir)
        self.model, self.way = model, way  # how the processes share it: see glass/parallel.py
        self.task, self.processes = task, processes
        self.optimizers = make_optimizers(model, settings)
        dtype = choose_dtype(settings.dtype, model.device)
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=dtype == torch.float16)
        self.id = secrets.token_hex(8)
        self.step = 0  # updates done
        self.best_val_loss, self.best_step = math.inf, None
        self.evaluated_step, self.evaluations_without_better = None, 0
        self.saved_step, self.skipped_in_a_row = None, 0

    def restore(self, state):
        """Go on from the state of a checkpoint.

        Learning rates and other options stay as the settings of this run have them.
        """
        state = sharded.filled(state, sharded.parts_of(self.model, self.optimizers))
        self.load_weights(state)
        load_moments(self.optimizers, state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():  # a disabled scaler saved nothing
            self.scaler.load_state_dict(state["scaler"])
        self.task.restore(self.model, state["task"])
        self.id = state.get("run_id", self.id)
        self.step = self.saved_step = state["step"]
        self.best_val_loss, self.best_step = state["best_val_loss"], state["best_step"]
        self.evaluated_step = state["evaluated_step"]
        self.evaluations_without_better = state["evaluations_without_better"]
        if Path(state["path"]).name == checkpoint.BEST:
            self.saved_step = None  # no checkpoint of this step is left
        is_best = self.best_step == self.step and self.saved_step is not None
        if is_best and self.processes.is_main:
            # The run may have been killed just before it did this.
            with warned_about(self.folder / checkpoint.BEST):
                checkpoint.mark_best(self.folder, self.step)

    def load_weights(self, state):
        """Give the model the weights of a checkpoint's state."""
        state = sharded.filled(state, sharded.parts_of(self.model, self.optimizers))
        self.model.load_state_dict(shards_like(state["model"], self.model.state_dict()))

    def save(self):
        """Write the checkpoint of this step, once, from the main process.

        If that fails, training goes on.
        """
        is_main = self.processes.is_main
        if self.saved_step == self.step or not (is_main or self.way in SHARED):
            return
        s, is_saved = self.settings, True
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        try:
            n = self.model.parameter_count()
            if sharded.is_wanted(s.sharded_checkpoint, self.way, n):
                tensors = {"model": self.model.state_dict(), "optimizer": optimizers}
                tensors = sharded.save(self.folder, self.step, tensors, self.processes)
            else:
                tensors = {"optimizer": whole(optimizers, kept=is_main)}
                tensors |= {"model": whole(self.model.state_dict(), kept=is_main)}
            state = (
                tensors
                | self.description()
                | {
                    "scaler": self.scaler.state_dict(),
                    "run_id": self.id,
                    "best_val_loss": self.best_val_loss,
                    "best_step": self.best_step,
                    "evaluated_step": self.evaluated_step,
                    "evaluations_without_better": self.evaluations_without_better,
                }
            )
            if is_main:
                checkpoint.save(self.folder, self.step, state)
        except OSError as error:
            is_saved = False
            say(
                f"WARNING: no checkpoint at step {self.step}: {error}; training goes on, "
                f"{self.last_checkpoint()}"
            )
        if self.way in SHARED:  # what is gathered by all is tried again by all, or by none
            is_saved = self.processes.reduce(torch.tensor([is_saved]), dist.ReduceOp.MIN).item()
        if is_saved:
            self.saved_step = self.step

    def description(self):
        """The part of a checkpoint that says what the model is, without its weights."""
        return {
            "settings": self.chosen,
            "model_config": asdict(self.model.config),
            "tokenizer": self.task.tokenizer.to_dict(),
            "data": self.task.data_sha256,
            "task": whole(self.task.state(), kept=self.processes.is_main),
        }

    def keep_weights(self):
        """Write the weights of this step where no later save removes them. A failure is a warning."""
        if not (self.processes.is_main or self.way in SHARED):
            return
        weights = whole(self.model.state_dict(), kept=self.processes.is_main)
        state = {"model": weights} | self.description()
        if self.processes.is_main:
            with warned_about(checkpoint.kept_path(self.folder, self.step)):
                checkpoint.keep_weights(self.folder, self.step, state)

    def note_evaluation(self, val_loss, is_final):
        """Count the evaluation of this step, and mark its checkpoint as best if the loss is lowest.

        A resumed run may evaluate its first step again; this counts once. is_final: the run ends
        here, so the checkpoint is written once more, with this evaluation in it.
        """
        if self.evaluated_step == self.step:
            return
        self.evaluated_step = self.step
        self.evaluations_without_better += 1
        is_best = val_loss < self.best_val_loss
        if is_best:
            self.best_val_loss, self.best_step = val_loss, self.step
            self.evaluations_without_better = 0
        if is_final:
            self.saved_step = None
        if is_best or is_final:
            self.save()
        if is_best and self.processes.is_main and self.saved_step == self.step:
            with warned_about(self.folder / checkpoint.BEST):
                checkpoint.mark_best(self.folder, self.step)

    def count_skipped(self, grad_norm):
        """Count the steps in a row whose gradient is not finite.

        Raises ValueError after MAX_SKIPPED of them.
        """
        self.skipped_in_a_row = 0 if math.isfinite(grad_norm) else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise ValueError(
                f"the gradient of {MAX_SKIPPED} steps in a row, up to {self.step}, is not finite: "
                f"lower learning_rate={self.settings.learning_rate} and resume; "
                f"{self.last_checkpoint()}"
            )

    def check_saved(self):
        """Raise OSError if the run ended without a checkpoint of its last step."""
        if not self.step or not self.processes.is_main:
            return
        if self.step not in checkpoint.saved_steps(self.folder):
            raise OSError(
                f"the weights of step {self.step} could not be saved in {self.folder} (see the "
                f"warning above): make room there, then resume; {self.last_checkpoint()}"
            )

    def last_checkpoint(self):
        """Where the last checkpoint is, in words."""
        steps = checkpoint.saved_steps(self.folder)
        if not steps:
            return "there is no checkpoint yet"
        return f"the last checkpoint is {checkpoint.checkpoint_path(self.folder, steps[-1])}"


class StopSignals:
    """Notes the signals on which the loop saves and stops.

    SIGINT is Ctrl-C, SIGHUP a closed terminal, SIGUSR1 Slurm's warning before the end. A second
    SIGINT ends the process at once. No file is left half written, because files are renamed into
    place.
    """

    def __init__(self):
        self.received = 0  # the number of the last signal
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            if hasattr(signal, name):  # Windows has only the first two
                signal.signal(getattr(signal, name), self.note)

    def note(self, number, frame):
        """Remember a signal; end at the second SIGINT."""
        if number == self.received == signal.SIGINT:
            os._exit(128 + number)
        self.received = number
