"""Make the notebooks of the lessons, with their outputs: python lessons/make.py [--all] [03 14 ...]

A notebook is made again where its lesson was changed since, or where it is named.
"""

import hashlib
import sys
from pathlib import Path

LESSONS = Path(__file__).resolve().parent


def lessons():
    """The lessons' Python files, in order."""
    return sorted(LESSONS.glob("[0-9][0-9]_*.py"))


def sha256(lesson):
    """Of a lesson's text, whatever its line ends."""
    return hashlib.sha256(lesson.read_text(encoding="utf-8").encode()).hexdigest()


def is_stale(lesson):
    """Whether a lesson's notebook is missing, or was made from another text."""
    import nbformat

    path = lesson.with_suffix(".ipynb")
    if not path.exists():
        return True
    notebook = nbformat.read(path, as_version=4)
    return notebook.metadata.get("lesson_sha256") != sha256(lesson)


def make(lesson):
    """Run a lesson as a notebook and save it with its outputs beside the lesson."""
    import jupytext
    import nbformat
    from nbclient import NotebookClient

    notebook = jupytext.read(lesson)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": kernel, "lesson_sha256": sha256(lesson)}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    where = {"metadata": {"path": str(LESSONS)}}
    NotebookClient(notebook, timeout=300, resources=where).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
    nbformat.write(notebook, lesson.with_suffix(".ipynb"))


def main(words):
    named = [word for word in words if word != "--all"]
    for lesson in lessons():
        wanted = lesson.name[:2] in named if named else "--all" in words or is_stale(lesson)
        if wanted:
            print(f"{lesson.stem} ...", flush=True)
            make(lesson)


if __name__ == "__main__":
    main(sys.argv[1:])
