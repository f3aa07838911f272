"""The loss of each tenant: the mean negative log-likelihood of its response tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from para_jax.adapters.rows import Rows
from para_jax.backbones.decoder import Backbone
from para_jax.backbones.options import Remat
from para_jax.data.batches import Batch

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float

# Logits of a group of rows that are in memory at once, float32: a large vocabulary must not dominate.
LOGITS = 2**26


def loss_of(
    backbone: Backbone, rows: Rows, part: Batch, count_gn: Float[Array, "g n"], remat: Remat = "none"
) -> Float[Array, "g n"]:
    """Each tenant's loss in one micro-batch, with its response tokens in all micro-batches and groups given.

    `part` is a `Batch.micro_batch`. Padding reaches attention only, and only response tokens reach the head: with a
    vocabulary of 4096 and short answers it would cost more than the layers.
    """
    nll_gk = target_nll(backbone, rows, part, remat)
    # Each tenant's tokens are one row of this sum: the order is fixed, and one tenant's NaN stays its own.
    own_gnk = part.target_tenant[:, None] == jnp.arange(count_gn.shape[1])[None, :, None]
    total_gn = jnp.sum(jnp.where(own_gnk, nll_gk[:, None], 0), axis=2)
    return total_gn / jnp.maximum(count_gn, 1).astype(jnp.float32)


def target_nll(backbone: Backbone, rows: Rows, part: Batch, remat: Remat = "none") -> Float[Array, "g k"]:
    """The negative log-likelihood of each of `part`'s targets; where `target_tenant` is none, it means nothing.

    Of a long list the logits of some `LOGITS` are in memory at once; the backward pass computes them again.
    """
    b, t = part.tokens.shape
    g, k = part.target_place.shape
    column = jnp.arange(t)[None]
    mask_bt, prompt_mask_bt = column < part.length[:, None], column < part.prompt_length[:, None]
    hidden, _, _ = backbone.forward(
        jnp.asarray(part.tokens), mask_bt, prompt_mask_bt, rows, remat=remat, flat=part.line
    )
    of_group = hidden.reshape(g, b // g * t, -1)
    hidden_gkd = of_group[0][part.target_place] if g == 1 else jax.vmap(lambda x, i: x[i])(of_group, part.target_place)
    token_gk, head = jnp.asarray(part.target_token), backbone.whole_head()

    def nll(hidden_gkd: Array, token_gk: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(backbone.logits(hidden_gkd, head), token_gk)

    size = max(1, LOGITS // backbone.config.vocab_size)
    if k <= size:
        return nll(hidden_gkd, token_gk)
    parts, more = -(-k // size), -k % size

    def divided(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(padded.reshape(g, parts, size, *x.shape[2:]), 1, 0)

    nll_agk = jax.lax.map(jax.checkpoint(lambda x: nll(*x)), (divided(hidden_gkd), divided(token_gk)))
    return jnp.moveaxis(nll_agk, 0, 1).reshape(g, -1)[:, :k]
