"""The state of a run, the stacked settings of its tenants, the sums of a step, and their shardings."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.adapters.adapter import named_leaves
from para_jax.adapters.bank import AdapterBank, Group
from para_jax.annotations import Array, Float, Int
from para_jax.distributed import shard
from para_jax.sharding import adapter_spec
from para_jax.training import optimizer
from para_jax.training.settings import Optimizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that training changes. Checkpoints use these field names.

    Attributes:
      step: the number of steps done.
      bank: the adapters, float32. Free slots are never trained.
      moments: for each group of the bank, the AdamW moments of its tenants.
      taken: for each group, the number of steps that each tenant has taken, (slots,).
      failed_at: for each group, the step, counted from one, at which a tenant's gradient was NaN or infinite; 0 if it
        never was. The tenant has not changed since.
    """

    step: Int[Array, ""]
    bank: AdapterBank
    moments: tuple[Any, ...]
    taken: tuple[Int[Array, " slots"], ...]
    failed_at: tuple[Int[Array, " slots"], ...]

    @classmethod
    def shapes(cls, bank: AdapterBank) -> TrainState:
        def fresh(bank: AdapterBank) -> TrainState:
            moments = tuple(jax.vmap(optimizer.init)(group.stack) for group in bank.groups)
            zeros = tuple(jnp.zeros((len(group.names),), jnp.int32) for group in bank.groups)
            return cls(jnp.zeros((), jnp.int32), bank, moments, zeros, zeros)

        return jax.eval_shape(fresh, bank)

    @classmethod
    def create(cls, bank: AdapterBank, mesh: Mesh | None = None, shards: int = 1) -> TrainState:
        """The state before the first step. It copies the bank's arrays, because steps donate them.

        With a mesh, the state is placed on it, with its tenants in `shards` shards: one, or the number of groups of
        rows. The host creates the arrays, so nothing is compiled.
        """
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), cls.shapes(bank))
        state = replace(zeros, bank=jax.tree.map(np.array, jax.device_get(bank)))
        return jax.device_put(state, None if mesh is None else shardings(state, mesh, shards))

    def rearrange(
        self, saved: TrainState, slots: Sequence[Sequence[str | None]], mesh: Mesh | None, shards: int
    ) -> TrainState:
        """A saved state with its tenants moved from `slots`, by group of the bank, to their slots in this state."""
        if [list(group.names) for group in self.bank.groups] == [list(names) for names in slots]:
            return saved

        def move_all(saved: TrainState) -> TrainState:
            groups = [
                move_slots((old.stack, moments, taken, failed_at), names, group.names)
                for group, old, moments, taken, failed_at, names in zip(
                    self.bank.groups, saved.bank.groups, saved.moments, saved.taken, saved.failed_at, slots, strict=True
                )
            ]
            bank = [replace(g, stack=stack) for g, (stack, *_) in zip(self.bank.groups, groups, strict=True)]
            _, *others = zip(*groups, strict=True)
            return TrainState(saved.step, replace(self.bank, groups=tuple(bank)), *others)

        out_shardings = None if mesh is None else shardings(self, mesh, shards)
        return jax.jit(move_all, out_shardings=out_shardings)(saved)


def move_slots(tree: Any, old: Sequence[str | None], new: Sequence[str | None]) -> Any:
    """Moves entries of the first axis from the slots of `old` names to those of `new` names; free slots are zero."""
    source = np.array([len(old) if name is None else old.index(name) for name in new], np.int32)
    return jax.tree.map(lambda x: x.at[source].get(mode="fill", fill_value=0), tree)


def shardings(state: TrainState, mesh: Mesh, shards: int) -> TrainState:
    """The sharding of each array of a state: tenants over the mesh if `shards` > 1, features as in the backbone."""
    tenants = ("data", "fsdp") if shards > 1 else None
    groups = state.bank.groups
    by_slot, replicated = NamedSharding(mesh, P(tenants)), NamedSharding(mesh, P())
    return TrainState(
        cast("Any", replicated),
        replace(state.bank, groups=tuple(replace(g, stack=_shardings(g, g.stack, mesh, tenants)) for g in groups)),
        tuple(_shardings(group, moments, mesh, tenants) for group, moments in zip(groups, state.moments, strict=True)),
        *(jax.tree.map(lambda _: by_slot, tree) for tree in (state.taken, state.failed_at)),
    )


def _shardings(group: Group, tree: Any, mesh: Mesh, tenants: tuple[str, ...] | None) -> Any:
    specs = [adapter_spec(group.config.axes(name), x.shape, mesh, tenants) for name, x in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), [NamedSharding(mesh, spec) for spec in specs])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rules:
    """The stacked settings of a group's tenants: their optimizers, and a hash of each name."""

    optimizer: Optimizer
    name: Int[np.ndarray, " slots"]


def stack_settings(bank: AdapterBank, settings: Mapping[str, Optimizer]) -> tuple[Rules, ...]:
    """The settings of each group's tenants, by slot. A free slot takes no steps."""
    return tuple(
        Rules(
            Optimizer.stack([Optimizer(steps=0) if name is None else settings[name] for name in group.names]),
            np.array([zlib.crc32((name or "").encode()) for name in group.names], np.uint32),
        )
        for group in bank.groups
    )


Slots = tuple["Int[np.ndarray, 'g n']", ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """The sums over a step's micro-batches.

    Attributes:
      gradient: for each group of the bank a stack (g * n, ...), float32: the gradients of each group of rows for the
        tenants at its n places.
      loss: (g, n) the losses of each group of rows.
    """

    gradient: tuple[Any, ...]
    loss: Float[Array, "g n"]

    @classmethod
    def shapes(cls, bank: AdapterBank, groups: int, places: int) -> Sums:
        shape: Any = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        stacks = tuple(group.stack for group in bank.groups)
        gradient = jax.tree.map(lambda x: shape((groups * places, *x.shape[1:])), stacks)
        return cls(gradient, shape((groups, places)))

    @classmethod
    def create(cls, bank: AdapterBank, groups: int, places: int, mesh: Mesh | None = None) -> Sums:
        """Zeros, sharded by group of rows."""
        sums = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), cls.shapes(bank, groups, places))
        if mesh is None:
            return jax.device_put(sums)
        return jax.tree.map(shard, sums, sums_sharding(sums, bank, mesh))


def sums_sharding(sums: Sums, bank: AdapterBank, mesh: Mesh) -> Sums:
    """The shardings of Sums: groups of rows over the mesh, features as in the backbone."""
    row_axes = ("data", "fsdp")
    gradient = tuple(_shardings(g, x, mesh, row_axes) for g, x in zip(bank.groups, sums.gradient, strict=True))
    loss: Any = NamedSharding(mesh, P(row_axes))
    return Sums(gradient, loss)
