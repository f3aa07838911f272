"""PyTorch's .bin files, read by torch with nothing in them executed (`weights_only`)."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from para_jax.errors import ParaJaxError

if TYPE_CHECKING:
    import numpy as np


def hide_torch() -> None:
    """Makes torch look as if it were not installed, until a file needs it. For a process that is ours alone.

    transformers imports torch wherever it is, which takes three seconds of processor time and 0.24 GB at every start.
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]  # the import system's word for "there is none"


def _torch() -> Any:
    if sys.modules.get("torch", ...) is None:
        del sys.modules["torch"]
    import torch

    return torch


def read_torch(path: Path, dtypes: tuple[str, ...]) -> dict[str, Any]:
    """The torch tensors of a file by name, mapped into memory where the file can be.

    Raises ParaJaxError if torch is not installed, the file is damaged or holds more than tensors, or a tensor has
    another dtype than these.
    """
    try:
        torch = _torch()
    except ImportError as error:
        raise ParaJaxError(
            f"{path} is PyTorch's, which torch has to read; pip install torch, or get the weights as safetensors"
        ) from error
    try:
        # Mapped: what is not read yet is not in memory. Files of old versions of torch cannot be.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, UnpicklingError, EOFError, ValueError, OSError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ParaJaxError(f"{path} is damaged or holds more than tensors: {reason}") from error
    if not isinstance(tensors, dict):
        raise ParaJaxError(f"{path} is damaged or holds more than tensors: it is a {type(tensors).__name__}")
    for key, x in tensors.items():
        kind = str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__
        if kind.removeprefix("torch.") not in dtypes:
            raise ParaJaxError(f"{path}: {key} is {kind}; supported: {', '.join(sorted(dtypes))}")
    return tensors


def as_numpy(x: Any) -> np.ndarray:
    """A torch tensor as a view of the file."""
    torch = _torch()
    if x.dtype == torch.bfloat16:  # which NumPy does not know by torch's name
        import ml_dtypes

        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()
