"""The token loop: one program generates all tokens of a batch on the device. `Ending` says when a row ends.

Backbones are arguments of these programs, not constants. Features that a batch does not use (a penalty, a temperature,
stop strings) are None in the arguments, and so not in the program. All settings of rows are arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from para_jax.adapters.rows import Rows
from para_jax.annotations import Array, Bool, Float, Int, Int16
from para_jax.backbones.decoder import Backbone, DecodeState
from para_jax.decoding.sampling import Sampler, seen_tokens
from para_jax.decoding.stops import MATCHED, START


def bucket(n: int, most: int | None = None, least: int = 16) -> int:
    """Rounds `n` up to one of a few lengths that programs are compiled for, at most `most`.

    >>> [bucket(n, 2000) for n in (3, 17, 33, 64, 1500, 1600)]
    [16, 24, 48, 64, 1536, 2000]
    """
    while 2 * least < n:
        least *= 2
    size = next(size for size in range(least, 2 * least + 1, max(1, least // 2)) if size >= n)
    return size if most is None else min(size, most)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ending:
    """When rows end.

    Attributes:
      limit_b: int32, the maximum number of tokens of a row; 0 for a padding row of the batch.
      eos_e: int32, the tokens that end a row, padded with -1.
      table_sv: the table of the stop strings, if any.
    """

    limit_b: Int[Array, " b"]
    eos_e: Int[Array, " e"]
    table_sv: Int16[Array, "s v"] | None = None

    def start(self, *shape: int) -> Int16[Array, "*b"] | None:
        """The state of the stop strings before the first token."""
        return None if self.table_sv is None else jnp.full(shape, START, self.table_sv.dtype)

    def after(
        self, stop: Int16[Array, "*b"] | None, token: Int[Array, "*b"]
    ) -> tuple[Int16[Array, "*b"] | None, Bool[Array, "*b"]]:
        """The state of the stop strings after these tokens, and which of them end their text."""
        ends = jnp.any(token[..., None] == jnp.expand_dims(self.eos_e, range(token.ndim)), axis=-1)
        if self.table_sv is None or stop is None:
            return None, ends
        stop = self.table_sv[stop, token]
        return stop, ends | (stop == MATCHED)


class Prompts(NamedTuple):
    """Left-padded token ids, and the mask of those that are not padding."""

    tokens_bt: Int[Array, "b t"]
    mask_bt: Bool[Array, "b t"]


class Generated(NamedTuple):
    """The generated tokens of a batch.

    Attributes:
      count_b: the number of tokens of each row.
      stopped_b: whether a row ended with an eos token or a stop string.
      finite_b: whether its logits were finite. A row ends before the first token with NaN or infinite logits.
    """

    tokens_bt: Int[Array, "b t"]
    count_b: Int[Array, " b"]
    stopped_b: Bool[Array, " b"]
    finite_b: Bool[Array, " b"]


class _Carry(NamedTuple):
    generated: Generated
    done_b: Bool[Array, " b"]
    token_b: Int[Array, " b"]
    stop_b: Int16[Array, " b"] | None
    seen_bv: Bool[Array, "b v"] | None
    step: Int[Array, ""]
    state: DecodeState


def finite(logits_bv: Float[Array, "b v"]) -> Bool[Array, " b"]:
    """Whether the highest logit of each row is finite, so that a token can be chosen.

    >>> finite(jnp.array([[1.0, -jnp.inf], [1.0, jnp.nan], [jnp.inf, 1.0]])).tolist()
    [True, False, False]
    """
    return jnp.isfinite(jnp.max(logits_bv, axis=1))


@partial(jax.jit, static_argnames="length")
def prefill(backbone: Backbone, prompts: Prompts, rows: Rows, length: int) -> tuple[Float[Array, "b v"], DecodeState]:
    """Runs the prompts, with a cache for `length` tokens in total."""
    return backbone.prefill(prompts.tokens_bt, prompts.mask_bt, rows, length)


@partial(jax.jit, static_argnames="room", donate_argnames="state")
def run(
    backbone: Backbone,
    logits_bv: Float[Array, "b v"],
    state: DecodeState,
    sampler: Sampler,
    ending: Ending,
    prompts: Prompts,
    room: int,
) -> tuple[Generated, DecodeState]:
    """Generates until every row is done, up to `room` tokens per row.

    The state is donated and returned, so that the loop updates keys and values in place.
    """
    b, v = logits_bv.shape

    def advance(carry: _Carry, logits_bv: Array) -> _Carry:
        token_b = sampler.choose(logits_bv, carry.seen_bv, carry.step)
        stop_b, ends_b = ending.after(carry.stop_b, token_b)
        seen_bv = None if carry.seen_bv is None else carry.seen_bv.at[jnp.arange(b), token_b].set(True)
        finite_b = finite(logits_bv)
        written_b1 = jnp.where(carry.done_b, 0, token_b)[:, None]
        generated = Generated(
            jax.lax.dynamic_update_slice(carry.generated.tokens_bt, written_b1, (0, carry.step)),
            jnp.where(carry.done_b | ~finite_b, carry.generated.count_b, carry.step + 1),
            carry.generated.stopped_b | (ends_b & ~carry.done_b),
            carry.generated.finite_b & (finite_b | carry.done_b),
        )
        done_b = carry.done_b | ends_b | ~finite_b | (generated.count_b >= ending.limit_b)
        return _Carry(generated, done_b, token_b, stop_b, seen_bv, carry.step + 1, carry.state)

    def body(carry: _Carry) -> _Carry:
        logits_bv, state = backbone.decode(carry.token_b, carry.state)
        return advance(carry._replace(state=state), logits_bv)

    count_b = jnp.zeros((b,), jnp.int32)
    carry = _Carry(
        generated=Generated(jnp.zeros((b, room), jnp.int32), count_b, jnp.zeros((b,), bool), jnp.ones((b,), bool)),
        done_b=ending.limit_b == 0,
        token_b=jnp.zeros((b,), jnp.int32),
        stop_b=ending.start(b),
        seen_bv=None if sampler.penalty_b is None else seen_tokens(*prompts, v),
        step=jnp.zeros((), jnp.int32),
        state=state,
    )
    # The last token is chosen but not decoded, so the first token is chosen before the loop.
    carry = jax.lax.while_loop(lambda c: ~jnp.all(c.done_b), body, advance(carry, logits_bv))
    return carry.generated, carry.state
