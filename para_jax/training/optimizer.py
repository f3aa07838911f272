"""AdamW with warm-up and linear decay for one tenant; the trainer vmaps it over the tenants of a stack."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from para_jax.checks import COUNT, POSITIVE, Number, Whole
from para_jax.errors import ParaJaxError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jax import Array
    from jaxtyping import Float, Int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["steps", "lr", "warmup_ratio", "weight_decay", "max_grad_norm", "weight", "eval_every", "patience"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Settings:
    """How one tenant is tuned. Stacked, each field is an array with an entry for each tenant.

    Attributes:
      steps: how many steps it takes; afterwards it rests while others go on.
      lr: the highest learning rate, at the end of the warm-up. Small backbones want 1e-3 to 5e-3; 1e-4 is what the
        papers use at 7B.
      warmup_ratio: the share of the steps in which the rate rises from zero; afterwards it falls to zero linearly.
      weight_decay: AdamW's decoupled decay, towards the weights with which the adapter is the identity: zero, and one
        for the vectors of (IA)3.
      max_grad_norm: the tenant's gradient is scaled down to this norm if it is larger.
      weight: how often it has its turn, where a step does not hold all tenants: with as many steps to take, one of
        weight 2 gets on twice as fast as one of weight 1.
      eval_every: its own steps between looks at its dev rows; zero looks after its last step only.
      patience: it stops after so many looks in a row that were no better than the best; zero never does.

    Raises ParaJaxError for a value out of range.
    """

    steps: int = 1000
    lr: float = 1e-3
    warmup_ratio: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    weight: float = 1.0
    eval_every: int = 0
    patience: int = 0

    @classmethod
    def checked(cls, **values: Any) -> Settings:
        """Settings whose values are in range."""
        given: dict[str, Any] = {name: RANGES[name].check(name, x) for name, x in values.items() if name in RANGES}
        settings = cls(**{**values, **given})
        settings.check()
        return settings

    def check(self) -> None:
        """Raises ParaJaxError for a value out of range."""
        for name, kind in RANGES.items():
            kind.check(name, getattr(self, name))
        if self.patience and not self.eval_every:
            raise ParaJaxError("patience counts looks at dev rows; set eval_every, the steps between them")

    @classmethod
    def stack(cls, settings: Sequence[Settings]) -> Settings:
        """One Settings with an array for each field."""
        kinds = dict.fromkeys(("steps", "eval_every", "patience"), np.int32)
        return cls(
            **{
                f.name: np.array([getattr(s, f.name) for s in settings], kinds.get(f.name, np.float32))  # type: ignore[arg-type]
                for f in fields(cls)
            }
        )


# What each field of Settings may be.
RANGES: dict[str, Whole | Number] = {
    "steps": COUNT,
    "lr": POSITIVE,
    "warmup_ratio": Number(0, 1),
    "weight_decay": Number(0),
    "max_grad_norm": POSITIVE,
    "weight": POSITIVE,
    "eval_every": Whole(0),
    "patience": Whole(0),
}


def learning_rate(settings: Settings, step: Int[Array, ""]) -> Float[Array, ""]:
    """The rate of a step, counted from zero: a linear rise, then a linear fall that would reach zero at `steps`.

    >>> settings = Settings.checked(steps=10, lr=1.0, warmup_ratio=0.2)
    >>> [round(float(learning_rate(settings, jnp.int32(i))), 3) for i in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.125]
    """
    at, steps = step.astype(jnp.float32), jnp.asarray(settings.steps, jnp.float32)
    warmup = jnp.ceil(settings.warmup_ratio * steps)
    rising = (at + 1) / jnp.maximum(warmup, 1)
    falling = (steps - at) / jnp.maximum(steps - warmup, 1)
    return settings.lr * jnp.clip(jnp.minimum(rising, falling), 0, 1)


def _transform(settings: Settings, rate: Float[Array, ""] | float) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.scale_by_adam(),
        optax.add_decayed_weights(settings.weight_decay),
        optax.scale(-rate),
    )


def init(layers: Any) -> Any:
    """One tenant's moments, zero."""
    return _transform(Settings(), 0.0).init(layers)


def update(
    settings: Settings, step: Int[Array, ""], layers: Any, moments: Any, gradient: Any, decays_to: float = 0.0
) -> tuple[Any, Any, dict[str, Array]]:
    """One tenant's step: its new weights and moments, and what there is to report.

    Weight decay shrinks the weights' distance from `decays_to`, the method's own (`MethodConfig`). A tenant whose steps
    are over stays as it is.
    """
    rate = learning_rate(settings, step)
    # Of the transformations only the decay reads the weights.
    distance = jax.tree.map(lambda x: x - decays_to, layers) if decays_to else layers
    # optax raises a float to the power of an integer count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        change, after = _transform(settings, rate).update(gradient, moments, distance)
    moved = optax.apply_updates(layers, change)
    norm = optax.tree.norm(gradient)
    active = (step < settings.steps) & jnp.isfinite(norm)

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(active, new, old)

    report = {"grad_norm": norm, "lr": jnp.where(active, rate, 0.0)}
    return jax.tree.map(keep, moved, layers), jax.tree.map(keep, after, moments), report
