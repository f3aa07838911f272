"""What the study compares: the methods at one size, and the choices that PARA's paper leaves open."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from para_jax import FanLoraConfig, IA3Config, LoraConfig, MethodConfig, ParaConfig, ParaJaxError
from para_jax.adapters.method import BackboneShape
from para_jax.errors import unknown

TOLERANCE = 0.03
GROUP_IA3 = {"target_modules": ("q_proj", "k_proj", "up_proj"), "feedforward_modules": ()}
METHODS = ("para", "lora", "fanlora", "ia3", "ia3-qku", "ia3-projected")
GRIDS = {
    "para": (1e-3, 3e-3, 1e-2),
    "lora": (1e-3, 3e-3, 1e-2),
    "fanlora": (1e-3, 3e-3, 1e-2),
    "ia3": (1e-2, 3e-2, 1e-1),
    "ia3-qku": (1e-2, 3e-2, 1e-1),
    "ia3-projected": (1e-3, 3e-3, 1e-2),
    "ablation": (3e-3,),
}
# What PARA's paper leaves open.
CHOICES: dict[str, tuple[Any, ...]] = {
    "pooling": ("last", "mean", "max", "attention"),
    "activation": ("gelu", "relu", "silu", "rational"),
    "target_modules": tuple(
        tuple(f"{site}_proj" for site in sites.split("+"))
        for sites in ("q+v+up", "q", "v", "up", "q+v", "q+k+v+o+gate+up+down")
    ),
    "read": ("hidden", "normed"),
    "scale": ("all", "response"),
    "normalize": (True, False),
    "bias": (False, True),
}


def variants() -> dict[str, dict[str, Any]]:
    """PARA's options by a name for the tables: the defaults, and each other choice alone."""
    found: dict[str, dict[str, Any]] = {"default": {}}
    for option, choices in CHOICES.items():
        for choice in choices:
            if choice != getattr(ParaConfig(), option):
                found[_variant(option, choice)] = {option: choice}
    return found


def _variant(option: str, choice: Any) -> str:
    if option == "target_modules":
        return f"sites {'+'.join(site.removesuffix('_proj') for site in choice)}"
    return f"{option} {choice}" if isinstance(choice, str) else f"{option} {'on' if choice else 'off'}"


def matched(method: str, budget: int, shape: BackboneShape, **options: Any) -> MethodConfig:
    """The method's config whose size is nearest to `budget` parameters; `options` are its other fields.

    LoRA and FanLoRA take the largest r that fits, and one more in some of the sites, or of the modules. Raises
    ParaJaxError if the nearest is further off than 3 %.
    """
    makes: dict[str, Callable[..., MethodConfig]] = {
        "para": lambda n: ParaConfig(r=n, **options),
        "ia3": lambda n: IA3Config(projection=n, **options),
        "lora": lambda n, more=(): LoraConfig(**_ranks(n, more), **options),
        "fanlora": lambda n, more=(): FanLoraConfig(**_ranks(n, more), **options),
    }
    if method not in makes:
        raise unknown("method", method, makes)
    make = makes[method]
    n = 1
    while make(n + 1).size(shape) <= budget:
        n += 1
    candidates = [make(n), make(n + 1)]
    if method == "lora":
        sites = [site for site in shape.sites if any(site in layer for layer in make(n).modules(shape))]
        some = itertools.chain.from_iterable(itertools.combinations(sites, count) for count in range(len(sites)))
        candidates += [make(n, more) for more in some]
    if method == "fanlora":
        candidates += [make(n, options["target_modules"][:count]) for count in range(len(options["target_modules"]))]
    best = min(candidates, key=lambda config: abs(config.size(shape) - budget))
    if abs(best.size(shape) / budget - 1) > TOLERANCE:
        raise ParaJaxError(
            f"{method} comes no nearer to {budget:,} parameters than {best.size(shape):,}, and 3 % is allowed; "
            "choose another --r"
        )
    return best


def _ranks(r: int, more: tuple[str, ...]) -> dict[str, Any]:
    """Rank r, r + 1 in the modules of `more`, and a scale of 2 everywhere."""
    return {
        "r": r,
        "lora_alpha": 2 * r,
        "rank_pattern": tuple((site, r + 1) for site in more),
        "alpha_pattern": tuple((site, 2 * r + 2) for site in more),
    }


class System(NamedTuple):
    """What is compared: a label of the tables, a method's config, and its learning rates.

    FanLoRA's config is made when its modules have been scored.
    """

    label: str
    part: str
    budget: int
    config: Callable[[], MethodConfig]
    grid: tuple[float, ...]

    def described(self, config: MethodConfig, shape: BackboneShape) -> dict[str, Any]:
        """What the results say of it."""
        return {
            "label": self.label,
            "method": config.method,
            "config": dataclasses.asdict(config),
            "parameters": config.size(shape),
            "budget": self.budget,
            "grid": list(self.grid),
        }


def method_systems(
    methods: Sequence[str],
    ranks: Sequence[int],
    shape: BackboneShape,
    grids: Mapping[str, tuple[float, ...]],
    fanlora: Callable[[int], MethodConfig],
) -> list[System]:
    """The methods at the size of PARA with each of `ranks`, and (IA)3 without projection at its own."""
    found: dict[str, System] = {}
    for r in ranks:
        budget = ParaConfig(r=r).size(shape)
        kinds: dict[str, Callable[[], MethodConfig]] = {
            "para": partial(ParaConfig, r=r),
            "lora": partial(matched, "lora", budget, shape, target_modules="all-linear"),
            "fanlora": partial(fanlora, budget),
            "ia3": IA3Config,
            "ia3-qku": partial(IA3Config, **GROUP_IA3),
            "ia3-projected": partial(matched, "ia3", budget, shape, **GROUP_IA3),
        }
        for method in methods:
            label = method if method in ("ia3", "ia3-qku") or len(ranks) == 1 else f"{method} r={r}"
            found.setdefault(label, System(label, "study", budget, kinds[method], grids[method]))
    return list(found.values())


def variant_systems(
    names: Sequence[str], r: int, shape: BackboneShape, grids: Mapping[str, tuple[float, ...]]
) -> list[System]:
    """The variants of PARA, all at the size of the defaults with rank r."""
    budget, grid = ParaConfig(r=r).size(shape), grids["ablation"]
    return [
        System(name, "ablation", budget, partial(matched, "para", budget, shape, **variants()[name]), grid)
        for name in names
    ]
