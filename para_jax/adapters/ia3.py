"""(IA)3, infused adapters that inhibit and amplify (Liu et al., arXiv 2205.05638), with PEFT's options.

    y' = l * y        for the output of a projection, or l * x for the input of the feed-forward's last projection

The vectors are the same for every prompt. The input of down_proj is the elementwise product of up_proj's output and the
gate, so scaling this input is the same as scaling up_proj's output. Without a gate, the input itself is scaled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from para_jax.adapters.method import BackboneShape, Joint, Place, Prompt, Tensors, sites_by_name, targeted_arrays
from para_jax.adapters.targets import as_patterns, matched, module_path, resolve
from para_jax.adjustment import Adjustment
from para_jax.annotations import Array, Float, Int
from para_jax.compat import Dict
from para_jax.errors import ParaJaxError
from para_jax.families.architecture import SITE_AXES, Axes

FEEDFORWARD = "down_proj"
FEEDS, UNGATED_FEEDS = "up_proj", "down_proj.input"
VECTOR = "ia3_l"


@dataclass(frozen=True)
class IA3Config:
    """Hyper-parameters of (IA)3, with PEFT's names.

    PARA's authors scale Q, K and the up projection: `IA3Config(target_modules=("q_proj", "k_proj", "up_proj"),
    feedforward_modules=())`.

    Attributes:
      target_modules, exclude_modules: as in `LoraConfig`.
      feedforward_modules: the targets whose input is scaled instead of their output: down_proj or none.
      projection: if not 0, the length of a short vector that a learned matrix projects to a layer's vectors, to match
        the size of another method. PEFT does not have this option; a saved adapter has the resulting vectors.

    Raises ParaJaxError for an invalid value.

    >>> from para_jax import BackboneConfig, tiny_backbone_path
    >>> IA3Config().size(BackboneConfig.from_pretrained(tiny_backbone_path()))
    3840
    """

    method: ClassVar[str] = "ia3"
    reads_prompt: ClassVar[bool] = False
    dropout: ClassVar[float] = 0.0
    peft_type: ClassVar[str] = "IA3"
    peft_lacks: ClassVar[tuple[str, ...]] = ("projection",)
    peft_requires: ClassVar[tuple[str, ...]] = ("target_modules", "feedforward_modules")
    peft_choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    target_modules: str | tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    feedforward_modules: str | tuple[str, ...] = ("down_proj",)
    exclude_modules: str | tuple[str, ...] = ()
    projection: int = 0

    def __post_init__(self) -> None:
        for name in ("target_modules", "feedforward_modules", "exclude_modules"):
            object.__setattr__(self, name, as_patterns(getattr(self, name), name))
        if not isinstance(self.projection, int) or isinstance(self.projection, bool) or self.projection < 0:
            raise ParaJaxError(f"projection must be a whole number from 0, not {self.projection!r}")
        targets, forward = self.target_modules, self.feedforward_modules
        if not isinstance(targets, str) and not isinstance(forward, str):
            outside = [name for name in forward if name not in targets]
            if outside:
                raise ParaJaxError(
                    f"feedforward_modules has {', '.join(outside)}, which target_modules lacks; add it there, or "
                    "leave it out here"
                )

    @property
    def decays_to(self) -> float:
        """1, where vectors are the identity; 0 with a projection, whose output is added to one."""
        return 0.0 if self.projection else 1.0

    def modules(self, shape: BackboneShape) -> tuple[Mapping[str, None], ...]:
        return _modules(self, shape)

    def layer(self, shape: BackboneShape, rngs: nnx.Rngs, layer: Int[Array, ""] | int = 0) -> IA3Layer:
        return IA3Layer(self, shape, rngs)

    def size(self, shape: BackboneShape) -> int:
        modules = self.modules(shape)
        if not self.projection:
            return sum(_width(site, self, shape, layer) for layer, sites in enumerate(modules) for site in sites)
        # The matrix of a layer covers every site of its shape that any layer targets.
        targeted = {site for layer in modules for site in layer}
        return self.projection * sum(
            1 + sum(_width(site, self, shape, layer) for site in targeted if site in shape.sites_of(layer))
            for layer in range(shape.num_hidden_layers)
        )

    @classmethod
    def usual(cls, shape: BackboneShape) -> Mapping[str, IA3Config]:
        """PEFT's targets, except for experts, whose inputs cannot be scaled; and those of PARA's authors."""
        found = {"ia3 k, v, down (PEFT's)": cls()} if FEEDFORWARD in shape.linear_sites else {}
        return found | {"ia3 q, k, up": cls(("q_proj", "k_proj", "up_proj"), feedforward_modules=())}

    def axes(self, name: str) -> Axes:
        """The axes of `vectors.SITE` (outputs,). down_proj's may scale inputs and is never sharded."""
        site = name.rpartition(".")[2]
        return (SITE_AXES[site][1],) if site in SITE_AXES and site != FEEDFORWARD else ()

    # PEFT's form: one ia3_l for each module.

    def places(self, layer: int, site: str, shape: BackboneShape) -> dict[str, Place]:
        """One module's ia3_l (outputs, 1), or (1, inputs) if its input is scaled."""
        inputs, outputs = shape.sites_of(layer)[site][:2]
        size = (1, inputs) if is_input(site, self, shape) else (outputs, 1)
        return {VECTOR: Place(f"vectors.{site}", (layer,), size)}

    def in_peft(self, layers: IA3Layer, leaves: Tensors) -> tuple[IA3Config, Tensors]:
        """Replaces a projection by the vectors that it makes."""
        if not self.projection:
            return self, leaves
        vectors: dict[str, np.ndarray] = {}
        for name, stack in layers.items() if isinstance(layers, dict) else [("", layers)]:
            offsets = jax.vmap(lambda layer: layer.offsets())(stack)
            at = f"{name}." if name else ""
            vectors |= {f"{at}vectors.{site}": 1 + np.asarray(x) for site, x in offsets.items()}
        return replace(self, projection=0), vectors

    def peft_options(self) -> dict[str, Any]:
        """All fields except `projection`."""
        return {key: value for key, value in asdict(self).items() if key not in self.peft_lacks}

    def of_modules(self, modules: Sequence[Mapping[str, None]], shape: BackboneShape) -> IA3Config:
        targets, last = sites_by_name(modules, shape), _last(shape)
        forward = any(last in layer for layer in modules) and bool(self.feedforward_modules)
        scaled_inputs = tuple(target for target in targets if forward and last in target)
        return replace(self, target_modules=targets, exclude_modules=(), feedforward_modules=scaled_inputs)

    def joined(self, joint: Joint, parts: Mapping[str, Tensors]) -> tuple[None, Tensors]:
        """Concatenates the vectors of all sites, with ones for a site without a vector."""
        if len(joint.rows) == 1:
            return None, dict(next(iter(parts.values())))
        vector = np.ones((joint.outputs, 1), np.float32)
        for site, part in parts.items():
            vector[joint.rows[site]] = part[VECTOR]
        return None, {VECTOR: vector}

    def cut(self, joint: Joint, tensors: Tensors) -> dict[str, Tensors] | None:
        if VECTOR not in tensors:
            return None
        if len(joint.rows) == 1:
            return {site: dict(tensors) for site in joint.sites}
        return {site: {VECTOR: tensors[VECTOR][joint.rows[site]]} for site in joint.sites}

    def merged(self, weight: np.ndarray, tensors: Tensors, module: None) -> np.ndarray:
        """Multiplies W's rows by the vector, or its columns if the input is scaled."""
        vector = tensors[VECTOR]
        if weight.ndim == 1:  # a bias does not change when the input is scaled
            return weight if vector.shape[0] == 1 else weight * vector[:, 0]
        return weight * vector


def is_input(site: str, config: IA3Config, shape: BackboneShape) -> bool:
    """Whether the input of this site is scaled, instead of its output."""
    layers = [i for i in range(shape.num_hidden_layers) if site in shape.sites_of(i)]
    return any(_feeds(config, module_path(i, site, shape)) for i in layers)


def _feeds(config: IA3Config, path: str) -> bool:
    """Whether feedforward_modules has this module. PEFT matches the end of the path, with or without a dot before."""
    forward = config.feedforward_modules
    return matched(forward, path) if isinstance(forward, str) else path.endswith(forward)


def _last(shape: BackboneShape) -> str:
    """The feed-forward's last projection, by the name that it has in this shape."""
    modules = getattr(shape, "parts", {})
    return next((name for name, sites in modules.items() if sites == (FEEDFORWARD,)), FEEDFORWARD)


def _width(site: str, config: IA3Config, shape: BackboneShape, layer: int) -> int:
    inputs, outputs = shape.sites_of(layer)[site][:2]
    return inputs if is_input(site, config, shape) else outputs


@lru_cache(maxsize=256)
def _modules(config: IA3Config, shape: BackboneShape) -> tuple[Mapping[str, None], ...]:
    layers = resolve(config.target_modules, shape, exclude=config.exclude_modules)
    paths = [module_path(i, site, shape) for i, sites in enumerate(layers) for site in sites]
    forward, last = config.feedforward_modules, _last(shape)
    for entry in (forward,) if isinstance(forward, str) else forward:
        if not any(matched(entry if isinstance(forward, str) else (entry,), path) for path in paths):
            raise ParaJaxError(
                f"feedforward_modules has {entry!r}, which is not one of the targeted modules; leave it out"
            )
    for site in {site for sites in layers for site in sites}:
        if is_input(site, config, shape) and site != last:
            raise ParaJaxError(
                f"feedforward_modules has {site}; only {last}'s input can be scaled. "
                f"Take {site} out of it to scale its output"
            )
    for path in paths:
        if path.endswith(last) and _feeds(config, path) != is_input(last, config, shape):
            raise ParaJaxError(
                f"feedforward_modules has {last} in some of the targeted layers and not in others, such as "
                f"{path}; name {last} for all"
            )
    return tuple(dict.fromkeys(sites) for sites in layers)


class IA3Layer(nnx.Module):
    """The vectors of one layer of one tenant, in float32: `vectors` (features,) for each site, initially ones.

    With a projection: `short` (p,) and `matrix` (p, sum of features). The vectors are 1 + short @ matrix.
    """

    def __init__(self, config: IA3Config, shape: BackboneShape, rngs: nnx.Rngs):
        self.config = config
        self.modules = tuple(tuple(sites) for sites in config.modules(shape))
        self.sites = tuple(site for site in shape.sites if any(site in layer for layer in self.modules))
        feeds = FEEDS if "gate_proj" in shape.sites else UNGATED_FEEDS
        self.scaled = {site: feeds if is_input(site, config, shape) else site for site in self.sites}
        own = {site: shape.sites[site] for site in self.sites}
        self.widths = tuple(x.inputs if is_input(site, config, shape) else x.outputs for site, x in own.items())
        if config.projection:
            self.short = nnx.Param(jax.random.normal(rngs.params(), (config.projection,), jnp.float32))
            self.matrix = nnx.Param(jnp.zeros((config.projection, sum(self.widths)), jnp.float32))
        else:
            self.vectors = Dict(
                {s: nnx.Param(jnp.ones((w,), jnp.float32)) for s, w in zip(self.sites, self.widths, strict=True)}
            )

    def prepare(self, prompt: Prompt, layer: Int[Array, ""] | int = 0) -> Adjustment:
        """Returns this layer's vectors. The prompt is not read."""
        offsets: dict[str, Array] = {}
        for site, offset in targeted_arrays(self.offsets(), self.modules, layer).items():
            at = self.scaled[site]
            # up_proj's output may be scaled by two vectors: its own, and the one of down_proj's input.
            offsets[at] = offsets[at] + offset + offsets[at] * offset if at in offsets else offset
        return Adjustment(offsets)

    def offsets(self) -> dict[str, Float[Array, " features"]]:
        """Each site's vector minus one."""
        if not self.config.projection:
            return {site: self.vectors[site][...] - 1 for site in self.sites}
        ends = np.cumsum(self.widths)[:-1].tolist()
        return dict(zip(self.sites, jnp.split(self.short[...] @ self.matrix[...], ends), strict=True))
