"""Examples, and many of them in a few arrays.

An `Example` is what a row teaches: the tokens that go in, and the token to predict at each place. `Examples` holds the
rows of a source in one buffer each for all ids and all targets, of which an Example is a view: eight bytes a token,
where Python's ints take thirty, and a pickle that is no larger.
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
    """The tokens that go in, and what is to be predicted from them.

    >>> e = Example.of([5, 6, 7], [8, 0])
    >>> e.ids.tolist(), e.targets.tolist(), len(e)
    ([5, 6, 7, 8], [-1, -1, 8, 0], 5)

    Attributes:
      ids: prompt and response without the response's last token, from which nothing is predicted.
      targets: the token to predict at each place, -1 where nothing is learnt. The last place has one, if any has.
      prompt_length: tokens of the prompt, of a chat's first prompt; adapters are prepared from these.
      prompt, response, references, choices: texts, where they were kept; stripped, but for the prompt.
      choice_ids: the tokens of each choice, without an end.
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
        """A prompt and its response, which is empty for generation. Raises ParaJaxError for an empty prompt."""
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
        """The targets that are learnt; the end-of-text token is the last of a response."""
        return self.targets[self.targets >= 0]

    def __len__(self) -> int:
        """The tokens of prompt and response together, as `max_length` counts them."""
        return self.ids.size + (bool(self.ids.size) and self.targets.item(-1) >= 0)


class Texts(NamedTuple):
    """What an Example has beside its tokens, for those who evaluate."""

    prompt: str = ""
    response: str = ""
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    choice_ids: tuple[tuple[int, ...], ...] = ()


NO_TEXTS = Texts()
# A place and the number at its end, which fits into 64 bits.
_NUMBERED = re.compile(r"(?s)(.*?)(0|[1-9]\d{0,17})")


class Places(Sequence[str]):
    """Where rows come from, such as "mail.jsonl:7", each in twelve bytes: which source, and the number in it.

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
        """These places."""
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
    """Many examples in a few arrays; each one is a view, made when it is asked for, and so is a slice.

    >>> examples = Examples.of([Example.of([5, 6], [7, 0], place="a:1"), Example.of([8], [9, 0], place="a:2")])
    >>> examples.lengths.tolist(), examples.target_counts.tolist()
    ([3, 2], [2, 2])
    >>> examples[1].ids.tolist(), examples[1:][0].place
    ([8, 9], 'a:2')

    Attributes:
      ids, targets: those of all rows.
      starts: where each row's begin.
      lengths: how many each row has, `Example.ids.size`.
      prompt_lengths, target_counts: tokens of each row's prompt, and targets that are learnt.
      places: where each row comes from.
      texts: what else each row has; None if no row has any.
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
        """These rows, taken one by one; what is one already is returned as it is."""
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
                own = Texts(e.prompt, e.response, e.references, e.choices, e.choice_ids)
                texts.append(NO_TEXTS if own == NO_TEXTS else own)
                yield e.place

        where = Places.of(places())
        arrays = (np.frombuffer(x, np.int32) for x in (ids, targets, lengths, prompt_lengths, target_counts))
        kept = None if all(own is NO_TEXTS for own in texts) else tuple(texts)
        return cls._contiguous(*arrays, where, kept)

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
        """The highest of all rows' ids and targets."""
        own = self.compact()
        return max(int(own.ids.max(initial=-1)), int(own.targets.max(initial=-1)))

    def compact(self) -> Examples:
        """The same rows with nothing in the buffers but them, one after the other; of all rows, the same object."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        total = int(ends[-1]) if len(self) else 0
        if total == self.ids.size and np.array_equal(self.starts, ends - self.lengths):
            return self
        # The place of each token in the buffers as they are.
        taken = np.arange(total) + np.repeat(self.starts - (ends - self.lengths), self.lengths)
        rest = (self.lengths, self.prompt_lengths, self.target_counts, self.places, self.texts)
        return self._contiguous(self.ids[taken], self.targets[taken], *rest)

    def __reduce__(self) -> tuple[Any, ...]:
        own = self.compact()
        # As bytes, which every pickle protocol writes as they are.
        arrays = (own.ids, own.targets, own.lengths, own.prompt_lengths, own.target_counts)
        return _unpickled, (tuple(x.astype("<i4", copy=False).tobytes() for x in arrays), own.places, own.texts)


def _unpickled(arrays: tuple[bytes, ...], *rest: Any) -> Examples:
    return Examples._contiguous(*(np.frombuffer(x, "<i4").astype(np.int32, copy=False) for x in arrays), *rest)
