"""The state of a batch during decoding: the KV cache and the Adjustments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from para_jax.adjustment import Adjustment
from para_jax.backbones.layers import At
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
      keys, values: an array for each stack of layers (l, b, k, s, hd), or for each unstacked layer (b, k, s, hd); None
        for layers that share those of another.
      valid_bs: which columns hold a token.
      column: the next column to write.
      position_b: each row's next position.
    """

    keys: tuple[Float[Array, "*l b k s hd"] | None, ...]
    values: tuple[Float[Array, "*l b k s hd"] | None, ...]
    valid_bs: Bool[Array, "b s"]
    column: Int[Array, ""]
    position_b: Int[Array, " b"]

    @classmethod
    def create(cls, config: BackboneConfig, batch: int, length: int, dtype: jnp.dtype, stacked: bool) -> Cache:
        """An empty cache of `length` columns."""

        def zeros(layer: int, leading: tuple[int, ...]) -> Array | None:
            kind = config.kind(layer)
            k, _, hd = config.heads(kind)
            return None if kind.values == "shared" else jnp.zeros((*leading, batch, k, length, hd), dtype)

        def empty() -> tuple[Array | None, ...]:
            if stacked:
                return tuple(zeros(stack.layers[0], (len(stack.layers),)) for stack in config.stacks)
            return tuple(zeros(layer, ()) for layer in range(config.num_hidden_layers))

        valid = jnp.zeros((batch, length), bool)
        return cls(empty(), empty(), valid, jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32))

    def admit(self, mask_bt: Bool[Array, "b t"]) -> Cache:
        """Advances by t columns and marks those that hold a token."""
        valid = jax.lax.dynamic_update_slice(self.valid_bs, mask_bt, (0, self.column))
        length = jnp.sum(mask_bt, axis=1, dtype=jnp.int32)
        return replace(self, valid_bs=valid, column=self.column + mask_bt.shape[1], position_b=self.position_b + length)

    @property
    def batch_axis(self) -> int:
        """The axis of the batch's rows in keys, values and Adjustments: 1 if layers are stacked, else 0."""
        return next(x.ndim for x in self.keys if x is not None) - 4

    def write(
        self,
        at: At,
        column: Int[Array, ""],
        k: Float[Array, "b k t hd"],
        v: Float[Array, "b k t hd"],
    ) -> Cache:
        """Writes a layer's new keys and values at `column`."""

        def update(arrays: tuple[Array | None, ...], x: Array) -> tuple[Array | None, ...]:
            old = arrays[at.slot]
            assert old is not None
            if at.depth is None:
                new = jax.lax.dynamic_update_slice(old, x, (0, 0, column, 0))
            else:
                new = jax.lax.dynamic_update_slice(old, x[None], (at.depth, 0, 0, column, 0))
            return (*arrays[: at.slot], new, *arrays[at.slot + 1 :])

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

    def read(self, at: At) -> tuple[Float[Array, "b k s hd"], Float[Array, "b k s hd"]]:
        """A layer's keys and values."""
        keys, values = self.keys[at.slot], self.values[at.slot]
        assert keys is not None and values is not None
        return (keys, values) if at.depth is None else (keys[at.depth], values[at.depth])

    def rows(self, index_b: Int[Array, " b"]) -> Cache:
        """Gathers rows of the batch; beam search reorders rows with it."""

        gather = (lambda x: x[:, index_b]) if self.batch_axis else (lambda x: x[index_b])
        keys, values = jax.tree.map(gather, (self.keys, self.values))
        return Cache(keys, values, self.valid_bs[index_b], self.column, self.position_b[index_b])


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "adjustments"], meta_fields=[])
@dataclass(frozen=True)
class DecodeState:
    """The state of a batch during decoding: the cache, and the Adjustments by stack or by unstacked layer.

    It has no tenants and no adapters.
    """

    cache: Cache
    adjustments: tuple[Adjustment, ...]

    def repeated(self, times: int) -> DecodeState:
        """Repeats each row `times` times, for beam search."""
        repeat = partial(jnp.repeat, repeats=times, axis=self.cache.batch_axis)
        index = jnp.repeat(jnp.arange(self.cache.position_b.shape[0]), times)
        return DecodeState(self.cache.rows(index), tuple(one.per_row(repeat) for one in self.adjustments))
