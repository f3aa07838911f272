"""The state of a run, its tenants' rules, what a step sums up, and where all of it lies on a mesh."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.adapters.adapter import named_leaves
from para_jax.adapters.bank import AdapterBank, Group
from para_jax.distributed import shard
from para_jax.sharding import adapter_spec
from para_jax.training import optimizer
from para_jax.training.settings import Optimizer

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int


@partial(
    jax.tree_util.register_dataclass, data_fields=["step", "bank", "moments", "taken", "failed_at"], meta_fields=[]
)
@dataclass(frozen=True)
class TrainState:
    """All that training changes.

    Attributes:
      step: steps done.
      bank: the adapters, float32. A free slot is never trained.
      moments: for each group of the bank, its tenants' AdamW moments.
      taken: for each group, the steps that each of its tenants has taken, (slots,).
      failed_at: for each group, the step, counted from one, at which a tenant's gradient was no number; zero if
        none was. It has not changed since.
    """

    step: Int[Array, ""]
    bank: AdapterBank
    moments: tuple[Any, ...]
    taken: tuple[Int[Array, " slots"], ...]
    failed_at: tuple[Int[Array, " slots"], ...]

    @classmethod
    def shapes(cls, bank: AdapterBank) -> TrainState:
        """The shapes of a state for this bank."""

        def fresh(bank: AdapterBank) -> TrainState:
            moments = tuple(jax.vmap(optimizer.init)(group.stack) for group in bank.groups)
            zeros = tuple(jnp.zeros((len(group.names),), jnp.int32) for group in bank.groups)
            return cls(jnp.zeros((), jnp.int32), bank, moments, zeros, zeros)

        return jax.eval_shape(fresh, bank)

    @classmethod
    def create(cls, bank: AdapterBank, mesh: Mesh | None = None, shards: int = 1) -> TrainState:
        """The state before the first step. It copies the bank's arrays: steps donate them.

        With a mesh it lies on it, its tenants in `shards` parts (one, or as many as there are groups of rows). It is
        made by the host, which compiles nothing.
        """
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), cls.shapes(bank))
        state = replace(zeros, bank=jax.tree.map(np.array, jax.device_get(bank)))
        return jax.device_put(state, None if mesh is None else shardings(state, mesh, shards))

    def arranged(
        self, saved: TrainState, slots: Sequence[Sequence[str | None]], mesh: Mesh | None, shards: int
    ) -> TrainState:
        """A saved state whose tenants had other `slots`, by group of the bank, with them where they are in this one."""
        if [list(group.names) for group in self.bank.groups] == [list(names) for names in slots]:
            return saved

        def arrange(saved: TrainState) -> TrainState:
            groups = [
                moved((was.stack, moments, taken, failed_at), old, group.names)
                for group, was, moments, taken, failed_at, old in zip(
                    self.bank.groups, saved.bank.groups, saved.moments, saved.taken, saved.failed_at, slots, strict=True
                )
            ]
            bank = [replace(g, stack=stack) for g, (stack, *_) in zip(self.bank.groups, groups, strict=True)]
            _, *others = zip(*groups, strict=True)
            return TrainState(saved.step, replace(self.bank, groups=tuple(bank)), *others)

        where = None if mesh is None else shardings(self, mesh, shards)
        return jax.jit(arrange, out_shardings=where)(saved)


def moved(tree: Any, old: Sequence[str | None], new: Sequence[str | None]) -> Any:
    """Arrays whose first axis is the slots of `old`, as those of the slots of `new`; a free slot has zeros."""
    source = np.array([len(old) if name is None else old.index(name) for name in new], np.int32)
    return jax.tree.map(lambda x: x.at[source].get(mode="fill", fill_value=0), tree)


def shardings(state: TrainState, mesh: Mesh, shards: int) -> TrainState:
    """Where each array of a state lies: tenants apart if the adapters are spread, features as in the backbone."""
    tenants = ("data", "fsdp") if shards > 1 else None
    groups = state.bank.groups
    of_slots, of_step = NamedSharding(mesh, P(tenants)), NamedSharding(mesh, P())
    return TrainState(
        cast("Any", of_step),
        replace(state.bank, groups=tuple(replace(g, stack=_where(g, g.stack, mesh, tenants)) for g in groups)),
        tuple(_where(group, moments, mesh, tenants) for group, moments in zip(groups, state.moments, strict=True)),
        *(jax.tree.map(lambda _: of_slots, of) for of in (state.taken, state.failed_at)),
    )


def _where(group: Group, tree: Any, mesh: Mesh, tenants: tuple[str, ...] | None) -> Any:
    """The shardings of arrays that are stacked like a group's adapters."""

    def of(name: str, x: Any) -> NamedSharding:
        return NamedSharding(mesh, adapter_spec(group.config.axes(name), x.shape, mesh, tenants))

    return jax.tree.unflatten(jax.tree.structure(tree), [of(name, x) for name, x in named_leaves(tree).items()])


@partial(jax.tree_util.register_dataclass, data_fields=["optimizer", "name"], meta_fields=[])
@dataclass(frozen=True)
class Rules:
    """How the tenants of one group of the bank are tuned: their optimizers, and a number of each one's name."""

    optimizer: Optimizer
    name: Int[np.ndarray, " slots"]


def stack_settings(bank: AdapterBank, settings: Mapping[str, Optimizer]) -> tuple[Rules, ...]:
    """The settings of each group's tenants, in the order of its slots. A free slot takes no steps."""
    return tuple(
        Rules(
            Optimizer.stack([Optimizer(steps=0) if name is None else settings[name] for name in group.names]),
            np.array([zlib.crc32((name or "").encode()) for name in group.names], np.uint32),
        )
        for group in bank.groups
    )


Slots = tuple["Int[np.ndarray, 'g n']", ...]


def slots_of(bank: AdapterBank, tenants: Sequence[str], groups: int = 1) -> Slots:
    """The places of these tenants in each group of the bank, for each of so many groups of rows.

    A tenant that is in another group of the bank has the number of slots there, which is past the last.
    """
    where = [
        [group.names.index(name) if name in group.names else len(group.names) for name in tenants]
        for group in bank.groups
    ]
    return tuple(np.tile(np.array(slots, np.int32), (groups, 1)) for slots in where)


@partial(jax.tree_util.register_dataclass, data_fields=["gradient", "loss"], meta_fields=[])
@dataclass(frozen=True)
class Sums:
    """What a step's micro-batches add up.

    Attributes:
      gradient: for each group of the bank a stack (g * n, ...), float32: what each group of rows gives for the tenants
        in its n places.
      loss: (g, n) each group's part of the losses.
    """

    gradient: tuple[Any, ...]
    loss: Float[Array, "g n"]

    @classmethod
    def shapes(cls, bank: AdapterBank, groups: int, places: int) -> Sums:
        """The shapes of the sums for this bank."""

        def of(stack: Any) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct((groups * places, *x.shape[1:]), jnp.float32), stack)

        loss: Any = jax.ShapeDtypeStruct((groups, places), jnp.float32)
        return cls(tuple(of(group.stack) for group in bank.groups), loss)

    @classmethod
    def create(cls, bank: AdapterBank, groups: int, places: int, mesh: Mesh | None = None) -> Sums:
        """Zeros, each group's on its own devices."""
        sums = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), cls.shapes(bank, groups, places))
        if mesh is None:
            return jax.device_put(sums)
        return jax.tree.map(shard, sums, sums_sharding(sums, bank, mesh))


def sums_sharding(sums: Sums, bank: AdapterBank, mesh: Mesh) -> Sums:
    """Where the arrays of Sums lie: each group's part on its own devices, features as in the backbone."""
    spread = ("data", "fsdp")
    gradient = tuple(_where(g, x, mesh, spread) for g, x in zip(bank.groups, sums.gradient, strict=True))
    where: Any = NamedSharding(mesh, P(spread))
    return Sums(gradient, where)
