"""Prefetches the next step's batches in a thread while the device runs the current step."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Prefetcher(Generic[Key, Value]):
    """Computes `make(key)` for one key in advance. A wrong guess of the next key only costs time.

    >>> with Prefetcher(lambda n: n * n) as prefetcher:
    ...     prefetcher.start(3)
    ...     prefetcher.get(3), prefetcher.get(4)
    (9, 16)
    """

    def __init__(self, make: Callable[[Key], Value]):
        self._make = make
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._pending: tuple[Key, Future[Value]] | None = None

    def start(self, key: Key | None) -> None:
        """Starts to compute the value of the key that is probably needed next. None does nothing."""
        if key is not None:
            self._pending = key, self._thread.submit(self._make, key)

    def get(self, key: Key) -> Value:
        """The value of this key: the prefetched one if the key was guessed right."""
        pending, self._pending = self._pending, None
        if pending is not None and pending[0] == key:
            return pending[1].result()
        return self._make(key)

    def __enter__(self) -> Prefetcher[Key, Value]:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
