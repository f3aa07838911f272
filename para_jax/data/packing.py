"""Packing: several sequences of one tenant in a row, so that a few fixed shapes hold sequences of any length.

The sequences of a step are packed into rows of one or two lengths (`pack`), and the rows are distributed over
micro-batches of the planned shapes (`deal`). Both are deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Shape(NamedTuple):
    """The static sizes of a micro-batch.

    Attributes:
      rows: the number of packed rows of a group; there is one group for each device with rows.
      length: the number of token slots of a row.
      segments, targets: the maximum numbers of sequences in a row, and of targets in a group.
    """

    rows: int
    length: int
    segments: int
    targets: int

    @property
    def tokens(self) -> int:
        """The number of token slots of a group."""
        return self.rows * self.length


@dataclass
class Row:
    """A packed row: the place of its tenant in the step, its sequences, and their numbers of tokens and targets."""

    place: int
    items: list[int] = field(default_factory=list)
    tokens: int = 0
    targets: int = 0


class Sizes(NamedTuple):
    """The numbers of tokens and of targets of each of a tenant's rows in a step."""

    tokens: Sequence[int]
    targets: Sequence[int]


def pack(tokens: Sequence[int], targets: Sequence[int], shapes: Sequence[Shape], place: int = 0) -> list[list[Row]]:
    """Packs one tenant's sequences into rows: best fit, in order of decreasing length.

    `shapes` have different lengths and are sorted by length. A sequence goes into the fullest open row that it fits, or
    opens a row of the shortest shape that it fits. Returns the rows of each shape. Every sequence must fit the longest.

    >>> shapes = [Shape(1, 8, 4, 9), Shape(1, 12, 4, 9)]
    >>> [[row.items for row in rows] for rows in pack([5, 3, 9, 4], [1, 1, 1, 1], shapes)]
    [[[0, 1], [3]], [[2]]]
    """
    rows: list[list[Row]] = [[] for _ in shapes]
    for item in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        n, n_targets = tokens[item], targets[item]
        open_rows = [
            (shape.length - row.tokens, at, i)
            for at, shape in enumerate(shapes)
            for i, row in enumerate(rows[at])
            if row.tokens + n <= shape.length
            and len(row.items) < shape.segments
            and row.targets + n_targets <= shape.targets
        ]
        if open_rows:
            _, at, i = min(open_rows)
            row = rows[at][i]
        else:
            at = next(i for i, shape in enumerate(shapes) if n <= shape.length)
            row = Row(place)
            rows[at].append(row)
        row.items.append(item)
        row.tokens += n
        row.targets += n_targets
    return rows


def deal(rows: Sequence[Sequence[Row]], shapes: Sequence[Shape]) -> Iterator[tuple[int, list[list[Row]]]]:
    """Distributes each group's rows, all of one length, over micro-batches of one or two shapes of that length.

    The shapes are sorted by their numbers of rows. While more rows are left than the largest shape holds, it uses the
    largest, and then the smallest that holds the rest. Yields the index of the shape and the rows of each group.

    >>> small, large = Shape(1, 8, 4, 9), Shape(3, 8, 4, 9)
    >>> [(at, len(rows[0])) for at, rows in deal([[Row(0)] * 7], [small, large])]
    [(1, 3), (1, 3), (0, 1)]
    """
    done = [0] * len(rows)
    while any(done[g] < len(group) for g, group in enumerate(rows)):
        left = max(len(group) - done[g] for g, group in enumerate(rows))
        chosen = next((i for i, shape in enumerate(shapes) if left <= shape.rows), len(shapes) - 1)
        dealt: list[list[Row]] = []
        for g, group in enumerate(rows):
            start, targets = done[g], 0
            while done[g] < min(len(group), start + shapes[chosen].rows):
                targets += group[done[g]].targets
                if targets > shapes[chosen].targets:
                    break
                done[g] += 1
            dealt.append(list(group[start : done[g]]))
        yield chosen, dealt


def pack_step(step: Sequence[Sizes], shapes: Sequence[Shape]) -> list[list[Row]]:
    packed = [pack(sizes.tokens, sizes.targets, shapes, place) for place, sizes in enumerate(step)]
    return [[row for rows in packed for row in rows[at]] for at in range(len(shapes))]


def micro_batches(
    step: Sequence[Sizes], shapes: Sequence[Shape], groups: int, group_of: Sequence[int] | None = None
) -> Iterator[tuple[int, list[list[Row]]]]:
    """Packs a step. Yields the index of the shape and the rows of each group for each micro-batch.

    `group_of` gives the group of the rows at each place; without it, rows are distributed round-robin over all groups.
    """
    lengths = dict.fromkeys(shape.length for shape in shapes)
    longest = [max((s for s in shapes if s.length == length), key=lambda s: s.rows) for length in lengths]
    limits = [shape._replace(targets=min(s.targets for s in shapes if s.length == shape.length)) for shape in longest]
    for at, rows in enumerate(pack_step(step, limits)):
        by_group: list[list[Row]] = [[] for _ in range(groups)]
        for i, row in enumerate(rows):
            by_group[i % groups if group_of is None else group_of[row.place]].append(row)
        same_length = [i for i, shape in enumerate(shapes) if shape.length == limits[at].length]
        for chosen, dealt in deal(by_group, [shapes[i] for i in same_length]):
            yield same_length[chosen], dealt
