"""Whose rows a step holds, and where they lie on a mesh.

A step has a fixed number of places, each with the same number of rows of one tenant. If there are fewer places than
tenants, those who are furthest behind have their turn; a tenant that is done leaves, and when half of the places are
empty a step has half as many. A tenant's own steps, rows and schedule are the same whenever its turns come.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.adapters.bank import AdapterBank
from para_jax.data.batches import OF_MICRO_BATCHES, Batch, pad
from para_jax.data.examples import Example
from para_jax.data.order import order
from para_jax.distributed import placed
from para_jax.errors import ParaJaxError
from para_jax.sharding import row_shards
from para_jax.training.optimizer import Settings
from para_jax.training.step import Slots, moved, slots_of

# Fills a place that has no tenant: one token, and nothing to learn.
NOTHING = Example.of((0,), ())


@dataclass(frozen=True)
class Layout:
    """How rows and tenants are divided over a mesh.

    Attributes:
      mesh: None for one device.
      rows: of each tenant in a step.
      micro_batches: in how many parts, one after the other.
      groups: of rows in a micro-batch: as many as there are devices with rows.
      shards: into how many parts the tenants are spread: `groups`, or one if adapters are whole on every device and
        each tenant's rows are split over all groups.
    """

    mesh: Mesh | None
    rows: int
    micro_batches: int
    groups: int
    shards: int

    @classmethod
    def of(
        cls, mesh: Mesh | None, tenants: int, rows: int, micro_batches: int = 1, spread: bool | None = None
    ) -> Layout:
        """The layout for so many tenants; by default they are spread if that leaves few places empty.

        Raises ParaJaxError for rows that cannot be divided so.

        >>> Layout.of(None, tenants=3, rows=16, micro_batches=2).groups
        1
        """
        if rows < 1 or micro_batches < 1 or rows % micro_batches:
            raise ParaJaxError(f"{rows} rows cannot be split into {micro_batches} equal micro-batches")
        groups, share = row_shards(mesh), rows // micro_batches
        if spread and groups == 1:
            raise ParaJaxError("tenants are spread over the data and fsdp axes of a mesh, and there are none")
        if spread is None:
            spread = tenants % groups == 0 or tenants >= 8 * groups or (share % groups > 0 and tenants >= groups)
        if not spread and share % groups:
            more = groups * micro_batches
            raise ParaJaxError(
                f"a tenant's {share} rows of a micro-batch do not divide by the mesh's data x fsdp = {groups}; choose "
                f"{-(-rows // more) * more} rows, or a mesh with more of tensor"
            )
        return cls(mesh, rows, micro_batches, groups, groups if spread and groups > 1 else 1)

    @property
    def repeats(self) -> int:
        """A place's rows in a micro-batch of its group."""
        return self.rows // self.micro_batches // (1 if self.shards > 1 else self.groups)

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
            groups.append(replace(group, names=names, stack=moved(group.stack, group.names, names)))
        return replace(bank, groups=tuple(groups))

    def parts(self, homes: Sequence[Sequence[Sequence[Example]]]) -> list[list[list[Example]]]:
        """The rows of each home's tenants as `data.batches.pad` takes them: by micro-batch, group and tenant."""
        own, each = self.repeats, 1 if self.shards > 1 else self.groups
        return [
            [
                list(rows[(a * each + g) * own : (a * each + g + 1) * own])
                for home in homes
                for g in range(each)
                for rows in home
            ]
            for a in range(self.micro_batches)
        ]

    def batch(self, parts: Sequence[Sequence[Sequence[Example]]]) -> Batch:
        """Padded, and on the devices."""
        batch = pad(parts, self.groups)
        if self.mesh is None:
            return batch
        rows, groups = (NamedSharding(self.mesh, P(*lead, ("data", "fsdp"))) for lead in ((None,), ()))
        divided = {name: placed(getattr(batch, name), rows) for name in OF_MICRO_BATCHES}
        return replace(batch, **divided, target_count=placed(batch.target_count, groups))

    def step_batch(
        self,
        homes: Sequence[Sequence[str | None]],
        examples: Mapping[str, Sequence[Example]],
        seed: int,
        taken: Mapping[str, int],
    ) -> tuple[Batch, int]:
        """The batch of a step in which these tenants take the step after those they have taken, and its tokens.

        A tenant's rows depend on `seed`, its name and its steps only (`data.order`).
        """

        def of(name: str | None) -> list[Example]:
            if name is None:
                return [NOTHING] * self.rows
            own, places = examples[name], range(taken[name] * self.rows, (taken[name] + 1) * self.rows)
            return [own[i] for i in order(seed, name, own, places)]

        parts = self.parts([[of(name) for name in home] for home in homes])
        tokens = sum(len(e) for part in parts for some in part for e in some if e is not NOTHING)
        return self.batch(parts), tokens

    def slots(self, bank: AdapterBank, homes: Sequence[Sequence[str | None]]) -> Slots:
        """Where a step's tenants stand in each group of the bank (`training.step.train_step`)."""
        if self.shards == 1:
            return slots_of(bank, [name or "" for name in homes[0]], self.groups)
        found = []
        for group in bank.groups:
            own = len(group.names) // self.shards
            parts = [group.names[i * own : (i + 1) * own] for i in range(self.shards)]
            places = [
                [part.index(name) if name in part else own for name in home]
                for part, home in zip(parts, ([n or "" for n in home] for home in homes), strict=True)
            ]
            found.append(np.array(places, np.int32))
        return tuple(found)


class Schedule:
    """Which tenants have their turn: in each home, a part of the mesh with tenants of its own."""

    def __init__(self, bank: AdapterBank, settings: Mapping[str, Settings], layout: Layout, most: int | None = None):
        """`most` is how many tenants a step may hold at once; all, if None. `bank` is divided by the layout."""
        self.settings = settings
        self.homes: list[list[str]] = [[] for _ in range(layout.shards)]
        for group in bank.groups:
            own = len(group.names) // layout.shards
            for i, home in enumerate(self.homes):
                home += [name for name in group.names[i * own : (i + 1) * own] if name is not None]
        limit = max(map(len, self.homes))
        if most is not None and most < layout.shards:
            raise ParaJaxError(
                f"a step cannot hold at most {most} tenants; choose at least {layout.shards}"
                + (", one for each device that they are spread over" if layout.shards > 1 else "")
            )
        self.places = limit if most is None else min(limit, most // layout.shards)

    def turn(self, taken: Mapping[str, int], resting: Collection[str]) -> list[list[str | None]] | None:
        """The tenants of the next step by home, None for an empty place; None when all are done.

        The same for the same arguments. Whoever has done the least share of its steps, over its weight, comes first:
        so all are done at about the same time, and few places stay empty at the end.
        """

        def share(name: str) -> float:
            return taken[name] / self.settings[name].steps / self.settings[name].weight

        waiting = [
            [name for name in home if name not in resting and taken[name] < self.settings[name].steps]
            for home in self.homes
        ]
        wanted = max(map(len, waiting))
        if not wanted:
            return None
        places = self.places
        while wanted <= places // 2:
            places //= 2
        chosen: list[list[str | None]] = []
        for home in waiting:
            behind = sorted(home, key=share)[:places]
            chosen.append([*sorted(behind, key=home.index), *[None] * (places - len(behind))])
        return chosen

    def left(self, taken: Mapping[str, int], resting: Collection[str]) -> int:
        """The steps that are still to come, if nobody leaves early."""
        rest = [
            [self.settings[n].steps - taken[n] for n in home if n not in resting and taken[n] < self.settings[n].steps]
            for home in self.homes
        ]
        return max((max(max(of), -(-sum(of) // self.places)) for of in rest if of), default=0)


def in_order(homes: Sequence[Sequence[str | None]], values: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What `train_step` reports, by key and tenant."""
    names = [name for home in homes for name in home]
    return {
        key: {name: float(x) for name, x in zip(names, of, strict=True) if name is not None}
        for key, of in values.items()
    }
