"""Settings of a script: defaults from its dataclass, then config files, then --key=value.

A field of the dataclass is the only home of a setting: its name, type and default, and behind it, as a comment, its
unit and meaning. `--help` prints exactly that. A config file is plain Python assignments; it runs in a namespace of
its own, and its names that start with `_`, its modules, functions and classes are not settings.

    settings = configure(Settings, sys.argv[1:])                 # all sources merged, then built once
    given, names = read_arguments(Settings, sys.argv[1:])        # the same in two steps: what was given ...
    settings = Settings(**{**checkpoint_settings, **given})      # ... laid over something else than the defaults
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

HERE = Path(__file__).resolve().parent.parent


def configure(Settings, argv):
    """Settings, built once from its defaults, the config files in argv, and argv's --key=value, later ones winning."""
    return Settings(**read_arguments(Settings, argv)[0])


def read_arguments(Settings, argv, positional=None):
    """What argv sets, as a dict of checked values, and the positional arguments that are not config files.

    Accepts config files, --key=value, --key value, and --flag for a bool. A field whose type is a list takes every word
    up to the next option. `positional` says in --help what a word without dashes means; without it such a word must be a
    config file. Raises ValueError for an unknown name, a wrong type or a missing file; prints and exits for --help.
    """
    types_of = typing.get_type_hints(Settings)
    given, names, words = {}, [], list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print_help(Settings, positional)
            raise SystemExit(0)
        if not word.startswith("--"):
            if word.endswith(".py") or positional is None:
                given.update(read_config_file(word, types_of))
            else:
                names.append(word)
            continue
        key, equals, text = word[2:].partition("=")
        check_name(key, types_of, "setting")
        if is_list(types_of[key]):
            value = [text] if equals else []
            while words and not words[0].startswith("--"):
                value.append(words.pop(0))
            given[key] = value
            continue
        if not equals:
            is_flag = bool in choices_of(types_of[key])
            followed = words and not words[0].startswith("--") and (not is_flag or words[0] in ("True", "False"))
            if not followed and not is_flag:
                raise ValueError(f"--{key} has no value: write --{key}=VALUE ({type_name(types_of[key])})")
            text = words.pop(0) if followed else "True"
        given[key] = check_type(f"--{key}", parse(text, types_of[key]), types_of[key])
    return given, names


def read_config_file(path, types_of):
    """The settings that a config file assigns, checked against the types of the fields."""
    if not Path(path).is_file():
        known = sorted(str(p.relative_to(HERE)) for p in (HERE / "config").glob("*.py") if not p.name.startswith("_"))
        near = difflib.get_close_matches(path, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "there are " + " ".join(known)
        raise ValueError(f"config file {path} does not exist: {hint}")
    try:
        namespace = runpy.run_path(str(path))
    except Exception as error:
        raise ValueError(f"config file {path} does not run ({type(error).__name__}: {error}): correct it") from error
    given = {}
    for key, value in namespace.items():
        if key.startswith("_") or isinstance(value, types.ModuleType | types.FunctionType | type):
            continue
        check_name(key, types_of, f"setting in {path}")
        given[key] = check_type(f"{path}: {key}", value, types_of[key])
    return given


def check_name(key, known, what):
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean --{near[0]}? " if near else ""
        raise ValueError(f"unknown {what} {key!r}: {hint}--help lists every setting")


def choices_of(kind):
    """The alternatives of `int | None` as (int, NoneType), of `int` as (int,)."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def is_list(kind):
    return any(typing.get_origin(choice) is list for choice in choices_of(kind))


def type_name(kind):
    """How --help and errors write a type: `int or None`, `layernorm | rmsnorm`."""
    names = []
    for choice in choices_of(kind):
        if typing.get_origin(choice) is typing.Literal:
            names.append(" | ".join(map(str, typing.get_args(choice))))
        else:
            names.append("None" if choice is type(None) else getattr(choice, "__name__", str(choice)))
    return " or ".join(names)


def parse(text, kind):
    """What a word of the command line stands for: a Python literal where the field takes one of its type, else the word."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    takes_text = any(choice is str or typing.get_origin(choice) is typing.Literal for choice in choices_of(kind))
    fits = any(type(value) is choice or value is None and choice is type(None) for choice in choices_of(kind))
    return text if takes_text and not fits else value


def check_type(name, value, kind):
    """value as `kind` (an int becomes a float where a float is wanted); ValueError where it is something else."""
    for choice in choices_of(kind):
        if typing.get_origin(choice) is typing.Literal:
            if value in typing.get_args(choice):
                return value
        elif choice is float and type(value) is int:
            return float(value)
        elif type(value) is (typing.get_origin(choice) or choice):
            return value
    raise ValueError(f"{name}={value!r} must be {type_name(kind)}")


def comments_of(Settings):
    """Two dicts by field name, read from the source: the comment behind the field, and the comment line above it, if any."""
    comments, heading = {}, {}
    for cls in reversed(Settings.__mro__):
        if not dataclasses.is_dataclass(cls) or cls.__module__ == "builtins":
            continue
        above = ""
        for line in inspect.getsource(cls).splitlines():
            if found := re.match(r"    (\w+): [^#]*#\s*(.*)", line):
                comments[found[1]] = found[2]
                heading[found[1]], above = above, ""
            elif found := re.match(r"    # (.*)", line):
                above = found[1]
            elif re.match(r"    def ", line):
                break
    return comments, heading


def print_help(Settings, positional):
    comments, heading = comments_of(Settings)
    script = Path(sys.argv[0]).name
    print(f"python {script} {positional or ''} [config/FILE.py ...] [--key=value ...]\n".replace("  ", " "))
    types_of = typing.get_type_hints(Settings)
    for field in dataclasses.fields(Settings):
        if heading.get(field.name):
            print(f"\n{heading[field.name]}")
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        shown = repr(default) if isinstance(default, str) and not default.isprintable() else default
        print(f"  --{field.name}={shown}  ({type_name(types_of[field.name])})  {comments.get(field.name, '')}")


@contextlib.contextmanager
def errors_in_one_line():
    """What our own files raise about their input is printed as one line, with exit status 2.

    A ValueError raised elsewhere, in torch say, is a bug and keeps its traceback; so does everything that is no
    ValueError, OSError or ImportError.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if not isinstance(error, OSError) and Path(last).resolve().parent not in (HERE, HERE / "config"):
            raise
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        raise SystemExit(2) from None
