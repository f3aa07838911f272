"""Padded batches in which every tenant has the same number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import numpy as np

from para_jax.backbones.ragged import Line
from para_jax.data.examples import Example

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Int

# The fields of a Batch that have an entry for each micro-batch.
OF_MICRO_BATCHES = ("tokens", "length", "prompt_length", "target_place", "target_token", "target_tenant")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[*OF_MICRO_BATCHES, "target_count"],
    meta_fields=["line"],
)
@dataclass(frozen=True)
class Batch:
    """The rows of one step, in a micro-batches of g groups of rows: one for every device that has rows.

    The b rows of a micro-batch stand group by group; in each group are those of its n tenants one after the other,
    the same number of each.

    Attributes:
      tokens: (a, b, t) prompt and response, padded on the right.
      length, prompt_length: (a, b) tokens in all, and of the prompt.
      target_place: (a, g, k) where response tokens are predicted, as indices into the b / g * t tokens of a group.
      target_token: (a, g, k) which token is to come there.
      target_tenant: (a, g, k) which of its group's tenants it is of, from 0; n where the list is longer than there are
        response tokens.
      target_count: (g, n) each tenant's response tokens in all micro-batches of its group.
      line: the static sizes of the lines that a micro-batch's tokens take, one for each group.
    """

    tokens: Int[np.ndarray, "a b t"]
    length: Int[np.ndarray, "a b"]
    prompt_length: Int[np.ndarray, "a b"]
    target_place: Int[np.ndarray, "a g k"]
    target_token: Int[np.ndarray, "a g k"]
    target_tenant: Int[np.ndarray, "a g k"]
    target_count: Int[np.ndarray, "g n"]
    line: Line

    def micro_batch(self, index: int | Int[Array, ""]) -> Batch:
        """One micro-batch, without the leading axis; its counts are still those of all."""
        return replace(self, **{name: getattr(self, name)[index] for name in OF_MICRO_BATCHES})

    @property
    def size(self) -> int:
        """Tokens that are not padding."""
        return int(np.sum(self.length))


def bucket(size: int, least: int = 16, parts: int = 2) -> int:
    """The next of a series that doubles every `parts` even steps: few shapes to compile, and few places unused.

    >>> [bucket(n) for n in (1, 17, 25, 33, 100)]
    [16, 24, 32, 48, 128]
    >>> bucket(1100, parts=4)
    1280
    """
    while 2 * least < size:
        least *= 2
    return next(n for n in range(least, 2 * least + 1, max(1, least // parts)) if n >= size)


def pad(parts: Sequence[Sequence[Sequence[Example]]], groups: int = 1) -> Batch:
    """A batch of micro-batches of tenants of examples; all tenants have as many. Tenants stand group by group."""
    rows = [[(tenant, e) for tenant, some in enumerate(part) for e in some] for part in parts]
    a, b, g, n = len(rows), len(rows[0]), groups, len(parts[0]) // groups
    own = b // g

    def of_groups(part: list[tuple[int, Example]]) -> list[list[Example]]:
        return [[e for _, e in part[i * own : (i + 1) * own]] for i in range(g)]

    lines = [some for part in rows for some in of_groups(part)]
    t = bucket(max(len(e) for some in lines for e in some))
    k = bucket(max(sum(len(e.response_ids) for e in some) for some in lines), parts=4)
    shorter = max((sorted(map(len, some))[own // 2 - 1] for some in lines if own > 1), default=0)
    line = Line(bucket(max(sum(map(len, some)) for some in lines), parts=4), min(t, bucket(shorter)), g)
    tokens, length, prompt_length = (np.zeros(shape, np.int32) for shape in ((a, b, t), (a, b), (a, b)))
    place, token, whose = (np.full((a, g, k), fill, np.int32) for fill in (0, 0, n))
    for i, part in enumerate(rows):
        filled = [0] * g
        for row, (tenant, e) in enumerate(part):
            learnt, group = np.flatnonzero(e.targets >= 0), row // own
            r, n_ids = learnt.size, e.ids.size
            tokens[i, row, :n_ids] = e.ids
            if r:
                tokens[i, row, n_ids] = e.targets[-1]
            length[i, row], prompt_length[i, row] = len(e), e.prompt_length
            here = slice(filled[group], filled[group] + r)
            # A token is predicted at the place before its own.
            place[i, group, here] = row % own * t + learnt
            token[i, group, here] = e.targets[learnt]
            whose[i, group, here] = tenant % n
            filled[group] += r
    counts = [np.bincount(whose[:, i].reshape(-1), minlength=n + 1)[:n] for i in range(g)]
    return Batch(tokens, length, prompt_length, place, token, whose, np.array(counts, np.int32), line)
