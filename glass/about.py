"""about.json: where a run was made and with what, for whoever reads its folder later."""

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from glass.files import read_object, write_json
from glass.progress import warned_about
from glass.settings import HOME, defaults_of

ABOUT = "about.json"
PACKAGES = ("torch", "numpy", "tiktoken")


def processor():
    """The name of the CPU, as its maker gives it where the system says so."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit():
    """The commit of this code, with + where files differ from it; None without git."""
    commands = (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
    answers = []
    for words in commands:
        try:
            ended = subprocess.run(
                ["git", "-C", str(HOME), *words], capture_output=True, text=True, timeout=5
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if ended.returncode:
            return None
        answers.append(ended.stdout.strip())
    return answers[0] + ("+" if answers[1] else "")


def machine(device):
    """What the run is made on, a dict of names and numbers."""
    found = {"system": platform.platform(), "cpu": processor(), "cores": os.cpu_count()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def write_about(run):
    """Write about.json, or add this start to that of a resumed run. A failure is a warning."""
    path, model, settings = run.folder / ABOUT, run.model, run.settings
    defaults = defaults_of(type(settings))
    changed = {
        name: value for name, value in run.chosen.items() if value != defaults.get(name, value)
    }
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": run.step,
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "commit": commit(),
        "processes": run.processes.size,
        "machine": machine(model.device),
    }
    content = {
        "script": run.task.script,
        "changed": changed,
        "parameters": model.parameter_count(),
        "flops_per_token": model.flops_per_token(settings.block_size),
        "starts": [],
    }
    with warned_about(path):
        if run.step and path.is_file():
            starts = read_object(path).get("starts")  # none if it is torn: begun anew
            content["starts"] = starts if isinstance(starts, list) else []
        content["starts"].append(start)
        write_json(path, content)
