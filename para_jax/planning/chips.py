"""The chips a plan can be made for, and the slices of them, by the names one rents them under."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Literal

from para_jax.errors import ParaJaxError, unknown

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What its vendor says of a chip.

    Attributes:
      hbm: bytes that a program may use. Of a TPU it is what libtpu says when a program asks for more, a little below
        the memory on the label.
      flops: operations a second in `dtype`, dense, at the peak.
      hbm_rate: bytes a second from and to its memory.
      link_rate: bytes a second that it sends to its neighbours along one axis of the slice, in both directions
        together; of a GPU, over NVLink (a T4: PCIe).
      axes: how many axes a slice of them has.
      dtype: what it multiplies fast, and so computes in unless asked (`compute_dtype`).
    """

    name: str
    hbm: int
    flops: float
    hbm_rate: float
    link_rate: float
    axes: int
    source: str
    kind: Literal["tpu", "gpu"] = "tpu"
    dtype: Literal["bfloat16", "float16"] = "bfloat16"


# The vendors give what all links of a chip carry in both directions. A ring along one axis sends through two of a
# TPU's links (of four in a plane, of six in space), half of it in each direction.
_TPU, _NVIDIA = "cloud.google.com/tpu/docs/", "nvidia.com/en-us/data-center/"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(30.75 * GIB), 275e12, 1.2e12, 1e11, 3, _TPU + "v4"),
        Chip("v5e", int(15.75 * GIB), 197e12, 8.19e11, 1e11, 2, _TPU + "v5e"),
        Chip("v5p", int(95.74 * GIB), 459e12, 2.765e12, 2e11, 3, _TPU + "v5p"),
        Chip("v6e", int(31.25 * GIB), 918e12, 1.64e12, 2e11, 2, _TPU + "v6e"),
        Chip("t4", 15 * GIB, 65e12, 3.2e11, 1.6e10, 1, _NVIDIA + "tesla-t4", "gpu", "float16"),
        Chip("a100", 80 * 10**9, 312e12, 2.039e12, 3e11, 1, _NVIDIA + "a100", "gpu"),
        Chip("h100", 80 * 10**9, 989e12, 3.35e12, 4.5e11, 1, _NVIDIA + "h100", "gpu"),
        Chip("h200", 141 * 10**9, 989e12, 4.8e12, 4.5e11, 1, _NVIDIA + "h200", "gpu"),
    )
}


@dataclass(frozen=True)
class Topology:
    """A slice of one kind of chip: its shape has an entry for each axis."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many chips."""
        return prod(self.shape)


def parse_topology(name: str) -> Topology:
    """A slice by its name: `v5e:4x4`, `v5p:2x2x4`, or of GPUs `gpu:h100x8`.

    Raises ParaJaxError for an unknown chip or a shape that no slice of it has.

    >>> parse_topology("v5e:4x4").size, parse_topology("gpu:h100x8").size
    (16, 8)
    """
    kind, _, shape = name.strip().lower().partition(":")
    if kind == "gpu":
        kind, _, shape = shape.partition("x")
        shape = shape or "1"
    if kind not in CHIPS:
        raise unknown("chip", kind, CHIPS)
    chip = CHIPS[kind]
    example = f"gpu:{kind}x8" if chip.kind == "gpu" else f"{kind}:{'x'.join(['2'] * chip.axes)}"
    if (
        not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape)
        or len(sizes := [int(n) for n in shape.split("x")]) != chip.axes
    ):
        raise ParaJaxError(f"{name!r} is no slice of {kind} chips, which have {chip.axes} axes; write it as {example}")
    return Topology(name.strip().lower(), chip, tuple(sizes))
