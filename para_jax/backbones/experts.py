"""A mixture of experts: every token through its likeliest ones, on one device or on a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from para_jax.backbones.linear import KEEP_PRODUCTS, Weight, dequantized
from para_jax.backbones.options import wide
from para_jax.compat import varying
from para_jax.families.architecture import Experts
from para_jax.sharding import rows_axes

if TYPE_CHECKING:
    from jax import Array
    from jax.sharding import Mesh
    from jaxtyping import Float, Int


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

    # The form in which products read the weights would be kept of every layer, a second copy of the backbone; so it is
    # made again from the weights as they are stored.
    @partial(jax.checkpoint, policy=KEEP_PRODUCTS)
    def on_all(x: Array, chance: Array, scale: Array, gate_up: Weight, down: Weight) -> Array:
        one = partial(_on_one, experts=experts, act=act)
        if mesh is None:
            return one(x, chance, scale, gate_up, down)
        # Each device sorts the tokens of its own rows and has its part of every expert. Left to itself, the compiler
        # sorts the tokens of all devices, and gives each of them all.
        rows, part = P(rows_axes(mesh, x.shape[0])), P(None, None, "tensor")
        groups, of_groups = _divided(down[1], mesh.shape["tensor"])

        def on_each(x: Array, chance: Array, *given: Any) -> Array:
            # Said here, so that the backward pass adds up the slopes of tokens, and not of each of their copies.
            x, chance = varying((x, chance), "tensor")
            return jax.lax.psum(one(x, chance, *given), "tensor")

        return jax.shard_map(
            on_each,
            mesh=mesh,
            in_specs=(rows, rows, P(*rows, None, "tensor"), (part, part), (part, of_groups)),
            out_specs=rows,
        )(x, chance, scale, gate_up, (down[0], groups))

    return on_all(x_btd, chance_bte, scale_btf, gate_up, down)


def _divided(scale: Float[Array, "e d groups"] | None, parts: int) -> tuple[Array | None, P]:
    """Scales for a weight whose inputs are split into parts, with groups so small that each lies in one; and where they
    go."""
    if scale is None or scale.shape[-1] == 1:
        return scale, P()
    return jnp.repeat(scale, parts // math.gcd(parts, scale.shape[-1]), axis=-1), P(None, None, "tensor")


def _on_one(
    x_btd: Array, chance_bte: Array, scale_btf: Array, gate_up: Weight, down: Weight, experts: Experts, act: Any
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
    gate, up = jnp.split(grouped_product(x, gate_up, sizes), 2, axis=-1)
    up = (up * scale_btf.reshape(b * t, -1)[source_n]).astype(x.dtype)
    inner = gated(act, gate.astype(x.dtype), up)
    out = grouped_product(inner, down, sizes) * weight.reshape(-1)[order_n][:, None]
    place_n = jnp.zeros_like(order_n).at[order_n].set(jnp.arange(order_n.size, dtype=order_n.dtype))
    return jnp.sum(out[place_n].reshape(b, t, experts.per_token, d), axis=2)


def gated(act: Callable[[Any], Any], gate: Float[Array, "*b f"], up: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """act(gate) * up, in their own dtype; computed in float32 if that is float16.

    >>> gated(jax.nn.relu, jnp.float16([2, 300]), jnp.float16([2, 100])).tolist()
    [4.0, 30000.0]
    """
    between = wide(gate.dtype)
    return (act(gate.astype(between)) * up.astype(between)).astype(gate.dtype)


def grouped_product(x: Float[Array, "n i"], weights: Weight, sizes: Int[Array, " e"]) -> Float[Array, "n o"]:
    """x W_e^T with the first `sizes[0]` rows of x for the first of the weights (e, *o, i), and so on; float32 sums and
    output. The outputs' axes are laid end to end.

    >>> x, weights = jnp.ones((3, 2)), jnp.array([[[1.0, 1.0]], [[2.0, 2.0]]])
    >>> grouped_product(x, (weights, None), jnp.array([1, 2]))[:, 0].tolist()
    [2.0, 4.0, 4.0]
    """
    stored, scale = weights
    # A TPU's product wants the inputs in front. Left to itself, the compiler turns all layers' weights before the token
    # loop, which takes the memory of all experts again; so it turns them a layer at a time.
    ready = with_layout_constraint(stored, Layout(tuple(range(stored.ndim))))
    # A scale for each row and output is fewer bytes than widened weights where rows are few, as in decoding.
    few = 2 * x.shape[0] <= stored.shape[0] * stored.shape[-1]
    per_output = scale is not None and scale.shape[-1] == 1 and few
    if scale is not None:
        ready = ready.astype(x.dtype) if per_output else dequantized(ready, scale, x.dtype)
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    ready = ready.reshape(ready.shape[0], -1, ready.shape[-1])
    out = jax.lax.ragged_dot_general(x, ready, sizes, numbers, preferred_element_type=jnp.float32)
    if scale is not None and per_output:
        expert_n = jnp.repeat(jnp.arange(ready.shape[0]), sizes, total_repeat_length=x.shape[0])
        out = out * scale.reshape(ready.shape[:2]).astype(jnp.float32)[expert_n]
    return checkpoint_name(out, "product")
