"""What a prepared adapter does to a projection's output: the one idea of this library.

An adapter is *prepared* once per prompt, which gives an `Adjustment`, and the Adjustment is *applied* to every
token. Decoding only ever sees Adjustments, so it does not know which tenant, or which method, a row belongs to.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Key


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A pair of thin matrices (LoRA, Hu et al., arXiv 2106.09685): x is changed into `x down^T up^T`.

    The scale alpha / r is in `up` already. In a batch, each pair serves as many consecutive rows as there are rows
    to a pair, so that rows of one tenant are one product.
    """

    down: Float[Array, "*n r inputs"]
    up: Float[Array, "*n outputs r"]

    def __call__(self, x: Float[Array, "b t inputs"]) -> Float[Array, "b t outputs"]:
        """The change of the site's output, float32."""
        n, (b, t, _) = self.down.shape[0], x.shape
        x = x.astype(self.down.dtype).reshape(n, b // n * t, -1)
        thin = jnp.einsum("nti,nri->ntr", x, self.down, preferred_element_type=jnp.float32).astype(x.dtype)
        return jnp.einsum("ntr,nor->nto", thin, self.up, preferred_element_type=jnp.float32).reshape(b, t, -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dropout:
    """Which inputs of low-rank pairs are dropped while training: a random key for each token, a rate for each row."""

    key_bt: Key[Array, "b t"]
    rate_b: Float[Array, " b"]

    def __call__(self, site: str, x: Float[Array, "b t inputs"]) -> Float[Array, "b t inputs"]:
        """x with a share of its entries zero and the others made larger by as much."""

        def token(key: Array, rate: Array, x_i: Array) -> Array:
            kept = jax.random.bernoulli(jax.random.fold_in(key, zlib.crc32(site.encode())), 1 - rate, x_i.shape)
            return jnp.where(kept, x_i / (1 - rate).astype(x_i.dtype), 0)

        return jax.vmap(jax.vmap(token, in_axes=(0, None, 0)))(self.key_bt, self.rate_b, x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adjustment:
    """A prepared adapter of one layer: at each adjusted site, how its output `y` of an input `x` changes.

    `y` becomes `y * (1 + offset) + shift + x down^T up^T`. The offset is kept instead of the scale because bfloat16 has
    eight bits around one and full relative precision around zero; the sum is taken in float32. All three are linear in
    what is kept, so Adjustments can be weighted and summed. The empty Adjustment is the identity and costs nothing.

    Attributes:
      offsets: by a site's Hugging Face name (`q_proj`, ...), (features,) for one sequence, (b, features), or
        (b, t, features) where the tokens of a row are of several sequences.
      later: offsets that leave the prompt's tokens alone, but for the last.
      pairs: low-rank pairs by site.
      shifts: what is added to the output, by site and in the shapes of offsets.
      dropout: of the pairs' inputs, only while training.

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
        """Adjusts the output of one site, in float32, and returns it in its own dtype.

        `prompt_bt` marks the tokens of the prompt but its last; without it there are none, as when decoding.
        """
        out = self.scaled(site, y.astype(jnp.float32), prompt_bt)
        if site in self.shifts:
            out = out + _of_tokens(self.shifts[site], y)
        if site in self.pairs:
            out = out + self.change(site, x)
        return out.astype(y.dtype)

    def scaled(
        self, site: str, y: Float[Array, "b t features"], prompt_bt: Bool[Array, "b t"] | None
    ) -> Float[Array, "b t features"]:
        """The part of `apply` that scales."""
        scale = 1.0 + _of_tokens(self.offsets[site], y) if site in self.offsets else None
        if site in self.later:
            later = _of_tokens(self.later[site], y)
            later = later if prompt_bt is None else jnp.where(prompt_bt[..., None], 0.0, later)
            scale = 1.0 + later if scale is None else scale + later
        return y if scale is None else y * scale

    def change(self, site: str, x: Float[Array, "b t inputs"]) -> Float[Array, "b t features"]:
        """What `apply` adds of a low-rank pair, float32."""
        return self.pairs[site](x if self.dropout is None else self.dropout(site, x))

    def weighted(self, strength_n: Float[Array, " n"]) -> Adjustment:
        """Each row's change times its strength; with strength 0 the row is the identity, whatever it held.

        >>> adjustment = Adjustment({"q_proj": jnp.array([[1.0], [jnp.nan], [1.0]])})
        >>> adjustment.weighted(jnp.array([1.0, 0.0, 0.5])).offsets["q_proj"].tolist()
        [[1.0], [0.0], [0.5]]
        """

        def weigh(x: Array, linear: bool = True) -> Array:
            # A pair may serve several rows, all of one adapter and so of one strength.
            weight = strength_n[:: strength_n.size // x.shape[0]].reshape(-1, *[1] * (x.ndim - 1))
            return jnp.where(weight == 0, 0, x * weight.astype(x.dtype) if linear else x)

        # Of a pair that plays no part both halves are zero: others may share its place.
        pairs = {s: LowRank(weigh(pair.down, linear=False), weigh(pair.up)) for s, pair in self.pairs.items()}
        return replace(self.per_row(weigh), pairs=pairs)

    def per_row(self, change: Callable[[Array], Array]) -> Adjustment:
        """With `change` of every array that has an entry for each row. Pairs serve several rows and stay as they are.

        >>> adjustment = Adjustment({"q_proj": jnp.array([[1.0], [2.0]])})
        >>> adjustment.per_row(lambda x: jnp.repeat(x, 2, axis=0)).offsets["q_proj"].tolist()
        [[1.0], [1.0], [2.0], [2.0]]
        """
        offsets, later, shifts = jax.tree.map(change, (self.offsets, self.later, self.shifts))
        return replace(self, offsets=offsets, later=later, shifts=shifts)

    def at(self, site: str) -> Adjustment:
        """The part that adjusts one site."""
        offsets, later, pairs, shifts = ({s: x for s, x in of.items() if s == site} for of in self._parts)
        return Adjustment(offsets, later, pairs, shifts, self.dropout)

    def gated(self, gates: Mapping[str, Float[Array, ""]]) -> Adjustment:
        """Each site's change times its gate."""
        offsets, later, shifts = (
            {s: x * gates[s] for s, x in of.items()} for of in (self.offsets, self.later, self.shifts)
        )
        pairs = {s: LowRank(pair.down, pair.up * gates[s]) for s, pair in self.pairs.items()}
        return Adjustment(offsets, later, pairs, shifts, self.dropout)

    @property
    def _parts(self) -> tuple[Mapping[str, Any], ...]:
        return self.offsets, self.later, self.pairs, self.shifts

    def settled(self) -> Adjustment:
        """The form for the tokens after the prompt, which are all alike."""
        offsets = dict(self.offsets)
        for site, x in self.later.items():
            offsets[site] = offsets[site] + x if site in offsets else x
        return Adjustment(offsets, pairs=self.pairs, shifts=self.shifts)

    def astype(self, dtype: jnp.dtype) -> Adjustment:
        """The form in which it waits for the tokens: two bytes a number in bfloat16."""
        offsets, later, pairs, shifts = jax.tree.map(lambda x: x.astype(dtype), self._parts)
        return Adjustment(offsets, later, pairs, shifts, self.dropout)


# `out_axes` of a `jax.vmap` over rows that share their pairs: what an Adjustment has for each row has an axis of rows.
PER_ROW = Adjustment(**dict[str, Any](offsets=0, later=0, pairs=None, shifts=0))


def _of_tokens(x: Float[Array, "*b features"], y: Float[Array, "b t features"]) -> Float[Array, "*b #t features"]:
    """A vector for each row, or for each of its tokens, in float32 and with an axis of tokens."""
    x = x.astype(jnp.float32)
    return x if x.ndim == y.ndim else x[..., None, :]


def total(adjustments: Iterable[Adjustment], *, disjoint: bool) -> Adjustment:
    """The sum of the changes that several Adjustments make to one batch.

    With `disjoint`, every row is changed by one of them at most: vectors are zero in all the others and their sum is
    exact, and pairs are padded to the highest rank and share its place. Otherwise ranks stand side by side.

    >>> a = Adjustment({"q_proj": jnp.array([[0.5], [0.0]])})
    >>> b = Adjustment({"q_proj": jnp.array([[0.0], [2.0]]), "up_proj": jnp.array([[0.0], [1.0]])})
    >>> {site: x.tolist() for site, x in total([a, b], disjoint=True).offsets.items()}
    {'q_proj': [[0.5], [2.0]], 'up_proj': [[0.0], [1.0]]}
    """
    offsets: dict[str, Array] = {}
    later: dict[str, Array] = {}
    pairs: dict[str, LowRank] = {}
    shifts: dict[str, Array] = {}
    for each in adjustments:
        for sums, parts in ((offsets, each.offsets), (later, each.later), (shifts, each.shifts)):
            for site, x in parts.items():
                sums[site] = sums[site] + x if site in sums else x
        for site, pair in each.pairs.items():
            pairs[site] = _joined(pairs[site], pair, disjoint) if site in pairs else pair
    return Adjustment(offsets, later, pairs, shifts)


def _joined(a: LowRank, b: LowRank, disjoint: bool) -> LowRank:
    if not disjoint:
        return LowRank(jnp.concatenate([a.down, b.down], -2), jnp.concatenate([a.up, b.up], -1))
    rank = max(a.up.shape[-1], b.up.shape[-1])

    def padded(pair: LowRank) -> LowRank:
        more = (0, rank - pair.up.shape[-1])
        return LowRank(jnp.pad(pair.down, [(0, 0), more, (0, 0)]), jnp.pad(pair.up, [(0, 0), (0, 0), more]))

    return jax.tree.map(jnp.add, padded(a), padded(b))
