"""Initializes a backbone with random weights, from the table in `para_jax/parameters.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from para_jax.compat import Dict
from para_jax.config import BackboneConfig
from para_jax.parameters import Parameter
from para_jax.quantization import QUANTIZED, Quantize

if TYPE_CHECKING:
    from jax import Array


def random_weights(
    parameters: Sequence[Parameter],
    config: BackboneConfig,
    dtype: jnp.dtype,
    key: Array,
    quantize: Quantize | None = None,
) -> Any:
    """Random values for these parameters, by name. With `quantize`, random integers with scales."""
    weights = Dict()
    for parameter, subkey in zip(parameters, jax.random.split(key, len(parameters)), strict=True):
        name, shape = parameter.name, parameter.shape
        if parameter.quantizable and quantize is not None:
            bits = QUANTIZED[quantize]
            integers = jax.random.randint(subkey, shape, -bits.most, bits.most + 1, jnp.int8).astype(bits.dtype)
            scale = jnp.full((*shape[:-1], bits.groups(shape[-1])), 0.035 / bits.most, bits.scale_dtype)
            weights[name], weights[parameter.scale] = nnx.Param(integers), nnx.Param(scale)
        elif parameter.init == "normal":
            weights[name] = nnx.Param((0.02 * jax.random.normal(subkey, shape, jnp.float32)).astype(dtype))
        else:
            value = 0.0 if parameter.init == "zeros" else 1.0 - config.norm_offset
            weights[name] = nnx.Param(jnp.full(shape, value, dtype))
    return weights
