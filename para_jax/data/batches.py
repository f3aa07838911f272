"""Micro-batches of packed rows: each row holds sequences of one tenant, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax
import numpy as np

from para_jax.data.examples import Example
from para_jax.data.packing import Row, Shape

if TYPE_CHECKING:
    from jaxtyping import Int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens", "length", "prompt_length", "item", "place", "target_place", "target_token", "target_tenant", "count"
    ],
    meta_fields=[],
)  # fmt: skip
@dataclass(frozen=True)
class Batch:
    """The rows of one micro-batch, in g groups of rows: one for every device that has rows.

    The b rows stand group by group. Each group serves n places, which hold a tenant or nothing.

    Attributes:
      tokens: (b, t) the sequences of a row, one after the other, padded on the right.
      length, prompt_length: (b, s) tokens of each sequence, and of its prompt; 0 where there is none.
      item: (b, s) the number of each sequence among its tenant's rows of the step.
      place: (g, e) the place of the tenant of each of a group's adapters, from 0; n where a row has none. Each adapter
        serves b / (g e) consecutive rows.
      target_place: (g, k) where targets are predicted, as indices into the b / g * t tokens of a group.
      target_token: (g, k) which token is to come there.
      target_tenant: (g, k) the place of its tenant; n where the list is longer than there are targets.
      count: (g, n) each place's targets in all micro-batches of the step, over which its loss is the mean.
    """

    tokens: Int[np.ndarray, "b t"]
    length: Int[np.ndarray, "b s"]
    prompt_length: Int[np.ndarray, "b s"]
    item: Int[np.ndarray, "b s"]
    place: Int[np.ndarray, "g e"]
    target_place: Int[np.ndarray, "g k"]
    target_token: Int[np.ndarray, "g k"]
    target_tenant: Int[np.ndarray, "g k"]
    count: Int[np.ndarray, "g n"]

    @property
    def repeats(self) -> int:
        """How many consecutive rows an adapter serves."""
        return self.tokens.shape[0] // self.place.size


def make_batch(
    shape: Shape,
    rows: Sequence[Sequence[Row]],
    examples: Sequence[Sequence[Example]],
    count: Int[np.ndarray, "g n"],
    repeats: int = 1,
) -> Batch:
    """A micro-batch of this shape of each group's packed rows.

    Args:
      examples: of each place that a row names, the sequences that its items count from.
      count: as in `Batch`.
      repeats: how many consecutive rows have one tenant.
    """
    g, n = count.shape
    b = g * shape.rows
    tokens = np.zeros((b, shape.length), np.int32)
    length, prompt_length, item = (np.zeros((b, shape.segments), np.int32) for _ in range(3))
    place = np.full((g, shape.rows // repeats), n, np.int32)
    target_place, target_token = (np.zeros((g, shape.targets), np.int32) for _ in range(2))
    target_tenant = np.full((g, shape.targets), n, np.int32)
    for group, own in enumerate(rows):
        filled = 0
        for i, row in enumerate(own):
            local = row.place % n
            place[group, i // repeats] = local
            at, start = group * shape.rows + i, 0
            for s, number in enumerate(row.items):
                example = examples[row.place][number]
                end = start + example.ids.size
                tokens[at, start:end] = example.ids
                length[at, s], prompt_length[at, s] = example.ids.size, example.prompt_length
                item[at, s] = number
                (learnt,) = np.nonzero(example.targets >= 0)
                here = slice(filled, filled + learnt.size)
                target_place[group, here] = i * shape.length + start + learnt
                target_token[group, here] = example.targets[learnt]
                target_tenant[group, here] = local
                start, filled = end, filled + learnt.size
    return Batch(tokens, length, prompt_length, item, place, target_place, target_token, target_tenant, count)


def one_row_each(examples: Sequence[Example], rows: int | None = None) -> Batch:
    """A micro-batch in which every example of one tenant has a row of its own; `rows` adds empty ones.

    >>> batch = one_row_each([Example.of([5, 6], [7, 0]), Example.of([3], [4, 0])])
    >>> batch.tokens.tolist(), batch.target_token[0].tolist()
    ([[5, 6, 7], [3, 4, 0]], [7, 0, 4, 0])
    """
    targets = [int(np.sum(e.targets >= 0)) for e in examples]
    rows = len(examples) if rows is None else rows
    shape = Shape(rows, max(e.ids.size for e in examples), 1, max(1, sum(targets)))
    packed = [Row(0, [i]) for i in range(len(examples))]
    return make_batch(shape, [packed], [examples], np.array([[sum(targets)]], np.int32), repeats=rows)
