"""What every form of source is read into before its rows become prompts."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from para_jax.errors import ParaJaxError, unknown

SHOWN = 5  # problems listed in one error


class Table(NamedTuple):
    """Rows of named columns.

    Attributes:
      columns: their names.
      rows: each with its place, such as "tfds:squad:train row 17"; rows are counted from 0, as both libraries do.
      labels: the columns that hold a class's number, or -1 where the row has none.
      dataset: whose shipped template fits; empty if the source does not say.
      splits: what else could be read of the source.
    """

    columns: tuple[str, ...]
    rows: Iterable[tuple[str, Mapping[str, Any]]]
    labels: tuple[str, ...] = ()
    dataset: str = ""
    splits: tuple[str, ...] = ()


def check_split(split: str, known: Collection[str], source: str) -> None:
    """Raises ParaJaxError unless each name in a split such as train[:90%]+test is known.

    >>> check_split("train[:90%]+test", ["train", "test"], "tfds:trec")
    >>> check_split("trian", ["train", "test"], "tfds:trec")
    Traceback (most recent call last):
    ...
    para_jax.errors.ParaJaxError: unknown split of tfds:trec 'trian'; did you mean 'train'? Known: test, train
    """
    for name in re.sub(r"\[[^\]]*\]?", "", split).split("+"):
        if name.strip() not in known:
            raise unknown(f"split of {source}", name.strip(), known)


def raise_problems(problems: list[str]) -> None:
    """Raises one ParaJaxError for all problems, if there is one."""
    if problems:
        more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ParaJaxError("\n".join(problems[:SHOWN]) + more)
