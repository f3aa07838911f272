"""Finds the tensors of a text decoder in a model with other parts, by the prefixes that checkpoints use.

transformers 5, in memory              model.language_model.layers.0. ...    lm_head.weight
before transformers 4.52, on the hub   language_model.model.layers.0. ...    language_model.lm_head.weight
base models                            language_model.layers.0. ...
Qwen2.5-VL on the hub                  model.layers.0. ...                   lm_head.weight, with visual. ...
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from para_jax.convert.tensors import TensorFiles
from para_jax.errors import ParaJaxError
from para_jax.families.wrappers import HEADS, Wrapper


class Parts(NamedTuple):
    """A checkpoint's tensors by part of the model.

    Attributes:
      names: the decoder's tensors, each with its name in a causal language model.
      others: the tensors of each module that is not for text.
      unknown: the tensors of unknown parts.
      prefix: the prefix of the decoder's names, instead of "model.".
    """

    names: dict[str, str]
    others: dict[str, list[str]]
    unknown: list[str]
    prefix: str


def parts_of(folder: Path, tensors: Collection[str], wrapper: Wrapper | None) -> Parts:
    """Sorts tensors by part of the model. Without a wrapper, all are the decoder's.

    Raises ParaJaxError if the decoder's names have different prefixes, or there are none.
    """
    if wrapper is None:
        return Parts({name: name for name in tensors}, {}, [], "model.")
    found = Parts({}, {}, [], "")
    first: dict[str, str] = {}  # the first tensor with each prefix
    longest = sorted(wrapper.prefixes, key=len, reverse=True)
    for stored in tensors:
        other = stored.removeprefix("model.").partition(".")[0]
        head = next((head for head in HEADS if stored.startswith(head)), None)
        prefix = next((prefix for prefix in longest if stored.startswith(prefix)), None)
        if other in wrapper.others:
            found.others.setdefault(other, []).append(stored)
        elif head is not None:
            found.names[stored] = f"{HEADS[0]}{stored.removeprefix(head)}"
        elif prefix is not None:
            first.setdefault(prefix, stored)
            found.names[stored] = f"model.{stored.removeprefix(prefix)}"
        else:
            found.unknown.append(stored)
    if len(first) > 1:
        raise ParaJaxError(
            f"{folder} has different prefixes for its text part, such as in {' and '.join(first.values())}: it was "
            "made from several checkpoints. Use one of them, or rename the tensors of the other"
        )
    if not first:
        raise ParaJaxError(
            f"{folder} has no tensors of the text part of a {wrapper.architecture}, whose names begin with "
            f"{' or '.join(wrapper.prefixes)}; the folder's are like {next(iter(tensors), 'none')}. If it is a text "
            f"model, model_type in config.json must be {' or '.join(wrapper.texts.values())}"
        )
    return found._replace(prefix=next(iter(first)))


def left_out(folder: Path, parts: Parts, shapes: Mapping[str, tuple[int, ...]], wrapper: Wrapper) -> str:
    """A message that lists the parts of a checkpoint that are not read."""

    def size(tensors: list[str]) -> str:
        count = "1 tensor" if len(tensors) == 1 else f"{len(tensors)} tensors"
        return f"{count}, {sum(math.prod(shapes[name]) for name in tensors):,} parameters"

    shown = ", ".join(f"{part} ({size(tensors)})" for part, tensors in parts.others.items())
    return f"{folder}: of {wrapper.architecture} the text part is read; left out: {shown}"


@dataclass(frozen=True)
class Unread:
    """A tensor to copy from one checkpoint to another, cast to `dtype`. It is read on use and not kept in memory."""

    files: TensorFiles
    name: str
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.files.shape[self.name]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        x = self.files.read(self.name)
        return x if x.dtype == self.dtype else cast(self.name, x, self.dtype)


def cast(name: str, x: Any, dtype: np.dtype) -> np.ndarray:
    """Casts a tensor. Raises ParaJaxError for a value beyond the dtype's range."""
    with np.errstate(over="ignore"):  # checked below
        y = np.asarray(x.astype(dtype))
    if np.isinf(y).any() and not np.isinf(x).any():
        raise ParaJaxError(f"{name} has a weight beyond the range of {dtype}; choose another dtype")
    return y
