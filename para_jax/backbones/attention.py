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
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "b t kghd"]:
    """softmax(scale q k^T) v over the keys that each query may see; the scale is 1 / sqrt(hd) if none is given.

    With `softcap` c, a score x becomes c tanh(x / c) (Gemma 2). A query that sees no key, as padding may, gets the mean
    of all values; nothing reads it.
    """
    b, t, k, g, hd = q_btkgh.shape
    # The queries of a key's group stand together, which makes both products plain batched matrix products. Left to
    # the compiler, the transposition costs five times the product on CPU.
    q_bkqh = q_btkgh.transpose(0, 2, 3, 1, 4).reshape(b, k, g * t, hd)
    score = jnp.einsum("bkqh,bksh->bkqs", q_bkqh, k_bksh, preferred_element_type=jnp.float32)
    score = score * (hd**-0.5 if scale is None else scale)
    if softcap is not None:
        score = softcap * jnp.tanh(score / softcap)
    visible_bqs = jnp.tile(visible_bts, (1, g, 1))
    score = jnp.where(visible_bqs[:, None], score, jnp.finfo(jnp.float32).min)
    weight = jax.nn.softmax(score, axis=-1).astype(v_bksh.dtype)
    mixed = jnp.einsum("bkqs,bksh->bkqh", weight, v_bksh)
    return mixed.reshape(b, k, g, t, hd).transpose(0, 3, 1, 2, 4).reshape(b, t, k * g * hd)


def causal(mask_bt: Bool[Array, "b t"], window: int | None = None) -> Bool[Array, "b t t"]:
    """Which keys each token of a row may see: those up to its own, or the last `window`, that are none of the padding.

    >>> causal(jnp.ones((1, 3), bool), window=2)[0].tolist()
    [[True, False, False], [True, True, False], [False, True, True]]
    """
    t = mask_bt.shape[1]
    seen = jnp.tril(jnp.ones((t, t), bool))
    if window is not None:
        seen = seen & ~jnp.tril(seen, -window)
    return seen[None] & mask_bt[:, None, :]
