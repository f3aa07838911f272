"""Writes each notebook of this folder from the .py file that it is paired with: `python colab/pair.py`.

The .py files (jupytext's percent format) are what one edits and reviews; the .ipynb files are what Colab opens. A test
sees that both say the same. `python colab/pair.py --run NAME` also runs a notebook, in an empty folder, and keeps what
its cells print and draw, so that it can be read without running; without --run a cell keeps its outputs as long as its
source stays the same. In a new notebook, a cell of the one line `INSTALL` becomes the
cell that installs para_jax, which is install.py with the functions that it imports. The repository's address, which
that cell and the badges need, stands in pyproject.toml: change it there and run this.
"""

from __future__ import annotations

import argparse
import base64
import inspect
import io
import os
import re
import tempfile
import tomllib
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

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
    own = r"(github(?:\.com)?)/[\w.-]+/[\w.-]+(?=/blob/main/(?:colab/|docs/|README))"
    return re.sub(own, lambda match: f"{match[1]}/{OWN}", text)


def notebook(text: str, before: str | None = None) -> str:
    """The .ipynb of a .py, the same for the same text, with the outputs that the same cells have in `before`."""
    made = jupytext.reads(text, fmt="py:percent")
    cells = nbformat.reads(before, as_version=4).cells if before else []
    outputs = {cell.source: cell.outputs for cell in cells if cell.cell_type == "code"}
    for i, cell in enumerate(made.cells):
        cell["id"] = f"cell-{i}"
        if cell.cell_type == "code":
            cell["outputs"] = outputs.get(cell.source, [])
    made.metadata["colab"] = {"provenance": []}
    return nbformat.writes(made) + "\n"


def executed(text: str) -> str:
    """A notebook with the outputs of its cells. Raises nbclient's CellExecutionError where one fails."""
    made = nbformat.reads(text, as_version=4)
    os.environ.pop("MPLBACKEND", None)  # pictures go into the notebook
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(made, timeout=1800, resources={"metadata": {"path": folder}}).execute()
    made.metadata.pop("language_info")  # of this Python
    for cell in made.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell["execution_count"] = None
            cell["outputs"] = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "execution_count" in output:
                    output["execution_count"] = None
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = small(output.data["image/png"])
    return nbformat.writes(made) + "\n"


def small(png: str) -> str:
    """A picture in base64 with 256 colours, which take a third of the bytes."""
    picture, file = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    picture.quantize(256).save(file, format="png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", metavar="NAME", action="append", default=[], help="run this notebook; repeat")
    args = parser.parse_args()
    names = [path.stem for path in sources()]
    if unknown := set(args.run) - set(names):
        parser.error(f"no notebook {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    for path in sources():
        path.write_text(completed(path.read_text()))
        file = path.with_suffix(".ipynb")
        made = notebook(path.read_text(), file.read_text() if file.exists() else None)
        file.write_text(executed(made) if path.stem in args.run else made)
        print(file)


if __name__ == "__main__":
    main()
