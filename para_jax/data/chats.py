"""The assistant's turns of a chat, as its tokenizer's template writes them, and all of them in one example.

PARA prepares an adapter from the prompt, and the prompt of a turn is all before it: each turn is another forward pass,
over the whole chat up to there. Other methods' adapters are the same for every prompt. For these, one pass over the
chat predicts all turns' tokens from the same tokens before them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from para_jax.data.buffers import Example
from para_jax.errors import ParaJaxError


def chat_pairs(messages: Any, tokenizer: Any, need_response: bool) -> Iterator[tuple[str, str]]:
    """Each assistant turn and the prompt before it, as the chat template writes them.

    Without `need_response` it is one pair: the whole chat as the prompt, and nothing. Raises ParaJaxError for messages
    that are none, and for a template that changes a turn when the next one follows.
    """
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
