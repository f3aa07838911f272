"""A fine-tuning run: steps, evaluation on dev rows, checkpoints and metrics."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from para_jax.training.checkpoints import Checkpoints, restore_files, steps_in
from para_jax.training.claim import Claim
from para_jax.training.folder import BEST, CHECKPOINTS, METRICS, PLOT, describe
from para_jax.training.metrics import MetricsFile, Progress, can_draw, loss_figure, read_metrics, save_figure
from para_jax.training.places import Schedule, StepTenants, values_by_tenant
from para_jax.training.programs import Parts, Programs, explain_out_of_memory
from para_jax.training.report import write_report
from para_jax.training.signals import Interrupted, Stop, stop_signals
from para_jax.training.step import tenant_adapter
from para_jax.training.tuning import Tuning
from para_jax.training.watch import DevStatus, DevTracker, dev_losses


def train(loading: Loading, bank: AdapterBank, tuning: Tuning) -> AdapterBank:
    """Tunes the adapters of `bank`: plans, compiles, runs the steps, and writes reports. Raises as `finetune`."""
    tuning.check(loading.shapes)
    parts, schedule, plan = Parts.planned(loading.shapes, bank, tuning)
    with Claim(tuning.out, tuning.resume, tuning.overwrite) as claim:
        with Programs(parts) as programs:
            tuning.show(f"{plan}; compiling {programs}")
            backbone = loading.backbone()
            programs.wait("weights")
            description = describe(backbone, bank, tuning)
            resumed = claim.begin(description)
            del bank  # the state has a copy; this may free memory
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
    """The mutable state of a run.

    Attributes:
      state: adapters, moments and counts, on the devices.
      done, steps_taken: the number of steps that the run and each tenant have taken.
      failed: for each tenant, the run's step at which its gradient was NaN or infinite; 0 if it never was.
    """

    def __init__(
        self, tuning: Tuning, backbone: Backbone, parts: Parts, programs: Programs, schedule: Schedule, description: Any
    ):
        self.tuning, self.backbone, self.parts, self.programs = tuning, backbone, parts, programs
        self.schedule, self.description, self.layout = schedule, description, parts.layout
        self.state, self.done = parts.state, 0
        self.steps_taken, self.failed = dict.fromkeys(tuning.examples, 0), dict.fromkeys(tuning.examples, 0)
        self.watch = DevTracker(tuning.settings, {name: DevStatus() for name in tuning.dev})
        self.progress = Progress(0, tuning.show)
        self._sums = parts.sums
        self._metrics: MetricsFile | None = None  # only in the main process
        self._pending: tuple[int, StepTenants, int, Any] | None = None  # a step that is not reported yet

    def run(self, claim: Claim, resumed: bool) -> int | None:
        """Runs until the end or a signal, and saves everything.

        Returns None at the end, the signal that stopped it, or 0 if another process received the signal.
        """
        out, show = self.tuning.out, self.tuning.show
        opened = Checkpoints(out / CHECKPOINTS, self.tuning.keep, show)
        with opened as checkpoints, checkpoints.explain_errors(), stop_signals() as stop:
            lines = self._restore(checkpoints) if resumed else []
            with MetricsFile(out / METRICS, self.done, lines, show) if is_main_process() else nullcontext() as metrics:
                self._metrics = metrics
                try:
                    finished = self._steps(checkpoints, stop, claim.commit)
                finally:
                    self.progress.display.close()
        return None if finished else stop.kind or 0

    def _restore(self, checkpoints: Checkpoints) -> list[Path]:
        """Restores the newest checkpoint, if any. Returns the metrics files in the checkpoints."""
        # The main process decides: other processes may have an older view of a shared folder.
        self.done = int(broadcast(str(checkpoints.newest() or 0 if is_main_process() else 0).encode()))
        self.progress = Progress(self.done, self.tuning.show)
        if not self.done:
            return []
        checkpoints.newest_complete, layout = self.done, self.layout
        saved, metadata = checkpoints.restore(self.state, self.done), checkpoints.metadata(self.done)
        self.state = self.state.rearrange(saved, metadata["slots"], layout.mesh, layout.shards)
        self.watch.load(metadata["watch"])
        counts = gather((self.state.taken, self.state.failed_at), layout.mesh)
        for group, *arrays in zip(self.state.bank.groups, *counts, strict=True):
            for name, steps_taken, failed in zip(group.names, *arrays, strict=True):
                if name is not None:
                    self.steps_taken[name], self.failed[name] = int(steps_taken), int(failed)
        self.tuning.show(f"resuming after step {self.done}")
        if is_main_process():
            restore_files(checkpoints.files(self.done, BEST), self.tuning.out)
        return [path for step in steps_in(checkpoints.folder) for path in checkpoints.files(step, METRICS).values()]

    def _steps(self, checkpoints: Checkpoints, stop: Stop, after_first_step: Callable[[], None]) -> bool:
        """The loop of `run`. Returns whether the run reached its end."""
        flag = Flag(self.layout.mesh)
        start, settings = self.done, self.tuning.settings
        next_step, guess, prefetched = self._next(), None, None
        with ThreadPoolExecutor(1, "prefetch") as thread:
            while next_step is not None:
                step_tenants, _ = next_step
                with explain_out_of_memory(self.parts, "a step"):
                    batches = prefetched.result() if prefetched and guess == next_step else self._batches(next_step)
                    names = self._step(step_tenants, *batches)
                    # The batches of the step that probably comes next are made while the device runs this one.
                    guess = self._next()
                    prefetched = None if guess is None else thread.submit(self._batches, guess)
                    losses = self._dev_losses(step_tenants, names)
                better = [n for n, loss in losses.items() if self.watch.record(n, loss, self.steps_taken[n])]
                stopping = flag.raised(stop.kind is not None)
                saving = stopping or self.done % self.tuning.checkpoint_every == 0
                ended = [n for n in names if self.steps_taken[n] == settings[n].steps and n not in self.tuning.dev]
                if self.done == start + 1:
                    after_first_step()
                if losses or ended or saving or self.done == start + 1:
                    # Metrics first: a run that resumes after this step does not write its line again.
                    self._report(losses)
                for name in [*better, *(name for name in ended if not self.failed[name])]:
                    self._save(name)
                if stopping:
                    break
                if saving:
                    self._checkpoint(checkpoints)
                next_step = self._next()
        self._report()
        self._checkpoint(checkpoints)
        checkpoints.wait()
        return self._next() is None

    # The tenants of a step, and their rows

    def _stopped(self, step: int) -> set[str]:
        # A failure is reported one step late. A resumed run, which knows it already, waits for that step too.
        status = self.watch.status
        return {n for n in self.steps_taken if 0 < self.failed[n] < step or (n in status and status[n].stopped)}

    def _next(self) -> tuple[StepTenants, dict[str, int]] | None:
        """The tenants of the next step, and how many steps each has taken, which determines its rows."""
        chosen = self.schedule.step_tenants(self.steps_taken, self._stopped(self.done))
        if chosen is None:
            return None
        return chosen, {name: self.steps_taken[name] for shard in chosen for name in shard if name is not None}

    def _batches(self, step: tuple[StepTenants, dict[str, int]]) -> tuple[list[tuple[int, Batch]], int]:
        """The micro-batches of a step, and its number of tokens."""
        step_tenants, steps_taken = step
        rows = self.layout.step_rows(step_tenants, self.tuning.examples, self.parts.seed, steps_taken)
        batches = list(self.layout.batches(step_tenants, rows, self.parts.shapes))
        return batches, sum(len(e) for examples in rows.values() for e in examples)

    def _step(self, step_tenants: StepTenants, batches: Sequence[tuple[int, Batch]], tokens: int) -> list[str]:
        """Takes a step, and returns the tenants that took it."""
        slots = self.layout.slots(self.state.bank, step_tenants)
        with jax.profiler.StepTraceAnnotation("train", step_num=self.done + 1):
            args = self.backbone, self.state, self._sums, slots, batches
            self.state, self._sums, values = self.parts.step(*args, ready=self.programs.wait)
        self._report()
        self._pending, self.done = (self.done + 1, step_tenants, tokens, values), self.done + 1
        if self.progress.compiling:
            jax.block_until_ready(values)
            self.programs.wait_for_all()
        names = [name for shard in step_tenants for name in shard if name is not None and not self.failed[name]]
        self.steps_taken |= {name: self.steps_taken[name] + 1 for name in names}
        return names

    def _dev_losses(self, step_tenants: StepTenants, names: Sequence[str]) -> dict[str, float]:
        # This includes tenants that fail in this step, which is not known yet; their weights have not changed.
        due = {name for name in names if self.watch.due(name, self.steps_taken[name])}
        if not due:
            return {}
        evaluated = [[name if name in due else None for name in shard] for shard in step_tenants]
        return dev_losses(self.backbone, self.state.bank, self.layout, self.parts.shapes, evaluated, self.tuning.dev)

    def _report(self, dev: Mapping[str, float] | None = None) -> None:
        """Reports the pending step. It runs one step late, so that the device never waits for the host."""
        if self._pending is None:
            return
        (step, step_tenants, tokens, values), self._pending = self._pending, None
        report = values_by_tenant(step_tenants, gather(values, self.layout.mesh))
        by_key = {key: {name: x[name] for name in self.steps_taken if name in x} for key, x in report.items()}
        for name, norm in by_key["grad_norm"].items():
            if not math.isfinite(norm) and not self.failed[name]:
                self.failed[name] = step
                line = f"step {step}: {name}'s gradient is NaN or infinite; it stops here, the others continue"
                self.tuning.show(line + self._hint)
        left = self.schedule.steps_left(self.steps_taken, self._stopped(step + 1))
        self.progress.update(step, step + left, tokens, by_key["loss"])
        metrics: dict[str, Any] = {"step": step, "tokens": tokens, **by_key, **({"dev_loss": dict(dev)} if dev else {})}
        if self._metrics is not None:
            for log in (self._metrics.write, *self.tuning.loggers):
                log(metrics)

    # What is saved

    def _checkpoint(self, checkpoints: Checkpoints) -> None:
        slots = [list(group.names) for group in self.state.bank.groups]
        metadata = {"run": self.description, "watch": self.watch.state(), "slots": slots}
        checkpoints.save(self.done, self.state, metadata, self._files())

    def _files(self) -> dict[str, bytes]:
        """The files in a checkpoint that make the run restorable from it alone: metrics and the best adapters."""
        if self._metrics is None:
            return {}
        files = {METRICS: self._metrics.flush()}
        for name, status in self.watch.status.items():
            for path in (self.tuning.out / name).iterdir() if math.isfinite(status.loss) else ():
                files[f"{BEST}/{name}/{path.name}"] = path.read_bytes()
        return files

    def _save(self, name: str) -> None:
        group, slot = self.state.bank.find(name)
        layers = tenant_adapter(group.stack, np.int32(slot), mesh=self.layout.mesh)
        layers = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), layers)
        if is_main_process():
            template = self.tuning.chat_templates.get(name)
            adapter, shape = Adapter(group.config, layers), self.backbone.config
            save_adapter(adapter, self.tuning.out / name, shape, chat_template=template, overwrite=True)

    def save_the_rest(self) -> None:
        for name in self.steps_taken:
            if name not in self.watch.status and not self.failed[name]:
                self._save(name)

    def write_reports(self) -> None:
        out, lines = self.tuning.out, read_metrics(self.tuning.out / METRICS)
        if can_draw(self.tuning.show) and lines:
            save_figure(loss_figure(lines), out / PLOT)
        bank, status = self.state.bank, self.watch.status
        write_report(
            out, lines, self.backbone, bank, self.tuning.settings, status, self.steps_taken, self.failed, self.progress
        )

    def check_outcome(self) -> None:
        no_best = [n for n, s in self.watch.status.items() if math.isinf(s.loss) and not self.failed[n]]
        if no_best:
            raise ParaJaxError(
                f"the loss of {', '.join(no_best[:5])} on dev rows was always NaN or infinite, so no adapter was "
                f"saved. Check these rows, or try a lower --lr{self._hint}. The others are done and saved"
            )
        broken = [f"{name} (step {step})" for name, step in self.failed.items() if step]
        if broken:
            more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
            others = len(self.failed) - len(broken)
            raise ParaJaxError(
                f"the gradient of {', '.join(broken[:5])}{more} was NaN or infinite; try a lower --lr, or check the "
                f"rows{self._hint}. {others} other tenant{'s are' if others != 1 else ' is'} done and saved in "
                f"{self.tuning.out}"
            )

    @property
    def _hint(self) -> str:
        """A hint about float16, another cause of NaN and infinite values."""
        hint = "The cause may be float16's range, which ends at 65504: try --dtype float32"
        return f". {hint}" if self.backbone.dtype == np.float16 else ""
