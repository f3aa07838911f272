"""Plain grouped-query attention: float32 scores and softmax, long rows in blocks. Kernels are in kernels.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int

BLOCK = 512  # queries whose scores are in memory at once


class Seen(NamedTuple):
    """The attention mask: a query sees keys that hold a token, up to its own column and within the window.

    Attributes:
      valid_bs: which key columns hold a token.
      column_t: the column of each query.
      window: the number of columns that a query sees, including its own; None for all.
      segment_bt: the sequence of each column in packed rows, where a query sees only its own sequence. Queries and keys
        must have the same columns.

    >>> Seen(jnp.ones((1, 3), bool), jnp.arange(3), window=2).mask()[0].tolist()
    [[True, False, False], [True, True, False], [False, True, True]]
    """

    valid_bs: Bool[Array, "b s"]
    column_t: Int[Array, " t"]
    window: int | None = None
    segment_bt: Int[Array, "b t"] | None = None

    def mask(self) -> Bool[Array, "b t s"]:
        """The mask as an array."""
        key_s, column_t1 = jnp.arange(self.valid_bs.shape[1])[None], self.column_t[:, None]
        near_ts = key_s <= column_t1
        if self.window is not None:
            near_ts = near_ts & (key_s > column_t1 - self.window)
        seen_bts = near_ts[None] & self.valid_bs[:, None]
        if self.segment_bt is None:
            return seen_bts
        query_segment_bt = self.segment_bt.at[:, self.column_t].get(mode="fill", fill_value=-1)
        return seen_bts & (query_segment_bt[..., None] == self.segment_bt[:, None])


def attention(
    q_btkgh: Float[Array, "b t k g hd"],
    k_bksh: Float[Array, "b k s hd"],
    v_bksh: Float[Array, "b k s hd"],
    seen: Seen,
    scale: float,
    softcap: float | None = None,
    sinks_kg: Float[Array, "k g"] | None = None,
) -> Float[Array, "b t kghd"]:
    """softmax(scale q k^T) v over the keys that each query sees.

    With `softcap` c, a score x becomes c tanh(x / c) (Gemma 2). With `sinks_kg`, every query of a head has one more
    score, without a key and a value (GPT-OSS). A padding query that sees no key gets the mean of all values, or zero
    with a sink, which nothing reads. Rows longer than `BLOCK` are computed in blocks of queries, to save memory.
    """
    b, t, *heads = q_btkgh.shape
    if t <= BLOCK:
        return _block(q_btkgh, k_bksh, v_bksh, seen, scale, softcap, sinks_kg)
    n, padding = -(-t // BLOCK), -t % BLOCK
    q = jnp.pad(q_btkgh, [(0, 0), (0, padding), *[(0, 0)] * len(heads)]).reshape(b, n, BLOCK, *heads).swapaxes(0, 1)
    columns = jnp.pad(seen.column_t, (0, padding), constant_values=-1).reshape(n, BLOCK)

    @jax.checkpoint
    def one(block: tuple[Array, Array]) -> Array:
        return _block(block[0], k_bksh, v_bksh, seen._replace(column_t=block[1]), scale, softcap, sinks_kg)

    mixed = jax.lax.map(one, (q, columns))
    return mixed.swapaxes(0, 1).reshape(b, n * BLOCK, -1)[:, :t]


def _block(
    q_btkgh: Array, k_bksh: Array, v_bksh: Array, seen: Seen, scale: float, softcap: float | None,
    sinks_kg: Array | None,
) -> Array:  # fmt: skip
    b, t, k, g, hd = q_btkgh.shape
    # With group and time merged, both einsums are plain batched matmuls. Otherwise XLA transposes, at five times the
    # cost of the matmul on CPU.
    q_bkqh = q_btkgh.transpose(0, 2, 3, 1, 4).reshape(b, k, g * t, hd)
    score = jnp.einsum("bkqh,bksh->bkqs", q_bkqh, k_bksh, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        score = softcap * jnp.tanh(score / softcap)
    visible_bqs = jnp.tile(seen.mask(), (1, g, 1))
    score = jnp.where(visible_bqs[:, None], score, jnp.finfo(jnp.float32).min)
    weight = jax.nn.softmax(score, axis=-1) if sinks_kg is None else _softmax_with(jnp.repeat(sinks_kg, t, 1), score)
    mixed = jnp.einsum("bkqs,bksh->bkqh", weight.astype(v_bksh.dtype), v_bksh)
    return mixed.reshape(b, k, g, t, hd).transpose(0, 3, 1, 2, 4).reshape(b, t, k * g * hd)


def _softmax_with(sinks_kq: Float[Array, "k q"], score: Float[Array, "b k q s"]) -> Float[Array, "b k q s"]:
    """The softmax of each query's scores and sink, without the probability of the sink.

    >>> _softmax_with(jnp.zeros((1, 1)), jnp.log(jnp.array([[[[1.0, 2.0]]]]))).tolist()
    [[[[0.25, 0.5]]]]
    """
    sink = sinks_kq.astype(score.dtype)[None, :, :, None]
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(score, axis=-1, keepdims=True), sink))
    weight = jnp.exp(score - largest)
    return weight / (jnp.sum(weight, axis=-1, keepdims=True) + jnp.exp(sink - largest))
