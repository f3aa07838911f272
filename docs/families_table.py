"""Prints the table of docs/families.md from the code: python docs/families_table.py"""

from __future__ import annotations

from collections.abc import Iterator

from para_jax.families.architecture import ACTIVATIONS, ROPE_TYPES
from para_jax.families.table import FAMILIES
from para_jax.families.wrappers import WRAPPERS


def lines() -> Iterator[str]:
    """The families, and what is understood in the config.json of all of them."""
    yield "| `model_type` | checkpoints | supported with one setting only |"
    yield "|---|---|---|"
    for name, family in FAMILIES.items():
        only = [f"`{key}` = {value!r}" for key, value in family.only.items()]
        only += [f"`{key}` = `{other}`" for key, other in family.same.items()]
        yield f"| `{name}` | {family.models} | {', '.join(only)} |"
    yield ""
    yield "| `model_type` | checkpoints | `text_config` of | left out |"
    yield "|---|---|---|---|"
    for name, wrapper in WRAPPERS.items():
        texts, others = (", ".join(f"`{x}`" for x in of) for of in (wrapper.texts, wrapper.others))
        yield f"| `{name}` | {wrapper.models} | {texts} | {others} |"
    yield ""
    yield f"RoPE types: {', '.join(ROPE_TYPES)}. Activations: {', '.join(ACTIVATIONS)}."


if __name__ == "__main__":
    print("\n".join(lines()))
