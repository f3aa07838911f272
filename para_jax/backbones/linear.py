"""The backbone's products and its norm, with the float32 sums spelled out, and weights in few bits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

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


def product(
    x: Float[Array, "b t i"],
    weight: Float[Array, "*o i"] | Int[Array, "*o i"],
    scale: Float[Array, "*o groups"] | None = None,
    dtype: Any = None,
    flat: bool = True,
) -> Float[Array, "b t *o"]:
    """x W^T for a weight whose outputs may have several axes, as one wide product; in x's dtype unless one is given.

    A weight in few bits comes with its `scale`. With `flat` the outputs' axes are laid end to end for the product,
    which a CPU does faster. On a mesh they must not be: the inner one may be split, as that of gate_up is, and would
    be gathered.
    """
    return checkpoint_name(_dot(x, weight, scale, dtype or x.dtype, flat), "product")


class Bits(NamedTuple):
    """How weights are quantised: symmetrically, one scale for each output, or for each `group` of its inputs."""

    dtype: str
    most: int
    group: int | None = None

    def groups(self, inputs: int) -> int:
        """How many scales an output has: groups are as large as divides its inputs, `self.group` at the most."""
        if self.group is None:
            return 1
        return inputs // max(size for size in range(1, self.group + 1) if inputs % size == 0)


QUANTIZED = {"int8": Bits("int8", 127), "int4": Bits("int4", 7, group=64)}


def quantized(weight: Float[np.ndarray, "*o i"], bits: Bits) -> tuple[np.ndarray, np.ndarray]:
    """The weight in few bits (*o, i), and its float32 scales (*o, groups), on the host.

    A scale is the largest of its weights over the largest whole number there is.

    >>> few, scale = quantized(np.array([[127.0, -1.4], [0.0, 0.0]], np.float32), QUANTIZED["int8"])
    >>> few.tolist(), scale.tolist()
    ([[127, -1], [0, 0]], [[1.0], [0.0]])
    """
    groups = bits.groups(weight.shape[-1])
    rows = weight.reshape(-1, groups, weight.shape[-1] // groups)
    whole, scale = np.empty(rows.shape, bits.dtype), np.empty(rows.shape[:2], np.float32)
    step = max(1, 2**22 // weight.shape[-1])  # rows at a time, so that what is made on the way stays small
    for start in range(0, len(rows), step):
        some = rows[start : start + step].astype(np.float32)
        own = np.abs(some).max(axis=-1) / np.float32(bits.most)
        scale[start : start + step] = own
        whole[start : start + step] = np.rint(some / np.where(own == 0, 1, own)[..., None]).astype(bits.dtype)
    return whole.reshape(weight.shape), scale.reshape(*weight.shape[:-1], groups)


def dequantized(weight: Int[Array, "*o i"], scale: Float[Array, "*o groups"], dtype: Any) -> Float[Array, "*o i"]:
    """The weight again, in `dtype`, for the product that reads it."""
    *outputs, inputs = weight.shape
    grouped = weight.astype(jnp.float32).reshape(*outputs, scale.shape[-1], -1)
    return (grouped * scale[..., None]).astype(dtype).reshape(*outputs, inputs)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _dot(x: Array, weight: Array, scale: Array | None, dtype: Any, flat: bool) -> Float[Array, "b t *o"]:
    """Sums in float32 and says so, forward and backward.

    A bfloat16 product that asks for bfloat16 back is four times slower on CPU than one that is rounded afterwards,
    and the derivative JAX would take of the latter multiplies in float32. It would also keep every layer's weight in
    the form that the product reads, a second copy of the backbone; this keeps it as it is stored. Weights in few bits
    are frozen: neither they nor their scales have a gradient.
    """
    ready = _ready(x, weight, scale, flat)
    if 1 < x.shape[0] * x.shape[1] <= FEW_ROWS:
        # As the platform likes it that the program is for, which need not be the one that is here.
        out = jax.lax.platform_dependent(x, ready, cpu=partial(_columns, dtype), default=partial(_rows, dtype))
    else:
        out = _rows(dtype, x, ready)
    return out.reshape(*x.shape[:2], *weight.shape[:-1])


def _ready(x: Array, weight: Array, scale: Array | None, flat: bool) -> Array:
    """A weight as the product wants it."""
    weight = weight if scale is None else dequantized(weight, scale, x.dtype)
    return weight.reshape(-1, weight.shape[-1]) if flat else weight


def _rows(dtype: Any, x: Float[Array, "b t i"], weight: Float[Array, "*o i"]) -> Float[Array, "b t *o"]:
    return _sums(x, weight, (2,), (weight.ndim - 1,)).astype(dtype)


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
    ready = _ready(x, weight, scale, flat)
    out = out.astype(x.dtype).reshape(*x.shape[:2], *ready.shape[:-1])
    outputs = range(ready.ndim - 1)
    dx = _sums(out, ready, [2 + i for i in outputs], list(outputs)).astype(x.dtype)
    if scale is not None:
        return dx, None, None
    return dx, _sums(out, x, (0, 1), (0, 1)).astype(weight.dtype).reshape(weight.shape), None


_dot.defvjp(_dot_forward, _dot_backward)
