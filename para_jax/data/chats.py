"""The assistant's turns of a chat, as its tokenizer's template writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

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
