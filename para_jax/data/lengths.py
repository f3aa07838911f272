"""Rows that are too long: an error, or truncated or dropped with a warning."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from para_jax.data.buffers import Example, Examples
from para_jax.errors import ParaJaxError

SHORTEN = "remove them, or pass truncate (--truncate) to cut their prompts at the beginning"


def row_length(requested: int | None, context: int) -> int:
    """`requested`, by default the backbone's context. Raises ParaJaxError if it exceeds the context."""
    if requested is not None and requested > context:
        raise ParaJaxError(f"--max-length must be at most {context}, the backbone's context, not {requested}")
    return requested or context


def check_characters(characters: int, tokenizer: Any, max_length: int) -> None:
    """Raises ParaJaxError if a text has more characters than `max_length` tokens can have."""
    if characters > 16 * max_length and characters > max_length * _longest_token(tokenizer):
        raise ParaJaxError(f"{characters:,} characters are more than {max_length} tokens; {SHORTEN}")


@lru_cache(maxsize=8)
def _longest_token(tokenizer: Any) -> int:
    return max(map(len, tokenizer.get_vocab()))


class Truncation:
    """Truncates examples, and counts how many and by how much."""

    def __init__(self, limit: int, bos: int | None) -> None:
        self.limit, self.bos = limit, bos
        self.removed: list[int] = []
        self.dropped: list[str] = []

    def apply(self, e: Example) -> Example | None:
        """The example with at most `limit` tokens; None if its response is too long."""
        short = truncate(e, self.limit, self.bos)
        if short is None:
            self.dropped.append(e.place)
        elif short is not e:
            self.removed.append(len(e) - len(short))
        return short

    def log(self, kept: int) -> None:
        """Logs warnings about truncated and dropped rows. Raises ParaJaxError if no row is left."""
        log, n = logging.getLogger(__name__), len(self.removed)
        if n:
            log.warning(
                "%d of %d rows are longer than %s tokens; their prompts are cut at the beginning, by %d tokens in the "
                "mean and by %d at most", n, kept, self.limit, sum(self.removed) // n, max(self.removed),
            )  # fmt: skip
        if self.dropped:
            what = (
                f"{len(self.dropped)} rows are left out: their responses leave less than a quarter of {self.limit} "
                f"tokens for the prompt (the first: {self.dropped[0]})"
            )
            if not kept:
                raise ParaJaxError(f"{what}, and no row is left; pass a larger max_length (--max-length)")
            log.warning("%s", what)


def check_sizes(examples: Examples, max_length: int) -> None:
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
                f"{e.place or 'a row'}: {len(e)} tokens exceed the backbone's context of {context}; shorten "
                "the row, or read the rows with max_length"
            )


def truncate(e: Example, max_length: int, bos: int | None) -> Example | None:
    """The example with the start of its prompt removed, but for a beginning-of-text token; the response is kept.

    None if the response leaves less than a quarter of `max_length` for the prompt.
    """
    if len(e) <= max_length:
        return e
    response = e.response_ids
    room = max_length - response.size
    if room < max(1, max_length // 4):
        return None
    prefix = e.prompt_ids[:1] if room > 1 and e.prompt_ids[0] == bos else e.prompt_ids[:0]
    prompt = [*prefix, *e.prompt_ids[len(e.prompt_ids) - (room - prefix.size) :]]
    short = Example.of(prompt, response)
    return replace(e, ids=short.ids, targets=short.targets, prompt_length=short.prompt_length)
