"""Writes files and folders: atomic files, append-only files, and atomic folders.

OUT may be on a network file system or on a mounted Google Drive. There locks, links and fsync may fail, a file may
become visible only some time after it is written, and a kill during a rename may lose the file. So missing features
have fallbacks, every write waits until the file is visible, and data that cannot be recomputed is never only in a
renamed file (`training.checkpoints`, `cli.answers`).
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
from para_jax.mounts import MISSING, check_mounted, explain_os_errors

PATIENCE = 60.0  # seconds to wait until a file is visible
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


# Files


class Written(NamedTuple):
    size: int
    sha256: str


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> Written:
    """Writes a file, not atomically: readers must check that it is complete. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        sync(file)
    wait_until_visible(path, size)
    return Written(size, digest.hexdigest())


def read_back(path: Path) -> Written:
    """The size and hash of an existing file. Raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return Written(file.tell(), digest.hexdigest())


def sync(file: IO[Any]) -> None:
    """Flushes a file to the disk, if the file system supports fsync. Raises OSError."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in MISSING:
            raise


def wait_until_visible(path: Path, size: int | None = None) -> None:
    """Waits until a closed or renamed file or folder is visible, a file with its full size.

    Raises OSError after `PATIENCE` seconds.
    """
    start, pause = time.monotonic(), 0.001
    while True:
        with suppress(FileNotFoundError):
            if size in (None, path.stat().st_size):
                return
        if time.monotonic() - start > PATIENCE:
            raise OSError(errno.ETIMEDOUT, f"it was written, and is not visible after {PATIENCE:.0f} seconds")
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


@contextmanager
def replacing(path: str | Path, safe: str | None = None, again: str = "run again") -> Iterator[IO[bytes]]:
    """A temporary file that replaces `path` atomically when the block ends without an error.

    Parent folders are created. Raises ParaJaxError as `explain_os_errors` does; then an existing file is unchanged, and
    the temporary file is removed.
    """
    check_mounted(path)
    path = Path(path).resolve()
    fresh = path.with_name(f".{path.name}-new")
    safe = safe or ("the existing file is unchanged" if path.exists() else "nothing was written")
    with explain_os_errors(path, safe, again):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with fresh.open("wb") as file:
                yield file
                sync(file)
                size = os.fstat(file.fileno()).st_size
            wait_until_visible(fresh, size)
            os.replace(fresh, path)
            wait_until_visible(path, size)
        except BaseException:
            with suppress(OSError):
                fresh.unlink()
            raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a text in UTF-8, atomically.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_text(Path(folder, "a.txt"), "one line\\n")
    ...     Path(folder, "a.txt").read_text()
    'one line\\n'
    """
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, as_json(value))


def as_json(value: Any, indent: int = 1) -> str:
    return json.dumps(value, indent=indent) + "\n"


def json_line(value: Any) -> str:
    r"""A value as a line of JSON. Only texts with lone surrogates are escaped, because UTF-8 cannot encode them.

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
    """The differences between two JSON values, by path.

    >>> list(changes({"a": {"b": 1}}, {"a": {"b": 2}}))
    ['a.b was 1 and is 2']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from changes(before.get(key), now.get(key), f"{at}.{key}" if at else key)
    elif before != now:
        yield f"{at} was {str(before)[:40]} and is {str(now)[:40]}"


def safetensors(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The content of a safetensors file in parts, so that it is never in memory at once.

    Tensors are NumPy arrays, or objects that `np.asarray` reads when it is their turn.

    >>> import numpy as np
    >>> from safetensors.numpy import load
    >>> load(b"".join(safetensors({"x": np.arange(3, dtype=np.int32)}, {"format": "pt"})))
    {'x': array([0, 1, 2], dtype=int32)}
    """
    import numpy as np

    # Sorted by item size, so that each tensor is aligned.
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


class AppendFile:
    """An append-only file that can be read meanwhile. It is unbuffered: data that a full disk refuses is not retained.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     with AppendFile(Path(folder, "a")) as file:
    ...         file.write(b"more")
    ...     Path(folder, "a").read_bytes()
    b'more'
    """

    def __init__(self, path: Path, keep: int = 0):
        """Truncates an existing file to `keep` bytes. All methods raise OSError."""
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

    def reopen(self) -> None:
        """Closes and reopens the file, because Google Drive uploads a file when it is closed."""
        self.close()
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        if not self._file.closed:
            try:
                sync(self._file)
                size = os.fstat(self._file.fileno()).st_size
            finally:
                self._file.close()
            wait_until_visible(self.path, size)

    def __enter__(self) -> AppendFile:
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
    """A temporary folder that replaces `folder` atomically when the block ends without an error.

    `marker` is a file that every folder of this kind has. With `overwrite`, an existing folder is replaced if it has
    this file; otherwise it is something else and is not touched.

    Raises ParaJaxError if the folder cannot be written; then an existing folder is unchanged.
    """
    check_mounted(folder)
    folder = Path(folder).resolve()
    if folder.exists() and not overwrite:
        raise ParaJaxError(f"{folder} exists; choose another folder, or pass overwrite")
    if folder.exists() and not (folder / marker).is_file():
        raise ParaJaxError(f"{folder} exists and holds no {marker}; remove it yourself or choose another folder")
    partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    with explain_os_errors(folder, "the existing folder is unchanged" if folder.exists() else "nothing was written"):
        try:
            partial.mkdir(parents=True)
            yield partial
            for path in filter(Path.is_file, partial.rglob("*")):
                with path.open("rb+") as file:
                    sync(file)
                try:
                    path.chmod(partial.stat().st_mode & 0o666)  # some libraries write files only for the owner
                except OSError as error:
                    if error.errno not in MISSING:
                        raise
        except BaseException:
            remove(partial)
            raise
        _take_place(partial, folder)


def _take_place(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`, and removes the old folder: atomically on Linux, if the file system supports it."""
    cwd, exchange, existed = -100, 2, folder.exists()  # AT_FDCWD and RENAME_EXCHANGE
    if sys.platform == "linux" and existed:
        rename = getattr(ctypes.CDLL(None), "renameat2", None)
        if rename and rename(cwd, os.fsencode(new), cwd, os.fsencode(folder), exchange) == 0:
            remove(new)
            return
    previous = new.with_name(f"{new.name}-previous")
    try:
        if existed:
            # After a kill from here on, the old or the new folder is complete under its hidden name (`left_of`).
            os.replace(folder, previous)
            wait_until_visible(previous)
        os.replace(new, folder)
        wait_until_visible(folder)
    except OSError as error:
        if existed and not _restore(previous, folder):
            where = f"the old or the new folder is complete in {previous} or {new}; rename it"
            raise ParaJaxError(f"{folder} could not be written: {error.strerror or error}; {where}") from error
        remove(new)
        raise
    remove(previous)


def _restore(previous: Path, folder: Path) -> bool:
    """Renames a folder back. Returns whether it has its old name and content again."""
    with suppress(OSError):
        if not folder.exists():
            os.replace(previous, folder)
            wait_until_visible(folder)
        return True
    return False


def left_of(folder: Path) -> list[Path]:
    """Hidden folders that killed processes left behind while they wrote a folder."""
    name = re.compile(rf"\.{re.escape(folder.name)}-[0-9a-f]{{8}}(-previous)?")
    return [path for path in folder.parent.iterdir() if name.fullmatch(path.name)] if folder.parent.is_dir() else []


def copy(source: Path, target: Path) -> None:
    """Copies a file, or a folder recursively, to a path that does not exist. Raises OSError."""
    if source.is_dir():
        target.mkdir()
        for path in source.iterdir():
            copy(path, target / path.name)
        return
    with source.open("rb") as file:
        write_file(target, iter(lambda: file.read(1 << 20), b""))


def remove(path: Path) -> None:
    """Removes a file, or a folder recursively; ignores errors."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
