"""The models that a server can name: where they are, which are in memory, and who uses them.

A name in a request is looked up in a list of what is there. It is never a path.
"""

import asyncio
import contextlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

from glass import checkpoint
from glass.batch import Batch
from glass.device import free_memory
from glass.files import is_locked, read_object
from glass.loading import Loaded
from glass.progress import read_metrics

MAX_LOADED = 2  # models in memory at once, so that two can be compared
MAX_RUNS, MAX_METRICS = 100, 500  # runs that are described; lines of metrics of each


@dataclass(frozen=True)
class Source:
    """Where a model is, and which state of it: what changes when the model does."""

    folder: str  # a run's, or that of published weights; or a preset's name
    which: str | int = "best"  # best, last, or a step
    changed_at: float = 0.0  # seconds since 1970
    n_bytes: int = 0  # of its files
    is_run: bool = True


@dataclass
class Served:
    """A model in memory."""

    name: str
    source: Source
    loaded: Loaded
    batch: Batch
    users: int = 0  # requests that are under way
    used_at: float = field(default_factory=time.monotonic)


class NoRoom(ValueError):
    """Raised if a model does not fit into memory."""


def run_folders(root="."):
    """A dict from name to folder of the runs that checkpoint.newest_run chooses from."""
    patterns = ("out", "out/*", "out-*")
    folders = sorted(folder for pattern in patterns for folder in Path(root).glob(pattern))
    runs = [folder for folder in folders if checkpoint.saved_steps(folder)]
    return {folder.name: folder for folder in reversed(runs)}


def run_sources(name, folder, which="best"):
    """A dict from name to Source of a run: RUN itself, and each of its checkpoints as RUN@STEP."""
    sources, steps = {}, checkpoint.saved_steps(folder)
    kept = [step for step in checkpoint.kept_steps(folder) if step not in steps]
    best = Path(folder) / "best.pt"
    paths = {f"{name}@{step}": (step, checkpoint.checkpoint_path(folder, step)) for step in steps}
    paths |= {f"{name}@{step}": (step, checkpoint.kept_path(folder, step)) for step in kept}
    if isinstance(which, int):
        first = (which, checkpoint.checkpoint_path(folder, which))
    elif steps and (which == "last" or not best.exists()):
        first = (steps[-1], checkpoint.checkpoint_path(folder, steps[-1]))
    else:
        first = ("best", best)
    for key, (kind, path) in {name: first, **paths}.items():
        with contextlib.suppress(OSError):  # training may have removed it by now
            stat = path.stat()
            sources[key] = Source(str(Path(folder).resolve()), kind, stat.st_mtime, stat.st_size)
    return sources


def published_source(folder):
    """The Source of published weights: a folder, or the name of a preset."""
    is_folder = Path(folder).is_dir()  # else the name of a preset
    files = list(Path(folder).glob("*.safetensors")) if is_folder else []
    folder = Path(folder).resolve() if is_folder else folder
    stats = [path.stat() for path in files]
    changed_at = max((stat.st_mtime for stat in stats), default=0.0)
    return Source(str(folder), "best", changed_at, sum(s.st_size for s in stats), is_run=False)


def first_source(settings):
    """(name, Source) of the model that the settings name.

    (None, None) where they name none, there is no run, and a file of answers stands in for one.
    """
    s = settings
    if s.faq and s.init_from == "resume" and not (s.out_dir or run_folders()):
        return None, None
    folder = (s.out_dir or checkpoint.newest_run()) if s.init_from == "resume" else s.init_from
    name = Path(folder).resolve().name if Path(folder).is_dir() else str(folder)
    if s.init_from == "resume" or checkpoint.saved_steps(folder):
        if not checkpoint.saved_steps(folder):
            checkpoint.load(folder)  # says what is missing
        return name, run_sources(name, folder, s.which)[name]
    return name, published_source(folder)


class Library:
    """All models that requests may name. Used on the event loop's thread only.

    load: gives the Loaded model of a Source, on a thread of its own. first: (name, Source) of the
    model that requests without a name get, and `loaded` is that model, or None for no model.
    folders: of further models.
    """

    def __init__(self, load, engine, first, folders, max_rows, loaded, device):
        self.load, self.engine, self.first = load, engine, first
        self.max_rows, self.device = max_rows, device
        self.root, self.folders = Path.cwd(), [Path(folder).resolve() for folder in folders]
        self.served = [Served(*first, loaded, Batch(loaded, max_rows))] if loaded else []
        self.turn, self.released = asyncio.Lock(), asyncio.Condition()

    def sources(self):
        """A dict from every name to its Source, as the disk has it now."""
        sources = {}
        for name, folder in run_folders(self.root).items():
            sources |= run_sources(name, folder)
        for folder in self.folders:
            name = folder.name
            is_run = bool(checkpoint.saved_steps(folder))
            sources |= run_sources(name, folder) if is_run else {name: published_source(folder)}
        name, source = self.first
        if source is None:
            return sources
        if not source.is_run:
            return sources | {name: source}
        which = source.which if isinstance(source.which, int) else "best"
        # a folder that is gone leaves the model that is in memory
        return sources | {name: source} | run_sources(name, Path(source.folder), which)

    @contextlib.asynccontextmanager
    async def use(self, *names):
        """The Served models of some names, which stay in memory until the context ends.

        All are taken at once: two requests that each hold what the other waits for would wait for
        ever. Raises KeyError for an unknown name, NoRoom, and what loading raises.
        """
        known = self.sources()
        wanted = {name: known[name] for name in names}
        taken = [] if self.turn.locked() else list(map(self.find, wanted.values()))
        if taken and None not in taken:
            self.take(taken)
        else:
            taken = await self.take_in_turn(wanted)
        try:
            yield taken
        finally:
            for served in taken:
                served.users -= 1
                served.used_at = time.monotonic()
            async with self.released:
                self.released.notify_all()

    def take(self, models):
        for served in models:
            served.users += 1

    async def take_in_turn(self, wanted):
        """Take the models of `wanted`, name to Source, and load what is not in memory: a list.

        Nobody overtakes who waits here.
        """
        taken = []
        async with self.turn:
            try:
                for name, source in wanted.items():
                    served = self.find(source) or await self.load_now(name, source)
                    self.take([served])
                    taken.append(served)
            except BaseException:
                for served in taken:
                    served.users -= 1
                raise
        return taken

    def find(self, source):
        """The Served model of a Source, or None if it is not in memory."""
        return next((served for served in self.served if served.source == source), None)

    async def load_now(self, name, source):
        """Load a model; before that, let go of the one that was not used for longest."""
        while len(self.served) >= MAX_LOADED:
            await self.drop_oldest()
        while not (fits := self.fits(source)) and self.served:
            await self.drop_oldest()
        if not fits:
            raise NoRoom(
                f"{name} needs about {2 * source.n_bytes >> 20} MiB to load but "
                f"{free_memory(self.device) >> 20} MiB are free: choose a smaller model"
            )
        loaded = await asyncio.to_thread(self.load, source)
        served = Served(name, source, loaded, Batch(loaded, self.max_rows))
        self.served.append(served)
        return served

    def fits(self, source):
        """Whether there is room to load: the file's content and the model, side by side."""
        free = free_memory(self.device)
        return free is None or 2 * source.n_bytes < free

    async def drop_oldest(self):
        """Let go of an idle model; where there is none, wait until there is."""
        async with self.released:
            await self.released.wait_for(lambda: any(s.users == 0 for s in self.served))
        idle = [served for served in self.served if served.users == 0]
        oldest = min(idle, key=lambda served: served.used_at)
        self.served.remove(oldest)
        await asyncio.wrap_future(self.engine.forget(oldest.batch))


# What the page shows of runs.


def describe_runs(root):
    """What is known of the newest runs: a list of dicts, the newest first."""
    folders = sorted(run_folders(root).items(), key=lambda item: changed_at(item[1]), reverse=True)
    return [describe_run(name, folder) for name, folder in folders[:MAX_RUNS]]


def changed_at(folder):
    """When the folder's newest checkpoint was written, in seconds since 1970."""
    steps = checkpoint.saved_steps(folder)
    path = checkpoint.checkpoint_path(folder, steps[-1]) if steps else folder
    return path.stat().st_mtime if path.exists() else 0.0


def finite(row):
    """A row of metrics for JSON, which has neither NaN nor infinity: None instead."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def describe_run(name, folder):
    """A run's checkpoints, settings and metrics, as JSON."""
    metrics, settings = folder / "metrics.jsonl", read_object(folder / "config.json")
    rows = read_metrics(metrics) if metrics.is_file() else []
    every = -(-len(rows) // MAX_METRICS) or 1  # the last row is among those that are kept
    return {
        "name": name,
        "steps": checkpoint.kept_steps(folder),
        "has_best": (folder / "best.pt").exists(),
        "is_training": is_locked(folder),
        "settings": settings,
        "metrics": [finite(row) for row in rows[::-1][::every][::-1]],
    }
