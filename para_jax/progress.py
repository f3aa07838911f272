"""Progress lines: items done, the rate, and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

EVERY = 5.0  # seconds


def duration(seconds: float) -> str:
    """A duration in human-readable form.

    >>> duration(7), duration(75), duration(4000)
    ('7s', '1m15s', '1h06m')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Pace:
    """Prints a line of progress every five seconds: items done, the rate and the time left.

    Args:
      what: the name of the items, such as "rows".
      show: is called with each line; by default lines go to stderr.
    """

    def __init__(self, what: str, show: Callable[[str], None] | None = None) -> None:
        self.what, self.show, self.shown = what, show or to_stderr, time.monotonic()
        self.first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int | None) -> None:
        """Records that `done` items of `total`, if known, are done.

        The first call is not timed, because the first batch waits for the model and compiles.
        """
        now = time.monotonic()
        if self.first is None:
            self.first = done, now
        if now - self.shown < EVERY:
            return
        self.shown, line = now, f"{done}{f'/{total}' if total else ''} {self.what}"
        since, began = self.first
        if done > since:
            rate = (done - since) / (now - began)
            left = f"  {duration((total - done) / rate)} left" if total and done < total else ""
            line += f"  {rate:.3g} a second{left}"
        self.show(line)


def to_stderr(line: str) -> None:
    """Prints a line of progress to stderr, apart from a command's output."""
    print(line, file=sys.stderr, flush=True)
