"""A fine-tuning run: steps, checkpoints, metrics, and every tenant's adapter at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from para_jax.adapters.bank import AdapterBank
from para_jax.adapters.files import base_sizes, save_adapter
from para_jax.backbones.decoder import Backbone
from para_jax.data.batches import Batch, step_batch
from para_jax.data.examples import Example, check_ids
from para_jax.errors import ParaJaxError
from para_jax.training.checkpoints import Checkpoints
from para_jax.training.metrics import MetricsFile, Progress, plot_losses, read_metrics
from para_jax.training.optimizer import Settings
from para_jax.training.step import TrainState, stack_settings, train_step

RUN, METRICS, PLOT, CHECKPOINTS = "run.json", "metrics.jsonl", "loss.png", "checkpoints"


class Interrupted(KeyboardInterrupt):
    """The run was told to stop, and has saved what it did. `step` is the number of steps done."""

    def __init__(self, step: int):
        super().__init__(f"stopped and saved after step {step}")
        self.step = step


def finetune(
    backbone: Backbone,
    bank: AdapterBank,
    examples: Mapping[str, Sequence[Example]],
    settings: Mapping[str, Settings],
    out: str | Path,
    *,
    rows: int = 16,
    micro_batches: int = 1,
    seed: int = 0,
    checkpoint_every: int = 500,
    resume: bool = False,
    overwrite: bool = False,
    remat: bool | None = None,
    chat_templates: Mapping[str, str] | None = None,
    show: Callable[[str], None] = print,
) -> AdapterBank:
    """Tunes every tenant of `bank` on its own examples, all in one step.

    Args:
      bank: the adapters to begin with.
      examples, settings: for each tenant.
      out: a folder; afterwards it holds NAME/ with each tenant's adapter, metrics.jsonl, loss.png, run.json and
        checkpoints/.
      rows: each tenant's rows in a step, in `micro_batches` parts whose gradients are summed in float32.
      seed: of the order of the rows.
      checkpoint_every: steps between checkpoints; there is one at the end, and at Ctrl-C or SIGTERM.
      resume: go on from the newest checkpoint in `out`, bit for bit as if the run had never stopped.
      overwrite: replace an existing `out`.
      remat: recompute layers in the backward pass, which takes less memory and more time; by default only on
        accelerators.
      chat_templates: those to keep with tenants' adapters; `examples` are encoded with them already.
      show: takes a line of progress.

    Returns the tuned bank. Raises ParaJaxError if `out` exists and neither `resume` nor `overwrite` is set, or holds
    a run with other data or settings; Interrupted at Ctrl-C, when everything is saved.
    """
    out = Path(out)
    names = tuple(examples)
    if set(names) != set(bank.names) or set(names) != set(settings):
        raise ParaJaxError("bank, examples and settings have to name the same tenants")
    for name in names:
        check_name(name)
        check_ids(examples[name], backbone.config.vocab_size)
    if rows < 1 or micro_batches < 1 or rows % micro_batches:
        raise ParaJaxError(f"{rows} rows cannot be split into {micro_batches} equal micro-batches")
    description = describe(backbone, bank, examples, settings, rows, micro_batches, seed)
    _claim(out, description, resume, overwrite)

    remat = jax.default_backend() != "cpu" if remat is None else remat
    total = max(s.steps for s in settings.values())
    rules = stack_settings(bank, settings)
    state = TrainState.create(bank)
    with Checkpoints(out / CHECKPOINTS) as checkpoints, stop_signals() as stop:
        done = checkpoints.latest() or 0
        if done:
            state = checkpoints.restore(state)
            show(f"resuming after step {done}")
        metrics = MetricsFile(out / METRICS, done)
        progress = Progress(total, done, show)
        pending: tuple[int, Batch, Any] | None = None

        def report() -> None:
            # One step late, so that the device never waits for the host.
            if pending is not None:
                step, batch, values = pending
                line = {key: dict(zip(names, x.tolist(), strict=True)) for key, x in jax.device_get(values).items()}
                metrics.write({"step": step, "tokens": batch.size, **line})
                progress.update(step, batch.size, line["loss"])

        try:
            for step in range(done, total):
                batch = step_batch(examples, seed, step, rows, micro_batches)
                state, values = train_step(backbone, state, rules, batch, tenants=names, remat=remat, seed=seed)
                report()
                pending = (step + 1, batch, values)
                done = step + 1
                if stop.is_set() or done % checkpoint_every == 0 or done == total:
                    # First the metrics: a resumed run begins behind this step and would not write its line.
                    report()
                    pending = None
                    checkpoints.save(done, state)
                if stop.is_set() and done < total:
                    break
            report()
        finally:
            metrics.close()
        plot_losses(read_metrics(out / METRICS), out / PLOT, f"{len(names)} tenants tuned in one step")
        if done < total:
            raise Interrupted(done)
    for name in names:
        template = (chat_templates or {}).get(name)
        save_adapter(state.bank[name], out / name, backbone.config, chat_template=template, overwrite=True)
    return state.bank


def check_name(name: str) -> None:
    """Raises ParaJaxError unless a tenant's name can be a folder's beside the run's own files."""
    if not name or name != Path(name).name or name.startswith(".") or name in (RUN, METRICS, PLOT, CHECKPOINTS):
        raise ParaJaxError(f"tenant name {name!r} cannot be a folder's name; choose another")


def describe(
    backbone: Backbone,
    bank: AdapterBank,
    examples: Mapping[str, Sequence[Example]],
    settings: Mapping[str, Settings],
    rows: int,
    micro_batches: int,
    seed: int,
) -> dict[str, Any]:
    """All that a run's result depends on, as JSON."""

    def fingerprint(rows: Sequence[Example]) -> str:
        digest = hashlib.sha256()
        for e in rows:
            digest.update(json.dumps([e.prompt_ids, e.response_ids]).encode())
        return digest.hexdigest()

    tenants = {
        name: {
            "method": bank[name].config.method,
            **dataclasses.asdict(bank[name].config),
            **dataclasses.asdict(settings[name]),
            "examples": len(examples[name]),
            "data_sha256": fingerprint(examples[name]),
        }
        for name in examples
    }
    run = {"rows": rows, "micro_batches": micro_batches, "seed": seed, "dtype": str(backbone.dtype)}
    return json.loads(json.dumps({"tenants": tenants, **run, "base_model": base_sizes(backbone.config)}))


def _claim(out: Path, description: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Makes the folder of a new run, or sees that the one to resume is this one."""
    there = out / RUN
    if out.exists() and resume and there.is_file():
        before = json.loads(there.read_text())
        changed = list(_changes(before, description))
        if changed:
            raise ParaJaxError(f"{out} holds another run, which cannot be resumed with these: {'; '.join(changed[:5])}")
        return
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            way = "it holds no run to resume" if resume else "pass --resume to go on with it"
            raise ParaJaxError(f"{out} exists; {way}, --overwrite to replace it, or choose another folder")
        if not there.is_file():
            raise ParaJaxError(
                f"{out} holds no {RUN}, so it is no run to overwrite; remove it or choose another folder"
            )
        aside = out.with_name(f".{out.name}-replaced")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(out, aside)
        shutil.rmtree(aside)
    out.mkdir(parents=True, exist_ok=True)
    fresh = out / f".{RUN}-new"
    fresh.write_text(json.dumps(description, indent=1) + "\n")
    os.replace(fresh, there)


def _changes(before: Any, now: Any, at: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _changes(before.get(key), now.get(key), f"{at}.{key}" if at else key)
    elif before != now:
        yield f"{at} was {str(before)[:40]} and is {str(now)[:40]}"


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one stops at once, as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def handle(kind: int, _: Any) -> None:
        stop.set()
        signal.signal(kind, before[signal.Signals(kind)])

    for kind in before:
        signal.signal(kind, handle)
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
