"""The state of a batch during decoding: the KV cache and the Adjustments."""

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
    """A KV cache. All rows write the same column, so prompts are left-padded.

    Attributes:
      keys, values: a tuple with one array per layer, or one stacked array (l, b, k, s, hd).
      valid_bs: which columns hold a token.
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

        valid = jnp.zeros((batch, length), bool)
        return cls(zeros(), zeros(), valid, jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32))

    def admit(self, mask_bt: Bool[Array, "b t"]) -> Cache:
        """Advances by t columns and marks those that hold a token."""
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
        """Writes a layer's new keys and values at `column`."""

        def update(layers: Array | tuple[Array, ...], x: Array) -> Array | tuple[Array, ...]:
            if isinstance(layers, tuple):
                at = int(layer)
                new = jax.lax.dynamic_update_slice(layers[at], x, (0, 0, column, 0))
                return (*layers[:at], new, *layers[at + 1 :])
            return jax.lax.dynamic_update_slice(layers, x[None], (layer, 0, 0, column, 0))

        return replace(self, keys=update(self.keys, k), values=update(self.values, v))

    def with_row_major_layout(self, mesh: Mesh | None) -> Cache:
        """Constrains stacked keys and values to the row-major layout, for use in a loop over layers.

        Otherwise the TPU compiler chooses another layout in the loop, and needs a second cache for the conversion.
        """

        def pin(x: Array) -> Array:
            return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

        if mesh is not None:  # without shard_map, XLA would gather the cache
            layer_spec = P(None, rows_axes(mesh, self.valid_bs.shape[0]), "tensor")
            pin = jax.shard_map(pin, mesh=mesh, in_specs=layer_spec, out_specs=layer_spec)
        return replace(self, keys=jax.tree.map(pin, self.keys), values=jax.tree.map(pin, self.values))

    def read(self, layer: int | Int[Array, ""]) -> tuple[Float[Array, "b k s hd"], Float[Array, "b k s hd"]]:
        """A layer's keys and values."""
        return self.keys[layer], self.values[layer]

    def rows(self, index_b: Int[Array, " b"]) -> Cache:
        """Gathers rows of the batch; beam search reorders rows with it."""

        def gather(layers: Array | tuple[Array, ...]) -> Array | tuple[Array, ...]:
            if isinstance(layers, tuple):
                return tuple(x[index_b] for x in layers)
            return layers[:, index_b]

        valid_bs, position_b = self.valid_bs[index_b], self.position_b[index_b]
        return Cache(gather(self.keys), gather(self.values), valid_bs, self.column, position_b)


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "adjustments"], meta_fields=[])
@dataclass(frozen=True)
class DecodeState:
    """The state of a batch during decoding. It has each layer's Adjustment, but no tenants and no adapters."""

    cache: Cache
    adjustments: Any

    def repeated(self, times: int) -> DecodeState:
        """Repeats each row `times` times, for beam search."""
        stacked = not isinstance(self.adjustments, tuple)

        def repeat(adjustment: Adjustment) -> Adjustment:
            return adjustment.per_row(lambda x: jnp.repeat(x, times, axis=1 if stacked else 0))

        index = jnp.repeat(jnp.arange(self.cache.position_b.shape[0]), times)
        adjustments = repeat(self.adjustments) if stacked else tuple(repeat(one) for one in self.adjustments)
        return DecodeState(self.cache.rows(index), adjustments)
