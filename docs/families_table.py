"""Prints the table of docs/families.md from the code: python docs/families_table.py"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from para_jax.families.architecture import ACTIVATIONS, ROPE_TYPES
from para_jax.families.table import FAMILIES
from para_jax.families.wrappers import WRAPPERS

# Restrictions that are code in an entry of the table.
NOT_ALL = '`use_bidirectional_attention` other than `"all"`'
OTHERS = {"gemma4_text": NOT_ALL, "gemma4_unified_text": NOT_ALL}


def lines() -> Iterator[str]:
    """The families, and what is understood in the config.json of all of them."""
    yield "| `model_type` | checkpoints | supported only with |"
    yield "|---|---|---|"
    for name, family in FAMILIES.items():
        only = [*settings(family.only), *(f"`{key}` = `{other}`" for key, other in family.same.items())]
        only += [OTHERS[name]] if name in OTHERS else []
        yield f"| `{name}` | {family.models} | {', '.join(only)} |"
    yield ""
    yield "| `model_type` | checkpoints | family of the decoder | supported only with | parts that are not read |"
    yield "|---|---|---|---|---|"
    for name, wrapper in WRAPPERS.items():
        families, others = (", ".join(f"`{x}`" for x in of) for of in (wrapper.texts.values(), wrapper.others))
        yield f"| `{name}` | {wrapper.models} | {families} | {', '.join(settings(wrapper.only))} | {others} |"
    yield ""
    yield f"RoPE types: {', '.join(ROPE_TYPES)}. Activations: {', '.join(ACTIVATIONS)}."


def settings(only: Mapping[str, Any]) -> list[str]:
    return [f"`{key}` = `{json.dumps(value)}`" for key, value in only.items()]


if __name__ == "__main__":
    print("\n".join(lines()))
