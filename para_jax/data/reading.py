"""`Reader`: the pipeline from a source of rows (`data/sources.py`) to tokenized examples (`data/examples.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from para_jax.convert.tokenizer import with_chat_template
from para_jax.data.examples import Example, encode_rows
from para_jax.data.order import read_mixture
from para_jax.data.rows import check_tenant
from para_jax.errors import ParaJaxError

# The inputs of `Reader`: a source of `sources.read_rows` or a mixture of several, rows as dicts, (place, row) pairs, or
# examples.
Source = str | Path | Sequence[Mapping[str, Any]] | Sequence[tuple[str, Mapping[str, Any]]] | Sequence[Example]


@dataclass(frozen=True)
class Reader:
    """Encodes rows as examples, for one backbone.

    Attributes:
      tokenizer: a transformers tokenizer; None if all rows are examples already.
      eos_token_ids: the ids that end a text (`end_tokens`).
      max_length: the maximum number of tokens of a row.
      truncate, keep_texts, allow_special_tokens, show: as for `encode_rows`.
      data_dir: where TFDS keeps its data.

    >>> from para_jax import load_tokenizer, tiny_backbone_path
    >>> reader = Reader(load_tokenizer(tiny_backbone_path()), eos_token_ids=(0,))
    >>> reader("faq", [{"prompt": "Who sat?", "response": "The cat."}])[0].place
    'faq row 1'
    """

    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    max_length: int | None = None
    truncate: bool = False
    keep_texts: bool = False
    allow_special_tokens: bool = False
    data_dir: str | Path | None = None
    show: Callable[[str], None] | None = None

    def with_chat_template(self, template: str | None) -> Reader:
        """The reader with another chat template; the same one, if None."""
        return replace(self, tokenizer=with_chat_template(self.tokenizer, template))

    def __call__(
        self, tenant: str, rows: Source, template: str | None = None, one_pass: bool = False
    ) -> Sequence[Example]:
        """The examples of one tenant.

        Args:
          template: makes prompts and responses from a source's columns; a file, or the name of a template that ships.
            Rows in memory do not use it.
          one_pass: make one example of all turns of a chat (`encode_rows`).

        Raises ParaJaxError as `read_examples` does, for text rows without a tokenizer, and for rows that are not dicts.
        """
        if are_examples(rows):
            return rows
        if self.tokenizer is None:
            raise ParaJaxError(f"the rows of {tenant!r} are text; pass tokenizer=load_tokenizer(model) to read them")
        args = self.tokenizer, self.eos_token_ids, self.max_length
        shared = ("truncate", "keep_texts", "allow_special_tokens", "show")
        options: dict[str, Any] = {"one_pass": one_pass, **{name: getattr(self, name) for name in shared}}
        if isinstance(rows, str | Path):
            where = {"tenant": tenant, "template": template, "data_dir": self.data_dir}
            return read_mixture(str(rows), *args, **where, **options)
        return encode_rows(check_tenant(_with_places(tenant, rows), tenant), *args, total=len(rows), **options)


def are_examples(rows: Source) -> TypeGuard[Sequence[Example]]:
    return not isinstance(rows, str | Path) and (len(rows) == 0 or isinstance(rows[0], Example))


def _with_places(tenant: str, rows: Sequence[Any]) -> list[tuple[str, dict[str, Any]]]:
    """Rows with places, which errors name."""
    placed = []
    for i, row in enumerate(rows, 1):
        place, row = row if isinstance(row, tuple) and len(row) == 2 else (f"{tenant} row {i}", row)
        if not isinstance(row, Mapping):
            raise ParaJaxError(f'{place} is a {type(row).__name__}; a row is a dict such as {{"prompt", "response"}}')
        placed.append((place, dict(row)))
    return placed
