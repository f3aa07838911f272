"""Why something could not be had from the Hugging Face hub, and what to do about it."""

from __future__ import annotations

import os

from para_jax.errors import ParaJaxError, one_line


def not_had(name: str, error: BaseException, kind: str = "") -> ParaJaxError:
    """The error for a model, or with kind "datasets/" a data set, that was asked for by name.

    >>> print(not_had("owner/name", OSError("no network")))
    owner/name is neither a folder here nor could it be had from the Hugging Face hub (OSError: no network). Check the \
spelling and the network, or download it elsewhere and give the folder
    """
    from huggingface_hub.errors import GatedRepoError

    # datasets raises an error of its own, which says so in words.
    if isinstance(error, GatedRepoError) or "gated dataset" in str(error):
        page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{kind}{name}"
        return ParaJaxError(
            f"{name} is gated: visit {page}, accept its terms, and set the variable HF_TOKEN to a token of yours "
            "(in Colab: a secret of this name)"
        )
    return ParaJaxError(
        f"{name} is neither a folder here nor could it be had from the Hugging Face hub "
        f"({type(error).__name__}: {one_line(error)}). Check the spelling and the network, or download it elsewhere "
        "and give the folder"
    )
