"""Validates the messages of a chat, and renders them with the chat template.

Everything in a message must reach the rendered text. If a template leaves out a message or a key of one, training would
silently ignore a part of the row, so that is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from para_jax.errors import ParaJaxError, check_known, one_line, unknown

ROLES = ("system", "developer", "user", "assistant", "tool")
# Keys that a template need not write as such: `weight` selects what is learnt, `tool_call_id` a call.
OURS = ("role", "content", "weight", "tool_call_id")
# Other libraries' names for `weight`.
MARKS = ("train", "training", "trainable", "loss", "loss_mask", "mask", "masked", "learn")


@dataclass(frozen=True)
class Chat:
    """Messages and tools in the form that a chat template takes.

    Attributes:
      messages: without `weight` and nulls; content is a string.
      weights: for each message, 1 if it is an assistant turn to learn, else 0.
      tools: what the assistant may call.
      tokenizer: its template renders the chat.
    """

    messages: list[dict[str, Any]]
    weights: tuple[int, ...]
    tools: list[Any] | None
    tokenizer: Any

    @classmethod
    def of(cls, messages: Any, tools: Any, tokenizer: Any) -> Chat:
        """Raises ParaJaxError for malformed messages or tools."""
        if not getattr(tokenizer, "chat_template", None):
            raise ParaJaxError("the tokenizer has no chat template; give prompt and response instead of messages")
        if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise ParaJaxError('"messages" is a list of {"role", "content"} objects')
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise ParaJaxError('"tools" is a list of objects, each the JSON schema of a function')
        weights, read = [], []
        for i, message in enumerate(messages):
            try:
                weights.append(_weight(message))
                read.append(_message(message, tokenizer))
            except ParaJaxError as error:
                raise ParaJaxError(f"message {i + 1}: {error}") from None
        return cls(read, tuple(weights), tools or None, tokenizer)

    def text(self, end: int | None = None, answer_next: bool = False) -> str:
        """The first `end` messages, rendered; with `answer_next` also the start of the next answer."""
        return self._render(self.messages[:end], self.tools, answer_next)

    def generated_end(self, end: int) -> int | None:
        """Where the last {% generation %} block ends in the text of the first `end` messages.

        Text after it, such as the line break after a turn, comes from the template and not from the assistant. None for
        a template without such blocks.
        """
        template = self.tokenizer.get_chat_template(tools=self.tools)
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        # apply_chat_template would tokenize the whole chat for this.
        rendered: Any = render_jinja_template(
            conversations=[self.messages[:end]],
            tools=self.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        ends = [stop for start, stop in rendered[1][0] if stop > start]
        return ends[-1] if ends else 0

    def check_written(self, end: int, answer_next: bool = False) -> None:
        """Raises ParaJaxError if the template leaves out a part of the first `end` messages, or the tools."""
        messages = self.messages[:end]
        if self.tools and self.text(end, answer_next) == self._render(messages, None, answer_next):
            raise ParaJaxError('the chat template does not write "tools"; remove them, or give another template')
        # A mark in each content shows in one rendering which contents are written.
        marks = {i: f"\ue000{i}\ue001" for i, message in enumerate(messages) if message.get("content", "").strip()}
        marked = [{**m, "content": m["content"] + marks[i]} if i in marks else m for i, m in enumerate(messages)]
        text = self._render(marked, self.tools, answer_next)
        for i, message in enumerate(messages):
            if i in marks and marks[i] not in text:
                self._check_key(i, end, "content", marked[i], answer_next)
            for key, value in message.items():
                if key not in OURS and value not in ("", [], {}):
                    without = {k: v for k, v in message.items() if k != key}
                    self._check_key(i, end, key, without, answer_next)

    def _check_key(self, i: int, end: int, key: str, other: dict[str, Any], answer_next: bool) -> None:
        """Raises ParaJaxError if the text does not change when message `i` is replaced by `other`."""
        # A template may write some keys, such as reasoning, in the last turn only.
        for last in (i + 1, end):
            changed = [*self.messages[:i], other, *self.messages[i + 1 : last]]
            try:
                if self.text(last, answer_next) != self._render(changed, self.tools, answer_next):
                    return
            except ParaJaxError:
                continue  # such as a template that wants a user's message
        raise ParaJaxError(
            f"message {i + 1} ({other['role']}): the chat template does not write {key!r}; remove it, or give a "
            "template that does (--chat-template)"
        )

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None, answer_next: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=answer_next
            )
        except Exception as error:  # a template is a program and may raise anything
            line = getattr(error, "lineno", None)
            where = f" (line {line} of the template)" if line else ""
            raise ParaJaxError(f"the chat template refuses this: {one_line(error, 2000)}{where}") from error


def _weight(message: Mapping[str, Any]) -> int:
    """1 if a message is learnt: an assistant's without the weight 0."""
    weight, role = message.get("weight"), message["role"]
    if weight is None:
        return int(role == "assistant")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ParaJaxError(f'"weight" is {weight!r}; it is 1 for a turn that is learnt and 0 for one that is not')
    if weight and role != "assistant":
        raise ParaJaxError(f'"weight" is 1 and the role is {role!r}; only turns of the assistant are learnt')
    return int(weight)


def _message(message: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A message in the form that a template takes. Raises ParaJaxError if it is malformed."""
    role = message["role"]
    if not isinstance(role, str) or not (role in ROLES or _names(role, tokenizer)):
        raise unknown("role", role, ROLES)
    for key in MARKS:
        if message.get(key) is not None:
            raise ParaJaxError(f'{key!r} is not read; write "weight": 0 for a turn that is not learnt')
    read = {key: value for key, value in message.items() if value is not None and key != "weight"}
    if "tool_calls" in read:
        read["tool_calls"] = _calls(read["tool_calls"])
    if "content" in read:
        read["content"] = _content(read["content"])
    elif not read.keys() - set(OURS):
        raise ParaJaxError(f'no text under "content" (role {role!r})')
    return read


def _names(role: str, tokenizer: Any) -> bool:
    """Whether a chat template mentions this role as a string, such as Llama 3's "ipython"."""
    template = tokenizer.chat_template
    templates = template.values() if isinstance(template, dict) else [template]
    return any(f"'{role}'" in text or f'"{role}"' in text for text in templates)


def _content(content: Any) -> str:
    """The text of a message: a string, or the concatenation of a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ParaJaxError(f'"content" is a {type(content).__name__}, not a text or a list of text parts')
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise ParaJaxError(f'"content" has a part of type {kind!r}; only parts of type "text" are read')
        given = [key for key, value in part.items() if value is not None]
        check_known("key of a text part", given, ("type", "text"))
        if not isinstance(part.get("text"), str):
            raise ParaJaxError('"content" has a text part without a text')
        texts.append(part["text"])
    return "".join(texts)


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Tool calls. Arguments that are a JSON string, as in OpenAI's files, are parsed.

    >>> _calls([{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}])
    [{'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 1}}}]
    """
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ParaJaxError('"tool_calls" is a list of {"type": "function", "function": {"name", "arguments"}} objects')
    read = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ParaJaxError('a tool call has no "name" in its "function"')
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise ParaJaxError(f'"arguments" of the call of {function["name"]!r} are not JSON: {error}') from None
        if arguments is not None and not isinstance(arguments, dict):
            raise ParaJaxError(f'"arguments" of the call of {function["name"]!r} are not a JSON object')
        function = function if arguments is None else {**function, "arguments": arguments}
        read.append({**call, "function": function} if "function" in call else function)
    return read


def texts_of(value: Any) -> list[str]:
    """All string values in a message.

    >>> texts_of({"content": "a", "tool_calls": [{"function": {"name": "f", "arguments": {"city": "b"}}}]})
    ['a', 'f', 'b']
    """
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for part in parts for text in texts_of(part)]
