"""One program through the compiler, and what it says of it."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Traced

from para_jax.planning.flops import flops
from para_jax.planning.hlo import Collective, collectives, written

_NEEDED = re.compile(r"required[^(]*\(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Program:
    """What a program takes. Bytes are those of one device.

    Attributes:
      arguments: what goes in.
      outputs: what comes out beside what takes an argument's place, which is `aliased`.
      temporaries: what the peak adds to arguments and outputs.
      peak: the most that is allocated at once; what would have been, if the compiler gave up (`problem`).
      held: what the library keeps meanwhile, on the first device, that is no argument.
      written: large buffers that its loops write to memory in one run (`hlo.written`).
      flops: of the products on all devices together, in one run.
      problem: the compiler's words, if the program exceeds the memory.
    """

    name: str
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    held: int
    flops: float
    written: int = 0
    collectives: tuple[Collective, ...] = ()
    compile_seconds: float = 0.0
    problem: str = ""

    def fits(self, hbm: int) -> bool:
        """Whether it and what is held beside it fit so many bytes of memory."""
        return not self.problem and self.peak + self.held <= hbm


def compiled(name: str, traced: Traced, arguments: Any, mesh: Mesh, held: int = 0) -> tuple[Program, Any]:
    """Compiles a program for the devices of a mesh.

    Returns what it takes, and the placement of its outputs; None, if it exceeds the memory, which libtpu finds out.
    """
    start = time.perf_counter()
    count = flops(traced.jaxpr)
    try:
        done = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or not (needed := _NEEDED.search(str(error))):
            raise
        goes_in, peak = shard_bytes(arguments), int(float(needed[1]) * _UNITS[needed[2]])
        words, seconds = str(error).partition(": ")[2].splitlines()[0], time.perf_counter() - start
        return Program(name, goes_in, 0, 0, max(0, peak - goes_in), peak, held, count, 0, (), seconds, words), None
    m = done.memory_analysis()
    goes_in, outputs = m.argument_size_in_bytes, m.output_size_in_bytes - m.alias_size_in_bytes
    # The TPU's compiler knows the peak, and counts some temporaries twice in their sum; the CPU's has the sum only.
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    between = max(0, m.peak_memory_in_bytes - goes_in - outputs) if on_tpu else m.temp_size_in_bytes
    text, peak = done.as_text(), goes_in + outputs + between
    found, rewritten, seconds = tuple(collectives(text, mesh.size)), written(text), time.perf_counter() - start
    aliased = m.alias_size_in_bytes
    program = Program(name, goes_in, outputs, aliased, between, peak, held, count, rewritten, found, seconds)
    return program, done.output_shardings


def shard_bytes(tree: Any) -> int:
    """Bytes that a tree of shapes with placements takes on one device; two int4 are in one byte.

    >>> import jax.numpy as jnp
    >>> shard_bytes({"a": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16), "b": jax.ShapeDtypeStruct((8,), jnp.int4)})
    28
    """

    def of(x: Any) -> int:
        where = getattr(x, "sharding", None)  # NumPy's arrays have none
        shape = x.shape if where is None else where.shard_shape(x.shape)
        bits = 4 if "int4" in str(x.dtype) else 8 * x.dtype.itemsize
        return math.ceil(math.prod(shape) * bits / 8)

    return sum(of(x) for x in jax.tree.leaves(tree))
