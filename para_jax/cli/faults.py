"""Reports unexpected errors on the command line: one line, and a file with the traceback."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import tempfile
import traceback
from importlib.metadata import PackageNotFoundError, metadata

from para_jax.cli.env import PACKAGES
from para_jax.machine import installed

VARIABLE = "PARA_JAX_TRACEBACK"
LONGEST = 300  # characters of an error's message


def describe(verb: str, error: BaseException, several: bool = False) -> str:
    """One line about an unexpected error. It names a file with the traceback.

    With PARA_JAX_TRACEBACK in the environment, returns the traceback instead. `several` is True in a multi-process run,
    where a process may fail because another one did.
    """
    if os.environ.get(VARIABLE):
        return "".join(traceback.format_exception(error))
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("para_jax"):
        return f"the package {error.name.partition('.')[0]} is not installed; install it with pip"
    what = in_one_line(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in what:
        return f"out of memory ({what}); use fewer or shorter rows at once, or --quantize int8"
    if "DotThunk" in what and "BF16" in what:  # jaxlib 0.7, on processors with AMX
        return (
            f"this jaxlib cannot multiply bfloat16 on this processor ({what}); choose --dtype float32, upgrade jax, or "
            "set XLA_FLAGS=--xla_cpu_max_isa=AVX512"
        )
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" in {os.path.basename(place[0].filename)}:{place[0].lineno}" if place else ""
    saved = f"{_saved(verb, error)} and what para-jax env prints, to {_tracker()}"
    if several:
        return (
            f"stopped by {what}{where}; if another process stopped before this one, its output says why. "
            f"Otherwise this is a bug in para_jax. {saved}"
        )
    return f"this is a bug in para_jax, not your mistake: {what}{where}. {saved}"


def in_one_line(error: BaseException) -> str:
    """The type of an error and the first line of its message.

    >>> in_one_line(KeyError("x")), in_one_line(AssertionError())
    ("KeyError: 'x'", 'AssertionError')
    """
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    short = message if len(message) <= LONGEST else f"{message[:LONGEST]}..."
    return f"{type(error).__name__}: {short}" if short else type(error).__name__


def _saved(verb: str, error: BaseException) -> str:
    """Writes the traceback, the command and the versions to a file, and returns how to report it."""
    lines = [
        f"command: {shlex.join(sys.argv)}",
        f"python {platform.python_version()} on {platform.platform()}",
        *(f"{name} {installed(name) or 'is not installed'}" for name in PACKAGES),
        "",
        *traceback.format_exception(error),
    ]
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix=f"para-jax-{verb}-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write("\n".join(lines))
    except OSError as problem:
        return f"Its traceback could not be saved ({problem}): please report what it prints with {VARIABLE}=1"
    return f"Please report it, with the traceback in {file.name}"


def _tracker() -> str:
    """The issue tracker, from [project.urls] in pyproject.toml, if the package is installed."""
    try:
        urls = metadata("para-jax").get_all("Project-URL") or []
    except PackageNotFoundError:
        urls = []
    addresses = dict(url.split(", ", 1) for url in urls)
    return f"{addresses['Repository']}/issues" if "Repository" in addresses else "the project's issue tracker"
