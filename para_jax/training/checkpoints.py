"""Training states on disk, exact and whole: orbax writes beside a checkpoint's place and renames."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.errors import ParaJaxError
from para_jax.training.step import copied


class Checkpoints:
    """The checkpoints of one run, newest last; the newest `keep` are kept.

    A save that is cut off, by a kill or a full disk, leaves the previous ones as they were. Writing goes on in the
    background, and what goes wrong there is raised by the next `save`, or at the end.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        from orbax.checkpoint import v1 as ocp

        policies = ocp.training.preservation_policies
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.folder = Path(folder).absolute()
        self._failed = False
        self._writing: tuple[int, Any] | None = None
        self._checkpointer = ocp.training.Checkpointer(
            self.folder, preservation_policy=policies.LatestN(keep), cleanup_tmp_directories=True
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            try:
                self._checkpointer.close()
            except (OSError, ValueError, RuntimeError):
                # orbax repeats what a failed save has said already.
                if not self._failed and kind is None:
                    raise

    def latest(self) -> int | None:
        """The step of the newest checkpoint that is whole."""
        newest = self._checkpointer.latest
        return None if newest is None else int(newest.step)

    def save(self, step: int, state: Any, beside: dict[str, Any] | None = None) -> None:
        """Begins to write the state after `step` steps, and what is to be kept `beside` it as JSON.

        The arrays are copied first, so that the caller may donate them. Raises ParaJaxError if the disk is full or not
        writable.
        """
        self.wait()
        if self.latest() == step:
            return
        with self._explained(step):
            # Looked at first: where several processes write, one whose disk is full would have the others wait for it.
            needed, disk = sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(self.folder)
            if disk.total > 0 and disk.free < needed:  # not every network's file system says
                raise OSError(f"it takes {needed / 1e6:.1f} MB and {disk.free / 1e6:.1f} MB are free")
            kept = jax.block_until_ready(_named(copied(state)))
            self._writing = step, self._checkpointer.save_async(step, kept, force=True, custom_metadata=beside or {})

    def wait(self) -> None:
        """Until what `save` began is on disk. Raises ParaJaxError as `save` does."""
        if self._writing is not None:
            step, response = self._writing
            self._writing = None
            with self._explained(step):
                if response is not None:
                    response.result()

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        # orbax passes on what its storage library says, which is not always an OSError.
        except (OSError, ValueError, RuntimeError) as error:
            self._failed = True
            safe = self.latest()
            kept = "no earlier checkpoint exists" if safe is None else f"the checkpoint of step {safe} is whole"
            reason = str(error).splitlines()[0]
            raise ParaJaxError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({reason}); {kept}"
            ) from error

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """A state, the newest unless `step` says which, as and where `like` is, and what was kept beside it.

        An array that is longer or shorter in its first axis than that of `like` comes back as it was saved, whole on
        every device.
        """
        named, step = _named(like), self.latest() if step is None else step
        about = self._checkpointer.metadata(step)

        def wanted(name: str, x: jax.Array) -> jax.ShapeDtypeStruct:
            shape, where = about.metadata[name].shape, x.sharding
            if shape != x.shape and isinstance(where, NamedSharding):
                where = NamedSharding(where.mesh, P())
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=where)

        loaded = self._checkpointer.load(step, {name: wanted(name, x) for name, x in named.items()})
        state = jax.tree.unflatten(jax.tree.structure(like), [loaded[name] for name in named])
        return state, dict(about.custom_metadata or {})


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by the path to them, so that a checkpoint does not depend on the classes that made it."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="-"): x for path, x in leaves}
