"""Whose rows a step holds, and where they lie on a mesh.

A step has a fixed number of places, each for one tenant. If there are fewer places than tenants, those who are furthest
behind have their turn; a tenant that is done leaves its place empty. A tenant's own steps, rows and schedule are the
same whenever its turns come.
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
from para_jax.training.state import Slots, moved, slots_of

# The tenants of a step: of each shard of the tenants, who has which place; None for an empty one.
Seating = Sequence[Sequence[str | None]]


@dataclass(frozen=True)
class Layout:
    """How rows and tenants are divided over a mesh.

    Attributes:
      mesh: None for one device.
      rows: of each tenant in a step.
      groups: of rows in a micro-batch: as many as there are devices with rows.
      shards: into how many parts the tenants are spread: `groups`, or one if adapters are whole on every device and
        all tenants' rows are dealt over all groups.
    """

    mesh: Mesh | None
    rows: int
    groups: int
    shards: int

    @classmethod
    def of(cls, mesh: Mesh | None, tenants: int, rows: int, spread: bool | None = None) -> Layout:
        """The layout for so many tenants; by default they are spread if that leaves few places empty.

        Raises ParaJaxError for no rows, or for tenants that are to be spread where there is one group.

        >>> Layout.of(None, tenants=3, rows=16).groups
        1
        """
        rows = COUNT.check("rows", rows)
        groups = row_shards(mesh)
        if spread and groups == 1:
            raise ParaJaxError("tenants are spread over the data and fsdp axes of a mesh, and there are none")
        if spread is None:
            spread = tenants % groups == 0 or tenants >= 8 * groups
        return cls(mesh, rows, groups, groups if spread and groups > 1 else 1)

    def divided(self, bank: AdapterBank) -> AdapterBank:
        """The bank with its tenants dealt out to the shards, as many to each as can be, and free slots between them.

        Tenants stand in the order of their names, so that the order in which they were given means nothing.
        """
        groups, dealt = [], 0
        for group in sorted(bank.groups, key=lambda group: min(name for name in group.names if name is not None)):
            slots = sorted((name, i) for i, name in enumerate(group.names) if name is not None)
            own = -(-len(slots) // self.shards)
            source: list[int | None] = [None] * (own * self.shards)
            for turn, (_, slot) in enumerate(slots):
                source[(dealt + turn) % self.shards * own + turn // self.shards] = slot
            dealt += len(slots)
            names = tuple(None if i is None else group.names[i] for i in source)
            stack = group.stack if names == group.names else moved(group.stack, group.names, names)
            groups.append(replace(group, names=names, stack=stack))
        return replace(bank, groups=tuple(groups))

    def step_rows(
        self, seating: Seating, examples: Mapping[str, Sequence[Example]], seed: int, taken: Mapping[str, int]
    ) -> dict[str, list[Example]]:
        """The rows of the step that these tenants take after those they have taken.

        They depend on `seed`, the tenant's name and its steps only (`data.order`).
        """

        def of(name: str) -> list[Example]:
            own, places = examples[name], range(taken[name] * self.rows, (taken[name] + 1) * self.rows)
            return [own[i] for i in order(seed, name, own, places)]

        return {name: of(name) for shard in seating for name in shard if name is not None}

    def batches(
        self, seating: Seating, rows: Mapping[str, Sequence[Example]], shapes: Sequence[Shape]
    ) -> Iterator[tuple[int, Batch]]:
        """The micro-batches of these tenants' rows, on the devices, each with the number of its shape."""
        n = len(seating[0])
        of_place = [list(rows[name]) if name is not None else [] for shard in seating for name in shard]
        sizes = [Sizes([e.ids.size for e in some], [int(np.sum(e.targets >= 0)) for e in some]) for some in of_place]
        count = np.array([sum(own.targets) for own in sizes], np.int32).reshape(self.shards, n)
        count = np.broadcast_to(count, (self.groups, n))
        group_of = [place // n for place in range(len(of_place))] if self.shards > 1 else None
        for at, dealt in micro_batches(sizes, shapes, self.groups, group_of):
            repeats = shapes[at].rows if n == 1 else 1
            yield at, self.on_devices(make_batch(shapes[at], dealt, of_place, count, repeats))

    def on_devices(self, batch: Batch) -> Batch:
        """Each group's rows on its own device."""
        if self.mesh is None:
            return batch
        where = row_sharding(self.mesh, self.groups)
        return jax.tree.map(lambda x: shard(x, where), batch)

    def slots(self, bank: AdapterBank, seating: Seating) -> Slots:
        """Where a step's tenants stand in each group of the bank (`training.step.accumulate`)."""
        if self.shards == 1:
            return slots_of(bank, [name or "" for name in seating[0]], self.groups)
        found = []
        for group in bank.groups:
            own = len(group.names) // self.shards
            parts = [group.names[i * own : (i + 1) * own] for i in range(self.shards)]
            places = [
                [part.index(name) if name in part else own for name in shard]
                for part, shard in zip(parts, ([n or "" for n in shard] for shard in seating), strict=True)
            ]
            found.append(np.array(places, np.int32))
        return tuple(found)


class Schedule:
    """Which tenants have their turn: in each shard, a part of the mesh with tenants of its own."""

    def __init__(self, bank: AdapterBank, settings: Mapping[str, Settings], layout: Layout, most: int | None = None):
        """`most` is how many tenants a step may hold at once; all, if None. `bank` is divided by the layout."""
        self.settings = settings
        self.shards: list[list[str]] = [[] for _ in range(layout.shards)]
        for group in bank.groups:
            own = len(group.names) // layout.shards
            for i, names in enumerate(self.shards):
                names += [name for name in group.names[i * own : (i + 1) * own] if name is not None]
        limit = max(map(len, self.shards))
        if most is not None and most < layout.shards:
            raise ParaJaxError(
                f"a step cannot hold at most {most} tenants; choose at least {layout.shards}"
                + (", one for each device that they are spread over" if layout.shards > 1 else "")
            )
        self.places = limit if most is None else min(limit, most // layout.shards)

    def seating(self, taken: Mapping[str, int], resting: Collection[str]) -> list[list[str | None]] | None:
        """The tenants of the next step by shard, None for an empty place; None when all are done.

        The same for the same arguments. Whoever has done the least share of its steps, over its weight, comes first:
        so all are done at about the same time, and few places stay empty at the end.
        """

        def share(name: str) -> float:
            return taken[name] / self.settings[name].steps / self.settings[name].weight

        waiting = [
            [name for name in shard if name not in resting and taken[name] < self.settings[name].steps]
            for shard in self.shards
        ]
        if not any(waiting):
            return None
        chosen: list[list[str | None]] = []
        for names in waiting:
            behind = sorted(names, key=share)[: self.places]
            chosen.append([*sorted(behind, key=names.index), *[None] * (self.places - len(behind))])
        return chosen

    def left(self, taken: Mapping[str, int], resting: Collection[str]) -> int:
        """The steps that are still to come, if nobody leaves early."""
        rest = [
            [self.settings[n].steps - taken[n] for n in shard if n not in resting and taken[n] < self.settings[n].steps]
            for shard in self.shards
        ]
        return max((max(max(of), -(-sum(of) // self.places)) for of in rest if of), default=0)


def in_order(seating: Seating, values: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What `training.step.update` reports, by key and tenant."""
    names = [name for shard in seating for name in shard]
    return {
        key: {name: float(x) for name, x in zip(names, of, strict=True) if name is not None}
        for key, of in values.items()
    }
