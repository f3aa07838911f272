"""What rows are in tokens.

A response is an answer: a space is put between it and a prompt that does not end in white space. A completion goes on
from its prompt to the letter. Messages go through the tokenizer's chat template; every assistant turn is an example of
its own, with all before it as the prompt, because an adapter is prepared once for each prompt. Where the template marks
what is generated, the response ends there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from para_jax.data.sources import KEYS, read_rows
from para_jax.data.table import raise_problems
from para_jax.data.templates import Template
from para_jax.errors import ParaJaxError, unknown


@dataclass(frozen=True)
class Example:
    """A prompt and its response, as text and as token ids; `response_ids` end with the end-of-text token.

    `choice_ids` are the ids of each of `choices`, without an end. Where a row has no response, for generation, its
    text and ids are empty.
    """

    prompt: str
    response: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    choice_ids: tuple[tuple[int, ...], ...] = ()
    place: str = ""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def read_examples(
    source: str | Path,
    tokenizer: Any,
    eos_token_ids: Sequence[int],
    max_length: int | None = None,
    *,
    truncate: bool = False,
    need_response: bool = True,
    template: Template | str | None = None,
    data_dir: str | Path | None = None,
) -> list[Example]:
    """The examples of a JSONL file or another source of `read_rows`.

    Args:
      tokenizer: a transformers tokenizer.
      eos_token_ids: the ids that end a text; the first one is put after every response without one.
      max_length: the most tokens a prompt and its response may have together.
      truncate: cut what is longer, the prompt at its beginning, instead of refusing it.
      need_response: whether a row without a response is an error.
      template, data_dir: as for `read_rows`.

    Raises ParaJaxError, with file and line or row, for a malformed line, an unknown key, an empty prompt or response,
    or rows longer than `max_length` (how many, and the longest); and what `read_rows` raises.
    """
    rows = read_rows(source, template, data_dir)
    return encode_rows(rows, tokenizer, eos_token_ids, max_length, truncate=truncate, need_response=need_response)


def encode_rows(
    rows: Iterator[tuple[str, Mapping[str, Any]]] | Sequence[tuple[str, Mapping[str, Any]]],
    tokenizer: Any,
    eos_token_ids: Sequence[int],
    max_length: int | None = None,
    *,
    truncate: bool = False,
    need_response: bool = True,
) -> list[Example]:
    """`read_examples` of rows that are in memory, each with its place."""
    turns: list[_Turn] = []
    problems: list[str] = []
    for place, row in rows:
        try:
            turns.extend(_turns(place, row, tokenizer, need_response))
        except ParaJaxError as error:
            problems.append(f"{place}: {error}")
    raise_problems(problems)
    # All texts in one call of the tokenizer, which is many times as fast as a call for each.
    joined = iter(_join(tokenizer, [(turn, answer) for turn in turns for answer in (turn.answer, *turn.choices)]))
    examples = []
    for turn in turns:
        prompt_ids, response_ids = next(joined)
        choice_ids = tuple(next(joined)[1] for _ in turn.choices)
        examples.append(
            Example(
                turn.prompt,
                turn.answer.strip(),
                prompt_ids,
                _end(response_ids, tuple(eos_token_ids)) if response_ids else (),
                turn.references,
                tuple(choice.strip() for choice in turn.choices),
                choice_ids,
                turn.place,
            )
        )
    if max_length is not None:
        examples = _fit(examples, max_length, truncate)
    return examples


def check_ids(examples: Iterable[Example], vocab_size: int) -> None:
    """Raises ParaJaxError for the first row with a token that the backbone has no embedding of."""
    for e in examples:
        highest = max((*e.prompt_ids, *e.response_ids, *(x for ids in e.choice_ids for x in ids)), default=-1)
        if highest >= vocab_size:
            raise ParaJaxError(
                f"{e.place or 'a row'}: token {highest} is beyond the backbone's vocabulary of {vocab_size}; take what "
                "it stands for out of the row, or the tokenizer is another model's"
            )


class _Turn(NamedTuple):
    """A prompt and what is to follow it, as they are joined, and whether the chat template wrote them."""

    prompt: str
    answer: str
    chat: bool
    references: tuple[str, ...]
    choices: tuple[str, ...]
    place: str


def _turns(place: str, row: Mapping[str, Any], tokenizer: Any, need_response: bool) -> Iterator[_Turn]:
    for key in row:
        if key not in KEYS:
            raise unknown("key", key, KEYS)
    chat = "messages" in row
    references = tuple(row.get("references") or ())
    pairs = _chat_pairs(row["messages"], tokenizer, need_response) if chat else [_pair(row, need_response)]
    for prompt, answer in pairs:
        if not prompt.strip():
            raise ParaJaxError("the prompt is empty; an adapter is prepared from it")
        if need_response and not answer.strip():
            raise ParaJaxError("the response is empty; there is nothing to learn from it")
        choices = tuple(_spaced(prompt, choice) for choice in row.get("choices") or ())
        yield _Turn(prompt, answer, chat, references, choices, place)


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


def _chat_pairs(messages: Any, tokenizer: Any, need_response: bool) -> Iterator[tuple[str, str]]:
    if not getattr(tokenizer, "chat_template", None):
        raise ParaJaxError("the tokenizer has no chat template; give prompt and response instead of messages")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
    ):
        raise ParaJaxError('"messages" is a list of {"role", "content"} objects')
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if need_response and not turns:
        raise ParaJaxError("no message has the role assistant; there is nothing to learn")
    if not need_response:
        if not messages or messages[-1]["role"] == "assistant":
            raise ParaJaxError("the last message has to be the user's")
        yield tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), ""
        return
    for i in turns:
        prompt = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not whole.startswith(prompt):
            raise ParaJaxError("the chat template changes earlier turns, so its prompts cannot be told from responses")
        end = _generated_end(messages[: i + 1], tokenizer)
        yield prompt, whole[len(prompt) : end]


def _generated_end(messages: list[Any], tokenizer: Any) -> int | None:
    """Where the last turn ends that the template marks with {% generation %}; None for a template without such marks.

    What follows, such as the line break behind a turn, is the template's and not the assistant's to say.
    """
    # A tokenizer may have several templates by name.
    if not re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        return None
    encoded = tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    ends = [end for (_, end), own in zip(encoded["offset_mapping"], encoded["assistant_masks"], strict=True) if own]
    if not ends:
        raise ParaJaxError("the chat template has {% generation %} and marks nothing of an assistant's turn with it")
    return ends[-1]


def _join(tokenizer: Any, pairs: Sequence[tuple[_Turn, str]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
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

    joined = []
    prompts, wholes = ids([turn.prompt for turn, _ in pairs]), ids([turn.prompt + answer for turn, answer in pairs])
    for prompt, whole, (_, answer) in zip(prompts, wholes, pairs, strict=True):
        rest = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            rest = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
        joined.append((tuple(prompt), tuple(rest)))
    return joined


def _end(ids: tuple[int, ...], eos: tuple[int, ...]) -> tuple[int, ...]:
    """Up to the first end-of-text token, which is added if there is none."""
    ends = [i for i, token in enumerate(ids) if token in eos]
    return ids[: ends[0] + 1] if ends else ids + eos[:1]


def _fit(examples: list[Example], max_length: int, truncate: bool) -> list[Example]:
    long = [e for e in examples if len(e) > max_length]
    if not long:
        return examples
    if not truncate:
        longest = max(long, key=len)
        raise ParaJaxError(
            f"{len(long)} of {len(examples)} rows are longer than {max_length} tokens (the longest has {len(longest)}: "
            f"{longest.place}); remove them, or pass truncate (--truncate) to cut their prompts at the beginning"
        )
    fitted = []
    for e in examples:
        # At least one token of the prompt stays: an adapter is prepared from it.
        response = e.response_ids[: max_length - 1]
        room = max_length - len(response)
        fitted.append(replace(e, prompt_ids=e.prompt_ids[-room:], response_ids=response) if len(e) > max_length else e)
    return fitted
