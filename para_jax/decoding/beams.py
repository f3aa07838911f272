"""Beam search on the device, equivalent to transformers' at every step.

A row has `beams` open texts and up to as many finished ones. Every step takes the best continuations of all open texts.
Those that end compete for the places of the finished texts, by log-probability / tokens**length_penalty, and the best
of the others stay open. A row is done when its open texts cannot overtake its finished ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from para_jax.annotations import Array, Bool, Float, Int, Int16
from para_jax.backbones.decoder import Backbone, DecodeState
from para_jax.decoding.loop import Ending, Generated, Prompts, finite
from para_jax.decoding.sampling import Sampler, seen_tokens

EarlyStopping = bool | Literal["never"]
RULED_OUT = -1.0e9  # the score of an excluded text, as in transformers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scoring:
    """How finished texts are ranked, and when a row stops (transformers' `early_stopping`).

    Attributes:
      length_penalty: float32; above zero favours long texts.
      when_full: a row is done as soon as it has as many finished texts as beams.
      never: a row is done only when no open text can overtake, even at its maximum length. If both are False, an open
        text is scored at its current length.
    """

    length_penalty: Float[Array, ""]
    when_full: Bool[Array, ""]
    never: Bool[Array, ""]

    def score(self, log_probability: Float[Array, "*b"], length: Int[Array, "*b"]) -> Float[Array, "*b"]:
        return log_probability / length.astype(jnp.float32) ** self.length_penalty


class _Open(NamedTuple):
    """The n open texts of each row, the best first."""

    score_bn: Float[Array, "b n"]
    tokens_bnt: Int[Array, "b n t"]
    token_bn: Int[Array, "b n"]
    stop_bn: Int16[Array, "b n"] | None
    seen_bnv: Bool[Array, "b n v"] | None
    parent_bn: Int[Array, "b n"]


class _Finished(NamedTuple):
    """The finished texts of each row, the best first; places that are not `filled_bn` yet come last."""

    score_bn: Float[Array, "b n"]
    tokens_bnt: Int[Array, "b n t"]
    count_bn: Int[Array, "b n"]
    stopped_bn: Bool[Array, "b n"]
    filled_bn: Bool[Array, "b n"]


class _Carry(NamedTuple):
    open: _Open
    finished: _Finished
    done_b: Bool[Array, " b"]
    finite_b: Bool[Array, " b"]
    step: Int[Array, ""]
    state: DecodeState


def _take(tree: Any, index_bn: Int[Array, "b n"]) -> Any:
    return jax.tree.map(lambda x: jax.vmap(lambda row, index: row[index])(x, index_bn), tree)


def _continue(
    texts: _Open, logits_bv: Float[Array, "bn v"], sampler: Sampler, ending: Ending, step: Array, keep: int
) -> tuple[_Open, Bool[Array, "b k"]]:
    """The `keep` best continuations of a row's open texts, and which of them end with an eos token or stop string."""
    b, n = texts.score_bn.shape
    v = logits_bv.shape[-1]
    seen_bv = None if texts.seen_bnv is None else texts.seen_bnv.reshape(b * n, v)
    # transformers applies the penalty to log-probabilities here.
    more_bnv = sampler.penalised(jax.nn.log_softmax(logits_bv), seen_bv).reshape(b, n, v)
    score_bk, index_bk = jax.lax.top_k((texts.score_bn[..., None] + more_bnv).reshape(b, n * v), keep)
    parent_bk, token_bk = index_bk // v, index_bk % v
    stop_bk, ends_bk = ending.after(_take(texts.stop_bn, parent_bk), token_bk)
    tokens_bkt = _take(texts.tokens_bnt, parent_bk).at[:, :, step].set(token_bk)
    return _Open(score_bk, tokens_bkt, token_bk, stop_bk, None, parent_bk), ends_bk


def _advance(
    carry: _Carry, logits_bv: Float[Array, "bn v"], sampler: Sampler, ending: Ending, scoring: Scoring, keep: int
) -> _Carry:
    """One more token: each of the best continuations finishes, stays open or is dropped."""
    b, n = carry.open.score_bn.shape
    found, ends_bk = _continue(carry.open, logits_bv, sampler, ending, carry.step, keep)
    length = carry.step + 1
    hit_bk = ends_bk | (length >= ending.limit_b)[:, None]

    # Only the n best continuations may finish. A row that is done takes no more.
    finishes_bk = hit_bk & (jnp.arange(keep) < n)[None] & ~carry.done_b[:, None]
    new = _Finished(
        jnp.where(finishes_bk, scoring.score(found.score_bn, length), -jnp.inf),
        found.tokens_bnt,
        jnp.full((b, keep), length),
        ends_bk,
        finishes_bk,
    )
    merged = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), carry.finished, new)
    finished = _take(merged, jax.lax.top_k(merged.score_bn, n)[1])

    score_bk = found.score_bn + jnp.where(hit_bk, RULED_OUT, 0.0)
    score_bn, best_bn = jax.lax.top_k(score_bk, n)
    going = _take(found, best_bn)._replace(score_bn=score_bn)
    if carry.open.seen_bnv is not None:
        seen_bnv = _take(carry.open.seen_bnv, going.parent_bn)
        row_b1, beam_1n = jnp.arange(b)[:, None], jnp.arange(n)[None]
        going = going._replace(seen_bnv=seen_bnv.at[row_b1, beam_1n, going.token_bn].set(True))

    full_length = scoring.never & (scoring.length_penalty > 0)
    best_open_b = scoring.score(score_bn[:, 0], jnp.where(full_length, ending.limit_b, length))
    # A free place can always be filled.
    worst_b = jnp.where(jnp.all(finished.filled_bn, axis=1), finished.score_bn[:, -1], -jnp.inf)
    done_b = carry.done_b | (best_open_b <= worst_b) | jnp.all(hit_bk, axis=1)
    done_b = done_b | (scoring.when_full & jnp.all(finished.filled_bn, axis=1))
    finite_b = carry.done_b | jnp.all(finite(logits_bv).reshape(b, n), axis=1)
    return _Carry(going, finished, done_b | ~finite_b, carry.finite_b & finite_b, length, carry.state)


@partial(jax.jit, static_argnames=("room", "beams", "keep"))
def search(
    backbone: Backbone,
    logits_bv: Float[Array, "b v"],
    state: DecodeState,
    sampler: Sampler,
    ending: Ending,
    scoring: Scoring,
    prompts: Prompts,
    room: int,
    beams: int,
    keep: int,
) -> Generated:
    """The best text of every row.

    Prefill runs each prompt once; its state is repeated here for the beams, so it is not donated. `keep` is the number
    of continuations to consider: at least (1 + the number of eos tokens) * beams, so that enough of them do not end.
    """
    b, v = logits_bv.shape
    n = beams
    row_of_beam = jnp.repeat(jnp.arange(b), n)
    tokens_bnt = jnp.zeros((b, n, room), jnp.int32)
    zeros_bn = jnp.zeros((b, n), jnp.int32)
    seen_bv = None if sampler.penalty_b is None else seen_tokens(*prompts, v)
    going = _Open(
        # All beams start as the same text, so all but one are excluded.
        score_bn=jnp.broadcast_to(jnp.where(jnp.arange(n) == 0, 0.0, RULED_OUT), (b, n)),
        tokens_bnt=tokens_bnt,
        token_bn=zeros_bn,
        stop_bn=ending.start(b, n),
        seen_bnv=None if seen_bv is None else jnp.repeat(seen_bv[:, None], n, axis=1),
        parent_bn=zeros_bn,
    )
    free_bn = jnp.zeros((b, n), bool)
    finished = _Finished(jnp.full((b, n), RULED_OUT), tokens_bnt, zeros_bn, free_bn, free_bn)
    step, finite_b = jnp.zeros((), jnp.int32), jnp.ones((b,), bool)
    carry = _Carry(going, finished, ending.limit_b == 0, finite_b, step, state.repeated(n))
    sampler = jax.tree.map(lambda x: x[row_of_beam], sampler)

    def body(carry: _Carry) -> _Carry:
        # The beams of a row share its Adjustment, so only keys and values move.
        index = (jnp.arange(b)[:, None] * n + carry.open.parent_bn).reshape(-1)
        state = replace(carry.state, cache=carry.state.cache.rows(index))
        logits_bv, state = backbone.decode(carry.open.token_bn.reshape(-1), state)
        return _advance(carry._replace(state=state), logits_bv, sampler, ending, scoring, keep)

    carry = _advance(carry, logits_bv[row_of_beam], sampler, ending, scoring, keep)
    carry = jax.lax.while_loop(lambda c: ~jnp.all(c.done_b), body, carry)
    tokens_bnt, count_bn, stopped_bn = carry.finished.tokens_bnt, carry.finished.count_bn, carry.finished.stopped_bn
    count_b = jnp.where(carry.finite_b, count_bn[:, 0], 0)
    return Generated(tokens_bnt[:, 0], count_b, stopped_bn[:, 0], carry.finite_b)
