"""Prints the table of docs/data.md from the templates that ship: python docs/templates_table.py"""

from __future__ import annotations

import json
from collections.abc import Iterator

from para_jax.data.templates import shipped

LONGEST = 72  # characters of a cell


def lines() -> Iterator[str]:
    """Each template with its prompt, its response and its choices; the texts may be cut."""
    yield "| template | prompt | response | choices |"
    yield "|---|---|---|---|"
    for name, path in shipped().items():
        fields = json.loads(path.read_text())
        choices = fields.get("choices", "")
        cells = (fields["prompt"], fields["response"], choices if isinstance(choices, str) else json.dumps(choices))
        yield f"| `{name}` | " + " | ".join(f"`{_cell(text)}`" if text else "" for text in cells) + " |"


def _cell(text: str) -> str:
    short = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    return short.replace("\n", "⏎").replace("|", "\\|")


if __name__ == "__main__":
    print("\n".join(lines()))
