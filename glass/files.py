"""Files that are whole or not there: locks, replacing at once, checksums, flushed folders."""

import contextlib
import hashlib
import json
import os
import runpy
from pathlib import Path

import filelock


@contextlib.contextmanager
def reading(path, advice):
    """A context in which whatever is wrong with a file's content is a ValueError that names the file.

    Content that others wrote can fail in any way: torn, another type, a key that is not there. Errors
    of ours that name the file already pass, and so do those of the file system.
    """
    try:
        yield
    except (Exception, SystemExit) as error:  # a script of the user's may exit
        names_it = isinstance(error, ValueError | OSError) and Path(path).name in str(error)
        of_the_system = isinstance(error, OSError) and error.errno is not None
        if names_it or of_the_system or isinstance(error, ImportError):
            raise
        reason = first_line(error)
        raise ValueError(f"{path} is not as it should be ({reason}): {advice}") from error


def first_line(error):
    """The kind of an error and the first line of its text, at most 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def read_function(path, setting, signature):
    """The function in a Python file that a setting names, or None if path is None.

    signature: its name and arguments, as an error shows them. Whatever it raises when it is called
    is a ValueError that names the file.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(f"{setting}={path} is not a file: give a Python file with {signature}")
    name = signature.partition("(")[0]
    try:
        with reading(path, "correct it"):
            function = runpy.run_path(path).get(name)
    except ImportError as error:
        raise ValueError(f"{setting}={path} does not run ({error}): correct it") from error
    if not callable(function):
        raise ValueError(f"{setting}={path} has no function {signature}: define it")

    def called(*arguments):
        with reading(path, "correct it"):
            return function(*arguments)

    return called


def lock(folder, name=None):
    """A lock on the folder, held until its release() or the end of the process.

    Raises ValueError if another process holds it; `name` is how the error calls the folder.
    """
    held = filelock.FileLock(Path(folder) / "lock")
    try:
        held.acquire(timeout=0.5)  # seconds: is_locked holds it for a moment
    except filelock.Timeout as error:
        raise ValueError(
            f"{name or folder} is in use by a command that is still running: "
            "name another, or stop that command"
        ) from error
    return held


def is_locked(folder):
    """Whether another process holds the folder's lock."""
    path = Path(folder) / "lock"
    if not path.exists():
        return False
    held = filelock.FileLock(path)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        return True
    held.release()
    return False


def read_object(path):
    """The JSON object in a file that this program wrote, or {} where there is none, or it is torn."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path, content):
    """Replace a file by JSON, as `write_text` does."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1))


def write_text(path, text):
    """Replace a file at once: whatever happens, it is the old or the new one, whole."""
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path):
    """A context that gives a path beside `path`; the file written there replaces it at the end.

    If anything fails, the old file stays. An OSError names the file.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is a pipe or a device, no file to replace: name another")
    partial = path.with_name(path.name + ".part")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder):
    """Flush the folder's own entries, so that a rename survives a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders; its file system keeps a journal of renames
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
