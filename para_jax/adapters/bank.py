"""Every tenant's adapter in one stack for each configuration, and the rows of a batch gathered from it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from para_jax.adapters.method import BackboneShape, MethodConfig
from para_jax.adjustment import Adjustment, merge
from para_jax.errors import ParaJaxError, unknown

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int


@partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=["config"])
@dataclass(frozen=True)
class Adapter:
    """One tenant's trained weights: a method's layer with every leaf stacked over the layers, float32."""

    config: MethodConfig
    layers: Any

    @classmethod
    def create(cls, config: MethodConfig, shape: BackboneShape, key: Array) -> Adapter:
        """A fresh adapter, which is the identity."""
        keys = jax.random.split(key, shape.num_hidden_layers)
        return cls(config, jax.vmap(lambda k: config.layer(shape, nnx.Rngs(k)))(keys))

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(x.size for x in jax.tree.leaves(self.layers))

    def tensors(self) -> dict[str, Array]:
        """The weights by name: `down` (layers, d, r), and so on."""
        return named_leaves(self.layers)


def named_leaves(tree: Any) -> dict[str, Array]:
    """The arrays of a Flax module by their dotted names."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): x for path, x in leaves}


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


@partial(jax.tree_util.register_dataclass, data_fields=["members", "layers"], meta_fields=["repeats"])
@dataclass(frozen=True)
class Rows:
    """The adapters of a batch's rows: all that a program sees of a bank.

    For each configuration, `layers` holds a method's layer with leaves (rows, layers, ...) and `members` which of
    those rows it serves. Each adapter row serves `repeats` consecutive rows of the batch, so that rows of one
    tenant share one copy of its weights and their gradients are summed in a fixed order. With no configuration
    this is the identity, at no cost.
    """

    members: tuple[Bool[Array, "rows"], ...] = ()
    layers: tuple[Any, ...] = ()
    repeats: int = field(default=1)

    def per_layer(self) -> tuple[Any, ...]:
        """`layers` with the layer axis in front, as a loop over the backbone's layers wants it."""
        return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), self.layers)

    def prepare(
        self, layers: tuple[Any, ...], hidden_btd: Float[Array, "b t d"], prompt_mask_bt: Bool[Array, "b t"]
    ) -> Adjustment:
        """Prepares one layer's adapters, one entry of `per_layer`, for the whole batch."""

        def one(layer: Any, hidden_td: Array, mask_t: Array) -> Adjustment:
            return layer.prepare(hidden_td, mask_t)

        rows = hidden_btd.shape[0] // self.repeats
        hidden, mask = (x.reshape(rows, self.repeats, *x.shape[1:]) for x in (hidden_btd, prompt_mask_bt))
        prepare = jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)))
        adjustments = []
        for layer, member in zip(layers, self.members, strict=True):
            adjustment = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), prepare(layer, hidden, mask))
            adjustments.append(adjustment.where(jnp.repeat(member, self.repeats)))
        return merge(adjustments)


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
    def stack(
        cls, adapters: Mapping[str, Adapter], shape: BackboneShape, capacity: int = 0
    ) -> AdapterBank:
        """A bank of these adapters, each configuration's stacked at once."""
        groups = []
        for config in dict.fromkeys(adapter.config for adapter in adapters.values()):
            members = {name: a.layers for name, a in adapters.items() if a.config == config}
            stack = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *members.values())
            group = Group(config, tuple(members), stack)
            groups.append(group.grown(capacity) if capacity > len(members) else group)
        return cls(shape, tuple(groups))

    @classmethod
    def load(cls, folders: Mapping[str, str | Path], shape: BackboneShape, capacity: int = 0) -> AdapterBank:
        """Reads each tenant's folder, as `save_adapter` or `para-jax finetune` wrote it."""
        from para_jax.adapters.files import load_adapter

        return cls.stack({name: load_adapter(path, shape) for name, path in folders.items()}, shape, capacity)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group.names if name is not None)

    def _find(self, name: str) -> tuple[int, int]:
        for g, group in enumerate(self.groups):
            if name in group.names:
                return g, group.names.index(name)
        raise unknown("tenant", name, self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Adapter:
        """One tenant's adapter. Raises ParaJaxError, with the nearest name, if there is none."""
        g, slot = self._find(name)
        return Adapter(self.groups[g].config, jax.tree.map(lambda x: x[slot], self.groups[g].stack))

    def _with(self, g: int, group: Group) -> AdapterBank:
        return replace(self, groups=(*self.groups[:g], group, *self.groups[g + 1 :]))

    def add(self, name: str, adapter: Adapter) -> AdapterBank:
        """Raises ParaJaxError if the name is taken: `replace` is for that."""
        if name in self:
            raise ParaJaxError(f"tenant {name!r} is in the bank already; use replace() to change its adapter")
        for g, group in enumerate(self.groups):
            if group.config == adapter.config:
                if None not in group.names:
                    group = group.grown(2 * len(group.names))
                return self._with(g, group.put(group.names.index(None), name, adapter.layers))
        return replace(self, groups=(*self.groups, *AdapterBank.stack({name: adapter}, self.shape).groups))

    def remove(self, name: str) -> AdapterBank:
        """Frees the tenant's slot and clears its weights."""
        g, slot = self._find(name)
        group = self.groups[g].put(slot, None, jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), self.groups[g].stack))
        if any(n is not None for n in group.names):
            return self._with(g, group)
        return replace(self, groups=self.groups[:g] + self.groups[g + 1 :])

    def replace(self, name: str, adapter: Adapter) -> AdapterBank:
        """The tenant's next version. A running batch keeps what it was prepared with."""
        g, slot = self._find(name)
        if self.groups[g].config == adapter.config:
            return self._with(g, self.groups[g].put(slot, name, adapter.layers))
        return self.remove(name).add(name, adapter)

    def rows(self, tenants: Sequence[str | None], repeats: int = 1) -> Rows:
        """Gathers the adapters of a batch whose rows belong to `tenants`, each for `repeats` consecutive rows.

        None is a row without an adapter. A batch of such rows only gets the identity and the adapter-free program.
        """
        places = [None if name is None else self._find(name) for name in tenants]
        if all(place is None for place in places):
            return Rows()
        members, layers = [], []
        for g, group in enumerate(self.groups):
            slots = np.array([p[1] if p is not None and p[0] == g else 0 for p in places], np.int32)
            members.append(jnp.asarray([p is not None and p[0] == g for p in places]))
            layers.append(_gather(group.stack, slots))
        return Rows(tuple(members), tuple(layers), repeats)


@jax.jit
def _gather(stack: Any, slots: Int[Array, "rows"]) -> Any:
    return jax.tree.map(lambda x: x[slots], stack)
