"""What a backbone can be asked for besides its weights, and what it does if it is not asked."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from para_jax.errors import ParaJaxError

Dtype = Literal["auto", "float32", "bfloat16"]
Quantize = Literal["int8", "int4"]
Attention = Literal["auto", "plain", "cudnn", "splash"]
Remat = Literal["none", "layers", "products"]


def compute_dtype(dtype: Dtype) -> jnp.dtype:
    """The dtype of weights and computation; "auto" is bfloat16 on TPU and GPU, float32 on CPU."""
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in ("float32", "bfloat16"):
        raise ParaJaxError(f"dtype {dtype!r} is not supported; choose auto, float32 or bfloat16")
    return jnp.dtype(dtype)


def default_remat() -> Remat:
    """Accelerators have less memory than time. A CPU computes most again as fast as it would write and read it."""
    return "products" if jax.default_backend() == "cpu" else "layers"


def default_stacked() -> bool:
    """As decoding likes it: stacked on a TPU, which reads the stack in place; apart on a CPU and a GPU.

    These would copy every layer out of the stack in every step. Fine-tuning wants `stacked=True` everywhere: one layer
    is compiled and not all of them.
    """
    return jax.default_backend() == "tpu"
