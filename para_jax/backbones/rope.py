"""Rotary position embedding (Su et al., arXiv 2104.09864), with transformers' types of scaling for long contexts.

    linear    divides all frequencies by a factor
    dynamic   increases the base for rows that are longer than the model's context (NTK)
    llama3    divides the frequencies of long wavelengths by a factor, and interpolates medium ones (Llama 3.1 to 3.3)
    yarn      the same with a ramp over features, and larger scores (Peng et al., arXiv 2309.00071)
    proportional  the features beyond a share are not rotated (Gemma 4)
    longrope  a factor for each feature, one set for short and one for long rows (Ding et al., arXiv 2402.13753)

dynamic and longrope depend on the current length. transformers takes the longest row of the batch. Here each row takes
its own length, so that its output does not depend on other rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from para_jax.families.architecture import Rope

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int


class Angles(NamedTuple):
    """The rotation of queries and keys at each position, float32.

    Attributes:
      cos, sin: cosines and sines of the angles, repeated for both halves of the rotated features.
      query_scale: an optional factor of queries.
    """

    cos: Float[Array, "b t rotated"]
    sin: Float[Array, "b t rotated"]
    query_scale: Float[Array, "b t"] | None = None


def angles(
    rope: Rope | None, head_dim: int, context: int, position_bt: Int[Array, "b t"], length_bt: Int[Array, "b t"]
) -> Angles:
    """The angles of every position.

    Args:
      rope: None for no rotation.
      context: the model's `max_position_embeddings`.
      length_bt: the current length of each token's sequence.
    """
    if rope is None:
        ones = jnp.ones((*position_bt.shape, head_dim), jnp.float32)
        return Angles(ones, jnp.zeros_like(ones))
    inverse, factor = frequencies(rope, head_dim, context, length_bt)
    angle = position_bt[..., None].astype(jnp.float32) * inverse
    cos, sin = jnp.cos(angle) * factor, jnp.sin(-angle if rope.backwards else angle) * factor
    both = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, sin], axis=-1)
    if rope.query_scaling is None:
        return Angles(*both)
    beta, length = rope.query_scaling
    return Angles(*both, 1 + beta * jnp.log1p((position_bt // length).astype(jnp.float32)))


def frequencies(
    rope: Rope, head_dim: int, context: int, length_bt: Int[Array, "b t"]
) -> tuple[Float[Array, "b t pairs"], float]:
    """The angle per position of each pair of features, float32, and the factor of cosines and sines.

    Axes b and t have size one unless the angles depend on the length.
    """
    dim, options = rope.dim(head_dim), dict(rope.options)
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    power = rope.theta**exponent
    inverse = (1.0 / power).astype(np.float32)
    attention_factor = 1.0
    if rope.rope_type == "proportional":
        rotated = int(rope.partial_rotary_factor * head_dim // 2)
        inverse[rotated:] = 0
        inverse = inverse / np.float32(options.get("factor", 1.0))
    elif rope.rope_type == "linear":
        inverse = inverse / np.float32(options["factor"])
    elif rope.rope_type == "llama3":
        inverse = _llama3(inverse, options)
    elif rope.rope_type == "yarn":
        inverse = _yarn(power, rope.theta, dim, options)
        attention_factor = _yarn_factor(options)
    elif rope.rope_type == "longrope":
        short, long = (
            jnp.asarray(1.0 / (np.array(options[key], np.float32) * power), jnp.float32)
            for key in ("short_factor", "long_factor")
        )
        original = options["original_max_position_embeddings"]
        is_long = length_bt[..., None] > original
        return jnp.where(is_long, long[None, None], short[None, None]), _longrope_factor(options, context)
    elif rope.rope_type == "dynamic":
        factor = options["factor"]
        length = jnp.maximum(length_bt, context).astype(jnp.float32)
        base = rope.theta * ((factor * length / context) - (factor - 1)) ** (dim / (dim - 2))
        return 1.0 / base[..., None] ** jnp.asarray(exponent)[None, None], 1.0
    return jnp.asarray(inverse, jnp.float32)[None, None], attention_factor


def _llama3(inverse: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    wavelength = 2 * math.pi / inverse
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    ratio = options["original_max_position_embeddings"] / wavelength
    kept = np.clip((ratio - low) / (high - low), 0.0, 1.0)
    return ((1 - kept) * inverse / options["factor"] + kept * inverse).astype(np.float32)


def _yarn(power: np.ndarray, theta: float, dim: int, options: dict[str, Any]) -> np.ndarray:
    """Keeps high frequencies (many rotations in the original context), and divides low ones by the factor."""
    original = options["original_max_position_embeddings"]

    def feature(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = feature(options.get("beta_fast") or 32), feature(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low or 0.001), 0, 1)
    return (1.0 / (options["factor"] * power) * ramp + 1.0 / power * (1 - ramp)).astype(np.float32)


def _yarn_factor(options: dict[str, Any]) -> float:
    if options.get("attention_factor") is not None:
        return options["attention_factor"]

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(options["factor"]) + 1.0 if options["factor"] > 1 else 1.0

    mscale, all_dim = options.get("mscale"), options.get("mscale_all_dim")
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)


def _longrope_factor(options: dict[str, Any], context: int) -> float:
    if options.get("attention_factor") is not None:
        return options["attention_factor"]
    original = options["original_max_position_embeddings"]
    factor = options.get("factor") or context / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def rotate(
    x_bthd: Float[Array, "b t h hd"],
    cos: Float[Array, "b t rotated"],
    sin: Float[Array, "b t rotated"],
    pairs: str = "halves",
) -> Float[Array, "b t h hd"]:
    """Rotates pairs of features of queries or keys, in float32. Features beyond the size of `cos` are not rotated.

    With `pairs="halves"`, feature i is paired with feature i + rotated / 2; with "neighbours", with the next one.
    """
    x = x_bthd.astype(jnp.float32)
    dim = cos.shape[-1]
    x, rest = (x, None) if dim == x.shape[-1] else jnp.split(x, [dim], axis=-1)
    if pairs == "halves":
        left, right = jnp.split(x, 2, axis=-1)
        rotated = x * cos[:, :, None] + jnp.concatenate([-right, left], axis=-1) * sin[:, :, None]
    else:
        cos, sin = (half[:, :, None, : dim // 2, None] for half in (cos, sin))
        two = x.reshape(*x.shape[:-1], -1, 2)
        left, right = jnp.split(two, 2, axis=-1)
        rotated = (two * cos + jnp.concatenate([-right, left], axis=-1) * sin).reshape(x.shape)
    return (rotated if rest is None else jnp.concatenate([rotated, rest], axis=-1)).astype(x_bthd.dtype)
