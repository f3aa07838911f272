"""How far a verb is, as it goes on."""

from __future__ import annotations

import sys
import time

from para_jax.training.metrics import duration

EVERY = 5.0  # seconds


class Pace:
    """Prints on stderr how far a verb is, how fast it goes and how long it will take, every five seconds."""

    def __init__(self, what: str) -> None:
        self.what, self.shown = what, time.monotonic()
        self.first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int) -> None:
        """After `done` of `total`. What the first batch takes says little: it waits for the model and compiles."""
        now = time.monotonic()
        if self.first is None:
            self.first = done, now
        if now - self.shown < EVERY:
            return
        self.shown, line = now, f"{done}/{total} {self.what}"
        since, began = self.first
        if done > since:
            rate = (done - since) / (now - began)
            left = f"  {duration((total - done) / rate)} left" if done < total else ""
            line += f"  {rate:.3g} a second{left}"
        print(line, file=sys.stderr, flush=True)
