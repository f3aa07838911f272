"""PyTorch's .bin files, read by torch with nothing in them executed (`weights_only`)."""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import ml_dtypes
import numpy as np

from para_jax.errors import ParaJaxError


def read_torch(path: Path, dtypes: tuple[str, ...]) -> dict[str, Any]:
    """The torch tensors of a file by name, mapped into memory where the file can be.

    Raises ParaJaxError if torch is not installed, the file is damaged or holds more than tensors, or a tensor has
    another dtype than these.
    """
    try:
        import torch
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
    import torch

    if x.dtype == torch.bfloat16:  # which NumPy does not know by torch's name
        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()
