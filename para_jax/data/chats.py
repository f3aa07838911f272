"""Training examples from the assistant turns of a chat: one for each turn, or one for all turns.

PARA prepares an adapter from the prompt, and the prompt of a turn is everything before it. So each turn needs its own
forward pass. The adapters of other methods do not depend on the prompt: for these, one pass over the chat predicts the
tokens of all turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from para_jax.data.buffers import Example
from para_jax.data.messages import Chat, texts_of
from para_jax.errors import ParaJaxError


def question(chat: Chat) -> str:
    """The chat as the prompt of the next answer. Raises ParaJaxError if it ends with an assistant turn."""
    if not chat.messages or chat.messages[-1]["role"] == "assistant":
        raise ParaJaxError("the last message must not be the assistant's")
    prompt = chat.text(answer_next=True)
    chat.check_written(len(chat.messages), answer_next=True)
    return prompt


def learnt_turns(chat: Chat) -> Iterator[tuple[str, str, list[str]]]:
    """Each turn to learn: its prompt, the turn as the template writes it, and the texts of the row in the turn.

    Raises ParaJaxError if there is no such turn, if the template leaves out a part of the row, and if a turn cannot be
    separated from its prompt.
    """
    turns = [i for i, weight in enumerate(chat.weights) if weight]
    if not turns:
        has_assistant = any(message["role"] == "assistant" for message in chat.messages)
        why = "every assistant turn has the weight 0" if has_assistant else "no message has the role assistant"
        raise ParaJaxError(f"{why}; there is nothing to learn")
    for i in turns:
        row_texts = texts_of({key: x for key, x in chat.messages[i].items() if key not in ("role", "tool_call_id")})
        if not any(text.strip() for text in row_texts):
            raise ParaJaxError(f"message {i + 1}: the response is empty; there is nothing to learn from it")
        if not i:
            raise ParaJaxError("message 1 is the assistant's, with no prompt before it; put a message in front of it")
        prompt, text = chat.text(i, answer_next=True), chat.text(i + 1)
        if not text.startswith(prompt):
            raise ParaJaxError(_why_not_prefix(chat, i, prompt, text))
        end = chat.generated_end(i + 1)
        if end is not None and end <= len(prompt):
            raise ParaJaxError("the chat template has {% generation %}, but marks no part of an assistant turn with it")
        yield prompt, text[len(prompt) : end], row_texts
    chat.check_written(turns[-1] + 1)


def _why_not_prefix(chat: Chat, i: int, prompt: str, text: str) -> str:
    """Why the text of a chat up to and with a turn does not start with the prompt of the turn."""
    before = chat.text(i)
    if not (prompt.startswith(before) and text.startswith(before)):
        return "the chat template changes earlier turns, so prompts and responses cannot be separated"
    start = prompt[len(before) :]
    return (
        f"message {i + 1}: the chat template starts every answer with {start!r} and writes this one as "
        f"{text[len(before) :][: len(start) + 20]!r}; write the turn so that it starts that way (reasoning goes into "
        '"reasoning_content", if the template reads it), or give another template (--chat-template)'
    )


def in_one_pass(turns: Sequence[Example]) -> Example | None:
    """One example that is equivalent to the examples of a chat's turns: the same targets after the same tokens.

    None if there is no such example: if the template rewrites earlier turns (for instance without their reasoning), if
    a token spans the border of two turns, or if two turns have a target at one position.

    >>> first, second = Example.of([5, 6], [7, 0]), Example.of([5, 6, 7, 8], [9, 0])
    >>> one = in_one_pass([first, second])
    >>> one.ids.tolist(), one.targets.tolist(), one.prompt_length
    ([5, 6, 7, 8, 9], [-1, 7, 0, 9, 0], 2)
    """
    ids = turns[-1].ids
    targets = np.full(ids.size, -1, np.int32)
    end = 0  # the end of the targets so far
    for turn in turns:
        n = turn.ids.size
        if turn.prompt_length - 1 < end or not np.array_equal(ids[:n], turn.ids):
            return None
        targets[end:n], end = turn.targets[end:], n
    return Example(ids, targets, turns[0].prompt_length, place=turns[0].place)
