"""Bias vectors after BitFit (Ben Zaken, Ravfogel and Goldberg, ACL 2022, arXiv 2106.10199).

    y' = y + b        for the output of each targeted projection

BitFit trains only the biases of a model. Llama and most similar models have none, so here every targeted projection
gets a vector for each tenant. It is added to the output, after the backbone's own bias if there is one, and is the same
for every prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from para_jax.adapters.method import BackboneShape, Prompt, targeted_arrays
from para_jax.adapters.targets import ALL_LINEAR, as_patterns, resolve
from para_jax.adjustment import Adjustment
from para_jax.annotations import Array, Int
from para_jax.compat import Dict
from para_jax.families.architecture import SITE_AXES, Axes


@dataclass(frozen=True)
class BiasConfig:
    """Hyper-parameters of bias vectors.

    PEFT does not have this method: `bias="all"` of its LoRA trains the model's own biases.

    Attributes:
      target_modules, exclude_modules: as in `LoraConfig`. `("q_proj", "up_proj")` is BitFit's smaller variant: the
        queries and the first projection of the feed-forward.

    >>> from para_jax import BackboneConfig, tiny_backbone_path
    >>> BiasConfig().size(BackboneConfig.from_pretrained(tiny_backbone_path()))
    9728
    """

    method: ClassVar[str] = "bias"
    reads_prompt: ClassVar[bool] = False
    decays_to: ClassVar[float] = 0.0
    dropout: ClassVar[float] = 0.0
    peft_type: ClassVar[str] = ""

    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, as_patterns(getattr(self, name), name))

    def modules(self, shape: BackboneShape) -> tuple[Mapping[str, None], ...]:
        layers = resolve(self.target_modules, shape, exclude=self.exclude_modules, linear=True)
        return tuple(dict.fromkeys(sites) for sites in layers)

    def layer(self, shape: BackboneShape, rngs: nnx.Rngs, layer: Int[Array, ""] | int = 0) -> BiasLayer:
        return BiasLayer(self, shape)

    def size(self, shape: BackboneShape) -> int:
        return sum(shape.sites_of(i)[site].outputs for i, layer in enumerate(self.modules(shape)) for site in layer)

    @classmethod
    def usual(cls, shape: BackboneShape) -> Mapping[str, BiasConfig]:
        """All linear sites, and the paper's smaller variant if `up_proj` is a linear site."""
        small = {"bias q, up": cls(("q_proj", "up_proj"))} if "up_proj" in shape.linear_sites else {}
        return {"bias, all linear": cls(), **small}

    def axes(self, name: str) -> Axes:
        """The axes of `bias.SITE` (outputs,): sharded like the site's outputs."""
        site = name.rpartition(".")[2]
        return (SITE_AXES[site][1],) if site in SITE_AXES else ()


class BiasLayer(nnx.Module):
    """The vectors of one layer of one tenant, in float32: `bias` (outputs,) for each site, initially zero."""

    def __init__(self, config: BiasConfig, shape: BackboneShape):
        self.modules = tuple(tuple(layer) for layer in config.modules(shape))
        self.bias = Dict(
            {
                name: nnx.Param(jnp.zeros((site.outputs,), jnp.float32))
                for name, site in shape.sites.items()
                if any(name in layer for layer in self.modules)
            }
        )

    def prepare(self, prompt: Prompt, layer: Int[Array, ""] | int = 0) -> Adjustment:
        """Returns this layer's vectors. The prompt is not read."""
        shifts = {site: bias[...] for site, bias in self.bias.items()}
        return Adjustment(shifts=targeted_arrays(shifts, self.modules, layer))
