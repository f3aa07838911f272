"""Rows of a JSONL file, and what they are in tokens.

A row is {"prompt", "response"}, {"prompt", "completion"} or {"messages": [...]}, and may have `references` (answers
that are as good) and `choices` (answers to choose from). A response is an answer: a space is put between it and a
prompt that does not end in white space. A completion goes on from its prompt to the letter. Messages go through the
tokenizer's chat template; every assistant turn is an example of its own, with all before it as the prompt, because
an adapter is prepared once for each prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from para_jax.errors import ParaJaxError, unknown

KEYS = ("prompt", "response", "completion", "messages", "references", "choices", "tenant", "system")
SHOWN = 5  # problems listed in one error


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


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a JSONL file with their places ("file:line"). Raises ParaJaxError that lists malformed lines."""
    path = Path(path)
    if not path.is_file():
        raise ParaJaxError(f"{path} is no file")
    rows, problems = [], []
    # Not splitlines: JSON strings may hold line separators of Unicode.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number} is not JSON: {error}")
            continue
        if not isinstance(row, dict):
            problems.append(f"{path}:{number} is a {type(row).__name__}, not an object with a prompt")
            continue
        rows.append((f"{path}:{number}", row))
    _raise(problems)
    if not rows:
        raise ParaJaxError(f"{path} has no rows")
    return iter(rows)


def read_examples(
    path: str | Path,
    tokenizer: Any,
    eos_token_ids: Sequence[int],
    max_length: int | None = None,
    *,
    truncate: bool = False,
    need_response: bool = True,
) -> list[Example]:
    """The examples of a JSONL file.

    Args:
      tokenizer: a transformers tokenizer.
      eos_token_ids: the ids that end a text; the first one is put after every response without one.
      max_length: the most tokens a prompt and its response may have together.
      truncate: cut what is longer, the prompt at its beginning, instead of refusing it.
      need_response: whether a row without a response is an error.

    Raises ParaJaxError, with file and line, for a malformed line, an unknown key, an empty prompt or response, or
    rows longer than `max_length` (how many, and the longest).
    """
    return encode_rows(
        read_rows(path), tokenizer, eos_token_ids, max_length, truncate=truncate, need_response=need_response
    )


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
    examples: list[Example] = []
    problems: list[str] = []
    for place, row in rows:
        try:
            examples.extend(_encode(place, row, tokenizer, tuple(eos_token_ids), need_response))
        except ParaJaxError as error:
            problems.append(f"{place}: {error}")
    _raise(problems)
    if max_length is not None:
        examples = _fit(examples, max_length, truncate)
    return examples


def _raise(problems: list[str]) -> None:
    if problems:
        more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ParaJaxError("\n".join(problems[:SHOWN]) + more)


def _encode(
    place: str, row: Mapping[str, Any], tokenizer: Any, eos: tuple[int, ...], need_response: bool
) -> list[Example]:
    for key in row:
        if key not in KEYS:
            raise unknown("key", key, KEYS)
    references, choices = tuple(row.get("references") or ()), tuple(row.get("choices") or ())
    examples = []
    for prompt, response, chat in _turns(row, tokenizer, need_response):
        if not prompt.strip():
            raise ParaJaxError("the prompt is empty; an adapter is prepared from it")
        if need_response and not response.strip():
            raise ParaJaxError("the response is empty; there is nothing to learn from it")
        prompt_ids, response_ids = _join(tokenizer, prompt, response, special=not chat)
        if response_ids:
            response_ids = _end(response_ids, eos)
        choice_ids = tuple(_join(tokenizer, prompt, _spaced(prompt, choice), not chat)[1] for choice in choices)
        examples.append(
            Example(prompt, response.strip(), prompt_ids, response_ids, references, choices, choice_ids, place)
        )
    return examples


def _turns(row: Mapping[str, Any], tokenizer: Any, need_response: bool) -> Iterator[tuple[str, str, bool]]:
    """The prompts of a row, each with what is to follow it, and whether the chat template wrote them."""
    if "messages" in row:
        yield from _chat_turns(row["messages"], tokenizer, need_response)
        return
    if not isinstance(row.get("prompt"), str):
        raise ParaJaxError('no text under "prompt" (and no "messages")')
    answers = [key for key in ("response", "completion") if key in row]
    if len(answers) == 2 or (need_response and not answers):
        raise ParaJaxError('give one of "response" and "completion"')
    answer = row[answers[0]] if answers else ""
    if not isinstance(answer, str):
        raise ParaJaxError(f"{answers[0]!r} is a {type(answer).__name__}, not a text")
    yield row["prompt"], _spaced(row["prompt"], answer) if answers == ["response"] else answer, False


def _spaced(prompt: str, answer: str) -> str:
    joined = not answer or prompt[-1:].isspace() or answer[0].isspace()
    return answer if joined else " " + answer


def _chat_turns(messages: Any, tokenizer: Any, need_response: bool) -> Iterator[tuple[str, str, bool]]:
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
        yield tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), "", True
        return
    for i in turns:
        prompt = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not whole.startswith(prompt):
            raise ParaJaxError("the chat template changes earlier turns, so its prompts cannot be told from responses")
        yield prompt, whole[len(prompt) :], True


def _join(tokenizer: Any, prompt: str, answer: str, special: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompt and answer in tokens. The prompt's are those that it has alone, as it will have when served."""

    def ids(text: str, special: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    prompt_ids = ids(prompt, special)
    whole = ids(prompt + answer, special)
    if whole[: len(prompt_ids)] == prompt_ids:
        return tuple(prompt_ids), tuple(whole[len(prompt_ids) :])
    return tuple(prompt_ids), tuple(ids(answer, False))


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
