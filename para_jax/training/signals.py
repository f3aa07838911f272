"""Ctrl-C and SIGTERM: a run saves and stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A run that was stopped by a signal, after it saved. `step` is the number of steps done.

    `preempted` is True for SIGTERM, which announces that a machine is preempted.
    """

    def __init__(self, step: int, preempted: bool = False):
        super().__init__(f"stopped and saved after step {step}; --resume continues from there")
        self.step = step
        self.preempted = preempted


AT_ONCE = "stopped at once, before the step was saved; --resume continues from the newest checkpoint"


class Stop:
    """The first signal that was received, if any."""

    kind: int | None = None


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Records the first Ctrl-C or SIGTERM. A second one stops at once; Ctrl-C raises KeyboardInterrupt."""
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
