"""Quantized weights: the int8 and int4 formats, and quantization on the host. Matmuls are in backbones/linear.py."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from para_jax.annotations import Float

Quantize = Literal["int8", "int4"]


class Bits(NamedTuple):
    """A symmetric format with one scale for each output, or for each `group` of its inputs.

    Scales of groups are bfloat16, so that weights are dequantized in bfloat16 with one rounding. float32 scales would
    be broadcast to the size of the weight in memory.
    """

    dtype: str
    most: int
    group: int | None = None

    @property
    def scale_dtype(self) -> jnp.dtype:
        return jnp.dtype("float32" if self.group is None else "bfloat16")

    def groups(self, inputs: int) -> int:
        """The number of scales of an output. The group size is the largest divisor of `inputs` up to `self.group`."""
        if self.group is None:
            return 1
        return inputs // max(size for size in range(1, self.group + 1) if inputs % size == 0)


QUANTIZED = {"int8": Bits("int8", 127), "int4": Bits("int4", 7, group=128)}


def quantized(weight: Float[np.ndarray, "*o i"], bits: Bits) -> tuple[np.ndarray, np.ndarray]:
    """The quantized weight (*o, i) and its scales (*o, groups), on the host.

    A scale is the largest absolute weight of its group over the largest integer of the format.

    >>> values, scale = quantized(np.array([[127.0, -1.4], [0.0, 0.0]], np.float32), QUANTIZED["int8"])
    >>> values.tolist(), scale.tolist()
    ([[127, -1], [0, 0]], [[1.0], [0.0]])
    """
    groups = bits.groups(weight.shape[-1])
    rows = weight.reshape(-1, groups, weight.shape[-1] // groups)
    values, scale = np.empty(rows.shape, bits.dtype), np.empty(rows.shape[:2], bits.scale_dtype)
    step = max(1, 2**22 // weight.shape[-1])  # rows in a chunk, so that temporaries stay small
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step].astype(np.float32)
        scale[start : start + step] = np.abs(chunk).max(axis=-1) / np.float32(bits.most)
        rounded = scale[start : start + step].astype(np.float32)
        values[start : start + step] = np.rint(chunk / np.where(rounded == 0, 1, rounded)[..., None]).astype(bits.dtype)
    return values.reshape(weight.shape), scale.reshape(*weight.shape[:-1], groups)
