"""Padded batches in which every tenant has the same number of rows, as a pure function of the step."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import jax
import numpy as np

from para_jax.data.examples import Example

if TYPE_CHECKING:
    from jaxtyping import Bool, Int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens",
        "length",
        "prompt_length",
        "target_place",
        "target_token",
        "target_mask",
        "target_count",
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class Batch:
    """The rows of one step: n tenants in a fixed order, with b / n consecutive rows each, in a micro-batches.

    Attributes:
      tokens: (a, b, t) prompt and response, padded on the right.
      length, prompt_length: (a, b) tokens in all, and of the prompt.
      target_place: (a, n, k) where each tenant's response tokens are predicted, as indices into its b / n * t tokens.
      target_token, target_mask: (a, n, k) which token is to come there, and whether the entry is one.
      target_count: (n,) each tenant's response tokens in all micro-batches.
    """

    tokens: Int[np.ndarray, "a b t"]
    length: Int[np.ndarray, "a b"]
    prompt_length: Int[np.ndarray, "a b"]
    target_place: Int[np.ndarray, "a n k"]
    target_token: Int[np.ndarray, "a n k"]
    target_mask: Bool[np.ndarray, "a n k"]
    target_count: Int[np.ndarray, "n"]

    @property
    def size(self) -> int:
        """Tokens that are not padding."""
        return int(np.sum(self.length))


def bucket(size: int, least: int = 16) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: few shapes to compile, and a fifth more columns than needed on average.

    >>> [bucket(n) for n in (1, 17, 25, 33, 100)]
    [16, 24, 32, 48, 128]
    """
    while least < size:
        grown = least * 3 // 2
        if grown >= size:
            return grown
        least *= 2
    return least


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
    t = bucket(max(len(e) for part in parts for tenant in part for e in tenant))
    k = bucket(max(sum(len(e.response_ids) for e in tenant) for part in parts for tenant in part))
    a, n, m = len(parts), len(parts[0]), len(parts[0][0])
    tokens, length = np.zeros((a, n * m, t), np.int32), np.zeros((a, n * m), np.int32)
    prompt_length = np.zeros((a, n * m), np.int32)
    place, token = np.zeros((a, n, k), np.int32), np.zeros((a, n, k), np.int32)
    mask = np.zeros((a, n, k), bool)
    for i, part in enumerate(parts):
        for j, tenant in enumerate(part):
            filled = 0
            for row, e in enumerate(tenant):
                at, p, r = j * m + row, len(e.prompt_ids), len(e.response_ids)
                tokens[i, at, : p + r] = (*e.prompt_ids, *e.response_ids)
                length[i, at], prompt_length[i, at] = p + r, p
                # A token is predicted at the place before its own.
                place[i, j, filled : filled + r] = row * t + np.arange(p - 1, p + r - 1)
                token[i, j, filled : filled + r] = e.response_ids
                mask[i, j, filled : filled + r] = True
                filled += r
    return Batch(tokens, length, prompt_length, place, token, mask, mask.sum((0, 2), dtype=np.int32))
