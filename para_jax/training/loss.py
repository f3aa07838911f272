"""The loss of each tenant: the mean negative log-likelihood of its response tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from para_jax.adapters.rows import Rows
from para_jax.annotations import Array, Float
from para_jax.backbones.decoder import Backbone
from para_jax.backbones.options import Remat
from para_jax.backbones.packed import Segments
from para_jax.data.batches import Batch

# The maximum number of float32 logits of a group in memory at once, so that a large vocabulary does not dominate.
LOGITS = 2**26


def tenant_losses(backbone: Backbone, rows: Rows, batch: Batch, remat: Remat = "none") -> Float[Array, "g n"]:
    """Each place's loss in this micro-batch, divided by its number of targets in the whole step.

    Logits are computed for response tokens only: with short responses the head would cost more than the layers.
    """
    return nll_sums(backbone, rows, batch, remat) / jnp.maximum(batch.count, 1).astype(jnp.float32)


def nll_sums(backbone: Backbone, rows: Rows, batch: Batch, remat: Remat = "none") -> Float[Array, "g n"]:
    """The sum of the negative log-likelihoods of each place's targets."""
    nll_gk = target_nll(backbone, rows, batch, remat)
    # Each place has a row of this sum: the order of summation is fixed, and a NaN does not reach other tenants.
    is_place_gnk = batch.targets.place[:, None] == jnp.arange(batch.count.shape[1])[None, :, None]
    return jnp.sum(jnp.where(is_place_gnk, nll_gk[:, None], 0), axis=2)


def target_nll(backbone: Backbone, rows: Rows, batch: Batch, remat: Remat = "none") -> Float[Array, "g k"]:
    """The negative log-likelihood of each target of a batch. Ignore it where `targets.place` is out of range.

    A long list of targets is processed in chunks of up to `LOGITS` logits, which the backward pass recomputes.
    """
    b, t = batch.tokens.shape
    g, k = batch.targets.slot.shape
    segments = Segments.of(batch.length, t)
    prompt_bt = segments.position_bt < segments.each(jnp.asarray(batch.prompt_length))
    hidden, _, _ = backbone.forward(
        jnp.asarray(batch.tokens), segments.mask_bt, prompt_bt, rows, remat=remat, segments=segments
    )
    by_group = hidden.reshape(g, b // g * t, -1)
    slot_gk = jnp.asarray(batch.targets.slot)
    hidden_gkd = by_group[0][slot_gk] if g == 1 else jax.vmap(lambda x, i: x[i])(by_group, slot_gk)
    token_gk, head = jnp.asarray(batch.targets.token), backbone.gathered_head()

    def nll(hidden_gkd: Array, token_gk: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(backbone.logits(hidden_gkd, head), token_gk)

    size = max(1, LOGITS // backbone.config.vocab_size)
    if k <= size:
        return nll(hidden_gkd, token_gk)
    chunks, padding = -(-k // size), -k % size

    def chunked(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(padded.reshape(g, chunks, size, *x.shape[2:]), 1, 0)

    nll_cgk = jax.lax.map(jax.checkpoint(lambda x: nll(*x)), (chunked(hidden_gkd), chunked(token_gk)))
    return jnp.moveaxis(nll_cgk, 0, 1).reshape(g, -1)[:, :k]
