"""All programs of a run: compiled side by side in threads before its first step, and none after it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from para_jax.training.places import Layout, Schedule
from para_jax.training.shapes import Device, Plan, plan_run
from para_jax.training.state import Rules, Slots, Sums, TrainState, stack_settings
from para_jax.training.step import accumulate, adapter_of, copied, losses, update
from para_jax.training.tuning import Tuning


@dataclass(frozen=True)
class Parts:
    """What a run's programs are compiled for.

    Attributes:
      backbone: with arrays, or with their shapes.
      state, rules, sums, slots: those of the first step; of state and sums shapes with placements do.
      places: how many tenants a group of rows has places for.
      shapes: of the micro-batches.
      dev: whether there are dev rows.
    """

    backbone: Backbone
    layout: Layout
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
        """Plans the shapes of a run from its rows, and makes its state; also returns whose turn is when, and the plan.

        The state has a copy of `bank`, its tenants where the layout deals them.
        """
        layout = Layout.of(backbone.mesh, len(tuning.examples), tuning.rows, tuning.spread)
        bank = layout.divided(bank)
        schedule = Schedule(bank, tuning.settings, layout, tuning.tenants_per_step)
        device = device or Device.of(backbone.config, tuning.micro_batch_tokens)
        plan = plan_run(tuning.examples, tuning.dev, tuning.settings, layout, schedule, tuning.seed, device)
        seating = schedule.seating(dict.fromkeys(tuning.examples, 0), ())
        assert seating is not None
        parts = cls(
            backbone=backbone,
            layout=layout,
            state=TrainState.create(bank, layout.mesh, layout.shards),
            rules=stack_settings(bank, tuning.settings),
            sums=Sums.create(bank, layout.groups, schedule.places, layout.mesh),
            slots=layout.slots(bank, seating),
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
        """One step: its micro-batches, each with the number of its shape, and the update.

        `ready` is called with a program's name before its use. The state and the sums are donated; they come back with
        what `update` reports.
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
        """A micro-batch of this shape without rows."""
        count = np.zeros((self.layout.groups, self.places), np.int32)
        repeats = shape.rows if self.places == 1 else 1
        return self.layout.on_devices(make_batch(shape, [[]] * self.layout.groups, [], count, repeats))

    def calls(self) -> dict[str, partial[Traced]]:
        """Each program by name, as a function that traces it; the first steps' come first."""
        state, shards, mesh = self.state, self.layout.shards, self.layout.mesh
        found: dict[str, partial[Traced]] = {}
        for i, shape in enumerate(self.shapes):
            batch = self.empty(shape)
            given = (self.backbone, state.bank, state.taken, self.rules, self.sums, batch, self.slots)
            found[f"micro-batch {i}"] = partial(
                accumulate.trace, *given, shards=shards, remat=self.remat, seed=self.seed
            )
            if self.dev:
                looked = (self.backbone, state.bank, batch, self.slots)
                found[f"dev rows {i}"] = partial(losses.trace, *looked, shards=shards)
        found["update"] = partial(update.trace, state, self.rules, self.sums, self.slots, shards=shards, mesh=mesh)
        found["weights"] = partial(weight_sums.trace, self.backbone)
        found["checkpoint"] = partial(copied.trace, state)
        for i, group in enumerate(state.bank.groups):
            found[f"adapter {i}"] = partial(adapter_of.trace, group.stack, np.int32(0), mesh=mesh)
        return dict(sorted(found.items(), key=lambda item: not item[0].startswith(("micro", "update"))))


class Programs:
    """Compiles a run's programs in threads. A step waits for its own program only."""

    def __init__(self, parts: Parts):
        self._parts, self._compiling = parts, Compiling()
        for name, trace in parts.calls().items():
            self._compiling.begin(name, trace)

    def __str__(self) -> str:
        """What is compiled, for a person."""
        steps = len(self._parts.shapes) + 1
        dev = steps - 1 if self._parts.dev else 0
        looks = f"{dev} for dev rows, " if dev else ""
        total = len(self._compiling)
        return f"{total} programs ({steps} for the steps, {looks}{total - steps - dev} for saving)"

    def __enter__(self) -> Programs:
        self._compiling.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._compiling.__exit__(*error)

    def wait(self, name: str) -> None:
        """Until this program is compiled. Raises ParaJaxError if it does not fit into memory."""
        with explained(self._parts, f"the program of {name.rstrip(' 0123456789')}"):
            self._compiling.wait(name)

    def wait_for_all(self) -> None:
        """Until all programs are compiled."""
        with explained(self._parts, "a program"):
            self._compiling.wait_for_all()


@contextmanager
def explained(parts: Parts, what: str) -> Iterator[None]:
    """Turns running out of memory into a ParaJaxError with the figure and the cheapest remedies."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        figure = re.search(r"[\d.]+\s?[KMGT]i?B?(?:ytes)?\b|\d{6,} bytes", text)
        asked = f" ({figure.group()} were asked for)" if figure else ""
        largest = max(parts.shapes, key=lambda shape: shape.tokens)
        shards = parts.layout.shards
        remedies = [
            "" if parts.remat == "layers" else "--remat layers, which keeps only what enters a layer",
            f"--micro-batch-tokens {largest.tokens // 2}, which halves what is in flight at once"
            if largest.rows > 1
            else "",
            f"--tenants-per-step {max(1, parts.places // 2) * shards}" if parts.places > 1 else "",
            "" if parts.backbone.quantize else "--quantize int8, which halves the backbone's weights",
            "a mesh with more of fsdp, over which weights are split",
            "--max-length, if a few rows are much longer than the others",
        ]
        ways = "; ".join([way for way in remedies if way][:3])
        raise ParaJaxError(f"{what} does not fit into the device's memory{asked}; try {ways}") from error
