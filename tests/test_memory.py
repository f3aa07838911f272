"""Where malloc is told to keep freed memory: never where JAX may compute on an accelerator."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import jax
import pytest

from para_jax import memory


class Libc:
    def __init__(self) -> None:
        self.given: dict[int, int] = {}

    def mallopt(self, option: int, value: int) -> int:
        self.given[option] = value
        return 1


@pytest.mark.parametrize(
    "platforms, plugin, does",
    [
        ("cpu", False, True),
        ("cpu", True, True),
        ("cuda", True, False),
        ("tpu,cpu", False, False),
        (None, True, False),
    ],
)
def test_malloc_is_changed_where_there_is_only_a_cpu(
    monkeypatch: pytest.MonkeyPatch, platforms: str | None, plugin: bool, does: bool
) -> None:
    libc = Libc()
    monkeypatch.setattr(memory, "ctypes", SimpleNamespace(CDLL=lambda name: libc))
    monkeypatch.setattr(memory, "entry_points", lambda group: ["xla_cuda13"] if plugin else [])
    monkeypatch.setattr(sys, "platform", "linux")
    values = {**jax.config.values, "jax_platforms": platforms}
    monkeypatch.setattr(jax, "config", SimpleNamespace(values=values))
    assert memory.keep_freed_memory() is does
    assert bool(libc.given) is does
