"""Rows of CSV files, and what is refused of them."""

import csv
import gzip
from pathlib import Path

import pytest

from para_jax import ParaJaxError, read_rows


def test_rows_as_python_writes_them(tmp_path: Path) -> None:
    """Commas, quotes and line breaks in texts; numbers stay texts; empty values and lines count as none."""
    texts = [("Who, exactly?", 'The "cat"'), ("2 + 2 =", "4"), ("Two\nlines", " ü")]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("prompt", "response", "system"), *((*row, "") for row in texts)])
        file.write("\n")
    rows = read_rows(tmp_path / "a.csv")
    assert [row for _, row in rows] == [{"prompt": p, "response": r} for p, r in texts]
    assert [place.rpartition(":")[2] for place, _ in rows] == ["2", "3", "4"]
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    assert [row for _, row in read_rows(tmp_path / "b.csv.gz")] == [row for _, row in rows]
    (tmp_path / "c.tsv").write_text("question\tanswer\nWho, sat?\tThe cat\n")
    assert [row for _, row in read_rows(tmp_path / "c.tsv", "gsm8k")] == [
        {"prompt": "Question: Who, sat?\nAnswer:", "response": "The cat"}
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,response\na,b\nc\n", "{}:3 has 1 values for 2 columns; quote texts with commas"),
        (b"prompt,response\na,b,c\n", "{}:2 has 3 values for 2 columns"),
        (b"prompt,prompt\na,b\n", "{}:1 names the column 'prompt' twice"),
        (b"prompt,,response\na,b,c\n", "{}:1 has a column without a name"),
        (b'prompt,response\n"a,b\n', "{}:2 is not CSV: unexpected end of data"),
        (b"prompt,response\n", "{} has no rows"),
        (b"", "{} has no rows"),
        (b"prompt,response\n\xff,b\n", "{} is not UTF-8"),
        (b"question,answer\na,b\n", "{} has the columns answer, question, and needs a template"),
    ],
)
def test_bad_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(ParaJaxError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(message.format(path))
