"""All programs of a run. They are compiled in parallel threads before the first step; none is compiled later."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.stages import Traced

from para_jax.adapters.bank import AdapterBank
from para_jax.backbones.decoder import Backbone
from para_jax.backbones.options import Remat, default_remat
from para_jax.compiling import Compiling
from para_jax.data.batches import Batch, make_batch
from para_jax.data.packing import Shape
from para_jax.errors import ParaJaxError
from para_jax.training.digest import weight_sums
from para_jax.training.places import Schedule, TenantLayout
from para_jax.training.shapes import Device, Plan, plan_run
from para_jax.training.state import Rules, Slots, Sums, TrainState, stack_settings
from para_jax.training.step import accumulate, copy_arrays, losses, tenant_adapter, update
from para_jax.training.tuning import Tuning


@dataclass(frozen=True)
class Parts:
    """The inputs of a run's programs.

    Attributes:
      state, rules, sums, slots: those of the first step. State and sums may be abstract shapes with shardings.
      places: the number of places for tenants in a group of rows.
      dev: whether there are dev rows.
    """

    backbone: Backbone
    layout: TenantLayout
    state: TrainState
    rules: tuple[Rules, ...]
    sums: Sums
    slots: Slots
    places: int
    shapes: Sequence[Shape]
    dev: bool
    remat: Remat
    seed: int

    @classmethod
    def planned(
        cls, backbone: Backbone, bank: AdapterBank, tuning: Tuning, device: Device | None = None
    ) -> tuple[Parts, Schedule, Plan]:
        """Plans the shapes of a run from its rows, and creates its state. Also returns the schedule and the plan.

        The state has a copy of `bank`, with its tenants in the slots that the layout assigns.
        """
        layout = TenantLayout.of(backbone.mesh, len(tuning.examples), tuning.rows, tuning.spread)
        bank = layout.shard_bank(bank)
        schedule = Schedule(bank, tuning.settings, layout, tuning.tenants_per_step)
        device = device or Device.of(backbone.config, tuning.micro_batch_tokens)
        plan = plan_run(tuning.examples, tuning.dev, tuning.settings, layout, schedule, tuning.seed, device)
        step_tenants = schedule.step_tenants(dict.fromkeys(tuning.examples, 0), ())
        assert step_tenants is not None
        parts = cls(
            backbone=backbone,
            layout=layout,
            state=TrainState.create(bank, layout.mesh, layout.shards),
            rules=stack_settings(bank, tuning.settings),
            sums=Sums.create(bank, layout.groups, schedule.places, layout.mesh),
            slots=layout.slots(bank, step_tenants),
            places=schedule.places,
            shapes=plan.shapes,
            dev=bool(tuning.dev),
            remat=default_remat() if tuning.remat is None else tuning.remat,
            seed=tuning.seed,
        )
        return parts, schedule, plan

    def step(
        self,
        backbone: Backbone,
        state: TrainState,
        sums: Sums,
        slots: Slots,
        batches: Iterable[tuple[int, Batch]],
        ready: Callable[[str], None] = lambda name: None,
    ) -> tuple[TrainState, Sums, dict[str, Any]]:
        """One step: its micro-batches, each with the index of its shape, and the update.

        `ready` is called with the name of each program before the program runs. The state and the sums are donated.
        Returns the new ones and the report of `update`.
        """
        shards, mesh = self.layout.shards, self.layout.mesh
        for at, batch in batches:
            ready(f"micro-batch {at}")
            sums = accumulate(
                backbone, state.bank, state.taken, self.rules, sums, batch, slots,
                shards=shards, remat=self.remat, seed=self.seed,
            )  # fmt: skip
        ready("update")
        return update(state, self.rules, sums, slots, shards=shards, mesh=mesh)

    def empty(self, shape: Shape) -> Batch:
        count = np.zeros((self.layout.groups, self.places), np.int32)
        repeats = shape.rows if self.places == 1 else 1
        return self.layout.on_devices(make_batch(shape, [[]] * self.layout.groups, [], count, repeats))

    def calls(self) -> dict[str, partial[Traced]]:
        """Each program by name, as a function that traces it. The programs of the first step come first."""
        state, shards, mesh = self.state, self.layout.shards, self.layout.mesh
        calls: dict[str, partial[Traced]] = {}
        for i, shape in enumerate(self.shapes):
            batch = self.empty(shape)
            args = (self.backbone, state.bank, state.taken, self.rules, self.sums, batch, self.slots)
            calls[f"micro-batch {i}"] = partial(
                accumulate.trace, *args, shards=shards, remat=self.remat, seed=self.seed
            )
            if self.dev:
                calls[f"dev rows {i}"] = partial(losses.trace, *args[:2], batch, self.slots, shards=shards)
        calls["update"] = partial(update.trace, state, self.rules, self.sums, self.slots, shards=shards, mesh=mesh)
        calls["weights"] = partial(weight_sums.trace, self.backbone)
        calls["checkpoint"] = partial(copy_arrays.trace, state)
        for i, group in enumerate(state.bank.groups):
            calls[f"adapter {i}"] = partial(tenant_adapter.trace, group.stack, np.int32(0), mesh=mesh)
        return dict(sorted(calls.items(), key=lambda item: not item[0].startswith(("micro", "update"))))


class Programs(Compiling):
    """Compiles a run's programs in threads. A step waits only for the program that it needs."""

    def __init__(self, parts: Parts):
        super().__init__()
        self._parts = parts
        for name, trace in parts.calls().items():
            self.start(name, trace)

    def __str__(self) -> str:
        """The number of programs by purpose, for progress lines."""
        steps = len(self._parts.shapes) + 1
        dev = steps - 1 if self._parts.dev else 0
        evaluation = f"{dev} for dev rows, " if dev else ""
        total = len(self._started)
        return f"{total} programs ({steps} for the steps, {evaluation}{total - steps - dev} for saving)"

    def wait(self, name: Hashable) -> None:
        with explain_out_of_memory(self._parts, f"the program of {str(name).rstrip(' 0123456789')}"):
            super().wait(name)


@contextmanager
def explain_out_of_memory(parts: Parts, what: str) -> Iterator[None]:
    """Turns an out-of-memory error into a ParaJaxError with the requested size and the cheapest remedies."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        figure = re.search(r"[\d.]+\s?[KMGT]i?B?(?:ytes)?\b|\d{6,} bytes", text)
        requested = f" ({figure.group()} were requested)" if figure else ""
        largest = max(parts.shapes, key=lambda shape: shape.tokens)
        shards = parts.layout.shards
        remedies = [
            "" if parts.remat == "layers" else "--remat layers, which keeps only the inputs of layers",
            f"--micro-batch-tokens {largest.tokens // 2}, which halves the activations" if largest.rows > 1 else "",
            f"--tenants-per-step {max(1, parts.places // 2) * shards}" if parts.places > 1 else "",
            "" if parts.backbone.quantize else "--quantize int8, which halves the backbone's weights",
            "a mesh with a larger fsdp axis, over which weights are sharded",
            "--max-length, if a few rows are much longer than the others",
        ]
        ways = "; ".join([way for way in remedies if way][:3])
        raise ParaJaxError(f"{what} does not fit into the device's memory{requested}; try {ways}") from error
