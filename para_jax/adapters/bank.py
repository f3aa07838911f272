"""The bank: all tenants' adapters, stacked for each configuration. `rows` gathers the adapters of a batch."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from para_jax.adapters.adapter import Adapter
from para_jax.adapters.files import load_adapter
from para_jax.adapters.method import BackboneShape, MethodConfig
from para_jax.adapters.rows import Rows, Tenant, adapter_weights
from para_jax.annotations import Array, Int
from para_jax.errors import ParaJaxError, unknown
from para_jax.sharding import row_sharding

if TYPE_CHECKING:
    from jax.sharding import Mesh


@partial(jax.tree_util.register_dataclass, data_fields=["stack"], meta_fields=["config", "names"])
@dataclass(frozen=True)
class Group:
    """The tenants of one configuration. Leaves of `stack` are (slots, layers, ...). The name of a free slot is None."""

    config: MethodConfig
    names: tuple[str | None, ...]
    stack: Any

    def put(self, slot: int, name: str | None, layers: Any) -> Group:
        stack = jax.tree.map(lambda s, x: s.at[slot].set(x), self.stack, layers)
        return replace(self, names=(*self.names[:slot], name, *self.names[slot + 1 :]), stack=stack)

    def grown(self, slots: int) -> Group:
        added = slots - len(self.names)
        stack = jax.tree.map(lambda s: jnp.concatenate([s, jnp.zeros((added, *s.shape[1:]), s.dtype)]), self.stack)
        return replace(self, names=self.names + (None,) * added, stack=stack)


@partial(jax.tree_util.register_dataclass, data_fields=["groups"], meta_fields=["shape"])
@dataclass(frozen=True)
class AdapterBank:
    """Named adapters, stacked. A bank is immutable: `add`, `replace` and `remove` return a new bank.

    Compiled programs take the `rows` of a batch instead of the bank, so they do not depend on its tenants.

    >>> from para_jax import AdapterBank, BackboneConfig, ParaConfig, tiny_backbone_path
    >>> config = BackboneConfig.from_pretrained(tiny_backbone_path())
    >>> bank = AdapterBank.create({"acme": ParaConfig(r=4), "globex": ParaConfig(r=4)}, config)
    >>> bank.remove("acme").names
    ('globex',)
    """

    shape: BackboneShape
    groups: tuple[Group, ...] = ()

    @classmethod
    def create(
        cls, configs: Mapping[str, MethodConfig], shape: BackboneShape, seed: int = 0, capacity: int = 0
    ) -> AdapterBank:
        """Fresh adapters, each the identity.

        A tenant's weights depend only on `seed` and its name, not on the other tenants. `capacity` reserves that
        many slots for each configuration; without it, the slots double when a tenant is added to a full bank.
        """
        key = jax.random.key(seed)
        keys = {name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in configs}
        return cls.stack({name: Adapter.create(c, shape, keys[name]) for name, c in configs.items()}, shape, capacity)

    @classmethod
    def stack(cls, adapters: Mapping[str, Adapter], shape: BackboneShape, capacity: int = 0) -> AdapterBank:
        """Stacks these adapters in a bank.

        Raises ParaJaxError for an adapter that does not fit `shape`.
        """
        for adapter in adapters.values():
            adapter.check(shape)
        groups = []
        for config in dict.fromkeys(adapter.config for adapter in adapters.values()):
            members = {name: a.layers for name, a in adapters.items() if a.config == config}
            stack = jax.tree.map(lambda *x: jax.device_put(np.stack(x)), *members.values())
            group = Group(config, tuple(members), stack)
            groups.append(group.grown(capacity) if capacity > len(members) else group)
        return cls(shape, tuple(groups))

    @classmethod
    def load(
        cls, folders: Mapping[str, str | Path], shape: BackboneShape, capacity: int = 0, *, check_finite: bool = True
    ) -> AdapterBank:
        """Loads each tenant's folder with `load_adapter`, which explains `check_finite` and the errors."""
        adapters = {name: load_adapter(path, shape, check_finite=check_finite) for name, path in folders.items()}
        return cls.stack(adapters, shape, capacity)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group.names if name is not None)

    def find(self, name: str) -> tuple[Group, int]:
        """A tenant's group and slot. Raises ParaJaxError with the nearest name for an unknown tenant."""
        for group in self.groups:
            if name in group.names:
                return group, group.names.index(name)
        raise unknown("tenant", name, self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Adapter:
        """One tenant's adapter. Raises ParaJaxError with the nearest name for an unknown tenant."""
        group, slot = self.find(name)
        return Adapter(group.config, jax.tree.map(lambda x: x[slot], group.stack))

    def _with(self, group: Group) -> AdapterBank:
        """The bank with this group instead of its own of the same configuration."""
        return replace(self, groups=tuple(group if old.config == group.config else old for old in self.groups))

    def add(self, name: str, adapter: Adapter) -> AdapterBank:
        """Adds a tenant in a free slot of its configuration; if there is none, that configuration's slots double.

        Raises ParaJaxError if the bank has the name already, or the adapter does not fit the backbone.
        """
        if name in self:
            raise ParaJaxError(f"tenant {name!r} is in the bank already; use replace() to change its adapter")
        adapter.check(self.shape)
        for group in self.groups:
            if group.config == adapter.config:
                if None not in group.names:
                    group = group.grown(2 * len(group.names))
                return self._with(group.put(group.names.index(None), name, adapter.layers))
        return replace(self, groups=(*self.groups, *AdapterBank.stack({name: adapter}, self.shape).groups))

    def remove(self, name: str) -> AdapterBank:
        """Frees the tenant's slot and sets its weights to zero. A configuration is removed with its last tenant."""
        group, slot = self.find(name)
        bank = self._with(group.put(slot, None, jax.tree.map(lambda x: jnp.zeros_like(x[0]), group.stack)))
        return replace(bank, groups=tuple(g for g in bank.groups if any(n is not None for n in g.names)))

    def replace(self, name: str, adapter: Adapter) -> AdapterBank:
        """Replaces the tenant's adapter. Running batches keep the old one.

        Raises ParaJaxError for an unknown tenant, or an adapter that does not fit the backbone.
        """
        group, slot = self.find(name)
        adapter.check(self.shape)
        if group.config == adapter.config:
            return self._with(group.put(slot, name, adapter.layers))
        return self.remove(name).add(name, adapter)

    def rows(self, tenants: Sequence[Tenant], repeats: int = 1, mesh: Mesh | None = None) -> Rows:
        """Gathers the adapters of a batch. Each entry of `tenants` is for `repeats` consecutive rows.

        An entry is a tenant's name, None for no adapter, or a dict of names and adapter weights: `{"acme": 0.5}` takes
        half of acme's adapter, and several adapters are added. Configurations that no row uses cost nothing. If every
        entry is None, the result is the identity and runs the program without adapters. On a mesh, each device gets
        the adapters of its own rows.
        """
        found = [[(*self.find(name), weight) for name, weight in adapter_weights(row).items()] for row in tenants]
        # Weight 0 is no adapter, but its name must be known.
        places = [[(group, slot, weight) for group, slot, weight in row if weight] for row in found]
        weights, layers, rates = [], [], []
        for group in self.groups:
            in_group = [[(slot, weight) for of, slot, weight in row if of is group] for row in places]
            # A row may take several adapters of a configuration: entry i has adapter i of every row.
            for i in range(max(map(len, in_group), default=0)):
                no_adapter = (len(group.names), 0.0)
                entries = [row[i] if i < len(row) else no_adapter for row in in_group]
                weights.append(jax.device_put(np.array([weight for _, weight in entries], np.float32)))
                slots = np.array([slot for slot, _ in entries], np.int32)
                layers.append(_gather(group.stack, slots) if mesh is None else _gather_on(mesh, group.stack, slots))
                rates.append(group.config.dropout)
        composed = any(len(row) > 1 for row in places)
        return Rows(tuple(weights), tuple(layers), tuple(rates), repeats=repeats, composed=composed)


@jax.jit
def _gather(stack: Any, slots: Int[Array, " rows"]) -> Any:
    # An out-of-range slot gives zeros. Another tenant's weights, masked later, could still reach the row's gradient,
    # because zero times NaN is NaN.
    return jax.tree.map(lambda x: x.at[slots].get(mode="fill", fill_value=0), stack)


def _gather_on(mesh: Mesh, stack: Any, slots: Int[np.ndarray, " rows"]) -> Any:
    sharding = row_sharding(mesh, len(slots))

    def rows(x: Array) -> Array:
        def part(index: Any) -> Array:
            return _gather(x, slots[index[0]])

        return jax.make_array_from_callback((len(slots), *x.shape[1:]), sharding, part)

    return jax.tree.map(rows, stack)


def batch_rows(
    bank: AdapterBank | None, tenants: Sequence[Tenant] | None, batch: int, mesh: Mesh | None = None
) -> Rows:
    """The adapters of a batch. Raises ParaJaxError unless `tenants` has a tenant or None for every row."""
    if tenants is None:
        if bank is not None:
            raise ParaJaxError("a bank was given but no tenants; pass tenants=[...], a name or None for every row")
        return Rows()
    if isinstance(tenants, str | Mapping) or len(tenants) != batch:
        raise ParaJaxError(f"{batch} rows but tenants={tenants!r}; give a list of a name or None for every row")
    if not any(adapter_weights(tenant) for tenant in tenants):
        return Rows()
    if bank is None:
        raise ParaJaxError("tenants were given but no bank; pass bank=AdapterBank.load({name: folder, ...}, config)")
    return bank.rows(tenants, mesh=mesh)
