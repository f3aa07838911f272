"""A fine-tuning run: steps, looks at dev rows, checkpoints and metrics."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from para_jax.adapters.adapter import Adapter
from para_jax.adapters.bank import AdapterBank
from para_jax.adapters.files import save_adapter
from para_jax.backbones.decoder import Backbone
from para_jax.backbones.loading import Loading
from para_jax.data.batches import Batch
from para_jax.distributed import Flag, barrier, broadcast, gather, is_main_process
from para_jax.errors import ParaJaxError
from para_jax.training.ahead import Ahead
from para_jax.training.checkpoints import Checkpoints, put_back, steps_in
from para_jax.training.claim import Claim
from para_jax.training.folder import BEST, CHECKPOINTS, METRICS, PLOT, describe
from para_jax.training.metrics import MetricsFile, Progress, can_draw, plot_losses, read_metrics
from para_jax.training.places import Schedule, Seating, in_order
from para_jax.training.programs import Parts, Programs, explained
from para_jax.training.report import write_report
from para_jax.training.signals import Interrupted, Stop, stop_signals
from para_jax.training.step import adapter_of
from para_jax.training.tuning import Tuning
from para_jax.training.watch import Watch, Watched, dev_losses


def train(loading: Loading, bank: AdapterBank, tuning: Tuning) -> AdapterBank:
    """Tunes the adapters of `bank`, from the plan of the run to its reports; `finetune` says what it raises."""
    tuning.check(loading.shapes, bank)
    parts, schedule, plan = Parts.planned(loading.shapes, bank, tuning)
    with Claim(tuning.out, tuning.resume, tuning.overwrite) as claim:
        with Programs(parts) as programs:
            tuning.show(f"{plan}; compiling {programs}")
            backbone = loading.backbone()
            programs.wait("weights")
            description = describe(backbone, bank, tuning)
            resumed = claim.begin(description)
            del bank  # the state has a copy, and nobody else may need these
            run = Run(tuning, backbone, parts, programs, schedule, description)
            stopped = run.run(claim, resumed)
            if is_main_process():
                run.write_reports()
            if stopped is None:
                run.save_the_rest()
                run.check_outcome()
        if stopped is not None:
            raise Interrupted(run.done, preempted=stopped == signal.SIGTERM or jax.process_count() > 1)
        barrier("finetune")
    return run.state.bank


class Run:
    """What changes while a run goes on.

    Attributes:
      state: adapters, moments and counts, on the devices.
      done: steps that were taken.
      taken, failed: of each tenant, its own steps, and the run's step at which its gradient was NaN or infinite, or 0.
      watch: what the dev rows said.
    """

    def __init__(
        self,
        tuning: Tuning,
        backbone: Backbone,
        parts: Parts,
        programs: Programs,
        schedule: Schedule,
        description: Mapping[str, Any],
    ):
        self.tuning, self.backbone, self.parts, self.programs, self.schedule = (
            tuning,
            backbone,
            parts,
            programs,
            schedule,
        )
        self.description, self.layout = description, parts.layout
        self.state, self.done = parts.state, 0
        self.taken, self.failed = dict.fromkeys(tuning.examples, 0), dict.fromkeys(tuning.examples, 0)
        self.watch = Watch(tuning.settings, {name: Watched() for name in tuning.dev})
        self.progress = Progress(0, tuning.show)
        self._sums = parts.sums
        self._metrics: MetricsFile | None = None  # the main process's
        self._pending: tuple[int, Seating, int, Any] | None = None  # a step that is not reported yet

    def run(self, claim: Claim, resumed: bool) -> int | None:
        """Runs to the end, which returns None, or to a signal, which is returned; 0 is another process's.

        Either way all is saved then.
        """
        out, show = self.tuning.out, self.tuning.show
        keeper = Checkpoints(out / CHECKPOINTS, self.tuning.keep, show)
        with keeper as checkpoints, checkpoints.saying(), stop_signals() as stop:
            lines = self._restore(checkpoints) if resumed else []
            with MetricsFile(out / METRICS, self.done, lines, show) if is_main_process() else nullcontext() as metrics:
                self._metrics = metrics
                finished = self._steps(checkpoints, stop, claim.settle)
        return None if finished else stop.kind or 0

    def _restore(self, checkpoints: Checkpoints) -> list[Path]:
        """Goes on from the newest checkpoint, if there is one. Returns the files in which it keeps metrics."""
        # What the first process sees: another's view of a shared folder may be older.
        self.done = int(broadcast(str(checkpoints.newest() or 0 if is_main_process() else 0).encode()))
        self.progress = Progress(self.done, self.tuning.show)
        if not self.done:
            return []
        checkpoints.safe, layout = self.done, self.layout
        saved, beside = checkpoints.restore(self.state, self.done), checkpoints.beside(self.done)
        self.state = self.state.arranged(saved, beside["slots"], layout.mesh, layout.shards)
        self.watch.load(beside["watch"])
        counts = gather((self.state.taken, self.state.failed_at), layout.mesh)
        for group, *of in zip(self.state.bank.groups, *counts, strict=True):
            for name, taken, failed in zip(group.names, *of, strict=True):
                if name is not None:
                    self.taken[name], self.failed[name] = int(taken), int(failed)
        self.tuning.show(f"resuming after step {self.done}")
        if is_main_process():
            put_back(checkpoints.files(self.done, BEST), self.tuning.out)
        return [path for step in steps_in(checkpoints.folder) for path in checkpoints.files(step, METRICS).values()]

    def _steps(self, checkpoints: Checkpoints, stop: Stop, begun_well: Callable[[], None]) -> bool:
        """`run`, between opening and closing its files. `begun_well` is called after the first step."""
        flag = Flag(self.layout.mesh)
        seating, begun, settings = self._next(), self.done, self.tuning.settings
        with Ahead(self._batches) as ahead:
            while seating is not None:
                with explained(self.parts, "a step"):
                    names = self._step(seating, ahead.take((seating, self._places(seating))))
                    ahead.begin(None if (then := self._next()) is None else (then, self._places(then)))
                    losses = self._dev_losses(seating, names)
                better = [name for name, loss in losses.items() if self.watch.look(name, loss, self.taken[name])]
                stopping = flag.raised(stop.kind is not None)
                saving = stopping or self.done % self.tuning.checkpoint_every == 0
                ended = [n for n in names if self.taken[n] == settings[n].steps and n not in self.tuning.dev]
                if self.done == begun + 1:
                    begun_well()
                if losses or ended or saving or self.done == begun + 1:
                    # First the metrics: a resumed run begins behind this step and would not write its line.
                    self._report(losses)
                for name in [*better, *(name for name in ended if not self.failed[name])]:
                    self._save(name)
                if stopping:
                    break
                if saving:
                    self._checkpoint(checkpoints)
                seating = self._next()
        self._report()
        self._checkpoint(checkpoints)
        checkpoints.wait()
        return self._next() is None

    # The tenants of a step, and their rows

    def _resting(self, step: int) -> set[str]:
        # That a tenant failed is known one step late; a resumed run, which knows it at once, waits as long.
        known = self.watch.known
        return {n for n in self.taken if 0 < self.failed[n] < step or (n in known and known[n].stopped)}

    def _next(self) -> Seating | None:
        return self.schedule.seating(self.taken, self._resting(self.done))

    def _places(self, seating: Seating) -> tuple[int, ...]:
        """How many steps each of these tenants has taken, which says what its next rows are."""
        return tuple(0 if name is None else self.taken[name] for shard in seating for name in shard)

    def _batches(self, key: tuple[Seating, tuple[int, ...]]) -> tuple[list[tuple[int, Batch]], int]:
        """The micro-batches of a step, and its tokens."""
        seating, places = key
        names = [name for shard in seating for name in shard]
        taken = {name: at for name, at in zip(names, places, strict=True) if name is not None}
        rows = self.layout.step_rows(seating, self.tuning.examples, self.parts.seed, taken)
        batches = list(self.layout.batches(seating, rows, self.parts.shapes))
        return batches, sum(len(e) for some in rows.values() for e in some)

    def _step(self, seating: Seating, made: tuple[list[tuple[int, Batch]], int]) -> list[str]:
        """Takes a step, and returns the tenants that took it."""
        batches, tokens = made
        slots = self.layout.slots(self.state.bank, seating)
        with jax.profiler.StepTraceAnnotation("train", step_num=self.done + 1):
            given = self.backbone, self.state, self._sums, slots, batches
            self.state, self._sums, values = self.parts.step(*given, ready=self.programs.wait)
        self._report()
        self._pending, self.done = (self.done + 1, seating, tokens, values), self.done + 1
        if self.progress.compiling:
            jax.block_until_ready(values)
            self.programs.wait_for_all()
        names = [name for shard in seating for name in shard if name is not None and not self.failed[name]]
        self.taken |= {name: self.taken[name] + 1 for name in names}
        return names

    def _dev_losses(self, seating: Seating, names: Sequence[str]) -> dict[str, float]:
        """The losses on dev rows of those of these tenants that are due."""
        # Whoever fails in this very step is looked at too, with the weights it had before: nobody knows yet.
        due = {name for name in names if self.watch.due(name, self.taken[name])}
        if not due:
            return {}
        asked = [[name if name in due else None for name in shard] for shard in seating]
        return dev_losses(self.backbone, self.state.bank, self.layout, self.parts.shapes, asked, self.tuning.dev)

    def _report(self, dev: Mapping[str, float] | None = None) -> None:
        """Reports the step before, so that the device never waits for the host."""
        if self._pending is None:
            return
        (step, seating, tokens, values), self._pending = self._pending, None
        found = in_order(seating, gather(values, self.layout.mesh))
        by_key = {key: {name: of[name] for name in self.taken if name in of} for key, of in found.items()}
        for name, norm in by_key["grad_norm"].items():
            if not math.isfinite(norm) and not self.failed[name]:
                self.failed[name] = step
                said = f"step {step}: {name}'s gradient is NaN or infinite; it stops here, the others go on"
                self.tuning.show(said + self._hint)
        left = self.schedule.left(self.taken, self._resting(step + 1))
        self.progress.update(step, step + left, tokens, by_key["loss"])
        line: dict[str, Any] = {"step": step, "tokens": tokens, **by_key, **({"dev_loss": dict(dev)} if dev else {})}
        if self._metrics is not None:
            for listener in (self._metrics.write, *self.tuning.loggers):
                listener(line)

    # What is saved

    def _checkpoint(self, checkpoints: Checkpoints) -> None:
        slots = [list(group.names) for group in self.state.bank.groups]
        beside = {"run": self.description, "watch": self.watch.state(), "slots": slots}
        checkpoints.save(self.done, self.state, beside, self._files())

    def _files(self) -> dict[str, bytes]:
        """What a checkpoint needs so that all of the run can be made from it: metrics and the best adapters."""
        if self._metrics is None:
            return {}
        files = {METRICS: self._metrics.settle()}
        for name, of in self.watch.known.items():
            if math.isfinite(of.loss):
                files |= {
                    f"{BEST}/{name}/{path.name}": path.read_bytes() for path in (self.tuning.out / name).iterdir()
                }
        return files

    def _save(self, name: str) -> None:
        """Writes a tenant's adapter as it is now into its folder."""
        group, slot = self.state.bank.find(name)
        layers = adapter_of(group.stack, np.int32(slot), mesh=self.layout.mesh)
        layers = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), layers)
        if is_main_process():
            template = self.tuning.chat_templates.get(name)
            adapter, shape = Adapter(group.config, layers), self.backbone.config
            save_adapter(adapter, self.tuning.out / name, shape, chat_template=template, overwrite=True)

    def save_the_rest(self) -> None:
        """Writes the adapters of tenants without dev rows, which end with the run."""
        for name in self.taken:
            if name not in self.watch.known and not self.failed[name]:
                self._save(name)

    def write_reports(self) -> None:
        """Draws the losses of metrics.jsonl, and writes the report."""
        out, lines = self.tuning.out, read_metrics(self.tuning.out / METRICS)
        if can_draw(self.tuning.show):
            plot_losses(lines, out / PLOT)
        bank, known = self.state.bank, self.watch.known
        write_report(
            out, lines, self.backbone, bank, self.tuning.settings, known, self.taken, self.failed, self.progress
        )

    def check_outcome(self) -> None:
        """Raises ParaJaxError for tenants that failed."""
        blind = [n for n, of in self.watch.known.items() if math.isinf(of.loss) and not self.failed[n]]
        if blind:
            raise ParaJaxError(
                f"the loss of {', '.join(blind[:5])} on dev rows was always NaN or infinite, so no adapter was kept; "
                f"look at these rows, or try a lower --lr{self._hint}. The others are done and saved"
            )
        broken = [f"{name} (step {step})" for name, step in self.failed.items() if step]
        if broken:
            more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
            others = len(self.failed) - len(broken)
            raise ParaJaxError(
                f"the gradient of {', '.join(broken[:5])}{more} was NaN or infinite; try a lower --lr, or look at the "
                f"rows{self._hint}. {others} other tenant{'s are' if others != 1 else ' is'} done and saved in "
                f"{self.tuning.out}"
            )

    @property
    def _hint(self) -> str:
        """Another reason for what is NaN or infinite."""
        narrow = "The reason may be float16's range, which ends at 65504: try --dtype float32"
        return f". {narrow}" if self.backbone.dtype == np.float16 else ""
