"""`Table`: the rows of any source, before a template makes prompts from them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from para_jax.errors import ParaJaxError, check_known

SHOWN = 5  # problems listed in one error


class Table(NamedTuple):
    """Rows of named columns.

    Attributes:
      rows: (place, row) pairs, such as "tfds:squad:train row 17"; rows are counted from 0, as both libraries do.
      labels: the columns with the index of a class, or -1 if the row has no label.
      dataset: the name of the data set, which selects a template that ships; empty if unknown.
    """

    columns: tuple[str, ...]
    rows: Iterable[tuple[str, Mapping[str, Any]]]
    labels: tuple[str, ...] = ()
    dataset: str = ""
    splits: tuple[str, ...] = ()


def check_split(split: str, known: Collection[str], source: str) -> None:
    """Raises ParaJaxError for an unknown name in a split such as train[:90%]+test.

    >>> check_split("train[:90%]+test", ["train", "test"], "tfds:trec")
    >>> check_split("trian", ["train", "test"], "tfds:trec")
    Traceback (most recent call last):
    ...
    para_jax.errors.ParaJaxError: unknown split of tfds:trec 'trian'; did you mean 'train'? Known: test, train
    """
    names = re.sub(r"\[[^\]]*\]?", "", split).split("+")
    check_known(f"split of {source}", map(str.strip, names), known)


def raise_problems(problems: list[str]) -> None:
    """Raises one ParaJaxError for all problems, if any."""
    if problems:
        more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ParaJaxError("\n".join(problems[:SHOWN]) + more)
