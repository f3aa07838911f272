"""Reads MXFP4 weights of mixtures of experts (GPT-OSS) as bfloat16.

A projection of all experts is stored as two tensors of bytes (Open Compute Project, Microscaling Formats v1.0):

    <name>_blocks (e, o, groups, 16)    two FP4 numbers in a byte, the lower half first: 32 inputs in a group
    <name>_scales (e, o, groups)        the exponent of each group's power of two, plus 127

It is read as the tensor <name> (e, i, o) that transformers widens them to. Every finite value is exact in bfloat16.
"""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np

BLOCKS, SCALES = PACKED = ("_blocks", "_scales")
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the eight FP4 numbers without a sign
BYTES = 16  # in a group


def widened(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The bfloat16 numbers (outputs, inputs) of blocks (outputs, groups, 16) with scales (outputs, groups).

    >>> blocks, scales = np.full((1, 1, 16), 0x2F, np.uint8), np.full((1, 1), 128, np.uint8)
    >>> widened(blocks, scales)[0, :3].astype(np.float32).tolist()
    [-12.0, 2.0, -12.0]
    """
    pairs = _pairs()[scales.astype(np.uint16)[..., None] << 8 | blocks]
    return pairs.view(ml_dtypes.bfloat16).reshape(len(blocks), -1)


@cache
def _pairs() -> np.ndarray:
    """For every scale and byte, in this order, its two numbers in one integer."""
    fp4 = np.array([*POSITIVE, *(-x for x in POSITIVE)], np.float32)
    byte = np.arange(256)
    both = np.stack([fp4[byte & 15], fp4[byte >> 4]], axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):  # the scale 255 means NaN
        power = np.ldexp(np.float32(1), np.arange(256) - 127)
        numbers = (power[:, None, None] * both).astype(ml_dtypes.bfloat16)
    return numbers.view(np.uint32).reshape(-1)
