"""A batch of rows of different lengths with its tokens laid end to end, so that padding costs nothing but attention.

Norms, products and adjustments see one token at a time. They run on the tokens that are there; only attention, which
looks along a row, gets the padded form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from para_jax.adjustment import Adjustment

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int


class Line(NamedTuple):
    """The static sizes of a line.

    Attributes:
      tokens: places in the line, at least as many as there are tokens.
      short: columns that are enough for the shorter half of the rows (b // 2 of them).
    """

    tokens: int
    short: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ragged:
    """Where the tokens of a padded batch (b, t) lie in a line of n. Rows are padded on the right.

    Attributes:
      place_bt: each token's place in the line; n for padding.
      source_n: where in the b * t places of the batch each comes from; b * t at the end of the line, if it is
        longer than there are tokens.

    >>> ragged = Ragged.of(jnp.array([[True, True, False], [True, False, False]]), 4)
    >>> ragged.flat(jnp.array([[1, 2, 0], [3, 0, 0]])[..., None])[0, :, 0].tolist()
    [1, 2, 3, 0]
    >>> ragged.padded(jnp.array([[1, 2, 3, 9]])[..., None])[..., 0].tolist()
    [[1, 2, 0], [3, 0, 0]]
    """

    place_bt: Int[Array, "b t"]
    source_n: Int[Array, "n"]

    @property
    def mask_bt(self) -> Bool[Array, "b t"]:
        """Which places of the batch hold tokens."""
        return self.place_bt < self.source_n.size

    @classmethod
    def of(cls, mask_bt: Bool[Array, "b t"], n: int) -> Ragged:
        """A line of `n` places for the tokens that `mask_bt` marks, which are no more."""
        mask = mask_bt.reshape(-1)
        place = jnp.where(mask, jnp.cumsum(mask, dtype=jnp.int32) - 1, n)
        (source,) = jnp.nonzero(mask, size=n, fill_value=mask.size)
        return cls(place.reshape(mask_bt.shape), source.astype(jnp.int32))

    def halves(self, short: int) -> tuple[Ragged, ...]:
        """The longer half of the rows, and the shorter half with `short` columns, for the same line.

        What grows with the square of a row's length is cheaper in two batches than in one.
        """
        b, t = self.place_bt.shape
        long = b - b // 2
        order_b = jnp.argsort(-jnp.sum(self.mask_bt, axis=1), stable=True)
        rank_b = jnp.zeros_like(order_b).at[order_b].set(jnp.arange(b, dtype=order_b.dtype), unique_indices=True)
        column_n = self.source_n % t
        rank_n = rank_b.at[self.source_n // t].get(mode="fill", fill_value=b)
        parts = []
        for first, rows, columns in ((0, long, t), (long, b - long, short)):
            inside_n = (rank_n >= first) & (rank_n < first + rows)
            source_n = jnp.where(inside_n, (rank_n - first) * columns + column_n, rows * columns)
            parts.append(Ragged(self.place_bt[order_b[first : first + rows], :columns], source_n))
        return tuple(part for part in parts if part.place_bt.size)

    def flat(self, x_bt: Float[Array, "b t *f"]) -> Float[Array, "1 n *f"]:
        """The line of a padded batch, zeros where it is longer."""
        return _flat(x_bt, self)[None]

    def padded(self, x_n: Float[Array, "1 n *f"]) -> Float[Array, "b t *f"]:
        """The padded batch of a line, zeros where there is no token."""
        return _padded(x_n[0], self)

    def apply(
        self,
        adjustment: Adjustment,
        site: str,
        x: Float[Array, "1 n inputs"],
        y: Float[Array, "1 n features"],
        prompt: Bool[Array, "1 n"],
    ) -> Float[Array, "1 n features"]:
        """`Adjustment.apply` for tokens in a line: every token takes its row's scale."""

        scales = {k: _of_rows(v, self) for k, v in adjustment.offsets.items() if k == site}
        later = {k: _of_rows(v, self) for k, v in adjustment.later.items() if k == site}
        # A token is a row of length one here.
        each = replace(adjustment, offsets=scales, later=later)
        out = each.scaled(site, y.astype(jnp.float32).swapaxes(0, 1), prompt.swapaxes(0, 1)).swapaxes(0, 1)
        if site in adjustment.pairs:
            out = out + self.flat(adjustment.change(site, self.padded(x)))
        return out.astype(y.dtype)


# The first two are each other's transpose. JAX would make the transpose of a gather a scatter, which a CPU runs one
# place after the other and a GPU in no fixed order.
@jax.custom_vjp
def _flat(x_bt: Array, ragged: Ragged) -> Array:
    b, t, *features = x_bt.shape
    return x_bt.reshape(b * t, *features).at[ragged.source_n].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _padded(x_n: Array, ragged: Ragged) -> Array:
    return x_n.at[ragged.place_bt].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _of_rows(x_b: Array, ragged: Ragged) -> Array:
    """Every token's entry of what is kept for each row."""
    return x_b.at[ragged.source_n // ragged.place_bt.shape[1]].get(mode="fill", fill_value=0)


_flat.defvjp(lambda x, ragged: (_flat(x, ragged), ragged), lambda ragged, g: (_padded(g, ragged), None))
_padded.defvjp(lambda x, ragged: (_padded(x, ragged), ragged), lambda ragged, g: (_flat(g, ragged), None))
_of_rows.defvjp(lambda x, ragged: (_of_rows(x, ragged), ragged), lambda ragged, g: (_padded(g, ragged).sum(1), None))
