"""A batch of rows of different lengths with its tokens laid end to end, so that padding costs nothing but attention.

Norms, products and adjustments see one token at a time. They run on the tokens that are there; only attention, which
looks along a row, gets the padded form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from para_jax.adjustment import Adjustment

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int


class Line(NamedTuple):
    """The static sizes of the lines of a batch.

    Attributes:
      tokens: places in a line, at least as many as there are tokens.
      short: columns that are enough for the shorter half of a line's rows (b // 2 of them).
      groups: how many lines there are, each of as many consecutive rows: one for every device that has rows.
    """

    tokens: int
    short: int
    groups: int = 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ragged:
    """Where the tokens of a padded batch (b, t) lie in g lines of n, of b / g rows each, padded on the right.

    Attributes:
      place_gbt: each token's place in its line; n for padding.
      source_gn: where in the b / g * t places of its rows each comes from; as many at the end of the line, if it is
        longer than there are tokens.

    >>> ragged = Ragged.of(jnp.array([[True, True, False], [True, False, False]]), 4)
    >>> ragged.flat(jnp.array([[1, 2, 0], [3, 0, 0]])[..., None])[0, :, 0].tolist()
    [1, 2, 3, 0]
    >>> ragged.padded(jnp.array([[1, 2, 3, 9]])[..., None])[..., 0].tolist()
    [[1, 2, 0], [3, 0, 0]]
    """

    place_gbt: Int[Array, "g b t"]
    source_gn: Int[Array, "g n"]

    @property
    def mask_bt(self) -> Bool[Array, "b t"]:
        """Which places of the batch hold tokens."""
        return (self.place_gbt < self.source_gn.shape[1]).reshape(-1, self.place_gbt.shape[2])

    @classmethod
    def of(cls, mask_bt: Bool[Array, "b t"], n: int, groups: int = 1) -> Ragged:
        """Lines of `n` places for the tokens that `mask_bt` marks, which are no more."""

        def one(mask_bt: Array) -> tuple[Array, Array]:
            mask = mask_bt.reshape(-1)
            place = jnp.where(mask, jnp.cumsum(mask, dtype=jnp.int32) - 1, n)
            (source,) = jnp.nonzero(mask, size=n, fill_value=mask.size)
            return place.reshape(mask_bt.shape), source.astype(jnp.int32)

        return cls(*_by_group(one, mask_bt.reshape(groups, -1, mask_bt.shape[1])))

    def halves(self, short: int) -> tuple[Ragged, ...]:
        """The longer half of each line's rows, and the shorter half with `short` columns, for the same lines.

        What grows with the square of a row's length is cheaper in two batches than in one.
        """
        _, b, t = self.place_gbt.shape
        long = b - b // 2

        def split(place_bt: Array, source_n: Array) -> list[tuple[Array, Array]]:
            length_b = jnp.sum(place_bt < source_n.size, axis=1)
            order_b = jnp.argsort(-length_b, stable=True)
            rank_b = jnp.zeros_like(order_b).at[order_b].set(jnp.arange(b, dtype=order_b.dtype), unique_indices=True)
            column_n = source_n % t
            rank_n = rank_b.at[source_n // t].get(mode="fill", fill_value=b)
            parts = []
            for first, rows, columns in ((0, long, t), (long, b - long, short)):
                inside_n = (rank_n >= first) & (rank_n < first + rows)
                own_n = jnp.where(inside_n, (rank_n - first) * columns + column_n, rows * columns)
                parts.append((place_bt[order_b[first : first + rows], :columns], own_n))
            return parts

        parts = [Ragged(*part) for part in _by_group(split, self.place_gbt, self.source_gn)]
        return tuple(part for part in parts if part.place_gbt.size)

    def _by_row(self, x_b: Array) -> Array:
        return x_b.reshape(*self.place_gbt.shape[:2], *x_b.shape[1:])

    def flat(self, x_bt: Float[Array, "b t *f"]) -> Float[Array, "g n *f"]:
        """The lines of a padded batch, zeros where they are longer."""
        return _by_group(_flat, self._by_row(x_bt), self.place_gbt, self.source_gn)

    def padded(self, x_gn: Float[Array, "g n *f"]) -> Float[Array, "b t *f"]:
        """The padded batch of lines, zeros where there is no token."""
        x_gbt = _by_group(_padded, x_gn, self.place_gbt, self.source_gn)
        return x_gbt.reshape(-1, *x_gbt.shape[2:])

    def apply(
        self,
        adjustment: Adjustment,
        site: str,
        x: Float[Array, "g n inputs"],
        y: Float[Array, "g n features"],
        prompt: Bool[Array, "g n"],
    ) -> Float[Array, "g n features"]:
        """`Adjustment.apply` for tokens in lines: every token takes its row's scale."""

        def each(scales: Mapping[str, Array]) -> dict[str, Array]:
            # A token is a row of length one here.
            own = {k: v for k, v in scales.items() if k == site}
            tokens = {k: _by_group(_of_rows, self._by_row(v), self.place_gbt, self.source_gn) for k, v in own.items()}
            return {k: v.reshape(-1, v.shape[-1]) for k, v in tokens.items()}

        one = replace(adjustment, offsets=each(adjustment.offsets), later=each(adjustment.later))
        out = one.scaled(site, y.astype(jnp.float32).reshape(-1, 1, y.shape[-1]), prompt.reshape(-1, 1))
        out = out.reshape(y.shape)
        if site in adjustment.pairs:
            out = out + self.flat(adjustment.change(site, self.padded(x)))
        return out.astype(y.dtype)


def _by_group(f: Callable[..., Any], *x: Array) -> Any:
    """`f` of each group; of one group without a batch axis, which gathers are quicker without on a CPU."""
    if x[0].shape[0] == 1:
        return jax.tree.map(lambda y: y[None], f(*(y[0] for y in x)))
    return jax.vmap(f)(*x)


# The first two are each other's transpose. JAX would make the transpose of a gather a scatter, which a CPU runs one
# place after the other and a GPU in no fixed order.
@jax.custom_vjp
def _flat(x_bt: Array, place_bt: Array, source_n: Array) -> Array:
    b, t, *features = x_bt.shape
    return x_bt.reshape(b * t, *features).at[source_n].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _padded(x_n: Array, place_bt: Array, source_n: Array) -> Array:
    return x_n.at[place_bt].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _of_rows(x_b: Array, place_bt: Array, source_n: Array) -> Array:
    """Every token's entry of what is kept for each row."""
    return x_b.at[source_n // place_bt.shape[1]].get(mode="fill", fill_value=0)


def _forward(f: Callable[..., Array]) -> Callable[..., tuple[Array, tuple[Array, Array]]]:
    return lambda x, place, source: (f(x, place, source), (place, source))


_flat.defvjp(_forward(_flat), lambda where, g: (_padded(g, *where), None, None))
_padded.defvjp(_forward(_padded), lambda where, g: (_flat(g, *where), None, None))
_of_rows.defvjp(_forward(_of_rows), lambda where, g: (_padded(g, *where).sum(1), None, None))
