"""Locks: one process at a time writes a file or a folder."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from para_jax.errors import ParaJaxError
from para_jax.mounts import MISSING

NO_LOCKS = (*MISSING, errno.ENOLCK, errno.EBADF)


class Locked(io.FileIO):
    """A file that is open for appending, unbuffered, and locked against other processes.

    The lock is advisory, and is released when the process ends for any reason. If the file system has no locks, a file
    in this machine's temporary folder is locked instead, and a line is printed.

    Raises BlockingIOError if another process has locked the file.
    """

    stand_in: io.FileIO | None = None

    def __init__(self, path: Path):
        super().__init__(path, "a+")
        try:
            if not _locks(self):
                self.stand_in = _stand_in(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        try:
            super().close()
        finally:
            if self.stand_in is not None:
                self.stand_in.close()


def _locks(file: io.FileIO) -> bool:
    """Locks a file. Returns False if the file system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _stand_in(path: Path) -> io.FileIO:
    """Locks a temporary file that stands in for `path`."""
    import tempfile

    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    file = io.FileIO(os.path.join(tempfile.gettempdir(), f"para-jax-{os.getuid()}-{name}.lock"), "a+")
    try:
        scope = "processes on other machines" if _locks(file) else "other processes"
    except BaseException:
        file.close()
        raise
    print(f"para-jax: {path.parent} is on a file system without locks; {scope} are not locked out", file=sys.stderr)
    return file


def open_locked(path: Path) -> Locked:
    """Opens and locks a file (`Locked`), and creates it if it does not exist."""
    while True:
        file = Locked(path)
        # Another process may have removed or renamed it between opening and locking.
        if file.stand_in or (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
            return file
        file.close()


class Lock:
    """A lock file, which contains the process that holds it (`open_locked`).

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     lock = Lock(Path(folder, ".lock"), "the folder")
    ...     lock.release()
    ...     list(Path(folder).iterdir())
    []
    """

    def __init__(self, path: Path, what: str):
        """Raises ParaJaxError if another process holds the lock; `what` is what that process writes."""
        try:
            self._file = open_locked(path)
        except BlockingIOError:
            who = path.read_text(errors="replace").strip() if path.exists() else ""
            raise ParaJaxError(f"another process{f' ({who})' if who else ''} is writing {what}") from None
        self._path = path
        with suppress(OSError):  # a full disk
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())

    def release(self) -> None:
        with suppress(OSError):
            self._path.unlink()
        with suppress(OSError):
            self._file.close()
