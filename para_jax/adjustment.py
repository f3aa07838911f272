"""How a prepared adapter changes a projection's output: the central idea of this library.

An adapter is *prepared* once per prompt, which gives an `Adjustment`, and the Adjustment is *applied* to every
token. Decoding sees only Adjustments, so it does not depend on the tenant or the method of a row.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from para_jax.annotations import Array, Bool, Float, Key


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A pair of low-rank matrices (LoRA, Hu et al., arXiv 2106.09685): it adds `x down^T up^T` to the output.

    `up` includes the scale alpha / r. In a batch of b rows, each of n pairs serves b / n consecutive rows, so that
    rows of one tenant share a matmul.
    """

    down: Float[Array, "*n r inputs"]
    up: Float[Array, "*n outputs r"]

    def __call__(self, x: Float[Array, "b t inputs"]) -> Float[Array, "b t outputs"]:
        """The change of the site's output, in float32."""
        n, (b, t, _) = self.down.shape[0], x.shape
        x = x.astype(self.down.dtype).reshape(n, b // n * t, -1)
        hidden = jnp.einsum("nti,nri->ntr", x, self.down, preferred_element_type=jnp.float32).astype(x.dtype)
        return jnp.einsum("ntr,nor->nto", hidden, self.up, preferred_element_type=jnp.float32).reshape(b, t, -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dropout:
    """Dropout on the inputs of low-rank pairs in training: a random key for each token, a rate for each row."""

    key_bt: Key[Array, "b t"]
    rate_b: Float[Array, " b"]

    def __call__(self, site: str, x: Float[Array, "b t inputs"]) -> Float[Array, "b t inputs"]:
        """x with random entries set to zero and the others scaled by 1 / (1 - rate)."""

        def token(key: Array, rate: Array, x_i: Array) -> Array:
            kept = jax.random.bernoulli(jax.random.fold_in(key, zlib.crc32(site.encode())), 1 - rate, x_i.shape)
            return jnp.where(kept, x_i / (1 - rate).astype(x_i.dtype), 0)

        return jax.vmap(jax.vmap(token, in_axes=(0, None, 0)))(self.key_bt, self.rate_b, x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adjustment:
    """A prepared adapter of one layer. At each adjusted site it changes the output `y` of an input `x`.

    `y` becomes `y * (1 + offset) + shift + x down^T up^T`. The offset is stored instead of the scale because bfloat16
    has only eight bits around one but full relative precision around zero. The sum is in float32. The change is linear
    in the stored arrays, so Adjustments can be weighted and summed. The empty Adjustment is the identity at no cost.

    Attributes:
      offsets: by a site's Hugging Face name (`q_proj`, ...), (features,) for one sequence, (b, features), or
        (b, t, features) where rows are packed.
      later: offsets that apply to the prompt's last token and to all tokens after it.
      pairs: low-rank pairs by site.
      shifts: vectors that are added to the output, by site, in the same shapes as offsets.
      dropout: dropout on the pairs' inputs, only in training.

    >>> import jax.numpy as jnp
    >>> adjustment = Adjustment({"q_proj": jnp.array([[0.5, -1.0]])})
    >>> x = jnp.ones((1, 2, 3))
    >>> adjustment.apply("q_proj", x, jnp.array([[[2.0, 2.0], [4.0, 4.0]]])).tolist()
    [[[3.0, 0.0], [6.0, 0.0]]]
    >>> adjustment.apply("k_proj", x, jnp.ones((1, 2, 2))).tolist()
    [[[1.0, 1.0], [1.0, 1.0]]]
    >>> pair = LowRank(down=jnp.ones((1, 1, 3)), up=jnp.array([[[1.0], [2.0]]]))
    >>> Adjustment(pairs={"q_proj": pair}).apply("q_proj", x, jnp.zeros((1, 2, 2))).tolist()
    [[[3.0, 6.0], [3.0, 6.0]]]
    >>> Adjustment(shifts={"q_proj": jnp.array([[0.5, -1.0]])}).apply("q_proj", x, jnp.zeros((1, 2, 2))).tolist()
    [[[0.5, -1.0], [0.5, -1.0]]]
    """

    offsets: Mapping[str, Float[Array, "*b features"]] = field(default_factory=dict)
    later: Mapping[str, Float[Array, "*b features"]] = field(default_factory=dict)
    pairs: Mapping[str, LowRank] = field(default_factory=dict)
    shifts: Mapping[str, Float[Array, "*b features"]] = field(default_factory=dict)
    dropout: Dropout | None = None

    def apply(
        self,
        site: str,
        x: Float[Array, "b t inputs"],
        y: Float[Array, "b t features"],
        prompt_bt: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b t features"]:
        """Adjusts the output of one site in float32 and returns it in its own dtype.

        `prompt_bt` marks all prompt tokens except the last; None, as in decoding, marks no token.
        """
        out = self.scaled(site, y.astype(jnp.float32), prompt_bt)
        if site in self.shifts:
            out = out + _per_token(self.shifts[site], y)
        if site in self.pairs:
            out = out + self.change(site, x)
        return out.astype(y.dtype)

    def scaled(
        self, site: str, y: Float[Array, "b t features"], prompt_bt: Bool[Array, "b t"] | None
    ) -> Float[Array, "b t features"]:
        scale = 1.0 + _per_token(self.offsets[site], y) if site in self.offsets else None
        if site in self.later:
            later = _per_token(self.later[site], y)
            later = later if prompt_bt is None else jnp.where(prompt_bt[..., None], 0.0, later)
            scale = 1.0 + later if scale is None else scale + later
        return y if scale is None else y * scale

    def change(self, site: str, x: Float[Array, "b t inputs"]) -> Float[Array, "b t features"]:
        """The output of one site's low-rank pair, in float32."""
        return self.pairs[site](x if self.dropout is None else self.dropout(site, x))

    def weighted(self, weight_n: Float[Array, " n"]) -> Adjustment:
        """Each row's change times its adapter weight. Weight 0 gives the identity, even if the row has NaN.

        >>> adjustment = Adjustment({"q_proj": jnp.array([[1.0], [jnp.nan], [1.0]])})
        >>> adjustment.weighted(jnp.array([1.0, 0.0, 0.5])).offsets["q_proj"].tolist()
        [[1.0], [0.0], [0.5]]
        """

        def scale(x: Array, linear: bool = True) -> Array:
            # All rows of a pair have the same adapter and weight.
            weight = weight_n[:: weight_n.size // x.shape[0]].reshape(-1, *[1] * (x.ndim - 1))
            return jnp.where(weight == 0, 0, x * weight.astype(x.dtype) if linear else x)

        # With weight 0 both halves of a pair are zero, so that `total` can add another pair to them.
        pairs = {s: LowRank(scale(pair.down, linear=False), scale(pair.up)) for s, pair in self.pairs.items()}
        return replace(self.per_row(scale), pairs=pairs)

    def per_row(self, change: Callable[[Array], Array]) -> Adjustment:
        """Applies `change` to every array with an entry for each row. Pairs serve several rows and stay unchanged.

        >>> adjustment = Adjustment({"q_proj": jnp.array([[1.0], [2.0]])})
        >>> adjustment.per_row(lambda x: jnp.repeat(x, 2, axis=0)).offsets["q_proj"].tolist()
        [[1.0], [1.0], [2.0], [2.0]]
        """
        offsets, later, shifts = jax.tree.map(change, (self.offsets, self.later, self.shifts))
        return replace(self, offsets=offsets, later=later, shifts=shifts)

    def at(self, site: str) -> Adjustment:
        offsets, later, pairs, shifts = ({s: x for s, x in part.items() if s == site} for part in self._parts)
        return Adjustment(offsets, later, pairs, shifts, self.dropout)

    def gated(self, gates: Mapping[str, Float[Array, ""]]) -> Adjustment:
        offsets, later, shifts = (
            {s: x * gates[s] for s, x in part.items()} for part in (self.offsets, self.later, self.shifts)
        )
        pairs = {s: LowRank(pair.down, pair.up * gates[s]) for s, pair in self.pairs.items()}
        return Adjustment(offsets, later, pairs, shifts, self.dropout)

    @property
    def _parts(self) -> tuple[Mapping[str, Any], ...]:
        return self.offsets, self.later, self.pairs, self.shifts

    def for_decoding(self) -> Adjustment:
        """The Adjustment of the tokens after the prompt: `later` is added to `offsets`."""
        offsets = dict(self.offsets)
        for site, x in self.later.items():
            offsets[site] = offsets[site] + x if site in offsets else x
        return Adjustment(offsets, pairs=self.pairs, shifts=self.shifts)

    def astype(self, dtype: jnp.dtype) -> Adjustment:
        """Casts all arrays, to store the Adjustment in the backbone's dtype."""
        offsets, later, pairs, shifts = jax.tree.map(lambda x: x.astype(dtype), self._parts)
        return Adjustment(offsets, later, pairs, shifts, self.dropout)


# `out_axes` of a `jax.vmap` over rows that share their pairs: only the other arrays get an axis of rows.
PER_ROW = Adjustment(**dict[str, Any](offsets=0, later=0, pairs=None, shifts=0))


def _per_token(x: Float[Array, "*b features"], y: Float[Array, "b t features"]) -> Float[Array, "*b #t features"]:
    """Vectors per row or per token, in float32 and with a token axis."""
    x = x.astype(jnp.float32)
    return x if x.ndim == y.ndim else x[..., None, :]


def total(adjustments: Iterable[Adjustment], *, disjoint: bool) -> Adjustment:
    """Sums the changes of several Adjustments of one batch.

    With `disjoint`, at most one Adjustment changes a row and all others are zero there. The sum is exact, and pairs are
    padded to the highest rank and added. Otherwise pairs are concatenated along their ranks.

    >>> a = Adjustment({"q_proj": jnp.array([[0.5], [0.0]])})
    >>> b = Adjustment({"q_proj": jnp.array([[0.0], [2.0]]), "up_proj": jnp.array([[0.0], [1.0]])})
    >>> {site: x.tolist() for site, x in total([a, b], disjoint=True).offsets.items()}
    {'q_proj': [[0.5], [2.0]], 'up_proj': [[0.0], [1.0]]}
    """
    offsets: dict[str, Array] = {}
    later: dict[str, Array] = {}
    pairs: dict[str, LowRank] = {}
    shifts: dict[str, Array] = {}
    for adjustment in adjustments:
        parts = ((offsets, adjustment.offsets), (later, adjustment.later), (shifts, adjustment.shifts))
        for sums, part in parts:
            for site, x in part.items():
                sums[site] = sums[site] + x if site in sums else x
        for site, pair in adjustment.pairs.items():
            pairs[site] = _sum_pairs(pairs[site], pair, disjoint) if site in pairs else pair
    return Adjustment(offsets, later, pairs, shifts)


def _sum_pairs(a: LowRank, b: LowRank, disjoint: bool) -> LowRank:
    if not disjoint:
        return LowRank(jnp.concatenate([a.down, b.down], -2), jnp.concatenate([a.up, b.up], -1))
    rank = max(a.up.shape[-1], b.up.shape[-1])

    def pad(pair: LowRank) -> LowRank:
        padding = (0, rank - pair.up.shape[-1])
        return LowRank(jnp.pad(pair.down, [(0, 0), padding, (0, 0)]), jnp.pad(pair.up, [(0, 0), (0, 0), padding]))

    return jax.tree.map(jnp.add, pad(a), pad(b))
