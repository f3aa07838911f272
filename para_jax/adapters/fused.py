"""Fused projections: one module of transformers, such as Phi-3's qkv_proj or gate_up_proj, is several sites here.

The outputs of such a module are the concatenated outputs of its sites. (IA)3's vectors are concatenated too, with ones
for a site without a vector. LoRA's A are stacked and its B are block-diagonal. If all sites have the same A, as in
PEFT's own adapters, they share it:

    separate q and v:  [B_q  0 ]  [A_q]            q, k and v with one A:  [B_q]
                       [ 0   0 ]  [A_v]                                    [B_k] A
                       [ 0  B_v]                                           [B_v]

A module has one rank and one scale. If the scales of its sites differ, B includes the ratio.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from para_jax.adapters.method import BackboneShape, Joint, PeftMethod, ShapeView, Tensors
from para_jax.adapters.targets import peft_path
from para_jax.families.architecture import Site


@dataclass(frozen=True)
class Fused(ShapeView):
    """The shape of a backbone with transformers' fused projections. `shape` is the one with separate sites.

    >>> from para_jax import BackboneConfig
    >>> fused = Fused(BackboneConfig(32, 8, 16, 1, 2, 1, 4, family="phi3"))
    >>> fused.parts["qkv_proj"], fused.sites["qkv_proj"].outputs
    (('q_proj', 'k_proj', 'v_proj'), 16)
    """

    @property
    def layers_path(self) -> str:
        return getattr(self.shape, "hf_layers", self.shape.layers_path)

    @cached_property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """The sites of each module, in the order of its outputs. A module's name is the end of its path, or all of it
        where a layer has two modules of one name."""
        paths = {name: site.fused or site.path for name, site in self.shape.sites.items()}
        ends = [path.rpartition(".")[2] for path in {*paths.values()}]
        found: dict[str, tuple[str, ...]] = {}
        for name, path in paths.items():
            end = path.rpartition(".")[2]
            module = end if ends.count(end) == 1 else path
            found[module] = (*found.get(module, ()), name)
        return found

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        found = {}
        for module, parts in self.parts.items():
            sites = [self.shape.sites[part] for part in parts]
            outputs = sum(site.outputs for site in sites)
            path = sites[0].fused or sites[0].path
            found[module] = sites[0]._replace(outputs=outputs, path=path, fused="", heads=1)
        return found

    def sites_of(self, layer: int) -> Mapping[str, Site]:
        return self.sites  # the families that fuse projections have one kind of layer

    def rows(self, module: str) -> dict[str, np.ndarray]:
        """The numbers of each site's outputs among those of the module."""
        sites = [self.shape.sites[part] for part in self.parts[module]]
        by_head = np.arange(sum(site.outputs for site in sites)).reshape(sites[0].heads, -1)
        ends = np.cumsum([site.outputs // site.heads for site in sites])[:-1]
        pieces = np.split(by_head, ends, axis=1)
        return {part: x.reshape(-1) for part, x in zip(self.parts[module], pieces, strict=True)}


def as_transformers(shape: BackboneShape) -> Fused | None:
    """The shape with transformers' projections, or None if transformers fuses none."""
    return Fused(shape) if any(site.fused for site in shape.sites.values()) else None


def join(config: PeftMethod, tensors: Tensors, view: Fused) -> tuple[PeftMethod, dict[str, np.ndarray]]:
    """Converts an adapter of sites to one of the modules of `view`: its config, and its tensors by PEFT's names."""
    joined: dict[str, np.ndarray] = {}
    modules: list[dict[str, Any]] = [{} for _ in range(view.num_hidden_layers)]
    for joint in _joints(config, view):
        parts = {site: _module_tensors(tensors, config, joint.layer, site, view.shape) for site in joint.sites}
        if joint.module in joint.sites:  # not fused
            module, module_tensors = joint.sites[joint.module], parts[joint.module]
        else:
            module, module_tensors = config.joined(joint, parts)
        modules[joint.layer][joint.module] = module
        at = peft_path(joint.layer, joint.module, view)
        joined |= {f"{at}.{name}": x for name, x in module_tensors.items()}
    return config.of_modules(modules, view), joined


def split(
    config: PeftMethod, tensors: Tensors, view: Fused, kept: PeftMethod | None = None
) -> tuple[PeftMethod, dict[str, np.ndarray]]:
    """Converts an adapter of modules of `view` to one of sites; the inverse of `join`.

    `kept` is the config before `join`, if it is known. If it does not match these tensors, or is None, all sites of a
    module are adapted and have the module's A.
    """
    if kept is not None and (parts := _cut(kept, tensors, view)) is not None:
        joined_config, joined = join(kept, parts, view)
        # Joining again must give weights in the same places, so that `parts` lacks no weight.
        identity = kept.decays_to
        same = all(np.array_equal(joined[k] == identity, x == identity) for k, x in tensors.items())
        if joined_config == config and same:
            return kept, parts
    modules = [
        {site: settings for module, settings in layer.items() for site in view.parts[module]}
        for layer in config.modules(view)
    ]
    config = config.of_modules(modules, view.shape)
    parts = _cut(config, tensors, view)
    assert parts is not None
    return config, parts


def _cut(config: PeftMethod, tensors: Tensors, view: Fused) -> dict[str, np.ndarray] | None:
    """Splits the tensors of modules into those of a config of sites; None if their modules or ranks do not fit it."""
    found: dict[str, np.ndarray] = {}
    for joint in _joints(config, view):
        module = {
            name: tensors[key]
            for name in config.places(joint.layer, next(iter(joint.sites)), view.shape)
            if (key := f"{peft_path(joint.layer, joint.module, view)}.{name}") in tensors
        }
        parts = {joint.module: module} if module and joint.module in joint.sites else config.cut(joint, module)
        if parts is None:
            return None
        for site, part in parts.items():
            found |= {f"{peft_path(joint.layer, site, view.shape)}.{name}": x for name, x in part.items()}
    return found


def _joints(config: PeftMethod, view: Fused) -> Iterator[Joint]:
    """The modules of `view` that a config of sites adapts, with their adapted sites."""
    for layer, settings in enumerate(config.modules(view.shape)):
        for module, parts in view.parts.items():
            if sites := {site: settings[site] for site in parts if site in settings}:
                yield Joint(layer, module, sites, view.rows(module), view.sites[module].outputs)


def _module_tensors(tensors: Tensors, config: PeftMethod, layer: int, site: str, shape: BackboneShape) -> Tensors:
    """The tensors of one module, by the part of their names after its path."""
    at = peft_path(layer, site, shape)
    return {name: tensors[f"{at}.{name}"] for name in config.places(layer, site, shape)}
