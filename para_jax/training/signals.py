"""Ctrl-C and SIGTERM, which a run answers by saving."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(KeyboardInterrupt):
    """The run was told to stop, and has saved what it did. `step` is the number of steps done.

    `preempted` says that it was SIGTERM, with which machines announce that they will be taken away.
    """

    def __init__(self, step: int, preempted: bool = False):
        super().__init__(f"stopped and saved after step {step}; --resume goes on from there")
        self.step = step
        self.preempted = preempted


AT_ONCE = "stopped at once, before the step was saved; --resume goes on from the newest checkpoint"


class Stop:
    """Whether a signal came, and which was the first."""

    kind: int | None = None


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Notes the first Ctrl-C or SIGTERM; a second one stops at once: Ctrl-C by raising KeyboardInterrupt."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def handle(kind: int, _: Any) -> None:
        if stop.kind is not None and kind == signal.SIGINT:
            raise KeyboardInterrupt(AT_ONCE)
        stop.kind = kind if stop.kind is None else stop.kind
        if kind != signal.SIGINT:
            signal.signal(kind, before[signal.Signals(kind)])

    for kind in before:
        signal.signal(kind, handle)
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
