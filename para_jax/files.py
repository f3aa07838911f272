"""All that para_jax writes: files that appear whole or not at all, files that grow, and folders.

OUT may be on a network or on a mounted Google Drive. There locks, links and fsync may fail, a name may be found only a
while after it was given, and a kill in the middle of a rename may lose the file. So what a file system cannot do is
done another way or without, every name is waited for, and what cannot be made again is never in a renamed file alone
(`training.checkpoints`, `cli.answers`).
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from para_jax.errors import ParaJaxError
from para_jax.mounts import MISSING, check_mounted, naming

PATIENCE = 60.0  # seconds until a name has to be there
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


# Files


class Written(NamedTuple):
    """What a file holds."""

    size: int
    sha256: str


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> Written:
    """Writes a file under its own name, for readers who know when it is whole. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        sync(file)
    appear(path, size)
    return Written(size, digest.hexdigest())


def read_back(path: Path) -> Written:
    """What is in a file. Raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return Written(file.tell(), digest.hexdigest())


def sync(file: IO[Any]) -> None:
    """Puts what was written to the disk, where the file system knows how. Raises OSError."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in MISSING:
            raise


def appear(path: Path, size: int | None = None) -> None:
    """Waits until a file or folder that was closed or renamed can be found, a file with all its bytes.

    Raises OSError if it does not come.
    """
    began, pause = time.monotonic(), 0.001
    while True:
        with suppress(FileNotFoundError):
            if size in (None, path.stat().st_size):
                return
        if time.monotonic() - began > PATIENCE:
            raise OSError(errno.ETIMEDOUT, f"it was written, and is not there after {PATIENCE:.0f} seconds")
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


@contextmanager
def replacing(path: str | Path, safe: str | None = None, again: str = "run again") -> Iterator[IO[bytes]]:
    """A file to fill that takes the name `path`, in one step, when the block ends without an error.

    Folders above it are made. Raises ParaJaxError as `naming` does if it cannot be written; what was there stays as it
    was, and nothing is left beside it.
    """
    check_mounted(path)
    path = Path(path).resolve()
    fresh = path.with_name(f".{path.name}-new")
    safe = safe or ("what was there stays as it was" if path.exists() else "nothing was written")
    with naming(path, safe, again):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with fresh.open("wb") as file:
                yield file
                sync(file)
                size = os.fstat(file.fileno()).st_size
            appear(fresh, size)
            os.replace(fresh, path)
            appear(path, size)
        except BaseException:
            with suppress(OSError):
                fresh.unlink()
            raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a text in UTF-8, as `replacing` does.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_text(Path(folder, "a.txt"), "one line\\n")
    ...     Path(folder, "a.txt").read_text()
    'one line\\n'
    """
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as JSON, as `replacing` does."""
    write_text(path, as_json(value))


def as_json(value: Any, indent: int = 1) -> str:
    return json.dumps(value, indent=indent) + "\n"


def json_line(value: Any) -> str:
    r"""A value as a line of JSON: as it reads, but for lone surrogates, which UTF-8 cannot write.

    >>> json_line({"text": "café"}), json_line({"text": "\ud800"})
    ('{"text": "café"}\n', '{"text": "\\ud800"}\n')
    """
    line = json.dumps(value, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(value) + "\n"
    return line


def changes(before: Any, now: Any, at: str = "") -> Iterator[str]:
    """What differs between two values as JSON, by its path.

    >>> list(changes({"a": {"b": 1}}, {"a": {"b": 2}}))
    ['a.b was 1 and is 2']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from changes(before.get(key), now.get(key), f"{at}.{key}" if at else key)
    elif before != now:
        yield f"{at} was {str(before)[:40]} and is {str(now)[:40]}"


def safetensors(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The parts of a safetensors file, which is never in memory as a whole: of arrays, or what becomes one in its turn.

    >>> import numpy as np
    >>> from safetensors.numpy import load
    >>> load(b"".join(safetensors({"x": np.arange(3, dtype=np.int32)}, {"format": "pt"})))
    {'x': array([0, 1, 2], dtype=int32)}
    """
    import numpy as np

    # Wide numbers first: then each tensor begins at a multiple of its numbers' size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        x = tensors[name]
        header[name] = {"dtype": DTYPES[x.dtype.name], "shape": x.shape, "data_offsets": (at, at := at + x.nbytes)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data


class Growing:
    """A file that is appended to and can be read meanwhile. It is not buffered: what a full disk refuses is not kept.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     with Growing(Path(folder, "a")) as file:
    ...         file.write(b"more")
    ...     Path(folder, "a").read_bytes()
    b'more'
    """

    def __init__(self, path: Path, keep: int = 0):
        """Keeps the first bytes of a file that is there. Raises OSError, as all that follows."""
        self.path = path
        self._file: IO[bytes] = path.open("ab", buffering=0)
        try:
            self._file.truncate(keep)
        except OSError:
            self._file.close()
            raise

    def write(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]

    def settle(self) -> None:
        """Closes the file and goes on: Google Drive uploads a file when it is closed."""
        self.close()
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        if not self._file.closed:
            try:
                sync(self._file)
                size = os.fstat(self._file.fileno()).st_size
            finally:
                self._file.close()
            appear(self.path, size)

    def __enter__(self) -> Growing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            with suppress(OSError):
                self._file.close()


# Folders


@contextmanager
def new_folder(folder: str | Path, marker: str, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that takes its name, in one step, when the block ends without an error.

    `marker` is a file that every folder of this kind holds. With `overwrite`, a folder that has it is replaced; one
    without it is something else and is left alone.

    Raises ParaJaxError if the folder may not be written, or cannot be; what was there stays as it was.
    """
    check_mounted(folder)
    folder = Path(folder).resolve()
    if folder.exists() and not overwrite:
        raise ParaJaxError(f"{folder} exists; choose another folder, or pass overwrite")
    if folder.exists() and not (folder / marker).is_file():
        raise ParaJaxError(f"{folder} exists and holds no {marker}; remove it yourself or choose another folder")
    partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    with naming(folder, "what was there stays as it was" if folder.exists() else "nothing was written"):
        try:
            partial.mkdir(parents=True)
            yield partial
            for path in partial.rglob("*"):
                if path.is_file():
                    _finish(path, partial.stat().st_mode & 0o666)
        except BaseException:
            remove(partial)
            raise
        _take_place(partial, folder)


def _finish(path: Path, mode: int) -> None:
    """Puts a file's contents on the disk before the folder gets its name, and lets others read it as they may."""
    with path.open("rb+") as file:
        sync(file)
    try:
        path.chmod(mode)  # some libraries write files that only their owner can read
    except OSError as error:
        if error.errno not in MISSING:
            raise


def _take_place(new: Path, folder: Path) -> None:
    """Gives a folder its name, in place of the one that has it: on Linux in one step, if the file system can do it."""
    here, exchange, had = -100, 2, folder.exists()  # AT_FDCWD and RENAME_EXCHANGE
    if sys.platform == "linux" and had:
        rename = getattr(ctypes.CDLL(None), "renameat2", None)
        if rename and rename(here, os.fsencode(new), here, os.fsencode(folder), exchange) == 0:
            remove(new)
            return
    aside = new.with_name(f"{new.name}-previous")
    try:
        if had:
            # A kill from here on leaves the old one or the new one whole under its hidden name (`left_of`).
            os.replace(folder, aside)
            appear(aside)
        os.replace(new, folder)
        appear(folder)
    except OSError as error:
        if had and not _put_back(aside, folder):
            where = f"what was there or the new one is whole in {aside} or {new}; rename it"
            raise ParaJaxError(f"{folder} could not be written: {error.strerror or error}; {where}") from error
        remove(new)
        raise
    remove(aside)


def _put_back(aside: Path, folder: Path) -> bool:
    """Whether the folder has its name, and what it held before."""
    with suppress(OSError):
        if not folder.exists():
            os.replace(aside, folder)
            appear(folder)
        return True
    return False


def left_of(folder: Path) -> list[Path]:
    """What processes that were killed while they wrote a folder have left beside it."""
    name = re.compile(rf"\.{re.escape(folder.name)}-[0-9a-f]{{8}}(-previous)?")
    return [path for path in folder.parent.iterdir() if name.fullmatch(path.name)] if folder.parent.is_dir() else []


def copy(source: Path, target: Path) -> None:
    """Copies a file, or a folder with all in it, to where nothing is. Raises OSError."""
    if source.is_dir():
        target.mkdir()
        for path in source.iterdir():
            copy(path, target / path.name)
        return
    with source.open("rb") as file:
        write_file(target, iter(lambda: file.read(1 << 20), b""))


def remove(path: Path) -> None:
    """Removes a file, or a folder with all in it, as far as that goes."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
