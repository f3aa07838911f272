"""`Example` and `Examples`: tokenized rows, stored compactly.

An `Example` has the input tokens of a row and the token to predict at each position. `Examples` stores all rows of a
source in two buffers, ids and targets, and its items are views. This takes eight bytes per token; lists of Python ints
take thirty.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np

from para_jax.annotations import Int
from para_jax.errors import ParaJaxError


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


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """Many examples in a few arrays. Items are views, created on access.

    >>> examples = Examples.of([Example.of([5, 6], [7, 0], place="a:1"), Example.of([8], [9, 0], place="a:2")])
    >>> examples.lengths.tolist(), examples.target_counts.tolist()
    ([3, 2], [2, 2])
    >>> examples[1].ids.tolist(), examples[1:][0].place
    ([8, 9], 'a:2')

    Attributes:
      ids, targets: of all rows, concatenated.
      lengths: the length of each row, `Example.ids.size`.
      prompt_lengths, target_counts: the number of prompt tokens and of targets of each row.
      places: where each row comes from.
      texts: the texts of each row; None if no row has any.
    """

    ids: Int[np.ndarray, " tokens"]
    targets: Int[np.ndarray, " tokens"]
    lengths: Int[np.ndarray, " rows"]
    prompt_lengths: Int[np.ndarray, " rows"]
    target_counts: Int[np.ndarray, " rows"]
    places: tuple[str, ...]
    texts: tuple[Texts, ...] | None = None

    @classmethod
    def of(cls, rows: Iterable[Example]) -> Examples:
        """Packs rows, which may be an iterator. Examples are returned unchanged."""
        if isinstance(rows, Examples):
            return rows
        arrays = ids, targets, lengths, prompt_lengths, target_counts = [array("i") for _ in range(5)]
        places: list[str] = []
        texts: list[Texts] = []
        for e in rows:
            ids.frombytes(e.ids.astype(np.int32, copy=False).tobytes())
            targets.frombytes(e.targets.astype(np.int32, copy=False).tobytes())
            lengths.append(e.ids.size)
            prompt_lengths.append(e.prompt_length)
            target_counts.append(int(np.count_nonzero(e.targets >= 0)))
            row_texts = Texts(e.prompt, e.response, e.references, e.choices, e.choice_ids)
            texts.append(NO_TEXTS if row_texts == NO_TEXTS else row_texts)
            places.append(e.place)
        any_texts = any(row_texts is not NO_TEXTS for row_texts in texts)
        packed: Any = [np.frombuffer(x, np.int32) for x in arrays]
        packed += [tuple(places), tuple(texts) if any_texts else None]
        return cls(*packed)

    @cached_property
    def _ends(self) -> Int[np.ndarray, " rows"]:
        return np.cumsum(self.lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples.of(self[i] for i in range(len(self))[index])
        end = int(self._ends[index])
        here = slice(end - int(self.lengths[index]), end)
        texts = NO_TEXTS if self.texts is None else self.texts[index]
        return Example(self.ids[here], self.targets[here], int(self.prompt_lengths[index]), *texts, self.places[index])

    def __iter__(self) -> Iterator[Example]:
        return map(self.__getitem__, range(len(self)))
