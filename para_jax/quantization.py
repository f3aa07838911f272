"""Weights in int8 or int4: the forms there are, and how a weight is brought into one on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float

Quantize = Literal["int8", "int4"]


class Bits(NamedTuple):
    """How weights are quantized: symmetrically, one scale for each output, or for each `group` of its inputs.

    Scales of groups are bfloat16. A weight can then be widened in bfloat16, with one rounding; scales in float32 would
    be spread over the whole weight in memory.
    """

    dtype: str
    most: int
    group: int | None = None

    @property
    def scale_dtype(self) -> jnp.dtype:
        return jnp.dtype("float32" if self.group is None else "bfloat16")

    def groups(self, inputs: int) -> int:
        """How many scales an output has: groups are as large as divides its inputs, `self.group` at the most."""
        if self.group is None:
            return 1
        return inputs // max(size for size in range(1, self.group + 1) if inputs % size == 0)


QUANTIZED = {"int8": Bits("int8", 127), "int4": Bits("int4", 7, group=128)}


def quantized(weight: Float[np.ndarray, "*o i"], bits: Bits) -> tuple[np.ndarray, np.ndarray]:
    """The weight in few bits (*o, i), and its scales (*o, groups), on the host.

    A scale is the largest of its weights over the largest whole number there is.

    >>> few, scale = quantized(np.array([[127.0, -1.4], [0.0, 0.0]], np.float32), QUANTIZED["int8"])
    >>> few.tolist(), scale.tolist()
    ([[127, -1], [0, 0]], [[1.0], [0.0]])
    """
    groups = bits.groups(weight.shape[-1])
    rows = weight.reshape(-1, groups, weight.shape[-1] // groups)
    whole, scale = np.empty(rows.shape, bits.dtype), np.empty(rows.shape[:2], bits.scale_dtype)
    step = max(1, 2**22 // weight.shape[-1])  # rows at a time, so that what is made on the way stays small
    for start in range(0, len(rows), step):
        some = rows[start : start + step].astype(np.float32)
        scale[start : start + step] = np.abs(some).max(axis=-1) / np.float32(bits.most)
        own = scale[start : start + step].astype(np.float32)
        whole[start : start + step] = np.rint(some / np.where(own == 0, 1, own)[..., None]).astype(bits.dtype)
    return whole.reshape(weight.shape), scale.reshape(*weight.shape[:-1], groups)
