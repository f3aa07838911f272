"""A digest of a backbone's weights, which tells a model from any other of its sizes, wherever its folder is.

Every weight counts, bit for bit. Its bits are mixed with its place in its tensor, and these 32-bit integers are summed
over a layer's tensor, once as they are and once with a factor for the place. Integer sums are the same in any order: on
any mesh, with layers stacked or apart, for weights that were read or made. Each device sums what it holds, so that no
weight is moved.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from para_jax.adapters.adapter import named_leaves
from para_jax.backbones.decoder import Backbone
from para_jax.distributed import gather

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import UInt32


def weights_digest(backbone: Backbone) -> str:
    """64 hexadecimal digits of all weights; of several processes all have to call it.

    >>> from para_jax import tiny_backbone_path
    >>> apart, stacked = (Backbone.from_pretrained(tiny_backbone_path(), stacked=x) for x in (False, True))
    >>> weights_digest(apart) == weights_digest(stacked)
    True
    """
    lines = []
    for name, x in gather(weight_sums(backbone), backbone.mesh).items():
        inside, _, leaf = name.rpartition(".")
        first = inside.removeprefix("blocks.") if not backbone.stacked else ""
        lines += [f"{leaf} {first or layer} {row.tobytes().hex()}" for layer, row in enumerate(x)]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


@jax.jit
def weight_sums(backbone: Backbone) -> dict[str, UInt32[Array, "l 2"]]:
    """The sums of each tensor by its name: all that is computed of the weights, in one program."""
    leaves = named_leaves(backbone)
    return {name: _sums(x, stacked=backbone.stacked and name.startswith("blocks.")) for name, x in leaves.items()}


@partial(jax.jit, static_argnames="stacked")  # traced once for each shape
def _sums(x: Array, stacked: bool) -> UInt32[Array, "l 2"]:
    """The sums of each layer's tensor, or of the one tensor if it is none of a stack."""
    bits = _bits(x) if stacked else _bits(x)[None]
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(1, bits.ndim):
        place = place * np.uint32(bits.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    mixed = _mixed(bits ^ (place * np.uint32(0x9E3779B9)))
    again = (mixed ^ (mixed >> np.uint32(15))) * (np.uint32(2) * place + np.uint32(1))
    return jnp.stack([jnp.sum(x, axis=tuple(range(1, bits.ndim)), dtype=jnp.uint32) for x in (mixed, again)], axis=-1)


def _bits(x: Array) -> UInt32[Array, "..."]:
    """The bits of each number."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jax.lax.bitcast_convert_type(x.astype(jnp.int32), jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Each number's bits spread over all 32, one to one (the last step of MurmurHash3)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
