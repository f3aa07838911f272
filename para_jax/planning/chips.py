"""Chips and slices (topologies) that plans can be made for, by their product names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Literal

from para_jax.errors import ParaJaxError, check_known

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """The vendor's figures of a chip.

    Attributes:
      hbm: bytes that a program may use. For TPUs it is the limit in libtpu's out-of-memory error, slightly below the
        nominal memory.
      flops: peak dense operations per second in `dtype`.
      hbm_rate: memory bandwidth in bytes per second.
      link_rate: bytes per second that it sends to its neighbours along one axis of the slice, both directions together;
        for GPUs over NVLink (T4: PCIe).
      axes: the number of axes of a slice.
      dtype: the fast dtype for matmuls, and the default dtype of computation (`compute_dtype`).
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


# Vendors give the bandwidth of all links of a chip, both directions together. A ring along one axis sends over two of a
# TPU's links (of four in a 2D torus, of six in a 3D torus), half of the data in each direction.
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
    """A slice of one kind of chip. Its shape has an entry for each axis."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)


def parse_topology(name: str) -> Topology:
    """Parses the name of a slice: `v5e:4x4`, `v5p:2x2x4`, or `gpu:h100x8`.

    Raises ParaJaxError for an unknown chip or an invalid shape.

    >>> parse_topology("v5e:4x4").size, parse_topology("gpu:h100x8").size
    (16, 8)
    """
    kind, _, shape = name.strip().lower().partition(":")
    if kind == "gpu":
        kind, _, shape = shape.partition("x")
        shape = shape or "1"
    check_known("chip", [kind], CHIPS)
    chip = CHIPS[kind]
    example = f"gpu:{kind}x8" if chip.kind == "gpu" else f"{kind}:{'x'.join(['2'] * chip.axes)}"
    if (
        not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape)
        or len(sizes := [int(n) for n in shape.split("x")]) != chip.axes
    ):
        raise ParaJaxError(
            f"{name!r} is not a slice of {kind} chips, which have {chip.axes} axes; write it as {example}"
        )
    return Topology(name.strip().lower(), chip, tuple(sizes))
