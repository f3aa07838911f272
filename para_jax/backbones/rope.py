"""Rotary position embeddings (Su et al., arXiv 2104.09864) with the scalings of Llama 3.1 and linear stretching."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from para_jax.backbones.config import BackboneConfig

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int


def inverse_frequencies(config: BackboneConfig) -> np.ndarray:
    """The angle per position of each pair of features: float32 (head_dim / 2,)."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inverse = (1.0 / config.rope_theta**exponent).astype(np.float32)
    scaling = config.rope_scaling
    if scaling.rope_type == "linear":
        return inverse / np.float32(scaling.factor)
    if scaling.rope_type == "llama3":
        # Long wavelengths are stretched by the factor, short ones kept, those between interpolated.
        wavelength = 2 * math.pi / inverse
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        ratio = scaling.original_max_position_embeddings / wavelength
        kept = np.clip((ratio - low) / (high - low), 0.0, 1.0)
        return ((1 - kept) * inverse / scaling.factor + kept * inverse).astype(np.float32)
    return inverse


def angles(
    config: BackboneConfig, positions_bt: Int[Array, "b t"]
) -> tuple[Float[Array, "b t hd"], Float[Array, "b t hd"]]:
    """Cosine and sine of every position's angles, float32, each pair's angle given to both halves."""
    angle = positions_bt[..., None].astype(jnp.float32) * jnp.asarray(inverse_frequencies(config))[None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, sin], axis=-1)


def rotate(
    x_bthd: Float[Array, "b t h hd"], cos: Float[Array, "b t hd"], sin: Float[Array, "b t hd"]
) -> Float[Array, "b t h hd"]:
    """Turns queries or keys by their positions' angles, in float32."""
    x = x_bthd.astype(jnp.float32)
    left, right = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-right, left], axis=-1)
    return (x * cos[:, :, None] + turned * sin[:, :, None]).astype(x_bthd.dtype)
