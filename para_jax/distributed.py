"""Multi-process runs: the main process, and broadcasts, gathers and barriers between processes.

Each process has some of a mesh's devices, and runs the same program on the same inputs. What only one process may do,
such as writing a file, the main process does; the others wait if they need the result.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.errors import ParaJaxError

if TYPE_CHECKING:
    from jax.sharding import Sharding

T = TypeVar("T")
MOST = 2**26  # bytes of a message between processes


def join_processes(address: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes, before anything is computed.

    Args:
      address: HOST:PORT of process 0. None detects the address and the following numbers on Cloud TPU, SLURM,
        Kubernetes or Open MPI.
      processes, process: the number of processes, and the index of this one, from zero.

    Raises ParaJaxError if detection or the connection fails.
    """
    try:
        jax.distributed.initialize(address, processes, process)
    except (RuntimeError, ValueError) as error:
        raise ParaJaxError(
            f"the processes could not connect ({str(error).splitlines()[0]}); give every process the same "
            "--coordinator HOST:PORT and --processes N, and its own --process from 0 to N - 1"
        ) from error


def exit_at_once(code: int) -> NoReturn:
    """Ends this process at once with an exit code. The next collective of the others then fails.

    A regular exit would wait for the other processes for minutes, while they wait for this process's part of a step.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody may be reading
            stream.flush()
    os._exit(code)


def is_main_process() -> bool:
    """Whether this process writes files and prints. In a single-process run, JAX's devices are not initialized."""
    return _is_single_process() or jax.process_index() == 0


def _is_single_process() -> bool:
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def barrier(name: str) -> None:
    """Waits until all processes call it."""
    if not _is_single_process():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def broadcast(text: bytes) -> bytes:
    """Returns the main process's `text`, of any size, in every process."""
    return text if _is_single_process() else _broadcast(text, 0)


def on_main_process(act: Callable[[], None]) -> None:
    """Calls `act` in the main process. If it raises, every process raises ParaJaxError."""
    problem = b""
    if is_main_process():
        try:
            act()
        except (ParaJaxError, OSError, ValueError) as error:
            problem = (str(error) or type(error).__name__).encode("utf-8", "backslashreplace")
    if message := broadcast(problem).decode():
        raise ParaJaxError(message)


def share_work(makers: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Calls each function in one of the processes, and returns all results by name in every process.

    Results are pickled, so they must be plain data. Each process broadcasts its results. Raises ParaJaxError in every
    process if one does.
    """
    if _is_single_process():
        return {name: make() for name, make in makers.items()}
    problem, results = "", {}
    try:
        results = {name: makers[name]() for name in list(makers)[jax.process_index() :: jax.process_count()]}
    except ParaJaxError as error:
        problem = str(error)
    merged: dict[str, T] = {}
    pickled = pickle.dumps((problem, results))
    for source in range(jax.process_count()):
        problem, results = pickle.loads(_broadcast(pickled, source))
        if problem:
            raise ParaJaxError(problem)
        merged |= results
    return {name: merged[name] for name in makers}


def _broadcast(text: bytes, source: int) -> bytes:
    """Returns the `text` of the process `source`. All processes must call it."""
    from jax.experimental import multihost_utils

    is_source = jax.process_index() == source

    def send(part: bytes, size: int) -> bytes:
        buffer = np.zeros(size, np.uint8)
        if is_source:
            buffer[: len(part)] = np.frombuffer(part, np.uint8)
        return np.asarray(multihost_utils.broadcast_one_to_all(buffer, is_source=is_source)).tobytes()

    total = int.from_bytes(send(len(text).to_bytes(8, "little"), 8), "little")
    # Messages have a few sizes, because each size is a compiled program.
    size = min(MOST, max(2**12, 16 ** ((total.bit_length() - 1) // 4)))
    return b"".join(send(text[at : at + size], size)[: total - at] for at in range(0, total, size))


def shard(x: np.ndarray, sharding: Sharding | None) -> Any:
    """Shards an array that every process has over all devices; each process fills its devices."""
    if sharding is None:
        return x
    return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])


def gather(tree: Any, mesh: Mesh | None) -> Any:
    """Gathers arrays on a mesh as NumPy arrays, in every process. All processes must call it."""
    if mesh is None or _is_single_process():
        return jax.device_get(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), _gathered(tree, mesh))


@partial(jax.jit, static_argnames="mesh")
def _gathered(tree: Any, mesh: Mesh) -> Any:
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


class Flag:
    """A flag that any process may raise. All processes see it at the same step."""

    def __init__(self, mesh: Mesh | None):
        self._is_local = mesh is None or _is_single_process()
        self._last: Any = None
        if mesh is not None:
            self._by_device = NamedSharding(mesh, P(mesh.axis_names))
            self._count = mesh.size
            self._any = jax.jit(lambda x: x.any(), out_shardings=NamedSharding(mesh, P()))

    def raised(self, here: bool) -> bool:
        """Whether any process raised the flag at the previous call; in a single process, `here`.

        The result is one call late, so that devices do not wait for it.
        """
        if self._is_local:
            return here
        flags = np.full((self._count,), here)
        now = self._any(shard(flags, self._by_device))
        last, self._last = self._last, now
        return last is not None and bool(last.addressable_data(0))
