"""Groups the rows of a call into batches, and makes the arrays of each batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from para_jax.adapters.rows import Tenant
from para_jax.checks import COUNT, Whole
from para_jax.decoding import loop
from para_jax.decoding.stops import StopStrings, stop_strings
from para_jax.errors import ParaJaxError

# Lists of eos tokens are padded to a multiple of this, so that most lists share a program.
EOS_SLOTS = 4


class Kind(NamedTuple):
    """What the rows of a batch share: their tokenizer, eos tokens and stop strings."""

    tokenizer: Any
    eos: tuple[int, ...]
    stops: StopStrings | None = None


def group_kinds(row_kinds: Sequence[Kind], stop: str | Sequence[str], vocab_size: int) -> tuple[np.ndarray, list[Kind]]:
    """The index of each row's kind, and the distinct kinds with their stop strings."""
    indices: dict[tuple[int, tuple[int, ...]], int] = {}
    kinds: list[Kind] = []
    kind_b = []
    for kind in row_kinds:
        # Tokenizers that differ only in their chat templates share a backend, and are the same here.
        backend = getattr(kind.tokenizer, "backend_tokenizer", kind.tokenizer)
        index = indices.setdefault((id(backend), kind.eos), len(kinds))
        if index == len(kinds):
            kinds.append(kind._replace(stops=stop_strings(kind.tokenizer, stop, vocab_size)))
        kind_b.append(index)
    return np.array(kind_b, np.int32), kinds


class Request(NamedTuple):
    """The rows of a call.

    Attributes:
      limit_b: the maximum number of new tokens of each row.
      kind_b, kinds: the index of each row's kind, and the kinds.
    """

    ids: Sequence[np.ndarray]
    limit_b: np.ndarray
    tenants: Sequence[Tenant]
    kind_b: np.ndarray
    kinds: Sequence[Kind]


class Batch(NamedTuple):
    """Rows that run together, and the sizes of their program. Its arrays are NumPy arrays.

    Attributes:
      rows: the indices of the rows.
      full: the same, padded to the batch size by repeating the last row.
      limit_b: the maximum number of new tokens of each row; 0 for a padding row, which is done at once.
      room: the maximum number of new tokens that the program has space for.
    """

    kind: Kind
    rows: np.ndarray
    full: np.ndarray
    limit_b: np.ndarray
    room: int
    prompts: loop.Prompts
    tenants: list[Tenant]

    @classmethod
    def of(cls, request: Request, rows: np.ndarray, size: int, context: int) -> Batch:
        """A batch of these rows of one kind, padded to `size` rows."""
        full = np.pad(rows, (0, size - len(rows)), mode="edge")
        limit_b = np.where(np.arange(size) < len(rows), request.limit_b[full], np.int32(0))
        room = loop.bucket(int(limit_b.max()), context)
        ids = [request.ids[i] for i in full]
        length = loop.bucket(max(map(len, ids)), context)
        tokens_bt: Any = np.stack([np.pad(x, (length - len(x), 0)) for x in ids])
        mask_bt: Any = np.arange(length) >= length - np.array([len(x) for x in ids])[:, None]
        prompts = loop.Prompts(tokens_bt, mask_bt)
        kind = request.kinds[request.kind_b[rows[0]]]
        return cls(kind, rows, full, limit_b, room, prompts, [request.tenants[i] for i in full])

    @property
    def length(self) -> int:
        return self.prompts.tokens_bt.shape[1] + self.room

    def ending(self) -> loop.Ending:
        eos, table = self.kind.eos, None if self.kind.stops is None else self.kind.stops.table_sv
        padding = [-1] * (-len(eos) % EOS_SLOTS if eos else EOS_SLOTS)
        return loop.Ending(jax.device_put(self.limit_b), jax.device_put(np.array([*eos, *padding], np.int32)), table)


class Windows(NamedTuple):
    """Windows of `size` consecutive rows, which are batched separately. The first `skip` rows are left out."""

    rows: int
    size: int
    skip: int

    @classmethod
    def of(cls, rows: int, window: int | None, skip: int) -> Windows:
        """Raises ParaJaxError for numbers out of range, and if `skip` is not a multiple of the window."""
        size = rows if window is None else COUNT.check("window", window)
        skip = Whole(0, rows).check("skip", skip)
        if skip % size and skip < rows:
            raise ParaJaxError(f"skip must be a multiple of the window of {size} rows, not {skip}")
        return cls(rows, size, skip)

    def just_done(self, done: int) -> range | None:
        """The rows of the window that ends after `done` rows; None if no window ends there."""
        if done % self.size and done != self.rows:
            return None
        return range((done - 1) // self.size * self.size, done)


def make_batches(request: Request, size: int, windows: Windows, context: int) -> list[Batch]:
    """All batches of up to `size` rows: window by window, sorted by kind, maximum number of new tokens, and length."""
    window_b = np.arange(len(request.ids)) // windows.size
    order = np.lexsort((np.array([len(x) for x in request.ids]), request.limit_b, request.kind_b, window_b))
    borders = np.flatnonzero(np.diff(request.kind_b[order]) | np.diff(window_b[order])) + 1
    parts = [rows[at : at + size] for rows in np.split(order, borders) for at in range(0, len(rows), size)]
    return [Batch.of(request, rows, size, context) for rows in parts if rows.min() >= windows.skip]
