"""Dev sets: every tenant's loss on its own, which of its adapters was the best, and when it has had enough."""

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
from para_jax.training.places import Layout, Seating
from para_jax.training.settings import Settings
from para_jax.training.step import losses


@dataclass
class Watched:
    """What is known of one tenant.

    Attributes:
      loss: on its dev rows, of the best adapter so far.
      step: its own step at which that was.
      since: looks since then.
      stopped: whether its patience is at an end.
    """

    loss: float = math.inf
    step: int = 0
    since: int = 0
    stopped: bool = False


@dataclass
class Watch:
    """The looks at the tenants' dev rows. It is saved with a run's state."""

    settings: Mapping[str, Settings]
    known: dict[str, Watched] = field(default_factory=dict)

    def due(self, name: str, taken: int) -> bool:
        """Whether a tenant is to be looked at after so many of its own steps."""
        rule = self.settings[name]
        every = rule.eval_every
        return name in self.known and (taken == rule.steps or (every > 0 and taken % every == 0))

    def look(self, name: str, loss: float, taken: int) -> bool:
        """Notes a loss, and says whether it is the best so far. One that is no number never is."""
        of = self.known[name]
        if loss < of.loss:
            of.loss, of.step, of.since = loss, taken, 0
            return True
        of.since += 1
        patience = self.settings[name].patience
        of.stopped = of.stopped or 0 < patience <= of.since
        return False

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {name: {**asdict(of), "loss": repr(of.loss)} for name, of in self.known.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self.known |= {name: Watched(**{**of, "loss": float(of["loss"])}) for name, of in state.items()}


def dev_losses(
    backbone: Backbone,
    bank: AdapterBank,
    layout: Layout,
    shapes: Sequence[Shape],
    seating: Seating,
    dev: Mapping[str, Sequence[Example]],
) -> dict[str, float]:
    """The mean negative log-likelihood of a response token of each of these tenants, in nats.

    Their rows run in micro-batches of the run's shapes.
    """
    names = [name for shard in seating for name in shard if name is not None]
    slots = layout.slots(bank, seating)
    total, count = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for _, batch in layout.batches(seating, dev, shapes):
        # By group of rows: of a tenant whose rows are in every group, all groups' together.
        found = gather(losses(backbone, bank, batch, slots, shards=layout.shards), layout.mesh)
        for i, shard in enumerate(seating):
            for j, name in enumerate(shard):
                if name is not None:
                    total[name] += float(found[i, j] if layout.shards > 1 else found[:, j].sum())
    for name in names:
        count[name] = sum(len(e.response_ids) for e in dev[name])
    return {name: total[name] / max(count[name], 1) for name in names}
