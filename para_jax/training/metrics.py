"""Metrics of a run: a JSON line for each step, progress lines, and a plot of the losses."""

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

from para_jax.files import AppendFile, replacing
from para_jax.mounts import RESUME, explain_os_errors
from para_jax.progress import Display, duration


class MetricsFile:
    """A JSONL file with a line for each step: {"step", "tokens", "loss": {tenant: value}, "grad_norm", "lr"}.

    A line has the tenants of its step, and "dev_loss" after an evaluation. NaN and infinite values are null. The file
    is not created before the first line.
    """

    def __init__(
        self, path: Path, done: int = 0, more: Iterable[Path] = (), show: Callable[[str], None] = lambda line: None
    ):
        """Keeps the lines of the first `done` steps of a resumed run.

        Lines that a machine lost are restored from `more` files, those in checkpoints. Missing lines are reported.
        """
        self.path, self._new = path, b""
        self._file: AppendFile | None = None
        if done:
            existing = path.read_bytes() if path.exists() else b""
            kept = b"".join(line for step, line in _lines(existing) if step <= done)
            lines = {step: line for file in more for step, line in _lines(file.read_bytes())} | dict(_lines(kept))
            restored = b"".join(line for step, line in sorted(lines.items()) if step <= done)
            if lost := done - restored.count(b"\n"):
                show(f"{path} has lost the lines of {lost} of the {done} steps")
            at = len(kept) if existing.startswith(kept) and restored.startswith(kept) else 0
            with explain_os_errors(path, again=RESUME):
                self._open(at).write(restored[at:])

    def write(self, line: Mapping[str, Any]) -> None:
        data = (json.dumps(_finite(line)) + "\n").encode()
        with explain_os_errors(self.path, again=RESUME):
            (self._file or self._open(0)).write(data)
        self._new += data

    def flush(self) -> bytes:
        """Makes the file durable (`AppendFile.reopen`). Returns the lines since the previous call."""
        new, self._new = self._new, b""
        if self._file is not None:
            with explain_os_errors(self.path, again=RESUME):
                self._file.reopen()
        return new

    def _open(self, keep: int) -> AppendFile:
        self._file = AppendFile(self.path, keep)
        return self._file

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file is not None:
            with explain_os_errors(self.path, again=RESUME):
                self._file.__exit__(*error)


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Each line with its step. A line that a kill truncated is skipped."""
    for line in data.splitlines(keepends=True):
        with suppress(ValueError):
            if line.endswith(b"\n"):
                yield json.loads(line)["step"], line


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(x) for key, x in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file. A line that a kill truncated is skipped."""
    return [json.loads(line) for _, line in _lines(path.read_bytes())]


class Progress:
    """Prints the progress of a run: step, tokens per second, time left, and each tenant's loss.

    `steps`, `tokens` and `seconds` count this process's steps after its first step, which compiles.
    """

    def __init__(self, done: int, show: Callable[[str], None]):
        self.display, self.began = Display(show), time.monotonic()
        self.first, self.tokens, self.steps, self.seconds = done, 0, 0, 0.0
        self.compiling = True

    def update(self, step: int, total: int, tokens: int, losses: dict[str, float]) -> None:
        """Records a step of about `total`, and shows it: the first and the last step, and others now and then."""
        now, first = time.monotonic(), self.compiling
        if first:  # it compiles, so it is not timed
            self.compiling, self.began, self.first = False, now, step
            tokens = 0
        self.tokens += tokens
        self.seconds, self.steps = now - self.began, step - self.first
        self.display(now, step, total, lambda: self._line(step, total, losses), at_once=first or step >= total)

    def _line(self, step: int, total: int, losses: dict[str, float]) -> str:
        rate = f"{self.tokens / self.seconds:,.0f} tokens/s" if self.steps else "compiled"
        left = f"{duration(self.seconds / self.steps * (total - step))} left" if self.steps else ""
        worst = sorted(losses.items(), key=lambda item: -item[1])
        shown = "  ".join(f"{name} {loss:.3f}" for name, loss in (worst[:6] if len(worst) > 6 else losses.items()))
        more = f"  and {len(worst) - 6} lower" if len(worst) > 6 else ""
        return f"step {step}/{total}  {rate}  {left}  loss: {shown}{more}"


def can_draw(show: Callable[[str], None]) -> bool:
    """Whether matplotlib is installed; reports it if not. A missing plot does not fail a run."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    show("the losses were not plotted, because matplotlib is not installed: pip install matplotlib")
    return False


def loss_figure(lines: Sequence[dict[str, Any]]) -> Any:
    """A matplotlib figure of every tenant's loss: thin per step, thick as a moving average, dotted on dev rows.

    The axis is logarithmic if all losses are positive and differ by more than a factor of ten: the first losses are
    often so large that the others would be unreadable.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for line in lines for name in line["loss"]))
    width = max(1, len(lines) // 20)
    drawn = []
    for i, name in enumerate(names):
        points = [(line["step"], line["loss"][name]) for line in lines if line["loss"].get(name) is not None]
        steps, losses = [step for step, _ in points], [loss for _, loss in points]
        drawn += losses
        if len(names) <= 10:
            axes.plot(steps, losses, color=f"C{i}", alpha=0.35, linewidth=0.8)
        smooth = [fmean(losses[max(0, j - width + 1) : j + 1]) for j in range(len(losses))]
        axes.plot(steps, smooth, color=f"C{i % 10}", label=name if len(names) <= 20 else None)
        dev = [(line["step"], line["dev_loss"][name]) for line in lines if (line.get("dev_loss") or {}).get(name)]
        if dev and len(names) <= 20:
            axes.plot(*zip(*dev, strict=True), color=f"C{i % 10}", linestyle=":", marker="o", markersize=3)
    legend = ["thin: each step"] * (len(names) <= 10) + [f"thick: mean of {width} steps"]
    legend += ["dotted: dev rows"] * (any(line.get("dev_loss") for line in lines) and len(names) <= 20)
    axes.set(xlabel=f"step ({', '.join(legend)})", ylabel="loss (cross-entropy, nats per response token)")
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
    """Writes a matplotlib figure as a PNG, atomically."""
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")
