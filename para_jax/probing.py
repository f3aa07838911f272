"""Checks whether a kernel compiles, before it is chosen. The result is cached on disk.

Kernels are compiled by other packages (libtpu, cuDNN), whose versions may not support them, and they may need more
on-chip memory than there is. Only compilation tells, and it takes seconds. Results are small files in the folder of
compiled programs (compile_cache.py), one for each combination of versions, device and kernel.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jax.stages import Traced

from para_jax import __version__, compile_cache
from para_jax.errors import ParaJaxError
from para_jax.files import write_json

# A result depends on these versions and flags, besides the program.
PACKAGES = (
    "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Errors of a busy device or machine, not of the kernel.
PASSING = re.compile(r"\b(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED)\b")
LONGEST = 160  # characters of a compiler's message
# Patterns in a compiler's message, and what makes the kernel compile.
REMEDIES = (
    (r"Mosaic module|Unsupported version", "jax 0.10.2 with libtpu 0.0.42.1 compiles it"),
    (r"[Vv]mem", "it needs more of the chip's vector memory than there is, which no upgrade changes"),
    (r"[Cc][Uu][Dd][Nn][Nn]", "a newer nvidia-cudnn may compile it"),
    (r"", "a newer jax may compile it"),
)


def refusal(kernel: str, about: Mapping[str, Any], trace: Callable[[], Traced], device: Any) -> str:
    """Why a kernel does not compile for a device, with the upgrade that fixes it; "" if it compiles.

    Args:
      about: everything that the program depends on, as JSON: sizes, dtypes, blocks.
      trace: traces a program for shapes on `device`, with each form of the kernel that will run, forward and backward.
      device: a device of this process, or of a topology.

    Raises the compiler's error if the device or the machine is busy, which tells nothing about the kernel.
    """
    described = {
        "kernel": kernel,
        **about,
        "device": device.device_kind,
        "platform": device.client.platform_version,
        "para-jax": __version__,
        **versions(),
        **{name: os.environ[name] for name in FLAGS if name in os.environ},
    }
    key = json.dumps(described, sort_keys=True)
    if key not in _answers:
        folder = compile_cache.folder()
        name = f"kernel-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        path = None if folder is None else folder / name
        answer = None if path is None else _kept(path, key)
        if answer is None:
            answer = _tried(trace)
            if path is not None:
                with suppress(ParaJaxError):  # without the file, the kernel is tried again
                    write_json(path, {"of": json.loads(key), "refusal": answer})
        _answers[key] = answer
    return _answers[key]


def versions() -> dict[str, str]:
    """The installed versions of packages that compile.

    >>> list(versions())[:2]
    ['jax', 'jaxlib']
    """
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


_answers: dict[str, str] = {}


def _kept(path: Path, described: str) -> str | None:
    """The result in a file; None if it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        answer, same = found["refusal"], found["of"] == json.loads(described)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return answer if same and isinstance(answer, str) else None


def _tried(trace: Callable[[], Traced]) -> str:
    try:
        trace().lower().compile()
    except Exception as error:  # compilers raise anything
        message = _first_line(error)
        if PASSING.search(message) or isinstance(error, MemoryError):
            raise
        return f"{message}; {next(remedy for pattern, remedy in REMEDIES if re.search(pattern, message))}"
    return ""


def _first_line(error: Exception) -> str:
    r"""The first line of a compiler's message.

    >>> _first_line(RuntimeError("INTERNAL: E1001: TooMuch:\nneeds 8 MB\nof 4 MB"))
    'INTERNAL: E1001: TooMuch: needs 8 MB'
    >>> _first_line(NotImplementedError())
    'NotImplementedError'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    message = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return message if len(message) <= LONGEST else f"{message[:LONGEST]}..."
