"""Compiles programs ahead of time, in parallel threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from jax.stages import Traced


class Compiling:
    """Compiles programs in threads. A caller waits only for the program that it needs.

    A program is given as a function that traces it: `jax.jit(f).trace(*shapes)`. A later call of the jitted function
    with arguments of these shapes does not compile.

    >>> import jax
    >>> square = jax.jit(lambda x: x * x)
    >>> with Compiling() as compiling:
    ...     compiling.start("square", lambda: square.trace(3.0))
    ...     compiling.wait("square")
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "compile")
        self._started: dict[Hashable, Future[None]] = {}

    def start(self, name: Hashable, trace: Callable[[], Traced]) -> None:
        """Starts to trace, lower and compile a program, unless one of this name was started."""
        if name not in self._started:
            self._started[name] = self._threads.submit(_compile, trace)

    def wait(self, name: Hashable) -> None:
        """Waits until this program is compiled, if it was started. Raises what compilation raises."""
        if name in self._started:
            self._started[name].result()

    def wait_for_all(self) -> None:
        for name in self._started:
            self.wait(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _compile(trace: Callable[[], Traced]) -> None:
    trace().lower().compile()
