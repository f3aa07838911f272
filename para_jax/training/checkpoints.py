"""Training states on disk, exact and whole: orbax writes beside a checkpoint's place and renames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from para_jax.errors import ParaJaxError


class Checkpoints:
    """The checkpoints of one run, newest last; the two newest are kept.

    A save that is cut off, by a kill or a full disk, leaves the previous ones as they were.
    """

    def __init__(self, folder: str | Path):
        from orbax.checkpoint import v1 as ocp

        policies = ocp.training.preservation_policies
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.folder = Path(folder).absolute()
        self._failed = False
        self._checkpointer = ocp.training.Checkpointer(
            self.folder, preservation_policy=policies.LatestN(2), cleanup_tmp_directories=True
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._checkpointer.close()
        except (OSError, ValueError, RuntimeError):
            # orbax repeats what a failed save has said already.
            if not self._failed:
                raise

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        newest = self._checkpointer.latest
        return None if newest is None else int(newest.step)

    def save(self, step: int, state: Any) -> None:
        """Writes the state after `step` steps. Raises ParaJaxError if the disk is full or not writable."""
        if self.latest() == step:
            return
        try:
            self._checkpointer.save(step, _named(state), force=True)
        # orbax passes on what its storage library says, which is not always an OSError.
        except (OSError, ValueError, RuntimeError) as error:
            self._failed = True
            safe = self.latest()
            kept = "no earlier checkpoint exists" if safe is None else f"the checkpoint of step {safe} is whole"
            reason = str(error).splitlines()[0]
            raise ParaJaxError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({reason}); {kept}"
            ) from error

    def restore(self, like: Any) -> Any:
        """The newest state, bit for bit, in the structure and on the devices of `like`."""
        named = _named(like)
        abstract = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in named.items()}
        loaded = self._checkpointer.load(self.latest(), abstract)
        return jax.tree.unflatten(jax.tree.structure(like), [loaded[name] for name in named])


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by the path to them, so that a checkpoint does not depend on the classes that made it."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="-"): _array(x) for path, x in leaves}


def _array(x: Any) -> Any:
    return jax.numpy.asarray(x) if isinstance(x, np.ndarray) else x
