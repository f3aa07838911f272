"""A mixture of experts: every token through its likeliest ones, on one device or on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from para_jax.backbones.config import Experts
from para_jax.backbones.linear import Weight, dequantized
from para_jax.sharding import gathered, rows_axes

if TYPE_CHECKING:
    from jax import Array
    from jax.sharding import Mesh
    from jaxtyping import Float, Int

# What the backward pass finds; the rest is made again from the weights as they are stored. The form in which a product
# reads them would be kept of every layer, a second copy of the backbone.
KEPT = jax.checkpoint_policies.save_only_these_names("grouped_product")


def through_experts(
    x_btd: Float[Array, "b t d"],
    chance_bte: Float[Array, "b t e"],
    scale_btf: Float[Array, "b t f"],
    gate_up: Weight,
    down: Weight,
    experts: Experts,
    act: Callable[[Any], Any],
    mesh: Mesh | None,
) -> Float[Array, "b t d"]:
    """The sum of what each token's likeliest experts say, weighted by their chances, in float32.

    The up projections of all of them, (e, f) of gate_up (e, 2, f, d), are scaled alike; down is (e, d, f). With a mesh
    rows, features and inner features are split over it as they are in the backbone.
    """

    @partial(jax.checkpoint, policy=KEPT)
    def on_all(x: Array, chance: Array, scale: Array, gate_up: Weight, down: Weight) -> Array:
        one = partial(_on_one, experts=experts, act=act)
        given = x, chance, scale, _ready("gate_up", gate_up, x.dtype, mesh), _ready("down", down, x.dtype, mesh)
        if mesh is None:
            return one(*given)
        # Each device sorts the tokens of its own rows and has its part of every expert. Left to itself, the compiler
        # sorts the tokens of all devices, and gives each of them all.
        rows, part = P(rows_axes(mesh, x.shape[0])), P(None, None, "tensor")
        return jax.shard_map(
            lambda *given: jax.lax.psum(one(*given), "tensor"),
            mesh=mesh, in_specs=(rows, rows, P(*rows, None, "tensor"), part, part), out_specs=rows,
        )(*given)  # fmt: skip

    return on_all(x_btd, chance_bte, scale_btf, gate_up, down)


def _ready(name: str, weight: Weight, dtype: Any, mesh: Mesh | None) -> Array:
    """A weight as a product wants it, gathered as it is stored."""
    stored, scale = weight
    stored = stored if mesh is None else gathered(stored, name, mesh)
    return stored if scale is None else dequantized(stored, scale, dtype)


def _on_one(
    x_btd: Array, chance_bte: Array, scale_btf: Array, gate_up: Array, down: Array, experts: Experts, act: Any
) -> Float[Array, "b t d"]:
    """The same with a device's own rows and inner features."""
    b, t, d = x_btd.shape
    weight, expert = jax.lax.top_k(chance_bte, experts.per_token)
    if experts.normalized:
        weight = weight / jnp.sum(weight, axis=-1, keepdims=True)

    # Token copies stand in the order of their experts, so that each expert is one product over its own.
    expert_n = expert.reshape(-1)
    order_n = jnp.argsort(expert_n, stable=True)
    source_n = order_n // experts.per_token
    sizes = jnp.bincount(expert_n, length=experts.count)
    x = x_btd.reshape(b * t, d)[source_n]
    gate, up = jnp.split(grouped_product(x, gate_up.reshape(experts.count, -1, d), sizes), 2, axis=-1)
    up = (up * scale_btf.reshape(b * t, -1)[source_n]).astype(x.dtype)
    inner = act(gate.astype(x.dtype)) * up
    out = grouped_product(inner, down, sizes) * weight.reshape(-1)[order_n][:, None]
    place_n = jnp.zeros_like(order_n).at[order_n].set(jnp.arange(order_n.size, dtype=order_n.dtype))
    return jnp.sum(out[place_n].reshape(b, t, experts.per_token, d), axis=2)


def grouped_product(
    x: Float[Array, "n i"], weights: Float[Array, "e o i"], sizes: Int[Array, " e"]
) -> Float[Array, "n o"]:
    """x W_e^T with the first `sizes[0]` rows of x for the first weight, and so on; float32 sums and output.

    >>> x, weights = jnp.ones((3, 2)), jnp.array([[[1.0, 1.0]], [[2.0, 2.0]]])
    >>> grouped_product(x, weights, jnp.array([1, 2]))[:, 0].tolist()
    [2.0, 4.0, 4.0]
    """
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    out = jax.lax.ragged_dot_general(x, weights, sizes, numbers, preferred_element_type=jnp.float32)
    return checkpoint_name(out, "grouped_product")
