"""AdamW with warm-up and linear decay for one tenant; the trainer vmaps it over the tenants of a stack."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from para_jax.annotations import Array, Float, Int
from para_jax.training.settings import Optimizer


def learning_rate(settings: Optimizer, step: Int[Array, ""]) -> Float[Array, ""]:
    """The rate of a step, counted from zero: linear warm-up, then linear decay to zero at `steps`.

    >>> settings = Optimizer(steps=10, lr=1.0, warmup_ratio=0.2)
    >>> [round(float(learning_rate(settings, jnp.int32(i))), 3) for i in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.125]
    """
    current, steps = step.astype(jnp.float32), jnp.asarray(settings.steps, jnp.float32)
    warmup = jnp.ceil(settings.warmup_ratio * steps)
    rising = (current + 1) / jnp.maximum(warmup, 1)
    falling = (steps - current) / jnp.maximum(steps - warmup, 1)
    return settings.lr * jnp.clip(jnp.minimum(rising, falling), 0, 1)


def _transform(settings: Optimizer, rate: Float[Array, ""] | float) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.scale_by_adam(),
        optax.add_decayed_weights(settings.weight_decay),
        optax.scale(-rate),
    )


def init(layers: Any) -> Any:
    return _transform(Optimizer(), 0.0).init(layers)


def update(
    settings: Optimizer, step: Int[Array, ""], layers: Any, moments: Any, gradient: Any, decays_to: float = 0.0
) -> tuple[Any, Any, dict[str, Array]]:
    """One tenant's step: its new weights and moments, and a report.

    Weight decay pulls the weights towards `decays_to`, which depends on the method (`MethodConfig`). A tenant that has
    taken all its steps does not change.
    """
    rate = learning_rate(settings, step)
    # Only the decay reads the weights.
    distance = jax.tree.map(lambda x: x - decays_to, layers) if decays_to else layers
    # optax raises a float to the power of an integer count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        change, new_moments = _transform(settings, rate).update(gradient, moments, distance)
    new_layers = optax.apply_updates(layers, change)
    norm = optax.tree.norm(gradient)
    active = (step < settings.steps) & jnp.isfinite(norm)
    keep = partial(jnp.where, active)
    report = {"grad_norm": norm, "lr": jnp.where(active, rate, 0.0)}
    return jax.tree.map(keep, new_layers, layers), jax.tree.map(keep, new_moments, moments), report
