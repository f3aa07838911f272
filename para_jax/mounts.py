"""File systems that are full, gone or not mounted, such as Google Drive in a notebook: what to say, and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from para_jax.errors import ParaJaxError

# What a file system says of what it does not have.
MISSING = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GONE = (errno.ENOTCONN, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT)
# Where Colab's notebooks mount Google Drive.
DRIVES = ("/content/drive", "/content/gdrive")
RESUME = "run again with --resume"


def drive_of(path: str | Path) -> str | None:
    """The mount point of the Google Drive that a path is on, as Colab names it; None for other paths.

    >>> drive_of("/content/drive/MyDrive/runs"), drive_of("/content/runs")
    ('/content/drive', None)
    """
    place = Path(os.path.realpath(path))
    return next((top for top in DRIVES if place.is_relative_to(top)), None)


def check_mounted(path: str | Path) -> None:
    """Raises ParaJaxError for a path on a Google Drive that is not mounted, where a write would be lost."""
    top = drive_of(path)
    if top is not None and not os.path.ismount(top):
        raise ParaJaxError(f"{path} is on Google Drive, which is not mounted; {_mounting(top)} and run again")


def _mounting(top: str) -> str:
    return f"run `from google.colab import drive; drive.mount({top!r}, force_remount=True)` in the notebook"


def way_out(error: OSError, path: str | Path) -> str:
    """What to do about an error of a file system, if it is one that somebody can mend."""
    top = drive_of(path)
    if error.errno in FULL:
        return "make room" if top is None else "make room on Google Drive (its trash counts, so empty it too)"
    if error.errno in GONE:
        return "see that its file system is mounted" if top is None else _mounting(top)
    return ""


@contextmanager
def naming(path: str | Path, safe: str = "", again: str = "run again") -> Iterator[None]:
    """Raises ParaJaxError for what goes wrong with a file in the block.

    It names the file, and says what is `safe`, what to do, and how to go on `again`.
    """
    try:
        yield
    except OSError as error:
        way = way_out(error, path)
        parts = (f"{path} could not be written: {error.strerror or error}", safe, way and f"{way} and {again}")
        raise ParaJaxError("; ".join(filter(None, parts))) from error


def check_creatable(path: Path) -> None:
    """Raises OSError unless a file can be made where `path` is to be; folders above it may be missing."""
    import tempfile

    above = next(folder for folder in path.parents if folder.exists())
    with tempfile.TemporaryFile(dir=above):
        pass
