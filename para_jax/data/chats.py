"""The assistant's turns of a chat, as its tokenizer's template writes them, and all of them in one example.

PARA prepares an adapter from the prompt, and the prompt of a turn is all before it: each turn is another forward pass,
over the whole chat up to there. Other methods' adapters are the same for every prompt. For these, one pass over the
chat predicts all turns' tokens from the same tokens before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from para_jax.data.buffers import Example
from para_jax.data.messages import Chat, texts_of
from para_jax.errors import ParaJaxError


def question(chat: Chat) -> str:
    """The whole chat as a prompt for what comes next. Raises ParaJaxError if it ends in the assistant's turn."""
    if not chat.messages or chat.messages[-1]["role"] == "assistant":
        raise ParaJaxError("the last message has to be the user's")
    prompt = chat.text(answer_next=True)
    chat.check_written(len(chat.messages), answer_next=True)
    return prompt


def learnt_turns(chat: Chat) -> Iterator[tuple[str, str, list[str]]]:
    """Each turn that is learnt: the prompt before it, what the template writes of it, and the row's own texts in it.

    Raises ParaJaxError if there is none, for what the template leaves out, and for a template that writes a turn in a
    way that cannot be told from its prompt.
    """
    turns = [i for i, weight in enumerate(chat.weights) if weight]
    if not turns:
        none = "no message has the role assistant"
        why = "every turn of the assistant has the weight 0" if _speaks(chat) else none
        raise ParaJaxError(f"{why}; there is nothing to learn")
    for i in turns:
        said = texts_of({key: x for key, x in chat.messages[i].items() if key not in ("role", "tool_call_id")})
        if not any(text.strip() for text in said):
            raise ParaJaxError(f"message {i + 1}: the response is empty; there is nothing to learn from it")
        if not i:
            raise ParaJaxError("message 1 is the assistant's, with no prompt before it; put a message in front of it")
        prompt, whole = chat.text(i, answer_next=True), chat.text(i + 1)
        if not whole.startswith(prompt):
            raise ParaJaxError(_why_apart(chat, i, prompt, whole))
        end = chat.generated_end(i + 1)
        if end is not None and end <= len(prompt):
            raise ParaJaxError(
                "the chat template has {% generation %} and marks nothing of an assistant's turn with it"
            )
        yield prompt, whole[len(prompt) : end], said
    chat.check_written(turns[-1] + 1)


def _speaks(chat: Chat) -> bool:
    return any(message["role"] == "assistant" for message in chat.messages)


def _why_apart(chat: Chat, i: int, prompt: str, whole: str) -> str:
    """Why a chat's text up to a turn does not begin with the turn's prompt."""
    before = chat.text(i)
    if not (prompt.startswith(before) and whole.startswith(before)):
        return "the chat template changes earlier turns, so its prompts cannot be told from responses"
    begins = prompt[len(before) :]
    return (
        f"message {i + 1}: the chat template begins every answer with {begins!r} and writes this one as "
        f"{whole[len(before) :][: len(begins) + 20]!r}; write the turn so that it begins that way (reasoning goes into "
        '"reasoning_content", where the template reads it), or give another template (--chat-template)'
    )


def in_one_pass(turns: Sequence[Example]) -> Example | None:
    """One example that predicts what those of a chat's turns predict, each token from the same tokens before it.

    None if there is no such example: where the template writes an earlier turn in another way once the next one
    follows (without its reasoning), where tokens at the border of two turns are joined, and where two turns have a
    target at one place.

    >>> first, second = Example.of([5, 6], [7, 0]), Example.of([5, 6, 7, 8], [9, 0])
    >>> one = in_one_pass([first, second])
    >>> one.ids.tolist(), one.targets.tolist(), one.prompt_length
    ([5, 6, 7, 8, 9], [-1, 7, 0, 9, 0], 2)
    """
    ids = turns[-1].ids
    targets = np.full(ids.size, -1, np.int32)
    end = 0  # of the places that the turns so far predict at
    for turn in turns:
        n = turn.ids.size
        if turn.prompt_length - 1 < end or not np.array_equal(ids[:n], turn.ids):
            return None
        targets[end:n], end = turn.targets[end:], n
    return Example(ids, targets, turns[0].prompt_length, place=turns[0].place)
