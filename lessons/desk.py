"""What every lesson begins with: the way to the code, pictures, and answers that are checked."""

import functools
import importlib
import inspect
import sys
from dataclasses import dataclass, field
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent  # where model.py stands
sys.path.insert(0, str(HOME))

import matplotlib  # noqa: E402

IN_NOTEBOOK = "ipykernel" in sys.modules
if not IN_NOTEBOOK:
    matplotlib.use("Agg")  # pictures go to files

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

plt.rcParams.update({"figure.figsize": (6.4, 3.6), "figure.dpi": 80, "axes.grid": False})
PICTURES = HOME / "out" / "lessons"


def source(thing):
    """Print the source of a function or class of the project, and the file it stands in."""
    thing = inspect.unwrap(thing)  # torch.no_grad() wraps functions
    path = Path(inspect.getsourcefile(thing)).relative_to(HOME)
    print(f"# {path.as_posix()}")
    print(inspect.getsource(thing).rstrip())


def picture(name):
    """Show the figure that was drawn, or save it as out/lessons/NAME.png where there is no notebook."""
    plt.tight_layout()
    if IN_NOTEBOOK:
        plt.show()
        return
    PICTURES.mkdir(parents=True, exist_ok=True)
    path = PICTURES / f"{name}.png"
    plt.savefig(path)
    plt.close("all")
    print(f"picture: {path.relative_to(HOME).as_posix()}")


def once(name, make):
    """What make() gives, kept in out/lessons/NAME.pt: trained once, then read. Plain types and tensors."""
    path = PICTURES / f"{name}.pt"
    if path.exists():
        print(f"read from {path.relative_to(HOME).as_posix()}: delete it to train again")
        return torch.load(path, weights_only=True)
    made = make()
    PICTURES.mkdir(parents=True, exist_ok=True)
    torch.save(made, path)
    return made


# Exercises. The checks of lesson 3 stand in checks/lesson_03.py.


class NotDone(Exception):
    """The answer is still the stub."""


class Wrong(Exception):
    """The answer is wrong; the message says why."""


@dataclass
class Exercise:
    """A check, which returns a remark on a right answer or raises Wrong, and hints for the answer."""

    test: object
    hints: list = field(default_factory=list)
    n_hints: int = 0  # hints that were given


EXERCISES = {}


def exercise(number, *hints):
    """Decorator of the check of an exercise: a function of the answer that returns a remark."""

    def register(test):
        EXERCISES[number] = Exercise(test, list(hints))
        return test

    return register


def expect(condition, reason):
    """Raise Wrong with the reason unless the condition holds."""
    if not condition:
        raise Wrong(reason)


def ask(answer, *args):
    """answer(*args), where the answer is a function to be written. NotDone if it gives nothing."""
    expect(callable(answer), f"a function is asked for, not {answer!r}")
    value = answer(*args)
    if value is None:
        raise NotDone
    return value


def same(answer, expected, reason, tolerance=1e-5):
    """Raise Wrong unless the answer is the expected number or tensor, up to the tolerance."""
    answer, expected = torch.as_tensor(answer), torch.as_tensor(expected)
    if answer.shape != expected.shape:
        shapes = f"{tuple(answer.shape)}, not {tuple(expected.shape)}"
        raise Wrong(f"its shape is {shapes}")
    close = torch.allclose(answer.double(), expected.double(), rtol=tolerance, atol=tolerance)
    expect(close, reason)


@functools.cache
def load_checks(lesson):
    importlib.import_module(f"checks.lesson_{lesson:02}")


def find(number):
    load_checks(int(number.split(".")[0]))
    if number not in EXERCISES:
        raise ValueError(f"there is no exercise {number}")
    return EXERCISES[number]


def check(number, answer):
    """Print whether the answer to an exercise is right, and why not."""
    test = find(number).test
    try:
        if answer is None:
            raise NotDone
        remark = test(answer)
    except NotDone:
        print(f'{number} is not done yet. For a hint: hint("{number}")')
    except Wrong as reason:
        print(f"{number} is wrong: {reason}")
    except Exception as error:  # of the learner's code
        print(f"{number} is wrong: it stopped with {type(error).__name__}: {error}")
    else:
        print(f"{number} is right. {remark}")


def hint(number):
    """Print the next hint for an exercise."""
    asked = find(number)
    asked.n_hints += 1
    n = min(asked.n_hints, len(asked.hints))
    print(f"{number}, hint {n} of {len(asked.hints)}: {asked.hints[n - 1]}")
