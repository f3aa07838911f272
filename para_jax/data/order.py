"""The order of a tenant's rows: a pure function of the seed, the tenant's name and the place, mixtures included."""

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

from para_jax.data.examples import Example, Examples, read_examples
from para_jax.data.sources import mixture
from para_jax.errors import ParaJaxError

if TYPE_CHECKING:
    from grain import MapDataset
    from jaxtyping import Int

PLACES = 2**40  # more than any training has


@dataclass(frozen=True)
class Mixture(Sequence[Example]):
    """Examples of several sources, one source after the other, and how often each source is taken.

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
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[i] for i in places]
        part = bisect_right(self._starts, places) - 1
        return self.sources[part][places - self._starts[part]]

    def __iter__(self) -> Iterator[Example]:
        return chain.from_iterable(self.sources)

    @property
    def lengths(self) -> Int[np.ndarray, " rows"]:
        """As of `Examples`, of all sources."""
        return np.concatenate([Examples.of(source).lengths for source in self.sources])

    @property
    def target_counts(self) -> Int[np.ndarray, " rows"]:
        """As of `Examples`, of all sources."""
        return np.concatenate([Examples.of(source).target_counts for source in self.sources])


def sources_of(examples: Sequence[Example]) -> tuple[Sequence[Example], ...]:
    """The sources of a mixture, or the one that there is."""
    return examples.sources if isinstance(examples, Mixture) else (examples,)


def read_mixture(text: str, *given: Any, **options: Any) -> Sequence[Example]:
    """The examples of SOURCE, or of WEIGHT*SOURCE+WEIGHT*SOURCE as a Mixture; all else is as for `read_examples`.

    Raises ParaJaxError as `read_examples` and `sources.mixture` do, and for a mixture if grain is not installed.
    """
    weights, sources = zip(*mixture(text), strict=True)
    if len(sources) > 1 and find_spec("grain") is None:
        raise ParaJaxError(f"{text} is a mixture, which grain orders: pip install 'para-jax[data]'")
    examples = tuple(read_examples(source, *given, **options) for source in sources)
    return examples[0] if len(examples) == 1 else Mixture(examples, weights)


def order(seed: int, tenant: str, examples: Sequence[Example], places: Iterable[int]) -> list[int]:
    """Which of a tenant's examples are at these places of its training; places go on without end from 0.

    Every epoch has every example once, in an order of its own. In a mixture each source has its own epochs, and every
    stretch of places has of each source what its weight says, to within one; weights count to a hundredth of the
    smallest. It depends on its arguments only, so a run that resumes goes on with the same examples, and a tenant sees
    the same ones whoever trains beside it.

    >>> rows = order(0, "acme", ["a", "b", "c", "d"], range(8))
    >>> sorted(rows[:4]), sorted(rows[4:])
    ([0, 1, 2, 3], [0, 1, 2, 3])
    """
    if not isinstance(examples, Mixture):
        return [_row(seed, tenant, len(examples), place) for place in places]
    turns = _turns(examples.weights)
    sizes = tuple(map(len, examples.sources))
    starts = tuple(accumulate(sizes, initial=0))
    rows = []
    for part, place in (divmod(turns[place], PLACES) for place in places):
        rows.append(starts[part] + _row(seed, f"{tenant}+{part}" if part else tenant, sizes[part], place))
    return rows


def _row(seed: int, name: str, size: int, place: int) -> int:
    return int(_epoch(seed, name, size, place // size)[place % size])


# Not grain's shuffle: it walks 65,536 places until one is below the size, which takes 10 ms for each of two rows and
# 0.3 ms for each of a hundred.
@lru_cache(maxsize=4096)
def _epoch(seed: int, name: str, size: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, zlib.crc32(name.encode()), epoch)).permutation(size)


@lru_cache(maxsize=4096)
def _turns(weights: tuple[float, ...]) -> MapDataset:
    """Whose turn is at a place, and which of its turns: part * PLACES + turn."""
    from grain import MapDataset

    parts = [MapDataset.range(part * PLACES, (part + 1) * PLACES) for part in range(len(weights))]
    return MapDataset.mix(parts, weights)
