"""Bias vectors after BitFit (Ben Zaken, Ravfogel and Goldberg, ACL 2022, arXiv 2106.10199).

    y' = y + b        for the output of each targeted projection

BitFit trains the biases that a model has and nothing else. Llama and most of its relatives have none, so here every
targeted projection gets a vector for each tenant, which is added to the backbone's own bias if there is one. It is the
same for every prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import jax.numpy as jnp
from flax import nnx

from para_jax.adapters.method import BackboneShape, Prompt, of_layer
from para_jax.adapters.targets import ALL_LINEAR, as_patterns, resolve
from para_jax.adjustment import Adjustment
from para_jax.compat import Dict
from para_jax.families.architecture import SITE_AXES, Axes

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Int


@dataclass(frozen=True)
class BiasConfig:
    """Hyper-parameters of bias vectors.

    PEFT has no such method: the biases of its LoRA (`bias="all"`) are the model's own.

    Attributes:
      target_modules, exclude_modules: as in `LoraConfig`. BitFit's smaller variant, the queries and the first
        projection of the feed-forward, is `("q_proj", "up_proj")`.

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
        """The targeted sites of each layer. Raises ParaJaxError for a target that matches nothing."""
        layers = resolve(self.target_modules, shape, exclude=self.exclude_modules, linear=True)
        return tuple(dict.fromkeys(sites) for sites in layers)

    def layer(self, shape: BackboneShape, rngs: nnx.Rngs, layer: Int[Array, ""] | int = 0) -> BiasLayer:
        """Fresh vectors of one layer; all layers are alike."""
        return BiasLayer(self, shape)

    def size(self, shape: BackboneShape) -> int:
        """The number of parameters."""
        return sum(shape.sites[site].outputs for own in self.modules(shape) for site in own)

    @classmethod
    def usual(cls, shape: BackboneShape) -> Mapping[str, BiasConfig]:
        """All of them, and the paper's smaller variant where one matmul is the feed-forward's first."""
        small = {"bias q, up": cls(("q_proj", "up_proj"))} if "up_proj" in shape.linear_sites else {}
        return {"bias, all linear": cls(), **small}

    def axes(self, name: str) -> Axes:
        """Of `bias.SITE` (outputs,): split as the site's outputs are."""
        site = name.rpartition(".")[2]
        return (SITE_AXES[site][1],) if site in SITE_AXES else ()


class BiasLayer(nnx.Module):
    """The vectors of one layer of one tenant, float32: for each site `bias` (outputs,), zeros at first."""

    def __init__(self, config: BiasConfig, shape: BackboneShape):
        self.modules = tuple(tuple(own) for own in config.modules(shape))
        self.bias = Dict(
            {
                site: nnx.Param(jnp.zeros((of.outputs,), jnp.float32))
                for site, of in shape.sites.items()
                if any(site in own for own in self.modules)
            }
        )

    def prepare(self, prompt: Prompt, layer: Int[Array, ""] | int = 0) -> Adjustment:
        """Hands on this layer's vectors. The prompt is not read."""
        own = {site: bias[...] for site, bias in self.bias.items()}
        return Adjustment(shifts=of_layer(own, self.modules, layer))
