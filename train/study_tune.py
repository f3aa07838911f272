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
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from study_data import Task

from para_jax.adapters.adapter import Adapter
from para_jax.adapters.bank import AdapterBank
from para_jax.adapters.method import MethodConfig
from para_jax.backbones.decoder import Backbone
from para_jax.backbones.options import default_remat
from para_jax.backbones.ragged import Line
from para_jax.data.batches import Batch, pad
from para_jax.data.examples import Example
from para_jax.data.order import order
from para_jax.decoding.generate import complete
from para_jax.training.loss import loss_of
from para_jax.training.metrics import Progress
from para_jax.training.optimizer import Settings
from para_jax.training.step import TrainState, slots_of, stack_settings, train_step


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
    shape, remat = backbone.config, default_remat()
    # Names without rate and seed: the parts of a method then run the same program.
    count: Counter[str] = Counter()
    named = {}
    for run in runs:
        named[f"{run.task}.{count[run.task]}"] = run
        count[run.task] += 1
    names = tuple(named)
    keys = {name: jax.random.key(zlib.crc32(f"{run.task}/{run.seed}".encode())) for name, run in named.items()}
    bank = AdapterBank.stack({name: Adapter.create(config, shape, key) for name, key in keys.items()}, shape)
    rules = stack_settings(bank, {name: Settings.checked(steps=steps, lr=run.lr) for name, run in named.items()})

    def rows_at(run: Run, step: int) -> list[Example]:
        train = tasks[run.task].train
        return [train[i] for i in order(run.seed, run.task, train, range(step * rows, (step + 1) * rows))]

    training = one_shape([pad([[rows_at(run, step) for run in runs]]) for step in range(steps)])
    dev = one_shape(dev_batches([tasks[run.task].dev for run in runs], rows))

    state, kept, slots = TrainState.create(bank), bank, slots_of(bank, names)
    best, best_step = np.full(len(runs), np.inf), np.zeros(len(runs), int)
    curve: list[list[float]] = []
    progress, rates = Progress(0, show), []
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            loss_n = dev_loss(backbone, state.bank, dev, names)
            better = loss_n < best  # never for a loss that is no number
            kept = _newer(kept, state.bank, better)
            best, best_step = np.where(better, loss_n, best), np.where(better, step, best_step)
            curve.append([step, *loss_n.tolist()])
        if step < steps:
            began = time.perf_counter()
            state, values = train_step(backbone, state, rules, training[step], slots, remat=remat)
            losses = dict(zip(names, jax.device_get(values["loss"]).tolist(), strict=True))
            rates.append(training[step].size / (time.perf_counter() - began))
            progress.update(step + 1, steps, training[step].size, losses)
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


def dev_batches(dev: Sequence[Sequence[Example]], rows: int) -> list[Batch]:
    """The tenants' dev rows, `rows` of each in a batch; a tenant with fewer gets rows that count nothing."""
    batches = []
    for start in range(0, max(map(len, dev)), rows):
        parts = [some[start : start + rows] for some in dev]
        fill = [Example.of(some[0].prompt_ids, ()) for some in dev]
        batches.append(pad([[[*part, *[e] * (rows - len(part))] for part, e in zip(parts, fill, strict=True)]]))
    return batches


_losses = jax.jit(loss_of)


def dev_loss(backbone: Backbone, bank: AdapterBank, batches: Sequence[Batch], names: tuple[str, ...]) -> np.ndarray:
    """Each tenant's mean cross-entropy of a response token, float64."""
    total, tokens = np.zeros(len(names)), np.zeros(len(names), int)
    for batch in batches:
        rows = bank.rows(names, repeats=batch.tokens.shape[1] // len(names))
        loss_n = np.asarray(_losses(backbone, rows, batch.micro_batch(0), batch.target_count)[0], np.float64)
        total, tokens = total + loss_n * batch.target_count[0], tokens + batch.target_count[0]
    return total / tokens


def one_shape(batches: Sequence[Batch]) -> list[Batch]:
    """The batches padded to the largest of them, so that one program runs them all."""
    t = max(batch.tokens.shape[2] for batch in batches)
    k = max(batch.target_place.shape[2] for batch in batches)
    line = Line(*(max(sizes) for sizes in zip(*(batch.line for batch in batches), strict=True)))

    def wider(x: np.ndarray, width: int, fill: int = 0) -> np.ndarray:
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])], constant_values=fill)

    widened = []
    for batch in batches:
        row, column = np.divmod(batch.target_place, np.int32(batch.tokens.shape[2]))
        widened.append(
            replace(
                batch,
                tokens=wider(batch.tokens, t),
                target_place=wider(row * np.int32(t) + column, k),
                target_token=wider(batch.target_token, k),
                target_tenant=wider(batch.target_tenant, k, fill=batch.target_count.shape[1]),
                line=line,
            )
        )
    return widened


def speed(
    backbone: Backbone,
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

    Training: one task's rows, so many `tenants` with `rows` each. Decode: one row of each tenant, prompts of 32
    tokens, `new` tokens each, prefill included. None stands for the bare backbone, which does not train.
    """
    names = tuple(f"t{i}" for i in range(tenants))
    picked = [[examples[(i * rows + j) % len(examples)] for j in range(rows)] for i in range(tenants)]
    batch = pad([picked])
    prompts = [[(7 * i + 3 * j) % backbone.config.vocab_size for j in range(32)] for i in range(tenants)]
    banks = {label: config and AdapterBank.create(dict.fromkeys(names, config), backbone.config)
             for label, config in configs.items()}  # fmt: skip
    states = {label: TrainState.create(bank) for label, bank in banks.items() if bank is not None}
    trained = {label: bank for label, bank in banks.items() if bank is not None}
    rules = {label: stack_settings(bank, dict.fromkeys(names, Settings())) for label, bank in trained.items()}
    slots = {label: slots_of(bank, names) for label, bank in trained.items()}
    remat = default_remat()
    found: dict[str, dict[str, list[float]]] = {label: {"training": [], "decode": []} for label in configs}
    for turn in range(rounds + 1):  # the first compiles
        for label, bank in banks.items():
            if label in states:
                began = time.perf_counter()
                states[label], values = train_step(
                    backbone, states[label], rules[label], batch, slots[label], remat=remat
                )
                jax.block_until_ready(values)
                found[label]["training"].append(batch.size / (time.perf_counter() - began))
            began = time.perf_counter()
            complete(
                backbone, tokenizer, prompts, bank=bank, tenants=None if bank is None else names,
                max_new_tokens=new, eos_token_id=(),
            )  # fmt: skip
            found[label]["decode"].append(tenants * new / (time.perf_counter() - began))
        show(f"round {turn} of {rounds}")
    return {
        label: {what: {"median": statistics.median(x[1:]), "rounds": x[1:]} for what, x in kinds.items() if x}
        for label, kinds in found.items()
    }
