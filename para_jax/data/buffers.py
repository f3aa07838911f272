"""`Example` and `Examples`: tokenized rows, stored compactly.

An `Example` has the input tokens of a row and the token to predict at each position. `Examples` stores all rows of a
source in two buffers, ids and targets, and its Examples are views. This takes eight bytes per token, in memory and as a
pickle; lists of Python ints take thirty.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from para_jax.errors import ParaJaxError

if TYPE_CHECKING:
    from jaxtyping import Int


@dataclass(frozen=True, eq=False)
class Example:
    """A tokenized row: input tokens, and the targets to predict.

    >>> e = Example.of([5, 6, 7], [8, 0])
    >>> e.ids.tolist(), e.targets.tolist(), len(e)
    ([5, 6, 7, 8], [-1, -1, 8, 0], 5)

    Attributes:
      ids: prompt and response, without the last token of the response, which is only predicted.
      targets: the token to predict at each position, or -1. If there are targets, the last position has one.
      prompt_length: the number of tokens of the prompt, or of a chat's first prompt; adapters are prepared from these.
      prompt, response, references, choices: optional texts; stripped, except for the prompt.
      choice_ids: the tokens of each choice, without an end-of-text token.
      place: the file and line, or the source and row.
    """

    ids: Int[np.ndarray, " n"]
    targets: Int[np.ndarray, " n"]
    prompt_length: int
    prompt: str = ""
    response: str = ""
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    choice_ids: tuple[tuple[int, ...], ...] = ()
    place: str = ""

    @classmethod
    def of(
        cls,
        prompt_ids: Sequence[int] | Int[np.ndarray, " p"],
        response_ids: Sequence[int] | Int[np.ndarray, " r"],
        prompt: str = "",
        response: str = "",
        **rest: Any,
    ) -> Example:
        """From a prompt and a response (empty for generation). Raises ParaJaxError for an empty prompt."""
        p, r = len(prompt_ids), len(response_ids)
        if not p:
            raise ParaJaxError("the prompt has no tokens; an adapter is prepared from it")
        ids = np.empty(p + max(r - 1, 0), np.int32)
        ids[:p], ids[p:] = prompt_ids, response_ids[: r - 1] if r else ()
        targets = np.full(ids.size, -1, np.int32)
        if r:
            targets[p - 1 :] = response_ids
        return cls(ids, targets, p, prompt, response, **rest)

    @property
    def prompt_ids(self) -> Int[np.ndarray, " p"]:
        """The tokens of the prompt."""
        return self.ids[: self.prompt_length]

    @property
    def response_ids(self) -> Int[np.ndarray, " r"]:
        """All targets. The last token of a response is the end-of-text token."""
        return self.targets[self.targets >= 0]

    def __len__(self) -> int:
        """The number of tokens of prompt and response, as counted by `max_length`."""
        return self.ids.size + (bool(self.ids.size) and self.targets.item(-1) >= 0)


class Texts(NamedTuple):
    """The texts of an Example, which evaluation needs."""

    prompt: str = ""
    response: str = ""
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    choice_ids: tuple[tuple[int, ...], ...] = ()


NO_TEXTS = Texts()
# A place, split before the number at its end, which fits into 64 bits.
_NUMBERED = re.compile(r"(?s)(.*?)(0|[1-9]\d{0,17})")


class Places(Sequence[str]):
    """Where rows come from, such as "mail.jsonl:7", stored in twelve bytes each: a source and a number.

    >>> places = Places.of(["a.jsonl:1", "a.jsonl:20", "b row 007", ""])
    >>> list(places), places.sources
    (['a.jsonl:1', 'a.jsonl:20', 'b row 007', ''], ('a.jsonl:', 'b row 00', ''))
    """

    def __init__(
        self, sources: tuple[str, ...], source: Int[np.ndarray, " rows"], number: Int[np.ndarray, " rows"]
    ) -> None:
        self.sources, self.source, self.number = sources, source, number

    @classmethod
    def of(cls, places: Iterable[str]) -> Places:
        """Packs a list of places."""
        known: dict[str, int] = {}
        source, number = array("i"), array("q")
        for place in places:
            found = _NUMBERED.fullmatch(place)
            source.append(known.setdefault(found[1] if found else place, len(known)))
            number.append(int(found[2]) if found else -1)
        return cls(tuple(known), np.array(source, np.int32), np.array(number, np.int64))

    def __len__(self) -> int:
        return len(self.source)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> Places: ...
    def __getitem__(self, index: int | slice | np.ndarray) -> str | Places:
        if isinstance(index, slice | np.ndarray):
            return Places(self.sources, self.source[index], self.number[index])
        number = int(self.number[index])
        return self.sources[self.source[index]] + (str(number) if number >= 0 else "")


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """Many examples in a few arrays. Items and slices are views, created on access.

    >>> examples = Examples.of([Example.of([5, 6], [7, 0], place="a:1"), Example.of([8], [9, 0], place="a:2")])
    >>> examples.lengths.tolist(), examples.target_counts.tolist()
    ([3, 2], [2, 2])
    >>> examples[1].ids.tolist(), examples[1:][0].place
    ([8, 9], 'a:2')

    Attributes:
      ids, targets: of all rows, concatenated.
      starts: the offset of each row.
      lengths: the length of each row, `Example.ids.size`.
      prompt_lengths, target_counts: the number of prompt tokens and of targets of each row.
      places: where each row comes from.
      texts: the texts of each row; None if no row has any.
    """

    ids: Int[np.ndarray, " tokens"]
    targets: Int[np.ndarray, " tokens"]
    starts: Int[np.ndarray, " rows"]
    lengths: Int[np.ndarray, " rows"]
    prompt_lengths: Int[np.ndarray, " rows"]
    target_counts: Int[np.ndarray, " rows"]
    places: Places
    texts: tuple[Texts, ...] | None = None

    @classmethod
    def of(cls, rows: Iterable[Example]) -> Examples:
        """Packs rows, which may be an iterator. Examples are returned unchanged."""
        if isinstance(rows, Examples):
            return rows
        ids, targets, lengths, prompt_lengths, target_counts = (array("i") for _ in range(5))
        texts: list[Texts] = []

        def places() -> Iterator[str]:
            for e in rows:
                ids.frombytes(e.ids.astype(np.int32, copy=False).tobytes())
                targets.frombytes(e.targets.astype(np.int32, copy=False).tobytes())
                lengths.append(e.ids.size)
                prompt_lengths.append(e.prompt_length)
                target_counts.append(int(np.count_nonzero(e.targets >= 0)))
                row_texts = Texts(e.prompt, e.response, e.references, e.choices, e.choice_ids)
                texts.append(NO_TEXTS if row_texts == NO_TEXTS else row_texts)
                yield e.place

        packed_places = Places.of(places())
        arrays = (np.frombuffer(x, np.int32) for x in (ids, targets, lengths, prompt_lengths, target_counts))
        any_texts = any(row_texts is not NO_TEXTS for row_texts in texts)
        return cls._contiguous(*arrays, packed_places, tuple(texts) if any_texts else None)

    @classmethod
    def _contiguous(cls, ids: Any, targets: Any, lengths: Any, *rest: Any) -> Examples:
        return cls(ids, targets, np.cumsum(lengths, dtype=np.int64) - lengths, lengths, *rest)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(
                self.ids,
                self.targets,
                self.starts[index],
                self.lengths[index],
                self.prompt_lengths[index],
                self.target_counts[index],
                self.places[index],
                None if self.texts is None else self.texts[index],
            )
        here = slice(start := int(self.starts[index]), start + int(self.lengths[index]))
        texts = NO_TEXTS if self.texts is None else self.texts[index]
        place = self.places[index]
        return Example(self.ids[here], self.targets[here], int(self.prompt_lengths[index]), *texts, place)

    def __iter__(self) -> Iterator[Example]:
        return map(self.__getitem__, range(len(self)))

    @property
    def highest_token(self) -> int:
        """The highest token id in ids and targets."""
        rows = self.compact()
        return max(int(rows.ids.max(initial=-1)), int(rows.targets.max(initial=-1)))

    def compact(self) -> Examples:
        """The same rows with contiguous buffers that hold nothing else; returns itself if that is the case already."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        total = int(ends[-1]) if len(self) else 0
        if total == self.ids.size and np.array_equal(self.starts, ends - self.lengths):
            return self
        # The index of each token in the current buffers.
        index = np.arange(total) + np.repeat(self.starts - (ends - self.lengths), self.lengths)
        rest = (self.lengths, self.prompt_lengths, self.target_counts, self.places, self.texts)
        return self._contiguous(self.ids[index], self.targets[index], *rest)

    def __reduce__(self) -> tuple[Any, ...]:
        rows = self.compact()
        # As bytes, which every pickle protocol stores without overhead.
        arrays = (rows.ids, rows.targets, rows.lengths, rows.prompt_lengths, rows.target_counts)
        return _unpickle, (tuple(x.astype("<i4", copy=False).tobytes() for x in arrays), rows.places, rows.texts)


def _unpickle(arrays: tuple[bytes, ...], *rest: Any) -> Examples:
    return Examples._contiguous(*(np.frombuffer(x, "<i4").astype(np.int32, copy=False) for x in arrays), *rest)
