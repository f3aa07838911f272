"""Dev sets: each tenant's dev loss, its best adapter so far, and early stopping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from para_jax.adapters.bank import AdapterBank
from para_jax.backbones.decoder import Backbone
from para_jax.data.examples import Example
from para_jax.data.packing import Shape
from para_jax.distributed import gather
from para_jax.training.places import StepTenants, TenantLayout
from para_jax.training.settings import Settings
from para_jax.training.step import losses


@dataclass
class DevStatus:
    """The evaluations of one tenant so far.

    Attributes:
      loss: the lowest dev loss.
      step: the tenant's step at which it was measured.
      since: evaluations since then.
      stopped: whether the tenant has run out of patience.
    """

    loss: float = math.inf
    step: int = 0
    since: int = 0
    stopped: bool = False


@dataclass
class DevTracker:
    """Tracks the evaluations on dev rows. It is saved with the state of a run."""

    settings: Mapping[str, Settings]
    status: dict[str, DevStatus] = field(default_factory=dict)

    def due(self, name: str, steps_taken: int) -> bool:
        """Whether a tenant is evaluated after this number of its steps."""
        settings = self.settings[name]
        every = settings.eval_every
        return name in self.status and (steps_taken == settings.steps or (every > 0 and steps_taken % every == 0))

    def record(self, name: str, loss: float, steps_taken: int) -> bool:
        """Records a dev loss. Returns whether it is the lowest so far; NaN and infinite losses never are."""
        status = self.status[name]
        if loss < status.loss:
            status.loss, status.step, status.since = loss, steps_taken, 0
            return True
        status.since += 1
        patience = self.settings[name].patience
        status.stopped = status.stopped or 0 < patience <= status.since
        return False

    def state(self) -> dict[str, Any]:
        return {name: {**asdict(status), "loss": repr(status.loss)} for name, status in self.status.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.status |= {name: DevStatus(**{**fields, "loss": float(fields["loss"])}) for name, fields in state.items()}


def dev_losses(
    backbone: Backbone,
    bank: AdapterBank,
    layout: TenantLayout,
    shapes: Sequence[Shape],
    step_tenants: StepTenants,
    dev: Mapping[str, Sequence[Example]],
) -> dict[str, float]:
    """The mean negative log-likelihood of a response token in nats, for each of these tenants.

    Dev rows run in micro-batches of the planned shapes.
    """
    slots = layout.slots(bank, step_tenants)
    total = {name: 0.0 for shard in step_tenants for name in shard if name is not None}
    for _, batch in layout.batches(step_tenants, dev, shapes):
        # Unless tenants are sharded, a tenant has rows in every group of rows, and its sums are added up.
        sums_gn = gather(losses(backbone, bank, batch, slots, shards=layout.shards), layout.mesh)
        for i, shard in enumerate(step_tenants):
            for j, name in enumerate(shard):
                if name is not None:
                    total[name] += float(sums_gn[i, j] if layout.shards > 1 else sums_gn[:, j].sum())
    return {name: x / max(sum(len(e.response_ids) for e in dev[name]), 1) for name, x in total.items()}
