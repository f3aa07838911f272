"""A fine-tuning run: steps, looks at dev sets, checkpoints, metrics, and every tenant's adapter."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from para_jax.adapters.adapter import Adapter
from para_jax.adapters.bank import AdapterBank
from para_jax.adapters.files import save_adapter
from para_jax.backbones.decoder import Backbone
from para_jax.backbones.options import Remat, default_remat
from para_jax.data.examples import Example, check_ids
from para_jax.data.order import sources_of
from para_jax.distributed import Flag, barrier, first, told, whole
from para_jax.errors import ParaJaxError
from para_jax.training.checkpoints import Checkpoints
from para_jax.training.folder import CHECKPOINTS, METRICS, PLOT, check_name, claim, describe
from para_jax.training.memory import explained
from para_jax.training.metrics import MetricsFile, Progress, plot_losses, read_metrics
from para_jax.training.optimizer import Settings
from para_jax.training.places import Layout, Schedule, in_order
from para_jax.training.report import write_report
from para_jax.training.signals import Interrupted, stop_signals
from para_jax.training.step import TrainState, stack_settings, train_step
from para_jax.training.watch import Watch, Watched, dev_losses


def finetune(
    backbone: Backbone,
    bank: AdapterBank,
    examples: Mapping[str, Sequence[Example]],
    settings: Mapping[str, Settings],
    out: str | Path,
    *,
    dev: Mapping[str, Sequence[Example]] | None = None,
    rows: int = 16,
    micro_batches: int = 1,
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

    Args:
      bank: the adapters to begin with.
      examples, settings: for each tenant.
      out: a folder; afterwards it holds NAME/ with each tenant's adapter, metrics.jsonl, loss.png, report.html,
        report.json, run.json and checkpoints/.
      dev: rows that a tenant does not learn from, for some or all tenants. Of a tenant with dev rows the adapter that
        was best on them is kept, and written as soon as it is found; `Settings` says when to look, and when to stop.
      rows: each tenant's rows in a step, in `micro_batches` parts whose gradients are summed in float32.
      tenants_per_step: how many tenants a step holds at most; all, if None.
      spread: whether the tenants are spread over a mesh's devices, or whole on each of them (`places.Layout`).
      seed: of the order of the rows.
      checkpoint_every: steps between checkpoints; there is one at the end, and at Ctrl-C or SIGTERM.
      keep: how many checkpoints are kept, the newest.
      resume: go on from the newest checkpoint in `out`, bit for bit as if the run had never stopped; on another mesh
        to rounding, with the same rows.
      overwrite: replace an existing `out`.
      remat: what the backward pass computes again instead of keeping it (`Backbone.forward`); by default "layers" on
        accelerators and "none" on a CPU.
      chat_templates: those to keep with tenants' adapters; `examples` are encoded with them already.
      show: takes a line of progress.
      loggers: take each line of metrics.jsonl, in the first process.

    Returns the bank after the last step. Raises ParaJaxError if `out` exists and neither `resume` nor `overwrite` is
    set, or holds a run with other data or settings; if a tenant's gradient was no number, when all others are done and
    saved; if a step does not fit into memory. Raises Interrupted at Ctrl-C, when everything is saved.
    """
    out, names = Path(out), tuple(examples)
    looked_at = {name: dev[name] for name in names if dev and dev.get(name)}
    if set(names) != set(bank.names) or set(names) != set(settings) or not set(dev or ()) <= set(names):
        raise ParaJaxError("bank, examples, settings and dev have to name the same tenants")
    for name in names:
        check_name(name)
        if not examples[name]:
            raise ParaJaxError(f"tenant {name!r} has no rows to learn from")
        for some in (*sources_of(examples[name]), looked_at.get(name, ())):
            check_ids(some, backbone.config.vocab_size)
    if resume and overwrite:
        raise ParaJaxError("resume goes on with a run and overwrite replaces it; give one of them")
    if checkpoint_every < 1 or keep < 1:
        raise ParaJaxError(f"checkpoint_every and keep must be at least 1, not {checkpoint_every} and {keep}")
    if not looked_at and any(s.eval_every or s.patience for s in settings.values()):
        raise ParaJaxError("eval_every and patience are of dev rows, and no tenant has any; give dev rows")
    if tenants_per_step is None and any(s.weight != 1 for s in settings.values()):
        raise ParaJaxError("weights say whose turn it is, and every tenant is in every step; set tenants_per_step")
    if jax.process_count() > 1 and backbone.mesh is None:
        raise ParaJaxError("several processes need a mesh over all of their devices; load the backbone with mesh=...")
    layout = Layout.of(backbone.mesh, len(names), rows, micro_batches, spread)
    bank = layout.divided(bank)
    schedule = Schedule(bank, settings, layout, tenants_per_step)
    claim(out, describe(backbone, bank, examples, looked_at, settings, rows, micro_batches, seed), resume, overwrite)

    remat = default_remat() if remat is None else remat
    rules, state = stack_settings(bank, settings), TrainState.create(bank, layout.mesh, layout.shards)
    del bank  # the state has a copy; nobody else may need these
    watch = Watch(settings, {name: Watched() for name in looked_at})
    taken, failed = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    show, loggers = show if first() else lambda line: None, tuple(loggers)

    def resting(step: int) -> set[str]:
        # That a tenant failed is known one step late; a resumed run, which knows it at once, waits as long.
        return {n for n in names if 0 < failed[n] < step or (n in watch.known and watch.known[n].stopped)}

    def beside() -> dict[str, Any]:
        return {"watch": watch.state(), "slots": [list(group.names) for group in state.bank.groups]}

    def save(name: str, adapter: Adapter) -> None:
        layers = whole(adapter.layers, layout.mesh)
        if first():
            template = (chat_templates or {}).get(name)
            save_adapter(
                Adapter(adapter.config, layers), out / name, backbone.config, chat_template=template, overwrite=True
            )

    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(out / CHECKPOINTS, keep))
        stop, flag = stack.enter_context(stop_signals()), Flag(layout.mesh)
        # What the first process sees: another's view of a shared folder may be older.
        done = int(told(str(checkpoints.latest() or 0).encode()))
        if done:
            saved, known = checkpoints.restore(state, done)
            state = state.arranged(saved, known["slots"], layout.mesh, layout.shards)
            watch.load(known["watch"])
            counts = whole((state.taken, state.failed_at), layout.mesh)
            for group, *of in zip(state.bank.groups, *counts, strict=True):
                for name, has, at in zip(group.names, *of, strict=True):
                    if name is not None:
                        taken[name], failed[name] = int(has), int(at)
            show(f"resuming after step {done}")
        metrics = stack.enter_context(MetricsFile(out / METRICS, done)) if first() else None
        progress = Progress(done, show)
        pending: tuple[int, list[list[str | None]], int, Any] | None = None

        def report(looks: Mapping[str, float] | None = None) -> None:
            # One step late, so that the device never waits for the host.
            nonlocal pending
            if pending is None:
                return
            step, homes, tokens, values = pending
            pending = None
            said = in_order(homes, whole(values, layout.mesh))
            for name, norm in said["grad_norm"].items():
                if not math.isfinite(norm) and not failed[name]:
                    failed[name] = step
                    show(f"step {step}: {name}'s gradient is no number; it stops here, the others go on")
            progress.update(step, step + schedule.left(taken, resting(step + 1)), tokens, said["loss"])
            if metrics is None:
                return
            line = {"step": step, "tokens": tokens, **said, **({"dev_loss": dict(looks)} if looks else {})}
            metrics.write(line)
            for logger in loggers:
                logger(line)

        stopping = False
        while (homes := schedule.turn(taken, resting(done))) is not None:
            batch, tokens = layout.step_batch(homes, examples, seed, taken)
            slots = layout.slots(state.bank, homes)
            named = jax.profiler.StepTraceAnnotation("train", step_num=done + 1)
            with explained(backbone, layout, homes, remat):
                with named:
                    state, values = train_step(
                        backbone, state, rules, batch, slots, shards=layout.shards, remat=remat, seed=seed
                    )
                report()
                pending, done = (done + 1, homes, tokens, values), done + 1
                turn = [name for home in homes for name in home if name is not None and not failed[name]]
                taken |= {name: taken[name] + 1 for name in turn}
                # Whoever fails in this very step is looked at too, with the weights it had before: nobody knows yet.
                due = {name for name in turn if watch.due(name, taken[name])}
                looks: dict[str, float] = {}
                if due:
                    asked = [[name if name in due else None for name in home] for home in homes]
                    looks = dev_losses(backbone, state.bank, layout, asked, looked_at)
            better = [name for name, loss in looks.items() if watch.look(name, loss, taken[name])]
            stopping = flag.raised(stop.kind is not None)
            saving = stopping or done % checkpoint_every == 0
            ended = [name for name in turn if taken[name] == settings[name].steps and name not in looked_at]
            if due or ended or saving:
                # First the metrics: a resumed run begins behind this step and would not write its line.
                report(looks)
            for name in [*better, *(name for name in ended if not failed[name])]:
                save(name, state.bank[name])
            if saving:
                checkpoints.save(done, state, beside())
            if stopping:
                break
        report()
        finished = schedule.turn(taken, resting(done)) is None
        checkpoints.save(done, state, beside())
        checkpoints.wait()
    if first():
        lines = read_metrics(out / METRICS)
        plot_losses(lines, out / PLOT, f"{len(names)} tenants tuned on one backbone")
        write_report(out, lines, backbone, state.bank, settings, watch.known, taken, failed, progress)
    if not finished:
        raise Interrupted(done, preempted=stop.kind == signal.SIGTERM or jax.process_count() > 1)
    _complete(out, state.bank, watch, failed, save)
    barrier("finetune")
    return state.bank


def _complete(
    out: Path, bank: AdapterBank, watch: Watch, failed: Mapping[str, int], save: Callable[[str, Adapter], None]
) -> None:
    """Sees that every tenant's adapter is in its folder.

    Raises ParaJaxError for tenants that failed, and for a best adapter that has been removed.
    """
    for name in failed:
        if name not in watch.known and not failed[name]:
            save(name, bank[name])
    gone = [name for name, of in watch.known.items() if math.isfinite(of.loss) and not (out / name).is_dir()]
    if name := told(",".join(gone).encode()).decode().split(",")[0]:
        raise ParaJaxError(
            f"{out / name} is gone: it held {name}'s best adapter, of its step {watch.known[name].step}, which no "
            "checkpoint has; run again with --overwrite"
        )
    blind = [name for name, of in watch.known.items() if math.isinf(of.loss) and not failed[name]]
    if blind:
        raise ParaJaxError(
            f"the loss of {', '.join(blind[:5])} on dev rows was never a number, so no adapter was kept; look at these "
            "rows, or try a lower --lr. The others are done and saved"
        )
    broken = {name: step for name, step in failed.items() if step}
    if broken:
        listed = ", ".join(f"{name} (step {step})" for name, step in list(broken.items())[:5])
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        others = len(failed) - len(broken)
        raise ParaJaxError(
            f"the gradient of {listed}{more} was no number; try a lower --lr, or look at the rows. "
            f"{others} other tenant{'s are' if others != 1 else ' is'} done and saved in {out}"
        )


def steps_of(epochs: float, examples: int, rows: int) -> int:
    """The steps in which so many examples are seen so often. Raises ParaJaxError unless that is more than never.

    >>> steps_of(epochs=3, examples=100, rows=16)
    19
    """
    if not epochs > 0:
        raise ParaJaxError(f"epochs must be above 0, not {epochs}")
    return max(1, math.ceil(epochs * examples / rows))
