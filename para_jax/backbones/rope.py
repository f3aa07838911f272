"""Rotary position embeddings (Su et al., arXiv 2104.09864), with the ways transformers has to stretch them.

    linear    all frequencies divided by a factor
    dynamic   a larger base for rows longer than the model was trained on (NTK)
    llama3    long wavelengths divided by a factor, those between interpolated (Llama 3.1 to 3.3)
    yarn      the same with a ramp over features, and larger scores (Peng et al., arXiv 2309.00071)
    longrope  a factor for each feature, one set for short and one for long rows (Ding et al., arXiv 2402.13753)

What dynamic and longrope do depends on a row's length so far. transformers takes the longest of the batch; here it is
the row's own, so that a row's output does not depend on its neighbours.
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
    """What positions do to queries and keys, float32.

    Attributes:
      cos, sin: of every position's angles, each pair's angle given to both halves.
      query_scale: what queries are multiplied by; None if nothing.
    """

    cos: Float[Array, "b t rotated"]
    sin: Float[Array, "b t rotated"]
    query_scale: Float[Array, "b t"] | None = None


def angles(
    rope: Rope | None, head_dim: int, context: int, position_bt: Int[Array, "b t"], length_bt: Int[Array, "b t"]
) -> Angles:
    """The angles of every position.

    Args:
      rope: None is no turning at all.
      context: the model's `max_position_embeddings`.
      length_bt: how many tokens the row has so far, for each of its tokens.
    """
    if rope is None:
        ones = jnp.ones((*position_bt.shape, head_dim), jnp.float32)
        return Angles(ones, jnp.zeros_like(ones))
    inverse, factor = frequencies(rope, head_dim, context, length_bt)
    angle = position_bt[..., None].astype(jnp.float32) * inverse
    cos, sin = jnp.cos(angle) * factor, jnp.sin(angle) * factor
    both = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, sin], axis=-1)
    if rope.query_scaling is None:
        return Angles(*both)
    beta, length = rope.query_scaling
    return Angles(*both, 1 + beta * jnp.log1p((position_bt // length).astype(jnp.float32)))


def frequencies(
    rope: Rope, head_dim: int, context: int, length_bt: Int[Array, "b t"]
) -> tuple[Float[Array, "b t pairs"], float]:
    """The angle per position of each pair of features, float32, with axes of size one where rows do not differ; and
    the factor of cosines and sines."""
    dim, options = rope.dim(head_dim), dict(rope.options)
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    power = rope.theta**exponent
    inverse = (1.0 / power).astype(np.float32)
    attention_factor = 1.0
    if rope.rope_type == "linear":
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
    """Features that turn often in the original context are kept, those that turn seldom are divided by the factor."""
    original = options["original_max_position_embeddings"]

    def feature(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = feature(options.get("beta_fast") or 32), feature(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low or 0.001), 0, 1)
    return (1.0 / (options["factor"] * power) * ramp + 1.0 / power * (1 - ramp)).astype(np.float32)


def _yarn_factor(options: dict[str, Any]) -> float:
    if options.get("attention_factor") is not None:
        return options["attention_factor"]

    def scale(by: float) -> float:
        return 0.1 * by * math.log(options["factor"]) + 1.0 if options["factor"] > 1 else 1.0

    above, below = options.get("mscale"), options.get("mscale_all_dim")
    return scale(above) / scale(below) if above and below else scale(1.0)


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
    """Rotates queries or keys by their positions' angles, in float32; features beyond the angles' stay as they are.

    A pair is a feature and the one half of the rotated features behind it, or with "neighbours" the next one.
    """
    x = x_bthd.astype(jnp.float32)
    rotated = cos.shape[-1]
    x, rest = (x, None) if rotated == x.shape[-1] else jnp.split(x, [rotated], axis=-1)
    if pairs == "halves":
        left, right = jnp.split(x, 2, axis=-1)
        turned = x * cos[:, :, None] + jnp.concatenate([-right, left], axis=-1) * sin[:, :, None]
    else:
        cos, sin = (half[:, :, None, : rotated // 2, None] for half in (cos, sin))
        two = x.reshape(*x.shape[:-1], -1, 2)
        left, right = jnp.split(two, 2, axis=-1)
        turned = (two * cos + jnp.concatenate([-right, left], axis=-1) * sin).reshape(x.shape)
    return (turned if rest is None else jnp.concatenate([turned, rest], axis=-1)).astype(x_bthd.dtype)
