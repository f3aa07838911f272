"""What the pages say of the code is what the code says."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_table_of_families() -> None:
    table = "\n".join(runpy.run_path(str(DOCS / "families_table.py"))["lines"]())
    assert table in (DOCS / "families.md").read_text(), "run python docs/families_table.py and put it into the page"
