"""Which rows of a call run together, and the arrays of each batch."""

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

# Lists of eos tokens are filled up to a multiple of this, so that most of them fit the same program.
EOS_SLOTS = 4


class Kind(NamedTuple):
    """What some rows have in common: their tokenizer, the tokens that end them, and their stop strings."""

    tokenizer: Any
    eos: tuple[int, ...]
    stops: StopStrings | None = None


def kinds_of(of_rows: Sequence[Kind], stop: str | Sequence[str], vocab_size: int) -> tuple[np.ndarray, list[Kind]]:
    """The number of each row's kind, and the kinds with their stop strings."""
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    kinds: list[Kind] = []
    kind_b = []
    for kind in of_rows:
        # Chat templates play no part: copies with other ones share the backend.
        backend = getattr(kind.tokenizer, "backend_tokenizer", kind.tokenizer)
        number = numbers.setdefault((id(backend), kind.eos), len(kinds))
        if number == len(kinds):
            kinds.append(kind._replace(stops=stop_strings(kind.tokenizer, stop, vocab_size)))
        kind_b.append(number)
    return np.array(kind_b, np.int32), kinds


class Asked(NamedTuple):
    """What every row of a call asks for.

    Attributes:
      ids: its prompt.
      limit_b: the most new tokens.
      tenants: its tenant, or none.
      kind_b, kinds: the number of its kind, and the kinds.
    """

    ids: Sequence[np.ndarray]
    limit_b: np.ndarray
    tenants: Sequence[Tenant]
    kind_b: np.ndarray
    kinds: Sequence[Kind]


class Batch(NamedTuple):
    """Rows that run together, and the sizes of their program. Its arrays are NumPy's.

    Attributes:
      rows: which they are.
      full: the same, with the last one repeated up to the size of a batch.
      limit_b: the most new tokens of each; zero for a repeated row, which is done at once.
      room: the most new tokens that the program has room for.
    """

    kind: Kind
    rows: np.ndarray
    full: np.ndarray
    limit_b: np.ndarray
    room: int
    prompts: loop.Prompts
    tenants: list[Tenant]

    @classmethod
    def of(cls, asked: Asked, rows: np.ndarray, size: int, context: int) -> Batch:
        """These rows of one kind, in a program for `size` rows."""
        full = np.pad(rows, (0, size - len(rows)), mode="edge")
        limit_b = np.where(np.arange(size) < len(rows), asked.limit_b[full], np.int32(0))
        room = loop.bucket(int(limit_b.max()), context)
        prompts = _left_padded([asked.ids[i] for i in full], context)
        kind = asked.kinds[asked.kind_b[rows[0]]]
        return cls(kind, rows, full, limit_b, room, prompts, [asked.tenants[i] for i in full])

    @property
    def length(self) -> int:
        """Prompt and new tokens, for which the cache has room."""
        return self.prompts.tokens_bt.shape[1] + self.room

    def ending(self) -> loop.Ending:
        """When its rows end, on the device."""
        table = None if self.kind.stops is None else self.kind.stops.table_sv
        return loop.Ending(jax.device_put(self.limit_b), _eos_slots(self.kind.eos), table)


class Windows(NamedTuple):
    """Rows that follow each other are batched together, `size` at a time; the first `skip` rows are left out."""

    rows: int
    size: int
    skip: int

    @classmethod
    def of(cls, rows: int, window: int | None, skip: int) -> Windows:
        """Raises ParaJaxError for numbers out of range, and if what is skipped is no number of whole windows."""
        size = rows if window is None else COUNT.check("window", window)
        skip = Whole(0, rows).check("skip", skip)
        if skip % size and skip < rows:
            raise ParaJaxError(f"skip must be a number of whole windows, each of {size} rows, not {skip}")
        return cls(rows, size, skip)

    def just_done(self, done: int) -> range | None:
        """The rows of the window that ends after so many rows, if one does."""
        if done % self.size and done != self.rows:
            return None
        return range((done - 1) // self.size * self.size, done)


def make_batches(asked: Asked, size: int, windows: Windows, context: int) -> list[Batch]:
    """All batches of up to `size` rows: window after window, in each by kind, the most new tokens, and length."""
    window_b = np.arange(len(asked.ids)) // windows.size
    order = np.lexsort((np.array([len(x) for x in asked.ids]), asked.limit_b, asked.kind_b, window_b))
    borders = np.flatnonzero(np.diff(asked.kind_b[order]) | np.diff(window_b[order])) + 1
    parts = [rows[at : at + size] for rows in np.split(order, borders) for at in range(0, len(rows), size)]
    return [Batch.of(asked, rows, size, context) for rows in parts if rows.min() >= windows.skip]


def _left_padded(ids: list[np.ndarray], most: int) -> loop.Prompts:
    """A batch of prompts, left-padded to a bucket's length."""
    length = loop.bucket(max(len(x) for x in ids), most)
    tokens_bt: Any = np.stack([np.pad(x, (length - len(x), 0)) for x in ids])
    mask_bt: Any = np.arange(length) >= length - np.array([len(x) for x in ids])[:, None]
    return loop.Prompts(tokens_bt, mask_bt)


def _eos_slots(eos: tuple[int, ...]) -> jax.Array:
    slots = EOS_SLOTS * max(1, -(-len(eos) // EOS_SLOTS))
    return jax.device_put(np.array([*eos, *[-1] * (slots - len(eos))], np.int32))
