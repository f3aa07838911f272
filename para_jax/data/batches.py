"""Padded batches in which every tenant has the same number of rows, as a pure function of the step."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import jax
import numpy as np

from para_jax.backbones.ragged import Line
from para_jax.data.examples import Example

if TYPE_CHECKING:
    from jaxtyping import Int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens",
        "length",
        "prompt_length",
        "target_place",
        "target_token",
        "target_tenant",
        "target_count",
    ],
    meta_fields=["line"],
)
@dataclass(frozen=True)
class Batch:
    """The rows of one step: n tenants in a fixed order, with b / n consecutive rows each, in a micro-batches.

    Attributes:
      tokens: (a, b, t) prompt and response, padded on the right.
      length, prompt_length: (a, b) tokens in all, and of the prompt.
      target_place: (a, k) where response tokens are predicted, as indices into the b * t tokens.
      target_token: (a, k) which token is to come there.
      target_tenant: (a, k) whose it is, from 0; n where the list is longer than there are response tokens.
      target_count: (n,) each tenant's response tokens in all micro-batches.
      line: how long a line the tokens of a micro-batch take; static.
    """

    tokens: Int[np.ndarray, "a b t"]
    length: Int[np.ndarray, "a b"]
    prompt_length: Int[np.ndarray, "a b"]
    target_place: Int[np.ndarray, "a k"]
    target_token: Int[np.ndarray, "a k"]
    target_tenant: Int[np.ndarray, "a k"]
    target_count: Int[np.ndarray, "n"]
    line: Line

    @property
    def size(self) -> int:
        """Tokens that are not padding."""
        return int(np.sum(self.length))


def bucket(size: int, least: int = 16, parts: int = 2) -> int:
    """The next of a series that doubles every `parts` even steps: few shapes to compile, and few places unused.

    >>> [bucket(n) for n in (1, 17, 25, 33, 100)]
    [16, 24, 32, 48, 128]
    >>> bucket(1100, parts=4)
    1280
    """
    while 2 * least < size:
        least *= 2
    return next(n for n in range(least, 2 * least + 1, max(1, least // parts)) if n >= size)


@lru_cache(maxsize=1024)
def _order(seed: int, tenant: str, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, zlib.crc32(tenant.encode()), epoch)).permutation(size)


def rows_of_step(seed: int, tenant: str, size: int, step: int, rows: int) -> list[int]:
    """Which of a tenant's `size` examples are in a step: every epoch is a new order, and none is skipped.

    It depends on the seed, the tenant's name and the step only, so a run that resumes goes on with the same rows
    and a tenant sees the same ones whoever trains beside it.

    >>> sorted(rows_of_step(0, "acme", 4, step=0, rows=2) + rows_of_step(0, "acme", 4, step=1, rows=2))
    [0, 1, 2, 3]
    """
    places = range(step * rows, (step + 1) * rows)
    return [int(_order(seed, tenant, place // size, size)[place % size]) for place in places]


def step_batch(
    examples: Mapping[str, Sequence[Example]], seed: int, step: int, rows: int, micro_batches: int = 1
) -> Batch:
    """The batch of a step: `rows` of every tenant, in the order of `examples`."""
    picked = [
        [examples[name][i] for i in rows_of_step(seed, name, len(examples[name]), step, rows)] for name in examples
    ]
    share = rows // micro_batches
    parts = [[tenant[a * share : (a + 1) * share] for tenant in picked] for a in range(micro_batches)]
    return pad(parts)


def pad(parts: list[list[list[Example]]]) -> Batch:
    """A batch of micro-batches of tenants of examples; all tenants have as many."""
    rows = [[(tenant, e) for tenant, some in enumerate(part) for e in some] for part in parts]
    t = bucket(max(len(e) for part in rows for _, e in part))
    k = bucket(max(sum(len(e.response_ids) for _, e in part) for part in rows), parts=4)
    a, b, n = len(rows), len(rows[0]), len(parts[0])
    shorter = max((sorted(len(e) for _, e in part)[b // 2 - 1] for part in rows if b > 1), default=0)
    line = Line(bucket(max(sum(len(e) for _, e in part) for part in rows), parts=4), min(t, bucket(shorter)))
    tokens, length, prompt_length = (np.zeros(shape, np.int32) for shape in ((a, b, t), (a, b), (a, b)))
    place, token, whose = (np.full((a, k), fill, np.int32) for fill in (0, 0, n))
    for i, part in enumerate(rows):
        filled = 0
        for row, (tenant, e) in enumerate(part):
            p, r = len(e.prompt_ids), len(e.response_ids)
            tokens[i, row, : p + r] = (*e.prompt_ids, *e.response_ids)
            length[i, row], prompt_length[i, row] = p + r, p
            # A token is predicted at the place before its own.
            place[i, filled : filled + r] = row * t + np.arange(p - 1, p + r - 1)
            token[i, filled : filled + r] = e.response_ids
            whose[i, filled : filled + r] = tenant
            filled += r
    count = np.bincount(whose.reshape(-1), minlength=n + 1)[:n].astype(np.int32)
    return Batch(tokens, length, prompt_length, place, token, whose, count, line)
