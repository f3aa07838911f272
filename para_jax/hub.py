"""Errors of downloads from the Hugging Face hub, and what to do about them."""

from __future__ import annotations

import os

from para_jax.errors import ParaJaxError, one_line


def not_had(name: str, error: BaseException, kind: str = "") -> ParaJaxError:
    """The error for a model, or with kind "datasets/" a data set, that could not be downloaded.

    >>> print(not_had("owner/name", OSError("no network")))
    owner/name is not a local folder, and downloading it from the Hugging Face hub failed (OSError: no network). Check \
the spelling and the network, or download it elsewhere and give the folder
    """
    from huggingface_hub.errors import GatedRepoError

    # datasets raises another error, which has this in its message.
    if isinstance(error, GatedRepoError) or "gated dataset" in str(error):
        page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{kind}{name}"
        return ParaJaxError(
            f"{name} is gated: visit {page}, accept its terms, and set the variable HF_TOKEN to a token of yours "
            "(in Colab: a secret of this name)"
        )
    return ParaJaxError(
        f"{name} is not a local folder, and downloading it from the Hugging Face hub failed "
        f"({type(error).__name__}: {one_line(error)}). Check the spelling and the network, or download it elsewhere "
        "and give the folder"
    )
