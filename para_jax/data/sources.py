"""Reads a tenant's rows from a JSONL or CSV file, TensorFlow Datasets, or Hugging Face's `datasets`.

  FILE.jsonl                    one JSON object a line; also FILE.jsonl.gz
  FILE.csv, FILE.tsv            a table whose first line names the columns; also FILE.csv.gz
  tfds:NAME[/CONFIG][:SPLIT]    tfds:squad, tfds:super_glue/boolq:train[:90%]
  hf:FOLDER[:SPLIT]             a folder written by save_to_disk, or with json, parquet, arrow or csv files
  hf:OWNER/NAME[/CONFIG][:SPLIT]    a data set on the hub, which is downloaded

A row is {"prompt", "response"}, {"prompt", "completion"} or {"messages": [...]}. Optional keys are `system` (the text
of a system message), `tools`, `references` (equally good answers), `choices` (answers to choose from) and `tenant` (the
name of its tenant). A template converts rows with other columns.
"""

from __future__ import annotations

import codecs
import gzip
import json
import logging
import re
import zlib
from pathlib import Path
from typing import Any

from para_jax.data import csv_files, hf
from para_jax.data.table import Table, raise_problems
from para_jax.data.templates import EXAMPLE, Template, shipped
from para_jax.errors import ParaJaxError

KEYS = ("prompt", "response", "completion", "messages", "system", "tools", "references", "choices", "tenant")
FORMS = "FILE.jsonl, FILE.csv, tfds:NAME[/CONFIG][:SPLIT], hf:FOLDER[:SPLIT] or hf:OWNER/NAME[/CONFIG][:SPLIT]"

Rows = list[tuple[str, dict[str, Any]]]


def read_rows(source: str | Path, template: Template | str | None = None, data_dir: str | Path | None = None) -> Rows:
    """The rows of a source with their places, such as "mail.jsonl:7" or "tfds:squad:train row 17".

    Args:
      template: converts rows, instead of the template that ships for the data set; a JSON file, or the name of a
        template that ships.
      data_dir: where TFDS keeps its data (default: TFDS_DATA_DIR, then TFDS's own default).

    Raises ParaJaxError for a source that cannot be read, a template that does not fit its columns, columns other than
    the above without a template, and a source without usable rows.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder, "faq.jsonl")
    ...     _ = file.write_text('{"q": "Who sat?", "a": "The cat."}')
    ...     [(_, row)] = read_rows(file, Template({"prompt": "{{q}}", "response": "{{a}}"}))
    >>> row
    {'prompt': 'Who sat?', 'response': 'The cat.'}
    """
    kind, _, rest = str(source).partition(":")
    if kind == "tfds":
        from para_jax.data import tfds

        table = tfds.table(rest, data_dir)
    elif kind == "hf":
        table = hf.table(rest)
    elif Path(str(source).removesuffix(".gz")).suffix.lower() in csv_files.DELIMITERS:
        table = csv_files.table(str(source).removesuffix(".gz"), _content(_file(source)))
    else:
        jsonl = read_jsonl(source)
        if template is None:
            return jsonl
        table = Table(tuple(dict.fromkeys(key for _, row in jsonl for key in row)), jsonl)
    if isinstance(template, str):
        template = Template.load(template)
    template = template or _template(table, str(source))
    rows = _labelled(table, str(source))
    if template is None:
        if unused := [key for key in table.columns if key not in KEYS]:
            logging.getLogger(__name__).warning("%s: the columns %s are not read", source, ", ".join(unused))
        return [(place, {key: row[key] for key in KEYS if row.get(key) is not None}) for place, row in rows]
    template.check(table.columns)
    converted, problems = [], []
    for place, row in rows:
        try:
            converted.append((place, template.row(row)))
        except ParaJaxError as error:
            problems.append(f"{place}: {error}")
    raise_problems(problems)
    return converted


def read_jsonl(path: str | Path) -> Rows:
    """The rows of a JSONL file with their places ("file:line"). Raises ParaJaxError that lists malformed lines."""
    path = _file(path)
    rows, problems = [], []
    # Not splitlines: JSON strings may contain Unicode line separators.
    for number, line in enumerate(_content(path).split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line.decode(), object_pairs_hook=_object)
            if isinstance(row, dict):
                rows.append((place, row))
            else:
                problems.append(f"{place} is a {type(row).__name__}, not an object with a prompt")
        except UnicodeDecodeError as error:
            problems.append(f"{place} is not UTF-8: {error}; save the file as UTF-8")
        except json.JSONDecodeError as error:
            problems.append(f"{place} is not JSON: {error}")
        except ParaJaxError as error:
            problems.append(f"{place}: {error}")
        except (ValueError, RecursionError):  # Python's limits: 4,300 digits, 1,000 brackets
            problems.append(f"{place} has a number with too many digits, or too deeply nested brackets")
    raise_problems(problems)
    if not rows:
        raise ParaJaxError(f"{path} has no rows")
    return rows


def _file(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise ParaJaxError(f"{path} is not a file; rows come from {FORMS}")
    return Path(path)


def _content(path: Path) -> bytes:
    """The bytes of a file, uncompressed, without a byte order mark.

    Raises ParaJaxError for damaged gzip, for UTF-16 and for a JSON array.
    """
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ParaJaxError(f"{path} is damaged: {error}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:4]:
        raise ParaJaxError(f"{path} is UTF-16 or UTF-32, not UTF-8; save it as UTF-8")
    content = content.removeprefix(codecs.BOM_UTF8)
    if content.lstrip()[:1] == b"[":
        raise ParaJaxError(
            f"{path} is a JSON array; write each of its objects on its own line, for instance with jq -c '.[]'"
        )
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ParaJaxError for a duplicate key, which json would ignore."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ParaJaxError(f"the key {next(key for key in found if keys.count(key) > 1)!r} occurs twice")
    return found


def mixture(text: str) -> list[tuple[float, str]]:
    """The sources of a tenant with their weights: SOURCE, or WEIGHT*SOURCE+WEIGHT*SOURCE...

    Raises ParaJaxError for a weight that is not above 0, and if only some sources have weights.

    >>> mixture("tfds:squad:train+validation")
    [(1.0, 'tfds:squad:train+validation')]
    >>> mixture("0.7*tfds:squad+0.3*faq.jsonl")
    [(0.7, 'tfds:squad'), (0.3, 'faq.jsonl')]
    """
    if not re.match(r"[\d.]+\*", text):
        if re.search(r"\+[\d.]+\*", text):
            raise ParaJaxError(f"the first source of {text!r} has no weight; write 0.7*SOURCE+0.3*SOURCE")
        return [(1.0, text)]
    parts = []
    for part in re.split(r"\+(?=[\d.]+\*)", text):
        weight, _, source = part.partition("*")
        try:
            number = float(weight)
        except ValueError:
            raise ParaJaxError(f"{weight!r} in {text!r} is not a number; write 0.7*SOURCE+0.3*SOURCE") from None
        if number <= 0 or not source:
            raise ParaJaxError(f"{part!r} in {text!r} must be a weight above 0 and a source: 0.7*tfds:squad")
        parts.append((number, source))
    return parts


def _template(table: Table, source: str) -> Template | None:
    """The template that ships for a table; None if its rows need no template."""
    for name in (table.dataset, table.dataset.partition("/")[0]):
        if name in shipped():
            return Template.load(name)
    ready = ({"messages"}, {"prompt", "response"}, {"prompt", "completion"})
    if any(keys <= {*table.columns} for keys in ready):
        return None
    raise ParaJaxError(
        f"{source} has the columns {', '.join(sorted(table.columns))}, and needs a template that makes prompts from "
        f"them; write one such as {EXAMPLE} and pass it with --template FILE.json, or pass one that ships with "
        "--template NAME (glue/sst2, squad, ...)"
    )


def _labelled(table: Table, source: str) -> Rows:
    """The rows with labels. Test splits of benchmarks have -1 instead."""
    rows = [(place, dict(row)) for place, row in table.rows]
    kept = [(place, row) for place, row in rows if all(row[key] != -1 for key in table.labels)]
    if not kept:
        why = f"no row has a label in {', '.join(table.labels)}" if rows else "there are no rows"
        raise ParaJaxError(f"{source} has no usable rows: {why}; its splits: {', '.join(table.splits)}")
    if len(kept) < len(rows):
        logging.getLogger(__name__).warning(
            "%s: %d of %d rows have no label and are left out", source, len(rows) - len(kept), len(rows)
        )
    return kept
