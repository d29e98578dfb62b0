"""Settings of a script: defaults from its dataclass, then config files, then --key=value.

A field of the dataclass is the only home of a setting: its name, type, default and role, and behind
it, as a comment, its unit and meaning. `--help` prints exactly that. A config file is plain Python
assignments; it runs in a namespace of its own, and its names that start with `_`, its modules,
functions and classes are not settings.

    settings = configure(Settings, sys.argv[1:])       # all sources merged, then built once
    arguments = read_arguments(Settings, sys.argv[1:])  # the same in two steps: what was given ...
    settings = Settings(**saved | arguments.given)      # ... laid over something else than the defaults
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import re
import runpy
import sys
import traceback
import types
import typing
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent  # of the scripts, config/ and glass/


@dataclasses.dataclass
class Arguments:
    """What a command line says."""

    given: dict  # the settings that its config files and options give, checked, later ones winning
    config_files: list[str]
    names: list[str]  # the other words without dashes


def configure(Settings, argv):
    """Settings, built once: defaults, then the config files in argv, then its --key=value."""
    return Settings(**read_arguments(Settings, argv).given)


def read_arguments(Settings, argv, positional=None):
    """The Arguments of argv: config files, --key=value, --key value, and --flag for a bool.

    A field whose type is a list takes every word up to the next option. `positional` says in --help
    what a word without dashes means; without it such a word must be a config file. Raises
    ValueError for an unknown name, a wrong type or a missing file; prints and exits for --help.
    """
    types_of = typing.get_type_hints(Settings)
    arguments, words = Arguments({}, [], []), list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print_help(Settings, positional)
            raise SystemExit(0)
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            name = current_name(Settings, name, "setting")
            value = text if equals else take_value(word, types_of[name], words)
            if is_list(types_of[name]):
                value = ([text] if equals else []) + take_list(words)
                arguments.given[name] = value
            else:
                parsed = parse(value, types_of[name])
                arguments.given[name] = check_type(word.partition("=")[0], parsed, types_of[name])
        elif word.endswith(".py") or positional is None:
            arguments.given.update(read_config_file(Settings, word))
            arguments.config_files.append(word)
        else:
            arguments.names.append(word)
    return arguments


def take_value(option, hint, words):
    """The value that follows `--name` as a word of its own, taken off `words`; a bare flag is True."""
    if is_list(hint):
        return ""
    is_flag = bool in choices_of(hint)
    follows = bool(words) and not words[0].startswith("--")
    if is_flag and not (follows and words[0] in ("True", "False")):
        return "True"
    if not follows:
        raise ValueError(f"{option} has no value: write {option}=VALUE ({type_name(hint)})")
    return words.pop(0)


def take_list(words):
    """The words up to the next option, taken off `words`."""
    taken = []
    while words and not words[0].startswith("--"):
        taken.append(words.pop(0))
    return taken


def read_config_file(Settings, path):
    """The settings that a config file assigns, checked against the types of the fields."""
    if not Path(path).is_file():
        known = sorted(f"config/{file.name}" for file in (HOME / "config").glob("*.py"))
        near = difflib.get_close_matches(path, known, n=1)
        advice = f"did you mean {near[0]}?" if near else f"there are {' '.join(known)}"
        raise ValueError(f"config file {path} does not exist: {advice}")
    try:
        namespace = runpy.run_path(str(path))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"config file {path} does not run ({reason}): correct it") from error
    types_of, given = typing.get_type_hints(Settings), {}
    for name, value in namespace.items():
        if name.startswith("_") or isinstance(value, types.ModuleType | types.FunctionType | type):
            continue
        name = current_name(Settings, name, f"setting in {path}")
        given[name] = check_type(f"{path}: {name}", value, types_of[name])
    return given


def current_name(Settings, name, what):
    """The name of a setting, given that or an earlier one. Raises ValueError for an unknown name."""
    name = getattr(Settings, "EARLIER_NAMES", {}).get(name, name)
    known = typing.get_type_hints(Settings)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        advice = f"did you mean --{near[0]}? " if near else ""
        raise ValueError(f"unknown {what} {name!r}: {advice}--help lists every setting")
    return name


def defaults_of(Settings):
    """Every setting with its default, nothing derived."""
    missing = dataclasses.MISSING
    return {
        f.name: f.default if f.default_factory is missing else f.default_factory()
        for f in dataclasses.fields(Settings)
    }


def with_role(Settings, role):
    """The names of the settings whose type is marked with a role: see Tunable and Free in model.py."""
    hints = typing.get_type_hints(Settings, include_extras=True)
    return {name for name, hint in hints.items() if role in getattr(hint, "__metadata__", ())}


def choices_of(hint):
    """The alternatives of `int | None` as (int, NoneType), of `int` as (int,)."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def is_list(hint):
    return any(typing.get_origin(choice) is list for choice in choices_of(hint))


def type_name(hint):
    """How --help and errors write a type: `int or None`, `layernorm | rmsnorm`."""
    names = []
    for choice in choices_of(hint):
        if typing.get_origin(choice) is typing.Literal:
            names.append(" | ".join(map(str, typing.get_args(choice))))
        elif choice is type(None):
            names.append("None")
        else:
            names.append(getattr(choice, "__name__", str(choice)))
    return " or ".join(names)


def parse(text, hint):
    """What a word of the command line stands for.

    A Python literal where the field takes one of its type, else the word itself.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    choices = choices_of(hint)
    takes_text = str in choices or any(typing.get_origin(c) is typing.Literal for c in choices)
    return value if type(value) in choices or not takes_text else text


def check_type(name, value, hint):
    """value as `hint` (an int becomes a float where one is wanted); ValueError for anything else."""
    for choice in choices_of(hint):
        if typing.get_origin(choice) is typing.Literal:
            if value in typing.get_args(choice):
                return value
        elif choice is float and type(value) is int:
            return float(value)
        elif type(value) is (typing.get_origin(choice) or choice):
            return value
    raise ValueError(f"{name}={value!r} must be {type_name(hint)}")


def comments_of(Settings):
    """Two dicts by field name: the comment behind the field, and the comment line above it, if any.

    Read from the source of the dataclass and of those that it extends.
    """
    comments, headings = {}, {}
    for cls in reversed(Settings.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        above = ""
        for line in inspect.getsource(cls).splitlines():
            if found := re.match(r"    (\w+): [^#]*#\s*(.*)", line):
                comments[found[1]] = found[2]
                headings[found[1]], above = above, ""
            elif found := re.match(r"    # (.*)", line):
                above = found[1]
            elif line.startswith("    def "):
                break
    return comments, headings


def print_help(Settings, positional):
    comments, headings = comments_of(Settings)
    words = [Path(sys.argv[0]).name, positional, "[config/FILE.py ...] [--key=value ...]\n"]
    print("python", *filter(None, words))
    types_of = typing.get_type_hints(Settings)
    for name, default in defaults_of(Settings).items():
        if headings.get(name):
            print(f"\n{headings[name]}")
        shown = repr(default) if isinstance(default, str) and not default.isprintable() else default
        print(f"  --{name}={shown}  ({type_name(types_of[name])})  {comments.get(name, '')}")


@contextlib.contextmanager
def errors_in_one_line():
    """What our own files raise about their input is printed as one line, with exit status 2.

    A ValueError raised elsewhere, in torch say, is a bug and keeps its traceback; so does
    everything that is no ValueError, OSError or ImportError.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve().parent
        if not isinstance(error, OSError) and raised_in not in (
            HOME,
            HOME / "glass",
            HOME / "bench",
        ):
            raise
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        raise SystemExit(2) from None
