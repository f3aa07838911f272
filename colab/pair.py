"""Writes each notebook of this folder from the .py file that it is paired with: `python colab/pair.py`.

The .py files (jupytext's percent format) are what one edits and reviews; the .ipynb files are what Colab opens, and
have no outputs. A test sees that both say the same. In a new notebook, a cell of the one line `INSTALL` becomes the
cell that installs para_jax, which is install.py with the functions that it imports. The repository's address, which
that cell and the badges need, stands in pyproject.toml: change it there and run this.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

import jupytext
import nbformat

from para_jax import machine

FOLDER = Path(__file__).parent
REPOSITORY = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
OWN = REPOSITORY.removeprefix("https://github.com/")
INSTALL = "# @title Install para_jax"


def sources() -> list[Path]:
    """The .py files of the notebooks."""
    return [path for path in sorted(FOLDER.glob("*.py")) if path.read_text().startswith("# ---\n# jupyter:")]


def install_cell() -> str:
    """The cell that installs para_jax: install.py, which needs nothing that is not in Python."""
    text = (FOLDER / "install.py").read_text().replace("{REPOSITORY}", REPOSITORY)
    line = re.search(r"^from para_jax.machine import (.*?)(?:  #.*)?\n", text, re.MULTILINE)
    assert line is not None
    functions = [inspect.getsource(getattr(machine, name)) for name in line[1].split(", ")]
    return text.replace(line[0], "\n" + "\n\n".join(functions) + "\n").rstrip()


def completed(text: str) -> str:
    """A notebook's text with the installing cell, and with the repository's address in its links."""
    cells = re.split(r"(?m)^(?=# %%)", text)
    for i, cell in enumerate(cells):
        if INSTALL in cell:
            cells[i] = f'# %% cellView="form"\n{install_cell()}\n\n'
    return addressed("".join(cells))


def addressed(text: str) -> str:
    """A notebook's text with the repository's address.

    >>> addressed("https://github.com/others/theirs and https://github.com/ours/before/blob/main/docs/study.md")
    ... # doctest: +ELLIPSIS
    'https://github.com/others/theirs and https://github.com/.../blob/main/docs/study.md'
    """
    own = r"(github(?:\.com)?)/[\w.-]+/[\w.-]+(?=/blob/main/(?:colab|docs)/)"
    return re.sub(own, lambda match: f"{match[1]}/{OWN}", text)


def notebook(text: str) -> str:
    """The .ipynb of a .py, the same for the same text."""
    made = jupytext.reads(text, fmt="py:percent")
    for i, cell in enumerate(made.cells):
        cell["id"] = f"cell-{i}"
    made.metadata["colab"] = {"provenance": []}
    return nbformat.writes(made) + "\n"


if __name__ == "__main__":
    for path in sources():
        path.write_text(completed(path.read_text()))
        path.with_suffix(".ipynb").write_text(notebook(path.read_text()))
        print(path.with_suffix(".ipynb"))
