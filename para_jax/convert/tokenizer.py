"""The tokenizer of a checkpoint, as transformers gives it."""

from __future__ import annotations

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
