"""The backbone's products and its norm, with the float32 sums spelled out, and weights in few bits."""

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

# As it is stored: the numbers, and their scales if they are in few bits.
Weight = tuple["Array", "Array | None"]

# Up to this many rows, as when decoding, a CPU reads float32 weights faster in a product with columns
# (docs/backbone.md).
FEW_ROWS = 32

# A policy of `jax.checkpoint`: the backward pass finds what products gave, and makes the rest of a layer again.
KEEP_PRODUCTS = jax.checkpoint_policies.save_only_these_names("product")


def rms_norm(
    x: Float[Array, "*b d"], weight_d: Float[Array, " d"], eps: float, offset: float = 0.0
) -> Float[Array, "*b d"]:
    """Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467), in float32; `offset` is added to the weight."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    weight = weight_d.astype(jnp.float32) + offset if offset else weight_d.astype(jnp.float32)
    return (jnp.expand_dims(weight, range(x.ndim - 1)) * x32).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*b d"], weight_d: Float[Array, "*o d"], bias_d: Float[Array, "*o d"] | None, eps: float
) -> Float[Array, "*b d"]:
    """Layer norm (Ba et al., arXiv 1607.06450), in float32, with a bias or without.

    >>> layer_norm(jnp.array([[1.0, 3.0]]), jnp.array([2.0, 2.0]), jnp.array([1.0, 1.0]), 0.0).tolist()
    [[-1.0, 3.0]]
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    x32 = x32 * jnp.expand_dims(weight_d.astype(jnp.float32), range(x.ndim - weight_d.ndim))
    if bias_d is not None:
        x32 = x32 + jnp.expand_dims(bias_d.astype(jnp.float32), range(x.ndim - bias_d.ndim))
    return x32.astype(x.dtype)


def product(
    x: Float[Array, "b t i"],
    weight: Float[Array, "*o i"] | Int[Array, "*o i"],
    scale: Float[Array, "*o groups"] | None = None,
    dtype: Any = None,
    flat: bool = True,
) -> Float[Array, "b t *o"]:
    """x W^T for a weight whose outputs may have several axes, as one wide product; in x's dtype unless one is given.

    A quantized weight comes with its `scale`. With `flat` a CPU lays the outputs' axes end to end, which makes it
    faster. On a mesh it must not: the inner one may be split, as that of gate_up is, and would be gathered. A v6e chip
    would copy each layer's weights out of a stack to do so.
    """
    return checkpoint_name(_dot(x, weight, scale, dtype or x.dtype, flat), "product")


def dequantized(weight: Int[Array, "*o i"], scale: Float[Array, "*o groups"], dtype: Any) -> Float[Array, "*o i"]:
    """The weight again, in `dtype`, for a matmul that reads it; rounded once."""
    *outputs, inputs = weight.shape
    exact = max(jnp.dtype(dtype), scale.dtype, key=lambda x: x.itemsize)
    grouped = weight.astype(exact).reshape(*outputs, scale.shape[-1], -1)
    return (grouped * scale[..., None].astype(exact)).astype(dtype).reshape(*outputs, inputs)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _dot(x: Array, weight: Array, scale: Array | None, dtype: Any, flat: bool) -> Float[Array, "b t *o"]:
    """Sums in float32 and says so, forward and backward.

    A bfloat16 product that asks for bfloat16 back is four times slower on CPU than one that is rounded afterwards,
    and the derivative JAX would take of the latter multiplies in float32. It would also keep every layer's weight in
    the form that the product reads, a second copy of the backbone; this keeps it as it is stored. Weights in few bits
    are frozen: neither they nor their scales have a gradient.
    """
    if scale is None:
        return _matmul(x, weight, dtype, flat)
    if scale.shape[-1] == 1:
        # On the output, so that the matmul itself reads the weight as it is stored, and none is written widened.
        sums = _matmul(x, weight.astype(x.dtype), jnp.float32, flat)
        return (sums * _of_outputs(scale)).astype(dtype)
    if 2 * x.shape[0] * x.shape[1] <= weight.shape[-1] // scale.shape[-1]:
        return _by_groups(x, weight, scale).astype(dtype)
    return _matmul(x, dequantized(weight, scale, x.dtype), dtype, flat)


def _by_groups(x: Float[Array, "b t i"], weight: Int[Array, "*o i"], scale: Array) -> Float[Array, "b t *o"]:
    """Each group's sums times its scale, float32.

    It writes and reads a float32 number for each row, group and output, where a widened weight is written and read in
    bfloat16: fewer bytes up to half as many rows as a group has inputs.
    """
    groups = scale.shape[-1]
    x = x.reshape(*x.shape[:2], groups, -1)
    # A TPU's compiler would rather have the inputs of a group behind each other, and turn the weights of all layers
    # before the token loop, a second copy of them. Held to the layout that they have, it turns a layer's on the chip.
    weight = with_layout_constraint(jax.lax.optimization_barrier(weight), Layout(tuple(range(weight.ndim))))
    weight = weight.reshape(*weight.shape[:-1], groups, -1).astype(x.dtype)
    last = weight.ndim - 1
    sums = jax.lax.dot_general(x, weight, (((3,), (last,)), ((2,), (last - 1,))), preferred_element_type=jnp.float32)
    scale = jnp.expand_dims(jnp.moveaxis(scale, -1, 0), (1, 2)).astype(jnp.float32)
    return jnp.sum(sums * scale, axis=0)


def _of_outputs(scale: Float[Array, "*o 1"]) -> Float[Array, "1 1 *o"]:
    return jnp.expand_dims(scale[..., 0], (0, 1)).astype(jnp.float32)


def _matmul(x: Float[Array, "b t i"], weight: Float[Array, "*o i"], dtype: Any, flat: bool) -> Float[Array, "b t *o"]:
    """With a weight as it is, as the platform likes it that the program is for, which need not be the one here."""
    few = 1 < x.shape[0] * x.shape[1] <= FEW_ROWS
    if not few and not flat:
        return _rows(dtype, x, weight)
    on_cpu = _columns if few else _flat_rows
    return jax.lax.platform_dependent(x, weight, cpu=partial(on_cpu, dtype), default=partial(_rows, dtype))


def _rows(dtype: Any, x: Float[Array, "b t i"], weight: Float[Array, "*o i"]) -> Float[Array, "b t *o"]:
    return _sums(x, weight, (2,), (weight.ndim - 1,)).astype(dtype)


def _flat_rows(dtype: Any, x: Float[Array, "b t i"], weight: Float[Array, "*o i"]) -> Float[Array, "b t *o"]:
    out = _rows(dtype, x, weight.reshape(-1, weight.shape[-1]))
    return out.reshape(*x.shape[:2], *weight.shape[:-1])


def _columns(dtype: Any, x: Float[Array, "b t i"], weight: Float[Array, "*o i"]) -> Float[Array, "b t *o"]:
    """The weights times columns, for a CPU.

    XLA would turn it back into rows times weights: in float32 the barriers keep it from that, in bfloat16 a product of
    two halves at once does, and does it faster.
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


def _sums(x: Array, y: Array, over_x: Sequence[int], over_y: Sequence[int]) -> Array:
    """The product of two arrays summed over these axes, float32."""
    return jax.lax.dot_general(x, y, ((over_x, over_y), ((), ())), preferred_element_type=jnp.float32)


Kept = tuple["Array", "Array", "Array | None"]


def _dot_forward(x: Array, weight: Array, scale: Array | None, dtype: Any, flat: bool) -> tuple[Array, Kept]:
    return _dot(x, weight, scale, dtype, flat), (x, weight, scale)


def _dot_backward(dtype: Any, flat: bool, kept: Kept, out: Array) -> tuple[Array, Array | None, None]:
    x, weight, scale = kept
    if scale is not None and scale.shape[-1] == 1:
        out, ready = out.astype(jnp.float32) * _of_outputs(scale), weight.astype(x.dtype)
    else:
        ready = weight if scale is None else dequantized(weight, scale, x.dtype)
    out = out.astype(x.dtype)
    dx = jax.lax.platform_dependent(out, ready, cpu=_flat_inputs, default=_inputs) if flat else _inputs(out, ready)
    if scale is not None:
        return dx.astype(x.dtype), None, None
    return dx.astype(x.dtype), _sums(out, x, (0, 1), (0, 1)).astype(weight.dtype), None


def _inputs(out: Float[Array, "b t *o"], weight: Float[Array, "*o i"]) -> Float[Array, "b t i"]:
    """The derivative by the input, float32."""
    outputs = range(weight.ndim - 1)
    return _sums(out, weight, [2 + i for i in outputs], list(outputs))


def _flat_inputs(out: Float[Array, "b t *o"], weight: Float[Array, "*o i"]) -> Float[Array, "b t i"]:
    return _inputs(out.reshape(*out.shape[:2], -1), weight.reshape(-1, weight.shape[-1]))


_dot.defvjp(_dot_forward, _dot_backward)
