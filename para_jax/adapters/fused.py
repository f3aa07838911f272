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

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from para_jax.adapters.ia3 import FEEDFORWARD, IA3Config, is_input
from para_jax.adapters.lora import LoraConfig, Module
from para_jax.adapters.method import BackboneShape
from para_jax.adapters.targets import peft_path
from para_jax.families.architecture import Site

Config = LoraConfig | IA3Config
Tensors = Mapping[str, np.ndarray]


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


class Joint(NamedTuple):
    """A module of one layer, and those of its sites that are adapted: for LoRA with rank and scale, else with None."""

    layer: int
    module: str
    sites: Mapping[str, Module | None]

    @property
    def pairs(self) -> dict[str, Module]:
        return {site: pair for site, pair in self.sites.items() if pair is not None}

    @property
    def alike(self) -> bool:
        """Whether the sites could have one A."""
        return len(set(self.pairs.values())) == 1

    @property
    def leading(self) -> Module:
        """The rank and scale of the site whose scale is largest, which is the module's."""
        return max(self.pairs.values(), key=lambda pair: abs(pair.scale))

    def columns(self, rank: int) -> dict[str, slice] | None:
        """What each site has of the module's rank: all of one A, or a share of it. None if there is no such rank."""
        ranks = [pair.rank for pair in self.pairs.values()]
        if self.alike and rank == ranks[0]:
            return dict.fromkeys(self.pairs, slice(rank))
        ends = np.cumsum([0, *ranks]).tolist()
        return {site: slice(*ends[i : i + 2]) for i, site in enumerate(self.pairs)} if rank == ends[-1] else None

    def ratio(self, site: str) -> np.float32:
        """What B is multiplied by for the module's scale to serve this site."""
        return np.float32(self.pairs[site].scale / self.leading.scale if self.leading.scale else 1)


def join(config: Config, tensors: Tensors, view: Fused) -> tuple[Config, dict[str, np.ndarray]]:
    """An adapter of sites as one of the modules of `view`: its config, and its tensors by PEFT's names."""
    joined: dict[str, np.ndarray] = {}
    modules: list[dict[str, Module | None]] = [{} for _ in range(view.num_hidden_layers)]
    for joint in _joints(config, view):
        layer, module, sites = joint
        at, rows, outputs = peft_path(layer, module, view), view.rows(module), view.sites[module].outputs
        of = {site: peft_path(layer, site, view.apart) for site in sites}
        if isinstance(config, LoraConfig):
            downs = [tensors[f"{path}.lora_A.weight"] for path in of.values()]
            shared = joint.alike and all(np.array_equal(down, downs[0]) for down in downs)
            down = downs[0] if shared else np.concatenate(downs)
            up = np.zeros((outputs, len(down)), np.float32)
            for site, columns in (joint.columns(len(down)) or {}).items():
                up[rows[site], columns] = tensors[f"{of[site]}.lora_B.weight"] * joint.ratio(site)
            joined |= {f"{at}.lora_A.weight": down, f"{at}.lora_B.weight": up}
            modules[layer][module] = _of_rank(len(down), joint.leading, config.use_rslora)
        else:
            modules[layer][module] = None
            if module in sites:  # not fused, and perhaps a vector of the input
                joined[f"{at}.ia3_l"] = tensors[f"{of[module]}.ia3_l"]
                continue
            joined[f"{at}.ia3_l"] = np.ones((outputs, 1), np.float32)
            for site, path in of.items():
                joined[f"{at}.ia3_l"][rows[site]] = tensors[f"{path}.ia3_l"]
    return by_name(config, modules, view), joined


def split(
    config: Config, tensors: Tensors, view: Fused, kept: Config | None = None
) -> tuple[Config, dict[str, np.ndarray]]:
    """An adapter of modules of `view` as one of sites; inverse of `join`.

    With `kept`, the config of what was joined, it comes apart into that. If these tensors were not joined of that, and
    without it, all sites of a module are adapted and have the module's A.
    """
    if kept is not None and (cut := _cut(kept, tensors, view)) is not None:
        again, joined = join(kept, cut, view)
        # Nothing may be left out: all else is zero, or one.
        nothing = 0 if isinstance(kept, LoraConfig) else 1
        if again == config and all(np.array_equal(joined[k] == nothing, x == nothing) for k, x in tensors.items()):
            return kept, cut
    modules = [
        {site: pair for module, pair in own.items() for site in view.parts[module]} for own in modules_of(config, view)
    ]
    config = by_name(config, modules, view.apart)
    cut = _cut(config, tensors, view)
    assert cut is not None
    return config, cut


def _cut(config: Config, tensors: Tensors, view: Fused) -> dict[str, np.ndarray] | None:
    """The tensors of a config of sites from those of modules; None if they have not the modules or ranks for it."""
    found: dict[str, np.ndarray] = {}
    for joint in _joints(config, view):
        layer, module, sites = joint
        at, rows = peft_path(layer, module, view), view.rows(module)
        of = {site: peft_path(layer, site, view.apart) for site in sites}
        if isinstance(config, LoraConfig):
            down, up = (tensors.get(f"{at}.{half}.weight") for half in ("lora_A", "lora_B"))
            columns = None if down is None else joint.columns(len(down))
            if down is None or up is None or columns is None:
                return None
            for site, own in columns.items():
                ratio = joint.ratio(site)
                found[f"{of[site]}.lora_A.weight"] = down[own]
                found[f"{of[site]}.lora_B.weight"] = up[rows[site], own] / (ratio or 1)
        else:
            vector = tensors.get(f"{at}.ia3_l")
            if vector is None:
                return None
            found |= {f"{path}.ia3_l": vector if module in sites else vector[rows[site]] for site, path in of.items()}
    return found


def modules_of(config: Config, shape: BackboneShape) -> list[dict[str, Module | None]]:
    """The modules of each layer, for LoRA with rank and scale, else with None."""
    return [dict(own) if isinstance(own, Mapping) else dict.fromkeys(own) for own in config.modules(shape)]


def _joints(config: Config, view: Fused) -> Iterator[Joint]:
    """What a config of sites adapts of the modules of `view`."""
    for layer, own in enumerate(modules_of(config, view.apart)):
        for module, parts in view.parts.items():
            if sites := {site: own[site] for site in parts if site in own}:
                yield Joint(layer, module, sites)


def _of_rank(rank: int, pair: Module, rank_stabilised: bool) -> Module:
    """The same scale with another rank."""
    if rank == pair.rank:
        return pair
    alpha = pair.alpha * math.sqrt(rank / pair.rank) if rank_stabilised else pair.alpha * rank / pair.rank
    return Module(rank, int(alpha) if alpha == int(alpha) else alpha, pair.scale)


def by_name(config: Config, modules: Sequence[Mapping[str, Module | None]], shape: BackboneShape) -> Config:
    """A config like this one of these modules of each layer: their names, or paths where layers differ."""
    sites = [site for site in shape.sites if any(site in own for own in modules)]
    alike = all(len(own) == len(sites) for own in modules)
    places = [(i, site) for i, own in enumerate(modules) for site in sites if site in own]

    def path(layer: int, site: str) -> str:
        return f"layers.{layer}.{shape.sites[site].path}"

    options: dict[str, Any] = {"target_modules": tuple(sites if alike else [path(*place) for place in places])}
    options["exclude_modules"] = ()
    if isinstance(config, IA3Config):
        forward = FEEDFORWARD in sites and is_input(FEEDFORWARD, config, shape)
        options["feedforward_modules"] = tuple(x for x in options["target_modules"] if forward and FEEDFORWARD in x)
        return replace(config, **options)

    for name, usual, others in (("rank", "r", "rank_pattern"), ("alpha", "lora_alpha", "alpha_pattern")):
        values = {(layer, site): getattr(modules[layer][site], name) for layer, site in places}
        options[usual] = Counter(values.values()).most_common(1)[0][0]
        options[others] = {
            site if all(v == value for (_, other), v in values.items() if other == site) else path(layer, site): value
            for (layer, site), value in values.items()
            if value != options[usual]
        }
    return replace(config, **options, layers_to_transform=None)
