"""Packing: several sequences of one tenant in a row, so that a few fixed shapes hold rows of any length.

The sequences of a step are packed into rows of one or two lengths (`pack`), and the rows are dealt to micro-batches of
the planned shapes (`deal`). Both depend on their arguments only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Shape(NamedTuple):
    """The static sizes of a micro-batch.

    Attributes:
      rows: packed rows of each group (there is one group for each device that has rows).
      length: tokens of a row.
      segments: sequences of a row, at most.
      targets: tokens to predict in a group, at most.
    """

    rows: int
    length: int
    segments: int
    targets: int

    @property
    def tokens(self) -> int:
        """Token slots of a group."""
        return self.rows * self.length


@dataclass
class Row:
    """A packed row: the place of its tenant in the step, which sequences it holds, their tokens and targets."""

    place: int
    items: list[int] = field(default_factory=list)
    tokens: int = 0
    targets: int = 0

    def fits(self, tokens: int, targets: int, shape: Shape) -> bool:
        """Whether one more sequence of this size fits a row of this shape."""
        return (
            self.tokens + tokens <= shape.length
            and len(self.items) < shape.segments
            and self.targets + targets <= shape.targets
        )


class Sizes(NamedTuple):
    """One tenant's rows of one step: the tokens and the targets of each."""

    tokens: Sequence[int]
    targets: Sequence[int]


def pack(tokens: Sequence[int], targets: Sequence[int], shapes: Sequence[Shape], place: int = 0) -> list[list[Row]]:
    """Packs one tenant's sequences into rows, best fit, the longest sequence first.

    `shapes` differ in length and come by length; a sequence opens a row of the shortest that it fits, and fills what is
    left in others. Returns the rows of each shape. Every sequence has to fit the longest.

    >>> shapes = [Shape(1, 8, 4, 9), Shape(1, 12, 4, 9)]
    >>> [[row.items for row in rows] for rows in pack([5, 3, 9, 4], [1, 1, 1, 1], shapes)]
    [[[0, 1], [3]], [[2]]]
    """
    rows: list[list[Row]] = [[] for _ in shapes]
    for item in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        need, wants = tokens[item], targets[item]
        open_rows = [
            (shape.length - row.tokens, at, i)
            for at, shape in enumerate(shapes)
            for i, row in enumerate(rows[at])
            if row.fits(need, wants, shape)
        ]
        if open_rows:
            _, at, i = min(open_rows)
            row = rows[at][i]
        else:
            at = next(i for i, shape in enumerate(shapes) if need <= shape.length)
            row = Row(place)
            rows[at].append(row)
        row.items.append(item)
        row.tokens += need
        row.targets += wants
    return rows


def deal(rows: Sequence[Sequence[Row]], shapes: Sequence[Shape]) -> Iterator[tuple[int, list[list[Row]]]]:
    """Deals each group's rows, all of one length, to micro-batches of one or two shapes of that length.

    The shapes come by rows. What is left is dealt to the largest while it is more than that holds, and then to the
    smallest that holds it. Yields the number of the shape and the rows of each group.

    >>> small, large = Shape(1, 8, 4, 9), Shape(3, 8, 4, 9)
    >>> [(at, len(rows[0])) for at, rows in deal([[Row(0)] * 7], [small, large])]
    [(1, 3), (1, 3), (0, 1)]
    """
    at = [0] * len(rows)
    while any(at[g] < len(own) for g, own in enumerate(rows)):
        left = max(len(own) - at[g] for g, own in enumerate(rows))
        chosen = next((i for i, shape in enumerate(shapes) if left <= shape.rows), len(shapes) - 1)
        dealt: list[list[Row]] = []
        for g, own in enumerate(rows):
            start, targets = at[g], 0
            while at[g] < min(len(own), start + shapes[chosen].rows):
                targets += own[at[g]].targets
                if targets > shapes[chosen].targets:
                    break
                at[g] += 1
            dealt.append(list(own[start : at[g]]))
        yield chosen, dealt


def pack_step(step: Sequence[Sizes], shapes: Sequence[Shape]) -> list[list[Row]]:
    """A step's rows of each length, all tenants' after another."""
    packed = [pack(own.tokens, own.targets, shapes, place) for place, own in enumerate(step)]
    return [[row for rows in packed for row in rows[at]] for at in range(len(shapes))]


def micro_batches(
    step: Sequence[Sizes], shapes: Sequence[Shape], groups: int, group_of: Sequence[int] | None = None
) -> Iterator[tuple[int, list[list[Row]]]]:
    """A step's rows packed and dealt: the number of a shape, and the rows of each group, for each micro-batch.

    `group_of` says in which group each tenant's rows have to be; without it they are dealt over all groups in turn.
    """
    lengths = dict.fromkeys(shape.length for shape in shapes)
    longest = [max((s for s in shapes if s.length == length), key=lambda s: s.rows) for length in lengths]
    limits = [shape._replace(targets=min(s.targets for s in shapes if s.length == shape.length)) for shape in longest]
    for at, rows in enumerate(pack_step(step, limits)):
        of_groups: list[list[Row]] = [[] for _ in range(groups)]
        for turn, row in enumerate(rows):
            of_groups[turn % groups if group_of is None else group_of[row.place]].append(row)
        own = [i for i, shape in enumerate(shapes) if shape.length == limits[at].length]
        for chosen, dealt in deal(of_groups, [shapes[i] for i in own]):
            yield own[chosen], dealt
