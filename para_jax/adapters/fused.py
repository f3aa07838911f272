"""Fused projections: what PEFT knows as one module, Phi-3's qkv_proj or gate_up_proj, is several sites here.

The outputs of such a module are its sites' outputs, end to end. (IA)3's vectors are as well, with ones where a site has
none. LoRA's A are stacked and its B are the blocks of a diagonal; sites that have one A, as PEFT's adapters do, share
its rows:

    q and v apart:   [B_q  0 ]  [A_q]            q, k and v of one A:   [B_q]
                     [ 0   0 ]  [A_v]                                   [B_k] A
                     [ 0  B_v]                                          [B_v]

A module has one scale, and one rank for what it is joined of; where its sites' scales differ, B takes up the ratio.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from para_jax.adapters.method import BackboneShape, Joint, PeftMethod, Tensors
from para_jax.adapters.targets import peft_path
from para_jax.families.architecture import Site


@dataclass(frozen=True)
class Fused:
    """The shape of a backbone with the projections that transformers has; `apart` is the one with ours.

    >>> from para_jax import BackboneConfig
    >>> fused = Fused(BackboneConfig(32, 8, 16, 1, 2, 1, 4, family="phi3"))
    >>> fused.parts["qkv_proj"], fused.sites["qkv_proj"].outputs
    (('q_proj', 'k_proj', 'v_proj'), 16)
    """

    apart: BackboneShape

    @property
    def hidden_size(self) -> int:
        return self.apart.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.apart.num_hidden_layers

    @cached_property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """The sites of each module, in the order of its outputs."""
        found: dict[str, tuple[str, ...]] = {}
        for name, site in self.apart.sites.items():
            module = site.fused.rpartition(".")[2] or name
            found[module] = (*found.get(module, ()), name)
        return found

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        found = {}
        for module, parts in self.parts.items():
            sites = [self.apart.sites[part] for part in parts]
            outputs = sum(site.outputs for site in sites)
            found[module] = sites[0]._replace(outputs=outputs, path=sites[0].fused or sites[0].path, fused="")
        return found

    @property
    def linear_sites(self) -> Mapping[str, Site]:
        return {name: site for name, site in self.sites.items() if site.linear}

    def rows(self, module: str) -> dict[str, slice]:
        """The outputs of each of its sites among the module's."""
        ends = np.cumsum([0, *(self.apart.sites[part].outputs for part in self.parts[module])]).tolist()
        return {part: slice(*ends[i : i + 2]) for i, part in enumerate(self.parts[module])}


def as_transformers(shape: BackboneShape) -> Fused | None:
    """The shape with transformers' projections, or None if they are those that there are here."""
    return Fused(shape) if any(site.fused for site in shape.sites.values()) else None


def join(config: PeftMethod, tensors: Tensors, view: Fused) -> tuple[PeftMethod, dict[str, np.ndarray]]:
    """An adapter of sites as one of the modules of `view`: its config, and its tensors by PEFT's names."""
    joined: dict[str, np.ndarray] = {}
    modules: list[dict[str, Any]] = [{} for _ in range(view.num_hidden_layers)]
    for joint in _joints(config, view):
        parts = {site: _of_module(tensors, config, joint.layer, site, view.apart) for site in joint.sites}
        if joint.module in joint.sites:  # not fused
            module, own = joint.sites[joint.module], parts[joint.module]
        else:
            module, own = config.joined(joint, parts)
        modules[joint.layer][joint.module] = module
        at = peft_path(joint.layer, joint.module, view)
        joined |= {f"{at}.{name}": x for name, x in own.items()}
    return config.of_modules(modules, view), joined


def split(
    config: PeftMethod, tensors: Tensors, view: Fused, kept: PeftMethod | None = None
) -> tuple[PeftMethod, dict[str, np.ndarray]]:
    """An adapter of modules of `view` as one of sites; inverse of `join`.

    With `kept`, the config of what was joined, it comes apart into that. If these tensors were not joined of that, and
    without it, all sites of a module are adapted and have the module's A.
    """
    if kept is not None and (cut := _cut(kept, tensors, view)) is not None:
        again, joined = join(kept, cut, view)
        # Nothing may be left out: all else is what makes no change.
        nothing = kept.decays_to
        if again == config and all(np.array_equal(joined[k] == nothing, x == nothing) for k, x in tensors.items()):
            return kept, cut
    modules = [
        {site: found for module, found in own.items() for site in view.parts[module]} for own in config.modules(view)
    ]
    config = config.of_modules(modules, view.apart)
    cut = _cut(config, tensors, view)
    assert cut is not None
    return config, cut


def _cut(config: PeftMethod, tensors: Tensors, view: Fused) -> dict[str, np.ndarray] | None:
    """The tensors of a config of sites from those of modules; None if they have not the modules or ranks for it."""
    found: dict[str, np.ndarray] = {}
    for joint in _joints(config, view):
        own = {
            name: tensors[key]
            for name in config.places(joint.layer, next(iter(joint.sites)), view.apart)
            if (key := f"{peft_path(joint.layer, joint.module, view)}.{name}") in tensors
        }
        parts = {joint.module: own} if own and joint.module in joint.sites else config.cut(joint, own)
        if parts is None:
            return None
        for site, of in parts.items():
            found |= {f"{peft_path(joint.layer, site, view.apart)}.{name}": x for name, x in of.items()}
    return found


def _joints(config: PeftMethod, view: Fused) -> Iterator[Joint]:
    """What a config of sites adapts of the modules of `view`."""
    for layer, own in enumerate(config.modules(view.apart)):
        for module, parts in view.parts.items():
            if sites := {site: own[site] for site in parts if site in own}:
                yield Joint(layer, module, sites, view.rows(module), view.sites[module].outputs)


def _of_module(tensors: Tensors, config: PeftMethod, layer: int, site: str, shape: BackboneShape) -> Tensors:
    """The tensors of one module, by what their names have behind its path."""
    at = peft_path(layer, site, shape)
    return {name: tensors[f"{at}.{name}"] for name in config.places(layer, site, shape)}
