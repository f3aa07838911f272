"""The next step's batches, made in a thread while the device has the step before."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Key = TypeVar("Key")
Made = TypeVar("Made")


class Ahead(Generic[Key, Made]):
    """Makes one thing ahead. What comes of a key depends on the key only, so a wrong guess costs time and no more.

    >>> with Ahead(lambda n: n * n) as ahead:
    ...     ahead.begin(3)
    ...     ahead.take(3), ahead.take(4)
    (9, 16)
    """

    def __init__(self, make: Callable[[Key], Made]):
        self._make = make
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._begun: tuple[Key, Future[Made]] | None = None

    def begin(self, key: Key | None) -> None:
        """Begins to make what will probably be taken next; nothing, if None."""
        if key is not None:
            self._begun = key, self._thread.submit(self._make, key)

    def take(self, key: Key) -> Made:
        """What comes of this key: made ahead, if it was guessed."""
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] == key:
            return begun[1].result()
        return self._make(key)

    def __enter__(self) -> Ahead[Key, Made]:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
