"""LoRA, low-rank adaptation (Hu et al., arXiv 2106.09685), with the options and semantics of PEFT's LoraConfig.

    y' = y + scale * (x A^T) B^T        scale = lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)

Preparing does not read the prompt. It returns the pairs, which are applied to every token.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from para_jax.adapters.method import BackboneShape, Joint, Place, Prompt, Tensors, site_path, sites_by_name
from para_jax.adapters.targets import as_patterns, first_match, fits_none, module_path, resolve
from para_jax.adjustment import Adjustment, LowRank
from para_jax.annotations import Array, Float, Int
from para_jax.compat import Dict
from para_jax.errors import ParaJaxError, unknown
from para_jax.families.architecture import SITE_AXES, Axes

# PEFT's other initialisations start from the backbone's weights or from data, and most change the backbone.
INITIALISATIONS = (True, False, "gaussian", "orthogonal")

# PEFT's names of a pair, after its module's path.
A, B = "lora_A.weight", "lora_B.weight"


class Module(NamedTuple):
    """One targeted projection: the rank, alpha and scale of its pair."""

    rank: int
    alpha: float
    scale: float


@dataclass(frozen=True)
class LoraConfig:
    """Hyper-parameters of LoRA, with PEFT's names and meanings.

    Attributes:
      r, lora_alpha: the rank, and the numerator of the scale.
      target_modules: names of projections, ends of paths or full paths (`layers.3.self_attn.q_proj`). A string is
        "all-linear", or a regular expression for the full path.
      exclude_modules: modules to leave out, in the same forms.
      rank_pattern, alpha_pattern: another r or lora_alpha for modules whose path ends with a regular expression; the
        first match is used.
      use_rslora: divide lora_alpha by sqrt(r) instead of r.
      lora_dropout: the dropout rate of a pair's inputs in training. There is no other dropout.
      init_lora_weights: the initial weights. True: A uniform as in a linear layer, B zero; "gaussian": A from
        N(0, 1 / r), B zero; "orthogonal": A and B random with B A zero, for an even r; False: both random, which is
        not the identity.
      layers_to_transform: the layers that target_modules applies to; None for all.

    Raises ParaJaxError for an invalid value.

    >>> from para_jax import BackboneConfig, tiny_backbone_path
    >>> LoraConfig(r=4, target_modules="all-linear").size(BackboneConfig.from_pretrained(tiny_backbone_path()))
    74752
    """

    method: ClassVar[str] = "lora"
    reads_prompt: ClassVar[bool] = False
    decays_to: ClassVar[float] = 0.0
    peft_type: ClassVar[str] = "LORA"
    peft_lacks: ClassVar[tuple[str, ...]] = ()
    peft_requires: ClassVar[tuple[str, ...]] = ("target_modules",)
    # Most other choices change the base's weights, so the adapter does not fit the base that it names.
    peft_choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"init_lora_weights": INITIALISATIONS}

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | tuple[str, ...] = ("q_proj", "v_proj")
    exclude_modules: str | tuple[str, ...] = ()
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    use_rslora: bool = False
    lora_dropout: float = 0.0
    init_lora_weights: bool | str = True
    layers_to_transform: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, convert in (
            ("target_modules", as_patterns), ("exclude_modules", as_patterns),
            ("rank_pattern", _as_pairs), ("alpha_pattern", _as_pairs),
        ):  # fmt: skip
            object.__setattr__(self, name, convert(getattr(self, name), name))
        if self.layers_to_transform is not None:
            one = isinstance(self.layers_to_transform, int)
            layers = (self.layers_to_transform,) if one else self.layers_to_transform
            if not isinstance(layers, Iterable) or not all(_is_int(layer) for layer in layers):
                raise ParaJaxError(f"layers_to_transform must be numbers of layers, not {self.layers_to_transform!r}")
            object.__setattr__(self, "layers_to_transform", tuple(layers))
            if isinstance(self.target_modules, str):
                raise ParaJaxError("layers_to_transform needs target_modules as a list; put the layers in the pattern")
        for rank in (self.r, *(rank for _, rank in self.rank_pattern)):
            if not _is_int(rank) or rank < 1:
                raise ParaJaxError(f"r and the ranks of rank_pattern must be whole numbers from 1, not {rank!r}")
            if self.init_lora_weights == "orthogonal" and rank % 2:
                raise ParaJaxError(f'init_lora_weights="orthogonal" needs even ranks, not {rank}')
        for alpha in (self.lora_alpha, *(alpha for _, alpha in self.alpha_pattern)):
            if not _is_finite(alpha):
                raise ParaJaxError(f"lora_alpha and the values of alpha_pattern must be numbers, not {alpha!r}")
        if not isinstance(self.use_rslora, bool):
            raise ParaJaxError(f"use_rslora must be true or false, not {self.use_rslora!r}")
        if not _is_finite(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ParaJaxError(f"lora_dropout must be at least 0 and below 1, not {self.lora_dropout!r}")
        # 1 == True, but 1 is not a valid choice.
        if not isinstance(self.init_lora_weights, bool | str) or self.init_lora_weights not in INITIALISATIONS:
            raise unknown("init_lora_weights", self.init_lora_weights, [str(choice) for choice in INITIALISATIONS])

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    def modules(self, shape: BackboneShape) -> tuple[Mapping[str, Module], ...]:
        return _modules(self, shape)

    def layer(self, shape: BackboneShape, rngs: nnx.Rngs, layer: Int[Array, ""] | int = 0) -> LoraLayer:
        return LoraLayer(self, shape, rngs, layer)

    def size(self, shape: BackboneShape) -> int:
        return sum(
            module.rank * sum(shape.sites_of(layer)[site][:2])
            for layer, modules in enumerate(self.modules(shape))
            for site, module in modules.items()
        )

    @classmethod
    def usual(cls, shape: BackboneShape) -> Mapping[str, LoraConfig]:
        """Three ranks, on the queries and values or on all linear modules."""
        targets: dict[str, Any] = {"q and v": ("q_proj", "v_proj"), "all linear": "all-linear"}
        return {
            f"lora r={r}, {name}": LoraConfig(r=r, target_modules=target)
            for name, target in targets.items()
            for r in (8, 16, 64)
        }

    def axes(self, name: str) -> Axes:
        """The axes of `down.SITE` (r, inputs) and `up.SITE` (outputs, r)."""
        *_, half, site = ["", *name.split(".")]
        if site not in SITE_AXES:
            return ()
        inputs, outputs = SITE_AXES[site]
        return (None, inputs) if half == "down" else (outputs, None)

    # PEFT's form: lora_A is `down`, lora_B is `up`, each with the module's rank.

    def places(self, layer: int, site: str, shape: BackboneShape) -> dict[str, Place]:
        """One module's lora_A (r, inputs) and lora_B (outputs, r)."""
        rank, (inputs, outputs) = self.modules(shape)[layer][site].rank, shape.sites_of(layer)[site][:2]
        return {
            A: Place(f"down.{site}", np.s_[layer, :rank], (rank, inputs)),
            B: Place(f"up.{site}", np.s_[layer, :, :rank], (outputs, rank)),
        }

    def in_peft(self, layers: LoraLayer, leaves: Tensors) -> tuple[LoraConfig, Tensors]:
        """The LoraConfig with the same fields: to PEFT, FanLoRA is LoRA."""
        return LoraConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(LoraConfig)}), leaves

    def peft_options(self) -> dict[str, Any]:
        """All fields, and `bias="none"`."""
        patterns = {"rank_pattern": dict(self.rank_pattern), "alpha_pattern": dict(self.alpha_pattern)}
        return {**dataclasses.asdict(self), **patterns, "bias": "none"}

    def of_modules(self, modules: Sequence[Mapping[str, Module]], shape: BackboneShape) -> LoraConfig:
        """This config with other modules. The most common rank and alpha become r and lora_alpha, others patterns."""
        options: dict[str, Any] = {"target_modules": sites_by_name(modules, shape), "exclude_modules": ()}
        for name, option, pattern in (("rank", "r", "rank_pattern"), ("alpha", "lora_alpha", "alpha_pattern")):
            values = {
                (i, site): getattr(layer[site], name)
                for i, layer in enumerate(modules)
                for site in shape.sites
                if site in layer
            }
            options[option] = Counter(values.values()).most_common(1)[0][0]
            options[pattern] = {
                site
                if all(v == value for (_, other), v in values.items() if other == site)
                else site_path(i, site, shape): value
                for (i, site), value in values.items()
                if value != options[option]
            }
        return dataclasses.replace(self, **options, layers_to_transform=None)

    def joined(self, joint: Joint, parts: Mapping[str, Tensors]) -> tuple[Module, Tensors]:
        """Stacks the A of all sites, with B block-diagonal. If all sites have the same A, keeps one and stacks B."""
        downs = [parts[site][A] for site in joint.sites]
        shared = _same_settings(joint) and all(np.array_equal(down, downs[0]) for down in downs)
        down = downs[0] if shared else np.concatenate(downs)
        up = np.zeros((joint.outputs, len(down)), np.float32)
        for site, columns in (_columns(joint, len(down)) or {}).items():
            up[joint.rows[site], columns] = parts[site][B] * _ratio(joint, site)
        pair = _largest_scale(joint)
        if len(down) != pair.rank:  # another rank, and the same scale
            rank, rs = len(down), self.use_rslora
            alpha = pair.alpha * math.sqrt(rank / pair.rank) if rs else pair.alpha * rank / pair.rank
            pair = Module(rank, int(alpha) if alpha == int(alpha) else alpha, pair.scale)
        return pair, {A: down, B: up}

    def cut(self, joint: Joint, tensors: Tensors) -> dict[str, Tensors] | None:
        """Each site's pair; None if `joined` cannot make the module's rank."""
        down, up = tensors.get(A), tensors.get(B)
        columns = None if down is None else _columns(joint, len(down))
        if down is None or up is None or columns is None:
            return None
        return {
            site: {A: down[ranks], B: up[joint.rows[site], ranks] / (_ratio(joint, site) or 1)}
            for site, ranks in columns.items()
        }

    def merged(self, weight: np.ndarray, tensors: Tensors, module: Module) -> np.ndarray:
        """W + scale * B A. Biases do not change."""
        return weight if weight.ndim == 1 else weight + np.float32(module.scale) * (tensors[B] @ tensors[A])


def _same_settings(joint: Joint) -> bool:
    """Whether all sites have the same rank and alpha, so that they may share one A."""
    return len(set(joint.sites.values())) == 1


def _largest_scale(joint: Joint) -> Module:
    """The settings of the site with the largest scale, which the fused module uses."""
    return max(joint.sites.values(), key=lambda pair: abs(pair.scale))


def _columns(joint: Joint, rank: int) -> dict[str, slice] | None:
    """The part of the module's rank for each site: all of a shared A, or its block. None if the rank fits neither."""
    ranks = [pair.rank for pair in joint.sites.values()]
    if _same_settings(joint) and rank == ranks[0]:
        return dict.fromkeys(joint.sites, slice(rank))
    ends = np.cumsum([0, *ranks]).tolist()
    return {site: slice(*ends[i : i + 2]) for i, site in enumerate(joint.sites)} if rank == ends[-1] else None


def _ratio(joint: Joint, site: str) -> np.float32:
    """The factor for a site's B that makes up for the module's scale."""
    scale = _largest_scale(joint).scale
    return np.float32(joint.sites[site].scale / scale if scale else 1)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _as_pairs(patterns: Any, name: str) -> tuple[tuple[str, Any], ...]:
    """A pattern option, a dict or pairs, as pairs. Raises ParaJaxError for anything else."""
    pairs = tuple(patterns.items()) if isinstance(patterns, Mapping) else patterns
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
    ):
        raise ParaJaxError(f'{name} must be values by pattern, such as {{"q_proj": 4}}, not {patterns!r}')
    for key, _ in pairs:
        try:
            re.compile(key)
        except re.error as error:
            raise ParaJaxError(f"{name} has {key!r}, which is not a regular expression: {error}") from error
    return tuple((key, value) for key, value in pairs)


@lru_cache(maxsize=256)
def _modules(config: LoraConfig, shape: BackboneShape) -> tuple[Mapping[str, Module], ...]:
    sites = resolve(
        config.target_modules, shape, exclude=config.exclude_modules, layers=config.layers_to_transform, linear=True
    )
    paths = [module_path(i, site, shape) for i, layer in enumerate(sites) for site in layer]
    for name in ("rank_pattern", "alpha_pattern"):
        for key, _ in getattr(config, name):
            if not any(first_match([(key, 1)], path) for path in paths):
                raise fits_none(name, key, paths, shape)

    def module(path: str) -> Module:
        rank, alpha = first_match(config.rank_pattern, path), first_match(config.alpha_pattern, path)
        rank, alpha = rank or config.r, config.lora_alpha if alpha is None else alpha
        return Module(rank, alpha, alpha / (math.sqrt(rank) if config.use_rslora else rank))

    return tuple({site: module(module_path(i, site, shape)) for site in layer} for i, layer in enumerate(sites))


class LoraLayer(nnx.Module):
    """The pairs of one layer of one tenant, in float32: `down` (r, inputs) and `up` (outputs, r) for each site.

    They are PEFT's lora_A and lora_B. Layers are stacked, so all are padded with zeros to the largest rank. The padding
    stays zero, because the gradient of each matrix is a multiple of the other matrix.
    """

    def __init__(self, config: LoraConfig, shape: BackboneShape, rngs: nnx.Rngs, layer: Int[Array, ""] | int):
        self.config = config
        modules = config.modules(shape)
        self.modules = tuple(tuple(by_site.items()) for by_site in modules)
        self.down: dict[str, nnx.Param] = Dict()
        self.up: dict[str, nnx.Param] = Dict()
        for site in [site for site in shape.sites if any(site in by_site for by_site in modules)]:
            ranks = np.array([by_site[site].rank if site in by_site else 0 for by_site in modules], np.int32)
            kept_r = jnp.arange(ranks.max()) < jnp.asarray(ranks)[layer]
            down, up = _fresh(config, int(ranks.max()), jnp.asarray(ranks)[layer], shape.sites[site], rngs.params())
            self.down[site] = nnx.Param(jnp.where(kept_r[:, None], down, 0))
            self.up[site] = nnx.Param(jnp.where(kept_r[None], up, 0))

    def prepare(self, prompt: Prompt, layer: Int[Array, ""] | int = 0) -> Adjustment:
        """Returns this layer's pairs, with the scale in `up`. The prompt is not read."""
        if isinstance(layer, int):
            # Layers are unrolled, so each uses only its own modules and ranks.
            modules = dict(self.modules[layer])
            ranks: dict[str, int | None] = {site: module.rank for site, module in modules.items()}
            scales: dict[str, Any] = {site: module.scale for site, module in modules.items()}
        else:
            ranks = dict.fromkeys(self.down, None)
            tables = {
                site: [dict(pairs).get(site, Module(0, 0.0, 0.0)).scale for pairs in self.modules] for site in ranks
            }
            scales = {site: jnp.array(table, jnp.float32)[layer] for site, table in tables.items()}
        return Adjustment(
            pairs={
                site: LowRank(self.down[site][: ranks[site]], self.up[site][:, : ranks[site]] * scales[site])
                for site in ranks
            }
        )


def _fresh(
    config: LoraConfig, padded_rank: int, rank: Int[Array, ""], site: Any, key: Array
) -> tuple[Float[Array, "r inputs"], Float[Array, "outputs r"]]:
    """A and B with PEFT's initialisation for `rank`, in arrays of `padded_rank`."""
    a, b, c = jax.random.split(key, 3)
    down, up = (padded_rank, site.inputs), (site.outputs, padded_rank)
    if config.init_lora_weights == "orthogonal":
        # A and B use disjoint halves of an orthonormal basis of the layer's rank, so that B A is zero.
        index = jnp.arange(padded_rank)
        inside = index < rank
        normal = jax.random.normal(a, (padded_rank, padded_rank), jnp.float32)
        basis, _ = jnp.linalg.qr(jnp.where(inside[:, None] & inside[None], normal, jnp.eye(padded_rank)))
        halves = [jnp.where((index % 2 == half)[:, None], basis, 0) for half in (0, 1)]
        down_random, up_random = jax.random.normal(b, down, jnp.float32), jax.random.normal(c, up, jnp.float32)
        return halves[0].T @ down_random / 10, up_random @ halves[1] / 10
    if config.init_lora_weights == "gaussian":
        return jax.random.normal(a, down, jnp.float32) / rank.astype(jnp.float32), jnp.zeros(up, jnp.float32)
    bound = site.inputs**-0.5
    uniform = jax.random.uniform(a, down, jnp.float32, -bound, bound)
    if config.init_lora_weights is True:
        return uniform, jnp.zeros(up, jnp.float32)
    bound_r = 1 / jnp.sqrt(rank.astype(jnp.float32))
    return uniform, jax.random.uniform(b, up, jnp.float32, -1.0, 1.0) * bound_r
