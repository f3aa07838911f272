"""Every tenant's adapter in one stack for each configuration, and the rows of a batch gathered from it."""

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
from para_jax.adapters.rows import Rows, Tenant, strengths_of
from para_jax.errors import ParaJaxError, unknown
from para_jax.sharding import row_sharding

if TYPE_CHECKING:
    from jax import Array
    from jax.sharding import Mesh
    from jaxtyping import Int


@partial(jax.tree_util.register_dataclass, data_fields=["stack"], meta_fields=["config", "names"])
@dataclass(frozen=True)
class Group:
    """The tenants of one configuration. Leaves of `stack` are (slots, layers, ...); a free slot's name is None."""

    config: MethodConfig
    names: tuple[str | None, ...]
    stack: Any

    def put(self, slot: int, name: str | None, layers: Any) -> Group:
        stack = jax.tree.map(lambda s, x: s.at[slot].set(x), self.stack, layers)
        return replace(self, names=(*self.names[:slot], name, *self.names[slot + 1 :]), stack=stack)

    def grown(self, slots: int) -> Group:
        more = slots - len(self.names)
        stack = jax.tree.map(lambda s: jnp.concatenate([s, jnp.zeros((more, *s.shape[1:]), s.dtype)]), self.stack)
        return replace(self, names=self.names + (None,) * more, stack=stack)


@partial(jax.tree_util.register_dataclass, data_fields=["groups"], meta_fields=["shape"])
@dataclass(frozen=True)
class AdapterBank:
    """Named adapters, stacked. Immutable: `add`, `replace` and `remove` return another bank.

    Programs take the `rows` of a batch and never the bank, so they do not depend on which tenants there are.

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

        A tenant's weights depend on `seed` and its name only, not on the other tenants. `capacity` reserves that
        many slots for each configuration; without it, a bank that is full doubles when a tenant is added.
        """
        key = jax.random.key(seed)
        keys = {name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in configs}
        return cls.stack({name: Adapter.create(c, shape, keys[name]) for name, c in configs.items()}, shape, capacity)

    @classmethod
    def stack(cls, adapters: Mapping[str, Adapter], shape: BackboneShape, capacity: int = 0) -> AdapterBank:
        """A bank of these adapters, each configuration's stacked at once.

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
        cls,
        folders: Mapping[str, str | Path],
        shape: BackboneShape,
        capacity: int = 0,
        *,
        check_finite: bool = True,
    ) -> AdapterBank:
        """Reads each tenant's folder as `load_adapter` does, which has the same `check_finite` and raises the same."""
        adapters = {name: load_adapter(path, shape, check_finite=check_finite) for name, path in folders.items()}
        return cls.stack(adapters, shape, capacity)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group.names if name is not None)

    def _find(self, name: str) -> tuple[int, int]:
        for g, group in enumerate(self.groups):
            if name in group.names:
                return g, group.names.index(name)
        raise unknown("tenant", name, self.names)

    def find(self, name: str) -> tuple[Group, int]:
        """A tenant's group and its slot there. Raises ParaJaxError, with the nearest name, if there is none."""
        g, slot = self._find(name)
        return self.groups[g], slot

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Adapter:
        """One tenant's adapter. Raises ParaJaxError, with the nearest name, if there is none."""
        g, slot = self._find(name)
        return Adapter(self.groups[g].config, jax.tree.map(lambda x: x[slot], self.groups[g].stack))

    def _with(self, g: int, group: Group) -> AdapterBank:
        return replace(self, groups=(*self.groups[:g], group, *self.groups[g + 1 :]))

    def add(self, name: str, adapter: Adapter) -> AdapterBank:
        """One more tenant, in a free slot if its configuration has one; else that configuration's slots double.

        Raises ParaJaxError if the name is taken, which `replace` is for, or the adapter does not fit the backbone.
        """
        if name in self:
            raise ParaJaxError(f"tenant {name!r} is in the bank already; use replace() to change its adapter")
        adapter.check(self.shape)
        for g, group in enumerate(self.groups):
            if group.config == adapter.config:
                if None not in group.names:
                    group = group.grown(2 * len(group.names))
                return self._with(g, group.put(group.names.index(None), name, adapter.layers))
        return replace(self, groups=(*self.groups, *AdapterBank.stack({name: adapter}, self.shape).groups))

    def remove(self, name: str) -> AdapterBank:
        """Frees the tenant's slot and clears its weights. A configuration goes with its last tenant."""
        g, slot = self._find(name)
        group = self.groups[g]
        group = group.put(slot, None, jax.tree.map(lambda x: jnp.zeros_like(x[0]), group.stack))
        if any(n is not None for n in group.names):
            return self._with(g, group)
        return replace(self, groups=self.groups[:g] + self.groups[g + 1 :])

    def replace(self, name: str, adapter: Adapter) -> AdapterBank:
        """The tenant's next version. A running batch keeps what it was prepared with.

        Raises ParaJaxError if there is no such tenant, or the adapter does not fit the backbone.
        """
        g, slot = self._find(name)
        adapter.check(self.shape)
        if self.groups[g].config == adapter.config:
            return self._with(g, self.groups[g].put(slot, name, adapter.layers))
        return self.remove(name).add(name, adapter)

    def rows(self, tenants: Sequence[Tenant], repeats: int = 1, mesh: Mesh | None = None) -> Rows:
        """Gathers the adapters of a batch whose rows belong to `tenants`, each for `repeats` consecutive rows.

        A row's entry is a tenant's name, None for no adapter, or a dict of names and strengths: `{"acme": 0.5}` takes
        half of what acme's adapter changes, and with several names their changes are added. Configurations that no
        row uses cost nothing. A batch of None only gets the identity and the adapter-free program. On a mesh each
        device gets the adapters of its own rows.
        """
        wanted = [{self._find(name): strength for name, strength in strengths_of(row).items()} for row in tenants]
        # Strength 0 is no adapter, though a name has to be known even then.
        places = [{place: strength for place, strength in row.items() if strength} for row in wanted]
        strengths, layers, rates = [], [], []
        for g, group in enumerate(self.groups):
            # A row may take several adapters of one configuration: the first of every row, the second, ...
            of_rows = [[(slot, s) for (at, slot), s in row.items() if at == g] for row in places]
            for turn in range(max(map(len, of_rows), default=0)):
                nothing = (len(group.names), 0.0)
                taken = [row[turn] if turn < len(row) else nothing for row in of_rows]
                strengths.append(jax.device_put(np.array([s for _, s in taken], np.float32)))
                slots = np.array([slot for slot, _ in taken], np.int32)
                layers.append(_gather(group.stack, slots) if mesh is None else _gather_apart(group.stack, slots, mesh))
                rates.append(group.config.dropout)
        composed = any(len(row) > 1 for row in places)
        return Rows(tuple(strengths), tuple(layers), tuple(rates), repeats=repeats, composed=composed)


@jax.jit
def _gather(stack: Any, slots: Int[Array, " rows"]) -> Any:
    # Zeros for a slot past the end: no row gets the weights of a tenant that is not its own. Masked out later, they
    # could still reach its gradient, because zero times NaN is NaN.
    return jax.tree.map(lambda x: x.at[slots].get(mode="fill", fill_value=0), stack)


def _gather_apart(stack: Any, slots: Int[np.ndarray, " rows"], mesh: Mesh) -> Any:
    where = row_sharding(mesh, len(slots))

    def rows(x: Array) -> Array:
        def part(index: Any) -> Array:
            return _gather(x, slots[index[0]])

        return jax.make_array_from_callback((len(slots), *x.shape[1:]), where, part)

    return jax.tree.map(rows, stack)


def batch_rows(
    bank: AdapterBank | None, tenants: Sequence[Tenant] | None, batch: int, mesh: Mesh | None = None
) -> Rows:
    """The adapters of a batch. Raises ParaJaxError unless there is a tenant or None for every row."""
    if tenants is None:
        if bank is not None:
            raise ParaJaxError("a bank was given but no tenants; pass tenants=[...], a name or None for every row")
        return Rows()
    if isinstance(tenants, str | Mapping) or len(tenants) != batch:
        raise ParaJaxError(f"{batch} rows but tenants={tenants!r}; give a list of a name or None for every row")
    if not any(strengths_of(tenant) for tenant in tenants):
        return Rows()
    if bank is None:
        raise ParaJaxError("tenants were given but no bank; pass bank=AdapterBank.load({name: folder, ...}, config)")
    return bank.rows(tenants, mesh=mesh)
