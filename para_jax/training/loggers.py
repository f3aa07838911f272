"""Watching a run while it goes on: TensorBoard, Weights & Biases, and a profile of some steps.

Each is a function of a metrics line, as `finetune(..., loggers=...)` calls it in the first process, and is closed at
the end. What they write lies in the run's folder.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import jax

from para_jax.compat import unregister_event_duration_listener
from para_jax.errors import ParaJaxError, unknown
from para_jax.files import write_text
from para_jax.mounts import RESUME, naming
from para_jax.training.folder import PROFILE, TENSORBOARD, WANDB

# Steps in a row that compile nothing before a profile begins: rows of another length are another program.
QUIET = 2
COMPILED = "/jax/core/compile/backend_compile_duration"


class Logger(Protocol):
    """Takes each line of metrics.jsonl, and is closed at the end."""

    def __call__(self, line: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Loggers:
    """Those of some kinds ("tensorboard", "wandb") and, with `profile` above zero, a profile of so many steps.

    Nothing is written before the first line, so `out` need not exist. Raises ParaJaxError for an unknown kind or a
    package that is not installed.

    >>> with Loggers([], "runs/first", profile=5) as loggers:  # finetune(..., loggers=loggers)
    ...     [type(logger).__name__ for logger in loggers]
    ['Profile']
    no profile was made: it waits for 2 steps that compile nothing, which the 0 steps of this run did not have
    """

    def __init__(
        self, kinds: Sequence[str], out: str | Path, profile: int = 0, show: Callable[[str], None] = print
    ) -> None:
        self._made: list[Logger] = []
        for kind in dict.fromkeys(kinds):
            if kind not in KINDS:
                raise unknown("logger", kind, KINDS)
            self._made.append(KINDS[kind](Path(out)))
        if profile < 0:
            raise ParaJaxError(f"a profile is of 1 step or more, not {profile}")
        if profile:
            self._made.append(Profile(Path(out), profile, show))

    def __iter__(self) -> Iterator[Logger]:
        return iter(self._made)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            for logger in self._made:
                stack.callback(logger.close)


class Scalars:
    """A metrics line as scalars by name: loss/NAME, dev_loss/NAME, grad_norm/NAME, lr/NAME, tokens_per_second."""

    def __init__(self) -> None:
        self._before: float | None = None

    def __call__(self, line: Mapping[str, Any]) -> dict[str, float]:
        """A step's time is that since the last line; the first line has none.

        >>> Scalars()({"step": 1, "tokens": 64, "loss": {"acme": 2.5}, "lr": {"acme": 1e-3}})
        {'loss/acme': 2.5, 'lr/acme': 0.001}
        """
        now, before = time.monotonic(), self._before
        self._before = now
        named = {f"{key}/{name}": x for key, of in line.items() if isinstance(of, Mapping) for name, x in of.items()}
        return named if before is None else {**named, "tokens_per_second": line["tokens"] / (now - before)}


class TensorBoard:
    """Event files in OUT/tensorboard.

    A resumed run writes a file of its own, which says at which step it begins; TensorBoard drops what an earlier file
    has from there on, so no step is drawn twice.
    """

    def __init__(self, out: Path):
        need("tensorboardX", "--log tensorboard")
        self._folder, self._scalars = out / TENSORBOARD, Scalars()
        self._writer: Any = None

    def __call__(self, line: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        with naming(self._folder, again=RESUME):
            if self._writer is None:
                step = line["step"]
                # A file is named by its second, in which a run may end and be resumed.
                self._writer = SummaryWriter(str(self._folder), purge_step=step, filename_suffix=f".{step:09}")
            for name, value in self._scalars(line).items():
                self._writer.add_scalar(name, value, line["step"])
            # A run that is killed goes on behind its last checkpoint, and would not write these again.
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with naming(self._folder, again=RESUME):
                self._writer.close()


class WeightsAndBiases:
    """A run of the project para-jax at Weights & Biases, or as its own environment variables say.

    Its id is kept in OUT/wandb, so that a resumed run goes on there; a step that is there already is dropped.
    """

    def __init__(self, out: Path):
        need("wandb", "--log wandb")
        self._out, self._scalars = out, Scalars()
        self._run: Any = None

    def __call__(self, line: Mapping[str, Any]) -> None:
        if self._run is None:
            self._run = self._begin()
        self._run.log(self._scalars(line), step=line["step"])

    def _begin(self) -> Any:
        import os

        import wandb

        kept = self._out / WANDB / "id"
        if not kept.is_file():
            write_text(kept, uuid.uuid4().hex[:12])
        project = os.environ.get("WANDB_PROJECT", "para-jax")
        try:
            return wandb.init(
                project=project, name=self._out.name, dir=self._out, id=kept.read_text().strip(), resume="allow"
            )
        except wandb.errors.Error as error:
            reason = str(error).splitlines()[0]
            raise ParaJaxError(
                f"Weights & Biases did not begin a run ({reason}); log in with `wandb login`, or set "
                "WANDB_MODE=offline and send it later with `wandb sync`"
            ) from error

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


class Profile:
    """A trace of some steps in OUT/profile, made by jax.profiler, once `QUIET` steps in a row have compiled nothing."""

    def __init__(self, out: Path, steps: int, show: Callable[[str], None] = print):
        self._folder, self._steps, self._show = out / PROFILE, steps, show
        self._lines = self._quiet = self._traced = 0
        self._state: Literal["new", "waiting", "tracing", "closed"] = "new"

    def __call__(self, line: Mapping[str, Any]) -> None:
        # A line is of the step before the one that the device is at.
        self._lines += 1
        if self._state == "new":
            jax.monitoring.register_event_duration_secs_listener(self._heard)
            self._state = "waiting"
        elif self._state == "waiting":
            self._quiet += 1
            if self._quiet == QUIET:
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # every Python call would be millions of events
                jax.profiler.start_trace(self._folder, profiler_options=options)
                self._state = "tracing"
        elif self._state == "tracing":
            self._traced += 1
            if self._traced == self._steps:
                self.close()

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            self._quiet = -1

    def close(self) -> None:
        state, self._state = self._state, "closed"
        if state == "tracing":
            jax.profiler.stop_trace()
            self._show(f"profile of {self._traced} steps in {self._folder}; open it with xprof")
        elif state != "closed":
            self._show(
                f"no profile was made: it waits for {QUIET} steps that compile nothing, which the {self._lines} steps "
                "of this run did not have"
            )
        if state in ("waiting", "tracing"):
            unregister_event_duration_listener(self._heard)


KINDS: dict[str, Callable[[Path], Logger]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def need(module: str, what: str) -> None:
    """Raises ParaJaxError, with how to install it, unless there is such a module."""
    if find_spec(module) is None:
        raise ParaJaxError(f"{what} needs {module}, which is not installed; pip install {module}")
