"""What a run reports: a line of JSON a step, a line of text now and then, and a picture of the losses."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from para_jax.files import Growing, replacing
from para_jax.mounts import RESUME, naming
from para_jax.progress import duration


class MetricsFile:
    """A JSONL file with a line for each step: {"step", "tokens", "loss": {tenant: value}, "grad_norm", "lr"}.

    They are of the tenants whose turn it was. With dev rows some have "dev_loss" too. What is no number is null.
    Nothing is written before the first line.
    """

    def __init__(
        self, path: Path, done: int = 0, more: Iterable[Path] = (), show: Callable[[str], None] = lambda line: None
    ):
        """Keeps the lines of the first `done` steps, which a resumed run goes on from.

        Lines that were lost with a machine come from `more` files, those of checkpoints; those that are nowhere are
        said.
        """
        self.path, self._new = path, b""
        self._file: Growing | None = None
        if done:
            there = path.read_bytes() if path.exists() else b""
            kept = b"".join(line for step, line in _lines(there) if step <= done)
            lines = {step: line for file in more for step, line in _lines(file.read_bytes())} | dict(_lines(kept))
            whole = b"".join(line for step, line in sorted(lines.items()) if step <= done)
            if lost := done - whole.count(b"\n"):
                show(f"{path} has lost the lines of {lost} of the {done} steps")
            at = len(kept) if there.startswith(kept) and whole.startswith(kept) else 0
            with naming(path, again=RESUME):
                self._open(at).write(whole[at:])

    def write(self, line: Mapping[str, Any]) -> None:
        data = (json.dumps(_finite(line)) + "\n").encode()
        with naming(self.path, again=RESUME):
            (self._file or self._open(0)).write(data)
        self._new += data

    def settle(self) -> bytes:
        """Closes the file, and goes on. Returns the lines since it did so before."""
        new, self._new = self._new, b""
        if self._file is not None:
            with naming(self.path, again=RESUME):
                self._file.settle()
        return new

    def _open(self, keep: int) -> Growing:
        self._file = Growing(self.path, keep)
        return self._file

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file is not None:
            with naming(self.path, again=RESUME):
                self._file.__exit__(*error)


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Each line, with its step; one that a kill cut off is left out."""
    for line in data.splitlines(keepends=True):
        with suppress(ValueError):
            if line.endswith(b"\n"):
                yield json.loads(line)["step"], line


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(x) for key, x in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that a kill cut off is left out."""
    return [json.loads(line) for _, line in _lines(path.read_bytes())]


class Progress:
    """Prints how far a run is: step, tokens a second, time left, and each tenant's loss.

    `steps`, `tokens` and `seconds` are those of this process behind its first step, which compiles.
    """

    def __init__(self, done: int, show: Callable[[str], None], every: float = 5.0):
        self.show, self.every = show, every
        self.began = self.shown = time.monotonic()
        self.first, self.tokens, self.steps, self.seconds = done, 0, 0, 0.0
        self.compiling = True

    def update(self, step: int, total: int, tokens: int, losses: dict[str, float]) -> None:
        """After a step of `total`, as far as is known; prints if it is time."""
        now = time.monotonic()
        if self.compiling:
            # The first step compiles; its time says nothing about the others.
            self.compiling, self.began, self.first = False, now, step
            tokens = 0
        self.tokens += tokens
        self.seconds, self.steps = now - self.began, step - self.first
        if now - self.shown < self.every and step < total:
            return
        self.shown = now
        rate = f"{self.tokens / self.seconds:,.0f} tokens/s" if self.steps else "compiled"
        left = f"{duration(self.seconds / self.steps * (total - step))} left" if self.steps else ""
        worst = sorted(losses.items(), key=lambda item: -item[1])
        shown = "  ".join(f"{name} {loss:.3f}" for name, loss in (worst[:6] if len(worst) > 6 else losses.items()))
        more = f"  and {len(worst) - 6} lower" if len(worst) > 6 else ""
        self.show(f"step {step}/{total}  {rate}  {left}  loss: {shown}{more}")


def can_draw(show: Callable[[str], None]) -> bool:
    """Whether there is matplotlib to draw with; says so if not. A run does not fail at its end for a picture."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    show("no picture was drawn, because matplotlib is not installed: pip install matplotlib")
    return False


def plot_losses(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws every tenant's loss against the step (`loss_figure`), if there are any lines."""
    if lines:
        save_figure(loss_figure(lines), path)


def loss_figure(lines: Sequence[dict[str, Any]]) -> Any:
    """A matplotlib figure of every tenant's loss: thin at each step, thick as a moving average, dotted on dev rows.

    The axis is logarithmic if the losses, all above zero, differ more than tenfold: the first steps' are often so large
    that nothing would be seen of the others.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for line in lines for name in line["loss"]))
    width = max(1, len(lines) // 20)
    drawn = []
    for i, name in enumerate(names):
        own = [line for line in lines if line["loss"].get(name) is not None]
        steps, losses = [line["step"] for line in own], [line["loss"][name] for line in own]
        drawn += losses
        if len(names) <= 10:
            axes.plot(steps, losses, color=f"C{i}", alpha=0.35, linewidth=0.8)
        smooth = [fmean(losses[max(0, j - width + 1) : j + 1]) for j in range(len(losses))]
        axes.plot(steps, smooth, color=f"C{i % 10}", label=name if len(names) <= 20 else None)
        looks = [(line["step"], line["dev_loss"][name]) for line in lines if (line.get("dev_loss") or {}).get(name)]
        if looks and len(names) <= 20:
            axes.plot(*zip(*looks, strict=True), color=f"C{i % 10}", linestyle=":", marker="o", markersize=3)
    said = ["thin: each step"] * (len(names) <= 10) + [f"thick: mean of {width} steps"]
    said += ["dotted: dev rows"] * (any(line.get("dev_loss") for line in lines) and len(names) <= 20)
    axes.set(xlabel=f"step ({', '.join(said)})", ylabel="loss (cross-entropy, nats per response token)")
    if drawn and 0 < 10 * min(drawn) < max(drawn):
        axes.set_yscale("log", subs=())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(0, None)
    if len(names) <= 20:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Writes a matplotlib figure as a PNG, whole or not at all."""
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")
