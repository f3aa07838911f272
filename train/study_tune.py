"""Many runs tuned in one step, each kept where it was best on dev; and the speeds of the methods.

A run is a task, a learning rate and a seed. All runs of a part are tenants of one multi-tenant step: each has rows,
schedule and clipping of its own, so its result is what it would be alone.
"""

from __future__ import annotations

import statistics
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from study_data import Task

from para_jax import Adapter, AdapterBank, Backbone, Example, MethodConfig, Settings, complete
from para_jax.data.order import order
from para_jax.training.metrics import Progress
from para_jax.training.places import values_by_tenant
from para_jax.training.programs import Parts, Programs
from para_jax.training.tuning import Tuning
from para_jax.training.watch import dev_losses


class Run(NamedTuple):
    """One tenant of a part."""

    task: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Tuned:
    """The kept adapters by tenant, what is to be recorded of every run, and the median step's tokens a second."""

    bank: AdapterBank
    runs: dict[str, dict[str, Any]]
    tokens_per_second: float


def tune(
    backbone: Backbone,
    config: MethodConfig,
    runs: Sequence[Run],
    tasks: Mapping[str, Task],
    *,
    steps: int,
    rows: int,
    every: int,
    show: Callable[[str], None] = print,
) -> Tuned:
    """Tunes a fresh adapter for every run, and keeps each as it was where its loss on dev was lowest.

    First weights and the order of rows depend on the task and the seed only: methods and learning rates are compared
    on the same rows.
    """
    shape = backbone.config
    # Names without rate and seed: the parts of a method then run the same programs.
    count: Counter[str] = Counter()
    named: dict[str, Run] = {}
    for run in runs:
        named[f"{run.task}.{count[run.task]}"] = run
        count[run.task] += 1
    names = tuple(named)
    keys = {name: jax.random.key(zlib.crc32(f"{run.task}/{run.seed}".encode())) for name, run in named.items()}
    bank = AdapterBank.stack({name: Adapter.create(config, shape, key) for name, key in keys.items()}, shape)
    settings = {name: Settings(steps=steps, lr=run.lr) for name, run in named.items()}
    train = {name: tasks[run.task].train for name, run in named.items()}
    dev = {name: tasks[run.task].dev for name, run in named.items()}

    def rows_at(run: Run, step: int) -> list[Example]:
        own = tasks[run.task].train
        return [own[i] for i in order(run.seed, run.task, own, range(step * rows, (step + 1) * rows))]

    parts = parts_of(backbone, bank, settings, train, dev, rows)
    kept, best, best_step = bank, np.full(len(runs), np.inf), np.zeros(len(runs), int)
    curve: list[list[float]] = []
    progress, rates = Progress(0, show), []
    with Programs(parts) as programs:
        show(f"micro-batches of {' and '.join(f'{s.rows} x {s.length}' for s in parts.shapes)}; compiling {programs}")
        programs.wait_for_all()
        state, sums, slots = parts.state, parts.sums, parts.layout.slots(parts.state.bank, [names])
        for step in range(steps + 1):
            if step % every == 0 or step == steps:
                found = dev_losses(backbone, state.bank, parts.layout, parts.shapes, [names], dev)
                loss_n = np.array([found[name] for name in names])
                better = loss_n < best  # never for a loss that is NaN
                kept = _newer(kept, state.bank, better)
                best, best_step = np.where(better, loss_n, best), np.where(better, step, best_step)
                curve.append([step, *loss_n.tolist()])
            if step < steps:
                of_step = {name: rows_at(run, step) for name, run in named.items()}
                batches = list(parts.layout.batches([names], of_step, parts.shapes))
                began = time.perf_counter()
                state, sums, values = parts.step(backbone, state, sums, slots, batches)
                losses = values_by_tenant([names], jax.device_get(values))["loss"]
                tokens = sum(len(e) for some in of_step.values() for e in some)
                rates.append(tokens / (time.perf_counter() - began))
                progress.update(step + 1, steps, tokens, losses)
    records = {
        name: {
            **run._asdict(),
            "dev_loss": float(best[i]),
            "kept_step": int(best_step[i]),
            "dev_curve": [[line[0], round(line[i + 1], 5)] for line in curve],
        }
        for i, (name, run) in enumerate(named.items())
    }
    return Tuned(kept, records, statistics.median(rates))


def _newer(kept: AdapterBank, bank: AdapterBank, better_n: np.ndarray) -> AdapterBank:
    """The tenants of `bank` that are better, and the others as they were kept. All have one configuration."""

    def choose(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(better_n.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, kept, bank)


def parts_of(
    backbone: Backbone,
    bank: AdapterBank,
    settings: Mapping[str, Settings],
    train: Mapping[str, Sequence[Example]],
    dev: Mapping[str, Sequence[Example]],
    rows: int,
) -> Parts:
    """What a run's programs are compiled for, planned from its rows; all tenants are in every step."""
    return Parts.planned(backbone, bank, Tuning(examples=train, settings=settings, dev=dev, rows=rows, out=Path()))[0]


def speed(
    backbone: Backbone,
    decoder: Backbone,
    tokenizer: Any,
    configs: Mapping[str, MethodConfig | None],
    examples: Sequence[Example],
    *,
    tenants: int = 8,
    rows: int = 8,
    new: int = 64,
    rounds: int = 5,
    show: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Training and decode tokens a second of each method in rounds A B C A B C, with the medians.

    `backbone` is tuned with, `decoder` decodes. Training: one task's rows, so many `tenants` with `rows` each, the same
    in every step. Decode: one row of each tenant, prompts of 32 tokens, `new` tokens each, prefill included. None is
    the bare backbone, which does not train.
    """
    names = tuple(f"t{i}" for i in range(tenants))
    picked = {n: [examples[(i * rows + j) % len(examples)] for j in range(rows)] for i, n in enumerate(names)}
    tokens = sum(len(e) for some in picked.values() for e in some)
    prompts = [[(7 * i + 3 * j) % backbone.config.vocab_size for j in range(32)] for i in range(tenants)]
    banks = {label: config and AdapterBank.create(dict.fromkeys(names, config), backbone.config)
             for label, config in configs.items()}  # fmt: skip
    settings = dict.fromkeys(names, Settings())
    trained = {label: bank for label, bank in banks.items() if bank is not None}
    parts = {label: parts_of(backbone, bank, settings, picked, {}, rows) for label, bank in trained.items()}
    running = {label: (of.state, of.sums) for label, of in parts.items()}
    slots = {label: of.layout.slots(of.state.bank, [names]) for label, of in parts.items()}
    batches = {label: list(of.layout.batches([names], picked, of.shapes)) for label, of in parts.items()}
    found: dict[str, dict[str, list[float]]] = {label: {"training": [], "decode": []} for label in configs}
    for turn in range(rounds + 1):  # the first compiles
        for label, bank in banks.items():
            if label in parts:
                began = time.perf_counter()
                *after, values = parts[label].step(backbone, *running[label], slots[label], batches[label])
                jax.block_until_ready(values)
                running[label] = after
                found[label]["training"].append(tokens / (time.perf_counter() - began))
            began = time.perf_counter()
            complete(
                decoder, tokenizer, prompts, bank=bank, tenants=None if bank is None else names,
                max_new_tokens=new, eos_token_id=(),
            )  # fmt: skip
            found[label]["decode"].append(tenants * new / (time.perf_counter() - began))
        show(f"round {turn} of {rounds}")
    return {
        label: {what: {"median": statistics.median(x[1:]), "rounds": x[1:]} for what, x in kinds.items() if x}
        for label, kinds in found.items()
    }
