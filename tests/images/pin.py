"""Writes the pins of one image: which versions of para_jax's dependencies, and of theirs, a published image holds.

    python3.13 tests/images/pin.py pip-freeze.txt --source "googlecolab/backend-info, 2026-08-19" > colab-cpu.txt

FREEZE is what `pip freeze` printed in the image, or - for standard input. Run this with the image's version of Python,
on which requirements depend. pip says what para_jax needs. What the image lacks, test tools and torch stay free.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

# Extras whose packages an image may hold; those of tests and of other accelerators are not the image's.
EXTRAS = ("data", "serving", "watch")
# What lets JAX reach the image's accelerator: part of the image, required by no dependency.
PLUGINS = ("libtpu", "jax-cuda12-pjrt", "jax-cuda12-plugin")
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def pins(freeze: str) -> list[str]:
    """The lines of this freeze that para_jax needs, directly or not, and the image's plugins of JAX."""
    held = {canonical(name): line for line in freeze.splitlines() if (name := line.partition("==")[0]) != line}
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(x for extra in EXTRAS for x in project["optional-dependencies"][extra])]
    return [held[name] for name in sorted({*resolved(wanted, list(held.values())), *PLUGINS} & held.keys())]


def resolved(wanted: list[str], constraints: list[str]) -> set[str]:
    """The names of all that pip would install for these requirements under these constraints."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints))
        file.flush()
        options = ["--quiet", "--dry-run", "--ignore-installed", "--report", "-", "-c", file.name]
        command = [sys.executable, "-m", "pip", "install", *options, *wanted]
        done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    return {canonical(item["metadata"]["name"]) for item in json.loads(done.stdout)["install"]}


def canonical(name: str) -> str:
    """How the package index spells a name."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("freeze", type=argparse.FileType(), metavar="FREEZE")
    parser.add_argument("--source", required=True, help="where the freeze was published, and when: goes to the heading")
    options = parser.parse_args()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    print(f"# {options.source}; Python {python}. Written by tests/images/pin.py.")
    print(*pins(options.freeze.read()), sep="\n")


if __name__ == "__main__":
    main()
