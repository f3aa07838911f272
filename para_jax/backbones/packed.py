"""Packed rows: each row holds several sequences, and each sequence has its own Adjustment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from para_jax.adjustment import Adjustment

if TYPE_CHECKING:
    from jax import Array
    from jax.typing import ArrayLike
    from jaxtyping import Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segments:
    """The sequences of packed rows.

    Attributes:
      segment_bt: each token's sequence in its row; `count` for padding, which follows the last sequence.
      position_bt: each token's position in its sequence.
      length_bs: the length of each sequence.

    >>> segments = Segments.of(jnp.array([[2, 1, 0]]), 5)
    >>> segments.segment_bt.tolist(), segments.position_bt.tolist()
    ([[0, 0, 1, 3, 3]], [[0, 1, 0, 0, 0]])
    """

    segment_bt: Int[Array, "b t"]
    position_bt: Int[Array, "b t"]
    length_bs: Int[Array, "b s"]

    @classmethod
    def of(cls, lengths: Int[ArrayLike, "b s"], t: int) -> Segments:
        """The segments of rows with `t` tokens and sequences of these lengths. Empty sequences must come last."""
        length_bs = jnp.asarray(lengths)
        end_bs, column_1t = jnp.cumsum(length_bs, axis=1, dtype=jnp.int32), jnp.arange(t, dtype=jnp.int32)[None]
        inside_bt = column_1t < end_bs[:, -1:]
        segment_bt = jnp.sum(column_1t[..., None] >= end_bs[:, None], axis=2, dtype=jnp.int32)
        segments = cls(segment_bt, jnp.zeros_like(segment_bt), length_bs)
        position_bt = jnp.where(inside_bt, column_1t - segments.each(end_bs - length_bs), 0)
        return replace(segments, position_bt=position_bt)

    @property
    def count(self) -> int:
        """The largest number of sequences in a row."""
        return self.length_bs.shape[1]

    @property
    def mask_bt(self) -> Bool[Array, "b t"]:
        """False for padding."""
        return self.segment_bt < self.count

    def each(self, x_bs: Int[Array, "b s"]) -> Int[Array, "b t"]:
        """Gathers a number per sequence for each of its tokens; 0 for padding."""
        return jnp.sum(jnp.where(self._one_hot(), x_bs[:, None], 0), axis=2)

    def _one_hot(self) -> Bool[Array, "b t s"]:
        return self.segment_bt[..., None] == jnp.arange(self.count)[None, None]

    def masks(self, mask_bt: Bool[Array, "b t"]) -> Bool[Array, "b s t"]:
        """Splits a mask into one mask per sequence."""
        return self._one_hot().swapaxes(1, 2) & mask_bt[:, None]

    def apply(
        self,
        adjustment: Adjustment,
        site: str,
        x: Float[Array, "b t inputs"],
        y: Float[Array, "b t features"],
        prompt_bt: Bool[Array, "b t"],
    ) -> Float[Array, "b t features"]:
        """`Adjustment.apply` with offsets (b, s, features) per sequence, which are gathered for each token."""

        def per_token(x_bsf: Array) -> Array:
            return x_bsf[:, 0] if self.count == 1 else _gather(x_bsf, self.segment_bt)

        return adjustment.at(site).per_row(per_token).apply(site, x, y, prompt_bt)


@jax.custom_vjp
def _gather(x_bsf: Float[Array, "b s f"], segment_bt: Int[Array, "b t"]) -> Float[Array, "b t f"]:
    """Gathers the entry of each token's sequence; zeros for padding."""
    return jax.vmap(lambda x, s: x.at[s].get(mode="fill", fill_value=0))(x_bsf, segment_bt)


def _gather_backward(saved: tuple[Array, int], g_btf: Float[Array, "b t f"]) -> tuple[Float[Array, "b s f"], None]:
    # A matmul sums in a fixed order. The transpose of a gather is a scatter, which sums in any order on a GPU and is
    # sequential on a CPU.
    segment_bt, count = saved
    one_hot = (segment_bt[..., None] == jnp.arange(count)[None, None]).astype(g_btf.dtype)
    return jnp.einsum("bts,btf->bsf", one_hot, g_btf, preferred_element_type=jnp.float32).astype(g_btf.dtype), None


_gather.defvjp(lambda x, s: (_gather(x, s), (s, x.shape[1])), _gather_backward)
