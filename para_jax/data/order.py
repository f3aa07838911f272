"""The order of a tenant's rows and mixtures: a pure function of the seed, the tenant's name and the position."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from para_jax.annotations import Int
from para_jax.data.examples import Example, Examples, read_examples
from para_jax.data.sources import mixture
from para_jax.errors import ParaJaxError

if TYPE_CHECKING:
    from grain import MapDataset

POSITIONS = 2**40  # more than any run has


@dataclass(frozen=True)
class Mixture(Sequence[Example]):
    """Examples of several sources, concatenated, and the sampling weight of each source.

    >>> Mixture(("ab", "cde"), weights=(0.7, 0.3))[3]
    'd'
    """

    sources: tuple[Sequence[Example], ...]
    weights: tuple[float, ...]
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", tuple(accumulate(map(len, self.sources), initial=0)))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        indices = range(len(self))[index]
        if isinstance(indices, range):
            return [self[i] for i in indices]
        source = bisect_right(self._starts, indices) - 1
        return self.sources[source][indices - self._starts[source]]

    def __iter__(self) -> Iterator[Example]:
        return chain.from_iterable(self.sources)

    @property
    def lengths(self) -> Int[np.ndarray, " rows"]:
        """As in `Examples`, for all sources."""
        return np.concatenate([Examples.of(source).lengths for source in self.sources])

    @property
    def target_counts(self) -> Int[np.ndarray, " rows"]:
        """As in `Examples`, for all sources."""
        return np.concatenate([Examples.of(source).target_counts for source in self.sources])


def sources_of(examples: Sequence[Example]) -> tuple[Sequence[Example], ...]:
    """The sources of a mixture; other examples are one source."""
    return examples.sources if isinstance(examples, Mixture) else (examples,)


def read_mixture(text: str, *args: Any, **options: Any) -> Sequence[Example]:
    """The examples of SOURCE, or of WEIGHT*SOURCE+WEIGHT*SOURCE as a Mixture. Other arguments as for `read_examples`.

    Raises ParaJaxError as `read_examples` and `sources.mixture` do, and for a mixture if grain is not installed.
    """
    weights, sources = zip(*mixture(text), strict=True)
    if len(sources) > 1 and find_spec("grain") is None:
        raise ParaJaxError(f"{text} is a mixture, which needs grain: pip install 'para-jax[data]'")
    examples = tuple(read_examples(source, *args, **options) for source in sources)
    return examples[0] if len(examples) == 1 else Mixture(examples, weights)


def order(seed: int, tenant: str, examples: Sequence[Example], positions: Iterable[int]) -> list[int]:
    """The indices of a tenant's examples at these positions of its training. Positions start at 0 and have no end.

    Every epoch has every example once, in a new order. In a mixture each source has its own epochs, and any range of
    positions has the share of each source that its weight gives, to within one example; weights are rounded to a
    hundredth of the smallest. The order depends only on the arguments, so a resumed run continues with the same
    examples, and other tenants do not matter.

    >>> rows = order(0, "acme", ["a", "b", "c", "d"], range(8))
    >>> sorted(rows[:4]), sorted(rows[4:])
    ([0, 1, 2, 3], [0, 1, 2, 3])
    """
    if not isinstance(examples, Mixture):
        return [_row(seed, tenant, len(examples), position) for position in positions]
    mixed = _mixed(examples.weights)
    sizes = tuple(map(len, examples.sources))
    starts = tuple(accumulate(sizes, initial=0))
    rows = []
    for source, position in (divmod(mixed[position], POSITIONS) for position in positions):
        name = f"{tenant}+{source}" if source else tenant
        rows.append(starts[source] + _row(seed, name, sizes[source], position))
    return rows


def _row(seed: int, name: str, size: int, position: int) -> int:
    return int(_epoch(seed, name, size, position // size)[position % size])


# Not grain's shuffle: it searches 65,536 positions for one below the size, which takes 10 ms per row for two rows and
# 0.3 ms per row for a hundred.
@lru_cache(maxsize=4096)
def _epoch(seed: int, name: str, size: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, zlib.crc32(name.encode()), epoch)).permutation(size)


@lru_cache(maxsize=4096)
def _mixed(weights: tuple[float, ...]) -> MapDataset:
    """For each position of a mixture: source * POSITIONS + the position within the source."""
    from grain import MapDataset

    sources = [MapDataset.range(i * POSITIONS, (i + 1) * POSITIONS) for i in range(len(weights))]
    return MapDataset.mix(sources, weights)
