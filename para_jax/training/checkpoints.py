"""Exact training checkpoints. An incomplete checkpoint is ignored.

A checkpoint is a folder. Each process writes a safetensors file with the array shards on its devices, and then a
manifest with the size and SHA-256 of every file that it wrote. A checkpoint is complete when the manifests of all
processes exist and every file matches its manifest; otherwise the previous checkpoint is used. Nothing is renamed, so
this also works on file systems where a rename is not atomic and where files show up late, in any order or never.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.distributed import is_main_process
from para_jax.errors import ParaJaxError
from para_jax.files import Written, as_json, copy, new_folder, read_back, remove, safetensors, write_file
from para_jax.mounts import FULL, remedy
from para_jax.progress import say
from para_jax.training.step import copy_arrays

EARLIER = "_CHECKPOINT_METADATA"
MANIFEST, STATE = "process-{}.json", "process-{}.safetensors"


class Checkpoints:
    """The checkpoints of one run. The newest `keep` are kept; at least two, because a slow file system may lose the
    newest.

    A save that is interrupted by a kill or a full disk leaves the previous checkpoints intact. A background thread
    writes; its errors are raised by the next `save`, or at the end.
    """

    def __init__(self, folder: str | Path, keep: int = 2, show: Callable[[str], None] = say):
        self.folder, self.keep, self.show = Path(folder).absolute(), keep, show
        self.newest_complete: int | None = None  # its step, as far as this object has written or checked
        self._incomplete = set[int]()
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: tuple[int, Future[None]] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with nullcontext() if kind is None else suppress(ParaJaxError):  # an earlier error is raised already
                self.wait()
        finally:
            self._thread.shutdown()

    def newest(self) -> int | None:
        """The step of the newest complete checkpoint. Reports incomplete ones, and why they are."""
        for step in reversed(steps_in(self.folder)):
            if (self.folder / str(step) / EARLIER).exists():
                raise ParaJaxError(
                    f"{self.folder} holds checkpoints of an earlier version of para_jax; finish the run with that "
                    "version, or pass --overwrite"
                )
            problem = find_problem(self.folder / str(step))
            if problem is None:
                self.newest_complete = step
                break
            self.show(f"the checkpoint of step {step} is incomplete ({problem}) and is ignored")
            self._incomplete.add(step)
        return self.newest_complete

    def save(
        self, step: int, state: Any, metadata: dict[str, Any] | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Starts to write the state after `step` steps.

        The arrays are copied first, so that the caller may donate them. Raises ParaJaxError if the disk is full or not
        writable.

        Args:
          metadata: stored with the state as JSON; only the main process's is read back.
          files: contents by relative path, stored with the state; only the main process's are read back.
        """
        self.wait()
        if self.newest_complete == step:
            return
        with self._explained(step, state):
            # Checked first: if the disk of one process is full, the others would wait for it.
            self.folder.mkdir(parents=True, exist_ok=True)
            disk = shutil.disk_usage(self.folder)
            if disk.total > 0 and disk.free < _size(state):  # some network file systems report zero
                raise OSError(FULL[0], f"{disk.free / 1e6:.1f} MB are free")
        arrays = jax.block_until_ready(_named(copy_arrays(state)))
        self._writing = step, self._thread.submit(self._write, step, arrays, metadata or {}, files or {})

    def wait(self) -> None:
        """Waits until the last `save` is on disk. Raises ParaJaxError as `save` does."""
        if self._writing is not None:
            (step, future), self._writing = self._writing, None
            future.result()
            self.newest_complete = step

    def _write(
        self, step: int, state: dict[str, jax.Array], metadata: dict[str, Any], files: Mapping[str, bytes]
    ) -> None:
        folder, process = self.folder / str(step), jax.process_index()
        with self._explained(step, state):
            folder.mkdir(parents=True, exist_ok=True)
            arrays, tensors = _parts(state)
            written = {STATE.format(process): write_file(folder / STATE.format(process), safetensors(tensors, {}))}
            for name, data in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                written[name] = write_file(folder / name, [data])
            manifest = {"processes": jax.process_count(), "files": written, "arrays": arrays, "beside": metadata}
            write_file(folder / MANIFEST.format(process), [as_json(manifest).encode()])
            if problem := _problem(folder, process):
                raise OSError(f"reading it back failed: {problem}")
        self._incomplete.discard(step)
        if is_main_process():
            with suppress(OSError):  # the next access reports it
                self._prune()

    def _prune(self) -> None:
        """Removes everything older than the newest `keep` complete checkpoints."""
        steps = steps_in(self.folder)
        complete = [step for step in steps if step not in self._incomplete and _manifests(self.folder / str(step))]
        for step in steps:
            if len(complete) >= self.keep and step < complete[-self.keep]:
                folder = self.folder / str(step)
                for path in [*folder.glob(MANIFEST.format("*")), folder]:  # without its manifest it is incomplete
                    remove(path)

    @contextmanager
    def _explained(self, step: int, state: Any) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with suppress(OSError):
                remove(self.folder / str(step) / STATE.format(jax.process_index()))
            way = remedy(error, self.folder)
            needed = f"it takes {_size(state) / 1e6:.1f} MB" if error.errno in FULL else ""
            what = f"the checkpoint of step {step} could not be written to {self.folder}"
            parts = [f"{what} ({error.strerror or error})", needed, way, self.resume_hint()]
            raise ParaJaxError("; ".join(filter(None, parts))) from error

    def resume_hint(self) -> str:
        """What --resume would continue from if the run ended now."""
        if self.newest_complete is None:
            return "no checkpoint exists yet, so --resume starts from the beginning"
        return f"the checkpoint of step {self.newest_complete} is complete, and --resume continues from it"

    @contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Turns file errors in the block into a ParaJaxError that adds `resume_hint`."""
        try:
            yield
        except (ParaJaxError, OSError) as error:
            cause = error.__cause__ if isinstance(error, ParaJaxError) else error
            if not isinstance(cause, OSError):
                raise
            with suppress(ParaJaxError):
                self.wait()
            way = remedy(cause, self.folder) if cause is error else ""
            parts = [str(error), way, "" if self.resume_hint() in str(error) else self.resume_hint()]
            raise ParaJaxError("; ".join(filter(None, parts))) from cause

    def metadata(self, step: int) -> dict[str, Any]:
        return dict(_manifest(self.folder / str(step), 0)["beside"])

    def files(self, step: int, under: str) -> dict[str, Path]:
        """The saved files of a state that still exist, by relative path: the file `under`, or all in that folder."""
        folder = self.folder / str(step)
        main = [] if step in self._incomplete else _manifests(folder)[:1]
        names = [name for manifest in main for name in manifest["files"]]
        wanted = {name: folder / name for name in names if name == under or name.startswith(f"{under}/")}
        return {name: path for name, path in wanted.items() if path.is_file()}

    def restore(self, like: Any, step: int) -> Any:
        """A saved state with the structure and shardings of `like`.

        If the first axis of an array differs in length from `like`, the array keeps its saved shape and is replicated.
        """
        saved = Saved(self.folder / str(step))

        def load(name: str, x: jax.Array) -> Any:
            shape, sharding = saved.shape(name), x.sharding
            if not isinstance(sharding, NamedSharding):
                # Uncommitted: JAX would compile all programs again for arrays that are committed to a device.
                return jax.device_put(saved.read(name, tuple(slice(0, n) for n in shape)))
            sharding = sharding if shape == x.shape else NamedSharding(sharding.mesh, P())
            return jax.make_array_from_callback(shape, sharding, lambda index: saved.read(name, index or ()))

        return jax.tree.unflatten(jax.tree.structure(like), [load(name, x) for name, x in _named(like).items()])


class Saved:
    """The arrays of a complete checkpoint. Only the requested parts are read."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        self._arrays: dict[str, dict[str, Any]] = {}
        self._parts: dict[str, list[tuple[Any, str, list[int]]]] = {}
        for process, manifest in enumerate(_manifests(folder)):
            file = safe_open(folder / STATE.format(process), framework="numpy")
            for name, array in manifest["arrays"].items():
                self._arrays[name] = array
                self._parts.setdefault(name, []).extend((file, key, start) for key, start in array["parts"].items())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._arrays[name]["shape"])

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        bounds = [s.indices(n)[:2] for s, n in zip(index, self.shape(name), strict=True)]
        found = np.empty([stop - start for start, stop in bounds], self._arrays[name]["dtype"])
        for file, key, at in self._parts[name]:
            size = file.get_slice(key).get_shape()
            low = [max(start, begin) for (start, _), begin in zip(bounds, at, strict=True)]
            high = [min(stop, begin + n) for (_, stop), begin, n in zip(bounds, at, size, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                here = [slice(a - start, b - start) for a, b, (start, _) in zip(low, high, bounds, strict=True)]
                there = [slice(a - begin, b - begin) for a, b, begin in zip(low, high, at, strict=True)]
                found[tuple(here)] = file.get_tensor(key)[tuple(there)]
        return found


def steps_in(folder: Path) -> list[int]:
    """The steps of all checkpoints in a folder, complete or not, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def read_run(folder: Path) -> dict[str, Any] | None:
    """The description of the run that the checkpoints in a folder belong to; None if there is none."""
    found = (_manifests(folder / str(step)) for step in reversed(steps_in(folder)))
    return next((manifests[0]["beside"].get("run") for manifests in found if manifests), None)


def find_problem(folder: Path) -> str | None:
    """Why a checkpoint is incomplete; None if it is complete."""
    if not (manifests := _manifests(folder)):
        return "some of its files are missing"
    return next(filter(None, (_problem(folder, process) for process in range(len(manifests)))), None)


def _problem(folder: Path, process: int) -> str | None:
    for name, written in _manifest(folder, process)["files"].items():
        try:
            found = read_back(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        if found != Written(*written):
            return f"{name} is not what was written"
    return None


def _manifests(folder: Path) -> list[dict[str, Any]]:
    """The manifests of all processes; [] if one is missing."""
    try:
        return [_manifest(folder, process) for process in range(_manifest(folder, 0)["processes"])]
    except (FileNotFoundError, ValueError):  # missing, or half written
        return []


def _manifest(folder: Path, process: int) -> dict[str, Any]:
    return json.loads((folder / MANIFEST.format(process)).read_bytes())


def restore_files(files: Mapping[str, Path], out: Path) -> None:
    """Restores the folders OUT/NAME to `files`, {"best/NAME/FILE": path}, where they differ."""
    folders: dict[str, list[Path]] = {}
    for name, path in files.items():
        folders.setdefault(name.split("/")[1], []).append(path)
    for name, paths in folders.items():
        targets = [out / name / path.name for path in paths]
        if all(a.is_file() and read_back(a) == read_back(b) for a, b in zip(targets, paths, strict=True)):
            continue
        remove(out / name)
        with new_folder(out / name, "") as partial:
            for path in paths:
                copy(path, partial / path.name)


def _parts(state: Mapping[str, jax.Array]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Each array's shape, dtype and the shards that this process writes, and these shards by key."""
    arrays, tensors = {}, {}
    for name, x in state.items():
        parts = {}
        for shard in x.addressable_shards:
            if shard.replica_id == 0:
                start = [s.indices(n)[0] for s, n in zip(shard.index, x.shape, strict=True)]
                key = "@".join([name, *map(str, start)])
                parts[key], tensors[key] = start, np.asarray(shard.data)
        arrays[name] = {"shape": x.shape, "dtype": x.dtype.name, "parts": parts}
    return arrays, tensors


def _size(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path, so that a checkpoint does not depend on Python classes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="-"): x for path, x in leaves}
