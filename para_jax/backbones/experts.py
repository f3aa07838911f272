"""A mixture of experts with top-k routing, on one device or on a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from para_jax.backbones.linear import SAVE_MATMULS, Weight, dequantized
from para_jax.backbones.options import wide
from para_jax.compat import varying
from para_jax.families.architecture import Experts
from para_jax.sharding import rows_axes

if TYPE_CHECKING:
    from jax import Array
    from jax.sharding import Mesh
    from jaxtyping import Float, Int


class Projections(NamedTuple):
    """The projections of all experts: gate_up (e, 2, f, d) with biases (e, 2, f), and down (e, d, f) with (e, d)."""

    gate_up: Weight
    down: Weight
    gate_up_bias: Array | None = None
    down_bias: Array | None = None


# The inner features of an expert, from the outputs of its gate and up projections.
Inner = Callable[["Array", "Array"], "Array"]


def through_experts(
    x_btd: Float[Array, "b t d"],
    probability_bte: Float[Array, "b t e"],
    scale_btf: Float[Array, "b t f"],
    factor_e: Float[Array, " e"] | None,
    weights: Projections,
    experts: Experts,
    inner: Inner,
    mesh: Mesh | None,
) -> Float[Array, "b t d"]:
    """The sum of each token's top-k experts, weighted by their router probabilities, in float32.

    `scale_btf` scales the outputs of the up projections of all experts, biases included. Each expert's output has a
    factor of `factor_e`. Rows, features and inner features are sharded over `mesh` as in the backbone.
    """

    # Rematerialize the matmul operands from the stored weights. Otherwise autodiff saves them for every layer, which is
    # a second copy of the backbone.
    @partial(jax.checkpoint, policy=SAVE_MATMULS)
    def run(x: Array, probability: Array, scale: Array, factor: Array | None, weights: Projections) -> Array:
        local = partial(_local_experts, experts=experts, inner=inner)
        if mesh is None:
            return local(x, probability, scale, factor, weights)
        # Each device sorts the tokens of its own rows and has a shard of every expert. Without shard_map, XLA would
        # gather and sort all tokens on every device.
        rows, shard = P(rows_axes(mesh, x.shape[0])), P(None, None, "tensor")
        down_scale, down_scale_spec = _split_groups(weights.down[1], mesh.shape["tensor"])

        def on_each(x: Array, probability: Array, scale: Array, factor: Array | None, weights: Projections) -> Array:
            # Here, so that the backward pass reduces the gradients of tokens, and not of their per-expert copies.
            x, probability = varying((x, probability), "tensor")
            if (bias := weights.down_bias) is not None:  # once in the sum over shards
                weights = weights._replace(down_bias=jnp.where(jax.lax.axis_index("tensor") == 0, bias, 0))
            return jax.lax.psum(local(x, probability, scale, factor, weights), "tensor")

        specs: Any = ((shard, shard), (shard, down_scale_spec), shard, P())
        return jax.shard_map(
            on_each,
            mesh=mesh,
            in_specs=(rows, rows, P(*rows, None, "tensor"), P(), Projections(*specs)),
            out_specs=rows,
        )(x, probability, scale, factor, weights._replace(down=(weights.down[0], down_scale)))

    return run(x_btd, probability_bte, scale_btf, factor_e, weights)


def _split_groups(scale: Float[Array, "e d groups"] | None, shards: int) -> tuple[Array | None, P]:
    """Splits groups until none crosses a shard of the weight's inputs. Returns the scales and their PartitionSpec."""
    if scale is None or scale.shape[-1] == 1:
        return scale, P()
    return jnp.repeat(scale, shards // math.gcd(shards, scale.shape[-1]), axis=-1), P(None, None, "tensor")


def _local_experts(
    x_btd: Array,
    probability_bte: Array,
    scale_btf: Array,
    factor_e: Array | None,
    weights: Projections,
    experts: Experts,
    inner: Inner,
) -> Float[Array, "b t d"]:
    """`through_experts` for the rows and inner features of one device."""
    b, t, d = x_btd.shape
    weight, expert = jax.lax.top_k(probability_bte, experts.per_token)
    if experts.normalized:
        weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    if factor_e is not None:
        weight = weight * factor_e.astype(weight.dtype)[expert]

    # Sort a copy of each token per expert, n = b * t * per_token, by expert: each expert is then one matmul.
    expert_n = expert.reshape(-1)
    order_n = jnp.argsort(expert_n, stable=True)
    source_n, expert_n = order_n // experts.per_token, expert_n[order_n]
    sizes = jnp.bincount(expert_n, length=experts.count)

    def project(x: Array, weight: Weight, bias: Array | None) -> Array:
        out = grouped_matmul(x, weight, sizes)
        return out if bias is None else out + bias.reshape(experts.count, -1)[expert_n].astype(out.dtype)

    x = x_btd.reshape(b * t, d)[source_n]
    gate, up = jnp.split(project(x, weights.gate_up, weights.gate_up_bias), 2, axis=-1)
    up = (up * scale_btf.reshape(b * t, -1)[source_n]).astype(x.dtype)
    out = project(inner(gate.astype(x.dtype), up), weights.down, weights.down_bias)
    out = out * weight.reshape(-1)[order_n][:, None]
    place_n = jnp.zeros_like(order_n).at[order_n].set(jnp.arange(order_n.size, dtype=order_n.dtype))
    return jnp.sum(out[place_n].reshape(b, t, experts.per_token, d), axis=2)


def gated(act: Callable[[Any], Any], gate: Float[Array, "*b f"], up: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """act(gate) * up, in the dtype of the arguments. float16 is computed in float32.

    >>> gated(jax.nn.relu, jnp.float16([2, 300]), jnp.float16([2, 100])).tolist()
    [4.0, 30000.0]
    """
    dtype = wide(gate.dtype)
    return (act(gate.astype(dtype)) * up.astype(dtype)).astype(gate.dtype)


def clamped_swiglu(
    alpha: float, limit: float, gate: Float[Array, "*b f"], up: Float[Array, "*b f"]
) -> Float[Array, "*b f"]:
    """GPT-OSS's gate: gate * sigmoid(alpha * gate) * (up + 1), with both clamped to at most `limit` and up to at least
    -limit.

    >>> clamped_swiglu(0.0, 7.0, jnp.array([2.0, 9.0]), jnp.array([1.0, -9.0])).tolist()
    [2.0, -21.0]
    """
    dtype = wide(gate.dtype)
    low, high = jnp.minimum(gate.astype(dtype), limit), jnp.clip(up.astype(dtype), -limit, limit)
    return (low * jax.nn.sigmoid(alpha * low) * (high + 1)).astype(gate.dtype)


def grouped_matmul(x: Float[Array, "n i"], weights: Weight, sizes: Int[Array, " e"]) -> Float[Array, "n o"]:
    """x W_e^T in float32, where the first `sizes[0]` rows of x belong to expert 0, and so on.

    The weights are (e, *o, i); the output axes are flattened.

    >>> x, weights = jnp.ones((3, 2)), jnp.array([[[1.0, 1.0]], [[2.0, 2.0]]])
    >>> grouped_matmul(x, (weights, None), jnp.array([1, 2]))[:, 0].tolist()
    [2.0, 4.0, 4.0]
    """
    stored, scale = weights
    # The TPU matmul reads inputs as the leading axis. This makes XLA transpose one layer's weights at a time. Otherwise
    # it transposes all layers before the token loop, which takes the memory of all experts a second time.
    operand = with_layout_constraint(stored, Layout(tuple(range(stored.ndim))))
    # With few rows, as in decoding, a scale per row and output is fewer bytes than dequantized weights.
    few = 2 * x.shape[0] <= stored.shape[0] * stored.shape[-1]
    per_output = scale is not None and scale.shape[-1] == 1 and few
    if scale is not None:
        operand = operand.astype(x.dtype) if per_output else dequantized(operand, scale, x.dtype)
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    operand = operand.reshape(operand.shape[0], -1, operand.shape[-1])
    out = jax.lax.ragged_dot_general(x, operand, sizes, numbers, preferred_element_type=jnp.float32)
    if scale is not None and per_output:
        expert_n = jnp.repeat(jnp.arange(operand.shape[0]), sizes, total_repeat_length=x.shape[0])
        out = out * scale.reshape(operand.shape[:2]).astype(jnp.float32)[expert_n]
    return checkpoint_name(out, "matmul")
