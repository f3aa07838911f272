"""Loggers for a running job: TensorBoard, Weights & Biases, and a profile of some steps.

A logger is called with each metrics line (`finetune(..., loggers=...)`) in the main process, and is closed at the end.
Loggers write into the run's folder.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import jax

from para_jax.compat import unregister_event_duration_listener
from para_jax.errors import ParaJaxError, check_known
from para_jax.files import write_text
from para_jax.mounts import RESUME, explain_os_errors
from para_jax.progress import say
from para_jax.training.folder import PROFILE, TENSORBOARD, WANDB
from para_jax.training.tuning import Logger

# A profile starts after this many consecutive steps without compilation.
QUIET = 2
COMPILED = "/jax/core/compile/backend_compile_duration"


class Loggers:
    """Loggers of the given kinds ("tensorboard", "wandb"), and a profile of `profile` steps if that is above zero.

    Nothing is written before the first line, so `out` need not exist. Raises ParaJaxError for an unknown kind or a
    package that is not installed.

    >>> with Loggers([], "runs/first", profile=5) as loggers:  # finetune(..., loggers=loggers)
    ...     [type(logger).__name__ for logger in loggers]
    ['Profile']
    no profile was made: it starts after 2 steps in a row without compilation, and this run took 0 steps
    """

    def __init__(
        self, kinds: Sequence[str], out: str | Path, profile: int = 0, show: Callable[[str], None] = say
    ) -> None:
        self._loggers: list[Any] = []
        check_known("logger", kinds, KINDS)
        self._loggers += [KINDS[kind](Path(out)) for kind in dict.fromkeys(kinds)]
        if profile < 0:
            raise ParaJaxError(f"a profile needs 1 step or more, not {profile}")
        if profile:
            self._loggers.append(Profile(Path(out), profile, show))

    def __iter__(self) -> Iterator[Logger]:
        return iter(self._loggers)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            for logger in self._loggers:
                stack.callback(logger.close)


class Scalars:
    """A metrics line as scalars by name: loss/NAME, dev_loss/NAME, grad_norm/NAME, lr/NAME, tokens_per_second."""

    def __init__(self) -> None:
        self._last: float | None = None

    def __call__(self, line: Mapping[str, Any]) -> dict[str, float]:
        """The scalars of a line. A step's time is the time since the previous line; the first line has none.

        >>> Scalars()({"step": 1, "tokens": 64, "loss": {"acme": 2.5}, "lr": {"acme": 1e-3}})
        {'loss/acme': 2.5, 'lr/acme': 0.001}
        """
        now, last = time.monotonic(), self._last
        self._last = now
        by_tenant = {key: values for key, values in line.items() if isinstance(values, Mapping)}
        scalars = {f"{key}/{name}": x for key, values in by_tenant.items() for name, x in values.items()}
        return scalars if last is None else {**scalars, "tokens_per_second": line["tokens"] / (now - last)}


class TensorBoard:
    """Event files in OUT/tensorboard.

    A resumed run writes a new file with its first step (`purge_step`); TensorBoard then drops later steps of older
    files, so no step is drawn twice.
    """

    def __init__(self, out: Path):
        need("tensorboardX", "--log tensorboard")
        self._folder, self._scalars = out / TENSORBOARD, Scalars()
        self._writer: Any = None

    def __call__(self, line: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        with explain_os_errors(self._folder, again=RESUME):
            if self._writer is None:
                step = line["step"]
                # File names have a resolution of one second; a run may end and resume within it.
                self._writer = SummaryWriter(str(self._folder), purge_step=step, filename_suffix=f".{step:09}")
            for name, value in self._scalars(line).items():
                self._writer.add_scalar(name, value, line["step"])
            # A resumed run continues after its last checkpoint and does not write these again.
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with explain_os_errors(self._folder, again=RESUME):
                self._writer.close()


class WeightsAndBiases:
    """A run in the project para-jax at Weights & Biases; environment variables such as WANDB_PROJECT override it.

    The run's id is kept in OUT/wandb, so that a resumed run continues it. Steps that were logged already are dropped.
    """

    def __init__(self, out: Path):
        need("wandb", "--log wandb")
        self._out, self._scalars = out, Scalars()
        self._run: Any = None

    def __call__(self, line: Mapping[str, Any]) -> None:
        if self._run is None:
            self._run = self._start()
        self._run.log(self._scalars(line), step=line["step"])

    def _start(self) -> Any:
        import os

        import wandb

        id_file = self._out / WANDB / "id"
        if not id_file.is_file():
            write_text(id_file, uuid.uuid4().hex[:12])
        project = os.environ.get("WANDB_PROJECT", "para-jax")
        try:
            return wandb.init(
                project=project, name=self._out.name, dir=self._out, id=id_file.read_text().strip(), resume="allow"
            )
        except wandb.errors.Error as error:
            reason = str(error).splitlines()[0]
            raise ParaJaxError(
                f"Weights & Biases did not start a run ({reason}); log in with `wandb login`, or set "
                "WANDB_MODE=offline and send it later with `wandb sync`"
            ) from error

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


class Profile:
    """A jax.profiler trace in OUT/profile, started after `QUIET` consecutive steps without compilation."""

    def __init__(self, out: Path, steps: int, show: Callable[[str], None] = say):
        self._folder, self._steps, self._show = out / PROFILE, steps, show
        self._lines = self._quiet = self._traced = 0
        self._state: Literal["new", "waiting", "tracing", "closed"] = "new"

    def __call__(self, line: Mapping[str, Any]) -> None:
        # Lines are one step behind the device.
        self._lines += 1
        if self._state == "new":
            jax.monitoring.register_event_duration_secs_listener(self._on_event)
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

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            self._quiet = -1

    def close(self) -> None:
        state, self._state = self._state, "closed"
        if state == "tracing":
            jax.profiler.stop_trace()
            self._show(f"profile of {self._traced} steps in {self._folder}; open it with xprof")
        elif state != "closed":
            self._show(
                f"no profile was made: it starts after {QUIET} steps in a row without compilation, and this run took "
                f"{self._lines} steps"
            )
        if state in ("waiting", "tracing"):
            unregister_event_duration_listener(self._on_event)


KINDS: dict[str, Callable[[Path], Any]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def need(module: str, what: str) -> None:
    """Raises ParaJaxError, with the command that installs it, if a module is missing."""
    if find_spec(module) is None:
        raise ParaJaxError(f"{what} needs {module}, which is not installed; pip install {module}")
