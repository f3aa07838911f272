"""Errors of file systems that are full, gone or not mounted, such as Google Drive in a notebook, and their remedies."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from para_jax.errors import ParaJaxError

# Errors of a file system for features that it does not have.
MISSING = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GONE = (errno.ENOTCONN, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT)
# Where Colab's notebooks mount Google Drive.
DRIVES = ("/content/drive", "/content/gdrive")
RESUME = "run again with --resume"


def drive_of(path: str | Path) -> str | None:
    """The mount point in Colab of the Google Drive that a path is on; None for other paths.

    >>> drive_of("/content/drive/MyDrive/runs"), drive_of("/content/runs")
    ('/content/drive', None)
    """
    place = Path(os.path.realpath(path))
    return next((top for top in DRIVES if place.is_relative_to(top)), None)


def check_mounted(path: str | Path) -> None:
    """Raises ParaJaxError for a path on a Google Drive that is not mounted, because writes would be lost."""
    top = drive_of(path)
    if top is not None and not os.path.ismount(top):
        raise ParaJaxError(f"{path} is on Google Drive, which is not mounted; {_mounting(top)} and run again")


def _mounting(top: str) -> str:
    return f"run `from google.colab import drive; drive.mount({top!r}, force_remount=True)` in the notebook"


def remedy(error: OSError, path: str | Path) -> str:
    """What to do about an error of a file system, if the user can fix it; else ""."""
    top = drive_of(path)
    if error.errno in FULL:
        return "make room" if top is None else "make room on Google Drive (its trash counts, so empty it too)"
    if error.errno in GONE:
        return "check that its file system is mounted" if top is None else _mounting(top)
    return ""


@contextmanager
def explain_os_errors(path: str | Path, safe: str = "", again: str = "run again") -> Iterator[None]:
    """Turns an OSError in the block into a ParaJaxError.

    The message has the path, what is `safe`, the remedy, and how to try `again`.
    """
    try:
        yield
    except OSError as error:
        way = remedy(error, path)
        parts = (f"{path} could not be written: {error.strerror or error}", safe, way and f"{way} and {again}")
        raise ParaJaxError("; ".join(filter(None, parts))) from error


def check_creatable(path: Path) -> None:
    """Raises OSError if `path` cannot be created. Parent folders may be missing."""
    import tempfile

    above = next(folder for folder in path.parents if folder.exists())
    with tempfile.TemporaryFile(dir=above):
        pass
