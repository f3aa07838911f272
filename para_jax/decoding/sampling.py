"""How a row chooses its next token: transformers' processors, in transformers' order.

Repetition penalty, temperature, top-k, top-p, min-p, then sampling. The functions are written for one row and vmapped.
A sample depends only on the row's seed and step, not on the other rows or the position in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from para_jax.annotations import Array, Bool, Float, Int, UInt32


class Filters(NamedTuple):
    """Restrict the tokens to sample from; 0, 1 and 0 disable them for a row."""

    top_k_b: Int[Array, " b"]
    top_p_b: Float[Array, " b"]
    min_p_b: Float[Array, " b"]


class Draws(NamedTuple):
    """The settings of sampling. A row with temperature zero takes the likeliest token instead."""

    temperature_b: Float[Array, " b"]
    seed_b: UInt32[Array, " b"]
    filters: Filters | None = None

    def processed(self, logits_bv: Float[Array, "b v"]) -> Float[Array, "b v"]:
        """The logits to sample from; a temperature of zero counts as one."""

        def one(row: Draws, logits_v: Array) -> Array:
            logits_v = logits_v / jnp.where(row.temperature_b > 0, row.temperature_b, 1)
            if row.filters is None:
                return logits_v
            return min_p(top_k_top_p(logits_v, row.filters.top_k_b, row.filters.top_p_b), row.filters.min_p_b)

        return jax.vmap(one)(self, logits_bv)

    def draw(self, logits_bv: Float[Array, "b v"], step: Int[Array, ""]) -> Int[Array, " b"]:
        """A token for every row, from its logits, its seed and the step."""

        def one(seed: Array, logits_v: Array) -> Array:
            key = jax.random.fold_in(jax.random.key(seed), step)
            return jax.random.categorical(key, logits_v).astype(jnp.int32)

        return jax.vmap(one)(self.seed_b, self.processed(logits_bv))


class Sampler(NamedTuple):
    """How the rows of a batch choose tokens.

    Fields that are None, here and in `draws`, are off for the batch and not in the program, so that greedy batches do
    not pay for them.
    """

    penalty_b: Float[Array, " b"] | None = None
    draws: Draws | None = None

    def penalised(self, logits_bv: Float[Array, "b v"], seen_bv: Bool[Array, "b v"] | None) -> Float[Array, "b v"]:
        """The logits after the repetition penalty, if there is one."""
        if self.penalty_b is None or seen_bv is None:
            return logits_bv
        return jax.vmap(repetition_penalty)(logits_bv, seen_bv, self.penalty_b)

    def choose(
        self, logits_bv: Float[Array, "b v"], seen_bv: Bool[Array, "b v"] | None, step: Int[Array, ""]
    ) -> Int[Array, " b"]:
        """The next token of every row; `seen_bv` marks each row's tokens so far, if there is a penalty."""
        logits_bv = self.penalised(logits_bv, seen_bv)
        likeliest_b = likeliest(logits_bv)
        if self.draws is None:
            return likeliest_b
        return jnp.where(self.draws.temperature_b > 0, self.draws.draw(logits_bv, step), likeliest_b)


def likeliest(logits_bv: Float[Array, "b v"]) -> Int[Array, " b"]:
    """The first token of the highest logit, int32.

    Two plain reductions; XLA's own argmax, one reduction over pairs, is six times slower on CPU.

    >>> likeliest(jnp.array([[1.0, 3.0, 3.0]])).tolist()
    [1]
    """
    index_bv = jax.lax.broadcasted_iota(jnp.int32, logits_bv.shape, 1)
    highest_b = jnp.max(logits_bv, axis=1, keepdims=True)
    # If no logit equals the highest (all are NaN), the last token, which is a valid index.
    return jnp.min(jnp.where(logits_bv == highest_b, index_bv, logits_bv.shape[1] - 1), axis=1)


def repetition_penalty(
    logits_v: Float[Array, " v"], seen_v: Bool[Array, " v"], penalty: Float[Array, ""]
) -> Float[Array, " v"]:
    """Makes tokens seen before less likely: logits above zero are divided, the others multiplied.

    Keskar et al., arXiv 1909.05858.

    >>> repetition_penalty(jnp.array([2.0, -2.0, 2.0]), jnp.array([True, True, False]), 2.0).tolist()
    [1.0, -4.0, 2.0]
    """
    return jnp.where(seen_v, jnp.where(logits_v < 0, logits_v * penalty, logits_v / penalty), logits_v)


def top_k_top_p(logits_v: Float[Array, " v"], top_k: Int[Array, ""], top_p: Float[Array, ""]) -> Float[Array, " v"]:
    """Keeps the `top_k` highest logits, and of these the fewest whose probabilities sum to `top_p`.

    A `top_k` of zero and a `top_p` of one keep everything. Both are thresholds on the same sorted logits (Fan et al.,
    arXiv 1805.04833; Holtzman et al., arXiv 1904.09751). Ties with the lowest kept logit are kept too.

    >>> top_k_top_p(jnp.log(jnp.array([0.5, 0.3, 0.2])), 2, 1.0).tolist()[2]
    -inf
    >>> jnp.isfinite(top_k_top_p(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0, 0.5)).tolist()
    [True, False, False]
    """
    v = logits_v.size
    ascending_v = jnp.sort(logits_v)
    lowest = ascending_v[jnp.where((top_k > 0) & (top_k < v), v - top_k, 0)]
    # Summed from the least likely: the removed tokens sum to at most 1 - top_p.
    kept_v = jnp.where(ascending_v >= lowest, ascending_v, -jnp.inf)
    within_v = (jnp.cumsum(jax.nn.softmax(kept_v)) > 1 - top_p) | (jnp.arange(v) == v - 1)
    lowest = jnp.where(top_p < 1, ascending_v[jnp.argmax(within_v)], lowest)
    return jnp.where(logits_v >= lowest, logits_v, -jnp.inf)


def min_p(logits_v: Float[Array, " v"], smallest: Float[Array, ""]) -> Float[Array, " v"]:
    """Removes tokens less likely than `smallest` times the likeliest one (Nguyen et al., arXiv 2407.01082).

    >>> jnp.isfinite(min_p(jnp.log(jnp.array([0.6, 0.3, 0.1])), 0.25)).tolist()
    [True, True, False]
    """
    probability_v = jax.nn.softmax(logits_v)
    return jnp.where(probability_v < smallest * jnp.max(probability_v), -jnp.inf, logits_v)


def seen_tokens(tokens_bt: Int[Array, "b t"], mask_bt: Bool[Array, "b t"], v: int) -> Bool[Array, "b v"]:
    """Which tokens of the vocabulary occur in each row, without padding.

    >>> seen_tokens(jnp.array([[3, 1]]), jnp.array([[False, True]]), 4).tolist()
    [[False, True, False, False]]
    """
    row_b1 = jnp.arange(tokens_bt.shape[0])[:, None]
    return jnp.zeros((tokens_bt.shape[0], v), bool).at[row_b1, tokens_bt].max(mask_bt)
