"""The backbone's matmuls and norms, with float32 accumulation and quantized weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int

# A stored weight, and its scales if it is quantized.
Weight = tuple["Array", "Array | None"]

# With at most this many rows, as in decoding, W x^T is faster than x W^T on a CPU (docs/backbone.md).
FEW_ROWS = 32

# A policy of `jax.checkpoint`: save the outputs of matmuls and recompute everything else in the backward pass.
SAVE_MATMULS = jax.checkpoint_policies.save_only_these_names("matmul")


def rms_norm(
    x: Float[Array, "*b d"], weight_d: Float[Array, " d"] | None, eps: float, offset: float = 0.0
) -> Float[Array, "*b d"]:
    """Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467), in float32; `offset` is added to the weight.

    `weight_d` is None for a norm without weights.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if weight_d is None:
        return x32.astype(x.dtype)
    weight = weight_d.astype(jnp.float32) + offset if offset else weight_d.astype(jnp.float32)
    return (jnp.expand_dims(weight, range(x.ndim - 1)) * x32).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*b d"], weight_d: Float[Array, "*o d"] | None, bias_d: Float[Array, "*o d"] | None, eps: float
) -> Float[Array, "*b d"]:
    """Layer norm (Ba et al., arXiv 1607.06450), in float32; the weight and the bias are optional.

    >>> layer_norm(jnp.array([[1.0, 3.0]]), jnp.array([2.0, 2.0]), jnp.array([1.0, 1.0]), 0.0).tolist()
    [[-1.0, 3.0]]
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if weight_d is not None:
        x32 = x32 * jnp.expand_dims(weight_d.astype(jnp.float32), range(x.ndim - weight_d.ndim))
    if bias_d is not None:
        x32 = x32 + jnp.expand_dims(bias_d.astype(jnp.float32), range(x.ndim - bias_d.ndim))
    return x32.astype(x.dtype)


def matmul(
    x: Float[Array, "b t i"],
    weight: Float[Array, "*o i"] | Int[Array, "*o i"],
    scale: Float[Array, "*o groups"] | None = None,
    dtype: Any = None,
    flat: bool = True,
) -> Float[Array, "b t *o"]:
    """x W^T as one matmul, for a weight with any number of output axes. `dtype` of the output defaults to x's.

    `scale` is that of a quantized weight. `flat` flattens the output axes on a CPU, which is faster. It must be False
    on a mesh: the inner axis may be sharded, as in gate_up, and would be gathered. Other devices never flatten, because
    a v6e would copy each layer's weights out of the stack.
    """
    return checkpoint_name(_dot(x, weight, scale, dtype or x.dtype, flat), "matmul")


def dequantized(weight: Int[Array, "*o i"], scale: Float[Array, "*o groups"], dtype: Any) -> Float[Array, "*o i"]:
    """The weight in `dtype`, rounded once."""
    *outputs, inputs = weight.shape
    exact = max(jnp.dtype(dtype), scale.dtype, key=lambda x: x.itemsize)
    grouped = weight.astype(exact).reshape(*outputs, scale.shape[-1], -1)
    return (grouped * scale[..., None].astype(exact)).astype(dtype).reshape(*outputs, inputs)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _dot(x: Array, weight: Array, scale: Array | None, dtype: Any, flat: bool) -> Float[Array, "b t *o"]:
    """Accumulates in float32, forward and backward.

    On a CPU, a bfloat16 matmul with bfloat16 output is four times slower than one with float32 output that is rounded
    afterwards. JAX's gradient of the latter would compute in float32. It would also save each layer's matmul operand, a
    second copy of the backbone, where this saves the stored weight. Quantized weights and their scales are frozen and
    have no gradient.
    """
    if scale is None:
        return _by_platform(x, weight, dtype, flat)
    if scale.shape[-1] == 1:
        # Scale the output, so that the matmul reads the stored weight and no dequantized weight is written.
        sums = _by_platform(x, weight.astype(x.dtype), jnp.float32, flat)
        return (sums * _output_scale(scale)).astype(dtype)
    if 2 * x.shape[0] * x.shape[1] <= weight.shape[-1] // scale.shape[-1]:
        return _by_groups(x, weight, scale).astype(dtype)
    return _by_platform(x, dequantized(weight, scale, x.dtype), dtype, flat)


def _by_groups(x: Float[Array, "b t i"], weight: Int[Array, "*o i"], scale: Array) -> Float[Array, "b t *o"]:
    """Scales the partial sum of each group, in float32.

    This writes and reads a float32 value per row, group and output instead of a dequantized bfloat16 weight. That is
    fewer bytes if there are at most half as many rows as a group has inputs.
    """
    groups = scale.shape[-1]
    x = x.reshape(*x.shape[:2], groups, -1)
    # Keeps the stored layout, so that the TPU compiler transposes one layer at a time, on the chip. Otherwise it
    # transposes the weights of all layers before the token loop, which is a second copy of them.
    weight = with_layout_constraint(jax.lax.optimization_barrier(weight), Layout(tuple(range(weight.ndim))))
    weight = weight.reshape(*weight.shape[:-1], groups, -1).astype(x.dtype)
    last = weight.ndim - 1
    sums = jax.lax.dot_general(x, weight, (((3,), (last,)), ((2,), (last - 1,))), preferred_element_type=jnp.float32)
    scale = jnp.expand_dims(jnp.moveaxis(scale, -1, 0), (1, 2)).astype(jnp.float32)
    return jnp.sum(sums * scale, axis=0)


def _output_scale(scale: Float[Array, "*o 1"]) -> Float[Array, "1 1 *o"]:
    return jnp.expand_dims(scale[..., 0], (0, 1)).astype(jnp.float32)


def _by_platform(
    x: Float[Array, "b t i"], weight: Float[Array, "*o i"], dtype: Any, flat: bool
) -> Float[Array, "b t *o"]:
    """The fastest form of the matmul for the platform that the program is compiled for."""
    few = 1 < x.shape[0] * x.shape[1] <= FEW_ROWS
    if not few and not flat:
        return _rows(dtype, x, weight)
    on_cpu = _columns if few else _flat_rows
    return jax.lax.platform_dependent(x, weight, cpu=partial(on_cpu, dtype), default=partial(_rows, dtype))


def _rows(dtype: Any, x: Float[Array, "b t i"], weight: Float[Array, "*o i"]) -> Float[Array, "b t *o"]:
    return _contract(x, weight, (2,), (weight.ndim - 1,)).astype(dtype)


def _flat_rows(dtype: Any, x: Float[Array, "b t i"], weight: Float[Array, "*o i"]) -> Float[Array, "b t *o"]:
    out = _rows(dtype, x, weight.reshape(-1, weight.shape[-1]))
    return out.reshape(*x.shape[:2], *weight.shape[:-1])


def _columns(dtype: Any, x: Float[Array, "b t i"], weight: Float[Array, "*o i"]) -> Float[Array, "b t *o"]:
    """W x^T, for a CPU.

    XLA would rewrite it as x W^T. In float32, optimization barriers prevent that. In bfloat16, a batched matmul of the
    weight's two halves prevents it and is faster.
    """
    b, t, _ = x.shape
    columns, flat = x.reshape(b * t, -1).T, weight.reshape(-1, weight.shape[-1])
    shape = (b, t, *weight.shape[:-1])
    if x.dtype == jnp.float32:
        columns = jax.lax.optimization_barrier(columns)
        out = jax.lax.optimization_barrier(jnp.matmul(flat, columns, preferred_element_type=jnp.float32))
        return out.T.reshape(shape).astype(dtype)
    if flat.shape[0] % 2:
        return _rows(dtype, x, weight)
    halves = flat.reshape(2, -1, flat.shape[-1])
    twice = jnp.broadcast_to(columns[None], (2, *columns.shape))
    out = jnp.einsum("coi,cin->con", halves, twice, preferred_element_type=jnp.float32)
    return out.reshape(-1, b * t).T.reshape(shape).astype(dtype)


def _contract(x: Array, y: Array, x_axes: Sequence[int], y_axes: Sequence[int]) -> Array:
    """Contracts two arrays over these axes, in float32."""
    return jax.lax.dot_general(x, y, ((x_axes, y_axes), ((), ())), preferred_element_type=jnp.float32)


Saved = tuple["Array", "Array", "Array | None"]


def _dot_forward(x: Array, weight: Array, scale: Array | None, dtype: Any, flat: bool) -> tuple[Array, Saved]:
    return _dot(x, weight, scale, dtype, flat), (x, weight, scale)


def _dot_backward(dtype: Any, flat: bool, saved: Saved, dy: Array) -> tuple[Array, Array | None, None]:
    x, weight, scale = saved
    if scale is not None and scale.shape[-1] == 1:
        dy, operand = dy.astype(jnp.float32) * _output_scale(scale), weight.astype(x.dtype)
    else:
        operand = weight if scale is None else dequantized(weight, scale, x.dtype)
    dy = dy.astype(x.dtype)
    dx = jax.lax.platform_dependent(dy, operand, cpu=_flat_dx, default=_dx) if flat else _dx(dy, operand)
    if scale is not None:
        return dx.astype(x.dtype), None, None
    return dx.astype(x.dtype), _contract(dy, x, (0, 1), (0, 1)).astype(weight.dtype), None


def _dx(dy: Float[Array, "b t *o"], weight: Float[Array, "*o i"]) -> Float[Array, "b t i"]:
    """The gradient of the input, float32."""
    outputs = range(weight.ndim - 1)
    return _contract(dy, weight, [2 + i for i in outputs], list(outputs))


def _flat_dx(dy: Float[Array, "b t *o"], weight: Float[Array, "*o i"]) -> Float[Array, "b t i"]:
    return _dx(dy.reshape(*dy.shape[:2], -1), weight.reshape(-1, weight.shape[-1]))


_dot.defvjp(_dot_forward, _dot_backward)
