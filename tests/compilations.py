"""Counts what XLA compiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from para_jax.compat import unregister_event_duration_listener

EVENT = "/jax/core/compile/backend_compile_duration"


@contextmanager
def compilations() -> Iterator[list[float]]:
    """A list that has an entry for every program that is compiled within the block.

    >>> with compilations() as compiled:
    ...     _ = jax.jit(lambda x: x + 1)(1)
    >>> len(compiled)
    1
    """
    compiled: list[float] = []

    def listen(event: str, duration: float, **_) -> None:
        if event == EVENT:
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        unregister_event_duration_listener(listen)
