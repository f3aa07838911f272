"""Adapters of models that have a text decoder among other parts, in PEFT's form.

There a module's path begins with `model.language_model`, and a name such as q_proj may also be that of a module of the
vision tower: what is written here means the decoder's modules only, and of what is read the others are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from para_jax.adapters.method import BackboneShape, PeftMethod, Tensors
from para_jax.adapters.names import PREFIX, At, Names
from para_jax.adapters.targets import first_match, module_path, names_module
from para_jax.errors import unknown
from para_jax.families.wrappers import WRAPPERS, Wrapper, wrapper_of

LISTS = ("target_modules", "feedforward_modules")
PATTERNS = ("rank_pattern", "alpha_pattern")


def written_for(base: BackboneShape, model_type: str | None) -> Wrapper | None:
    """The wrapper whose names an adapter is written with, None for a text model; by default what `base` was read from.

    Raises ParaJaxError for a model_type that has no such decoder.
    """
    if model_type is None:
        return wrapper_of(base)
    family = getattr(base, "family", "")
    fits = {name: wrapper for name, wrapper in WRAPPERS.items() if family in wrapper.texts.values()}
    if model_type not in (family, *fits):
        raise unknown(f"model_type with a {family} in it", model_type, (family, *fits))
    return fits.get(model_type)


def at_stem(config: PeftMethod, tensors: Tensors, shape: BackboneShape, stem: str) -> tuple[PeftMethod, dict[str, Any]]:
    """An adapter of a text model as one of a model that has its layers at `stem`, and of no other part of it."""
    named: Any = config.of_modules(config.modules(shape), shape)
    lists: dict[str, Any]
    if any("." in entry for entry in named.target_modules):  # paths from the layers on

        def path(entry: str) -> str:
            return f"{stem}.{entry}"

        lists = {key: tuple(map(path, getattr(named, key))) for key in LISTS if hasattr(named, key)}
    else:
        sites = "|".join(re.escape(shape.sites[site].path) for site in named.target_modules)
        lists = {LISTS[0]: rf"{re.escape(stem)}\.layers\.\d+\.({sites})"}
    moved = {f"{PREFIX}{stem}.{name.removeprefix(f'{PREFIX}model.')}": x for name, x in tensors.items()}
    return replace(named, **lists), moved


def without_others(fields: Mapping[str, Any], shape: BackboneShape, names: Names) -> dict[str, Any]:
    """An adapter_config.json without the entries that name modules of other parts, and none of the decoder's.

    What names nothing of either stays.
    """
    at = At(shape, names.stem)
    paths = [module_path(layer, site, at) for layer in range(shape.num_hidden_layers) for site in shape.sites]

    def named(entry: Any) -> bool:
        if not isinstance(entry, str):
            return True
        return any(names_module(entry, x) for x in paths) or not any(names_module(entry, x) for x in names.others)

    def fits(pattern: str) -> bool:
        text, other = (any(first_match([(pattern, True)], x) for x in of) for of in (paths, names.others))
        return text or not other

    kept = dict(fields)
    if names.others:
        kept |= {key: [*filter(named, fields[key])] for key in LISTS if isinstance(fields.get(key), list)}
        kept |= {
            key: {pattern: value for pattern, value in fields[key].items() if fits(pattern)}
            for key in PATTERNS
            if isinstance(fields.get(key), Mapping)
        }
    return kept
