"""Grouped-query attention, the plain path: scores and softmax in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float


def attention(
    q_btkgh: Float[Array, "b t k g hd"],
    k_bksh: Float[Array, "b k s hd"],
    v_bksh: Float[Array, "b k s hd"],
    visible_bts: Bool[Array, "b t s"],
) -> Float[Array, "b t kghd"]:
    """softmax(q k^T / sqrt(hd)) v over the keys that each query may see.

    A query that sees none, as padding may, gets the mean of all values; nothing reads it.
    """
    b, t, k, g, hd = q_btkgh.shape
    # The queries of a key's group stand together, which makes both products plain batched matrix products. Left to
    # the compiler, the transposition costs five times the product on CPU.
    q_bkqh = q_btkgh.transpose(0, 2, 3, 1, 4).reshape(b, k, g * t, hd)
    score = jnp.einsum("bkqh,bksh->bkqs", q_bkqh, k_bksh, preferred_element_type=jnp.float32) * hd**-0.5
    visible_bqs = jnp.tile(visible_bts, (1, g, 1))
    score = jnp.where(visible_bqs[:, None], score, jnp.finfo(jnp.float32).min)
    weight = jax.nn.softmax(score, axis=-1).astype(v_bksh.dtype)
    mixed = jnp.einsum("bkqs,bksh->bkqh", weight, v_bksh)
    return mixed.reshape(b, k, g, t, hd).transpose(0, 3, 1, 2, 4).reshape(b, t, k * g * hd)


def causal(mask_bt: Bool[Array, "b t"]) -> Bool[Array, "b t t"]:
    """Which keys each token of a row may see: those up to its own that are none of the padding."""
    t = mask_bt.shape[1]
    return jnp.tril(jnp.ones((t, t), bool))[None] & mask_bt[:, None, :]
