"""Micro-batches of packed rows: each row holds sequences of one tenant, one after the other.

A step of three tenants, A, B and C, on two devices with rows, in one micro-batch of shape `Shape(rows=2, length=8)`:

                     tokens (b=4, t=8)             length (b, s=2)   place (g=2, e=2)
    group 0  row 0   A0 A0 A0 A0 | A1 A1 A1  .     4 3               0   (A)
             row 1   B0 B0 B0 B0 B0 B0  .  .       6 0               1   (B)
    group 1  row 2   B1 B1 B1 | B2 B2  .  .  .     3 2               1   (B)
             row 3   C0 C0 C0 C0 C0  .  .  .       5 0               2   (C)

A *group* is the rows of one device. A *place* is the position of a tenant in the step, here A, B, C = 0, 1, 2; if
tenants are sharded over devices, each group has its own places. The targets of a group are a flat list, because few
token slots have a target and logits are computed only for these. Axes: b rows of all groups, t token slots of a row, s
sequences of a row, g groups, e adapters of a group, k targets of a group, n places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from para_jax.annotations import Int
from para_jax.data.examples import Example
from para_jax.data.packing import Row, Shape


class Targets(NamedTuple):
    """The tokens to predict, for each group of rows.

    Attributes:
      slot: (g, k) the token slot that predicts the target, counted over the group's rows.
      token: (g, k) the token to predict.
      place: (g, k) the place of the tenant; n (out of range) for padding.
    """

    slot: Int[np.ndarray, "g k"]
    token: Int[np.ndarray, "g k"]
    place: Int[np.ndarray, "g k"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One micro-batch, in g groups of rows, one for each device with rows.

    Attributes:
      tokens: (b, t) packed sequences, right-padded.
      length, prompt_length: (b, s) the number of tokens of each sequence, and of its prompt; 0 if there is none.
      item: (b, s) the index of each sequence among its tenant's rows of the step.
      place: (g, e) the place of each adapter of a group; n (out of range) if its rows are empty. Each adapter serves
        b / (g e) consecutive rows.
      targets: the tokens to predict.
      count: (g, n) the number of targets of each place in all micro-batches of the step, the denominator of its loss.
    """

    tokens: Int[np.ndarray, "b t"]
    length: Int[np.ndarray, "b s"]
    prompt_length: Int[np.ndarray, "b s"]
    item: Int[np.ndarray, "b s"]
    place: Int[np.ndarray, "g e"]
    targets: Targets
    count: Int[np.ndarray, "g n"]

    @property
    def repeats(self) -> int:
        """The number of consecutive rows that an adapter serves."""
        return self.tokens.shape[0] // self.place.size


def make_batch(
    shape: Shape,
    rows: Sequence[Sequence[Row]],
    examples: Sequence[Sequence[Example]],
    count: Int[np.ndarray, "g n"],
    repeats: int = 1,
) -> Batch:
    """A micro-batch of this shape from each group's packed rows.

    Args:
      examples: for each place, the sequences that the items of its rows index.
      count: as in `Batch`.
      repeats: the number of consecutive rows with the same tenant.
    """
    g, n = count.shape
    b = g * shape.rows
    tokens = np.zeros((b, shape.length), np.int32)
    length, prompt_length, item = (np.zeros((b, shape.segments), np.int32) for _ in range(3))
    place = np.full((g, shape.rows // repeats), n, np.int32)
    slot, token = (np.zeros((g, shape.targets), np.int32) for _ in range(2))
    targets = Targets(slot, token, np.full((g, shape.targets), n, np.int32))
    for group, group_rows in enumerate(rows):
        filled = 0
        for i, row in enumerate(group_rows):
            local = row.place % n
            place[group, i // repeats] = local
            at, start = group * shape.rows + i, 0
            for s, index in enumerate(row.items):
                example = examples[row.place][index]
                end = start + example.ids.size
                tokens[at, start:end] = example.ids
                length[at, s], prompt_length[at, s] = example.ids.size, example.prompt_length
                item[at, s] = index
                (positions,) = np.nonzero(example.targets >= 0)
                here = slice(filled, filled + positions.size)
                targets.slot[group, here] = i * shape.length + start + positions
                targets.token[group, here] = example.targets[positions]
                targets.place[group, here] = local
                start, filled = end, filled + positions.size
    return Batch(tokens, length, prompt_length, item, place, targets, count)


def one_row_each(examples: Sequence[Example], rows: int | None = None) -> Batch:
    """A micro-batch of one tenant with one example per row, padded with empty rows to `rows`.

    >>> batch = one_row_each([Example.of([5, 6], [7, 0]), Example.of([3], [4, 0])])
    >>> batch.tokens.tolist(), batch.targets.token[0].tolist()
    ([[5, 6, 7], [3, 4, 0]], [7, 0, 4, 0])
    """
    targets = sum(int(np.sum(e.targets >= 0)) for e in examples)
    rows = len(examples) if rows is None else rows
    shape = Shape(rows, max(e.ids.size for e in examples), 1, max(1, targets))
    packed = [Row(0, [i]) for i in range(len(examples))]
    return make_batch(shape, [packed], [examples], np.array([[targets]], np.int32), repeats=rows)
