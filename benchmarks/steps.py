"""Tuning steps in one fixed shape of micro-batches, compiled before they are timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from para_jax import AdapterBank, Backbone, Example, Settings
from para_jax.backbones.options import Remat
from para_jax.data.batches import Batch
from para_jax.training.programs import Parts, Programs
from para_jax.training.shapes import Device
from para_jax.training.tuning import Tuning


class Steps:
    """Steps of all tenants at once, as `para_jax.training.loop` takes them.

    The shape is planned from the tenants' rows. A run may have two on a CPU; here it is one, so that every step does
    the same work.
    """

    def __init__(
        self,
        backbone: Backbone,
        bank: AdapterBank,
        examples: Mapping[str, Sequence[Example]],
        rows: int,
        remat: Remat = "none",
    ):
        settings = dict.fromkeys(examples, Settings(steps=10**6, lr=1e-3))
        tuning = Tuning(examples=examples, settings=settings, out=Path(), rows=rows, remat=remat)
        one = replace(Device.of(backbone.config), shapes=1)
        self.parts, schedule, _ = Parts.planned(backbone, bank, tuning, one)
        self.step_tenants = schedule.step_tenants(dict.fromkeys(examples, 0), ()) or []
        with Programs(self.parts) as programs:
            programs.wait_for_all()
        self.state, self.sums = self.parts.state, self.parts.sums

    @property
    def shape(self) -> str:
        """The rows of a micro-batch on a device, and their length."""
        return f"{self.parts.shapes[0].rows} x {self.parts.shapes[0].length}"

    def batches(self, rows: Mapping[str, Sequence[Example]]) -> list[tuple[int, Batch]]:
        """The micro-batches of a step with these rows."""
        return list(self.parts.layout.batches(self.step_tenants, rows, self.parts.shapes))

    def take(self, batches: Sequence[tuple[int, Batch]]) -> dict[str, Any]:
        """A step; returns what `update` reports, by place."""
        given = self.parts.backbone, self.state, self.sums, self.parts.slots, batches
        self.state, self.sums, values = self.parts.step(*given)
        return values
