"""Answers of compilers: kept once they are known, and not where the compiler could not say."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from para_jax import compile_cache
from para_jax.probing import refusal


def asked(name: str, raised: BaseException | None = None) -> str:
    """Of a program for the CPU that is here, which compiles unless tracing it raises something."""

    def trace() -> jax.stages.Traced:
        if raised is not None:
            raise raised
        return jax.jit(jnp.sin).trace(1.0)

    return refusal(name, {"test": __name__}, trace, jax.devices()[0])


def file_of(name: str) -> Path:
    folder = compile_cache.folder()
    assert folder is not None
    (found,) = [path for path in folder.glob("kernel-*.json") if f'"kernel": "{name}"' in path.read_text()]
    return found


def test_an_answer_is_kept() -> None:
    assert asked("good") == ""
    kept = json.loads(file_of("good").read_text())
    assert kept["refusal"] == "" and kept["of"]["jax"] == jax.__version__ and kept["of"]["device"] == "cpu"
    assert asked("good", AssertionError("is not traced again")) == ""
    assert asked("bad", NotImplementedError("no such layout\nand more")) == "no such layout; a newer jax may compile it"
    assert asked("bad") != ""


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("INTERNAL: Mosaic failed to compile: Unsupported version: expected <= 7", "jax 0.10.2 with libtpu 0.0.42.1"),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem", "which no upgrade changes"),
        ("cuDNN version 8.2 is too old", "a newer nvidia-cudnn may compile it"),
        ("", "RuntimeError; a newer jax"),
    ],
)
def test_the_way_out(said: str, remedy: str) -> None:
    assert remedy in asked(said or "nothing", RuntimeError(said))


@pytest.mark.parametrize("error", [RuntimeError("UNAVAILABLE: the device is busy"), MemoryError()])
def test_a_busy_machine_says_nothing_of_a_kernel(error: Exception) -> None:
    with pytest.raises(type(error)):
        asked(f"busy {error!r}", error)
    assert asked(f"busy {error!r}") == ""
