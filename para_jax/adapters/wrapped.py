"""PEFT adapters of models with a text decoder and other parts, such as a vision tower.

In these models a module's path begins with `model.language_model`, and a name such as q_proj may also match modules of
the vision tower. Written configs match only the decoder's modules. Entries for other parts are dropped when reading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from para_jax.adapters.method import BackboneShape, PeftMethod, Tensors
from para_jax.adapters.names import PREFIX, At, Names
from para_jax.adapters.targets import first_match, module_path, names_module
from para_jax.errors import check_known
from para_jax.families.wrappers import WRAPPERS, Wrapper, wrapper_of

LISTS = ("target_modules", "feedforward_modules")
PATTERNS = ("rank_pattern", "alpha_pattern")


def written_for(base: BackboneShape, model_type: str | None) -> Wrapper | None:
    """The wrapper whose names an adapter is written with; None for a text model. The default is the wrapper of `base`.

    Raises ParaJaxError for a model_type without such a decoder.
    """
    if model_type is None:
        return wrapper_of(base)
    family = getattr(base, "family", "")
    fits = {name: wrapper for name, wrapper in WRAPPERS.items() if family in wrapper.texts.values()}
    check_known(f"model_type with a {family} in it", [model_type], (family, *fits))
    return fits.get(model_type)


def at_stem(config: PeftMethod, tensors: Tensors, shape: BackboneShape, stem: str) -> tuple[PeftMethod, dict[str, Any]]:
    """Converts an adapter of a text model to one of a model with its layers at `stem`, for these layers only."""
    named: Any = config.of_modules(config.modules(shape), shape)
    lists: dict[str, Any]
    if any("." in entry for entry in named.target_modules):  # paths that start at `layers`

        def path(entry: str) -> str:
            return f"{stem}.{entry}"

        lists = {key: tuple(map(path, getattr(named, key))) for key in LISTS if hasattr(named, key)}
    else:
        sites = "|".join(re.escape(shape.sites[site].path) for site in named.target_modules)
        lists = {LISTS[0]: rf"{re.escape(stem)}\.layers\.\d+\.({sites})"}
    moved = {f"{PREFIX}{stem}.{name.removeprefix(f'{PREFIX}model.')}": x for name, x in tensors.items()}
    return replace(named, **lists), moved


def decoder_entries(fields: Mapping[str, Any], shape: BackboneShape, names: Names) -> dict[str, Any]:
    """The fields of an adapter_config.json without the entries that match only modules of other parts.

    Entries that match no module stay.
    """
    at = At(shape, names.stem)
    paths = [module_path(layer, site, at) for layer in range(shape.num_hidden_layers) for site in shape.sites_of(layer)]

    def keep_entry(entry: Any) -> bool:
        if not isinstance(entry, str):
            return True
        return any(names_module(entry, x) for x in paths) or not any(names_module(entry, x) for x in names.not_text)

    def keep_pattern(pattern: str) -> bool:
        text, other = (any(first_match([(pattern, True)], x) for x in group) for group in (paths, names.not_text))
        return text or not other

    kept = dict(fields)
    if names.not_text:
        kept |= {key: [*filter(keep_entry, fields[key])] for key in LISTS if isinstance(fields.get(key), list)}
        kept |= {
            key: {pattern: value for pattern, value in fields[key].items() if keep_pattern(pattern)}
            for key in PATTERNS
            if isinstance(fields.get(key), Mapping)
        }
    return kept
