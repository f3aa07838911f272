"""Several processes, each with some of a mesh's devices: who speaks, what all know, and what all agree on.

Every process runs the same program on the same inputs. What only one may do, such as writing a file, is the first
one's; the others wait for it where they need it.
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
PIECES = (2**26, 2**22, 2**16, 2**12)  # bytes of the messages between processes


def join_processes(address: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes, before anything is computed.

    Args:
      address: HOST:PORT of the first process; None finds it, the number of processes and one's own from Cloud TPU,
        SLURM, Kubernetes or Open MPI.
      processes, process: how many there are, and which of them this is, from zero.

    Raises ParaJaxError if they cannot be found, or do not come together.
    """
    try:
        jax.distributed.initialize(address, processes, process)
    except (RuntimeError, ValueError) as error:
        raise ParaJaxError(
            f"the processes did not come together ({str(error).splitlines()[0]}); give every process the same "
            "--coordinator HOST:PORT and --processes N, and its own --process from 0 to N - 1"
        ) from error


def leave(code: int) -> NoReturn:
    """Ends this process at once with an exit code. The others then fail at what they do together next.

    A process that ends in order waits for the others first, minutes long, while they wait for its part of a step.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody may be reading
            stream.flush()
    os._exit(code)


def is_main_process() -> bool:
    """Whether this process is the one that writes and speaks. Where it is alone, no device is looked for."""
    return _alone() or jax.process_index() == 0


def _alone() -> bool:
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if not _alone():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def broadcast(text: bytes) -> bytes:
    """What the first process says, in every process, whatever its size."""
    return text if _alone() else _broadcast(text, 0)


def on_main_process(act: Callable[[], None]) -> None:
    """Lets the first process do something, and raises in every process the ParaJaxError that it raises there."""
    problem = b""
    if is_main_process():
        try:
            act()
        except (ParaJaxError, OSError, ValueError) as error:
            problem = (str(error) or type(error).__name__).encode("utf-8", "backslashreplace")
    if message := broadcast(problem).decode():
        raise ParaJaxError(message)


def share_work(makers: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """What each of these makes, under its name, made by one of the processes and known to all.

    What is made has to be plain data, for it is pickled on its way. Each process sends what it made to all others, at
    its own size. Raises ParaJaxError in every process if one does.
    """
    if _alone():
        return {name: make() for name, make in makers.items()}
    problem, made = "", {}
    try:
        made = {name: makers[name]() for name in list(makers)[jax.process_index() :: jax.process_count()]}
    except ParaJaxError as error:
        problem = str(error)
    found: dict[str, T] = {}
    own = pickle.dumps((problem, made))
    for source in range(jax.process_count()):
        problem, made = pickle.loads(_broadcast(own, source))
        if problem:
            raise ParaJaxError(problem)
        found |= made
    return {name: found[name] for name in makers}


def _broadcast(text: bytes, source: int) -> bytes:
    """What the process `source` says; all have to call it."""
    from jax.experimental import multihost_utils

    speaks = jax.process_index() == source

    def sent(part: bytes, size: int) -> bytes:
        room = np.zeros(size, np.uint8)
        if speaks:
            room[: len(part)] = np.frombuffer(part, np.uint8)
        return np.asarray(multihost_utils.broadcast_one_to_all(room, is_source=speaks)).tobytes()

    left = int.from_bytes(sent(len(text).to_bytes(8, "little"), 8), "little")
    parts, at = [], 0
    for size, count in _pieces(left):
        for _ in range(count):
            parts.append(sent(text[at : at + size], size)[: left - at])
            at += size
    return b"".join(parts)


def _pieces(size: int) -> list[tuple[int, int]]:
    """Messages of which sizes, and how many of each, hold so many bytes: a few sizes, for each is a program.

    >>> _pieces(5), _pieces(70_000)
    ([(4096, 1)], [(65536, 1), (4096, 2)])
    """
    found = []
    for piece in PIECES[:-1]:
        if size >= piece:
            found.append((piece, size // piece))
            size %= piece
    return [*found, (PIECES[-1], -(-size // PIECES[-1]))] if size else found


def shard(x: np.ndarray, sharding: Sharding | None) -> Any:
    """An array that every process has, as one over all devices; each process hands its devices their part."""
    if sharding is None:
        return x
    return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])


def gather(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays that lie on a mesh as NumPy's, the same in every process; all have to call it."""
    if mesh is None or _alone():
        return jax.device_get(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), _gathered(tree, mesh))


@partial(jax.jit, static_argnames="mesh")
def _gathered(tree: Any, mesh: Mesh) -> Any:
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


class Flag:
    """Something that any process may raise and all learn of at the same step."""

    def __init__(self, mesh: Mesh | None):
        self._alone = mesh is None or _alone()
        self._before: Any = None
        if mesh is not None:
            self._apart = NamedSharding(mesh, P(mesh.axis_names))
            self._count = mesh.size
            self._any = jax.jit(lambda x: x.any(), out_shardings=NamedSharding(mesh, P()))

    def raised(self, here: bool) -> bool:
        """Whether any process had raised it when this was last called; of a single process, whether it is now.

        One call late, so that no device waits for the answer.
        """
        if self._alone:
            return here
        flags = np.full((self._count,), here)
        now = self._any(shard(flags, self._apart))
        before, self._before = self._before, now
        return before is not None and bool(before.addressable_data(0))
