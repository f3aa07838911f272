"""Reads and writes LoRA and (IA)3 adapters in the format of Hugging Face's PEFT, so that `peft` opens them too.

One table (`places`) maps PEFT's tensors to parts of our arrays, for both loading and saving. The meaning of PEFT's
config follows PEFT's source (0.21). Unsupported options are refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np

from para_jax.adapters.adapter import Adapter, abstract_layers, named_leaves
from para_jax.adapters.fit import MERGE, Case, check_fits
from para_jax.adapters.fused import as_transformers, join, split
from para_jax.adapters.method import OUTSIDE, BackboneShape, PeftMethod, Place
from para_jax.adapters.names import At, as_peft
from para_jax.adapters.registry import PEFT, config_from_dict
from para_jax.adapters.targets import ALL_LINEAR, matched, module_path, names_module, peft_path
from para_jax.adapters.weights import Weights
from para_jax.adapters.wrapped import at_stem, decoder_entries
from para_jax.errors import ParaJaxError
from para_jax.families.wrappers import Wrapper

# The safetensors metadata key of the config before it was joined to fused projections or moved to a wrapper's modules.
# PEFT does not read it.
METADATA = "para_jax"

# Keys that may have any value: a folder's origin, initialisation, details of options that are refused, and whether
# weights are transposed, which PEFT sees for itself.
NEUTRAL = {
    "peft_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode",
    "init_ia3_weights", "megatron_core", "qalora_group_size", "fan_in_fan_out",
}  # fmt: skip
# PEFT's other methods whose adapters it can merge into the weights.
MERGEABLE = {
    "ADALORA", "BOFT", "FOURIERFT", "GRALORA", "HRA", "LOHA", "LOKR", "LN_TUNING", "MISS", "OFT", "RANDLORA", "SHIRA",
    "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
# Options that cannot be merged either, because they depend on the tokens.
AT_RUN_TIME = {"alora_invocation_tokens", "arrow_config"}
# Keys for which null means none.
OPTIONAL = {"exclude_modules", "rank_pattern", "alpha_pattern", "layers_to_transform"}


def places(config: PeftMethod, shape: BackboneShape) -> dict[str, Place]:
    """The place of each of PEFT's tensors, by name. Raises ParaJaxError for a target that matches nothing.

    >>> from para_jax import BackboneConfig, IA3Config, tiny_backbone_path
    >>> shape = BackboneConfig.from_pretrained(tiny_backbone_path())
    >>> table = places(IA3Config(), shape)
    >>> table["base_model.model.model.layers.1.mlp.down_proj.ia3_l"]
    Place(leaf='vectors.down_proj', part=(1,), shape=(1, 704))
    """
    return {
        f"{peft_path(layer, site, shape)}.{name}": place.in_stack(shape)
        for layer, modules in enumerate(config.modules(shape))
        for site in modules
        for name, place in config.places(layer, site, shape).items()
    }


def in_peft(adapter: Adapter, shape: BackboneShape) -> tuple[PeftMethod, dict[str, np.ndarray]]:
    """The config of a LoRA or (IA)3 adapter in PEFT's form, and its weights by PEFT's names, without padded ranks.

    Weights are float32 and have PEFT's shapes; fused projections are split. (IA)3 with a projection becomes the vectors
    that it makes. Raises ParaJaxError for methods that PEFT does not have.
    """
    if not adapter.config.peft_type:
        method = adapter.config.method
        raise ParaJaxError(f"PEFT does not have method {method!r}; it has {', '.join(PEFT).lower()}")
    method_config: Any = adapter.config
    weights = {name: np.asarray(x) for name, x in adapter.tensors().items()}
    config, leaves = method_config.in_peft(adapter.layers, weights)
    table = places(config, shape)
    # Layers of a lower rank, or without the module, are padded with the identity. Other values there would be lost.
    padding = {name: np.array(x) for name, x in leaves.items()}
    for place in table.values():
        padding[place.leaf][place.part] = config.decays_to
    for name, x in padding.items():
        if np.any(x != config.decays_to):
            half = name.partition(".")[0]
            raise ParaJaxError(f"{half} has weights beyond a module's rank, which must be {config.decays_to:g}")
    return config, {
        name: np.ascontiguousarray(leaves[place.leaf][place.part].reshape(place.shape)) for name, place in table.items()
    }


def to_peft(
    adapter: Adapter, shape: BackboneShape, wrapper: Wrapper | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """A LoRA or (IA)3 adapter as PEFT's two files: the fields of adapter_config.json, the tensors and their metadata.

    With `wrapper`, paths are those of the wrapper's decoder. Raises ParaJaxError for methods that PEFT does not have.
    """
    metadata = {"format": "pt"}
    config, tensors = in_peft(adapter, shape)
    if (view := as_transformers(shape)) is not None:
        metadata[METADATA] = json.dumps(asdict(config))
        config, tensors = join(config, tensors, view)
    if wrapper is not None:
        metadata.setdefault(METADATA, json.dumps(asdict(config)))
        config, tensors = at_stem(config, tensors, view or shape, wrapper.stem)
    return peft_config(config, shape), tensors, metadata


def peft_config(config: PeftMethod, shape: BackboneShape) -> dict[str, Any]:
    """The adapter_config.json of an adapter. It has only PEFT's keys, because PEFT warns about others."""
    options = config.peft_options()
    return {
        "peft_type": config.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(shape, "name", "") or None,
        "inference_mode": True,
        **options,
        "exclude_modules": options["exclude_modules"] or None,
        "fan_in_fan_out": any(site.transposed for site in shape.sites.values()),
        "modules_to_save": None,
    }


def from_peft(folder: Path, config_fields: Mapping[str, Any], weights: Weights, shape: BackboneShape) -> Adapter:
    """The Adapter in a folder's two files, in float32.

    Raises ParaJaxError, with the folder and the key, for an option of PEFT that is not implemented, for a target that
    matches nothing, and for tensors that do not fit the config and the backbone (all of them are listed).
    """
    made_for = config_fields.get("base_model_name_or_path") or "a base model it does not name"
    view = as_transformers(shape)
    peft_shape = view or shape
    names = as_peft(weights.path, weights.tensors, peft_shape)
    try:
        config = _config_at(decoder_entries(config_fields, peft_shape, names), peft_shape, names.stem)
        table = places(config, peft_shape)
    except ParaJaxError as error:
        raise ParaJaxError(f"{folder} (made for {made_for}): {error}") from error
    except re.error as error:
        raise ParaJaxError(f"{folder}: a pattern in its config is not a regular expression: {error}") from error
    shapes = {name: place.shape for name, place in table.items()}
    check_fits(weights.path, Case(names, shapes, made_for, peft_shape, getattr(shape, "vocab_size", None)))
    tensors: Mapping[str, np.ndarray] = names.tensors
    if view is not None:
        config, tensors = split(config, tensors, view, _kept(weights.metadata, config, shape))
        table = places(config, shape)
    elif (kept := _kept(weights.metadata, config, shape)) and kept.of_modules(kept.modules(shape), shape) == config:
        config = kept
    abstract = abstract_layers(config, shape)
    leaves = {name: np.full(x.shape, config.decays_to, np.float32) for name, x in named_leaves(abstract).items()}
    for name, place in table.items():
        part = leaves[place.leaf][place.part]  # a view of the leaf
        with np.errstate(over="ignore"):  # float64 values may overflow; `refuse_nonfinite` checks them
            part[...] = tensors[name].reshape(part.shape)
    return Adapter(
        config, jax.tree.unflatten(jax.tree.structure(abstract), [jax.device_put(x) for x in leaves.values()])
    )


def _config_at(config_fields: Mapping[str, Any], shape: BackboneShape, stem: str) -> PeftMethod:
    """The config for this shape, from patterns that were written for a model with its layers at `stem`."""
    if stem != shape.layers_path.rpartition(".")[0]:
        at = At(shape, stem)
        with suppress(ParaJaxError):  # if only tensor names lack the prefix, patterns are for the usual one
            config = config_from_peft(config_fields, at)
            return config.of_modules(config.modules(at), at)
    return config_from_peft(config_fields, shape)


def _kept(metadata: Mapping[str, str], config: PeftMethod, shape: BackboneShape) -> Any:
    """The config in the metadata, which `to_peft` writes; None if it is missing or invalid. Callers check it."""
    try:
        kept = config_from_dict(config.method, dict(json.loads(metadata[METADATA])))
        kept.modules(shape)
        return kept
    except (KeyError, TypeError, ValueError):  # ParaJaxError is a ValueError
        return None


def config_from_peft(config_fields: Mapping[str, Any], shape: BackboneShape) -> PeftMethod:
    """The config of PEFT's adapter_config.json.

    Raises ParaJaxError, listing all keys that are not implemented. Null, false, empty and PEFT's defaults pass.

    >>> from para_jax import BackboneConfig, tiny_backbone_path
    >>> shape = BackboneConfig.from_pretrained(tiny_backbone_path())
    >>> written = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "use_dora": False, "bias": "none"}
    >>> config_from_peft(written, shape).r
    4
    """
    kind = PEFT[config_fields["peft_type"].upper()]
    known = {f.name for f in fields(kind)} - {*kind.peft_lacks}
    problems = []
    for key, value in config_fields.items():
        if _refused(key, value, known, kind, shape.layers_path):
            out = "" if key in AT_RUN_TIME else f"{MERGE}, or "
            problems.append(f"{key}={value!r} is not implemented here; {out}tune again without {key}")
    for key in kind.peft_requires:
        if config_fields.get(key) is None:
            problems.append(f"{key} is missing, so that PEFT chooses by the base's architecture; write a list of names")
    targets = config_fields.get("target_modules")
    for entry in targets if isinstance(targets, list) else ():
        if isinstance(entry, str) and entry.rpartition(".")[2] in OUTSIDE:
            problems.append(
                f"target_modules has {entry}, which cannot be adapted here; {MERGE}, or tune again without {entry}"
            )
    if problems:
        raise ParaJaxError("; ".join(problems))
    options = {k: v for k, v in config_fields.items() if k in known and not (v is None and k in OPTIONAL)}
    if str(options["target_modules"]).lower() == ALL_LINEAR:
        options["target_modules"] = ALL_LINEAR
    if options.get("layers_to_transform") == []:
        del options["layers_to_transform"]
    paths = [
        module_path(layer, site, shape) for layer in range(shape.num_hidden_layers) for site in shape.sites_of(layer)
    ]
    if "exclude_modules" in options:
        options["exclude_modules"] = _effective_excludes(options["exclude_modules"], paths)
    return kind(**{key: _ordered(x, paths) if key.endswith("_modules") else x for key, x in options.items()})


def _effective_excludes(patterns: Any, paths: list[str]) -> Any:
    """The entries of exclude_modules that match a path. PEFT's often have lm_head, which is never adapted here."""
    if isinstance(patterns, str):
        return patterns if any(matched(patterns, path) for path in paths) else ()
    if not isinstance(patterns, list):
        return patterns
    return [pattern for pattern in patterns if any(names_module(pattern, path) for path in paths)]


def _ordered(entries: Any, paths: list[str]) -> Any:
    """Entries in the backbone's order. PEFT writes sets in random order; equal configs share a group of the bank."""
    if not isinstance(entries, list):
        return entries
    places = {e: next((i for i, path in enumerate(paths) if names_module(e, path)), len(paths)) for e in entries}
    return tuple(sorted(entries, key=lambda entry: places[entry]))


def _refused(key: str, value: Any, known: set[str], kind: type[PeftMethod], layers_path: str) -> bool:
    """Whether a key of PEFT's config changes the model in a way that is not implemented."""
    if key in NEUTRAL or value is None or value is False or value in ("", [], {}):
        return False
    if key in kind.peft_choices:
        return value not in kind.peft_choices[key]
    if key == "layers_pattern":
        # The name of the list of layers.
        patterns = value if isinstance(value, list) else [value]
        return not any(re.match(rf"(?:^|.*?\.){pattern}\.\d+\.", f"{layers_path}.0.mlp") for pattern in patterns)
    return key not in known and value != {"bias": "none", "task_type": "CAUSAL_LM"}.get(key)
