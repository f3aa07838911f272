"""The order of a tenant's rows: a pure function of the seed, the tenant's name and the place, mixtures included."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, overload

from para_jax.data.examples import Example, read_examples
from para_jax.data.sources import mixture

if TYPE_CHECKING:
    from grain import MapDataset


@dataclass(frozen=True)
class Mixture(Sequence[Example]):
    """Examples of several sources, one source after the other, and how often each source is taken.

    >>> Mixture(("ab", "cde"), weights=(0.7, 0.3))[3]
    'd'
    """

    sources: tuple[Sequence[Example], ...]
    weights: tuple[float, ...]
    _all: tuple[Example, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_all", tuple(chain.from_iterable(self.sources)))

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        return self._all[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._all)


def read_mixture(text: str, **options: Any) -> Sequence[Example]:
    """The examples of SOURCE, or of WEIGHT*SOURCE+WEIGHT*SOURCE as a Mixture; the options are of `read_examples`.

    Raises ParaJaxError as `read_examples` and `sources.mixture` do.
    """
    weights, sources = zip(*mixture(text), strict=True)
    examples = tuple(read_examples(source, **options) for source in sources)
    return examples[0] if len(examples) == 1 else Mixture(examples, weights)


def order(seed: int, tenant: str, examples: Sequence[Example]) -> MapDataset:
    """Which of a tenant's examples is at which place of its training: `order(...)[place]`, for any place from 0.

    Every epoch has every example once, in an order of its own. In a mixture each source has its own epochs, and every
    stretch of places has of each source what its weight says, to within one. Weights count to a hundredth of the
    smallest. It depends on its arguments only, so a run that resumes goes on with the same examples, and a tenant sees
    the same ones whoever trains beside it.

    >>> rows = order(0, "acme", ["a", "b", "c", "d"])
    >>> sorted(rows[place] for place in range(4)), sorted(rows[place] for place in range(4, 8))
    ([0, 1, 2, 3], [0, 1, 2, 3])
    """
    if isinstance(examples, Mixture):
        return _order(seed, tenant, tuple(map(len, examples.sources)), examples.weights)
    return _order(seed, tenant, (len(examples),), (1.0,))


@lru_cache(maxsize=4096)
def _order(seed: int, tenant: str, sizes: tuple[int, ...], weights: tuple[float, ...]) -> MapDataset:
    from grain import MapDataset

    parts = [
        MapDataset.range(start, start + size).shuffle(seed=zlib.crc32(f"{seed}/{tenant}/{part}".encode())).repeat()
        for part, (start, size) in enumerate(zip(accumulate(sizes, initial=0), sizes, strict=False))
    ]
    return parts[0] if len(parts) == 1 else MapDataset.mix(parts, weights)
