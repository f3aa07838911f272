"""A digest of a backbone's weights. It identifies a model independently of its folder.

Every bit of every weight counts. The bits of a weight are mixed with its position in the tensor, and the resulting
32-bit integers are summed over each layer's tensor, once plain and once multiplied by a factor of the position. Integer
sums do not depend on the order, so the digest is the same on any mesh and for stacked and unstacked layers. Each device
sums its own shards, so no weight is moved.
"""

from __future__ import annotations

import hashlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from para_jax.adapters.adapter import named_leaves
from para_jax.annotations import Array, UInt32
from para_jax.backbones.decoder import Backbone
from para_jax.distributed import gather


def weights_digest(backbone: Backbone) -> str:
    """64 hexadecimal digits. All processes must call it.

    >>> from para_jax import tiny_backbone_path
    >>> unstacked, stacked = (Backbone.from_pretrained(tiny_backbone_path(), stacked=x) for x in (False, True))
    >>> weights_digest(unstacked) == weights_digest(stacked)
    True
    """
    lines = []
    stacks = {stack.name: stack.layers for stack in backbone.config.stacks}
    for name, x in gather(weight_sums(backbone), backbone.mesh).items():
        parent, _, leaf = name.rpartition(".")
        at = parent.removeprefix("blocks").removeprefix(".")
        layers = (at or 0,) if not (parent and backbone.stacked) else stacks[at]
        lines += [f"{leaf} {layer} {row.tobytes().hex()}" for layer, row in zip(layers, x, strict=True)]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


@jax.jit
def weight_sums(backbone: Backbone) -> dict[str, UInt32[Array, "l 2"]]:
    """The sums of each tensor by name, in one program."""
    leaves = named_leaves(backbone)
    return {name: _sums(x, stacked=backbone.stacked and name.startswith("blocks.")) for name, x in leaves.items()}


@partial(jax.jit, static_argnames="stacked")  # traced once for each shape
def _sums(x: Array, stacked: bool) -> UInt32[Array, "l 2"]:
    """The sums of each layer of a stacked tensor, or of one unstacked tensor."""
    bits = _bits(x) if stacked else _bits(x)[None]
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(1, bits.ndim):
        position = position * np.uint32(bits.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    mixed = _mixed(bits ^ (position * np.uint32(0x9E3779B9)))
    weighted = (mixed ^ (mixed >> np.uint32(15))) * (np.uint32(2) * position + np.uint32(1))
    return jnp.stack(
        [jnp.sum(x, axis=tuple(range(1, bits.ndim)), dtype=jnp.uint32) for x in (mixed, weighted)], axis=-1
    )


def _bits(x: Array) -> UInt32[Array, "..."]:
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jax.lax.bitcast_convert_type(x.astype(jnp.int32), jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finalizer of MurmurHash3, a bijection on 32-bit integers."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
