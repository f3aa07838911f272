"""Reads CSV and TSV files. The first line names the columns."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from para_jax.data.table import Table, raise_problems
from para_jax.errors import ParaJaxError

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def table(path: str | Path, content: bytes) -> Table:
    """The rows of a CSV or TSV file. Every value is a string; empty values are None.

    Raises ParaJaxError, with file and line, for a row with a wrong number of values, a duplicate or unnamed column, an
    unclosed quotation mark, and text that is not UTF-8.
    """
    path = Path(path)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ParaJaxError(f"{path} is not UTF-8: {error}; save the file as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[path.suffix.lower()], strict=True)
    rows, problems, start = [], [], 1
    columns: list[str] | None = None
    try:
        for values in reader:
            place, start = f"{path}:{start}", reader.line_num + 1
            if not any(values):
                continue
            if columns is None:
                columns = [value.strip() for value in values]
                for name in columns:
                    if not name or columns.count(name) > 1:
                        what = f"names the column {name!r} twice" if name else "has a column without a name"
                        raise ParaJaxError(f"{place} {what}; the first line of a CSV file names its columns")
            elif len(values) != len(columns):
                problems.append(f"{place} has {len(values)} values for {len(columns)} columns; quote texts with commas")
            else:
                rows.append((place, {key: value or None for key, value in zip(columns, values, strict=True)}))
    except csv.Error as error:
        problems.append(f"{path}:{start} is not CSV: {error}")
    raise_problems(problems)
    if columns is None or not rows:
        raise ParaJaxError(f"{path} has no rows")
    return Table(tuple(columns), rows)
