"""Reads PyTorch's .bin files with torch, without executing code in them (`weights_only`)."""

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
    """Makes torch look uninstalled until a file needs it. Call it only in the command line's own process.

    transformers imports torch if it is installed, which takes three seconds of processor time and 0.24 GB.
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]  # None makes the import fail


def _torch() -> Any:
    if sys.modules.get("torch", ...) is None:
        del sys.modules["torch"]
    import torch

    return torch


def read_torch(path: Path, dtypes: tuple[str, ...], spare: tuple[str, ...] = ()) -> dict[str, Any]:
    """The torch tensors of a file by name, memory-mapped if possible. Those of other dtypes whose names end with one of
    `spare` are left out.

    Raises ParaJaxError if torch is not installed, if the file is damaged or has other objects than tensors, or if a
    tensor has another dtype than `dtypes`.
    """
    try:
        torch = _torch()
    except ImportError as error:
        raise ParaJaxError(
            f"{path} is a PyTorch file, which needs torch: pip install torch, or get the weights as safetensors"
        ) from error
    try:
        # Memory-mapped, so that only tensors in use are in memory. Files of old torch versions cannot be mapped.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, UnpicklingError, EOFError, ValueError, OSError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ParaJaxError(f"{path} is damaged or holds more than tensors: {reason}") from error
    if not isinstance(tensors, dict):
        raise ParaJaxError(f"{path} is damaged or holds more than tensors: it is a {type(tensors).__name__}")
    found = {}
    for key, x in tensors.items():
        kind = str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__
        if kind.removeprefix("torch.") in dtypes:
            found[key] = x
        elif not key.endswith(spare):
            raise ParaJaxError(f"{path}: {key} is {kind}; supported: {', '.join(sorted(dtypes))}")
    return found


def as_numpy(x: Any) -> np.ndarray:
    """A torch tensor as a NumPy view of the file."""
    torch = _torch()
    if x.dtype == torch.bfloat16:  # NumPy has no bfloat16
        import ml_dtypes

        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()
