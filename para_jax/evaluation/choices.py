"""The log-likelihood of given answers, which scores rows with choices without generating text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from para_jax.adapters.bank import AdapterBank, batch_rows
from para_jax.adapters.rows import Rows, Tenant
from para_jax.annotations import Array, Float, Int
from para_jax.backbones.decoder import Backbone
from para_jax.checks import COUNT
from para_jax.decoding.loop import bucket
from para_jax.decoding.requests import tenant_rows
from para_jax.distributed import gather
from para_jax.errors import ParaJaxError


class _Pair(NamedTuple):
    row: int
    choice: int
    prompt: Sequence[int]
    answer: Sequence[int]
    tenant: Tenant


def choice_log_likelihoods(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    *,
    bank: AdapterBank | None = None,
    tenants: Sequence[Tenant] | None = None,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """log p(choice | prompt), summed over the choice's tokens, for every choice of every row.

    Args:
      backbone: the frozen model.
      prompts: each row's prompt as token ids. Adapters are prepared from the prompt only.
      choices: each row's choices as token ids, any number of them. With an end-of-text token after each, a choice that
        is a prefix of another is compared fairly.
      bank, tenants: the adapters, and for each row its tenant's name, None, or names with adapter weights.
      batch_size: the number of (row, choice) pairs that run together. Pairs are sorted by length and padded to one of a
        few sizes, each with its program.
      progress: is called with the numbers of pairs done and in total.

    Returns float32 sums as Python floats, in the shape of `choices`. Raises ParaJaxError for an empty prompt or
    choice, a pair longer than the backbone's context, or an unknown tenant.

    >>> from para_jax import Backbone, tiny_backbone_path
    >>> backbone = Backbone.from_pretrained(tiny_backbone_path())
    >>> [[one, two]] = choice_log_likelihoods(backbone, [[7, 8]], [[[9], [9, 10]]])
    >>> one > two
    True
    """
    batch_size = COUNT.check("batch_size", batch_size)
    if len(prompts) != len(choices):
        raise ParaJaxError(f"{len(prompts)} prompts and {len(choices)} lists of choices; give one for every row")
    row_tenants = tenant_rows(bank, tenants, len(prompts))
    pairs = [
        _Pair(row, i, prompts[row], answer, row_tenants[row])
        for row, answers in enumerate(choices)
        for i, answer in enumerate(answers)
    ]
    _check(pairs, backbone.config.max_position_embeddings)
    scores = [[0.0] * len(answers) for answers in choices]
    # Sorted by size, the pairs of a batch need little padding, and there are few programs.
    pairs.sort(key=_size)
    size = min(batch_size, bucket(len(pairs), least=1))
    for start in range(0, len(pairs), size):
        batch = pairs[start : start + size]
        rows = batch_rows(bank, [p.tenant for p in batch] + [None] * (size - len(batch)), size, backbone.mesh)
        batch_scores = gather(_score(backbone, rows, *_arrays(batch, size)), backbone.mesh)
        for p, score in zip(batch, batch_scores.tolist(), strict=False):
            scores[p.row][p.choice] = score
        if progress is not None:
            progress(start + len(batch), len(pairs))
    return scores


def _check(pairs: Sequence[_Pair], context: int) -> None:
    for p in pairs:
        if not len(p.prompt) or not len(p.answer):
            which = "prompt" if not len(p.prompt) else f"choice {p.choice}"
            raise ParaJaxError(f"row {p.row}: {which} has no tokens")
        if len(p.prompt) + len(p.answer) > context:
            raise ParaJaxError(
                f"row {p.row}: prompt and choice {p.choice} have {len(p.prompt)} + {len(p.answer)} tokens; the "
                f"backbone's context is {context}. Shorten the prompt"
            )


def _size(pair: _Pair) -> tuple[int, int]:
    """The padded lengths of a pair and of its answer."""
    return bucket(len(pair.prompt) + len(pair.answer)), bucket(len(pair.answer), least=2)


def _arrays(batch: Sequence[_Pair], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (b, t), the answers again (b, a), and the lengths of prompt and answer (b,); padding rows are empty."""
    t, a = (max(sizes) for sizes in zip(*map(_size, batch), strict=True))
    tokens, answers = np.zeros((size, t), np.int32), np.zeros((size, a), np.int32)
    prompt_length, answer_length = np.zeros(size, np.int32), np.zeros(size, np.int32)
    for i, p in enumerate(batch):
        prompt_length[i], answer_length[i] = len(p.prompt), len(p.answer)
        tokens[i, : len(p.prompt) + len(p.answer)] = [*p.prompt, *p.answer]
        answers[i, : len(p.answer)] = p.answer
    return tokens, answers, prompt_length, answer_length


@jax.jit
def _score(
    backbone: Backbone,
    rows: Rows,
    tokens_bt: Int[Array, "b t"],
    answers_ba: Int[Array, "b a"],
    prompt_length_b: Int[Array, " b"],
    answer_length_b: Int[Array, " b"],
) -> Float[Array, " b"]:
    column_t = jnp.arange(tokens_bt.shape[1])[None, :]
    place_a = jnp.arange(answers_ba.shape[1])[None, :]
    prompt_mask_bt = column_t < prompt_length_b[:, None]
    mask_bt = column_t < (prompt_length_b + answer_length_b)[:, None]
    hidden, _, _ = backbone.forward(tokens_bt, mask_bt, prompt_mask_bt, rows)
    # A column's logits predict the next column. To save memory, only the logits of the answer are computed.
    column_ba = jnp.clip(prompt_length_b[:, None] - 1 + place_a, 0, tokens_bt.shape[1] - 1)
    log_p = jax.nn.log_softmax(backbone.logits(jnp.take_along_axis(hidden, column_ba[..., None], axis=1)), axis=-1)
    log_p_ba = jnp.take_along_axis(log_p, answers_ba[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(place_a < answer_length_b[:, None], log_p_ba, 0), axis=1)
