"""How far long work is, at which rate it goes, and how long it still takes."""

from __future__ import annotations

import time
from collections.abc import Callable

SHOWN_EVERY = 5  # seconds


def duration(seconds: float) -> str:
    """A time a person reads.

    >>> duration(7), duration(75), duration(4000)
    ('7s', '1m15s', '1h06m')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class RowProgress:
    """Says every few seconds how many rows are done.

    >>> progress = RowProgress("rows are read", print, every=0)
    >>> progress(2, 4)  # doctest: +ELLIPSIS
    2 of 4 rows are read, ... rows/s, 0s left
    """

    def __init__(self, what: str, show: Callable[[str], None], every: float = SHOWN_EVERY) -> None:
        self.what, self.show, self.every = what, show, every
        self.began = self.shown = time.monotonic()

    def __call__(self, done: int, total: int | None) -> None:
        """So many rows are done, of so many, if that is known."""
        now = time.monotonic()
        if now - self.shown < self.every or not done:
            return
        self.shown, rate = now, done / max(now - self.began, 1e-9)
        of, left = (f" of {total:,}", f", {duration((total - done) / rate)} left") if total else ("", "")
        self.show(f"{done:,}{of} {self.what}, {rate:,.0f} rows/s{left}")
