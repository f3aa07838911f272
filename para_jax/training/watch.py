"""Dev sets: every tenant's loss on its own, which of its adapters was the best, and when it has had enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from para_jax.adapters.bank import AdapterBank
from para_jax.adapters.rows import Rows
from para_jax.backbones.decoder import Backbone
from para_jax.data.batches import Batch
from para_jax.data.examples import Example
from para_jax.distributed import whole
from para_jax.training.loss import loss_of
from para_jax.training.optimizer import Settings
from para_jax.training.places import NOTHING, Layout
from para_jax.training.step import Slots, picked, stack_size

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float


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


@partial(jax.jit, static_argnames="shards")
def _losses(backbone: Backbone, bank: AdapterBank, part: Batch, slots: Slots, shards: int) -> Float[Array, "g n"]:
    """The sum of the negative log-likelihoods of each tenant's targets."""
    g, n = part.target_count.shape
    stacks = [group.stack for group in bank.groups]
    there = [jnp.asarray(s) < stack_size(x) // shards for x, s in zip(stacks, slots, strict=True)]
    layers = tuple(picked(x, s, shards, backbone.mesh) for x, s in zip(stacks, slots, strict=True))
    strengths = tuple(x.reshape(-1).astype(jnp.float32) for x in there)
    rows = Rows(strengths, layers, (0.0,) * len(stacks), repeats=part.length.shape[0] // (g * n))
    return loss_of(backbone, rows, part, jnp.ones((g, n), jnp.int32))


def dev_losses(
    backbone: Backbone,
    bank: AdapterBank,
    layout: Layout,
    homes: Sequence[Sequence[str | None]],
    dev: Mapping[str, Sequence[Example]],
) -> dict[str, float]:
    """The mean negative log-likelihood of a response token of each of these tenants, in nats.

    Their rows run in batches as large as those of a step; a tenant with fewer than the others gets rows that count
    nothing.
    """
    names = [name for home in homes for name in home if name is not None]
    slots, each = layout.slots(bank, homes), layout.rows
    total, count = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for start in range(0, max(len(dev[name]) for name in names), each):

        def some(name: str | None, start: int = start) -> list[Example]:
            rows = list(dev[name][start : start + each]) if name is not None else []
            return [*rows, *[NOTHING] * (each - len(rows))]

        parts = layout.parts([[some(name) for name in home] for home in homes])
        for part in parts:
            batch = layout.batch([part])
            # By group of rows: of a tenant whose rows are in every group, all groups' together.
            losses = whole(_losses(backbone, bank, batch.micro_batch(0), slots, layout.shards), layout.mesh)
            for i, home in enumerate(homes):
                for j, name in enumerate(home):
                    if name is not None:
                        total[name] += float(losses[i, j] if layout.shards > 1 else losses[:, j].sum())
        for name in names:
            count[name] += sum(e.response_ids.size for e in some(name))
    return {name: total[name] / max(count[name], 1) for name in names}
