"""A fine-tuning run: steps, looks at dev sets, checkpoints, metrics, and every tenant's adapter."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from para_jax.backbones.options import Remat
from para_jax.checks import COUNT, KEEP, POSITIVE, SEED
from para_jax.data.batches import Batch
from para_jax.data.examples import Example, check_ids
from para_jax.data.lengths import check_lengths
from para_jax.distributed import Flag, barrier, first, told, whole
from para_jax.errors import ParaJaxError
from para_jax.training.ahead import Ahead
from para_jax.training.checkpoints import Checkpoints, put_back, steps_in
from para_jax.training.claim import Claim
from para_jax.training.folder import BEST, CHECKPOINTS, METRICS, PLOT, check_name, describe
from para_jax.training.metrics import MetricsFile, Progress, can_draw, plot_losses, read_metrics
from para_jax.training.optimizer import Settings
from para_jax.training.places import Homes, Layout, Schedule, in_order
from para_jax.training.programs import Parts, Programs, explained
from para_jax.training.report import write_report
from para_jax.training.shapes import Device
from para_jax.training.signals import Interrupted, Stop, stop_signals
from para_jax.training.step import adapter_of
from para_jax.training.watch import Watch, Watched, dev_losses


def finetune(
    backbone: Backbone | Loading,
    bank: AdapterBank,
    examples: Mapping[str, Sequence[Example]],
    settings: Mapping[str, Settings],
    out: str | Path,
    *,
    dev: Mapping[str, Sequence[Example]] | None = None,
    rows: int = 16,
    micro_batch_tokens: int | None = None,
    tenants_per_step: int | None = None,
    spread: bool | None = None,
    seed: int = 0,
    checkpoint_every: int = 500,
    keep: int = 2,
    resume: bool = False,
    overwrite: bool = False,
    remat: Remat | None = None,
    chat_templates: Mapping[str, str] | None = None,
    show: Callable[[str], None] = print,
    loggers: Iterable[Callable[[Mapping[str, Any]], None]] = (),
) -> AdapterBank:
    """Tunes every tenant of `bank` on its own examples, many in one step, on the mesh of `backbone`.

    All programs are planned from the lengths of the rows, said, and compiled side by side before the first step ends;
    nothing is compiled afterwards.

    Args:
      backbone: the frozen model; with its layers stacked (`stacked=True`) one layer is compiled and not all of them.
        While it is still being read (`Loading`), the programs are compiled already.
      bank: the adapters to begin with.
      examples, settings: for each tenant.
      out: a folder; afterwards it holds NAME/ with each tenant's adapter, metrics.jsonl, loss.png, report.html,
        report.json, run.json and checkpoints/.
      dev: rows that a tenant does not learn from, for some or all tenants. Of a tenant with dev rows the adapter that
        was best on them is kept, and written as soon as it is found; `Settings` says when to look, and when to stop.
      rows: each tenant's rows in a step.
      micro_batch_tokens: the most token slots of a micro-batch on a device; 1024 on a CPU and 8192 on accelerators, if
        None. A step is as many micro-batches as its rows need, whose gradients are summed in float32.
      tenants_per_step: how many tenants a step holds at most; all, if None.
      spread: whether the tenants are spread over a mesh's devices, or whole on each of them (`places.Layout`).
      seed: of the order of the rows.
      checkpoint_every: steps between checkpoints; there is one at the end, and at Ctrl-C or SIGTERM.
      keep: how many checkpoints are kept, the newest; two or more, because the newest may be lost with its machine.
      resume: go on from the newest checkpoint in `out`, bit for bit as if the run had never stopped; on another mesh
        to rounding, with the same rows.
      overwrite: replace an existing `out`.
      remat: what the backward pass computes again instead of keeping it (`Backbone.forward`); by default "layers" on
        accelerators and "products" on a CPU.
      chat_templates: those to keep with tenants' adapters; `examples` are encoded with them already.
      show: takes a line of progress.
      loggers: take each line of metrics.jsonl, in the first process.

    Returns the bank after the last step. Raises ParaJaxError if `out` exists and neither `resume` nor `overwrite` is
    set, or holds a run with other data or settings; if a tenant's gradient was NaN or infinite, when all others are
    done and saved; if a program does not fit into memory. Raises Interrupted at Ctrl-C, when everything is saved.
    """
    out, names = Path(out), tuple(examples)
    shapes = backbone.shapes if isinstance(backbone, Loading) else backbone
    dev = {name: dev[name] for name in names if dev and dev.get(name)} if set(dev or ()) <= set(names) else dev
    counts = {"rows": rows, "checkpoint_every": checkpoint_every}
    limits = {"tenants_per_step": tenants_per_step, "micro_batch_tokens": micro_batch_tokens}
    for what, number in (counts | {k: v for k, v in limits.items() if v is not None}).items():
        COUNT.check(what, number)
    SEED.check("seed", seed)
    KEEP.check("keep", keep)
    _check(shapes, bank, examples, dev or {}, settings, tenants_per_step)
    show = show if first() else lambda line: None
    layout = Layout.of(shapes.mesh, len(names), rows, spread)
    parts, schedule, plan = Parts.planned(
        shapes, bank, examples, settings, layout, dev=dev, tenants_per_step=tenants_per_step,
        device=Device.of(shapes.config, micro_batch_tokens), remat=remat, seed=seed,
    )  # fmt: skip
    with Claim(out, resume, overwrite) as claim:
        with Programs(parts) as programs:
            show(f"{plan}; compiling {programs}")
            weights = backbone.backbone() if isinstance(backbone, Loading) else backbone
            programs.wait("weights")
            known = describe(weights, bank, examples, dev or {}, settings, rows, micro_batch_tokens, seed)
            resumed = claim.begin(known)
            del bank  # the state has a copy; nobody else may need these
            given = parts, programs, schedule, examples, dev or {}, settings
            run = Run(weights, *given, out, checkpoint_every, chat_templates or {}, known, show)
            with Checkpoints(out / CHECKPOINTS, keep, show) as checkpoints, checkpoints.saying():
                with stop_signals() as stop:
                    lines = run.restore(checkpoints) if resumed else []
                    with MetricsFile(out / METRICS, run.done, lines, show) if first() else nullcontext() as metrics:
                        run.metrics, run.loggers = metrics, loggers
                        finished = run.steps(checkpoints, stop, claim.settle)
                if first():
                    run.write_reports(read_metrics(out / METRICS))
                if finished:
                    run.complete()
        if not finished:
            raise Interrupted(run.done, preempted=stop.kind == signal.SIGTERM or jax.process_count() > 1)
        barrier("finetune")
    return run.state.bank


def _check(
    backbone: Backbone,
    bank: AdapterBank,
    examples: Mapping[str, Sequence[Example]],
    dev: Mapping[str, Sequence[Example]],
    settings: Mapping[str, Settings],
    tenants_per_step: int | None,
) -> None:
    """Raises ParaJaxError unless these are of the same tenants and go together."""
    names = set(examples)
    if names != set(bank.names) or names != set(settings) or not set(dev) <= names:
        raise ParaJaxError("bank, examples, settings and dev have to name the same tenants")
    for name, own in examples.items():
        check_name(name)
        settings[name].check()
        if not own:
            raise ParaJaxError(f"tenant {name!r} has no rows to learn from")
        for some in (own, dev.get(name, ())):
            check_ids(some, backbone.config.vocab_size)
            check_lengths(some, backbone.config.max_position_embeddings)
    if not dev and any(s.eval_every or s.patience for s in settings.values()):
        raise ParaJaxError("eval_every and patience are of dev rows, and no tenant has any; give dev rows")
    every = tenants_per_step is None or tenants_per_step >= len(names)
    if every and any(s.weight != 1 for s in settings.values()):
        raise ParaJaxError(
            "weights say whose turn it is, and every tenant is in every step; set tenants_per_step, to less than the "
            f"{len(names)} tenants"
        )
    if jax.process_count() > 1 and backbone.mesh is None:
        raise ParaJaxError("several processes need a mesh over all of their devices; load the backbone with mesh=...")


class Run:
    """What changes while a run goes on: the state, who has taken how many steps, and what is not reported yet."""

    def __init__(
        self,
        backbone: Backbone,
        parts: Parts,
        programs: Programs,
        schedule: Schedule,
        examples: Mapping[str, Sequence[Example]],
        dev: Mapping[str, Sequence[Example]],
        settings: Mapping[str, Settings],
        out: Path,
        checkpoint_every: int,
        chat_templates: Mapping[str, str],
        known: Mapping[str, Any],
        show: Callable[[str], None],
    ):
        self.backbone, self.parts, self.programs, self.schedule = backbone, parts, programs, schedule
        self.examples, self.dev, self.settings = examples, dev, settings
        self.out, self.checkpoint_every, self.chat_templates, self.show = out, checkpoint_every, chat_templates, show
        self.known = known
        self.layout, self.state, self.sums, self.done = parts.layout, parts.state, parts.sums, 0
        self.watch = Watch(settings, {name: Watched() for name in dev})
        self.taken, self.failed = dict.fromkeys(examples, 0), dict.fromkeys(examples, 0)
        self.progress = Progress(0, show)
        self.metrics: MetricsFile | None = None  # the first process's
        self.loggers: Iterable[Callable[[Mapping[str, Any]], None]] = ()
        self._pending: tuple[int, Homes, int, Any] | None = None

    def restore(self, checkpoints: Checkpoints) -> list[Path]:
        """Goes on from the newest checkpoint, if there is one. Returns the files in which it keeps metrics."""
        # What the first process sees: another's view of a shared folder may be older.
        self.done = int(told(str(checkpoints.newest() or 0 if first() else 0).encode()))
        self.progress = Progress(self.done, self.show)
        if not self.done:
            return []
        checkpoints.safe, layout = self.done, self.layout
        saved, beside = checkpoints.restore(self.state, self.done), checkpoints.beside(self.done)
        self.state = self.state.arranged(saved, beside["slots"], layout.mesh, layout.shards)
        self.watch.load(beside["watch"])
        counts = whole((self.state.taken, self.state.failed_at), layout.mesh)
        for group, *of in zip(self.state.bank.groups, *counts, strict=True):
            for name, has, at in zip(group.names, *of, strict=True):
                if name is not None:
                    self.taken[name], self.failed[name] = int(has), int(at)
        self.show(f"resuming after step {self.done}")
        if first():
            put_back(checkpoints.files(self.done, BEST), self.out)
        return [path for step in steps_in(checkpoints.folder) for path in checkpoints.files(step, METRICS).values()]

    def steps(self, checkpoints: Checkpoints, stop: Stop, begun_well: Callable[[], None]) -> bool:
        """Runs to the end or to a signal, and returns which it was. All is saved then.

        `begun_well` is called after the first step.
        """
        flag = Flag(self.layout.mesh)
        homes, begun = self._turn(), self.done
        with Ahead(self._batches) as ahead:
            while homes is not None:
                with explained(self.parts, "a step"):
                    turn = self._step(homes, ahead.take((homes, self._places(homes))))
                    ahead.begin(None if (then := self._turn()) is None else (then, self._places(then)))
                    due, looks = self._look(homes, turn)
                better = [name for name, loss in looks.items() if self.watch.look(name, loss, self.taken[name])]
                stopping = flag.raised(stop.kind is not None)
                saving = stopping or self.done % self.checkpoint_every == 0
                ended = [n for n in turn if self.taken[n] == self.settings[n].steps and n not in self.dev]
                if self.done == begun + 1:
                    begun_well()
                if due or ended or saving or self.done == begun + 1:
                    # First the metrics: a resumed run begins behind this step and would not write its line.
                    self._report(looks)
                for name in [*better, *(name for name in ended if not self.failed[name])]:
                    self._save(name)
                if saving:
                    checkpoints.save(self.done, self.state, self._beside(), self._files())
                if stopping:
                    break
                homes = self._turn()
        self._report()
        checkpoints.save(self.done, self.state, self._beside(), self._files())
        checkpoints.wait()
        return self._turn() is None

    @property
    def hint(self) -> str:
        """Another reason for what is NaN or infinite."""
        narrow = "The reason may be float16's range, which ends at 65504: try --dtype float32"
        return f". {narrow}" if self.backbone.dtype == np.float16 else ""

    def _resting(self, step: int) -> set[str]:
        # That a tenant failed is known one step late; a resumed run, which knows it at once, waits as long.
        known = self.watch.known
        return {n for n in self.examples if 0 < self.failed[n] < step or (n in known and known[n].stopped)}

    def _turn(self) -> Homes | None:
        return self.schedule.turn(self.taken, self._resting(self.done))

    def _places(self, homes: Homes) -> tuple[int, ...]:
        """How many steps each of these tenants has taken, which says what its next rows are."""
        return tuple(0 if name is None else self.taken[name] for home in homes for name in home)

    def _batches(self, key: tuple[Homes, tuple[int, ...]]) -> tuple[list[tuple[int, Batch]], int]:
        """The micro-batches of a step, and its tokens."""
        homes, places = key
        names = [name for home in homes for name in home]
        taken = {name: at for name, at in zip(names, places, strict=True) if name is not None}
        rows = self.layout.step_rows(homes, self.examples, self.parts.seed, taken)
        batches = list(self.layout.batches(homes, rows, self.parts.shapes))
        return batches, sum(len(e) for some in rows.values() for e in some)

    def _step(self, homes: Homes, made: tuple[list[tuple[int, Batch]], int]) -> list[str]:
        """Takes a step, and returns the tenants that took it."""
        batches, tokens = made
        slots = self.layout.slots(self.state.bank, homes)
        with jax.profiler.StepTraceAnnotation("train", step_num=self.done + 1):
            given = self.backbone, self.state, self.sums, slots, batches
            self.state, self.sums, values = self.parts.step(*given, ready=self.programs.wait)
        self._report()
        self._pending, self.done = (self.done + 1, homes, tokens, values), self.done + 1
        if self.progress.compiling:
            jax.block_until_ready(values)
            self.programs.wait_for_all()
        turn = [name for home in homes for name in home if name is not None and not self.failed[name]]
        self.taken |= {name: self.taken[name] + 1 for name in turn}
        return turn

    def _look(self, homes: Homes, turn: Sequence[str]) -> tuple[set[str], dict[str, float]]:
        """Who is due to be looked at, and their losses on dev rows."""
        # Whoever fails in this very step is looked at too, with the weights it had before: nobody knows yet.
        due = {name for name in turn if self.watch.due(name, self.taken[name])}
        if not due:
            return due, {}
        asked = [[name if name in due else None for name in home] for home in homes]
        return due, dev_losses(self.backbone, self.state.bank, self.layout, self.parts.shapes, asked, self.dev)

    def _report(self, looks: Mapping[str, float] | None = None) -> None:
        """Reports the step before, so that the device never waits for the host."""
        if self._pending is None:
            return
        (step, homes, tokens, values), self._pending = self._pending, None
        of_turn = in_order(homes, whole(values, self.layout.mesh))
        said = {key: {name: of[name] for name in self.examples if name in of} for key, of in of_turn.items()}
        for name, norm in said["grad_norm"].items():
            if not math.isfinite(norm) and not self.failed[name]:
                self.failed[name] = step
                self.show(
                    f"step {step}: {name}'s gradient is NaN or infinite; it stops here, the others go on{self.hint}"
                )
        left = self.schedule.left(self.taken, self._resting(step + 1))
        self.progress.update(step, step + left, tokens, said["loss"])
        line = {"step": step, "tokens": tokens, **said, **({"dev_loss": dict(looks)} if looks else {})}
        if self.metrics is not None:
            for listener in (self.metrics.write, *self.loggers):
                listener(line)

    def _beside(self) -> dict[str, Any]:
        slots = [list(group.names) for group in self.state.bank.groups]
        return {"run": self.known, "watch": self.watch.state(), "slots": slots}

    def _files(self) -> dict[str, bytes]:
        """What a checkpoint needs so that all of the run can be made from it: metrics and the best adapters."""
        if self.metrics is None:
            return {}
        files = {METRICS: self.metrics.settle()}
        for name, of in self.watch.known.items():
            if math.isfinite(of.loss):
                files |= {f"{BEST}/{name}/{path.name}": path.read_bytes() for path in (self.out / name).iterdir()}
        return files

    def _save(self, name: str) -> None:
        group, slot = self.state.bank.find(name)
        layers = adapter_of(group.stack, np.int32(slot), mesh=self.layout.mesh)
        layers = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), layers)
        if first():
            adapter, template = Adapter(group.config, layers), self.chat_templates.get(name)
            shape = self.backbone.config
            save_adapter(adapter, self.out / name, shape, chat_template=template, overwrite=True)

    def write_reports(self, lines: Sequence[dict[str, Any]]) -> None:
        """Draws the losses of these lines of metrics.jsonl, and writes the report."""
        if can_draw(self.show):
            plot_losses(lines, self.out / PLOT)
        known, bank = self.watch.known, self.state.bank
        settings, taken, failed = self.settings, self.taken, self.failed
        write_report(self.out, lines, self.backbone, bank, settings, known, taken, failed, self.progress)

    def complete(self) -> None:
        """Sees that every tenant's adapter is in its folder.

        Raises ParaJaxError for tenants that failed.
        """
        known, out = self.watch.known, self.out
        for name in self.failed:
            if name not in known and not self.failed[name]:
                self._save(name)
        blind = [name for name, of in known.items() if math.isinf(of.loss) and not self.failed[name]]
        if blind:
            raise ParaJaxError(
                f"the loss of {', '.join(blind[:5])} on dev rows was always NaN or infinite, so no adapter was kept; "
                f"look at these rows, or try a lower --lr{self.hint}. The others are done and saved"
            )
        broken = {name: step for name, step in self.failed.items() if step}
        if broken:
            listed = ", ".join(f"{name} (step {step})" for name, step in list(broken.items())[:5])
            more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
            others = len(self.failed) - len(broken)
            raise ParaJaxError(
                f"the gradient of {listed}{more} was NaN or infinite; try a lower --lr, or look at the "
                f"rows{self.hint}. {others} other tenant{'s are' if others != 1 else ' is'} done and saved in {out}"
            )


def steps_of(epochs: float, examples: int, rows: int) -> int:
    """The steps in which so many examples are seen so often. Raises ParaJaxError unless that is more than never.

    >>> steps_of(epochs=3, examples=100, rows=16)
    19
    """
    steps = max(1, math.ceil(POSITIVE.check("epochs", epochs) * examples / rows))
    return COUNT.check(f"the number of steps of {epochs:g} epochs", steps)
