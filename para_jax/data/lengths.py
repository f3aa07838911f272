"""Rows that are too long: refused, cut, or left out, and said."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from para_jax.data.buffers import Example, Examples
from para_jax.data.rows import Turn
from para_jax.errors import ParaJaxError

SHORTEN = "remove them, or pass truncate (--truncate) to cut their prompts at the beginning"


def row_length(asked: int | None, context: int) -> int:
    """The most tokens of a row: `asked`, or else the backbone's context. Raises ParaJaxError for more than that."""
    if asked is not None and asked > context:
        raise ParaJaxError(f"--max-length must be at most {context}, the backbone's context, not {asked}")
    return asked or context


class Letters:
    """How many letters a text may have before it is too long whatever its tokens are."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    @cached_property
    def most(self) -> int:
        return self.max_length * max(map(len, self.tokenizer.get_vocab()))

    def check(self, own: Sequence[Turn]) -> None:
        """Raises ParaJaxError for a text that is too long."""
        letters = max((len(turn.prompt) + len(turn.answer) for turn in own), default=0)
        if letters > 16 * self.max_length and letters > self.most:
            raise ParaJaxError(f"{letters:,} letters are more than {self.max_length} tokens; {SHORTEN}")


class Cuts:
    """Cuts examples to a length, and says how many and by how much."""

    def __init__(self, limit: int, bos: int | None) -> None:
        self.limit, self.bos = limit, bos
        self.by: list[int] = []
        self.left_out: list[str] = []

    def cut(self, e: Example) -> Example | None:
        """The example in at most so many tokens; None if its response is too long."""
        short = cut(e, self.limit, self.bos)
        if short is None:
            self.left_out.append(e.place)
        elif short is not e:
            self.by.append(len(e) - len(short))
        return short

    def say(self, kept: int) -> None:
        """Warns of what was cut. Raises ParaJaxError if nothing is left."""
        log = logging.getLogger(__name__)
        if self.by:
            log.warning(
                "%d of %d rows are longer than %s tokens; their prompts are cut at the beginning, by %d tokens in the "
                "mean and by %d at most", len(self.by), kept, self.limit, sum(self.by) // len(self.by), max(self.by),
            )  # fmt: skip
        if self.left_out:
            what = (
                f"{len(self.left_out)} rows are left out: their responses leave less than a quarter of {self.limit} "
                f"tokens for the prompt (the first: {self.left_out[0]})"
            )
            if not kept:
                raise ParaJaxError(f"{what}, and no row is left; pass a larger max_length (--max-length)")
            log.warning("%s", what)


def check_sizes(examples: Examples, max_length: int) -> None:
    """Raises ParaJaxError if rows are too long."""
    sizes = examples.lengths + (examples.target_counts > 0)
    long = int(np.count_nonzero(sizes > max_length))
    if long:
        longest = int(np.argmax(sizes))
        raise ParaJaxError(
            f"{long} of {len(examples)} rows are longer than {max_length} tokens (the longest has {sizes[longest]}: "
            f"{examples.places[longest]}); {SHORTEN}"
        )


def check_lengths(examples: Sequence[Example], context: int) -> None:
    """Raises ParaJaxError for the first row that is longer than the backbone's context."""
    for e in examples:
        if len(e) > context:
            raise ParaJaxError(
                f"{e.place or 'a row'}: {len(e)} tokens are longer than the backbone's context of {context}; shorten "
                "the row, or read the rows with max_length"
            )


def cut(e: Example, max_length: int, bos: int | None) -> Example | None:
    """The example with its prompt cut at the beginning, behind its beginning-of-text token; its response is kept whole.

    None if the response leaves less than a quarter of `max_length` for the prompt.
    """
    if len(e) <= max_length:
        return e
    response = e.response_ids
    room = max_length - response.size
    if room < max(1, max_length // 4):
        return None
    begins = e.prompt_ids[:1] if room > 1 and e.prompt_ids[0] == bos else e.prompt_ids[:0]
    prompt = [*begins, *e.prompt_ids[len(e.prompt_ids) - (room - begins.size) :]]
    short = Example.of(prompt, response)
    return replace(e, ids=short.ids, targets=short.targets, prompt_length=short.prompt_length)
