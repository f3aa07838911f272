"""The projections of each layer that an adapter targets, with PEFT's semantics of `target_modules`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TypeVar

from para_jax.adapters.method import BackboneShape, as_targets, no_site
from para_jax.errors import ParaJaxError

ALL_LINEAR = "all-linear"
T = TypeVar("T")


def module_path(layer: int, site: str, shape: BackboneShape) -> str:
    """The full name of a projection: `model.layers.3.self_attn.q_proj`."""
    return f"{shape.layers_path}.{layer}.{shape.sites_of(layer)[site].path}"


def peft_path(layer: int, site: str, shape: BackboneShape) -> str:
    """PEFT's name of a projection; PEFT wraps the model twice."""
    return f"base_model.model.{module_path(layer, site, shape)}"


def names_module(pattern: str, path: str) -> bool:
    """Whether an entry of a list of modules matches this path: all of it, or its end after a dot.

    >>> names_module("q_proj", "model.layers.3.self_attn.q_proj"), names_module("proj", "model.layers.3.mlp.up_proj")
    (True, False)
    """
    return path == pattern or path.endswith(f".{pattern}")


def matched(pattern: str | tuple[str, ...], path: str) -> bool:
    """Whether a regular expression matches the full path, or an entry of a list matches it."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, path) is not None
    return any(names_module(entry, path) for entry in pattern)


def first_match(patterns: Iterable[tuple[str, T]], path: str) -> T | None:
    """The value of the first pattern (of `rank_pattern` or `alpha_pattern`) that matches the end of the path."""
    return next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", path)), None)


def resolve(
    target_modules: str | tuple[str, ...],
    shape: BackboneShape,
    *,
    exclude: str | tuple[str, ...] = (),
    layers: tuple[int, ...] | None = None,
    linear: bool = False,
) -> tuple[tuple[str, ...], ...]:
    """The targeted sites of each layer.

    Args:
      target_modules: names, ends of paths or full paths. A string is a regular expression for the full path, or
        "all-linear" for every linear site.
      exclude: modules to leave out, in the same forms.
      layers: the layers to target; None for all.
      linear: whether only linear sites can be targeted, as always with "all-linear".

    Raises ParaJaxError with the nearest name for an entry that matches nothing.
    """
    if not target_modules:
        raise ParaJaxError(f"target_modules is empty; choose among {', '.join(shape.sites)}")
    total = shape.num_hidden_layers
    for layer in layers or ():
        if not 0 <= layer < total:
            raise ParaJaxError(f"layers_to_transform has layer {layer}; the backbone has layers 0 to {total - 1}")
    only_linear = linear or target_modules == ALL_LINEAR
    sites = shape.linear_sites if only_linear else shape.sites
    if linear and not isinstance(target_modules, str):
        for entry in target_modules:
            if any(names_module(entry, site.path) for name, site in shape.sites.items() if name not in sites):
                raise ParaJaxError(
                    f"target_modules has {entry}, which is the projections of many experts here; their outputs can be "
                    f"scaled (para, ia3) but not added to. Choose among {', '.join(sites)}"
                )
    paths = {
        (i, name): module_path(i, name, shape)
        for i in range(total)
        for name, site in shape.sites_of(i).items()
        if site.linear or not only_linear
    }
    for name, pattern in (("target_modules", target_modules), ("exclude_modules", exclude)):
        _check(name, pattern, list(paths.values()), shape)
    pattern = ".*" if target_modules == ALL_LINEAR else target_modules
    chosen = [
        key
        for key, path in paths.items()
        if matched(pattern, path)
        # PEFT does not check the layer of a module that is named by its full path.
        and (layers is None or key[0] in layers or path in pattern)
        and not (exclude and matched(exclude, path))
    ]
    if not chosen:
        raise ParaJaxError(
            "target_modules with layers_to_transform and exclude_modules leaves no module; choose others"
        )
    return tuple(tuple(site for i, site in chosen if i == layer) for layer in range(total))


def _check(name: str, pattern: str | tuple[str, ...], paths: list[str], shape: BackboneShape) -> None:
    if isinstance(pattern, str):
        if pattern == ALL_LINEAR:
            return
        try:
            found = any(re.fullmatch(pattern, path) for path in paths)
        except re.error as error:
            raise ParaJaxError(f"{name} {pattern!r} is not a regular expression: {error}") from error
        if not found:
            out = "take it out" if name == "exclude_modules" else "correct it"
            raise ParaJaxError(
                f"{name} {pattern!r} is a regular expression that matches no module's full path; they are like "
                f"{paths[0]!r}. Write a list for names: [{pattern!r}], or {out}"
            )
        return
    for entry in pattern:
        if not any(names_module(entry, path) for path in paths):
            raise no_site(entry, shape, name, paths)


def fits_none(option: str, key: str, paths: list[str], shape: BackboneShape) -> ParaJaxError:
    """The error for a pattern of `rank_pattern` or `alpha_pattern` that matches no targeted module's path."""
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    near = [] if key in shape.sites else difflib.get_close_matches(key, [*names, *paths], n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ParaJaxError(
        f"{option} has {key!r}, which matches no targeted module{hint} They are like {paths[0]!r}. Take it out, or "
        "target what it names"
    )


def as_patterns(value: str | Iterable[str], option: str = "target_modules") -> str | tuple[str, ...]:
    """Modules as stored in a config: a string, or a tuple. Raises ParaJaxError for a repeated name."""
    return value if isinstance(value, str) else as_targets(value, option)
