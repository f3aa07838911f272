"""Which tenants take part in a step, and how their rows are laid out on a mesh.

A step has a fixed number of places, each for one tenant. If there are fewer places than tenants, the tenants that are
furthest behind are scheduled; the place of a finished tenant may stay empty. A tenant's steps, rows and learning rates
do not depend on when it is scheduled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from para_jax.adapters.bank import AdapterBank
from para_jax.checks import COUNT
from para_jax.data.batches import Batch, make_batch
from para_jax.data.examples import Example
from para_jax.data.order import order
from para_jax.data.packing import Shape, Sizes, micro_batches
from para_jax.distributed import shard
from para_jax.errors import ParaJaxError
from para_jax.sharding import row_sharding, row_shards
from para_jax.training.settings import Settings
from para_jax.training.state import Slots, move_slots

# The tenants of a step: for each shard of the tenants, the name at each place; None for an empty place.
StepTenants = Sequence[Sequence[str | None]]


@dataclass(frozen=True)
class TenantLayout:
    """How rows and tenants are divided over a mesh.

    Attributes:
      mesh: None for one device.
      rows: the number of rows of each tenant in a step.
      groups: the number of groups of rows in a micro-batch, one for each device with rows.
      shards: the number of shards of the tenants: `groups`, or 1 if adapters are replicated and every tenant's rows are
        distributed over all groups.
    """

    mesh: Mesh | None
    rows: int
    groups: int
    shards: int

    @classmethod
    def of(cls, mesh: Mesh | None, tenants: int, rows: int, spread: bool | None = None) -> TenantLayout:
        """The layout for a number of tenants. By default tenants are sharded if that leaves few places empty.

        Raises ParaJaxError if there are no rows, or if `spread` is True and there is only one group.

        >>> TenantLayout.of(None, tenants=3, rows=16).groups
        1
        """
        rows = COUNT.check("rows", rows)
        groups = row_shards(mesh)
        if spread and groups == 1:
            raise ParaJaxError("tenants are spread over the data and fsdp axes of a mesh, and both have size 1")
        if spread is None:
            spread = tenants % groups == 0 or tenants >= 8 * groups
        return cls(mesh, rows, groups, groups if spread and groups > 1 else 1)

    def shard_bank(self, bank: AdapterBank) -> AdapterBank:
        """The bank with its tenants distributed evenly over the shards; the remaining slots are free.

        Tenants are sorted by name, so that the order in which they were given does not matter.
        """
        groups, assigned = [], 0
        for group in sorted(bank.groups, key=lambda group: min(name for name in group.names if name is not None)):
            slots = sorted((name, i) for i, name in enumerate(group.names) if name is not None)
            per_shard = -(-len(slots) // self.shards)
            source: list[int | None] = [None] * (per_shard * self.shards)
            for i, (_, slot) in enumerate(slots):
                source[(assigned + i) % self.shards * per_shard + i // self.shards] = slot
            assigned += len(slots)
            names = tuple(None if i is None else group.names[i] for i in source)
            stack = group.stack if names == group.names else move_slots(group.stack, group.names, names)
            groups.append(replace(group, names=names, stack=stack))
        return replace(bank, groups=tuple(groups))

    def step_rows(
        self,
        step_tenants: StepTenants,
        examples: Mapping[str, Sequence[Example]],
        seed: int,
        steps_taken: Mapping[str, int],
    ) -> dict[str, list[Example]]:
        """The rows of these tenants' next step, after `steps_taken` steps.

        They depend only on `seed`, the tenant's name and its number of steps (`data.order`).
        """
        found = {}
        for name in (name for names in step_tenants for name in names if name is not None):
            positions = range(steps_taken[name] * self.rows, (steps_taken[name] + 1) * self.rows)
            found[name] = [examples[name][i] for i in order(seed, name, examples[name], positions)]
        return found

    def batches(
        self, step_tenants: StepTenants, rows: Mapping[str, Sequence[Example]], shapes: Sequence[Shape]
    ) -> Iterator[tuple[int, Batch]]:
        """The micro-batches of these tenants' rows, on the devices, each with the index of its shape."""
        n = len(step_tenants[0])
        examples = [list(rows[name]) if name is not None else [] for shard in step_tenants for name in shard]
        sizes = [Sizes([e.ids.size for e in some], [int(np.sum(e.targets >= 0)) for e in some]) for some in examples]
        count = np.array([sum(size.targets) for size in sizes], np.int32).reshape(self.shards, n)
        count = np.broadcast_to(count, (self.groups, n))
        group_of_place = [place // n for place in range(len(examples))] if self.shards > 1 else None
        for at, packed in micro_batches(sizes, shapes, self.groups, group_of_place):
            repeats = shapes[at].rows if n == 1 else 1
            yield at, self.on_devices(make_batch(shapes[at], packed, examples, count, repeats))

    def on_devices(self, batch: Batch) -> Batch:
        """The batch with each group's rows on its device."""
        if self.mesh is None:
            return batch
        sharding = row_sharding(self.mesh, self.groups)
        return jax.tree.map(lambda x: shard(x, sharding), batch)

    def slots(self, bank: AdapterBank, step_tenants: StepTenants) -> Slots:
        """The slots of a step's tenants in each group of the bank (`training.step.accumulate`).

        A tenant of another group of the bank has an out-of-range slot.
        """
        slots = []
        for group in bank.groups:
            per_shard = len(group.names) // self.shards
            of_shards = []
            for i, wanted in enumerate(step_tenants):
                names = group.names[i * per_shard : (i + 1) * per_shard]
                of_shards.append([names.index(n) if n is not None and n in names else per_shard for n in wanted])
            slots.append(np.tile(np.array(of_shards, np.int32), (self.groups // self.shards, 1)))
        return tuple(slots)


class Schedule:
    """Schedules tenants: which ones take the next step, in each shard of the tenants."""

    def __init__(
        self, bank: AdapterBank, settings: Mapping[str, Settings], layout: TenantLayout, most: int | None = None
    ):
        """`most` is the maximum number of tenants in a step; None for all. `bank` comes from `layout.shard_bank`."""
        self.settings = settings
        self.shards: list[list[str]] = [[] for _ in range(layout.shards)]
        for group in bank.groups:
            per_shard = len(group.names) // layout.shards
            for i, names in enumerate(self.shards):
                names += [name for name in group.names[i * per_shard : (i + 1) * per_shard] if name is not None]
        limit = max(map(len, self.shards))
        if most is not None and most < layout.shards:
            raise ParaJaxError(
                f"a step cannot hold at most {most} tenants; choose at least {layout.shards}"
                + (", one for each device that they are spread over" if layout.shards > 1 else "")
            )
        self.places = limit if most is None else min(limit, most // layout.shards)

    def step_tenants(self, steps_taken: Mapping[str, int], stopped: Collection[str]) -> list[list[str | None]] | None:
        """The tenants of the next step by shard, None for an empty place; None when all are done.

        Deterministic. Tenants with the lowest progress (share of their steps, divided by their weight) come first, so
        that all finish at about the same time and few places stay empty at the end.
        """

        def progress(name: str) -> float:
            return steps_taken[name] / self.settings[name].steps / self.settings[name].weight

        waiting = [
            [name for name in shard if name not in stopped and steps_taken[name] < self.settings[name].steps]
            for shard in self.shards
        ]
        if not any(waiting):
            return None
        chosen: list[list[str | None]] = []
        for names in waiting:
            behind = sorted(names, key=progress)[: self.places]
            chosen.append([*sorted(behind, key=names.index), *[None] * (self.places - len(behind))])
        return chosen

    def steps_left(self, steps_taken: Mapping[str, int], stopped: Collection[str]) -> int:
        """The number of remaining steps, if no tenant stops early."""
        left = [
            [n for name in shard if name not in stopped and (n := self.settings[name].steps - steps_taken[name]) > 0]
            for shard in self.shards
        ]
        return max((max(max(shard), -(-sum(shard) // self.places)) for shard in left if shard), default=0)


def values_by_tenant(step_tenants: StepTenants, values: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The report of `training.step.update`, by key and tenant."""
    names = [name for shard in step_tenants for name in shard]
    return {
        key: {name: float(x) for name, x in zip(names, array, strict=True) if name is not None}
        for key, array in values.items()
    }
