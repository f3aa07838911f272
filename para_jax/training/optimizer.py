"""AdamW with warm-up and linear decay for one tenant; the trainer vmaps it over the tenants of a stack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from para_jax.training.settings import Optimizer

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int


def learning_rate(settings: Optimizer, step: Int[Array, ""]) -> Float[Array, ""]:
    """The rate of a step, counted from zero: a linear rise, then a linear fall that would reach zero at `steps`.

    >>> settings = Optimizer(steps=10, lr=1.0, warmup_ratio=0.2)
    >>> [round(float(learning_rate(settings, jnp.int32(i))), 3) for i in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.125]
    """
    at, steps = step.astype(jnp.float32), jnp.asarray(settings.steps, jnp.float32)
    warmup = jnp.ceil(settings.warmup_ratio * steps)
    rising = (at + 1) / jnp.maximum(warmup, 1)
    falling = (steps - at) / jnp.maximum(steps - warmup, 1)
    return settings.lr * jnp.clip(jnp.minimum(rising, falling), 0, 1)


def _transform(settings: Optimizer, rate: Float[Array, ""] | float) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.scale_by_adam(),
        optax.add_decayed_weights(settings.weight_decay),
        optax.scale(-rate),
    )


def init(layers: Any) -> Any:
    """One tenant's moments, zero."""
    return _transform(Optimizer(), 0.0).init(layers)


def update(
    settings: Optimizer, step: Int[Array, ""], layers: Any, moments: Any, gradient: Any, decays_to: float = 0.0
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
