"""The tokenizer of a checkpoint, as transformers gives it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from para_jax.backbones.config import checkpoint_folder
from para_jax.errors import ParaJaxError

FILES = ["*.json", "tokenizer*", "*.jinja"]


def load_tokenizer(path_or_hub_id: str | Path) -> Any:
    """A transformers tokenizer. Raises ParaJaxError if the checkpoint has none.

    >>> from para_jax import tiny_backbone_path
    >>> load_tokenizer(tiny_backbone_path()).decode([0])
    '<|endoftext|>'
    """
    from transformers import AutoTokenizer

    folder = checkpoint_folder(path_or_hub_id, FILES)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ParaJaxError(
            f"{path_or_hub_id} has no tokenizer that can be read: {str(error).splitlines()[0]}"
        ) from error


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises ParaJaxError if the tokenizer's own vocabulary is larger than the backbone's.

    Tokens that were added to it may be beyond (Gemma 3 has one for images); rows that have one are refused.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ParaJaxError(
            f"the tokenizer's vocabulary has {tokenizer.vocab_size} tokens, and the backbone's {vocab_size}; one of "
            "the two is another model's"
        )


def with_chat_template(tokenizer: Any, template: str | None) -> Any:
    """The tokenizer with another chat template, or the same one if there is none.

    >>> from para_jax import tiny_backbone_path
    >>> tokenizer = load_tokenizer(tiny_backbone_path())
    >>> shouting = with_chat_template(tokenizer, "{{ messages[0].content | upper }}")
    >>> shouting.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    'HELLO'
    >>> with_chat_template(tokenizer, None) is tokenizer
    True
    """
    if template is None:
        return tokenizer
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other
