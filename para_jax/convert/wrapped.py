"""The tensors of a text decoder among those of the parts around it, in all spellings of their names.

transformers 5, in memory          model.language_model.layers.0. ...    lm_head.weight
before transformers 4.52, on hubs  language_model.model.layers.0. ...    language_model.lm_head.weight
base models                        language_model.layers.0. ...
Qwen2.5-VL on hubs                 model.layers.0. ...                   lm_head.weight, beside visual. ...
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
    """A checkpoint's tensors by what they belong to.

    Attributes:
      names: of the decoder's, the name that each has in a causal language model.
      others: of each module that a text does not go through.
      neither: of no part that is known.
      prefix: what stands before the decoder's names in place of "model.".
    """

    names: dict[str, str]
    others: dict[str, list[str]]
    neither: list[str]
    prefix: str


def parts_of(folder: Path, tensors: Collection[str], wrapper: Wrapper | None) -> Parts:
    """What each tensor belongs to; all are the decoder's, where there is nothing else.

    Raises ParaJaxError if the decoder's names are of several spellings, or of none.
    """
    if wrapper is None:
        return Parts({name: name for name in tensors}, {}, [], "model.")
    found = Parts({}, {}, [], "")
    first: dict[str, str] = {}  # of each prefix
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
            found.neither.append(stored)
    if len(first) > 1:
        raise ParaJaxError(
            f"{folder} spells the names of its text part in several ways, such as {' and '.join(first.values())}: it "
            "was put together of several checkpoints. Take one of them, or rename the tensors of the other"
        )
    if not first:
        raise ParaJaxError(
            f"{folder} has no tensors of the text part of a {wrapper.architecture}, whose names begin with "
            f"{' or '.join(wrapper.prefixes)}; its own are like {next(iter(tensors), 'none')}. If it is a text model, "
            f"model_type in config.json has to be {' or '.join(wrapper.texts.values())}"
        )
    return found._replace(prefix=next(iter(first)))


def left_out(folder: Path, parts: Parts, shapes: Mapping[str, tuple[int, ...]], wrapper: Wrapper) -> str:
    """One line for what is not read of a checkpoint."""

    def counted(tensors: list[str]) -> str:
        few = "1 tensor" if len(tensors) == 1 else f"{len(tensors)} tensors"
        return f"{few}, {sum(math.prod(shapes[name]) for name in tensors):,} parameters"

    shown = ", ".join(f"{part} ({counted(tensors)})" for part, tensors in parts.others.items())
    return f"{folder}: of {wrapper.architecture} the text part is read; left out: {shown}"


@dataclass(frozen=True)
class Unread:
    """A tensor of a checkpoint's files that is written to another's: read when it is needed, and not kept.

    `dtype` is what it is cast to.
    """

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
        """Raises ParaJaxError for a number that is beyond the dtype."""
        x = self.files.read(self.name)
        return x if x.dtype == self.dtype else cast(self.name, x, self.dtype)


def cast(name: str, x: Any, dtype: np.dtype) -> np.ndarray:
    """A tensor in another dtype. Raises ParaJaxError for a number that is beyond it."""
    with np.errstate(over="ignore"):  # looked for in the next line
        y = np.asarray(x.astype(dtype))
    if np.isinf(y).any() and not np.isinf(x).any():
        raise ParaJaxError(f"{name} has a weight beyond {dtype}; choose another dtype")
    return y
