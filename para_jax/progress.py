"""Progress of long work: the items done, the rate, and the time left.

On a terminal and in a notebook this is a bar of tqdm's, which changes in place. Elsewhere, as in a log, and for those
who take the lines themselves, it is a line every five seconds.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

EVERY = 5.0  # seconds from line to line
REDRAWN = 0.2  # seconds from one state of a bar to the next

_bars: list[Any] = []  # that are on the screen


def say(line: str) -> None:
    """Prints a line at once, above a bar if there is one."""
    _print(line, sys.stdout)


def to_stderr(line: str) -> None:
    """The same for stderr, apart from a command's output."""
    _print(line, sys.stderr)


def _print(line: str, stream: Any) -> None:
    if _bars:
        _bars[-1].write(line, file=stream)
    else:
        print(line, file=stream, flush=True)


def end_bars() -> None:
    """Leaves bars as they are, and goes on below them."""
    while _bars:
        _bars.pop().close()


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


class Display:
    """Where progress is shown: in a bar, or with `show`.

    Args:
      show: is called with each line. `say` and `to_stderr` are replaced by a bar on a terminal and in a notebook.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self.show, self.shown = show, time.monotonic()
        self.bar: Any = None
        stream = sys.stdout if show is say else sys.stderr if show is to_stderr else None
        self.in_place = stream is not None and ("ipykernel" in sys.modules or _is_terminal(stream))

    def __call__(
        self, now: float, done: int, total: int | None, line: Callable[[], str], at_once: bool = False
    ) -> None:
        """Shows `line()`, unless another was shown a moment ago. The last state is for the caller to show `at_once`."""
        if not at_once and now - self.shown < (REDRAWN if self.in_place else EVERY):
            return
        self.shown = now
        if not self.in_place:
            self.show(line())
            return
        if self.bar is None:
            with warnings.catch_warnings():  # in a notebook without ipywidgets, the bar is text
                warnings.simplefilter("ignore")
                from tqdm.auto import tqdm

            form = "{percentage:3.0f}% |{bar:20}| {desc}" if total else "{desc}"
            self.bar = tqdm(total=total, bar_format=form, dynamic_ncols=True)
            _bars.append(self.bar)
        self.bar.total, self.bar.n = total, done
        self.bar.set_description_str(line())

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self.bar is not None:
            _bars[:] = [bar for bar in _bars if bar is not self.bar]
            self.bar.close()


def _is_terminal(stream: Any) -> bool:
    """Whether this is a terminal, of a known width."""
    return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0


class Pace:
    """Shows items done, the rate and the time left.

    Args:
      what: the name of the items, such as "rows".
      show: is called with each line; by default there is a bar, or lines go to stderr (`Display`).
    """

    def __init__(self, what: str, show: Callable[[str], None] | None = None) -> None:
        self.what, self.display = what, Display(show or to_stderr)
        self.first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int | None) -> None:
        """Records that `done` items of `total`, if known, are done.

        The first call is not timed, because the first batch waits for the model and compiles.
        """
        now = time.monotonic()
        if self.first is None:
            self.first = done, now
        ends_bar = self.display.bar is not None and done == total
        self.display(now, done, total, lambda: self._line(now, done, total), at_once=ends_bar)
        if done == total:
            self.display.close()

    def _line(self, now: float, done: int, total: int | None) -> str:
        assert self.first is not None
        since, began = self.first
        line = f"{done}{f'/{total}' if total else ''} {self.what}"
        if done > since:
            rate = (done - since) / (now - began)
            left = f"  {duration((total - done) / rate)} left" if total and done < total else ""
            line += f"  {rate:.3g} a second{left}"
        return line
