"""Settings of a script: defaults from its dataclass, then config files, then --key=value.

A field of the dataclass is the only home of a setting. It gives the name, type, default and role;
the comment behind it gives the unit and meaning. `--help` prints exactly that. A config file is
plain Python assignments, run in a namespace of its own. Names that start with `_`, modules,
functions, classes and whatever else can be called in it are not settings.

    settings = configure(Settings, sys.argv[1:])        # all sources merged, then built once

    arguments = read_arguments(Settings, sys.argv[1:])  # or in two steps: only what was given,
    settings = Settings(**saved | arguments.given)      # laid over something else than defaults
"""

import ast
import contextlib
import dataclasses
import difflib
import errno
import inspect
import os
import re
import runpy
import sys
import traceback
import types
import typing
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent  # of the scripts, config/ and glass/
MEANT = {  # what other programs call it: our name
    "prompt": "start",
    "lr": "learning_rate",
    "epochs": "max_iters",
    "steps": "max_iters",
    "max_steps": "max_iters",
    "max_tokens": "max_new_tokens",
    "context_length": "block_size",
    "seq_len": "block_size",
    "output": "out_dir",
    "output_dir": "out_dir",
    "data": "dataset",
}
LONGEST_MESSAGE = 2000  # characters of an error
ADVICE = {  # what to do about an error of the file system
    errno.ENOSPC: "make room for it, or name another place",
    errno.EDQUOT: "make room for it, or name another place",
    errno.EACCES: "change its permissions, or name another",
    errno.EPERM: "change its permissions, or name another",
    errno.ENOENT: "give one that is there",
}


@dataclasses.dataclass
class Arguments:
    """What a command line says."""

    given: dict  # checked settings from config files and options; later ones win
    config_files: list[str]
    names: list[str]  # the other words without dashes


def configure(Settings, argv):
    """The Settings of a command line: defaults, then its config files, then its --key=value."""
    return Settings(**read_arguments(Settings, argv).given)


def read_arguments(Settings, argv, positional=None):
    """The Arguments of argv: config files, --key=value, --key value, and --flag for a bool.

    A field whose type is a list takes every word up to the next option. `positional` says in --help
    what a word without dashes means; without it, such a word must be a config file. Raises
    ValueError for an unknown name, a wrong type or a missing file. For --help, prints it and exits.
    """
    types_of = typing.get_type_hints(Settings)
    arguments, words, on_command_line = Arguments({}, [], []), list(argv), set()
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
                value = [text] if equals else []
                value += take_list(words)
                if not value:
                    raise ValueError(
                        f"{word} has no value: write {word} VALUE ..., or leave it out"
                    )
                if name in on_command_line:  # given twice: both count
                    value = arguments.given[name] + value
                arguments.given[name] = check_type(f"--{name}", value, types_of[name])
            else:
                parsed = parse(value, types_of[name])
                arguments.given[name] = check_type(word.partition("=")[0], parsed, types_of[name])
            on_command_line.add(name)
        elif word.endswith(".py") or positional is None:
            arguments.given.update(read_config_file(Settings, word))
            arguments.config_files.append(word)
        else:
            arguments.names.append(check_type("name", word, str))
    return arguments


def take_value(option, hint, words):
    """The value of `--name VALUE`, taken off `words`; "True" for a bare flag.

    "" for a list, whose words `take_list` takes. Raises ValueError if no value follows.
    """
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
    """The words up to the next option, as a list, taken off `words`."""
    taken = []
    while words and not words[0].startswith("--"):
        taken.append(words.pop(0))
    return taken


def read_config_file(Settings, path):
    """The settings that a config file assigns, as a dict, checked against the types of the fields.

    A file that is not here is looked for beside the scripts. Raises ValueError if there is none, or
    it does not run.
    """
    if not str(path).endswith(".py"):
        raise ValueError(
            f"{str(path)!r} is neither --key=value nor a config file: such a file is Python, "
            "name = value on each line, and ends in .py"
        )
    found = Path(path) if Path(path).is_file() else HOME / path
    if not found.is_file():
        known = sorted(f"config/{file.name}" for file in (HOME / "config").glob("*.py"))
        if near := difflib.get_close_matches(path, known, n=1):
            raise ValueError(f"config file {path} is not a file: did you mean {near[0]}?")
        raise ValueError(f"config file {path} is not a file: choose one of {' '.join(known)}")
    try:
        namespace = runpy.run_path(str(found))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what a file of the user's raises may be of any kind
        raise ValueError(
            f"config file {path} does not run ({type(error).__name__}: {shown(error, str)}): "
            "correct it"
        ) from error
    types_of, given = typing.get_type_hints(Settings), {}
    for name, value in namespace.items():
        if name.startswith("_") or isinstance(value, types.ModuleType) or callable(value):
            continue
        name = current_name(Settings, name, f"setting in {path}")
        given[name] = check_type(f"{path}: {name}", value, types_of[name])
    return given


def current_name(Settings, name, what):
    """The current name of a setting, given that name or an earlier one.

    what: how an error calls it. Raises ValueError for an unknown name.
    """
    name = getattr(Settings, "EARLIER_NAMES", {}).get(name, name)
    known = typing.get_type_hints(Settings)
    if name in known:
        return name
    meant = MEANT.get(name.replace("-", "_"))
    if near := [meant] if meant in known else difflib.get_close_matches(name, known, 1, 0.5):
        raise ValueError(
            f"unknown {what} {name!r}: did you mean --{near[0]}? --help lists every setting"
        )
    raise ValueError(f"unknown {what} {name!r}: --help lists every setting")


def defaults_of(Settings):
    """A dict of every setting with its default, nothing derived."""
    defaults = {}
    for field in dataclasses.fields(Settings):
        has_factory = field.default_factory is not dataclasses.MISSING
        defaults[field.name] = field.default_factory() if has_factory else field.default
    return defaults


def with_role(Settings, role):
    """The set of settings whose type is marked with a role: see Tunable and Free in model.py."""
    hints = typing.get_type_hints(Settings, include_extras=True)
    return {name for name, hint in hints.items() if role in getattr(hint, "__metadata__", ())}


def choices_of(hint):
    """The alternatives of a type: (int, NoneType) for `int | None`, (int,) for `int`."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def is_list(hint):
    """Whether a setting of this type may be a list."""
    return any(typing.get_origin(choice) is list for choice in choices_of(hint))


def type_name(hint):
    """A type as --help and errors write it: `int or None`, `layernorm | rmsnorm`."""
    names = []
    for choice in choices_of(hint):
        if typing.get_origin(choice) is typing.Literal:
            names.append(" | ".join(map(str, typing.get_args(choice))))
        elif choice is type(None):
            names.append("None")
        elif choice is bool:
            names.append("True or False")
        else:
            names.append(getattr(choice, "__name__", str(choice)))
    return " or ".join(names)


def parse(text, hint):
    """The value that a word of the command line stands for.

    It is a Python literal if the field takes that type, and otherwise the word itself.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text
    choices = choices_of(hint)
    takes_text = str in choices or any(typing.get_origin(c) is typing.Literal for c in choices)
    if takes_text and (type(value) is str or type(value) not in choices):
        return text  # as it stands: quotes belong to a text
    return value


def check_type(name, value, hint):
    """value as the type `hint` wants it: an int becomes a float if a float is wanted.

    Raises ValueError for a value of another type, or a text that no file could hold.
    """
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and not text.isascii() and re.search("[\ud800-\udfff]", text):
            if sys.getfilesystemencoding() != "utf-8":
                raise ValueError(f"{name}={text!r} cannot be read in this locale: set PYTHONUTF8=1")
            raise ValueError(f"{name}={text!r} is not UTF-8: type it again, or rename the file")
    for choice in choices_of(hint):
        if typing.get_origin(choice) is typing.Literal:
            if any(type(value) is type(each) and value == each for each in typing.get_args(choice)):
                return value
        elif choice is float and type(value) is int and abs(value) < 2**1000:
            return float(value)
        elif type(value) is (typing.get_origin(choice) or choice):
            return value
    raise ValueError(f"{name}={shown(value)} must be {type_name(hint)}")


def shown(value, form=repr):
    """A value as an error shows it: its repr or str, at most 200 characters of it."""
    try:
        text = form(value)
    except Exception:
        text = f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 200 else f"{text[:200]}..."


def comments_of(Settings):
    """Two dicts by field name: the comment behind the field, and the comment line above it, if any.

    They are read from the source of the dataclass and of those that it extends.
    """
    comments, headings = {}, {}
    for cls in reversed(Settings.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        above = ""
        for line in inspect.getsource(cls).splitlines():
            if found := re.match(r"    (\w+): [^#]*#\s*(.*)", line):
                comments[found[1]] = found[2]
                headings.setdefault(found[1], above)  # a field stays where it was defined first
                above = ""
            elif found := re.match(r"    # (.*)", line):
                above = found[1]
            elif line.startswith("    def "):
                break
    return comments, headings


def print_help(Settings, positional):
    """Print how the script is called, and every setting with default, type and meaning."""
    comments, headings = comments_of(Settings)
    words = [Path(sys.argv[0]).name, positional, "[config/FILE.py ...] [--key=value ...]\n"]
    print("python", *filter(None, words))
    types_of = typing.get_type_hints(Settings)
    for name, default in defaults_of(Settings).items():
        if headings.get(name):
            print(f"\n{headings[name]}")
        shown = default
        if isinstance(default, str) and not default.isprintable():
            shown = repr(default)
        print(f"  --{name}={shown}  ({type_name(types_of[name])})  {comments.get(name, '')}")


def open_streams():
    """Make stdin and stdout take any text, with ? for what they cannot, and open closed streams."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdin, sys.stdout):
        with contextlib.suppress(
            AttributeError, OSError
        ):  # a notebook's streams are of other kinds
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def errors_in_one_line():
    """A context that prints an error about a user's input as one line and exits with status 2.

    An error is about the input if our own files raised it. A ValueError raised elsewhere, say in
    torch, is a bug and keeps its traceback. So does anything but ValueError, OSError and
    ImportError. Ctrl-C ends with status 130, and a closed pipe (`| head`) quietly with 141.
    """
    open_streams()
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python still flushes at its end
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, ImportError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve().parent
        ours = (HOME, HOME / "glass", HOME / "bench")
        if not isinstance(error, OSError) and raised_in not in ours:
            raise
        message = str(error)
        if isinstance(error, OSError) and error.errno is not None:
            name = "a file or stdout" if error.filename is None else repr(str(error.filename)[:200])
            what_to_do = ADVICE.get(error.errno, "name another")
            message = f"{name} cannot be used ({error.strerror}): {what_to_do}"
        message = message.replace("\n", " ")
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE // 2]} ... {message[-LONGEST_MESSAGE // 2 :]}"
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
