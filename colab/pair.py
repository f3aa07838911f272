"""Writes each notebook of this folder from the .py file that it is paired with: `python colab/pair.py`.

The .py files (jupytext's percent format) are what one edits and reviews; the .ipynb files are what Colab opens, and
have no outputs. A test sees that both say the same. The repository's address, which the badge and the installation
need, is `REPOSITORY` here: change it and run this.
"""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
import nbformat

REPOSITORY = "para-jax/para_jax"
FOLDER = Path(__file__).parent


def sources() -> list[Path]:
    """The .py files of the notebooks."""
    return [path for path in sorted(FOLDER.glob("*.py")) if path.read_text().startswith("# ---\n# jupyter:")]


def addressed(text: str) -> str:
    """A notebook's text with the repository's address.

    >>> addressed("https://colab.research.google.com/github/ours/before/blob/main/colab/x.ipynb")
    'https://colab.research.google.com/github/para-jax/para_jax/blob/main/colab/x.ipynb'
    >>> addressed("https://github.com/others/theirs and git+https://github.com/ours/before")
    'https://github.com/others/theirs and git+https://github.com/para-jax/para_jax'
    """
    own = r"(github(?:\.com)?)/[\w.-]+/[\w.-]+(?=/blob/main/(?:colab|docs)/)|(git\+https://github\.com)/[\w.-]+/[\w.-]+"
    return re.sub(own, lambda match: f"{match[1] or match[2]}/{REPOSITORY}", text)


def notebook(text: str) -> str:
    """The .ipynb of a .py, the same for the same text."""
    made = jupytext.reads(text, fmt="py:percent")
    for i, cell in enumerate(made.cells):
        cell["id"] = f"cell-{i}"
    made.metadata["colab"] = {"provenance": []}
    return nbformat.writes(made) + "\n"


if __name__ == "__main__":
    for path in sources():
        path.write_text(addressed(path.read_text()))
        path.with_suffix(".ipynb").write_text(notebook(path.read_text()))
        print(path.with_suffix(".ipynb"))
