"""Compiles a program, and reads its memory, collectives and operations from the result."""

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
from para_jax.planning.hlo import Collective, collectives, loop_bytes_written

_NEEDED = re.compile(r"required[^(]*\(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Program:
    """The cost of a program. Bytes are per device.

    Attributes:
      arguments: bytes of arguments.
      outputs: bytes of outputs, without the `aliased` ones, which reuse the memory of donated arguments.
      temporaries: the peak minus arguments and outputs.
      peak: peak memory. If the program does not compile (`problem`), the memory that it would need.
      held: memory that the library holds on the first device while the program runs, without the arguments.
      written: bytes of large buffers that loops write to memory in one run (`hlo.loop_bytes_written`).
      flops: operations of all matmuls, on all devices together, in one run.
      problem: the compiler's message, if the program exceeds the memory.
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
        return not self.problem and self.peak + self.held <= hbm


def compiled(name: str, traced: Traced, arguments: Any, mesh: Mesh, held: int = 0) -> tuple[Program, Any]:
    """Compiles a program for the devices of a mesh.

    Returns its cost, and the shardings of its outputs; None instead if libtpu reports that it exceeds the memory.
    """
    start = time.perf_counter()
    count = flops(traced.jaxpr)
    try:
        executable = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or not (needed := _NEEDED.search(str(error))):
            raise
        inputs, peak = shard_bytes(arguments), int(float(needed[1]) * _UNITS[needed[2]])
        problem, seconds = str(error).partition(": ")[2].splitlines()[0], time.perf_counter() - start
        return Program(name, inputs, 0, 0, max(0, peak - inputs), peak, held, count, 0, (), seconds, problem), None
    m = executable.memory_analysis()
    inputs, outputs = m.argument_size_in_bytes, m.output_size_in_bytes - m.alias_size_in_bytes
    # The TPU compiler reports the peak; its sum of temporaries counts some twice. The CPU compiler has only the sum.
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    temporaries = max(0, m.peak_memory_in_bytes - inputs - outputs) if on_tpu else m.temp_size_in_bytes
    text, aliased = executable.as_text(), m.alias_size_in_bytes
    found, written = tuple(collectives(text, mesh.size)), loop_bytes_written(text)
    peak, seconds = inputs + outputs + temporaries, time.perf_counter() - start
    program = Program(name, inputs, outputs, aliased, temporaries, peak, held, count, written, found, seconds)
    return program, executable.output_shardings


def shard_bytes(tree: Any) -> int:
    """Bytes of a tree of abstract arrays with shardings on one device; two int4 values share a byte.

    >>> import jax.numpy as jnp
    >>> shard_bytes({"a": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16), "b": jax.ShapeDtypeStruct((8,), jnp.int4)})
    28
    """

    def size(x: Any) -> int:
        sharding = getattr(x, "sharding", None)  # NumPy arrays have none
        shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
        bits = 4 if "int4" in str(x.dtype) else 8 * x.dtype.itemsize
        return math.ceil(math.prod(shape) * bits / 8)

    return sum(size(x) for x in jax.tree.leaves(tree))
