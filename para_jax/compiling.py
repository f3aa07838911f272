"""Programs that are compiled side by side, in threads, ahead of their first call."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor

from jax.stages import Traced


class Compiling:
    """Compiles programs in threads; whoever needs one waits for that one only.

    A program is given as a function that traces it: `jax.jit(f).trace(*shapes)`. A later call of the jitted function
    with arguments of these shapes finds it compiled.

    >>> import jax
    >>> square = jax.jit(lambda x: x * x)
    >>> with Compiling() as compiling:
    ...     compiling.begin("square", lambda: square.trace(3.0))
    ...     compiling.wait("square")
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "compile")
        self._begun: dict[Hashable, Future[None]] = {}

    def begin(self, name: Hashable, trace: Callable[[], Traced]) -> None:
        """Begins to trace, lower and compile a program, unless one of this name was begun."""
        if name not in self._begun:
            self._begun[name] = self._threads.submit(_compile, trace)

    def wait(self, name: Hashable) -> None:
        """Until this program is compiled, if it was begun. Raises what compiling it raises."""
        if name in self._begun:
            self._begun[name].result()

    def wait_for_all(self) -> None:
        """Until all programs are compiled."""
        for name in self._begun:
            self.wait(name)

    def __len__(self) -> int:
        return len(self._begun)

    def __enter__(self) -> Compiling:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _compile(trace: Callable[[], Traced]) -> None:
    trace().lower().compile()
