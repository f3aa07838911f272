"""The loss of each tenant: the mean negative log-likelihood of its response tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from para_jax.adapters.rows import Rows
from para_jax.backbones.decoder import Backbone
from para_jax.backbones.options import Remat
from para_jax.backbones.packed import Segments
from para_jax.data.batches import Batch

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float

# Logits of a group of rows that are in memory at once, float32: a large vocabulary must not dominate.
LOGITS = 2**26


def loss_of(backbone: Backbone, rows: Rows, batch: Batch, remat: Remat = "none") -> Float[Array, "g n"]:
    """Each place's part of its tenant's loss: of this micro-batch, over the targets of the whole step.

    Only response tokens reach the head: with a vocabulary of 4096 and short answers it would cost more than the layers.
    """
    return sums_of(backbone, rows, batch, remat) / jnp.maximum(batch.count, 1).astype(jnp.float32)


def sums_of(backbone: Backbone, rows: Rows, batch: Batch, remat: Remat = "none") -> Float[Array, "g n"]:
    """The sum of the negative log-likelihoods of each place's targets."""
    nll_gk = target_nll(backbone, rows, batch, remat)
    # Each tenant's tokens are one row of this sum: the order is fixed, and one tenant's NaN stays its own.
    own_gnk = batch.targets.place[:, None] == jnp.arange(batch.count.shape[1])[None, :, None]
    return jnp.sum(jnp.where(own_gnk, nll_gk[:, None], 0), axis=2)


def target_nll(backbone: Backbone, rows: Rows, batch: Batch, remat: Remat = "none") -> Float[Array, "g k"]:
    """The negative log-likelihood of each of a batch's targets; where `targets.place` is none, it means nothing.

    Of a long list the logits of some `LOGITS` are in memory at once; the backward pass computes them again.
    """
    b, t = batch.tokens.shape
    g, k = batch.targets.slot.shape
    segments = Segments.of(batch.length, t)
    prompt_bt = segments.position_bt < segments.each(jnp.asarray(batch.prompt_length))
    hidden, _, _ = backbone.forward(
        jnp.asarray(batch.tokens), segments.mask_bt, prompt_bt, rows, remat=remat, segments=segments
    )
    of_group = hidden.reshape(g, b // g * t, -1)
    place_gk = jnp.asarray(batch.targets.slot)
    hidden_gkd = of_group[0][place_gk] if g == 1 else jax.vmap(lambda x, i: x[i])(of_group, place_gk)
    token_gk, head = jnp.asarray(batch.targets.token), backbone.whole_head()

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
