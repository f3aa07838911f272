"""What rows are in tokens.

A response is an answer: a space is put between it and a prompt that does not end in white space. A completion goes on
from its prompt to the letter. Messages go through the tokenizer's chat template; every assistant turn is an example of
its own, with all before it as the prompt, because an adapter is prepared once for each prompt. For methods that do not
read the prompt, all turns of a chat can be one example. Where the template marks what is generated, the response ends
there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from para_jax.data.buffers import Example, Examples
from para_jax.data.chats import chat_pairs, in_one_pass
from para_jax.data.sources import KEYS, read_rows
from para_jax.data.table import raise_problems
from para_jax.data.templates import Template
from para_jax.errors import ParaJaxError, unknown

# Letters that are made tokens in one call: one call for each row takes many times as long, and of all rows at once
# the tokens would be Python's ints at one time.
CHUNK = 2**20


def read_examples(
    source: str | Path,
    tokenizer: Any,
    eos_token_ids: Sequence[int],
    max_length: int | None = None,
    *,
    truncate: bool = False,
    need_response: bool = True,
    keep_texts: bool = False,
    one_pass: bool = False,
    template: Template | str | None = None,
    data_dir: str | Path | None = None,
) -> Examples:
    """The examples of a JSONL file or another source of `read_rows`.

    Args:
      tokenizer: a transformers tokenizer.
      eos_token_ids: the ids that end a text; the first one is put after every response without one.
      max_length: the most tokens a prompt and its response may have together.
      truncate: cut what is longer, the prompt at its beginning, instead of refusing it.
      need_response: whether a row without a response is an error.
      keep_texts: whether examples have their texts and choices beside their tokens, as `evaluate` needs them.
      one_pass: make one example of all assistant turns of a chat, where it predicts the same tokens from the same
        tokens before them (`chats.in_one_pass`). For methods whose config has `reads_prompt` False.
      template, data_dir: as for `read_rows`.

    Raises ParaJaxError, with file and line or row, for a malformed line, an unknown key, an empty prompt or response,
    or rows longer than `max_length` (how many, and the longest); and what `read_rows` raises.
    """
    rows = read_rows(source, template, data_dir)
    how = {"truncate": truncate, "need_response": need_response, "keep_texts": keep_texts, "one_pass": one_pass}
    return encode_rows(_let_go(rows), tokenizer, eos_token_ids, max_length, **how)


def encode_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    tokenizer: Any,
    eos_token_ids: Sequence[int],
    max_length: int | None = None,
    *,
    truncate: bool = False,
    need_response: bool = True,
    keep_texts: bool = False,
    one_pass: bool = False,
) -> Examples:
    """`read_examples` of rows that are in memory, each with its place.

    >>> from para_jax import tiny_backbone_path
    >>> from para_jax.convert.tokenizer import load_tokenizer
    >>> tokenizer = load_tokenizer(tiny_backbone_path())
    >>> rows = encode_rows([("row 1", {"prompt": "Who sat?", "response": "The cat."})], tokenizer, eos_token_ids=(0,))
    >>> tokenizer.decode(rows[0].response_ids), rows[0].place
    (' The cat.<|endoftext|>', 'row 1')
    """
    if one_pass and keep_texts:
        raise ParaJaxError("texts are of one turn and one_pass makes one example of all; leave out one of the two")
    cut = max_length if truncate else None

    def encoded() -> Iterator[Example]:
        for chunk in _chunks(rows, tokenizer, need_response, keep_texts):
            found = _encoded(chunk, tokenizer, tuple(eos_token_ids), keep_texts)
            for turns in chunk:
                own = list(islice(found, len(turns)))
                whole = in_one_pass(own) if one_pass and len(own) > 1 else None
                if whole is not None and (cut is None or len(whole) <= cut):
                    yield whole
                else:
                    yield from own if cut is None else (_cut(e, cut) for e in own)

    examples = Examples.of(encoded())
    if max_length is not None:
        _check_lengths(examples, max_length)
    return examples


def check_ids(examples: Iterable[Example], vocab_size: int) -> None:
    """Raises ParaJaxError for the first row with a token that the backbone has no embedding of."""
    if isinstance(examples, Examples) and examples.texts is None and examples.highest_token < vocab_size:
        return
    for e in examples:
        own = max(e.ids.max(initial=-1), e.targets.max(initial=-1))
        highest = max((int(own), *(x for ids in e.choice_ids for x in ids)))
        if highest >= vocab_size:
            raise ParaJaxError(
                f"{e.place or 'a row'}: token {highest} is beyond the backbone's vocabulary of {vocab_size}; take what "
                "it stands for out of the row, or the tokenizer is another model's"
            )


def check_lengths(examples: Sequence[Example], context: int) -> None:
    """Raises ParaJaxError for the first row that is longer than the backbone's context."""
    for e in examples:
        if len(e) > context:
            raise ParaJaxError(
                f"{e.place or 'a row'}: {len(e)} tokens are longer than the backbone's context of {context}; shorten "
                "the row, or read the rows with max_length"
            )


def _let_go(rows: list[Any]) -> Iterator[Any]:
    """The rows of a list, each of which leaves it, so that texts make room for tokens."""
    rows.reverse()
    while rows:
        yield rows.pop()


class _Turn(NamedTuple):
    """A prompt and what is to follow it, as they are joined, and whether the chat template wrote them."""

    prompt: str
    answer: str
    chat: bool
    references: tuple[str, ...]
    choices: tuple[str, ...]
    place: str


def _chunks(
    rows: Iterable[tuple[str, Mapping[str, Any]]], tokenizer: Any, need_response: bool, choices: bool
) -> Iterator[list[list[_Turn]]]:
    """The turns of each row, some rows at a time. Raises ParaJaxError for all bad rows together."""
    chunk: list[list[_Turn]] = []
    problems: list[str] = []
    letters = 0
    for place, row in rows:
        try:
            own = list(_turns(place, row, tokenizer, need_response, choices))
        except ParaJaxError as error:
            problems.append(f"{place}: {error}")
        if problems:
            continue
        chunk.append(own)
        letters += sum(len(turn.prompt) + len(turn.answer) for turn in own)
        if letters > CHUNK:
            yield chunk
            chunk, letters = [], 0
    raise_problems(problems)
    yield chunk


def _turns(place: str, row: Mapping[str, Any], tokenizer: Any, need_response: bool, choices: bool) -> Iterator[_Turn]:
    for key in row:
        if key not in KEYS:
            raise unknown("key", key, KEYS)
    chat = "messages" in row
    references = tuple(row.get("references") or ())
    pairs = chat_pairs(row["messages"], tokenizer, need_response) if chat else [_pair(row, need_response)]
    for prompt, answer in pairs:
        if not prompt.strip():
            raise ParaJaxError("the prompt is empty; an adapter is prepared from it")
        if need_response and not answer.strip():
            raise ParaJaxError("the response is empty; there is nothing to learn from it")
        spaced = tuple(_spaced(prompt, choice) for choice in row.get("choices") or ()) if choices else ()
        yield _Turn(prompt, answer, chat, references, spaced, place)


def _pair(row: Mapping[str, Any], need_response: bool) -> tuple[str, str]:
    """The prompt of a row and what is to follow it."""
    if not isinstance(row.get("prompt"), str):
        raise ParaJaxError('no text under "prompt" (and no "messages")')
    answers = [key for key in ("response", "completion") if key in row]
    if len(answers) == 2 or (need_response and not answers):
        raise ParaJaxError('give one of "response" and "completion"')
    answer = row[answers[0]] if answers else ""
    if not isinstance(answer, str):
        raise ParaJaxError(f"{answers[0]!r} is a {type(answer).__name__}, not a text")
    return row["prompt"], _spaced(row["prompt"], answer) if answers == ["response"] else answer


def _spaced(prompt: str, answer: str) -> str:
    joined = not answer or prompt[-1:].isspace() or answer[0].isspace()
    return answer if joined else " " + answer


def _encoded(
    chunk: Sequence[Sequence[_Turn]], tokenizer: Any, eos: tuple[int, ...], keep_texts: bool
) -> Iterator[Example]:
    """Every turn of these rows as an example."""
    turns = [turn for own in chunk for turn in own]
    joined = _join(tokenizer, [(turn, answer) for turn in turns for answer in (turn.answer, *turn.choices)])
    for turn in turns:
        prompt_ids, response_ids = next(joined)
        choice_ids = tuple(tuple(next(joined)[1]) for _ in turn.choices)
        if response_ids:
            response_ids = _end(response_ids, eos)
        texts: dict[str, Any] = {}
        if keep_texts:
            choices = tuple(choice.strip() for choice in turn.choices)
            texts = {"prompt": turn.prompt, "response": turn.answer.strip(), "references": turn.references}
            texts |= {"choices": choices, "choice_ids": choice_ids}
        yield Example.of(prompt_ids, response_ids, place=turn.place, **texts)


def _cut(e: Example, max_length: int) -> Example:
    """The example with its prompt cut at the beginning, and its response at the end if that is too long alone."""
    if len(e) <= max_length:
        return e
    # At least one token of the prompt stays: an adapter is prepared from it.
    response_ids = e.response_ids[: max_length - 1]
    prompt_ids = e.prompt_ids[-(max_length - response_ids.size) :]
    cut = Example.of(prompt_ids, response_ids)
    return replace(e, ids=cut.ids, targets=cut.targets, prompt_length=cut.prompt_length)


def _join(tokenizer: Any, pairs: Sequence[tuple[_Turn, str]]) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts and answers in tokens. A prompt's are those that it has alone, as it will have when served."""

    def ids(texts: list[str]) -> list[list[int]]:
        # The template of a chat has written the special tokens already.
        found: list[list[int]] = [[] for _ in texts]
        for chat in (False, True):
            places = [i for i, (turn, _) in enumerate(pairs) if turn.chat == chat]
            if places:
                some = tokenizer([texts[i] for i in places], add_special_tokens=not chat, verbose=False)["input_ids"]
                for i, x in zip(places, some, strict=True):
                    found[i] = x
        return found

    prompts, wholes = ids([turn.prompt for turn, _ in pairs]), ids([turn.prompt + answer for turn, answer in pairs])
    for prompt, whole, (_, answer) in zip(prompts, wholes, pairs, strict=True):
        rest = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            rest = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
        yield prompt, rest


def _end(ids: list[int], eos: tuple[int, ...]) -> list[int]:
    """Up to the first end-of-text token, which is added if there is none."""
    ends = [i for i, token in enumerate(ids) if token in eos]
    return ids[: ends[0] + 1] if ends else [*ids, *eos[:1]]


def _check_lengths(examples: Examples, max_length: int) -> None:
    """Raises ParaJaxError if rows are too long."""
    sizes = examples.lengths + (examples.target_counts > 0)
    long = int(np.count_nonzero(sizes > max_length))
    if long:
        longest = int(np.argmax(sizes))
        raise ParaJaxError(
            f"{long} of {len(examples)} rows are longer than {max_length} tokens (the longest has {sizes[longest]}: "
            f"{examples.places[longest]}); remove them, or pass truncate (--truncate) to cut their prompts at the "
            "beginning"
        )
