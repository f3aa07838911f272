"""Files that appear whole or not at all, errors that name the file, and locks that end with their process."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from para_jax.errors import ParaJaxError

RESUME = "make room and run again with --resume"
# What a file system says that has no locks, such as some of those on a network.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


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
    write_text(path, json.dumps(value, indent=1) + "\n")


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


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to fill that takes the name `path`, in one step, when the block ends without an error.

    Folders above it are made. Raises ParaJaxError, which names the path, if it cannot be written; what was there stays
    as it was, and nothing is left beside it.
    """
    path = Path(path).resolve()
    fresh = path.with_name(f".{path.name}-new")
    with naming(path, "what was there stays as it was" if path.exists() else "nothing was written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with fresh.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
        except BaseException:
            with suppress(OSError):
                fresh.unlink()
            raise


@contextmanager
def naming(path: str | Path, then: str) -> Iterator[None]:
    """Raises ParaJaxError for what goes wrong with a file in the block: it names the file, and says what `then` is."""
    try:
        yield
    except OSError as error:
        raise ParaJaxError(f"{path} could not be written: {error.strerror or error}; {then}") from error


def check_creatable(path: Path) -> None:
    """Raises OSError unless a file can be made where `path` is to be; folders above it may be missing."""
    import tempfile

    above = next(folder for folder in path.parents if folder.exists())
    with tempfile.TemporaryFile(dir=above):
        pass


def append(file: IO[bytes], data: bytes) -> None:
    """Writes all of `data` to a file that is not buffered, which may take it in parts."""
    while data:
        data = data[file.write(data) :]


def open_locked(path: Path) -> IO[bytes]:
    """Opens a file to append to, not buffered, and makes it if need be; while it is open, no other process has it so.

    The lock is advisory and ends with its process, however that ends. Where a file system has no locks, nothing is
    locked. Raises BlockingIOError if another process has the file.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return path.open("a+b", buffering=0)
    while True:
        file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return file
            file.close()
            raise
        # Whoever had it before may have removed or renamed it between our opening and locking it.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


class Lock:
    """A file that one process at a time has, and that says which (`open_locked`).

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     lock = Lock(Path(folder, ".lock"), "the folder")
    ...     lock.release()
    ...     list(Path(folder).iterdir())
    []
    """

    def __init__(self, path: Path, what: str):
        """Raises ParaJaxError if another process has it; `what` is what that process writes."""
        try:
            self._file = open_locked(path)
        except BlockingIOError:
            who = path.read_text(errors="replace").strip() if path.exists() else ""
            raise ParaJaxError(f"another process{f' ({who})' if who else ''} is writing {what}") from None
        self._path = path
        with suppress(OSError):  # a full disk
            self._file.truncate(0)
            append(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def release(self) -> None:
        """Gives the lock back and removes its file."""
        with suppress(OSError):
            self._path.unlink()
        self._file.close()
