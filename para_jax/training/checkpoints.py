"""Training states on disk, exact and whole: orbax writes beside a checkpoint's place and renames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.errors import ParaJaxError


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
            copied = jax.tree.map(jax.numpy.copy, _named(state))
            jax.block_until_ready(copied)
            self._writing = (
                step, self._checkpointer.save_async(step, copied, force=True, custom_metadata=beside or {})
            )  # fmt: skip

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

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """The newest state, bit for bit, in the structure and on the devices of `like`, and what was kept beside it.

        The first axis of an array may be longer or shorter than it was, by entries that mean nothing.
        """
        named, step = _named(like), self.latest()
        about = self._checkpointer.metadata(step)
        saved = about.metadata
        abstract = {
            k: jax.ShapeDtypeStruct(
                saved[k].shape, x.dtype, sharding=x.sharding if saved[k].shape == x.shape else _everywhere(x.sharding)
            )
            for k, x in named.items()
        }
        loaded = self._checkpointer.load(step, abstract)
        fitted = [
            loaded[k] if loaded[k].shape == x.shape else _fitted(loaded[k], len(x), x.sharding)
            for k, x in named.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(like), fitted), dict(about.custom_metadata or {})


def _everywhere(sharding: Any) -> Any:
    return NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else sharding


def _fitted(x: jax.Array, size: int, sharding: Any) -> jax.Array:
    def fit(x: jax.Array) -> jax.Array:
        more = max(0, size - x.shape[0])
        return jax.numpy.pad(x, [(0, more), *[(0, 0)] * (x.ndim - 1)])[:size]

    return jax.jit(fit, out_shardings=sharding)(x)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by the path to them, so that a checkpoint does not depend on the classes that made it."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="-"): x for path, x in leaves}
