"""The prompts and responses of a row as texts. Unknown and unused keys are errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from para_jax.checks import check_text
from para_jax.data.chats import learnt_turns, question
from para_jax.data.messages import Chat
from para_jax.data.sources import KEYS, Rows
from para_jax.data.table import raise_problems
from para_jax.errors import ParaJaxError, unknown

ANSWERS = ("response", "completion")


class Turn(NamedTuple):
    """A prompt and its answer, ready to be concatenated.

    Attributes:
      chat: whether a chat template rendered them.
      row_texts: the texts of the row that the answer contains.
    """

    prompt: str
    answer: str
    chat: bool
    row_texts: Sequence[str]
    references: tuple[str, ...]
    choices: tuple[str, ...]
    place: str


def turns(place: str, row: Mapping[str, Any], tokenizer: Any, need_response: bool) -> Iterator[Turn]:
    """The turns of a row: one, or each assistant turn that is learnt.

    Raises ParaJaxError for an unknown or unused key, and for an invalid value.
    """
    for key in row:
        if key not in KEYS:
            raise ParaJaxError(f"{unknown('key', key, KEYS)}. A --template makes prompts from rows with other keys")
    row = {key: value for key, value in row.items() if value is not None}
    references, choices = texts(row, "references"), texts(row, "choices")
    chat = _chat(row, tokenizer, need_response)
    if chat is None:
        prompt, answer = _pair(row, need_response)
        pairs: Iterable[tuple[str, str, Sequence[str]]] = [(prompt, answer, [answer])]
    else:
        pairs = learnt_turns(chat) if need_response else [(question(chat), "", [])]
        if references or choices:
            pairs = list(pairs)
            if len(pairs) > 1:
                raise ParaJaxError(f"references and choices need one response, and {len(pairs)} turns are learnt")
    for prompt, answer, row_texts in pairs:
        if not prompt.strip():
            raise ParaJaxError("the prompt is empty; an adapter is prepared from it")
        if need_response and not answer.strip():
            raise ParaJaxError("the response is empty; there is nothing to learn from it")
        for what, text in (("the prompt", prompt), ("the response", answer)):
            check_text(what, text)
        spaced = tuple(_spaced(prompt, choice) for choice in choices)
        yield Turn(prompt, answer, chat is not None, row_texts, references, spaced, place)


def _chat(row: Mapping[str, Any], tokenizer: Any, need_response: bool) -> Chat | None:
    tools = row.get("tools")
    if "messages" in row:
        if both := [key for key in ("prompt", *ANSWERS) if key in row]:
            raise ParaJaxError(f'both "messages" and {both[0]!r}; give one of them')
        messages = row["messages"]
        if "system" in row:
            first = messages[0] if isinstance(messages, list) and messages else None
            if isinstance(first, dict) and first.get("role") in ("system", "developer"):
                raise ParaJaxError('both "system" and a system message; give one of them')
            messages = [_message("system", row["system"]), *messages] if isinstance(messages, list) else messages
        return Chat.of(messages, tools, tokenizer)
    if tools is not None:
        raise ParaJaxError('"tools" go with "messages"')
    if "system" not in row:
        return None
    _pair(row, need_response)  # raises for an invalid prompt or response
    if not getattr(tokenizer, "chat_template", None):
        raise ParaJaxError('the tokenizer has no chat template to write "system" with; put it into the prompt')
    answers = [_message("assistant", row[key]) for key in ANSWERS if need_response and key in row]
    messages = [_message("system", row["system"]), _message("user", row["prompt"]), *answers]
    return Chat.of(messages, None, tokenizer)


def _message(role: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, str):
        raise ParaJaxError(f"{role!r} is a {type(content).__name__}, not a text")
    return {"role": role, "content": content}


def _pair(row: Mapping[str, Any], need_response: bool) -> tuple[str, str]:
    if not isinstance(row.get("prompt"), str):
        raise ParaJaxError('no text under "prompt" (and no "messages")')
    answers = [key for key in ANSWERS if key in row] if need_response else []
    if need_response and len(answers) != 1:
        raise ParaJaxError('give one of "response" and "completion"')
    answer = row[answers[0]] if answers else ""
    if not isinstance(answer, str):
        raise ParaJaxError(f"{answers[0]!r} is a {type(answer).__name__}, not a text")
    return row["prompt"], _spaced(row["prompt"], answer) if answers == ["response"] else answer


def _spaced(prompt: str, answer: str) -> str:
    joined = not answer or prompt[-1:].isspace() or answer[0].isspace()
    return answer if joined else " " + answer


def texts(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The list of texts under a key. Raises ParaJaxError for anything else, such as a single text.

    >>> texts({"references": ["a cat", "the cat"]}, "references"), texts({}, "references")
    (('a cat', 'the cat'), ())
    """
    value = row.get(key, [])
    if not isinstance(value, list | tuple):
        raise ParaJaxError(f'{key!r} is a {type(value).__name__}, not a list of texts; write ["...", "..."]')
    for i, text in enumerate(value):
        if not isinstance(text, str):
            raise ParaJaxError(f"{key}[{i}] is a {type(text).__name__}, not a text")
        if not text.strip():
            raise ParaJaxError(f"{key}[{i}] is empty")
        check_text(f"{key}[{i}]", text)
    return tuple(value)


def check_tenant(rows: Rows, tenant: str | None) -> Rows:
    """Returns `rows`. Raises ParaJaxError if a row names another tenant.

    Args:
      tenant: the tenant of the source. If it is None, all rows with a tenant must name the same one.
    """
    named = [(place, row["tenant"]) for place, row in rows if row.get("tenant") is not None]
    expected = tenant if tenant is not None or not named else named[0][1]
    problems = []
    for place, name in named:
        if not isinstance(name, str):
            problems.append(f'{place}: "tenant" is a {type(name).__name__}, not a name')
        elif name != expected:
            problems.append(
                f"{place}: the row names tenant {name!r}, and its source belongs to {expected!r}; --tenant-from reads "
                "a source with several tenants"
            )
    raise_problems(problems)
    return rows


def group_by_tenant(rows: Rows) -> dict[str, Rows]:
    """Groups the rows of a source with several tenants by tenant, in order.

    >>> rows = [("a:1", {"tenant": "x", "prompt": "p"}), ("a:2", {"tenant": "y", "prompt": "q"})]
    >>> list(group_by_tenant(rows))
    ['x', 'y']

    Raises ParaJaxError for rows without a tenant.
    """
    found: dict[str, Rows] = {}
    problems = []
    for place, row in rows:
        name = row.get("tenant")
        if not isinstance(name, str) or not name:
            problems.append(f'{place}: no tenant\'s name under "tenant"')
        else:
            found.setdefault(name, []).append((place, row))
    raise_problems(problems)
    return found
