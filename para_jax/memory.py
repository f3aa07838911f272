"""Keeping freed memory in the process, which a CPU's tuning steps need more than anything else."""

from __future__ import annotations

import ctypes
import sys

# mallopt's names for the options, from glibc's malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Makes malloc keep what is freed instead of giving it back to the system.

    XLA on a CPU asks for a program's temporary memory at every call and frees it afterwards. By default glibc gives
    so large a piece back each time, and the system has to fill it with zeros again, page by page: a fifth of a
    tuning step of the tiny backbone (docs/backbone.md). The command line calls this; a Python program may, before
    JAX computes anything. The process's memory does not shrink any more afterwards, and where several simulated
    devices ask in turns, the holes they leave make it up to three times as large in the first steps.

    Returns whether it was done: only with glibc, on Linux.

    >>> keep_freed_memory() in (True, False)
    True
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # -1 is never: a large step has more than the 2 GiB that a threshold could say.
    options = {ARENA_MAX: 1, MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: 2**26}
    return all(mallopt(option, value) == 1 for option, value in options.items())
