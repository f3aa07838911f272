"""What a batch in flight holds: keys and values of the tokens so far, and the Adjustments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from para_jax.adjustment import Adjustment
from para_jax.config import BackboneConfig
from para_jax.sharding import rows_axes

if TYPE_CHECKING:
    from jax import Array
    from jax.sharding import Mesh
    from jaxtyping import Bool, Float, Int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "valid_bs", "column", "position_b"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Cache:
    """A batch's keys and values. All rows write the same column, so prompts stand flush right.

    Attributes:
      keys, values: (b, k, s, hd) for each layer in a tuple where layers are unrolled, or one (l, b, k, s, hd).
      valid_bs: which columns hold a token of the row.
      column: the next column to write.
      position_b: each row's next position.
    """

    keys: tuple[Float[Array, "b k s hd"], ...] | Float[Array, "l b k s hd"]
    values: tuple[Float[Array, "b k s hd"], ...] | Float[Array, "l b k s hd"]
    valid_bs: Bool[Array, "b s"]
    column: Int[Array, ""]
    position_b: Int[Array, " b"]

    @classmethod
    def create(cls, config: BackboneConfig, batch: int, length: int, dtype: jnp.dtype, stacked: bool) -> Cache:
        """An empty cache of `length` columns."""
        shape = (batch, config.num_key_value_heads, length, config.head_dim)

        def zeros() -> Array | tuple[Array, ...]:
            if stacked:
                return jnp.zeros((config.num_hidden_layers, *shape), dtype)
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers))

        nothing = jnp.zeros((batch, length), bool)
        return cls(zeros(), zeros(), nothing, jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32))

    def admit(self, mask_bt: Bool[Array, "b t"]) -> Cache:
        """Marks the next t columns as holding the tokens that `mask_bt` marks, and moves on past them."""
        valid = jax.lax.dynamic_update_slice(self.valid_bs, mask_bt, (0, self.column))
        length = jnp.sum(mask_bt, axis=1, dtype=jnp.int32)
        return replace(self, valid_bs=valid, column=self.column + mask_bt.shape[1], position_b=self.position_b + length)

    def write(
        self,
        layer: int | Int[Array, ""],
        column: Int[Array, ""],
        k: Float[Array, "b k t hd"],
        v: Float[Array, "b k t hd"],
    ) -> Cache:
        """Puts a layer's new keys and values at `column`."""

        def put(where: Array | tuple[Array, ...], x: Array) -> Array | tuple[Array, ...]:
            if isinstance(where, tuple):
                at = int(layer)
                new = jax.lax.dynamic_update_slice(where[at], x, (0, 0, column, 0))
                return (*where[:at], new, *where[at + 1 :])
            return jax.lax.dynamic_update_slice(where, x[None], (layer, 0, 0, column, 0))

        return replace(self, keys=put(self.keys, k), values=put(self.values, v))

    def settled(self, mesh: Mesh | None) -> Cache:
        """The same, in the memory order that it has between programs. For stacked layers in a loop.

        The TPU's compiler would have the rows' axis next to the features there, and hold a second cache to turn
        the first one.
        """

        def pin(x: Array) -> Array:
            return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

        if mesh is not None:  # which XLA would gather for it
            where = P(None, rows_axes(mesh, self.valid_bs.shape[0]), "tensor")
            pin = jax.shard_map(pin, mesh=mesh, in_specs=where, out_specs=where)
        return replace(self, keys=jax.tree.map(pin, self.keys), values=jax.tree.map(pin, self.values))

    def read(self, layer: int | Int[Array, ""]) -> tuple[Float[Array, "b k s hd"], Float[Array, "b k s hd"]]:
        """A layer's keys and values, all columns."""
        return self.keys[layer], self.values[layer]

    def rows(self, index_b: Int[Array, " b"]) -> Cache:
        """The cache of these rows of the batch, as beam search reorders them."""

        def pick(where: Array | tuple[Array, ...]) -> Array | tuple[Array, ...]:
            if isinstance(where, tuple):
                return tuple(x[index_b] for x in where)
            return where[:, index_b]

        return Cache(pick(self.keys), pick(self.values), self.valid_bs[index_b], self.column, self.position_b[index_b])


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "adjustments"], meta_fields=[])
@dataclass(frozen=True)
class DecodeState:
    """All that a batch in flight holds: its keys and values, and each layer's Adjustment. No tenant, no adapter."""

    cache: Cache
    adjustments: Any

    def repeated(self, times: int) -> DecodeState:
        """The state of a batch with each row `times` times, one after the other, as beam search begins."""
        stacked = not isinstance(self.adjustments, tuple)

        def repeat(adjustment: Adjustment) -> Adjustment:
            return adjustment.per_row(lambda x: jnp.repeat(x, times, axis=1 if stacked else 0))

        of_row = jnp.repeat(jnp.arange(self.cache.position_b.shape[0]), times)
        adjustments = repeat(self.adjustments) if stacked else tuple(repeat(one) for one in self.adjustments)
        return DecodeState(self.cache.rows(of_row), adjustments)
