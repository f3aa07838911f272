"""Training states on disk, exact, and whole or not counted.

A checkpoint is a folder. Each process writes one safetensors file, the parts of arrays that lie on its devices, and
then a manifest, which has the size and SHA-256 of all files that the process wrote. A checkpoint counts when the
manifests of all processes are there and every file is what its manifest says; else the one before it is taken. Nothing
is renamed, so this holds on file systems where a rename is not one step, and files arrive late, in any order or never.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.distributed import is_main_process
from para_jax.errors import ParaJaxError
from para_jax.files import Written, as_json, copy, new_folder, read_back, remove, safetensors, write_file
from para_jax.mounts import FULL, way_out
from para_jax.training.step import copied

EARLIER = "_CHECKPOINT_METADATA"
MANIFEST, STATE = "process-{}.json", "process-{}.safetensors"


class Checkpoints:
    """The checkpoints of one run; the newest `keep` are kept, two at least: until a newer one is there, on a slow file
    system too, the newest may be lost.

    A save that is cut off, by a kill or a full disk, leaves the previous ones as they were. Writing goes on in the
    background, and what goes wrong there is raised by the next `save`, or at the end.
    """

    def __init__(self, folder: str | Path, keep: int = 2, show: Callable[[str], None] = print):
        self.folder, self.keep, self.show = Path(folder).absolute(), keep, show
        self.safe: int | None = None  # the newest that is whole, of those that were written or looked at here
        self._broken = set[int]()
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: tuple[int, Future[None]] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
            else:
                with suppress(ParaJaxError):  # what is raised already is the first that went wrong
                    self.wait()
        finally:
            self._thread.shutdown()

    def newest(self) -> int | None:
        """The step of the newest checkpoint that is whole. Says which are not, and why."""
        for step in reversed(steps_in(self.folder)):
            if (self.folder / str(step) / EARLIER).exists():
                raise ParaJaxError(
                    f"{self.folder} holds checkpoints of an earlier version of para_jax; finish the run with that "
                    "version, or pass --overwrite"
                )
            problem = problem_of(self.folder / str(step))
            if problem is None:
                self.safe = step
                break
            self.show(f"the checkpoint of step {step} is not whole ({problem}), so it does not count")
            self._broken.add(step)
        return self.safe

    def save(
        self, step: int, state: Any, beside: dict[str, Any] | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Begins to write the state after `step` steps.

        The arrays are copied first, so that the caller may donate them. Raises ParaJaxError if the disk is full or not
        writable.

        Args:
          beside: what is to be kept beside it, as JSON; of the first process.
          files: contents by name, which may have folders in it; of the first process.
        """
        self.wait()
        if self.safe == step:
            return
        with self._explained(step, state):
            # Looked at first: where several processes write, one whose disk is full would have the others wait for it.
            self.folder.mkdir(parents=True, exist_ok=True)
            disk = shutil.disk_usage(self.folder)
            if disk.total > 0 and disk.free < _size(state):  # not every network's file system says
                raise OSError(FULL[0], f"{disk.free / 1e6:.1f} MB are free")
        kept = jax.block_until_ready(_named(copied(state)))
        self._writing = step, self._thread.submit(self._write, step, kept, beside or {}, files or {})

    def wait(self) -> None:
        """Until what `save` began is on disk. Raises ParaJaxError as `save` does."""
        if self._writing is not None:
            (step, future), self._writing = self._writing, None
            future.result()
            self.safe = step

    def _write(
        self, step: int, state: dict[str, jax.Array], beside: dict[str, Any], files: Mapping[str, bytes]
    ) -> None:
        folder, own = self.folder / str(step), jax.process_index()
        with self._explained(step, state):
            folder.mkdir(parents=True, exist_ok=True)
            arrays, tensors = _parts(state)
            written = {STATE.format(own): write_file(folder / STATE.format(own), safetensors(tensors, {}))}
            for name, data in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                written[name] = write_file(folder / name, [data])
            about = {"processes": jax.process_count(), "files": written, "arrays": arrays, "beside": beside}
            write_file(folder / MANIFEST.format(own), [as_json(about).encode()])
            if problem := _problem(folder, own):
                raise OSError(f"it does not read as it was written: {problem}")
        self._broken.discard(step)
        if is_main_process():
            with suppress(OSError):  # the next to look there says it
                self._prune()

    def _prune(self) -> None:
        """Removes what is older than the newest `keep` that are whole."""
        steps = steps_in(self.folder)
        whole = [step for step in steps if step not in self._broken and _manifests(self.folder / str(step))]
        for step in steps:
            if len(whole) >= self.keep and step < whole[-self.keep]:
                folder = self.folder / str(step)
                for path in [*folder.glob(MANIFEST.format("*")), folder]:  # half of it does not count
                    remove(path)

    @contextmanager
    def _explained(self, step: int, state: Any) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with suppress(OSError):
                remove(self.folder / str(step) / STATE.format(jax.process_index()))
            way = way_out(error, self.folder)
            needed = f"it takes {_size(state) / 1e6:.1f} MB" if error.errno in FULL else ""
            what = f"the checkpoint of step {step} could not be written to {self.folder}"
            parts = [f"{what} ({error.strerror or error})", needed, way, self.kept()]
            raise ParaJaxError("; ".join(filter(None, parts))) from error

    def kept(self) -> str:
        """What a run that ends now can go on from."""
        if self.safe is None:
            return "no checkpoint exists yet, so --resume begins again"
        return f"the checkpoint of step {self.safe} is whole, and --resume goes on from it"

    @contextmanager
    def saying(self) -> Iterator[None]:
        """Raises ParaJaxError for what goes wrong with files in the block, and says what is kept."""
        try:
            yield
        except (ParaJaxError, OSError) as error:
            cause = error.__cause__ if isinstance(error, ParaJaxError) else error
            if not isinstance(cause, OSError):
                raise
            with suppress(ParaJaxError):
                self.wait()
            way = way_out(cause, self.folder) if cause is error else ""
            parts = [str(error), way, "" if self.kept() in str(error) else self.kept()]
            raise ParaJaxError("; ".join(filter(None, parts))) from cause

    def beside(self, step: int) -> dict[str, Any]:
        """What was kept beside a state."""
        return dict(_manifest(self.folder / str(step), 0)["beside"])

    def files(self, step: int, under: str) -> dict[str, Path]:
        """The files of this name, or in this folder, that were kept with a state, by name; those that are left."""
        folder = self.folder / str(step)
        names = [name for about in _manifests(folder)[:1] for name in about["files"] if step not in self._broken]
        wanted = {name: folder / name for name in names if name == under or name.startswith(f"{under}/")}
        return {name: path for name, path in wanted.items() if path.is_file()}

    def restore(self, like: Any, step: int) -> Any:
        """A state, as and where `like` is.

        An array that is longer or shorter in its first axis than that of `like` comes back as it was saved, whole on
        every device.
        """
        saved = Saved(self.folder / str(step))

        def of(name: str, x: jax.Array) -> Any:
            shape, where = saved.shape(name), x.sharding
            if not isinstance(where, NamedSharding):
                # Not tied to its device, for which JAX would compile all programs once more.
                return jax.device_put(saved.read(name, tuple(slice(0, n) for n in shape)))
            where = where if shape == x.shape else NamedSharding(where.mesh, P())
            return jax.make_array_from_callback(shape, where, lambda index: saved.read(name, index or ()))

        return jax.tree.unflatten(jax.tree.structure(like), [of(name, x) for name, x in _named(like).items()])


class Saved:
    """The arrays of a checkpoint, which is whole. Of each, only the parts that are asked for are read."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        self._arrays: dict[str, dict[str, Any]] = {}
        self._parts: dict[str, list[tuple[Any, str, list[int]]]] = {}
        for process, about in enumerate(_manifests(folder)):
            file = safe_open(folder / STATE.format(process), framework="numpy")
            for name, of in about["arrays"].items():
                self._arrays[name] = of
                self._parts.setdefault(name, []).extend((file, key, start) for key, start in of["parts"].items())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._arrays[name]["shape"])

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """This part of an array."""
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
    """Those of the checkpoints in a folder, whole or not, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def described(folder: Path) -> dict[str, Any] | None:
    """What run the checkpoints in a folder are of; None where that is not known."""
    found = (_manifests(folder / str(step)) for step in reversed(steps_in(folder)))
    return next((manifests[0]["beside"].get("run") for manifests in found if manifests), None)


def problem_of(folder: Path) -> str | None:
    """Why a checkpoint is not whole; None if it is."""
    if not (manifests := _manifests(folder)):
        return "not all of its files are there"
    return next(filter(None, (_problem(folder, process) for process in range(len(manifests)))), None)


def _problem(folder: Path, process: int) -> str | None:
    for name, of in _manifest(folder, process)["files"].items():
        try:
            found = read_back(folder / name)
        except FileNotFoundError:
            return f"{name} is not there"
        if found != Written(*of):
            return f"{name} is not what was written"
    return None


def _manifests(folder: Path) -> list[dict[str, Any]]:
    """Those of all processes; none, if any is missing."""
    try:
        return [_manifest(folder, process) for process in range(_manifest(folder, 0)["processes"])]
    except (FileNotFoundError, ValueError):  # none, or half of one
        return []


def _manifest(folder: Path, process: int) -> dict[str, Any]:
    return json.loads((folder / MANIFEST.format(process)).read_bytes())


def put_back(files: Mapping[str, Path], out: Path) -> None:
    """Sees that folders are as a checkpoint has them: `files` of {"best/NAME/FILE": ...} are those of OUT/NAME."""
    folders: dict[str, list[Path]] = {}
    for name, path in files.items():
        folders.setdefault(name.split("/")[1], []).append(path)
    for name, paths in folders.items():
        there = [out / name / path.name for path in paths]
        if all(a.is_file() and read_back(a) == read_back(b) for a, b in zip(there, paths, strict=True)):
            continue
        remove(out / name)
        with new_folder(out / name, "") as partial:
            for path in paths:
                copy(path, partial / path.name)


def _parts(state: Mapping[str, jax.Array]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Each array's shape, dtype and parts on this process's devices, and the parts; each part is on one device."""
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
    """Leaves by the path to them, so that a checkpoint does not depend on the classes that made it."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="-"): x for path, x in leaves}
