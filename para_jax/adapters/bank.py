"""Every tenant's adapter in one stack for each configuration, and the rows of a batch gathered from it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from para_jax.adapters.method import BackboneShape, MethodConfig, Prompt
from para_jax.adjustment import Adjustment, Dropout, total
from para_jax.errors import ParaJaxError, unknown
from para_jax.sharding import row_sharding

if TYPE_CHECKING:
    from jax import Array
    from jax.sharding import Mesh
    from jaxtyping import Float, Int, Key

# A row of a batch: one tenant, none, or several with strengths.
Tenant = str | None | Mapping[str, float]


@partial(
    jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=["config"], drop_fields=["chat_template"]
)
@dataclass(frozen=True)
class Adapter:
    """One tenant's trained weights: a method's layer with every leaf stacked over the layers, float32.

    `chat_template` is the text that `load_adapter` found beside the weights, which `save_adapter` puts there again.
    No program depends on it: it is no part of the pytree, and what `jax.tree.map` or a bank makes has none.
    """

    config: MethodConfig
    layers: Any
    chat_template: str | None = None

    @classmethod
    def create(cls, config: MethodConfig, shape: BackboneShape, key: Array) -> Adapter:
        """A fresh adapter, which is the identity."""
        return cls(config, _fresh(config, shape, key))

    def tensors(self) -> dict[str, Array]:
        """The weights by name: `down` (layers, d, r), and so on."""
        return named_leaves(self.layers)

    def check(self, shape: BackboneShape) -> None:
        """Raises ParaJaxError, with all that is wrong, unless the weights are float32 and fit this backbone."""
        problems = mismatches(self.tensors(), self.config, shape)
        if problems:
            raise ParaJaxError(f"an adapter does not fit the backbone it is used with: {'; '.join(problems)}")


@partial(jax.jit, static_argnums=(0, 1))
def _fresh(config: MethodConfig, shape: BackboneShape, key: Array) -> Any:
    keys = jax.random.split(key, shape.num_hidden_layers)
    return jax.vmap(lambda k, i: config.layer(shape, nnx.Rngs(k), i))(keys, jnp.arange(shape.num_hidden_layers))


@lru_cache(maxsize=64)
def abstract_layers(config: MethodConfig, shape: BackboneShape) -> Any:
    """The layers of an adapter with shapes and dtypes only."""
    return jax.eval_shape(partial(_fresh, config, shape), jax.random.key(0))


def mismatches(tensors: Mapping[str, Any], config: MethodConfig, shape: BackboneShape) -> list[str]:
    """All that keeps these arrays, by name, from being an adapter's weights."""
    expected = named_leaves(abstract_layers(config, shape))
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not expected" for name in tensors if name not in expected]
    for name, x in tensors.items():
        if name in expected and (x.shape != expected[name].shape or x.dtype != np.float32):
            problems.append(f"{name} is {x.dtype}{list(x.shape)}, not float32{list(expected[name].shape)}")
    return problems


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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["strengths", "layers", "keys_b"],
    meta_fields=["rates", "repeats", "composed"],
)
@dataclass(frozen=True)
class Rows:
    """The adapters of a batch's rows: all that a program sees of a bank.

    Each adapter row serves `repeats` consecutive rows of the batch, so that rows of one tenant share one copy of its
    weights and their gradients are summed in a fixed order. With no entries this is the identity, at no cost.

    Attributes:
      strengths: for each configuration in use, how much of its adapter each row takes; 0 where it takes none.
      layers: for each configuration, a method's layer with leaves (rows, layers, ...).
      rates: for each configuration in use, the dropout of its pairs' inputs while training.
      keys_b: a random key for each row of the batch, only while training: without it nothing is ever dropped.
      composed: whether a row takes more than one adapter.
    """

    strengths: tuple[Float[Array, "rows"], ...] = ()
    layers: tuple[Any, ...] = ()
    rates: tuple[float, ...] = ()
    keys_b: Key[Array, "b"] | None = None
    repeats: int = 1
    composed: bool = False

    def per_layer(self) -> tuple[Any, ...]:
        """`layers` with the layer axis in front, as a loop over the backbone's layers wants it."""
        return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), self.layers)

    def prepare(self, layers: tuple[Any, ...], layer: int | Int[Array, ""], prompt: Prompt) -> Adjustment:
        """Prepares the adapters of layer number `layer`, one entry of `per_layer`, for the whole batch.

        Raises ParaJaxError if these are not the rows of this batch.
        """
        b = prompt.mask_t.shape[0]
        served = [strength.size * self.repeats for strength in self.strengths]
        if any(count != b for count in served):
            raise ParaJaxError(f"a batch of {b} rows was given the adapters of {served[0]}")
        grouped = jax.tree.map(lambda x: x.reshape(b // self.repeats, self.repeats, *x.shape[1:]), prompt)

        def one(adapter: Any, prompt: Prompt) -> tuple[Any, Any]:
            made = adapter.prepare(prompt, layer)
            return (made.offsets, made.later), made.pairs

        # Low-rank pairs do not depend on the prompt, and stay one for all the rows that share them.
        prepare = jax.vmap(jax.vmap(one, in_axes=(None, 0), out_axes=(0, None)))
        adjustments = []
        for strength, adapters in zip(self.strengths, layers, strict=True):
            scales, pairs = prepare(adapters, grouped)
            offsets, later = jax.tree.map(lambda x: x.reshape(b, x.shape[-1]), scales)
            adjustments.append(Adjustment(offsets, later, pairs).weighted(jnp.repeat(strength, self.repeats)))
        adjustment = total(adjustments, disjoint=not self.composed)
        if self.keys_b is None or not any(self.rates):
            return adjustment
        rate = jnp.zeros_like(self.strengths[0])
        for strength, own in zip(self.strengths, self.rates, strict=True):
            rate = jnp.where(strength != 0, own, rate)
        keys_b = jax.vmap(lambda key: jax.random.fold_in(key, layer))(self.keys_b)
        return replace(adjustment, dropout=Dropout(keys_b, jnp.repeat(rate, self.repeats)))


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
                strengths.append(jnp.asarray(np.array([s for _, s in taken], np.float32)))
                slots = np.array([slot for slot, _ in taken], np.int32)
                layers.append(_gather(group.stack, slots) if mesh is None else _gather_apart(group.stack, slots, mesh))
                rates.append(getattr(group.config, "lora_dropout", 0.0))
        composed = any(len(row) > 1 for row in places)
        return Rows(tuple(strengths), tuple(layers), tuple(rates), repeats=repeats, composed=composed)


def strengths_of(tenant: Tenant) -> dict[str, float]:
    """A row's adapters and how much of each it takes.

    Raises ParaJaxError for what is no tenant, or a strength that is no finite number.

    >>> strengths_of("acme"), strengths_of(None), strengths_of({"acme": 0.5, "globex": 2})
    ({'acme': 1.0}, {}, {'acme': 0.5, 'globex': 2.0})
    """
    if tenant is None:
        return {}
    if isinstance(tenant, str):
        return {tenant: 1.0}
    if not isinstance(tenant, Mapping):
        raise ParaJaxError(f"a row's tenant is a name, None, or a dict of names and strengths, not {tenant!r}")
    for name, strength in tenant.items():
        if not isinstance(strength, Real) or isinstance(strength, bool) or not np.isfinite(strength):
            raise ParaJaxError(f"the strength of {name!r} must be a finite number, not {strength!r}")
    return {name: float(strength) for name, strength in tenant.items()}


@jax.jit
def _gather(stack: Any, slots: Int[Array, "rows"]) -> Any:
    # Zeros for a slot past the end: no row gets the weights of a tenant that is not its own. Masked out later, they
    # could still reach its gradient, because zero times NaN is NaN.
    return jax.tree.map(lambda x: x.at[slots].get(mode="fill", fill_value=0), stack)


def _gather_apart(stack: Any, slots: Int[np.ndarray, "rows"], mesh: Mesh) -> Any:
    where = row_sharding(mesh, len(slots))

    def rows(x: Array) -> Array:
        def part(index: Any) -> Array:
            return _gather(x, slots[index[0]])

        return jax.make_array_from_callback((len(slots), *x.shape[1:]), where, part)

    return jax.tree.map(rows, stack)
