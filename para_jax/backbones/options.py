"""The options of a backbone, and their defaults for this device."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from para_jax.errors import unknown

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "plain", "cudnn", "splash"]
Remat = Literal["none", "layers", "products"]


def compute_dtype(dtype: Dtype) -> jnp.dtype:
    """The dtype of weights and matmul inputs; "auto" is the one that this device multiplies fast.

    That is float32 on a CPU, float16 on an NVIDIA GPU before Ampere, such as a T4, and bfloat16 on all other devices.
    """
    if dtype == "auto":
        dtype = _default_dtype()
    if dtype not in get_args(Dtype):
        raise unknown("dtype", dtype, get_args(Dtype))
    return jnp.dtype(dtype)


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """float32 for float16, whose largest number is 65504; other dtypes are unchanged.

    >>> wide(jnp.dtype("float16")), wide(jnp.dtype("bfloat16"))
    (dtype('float32'), dtype(bfloat16))
    """
    return jnp.dtype("float32") if dtype == jnp.float16 else dtype


def _default_dtype() -> Dtype:
    if jax.default_backend() == "cpu":
        return "float32"
    capability = cuda_capability(jax.local_devices()[0])
    # GPUs before Ampere have no bfloat16 units: XLA widens each bfloat16 matmul's inputs to float32, weights included.
    return "float16" if capability is not None and capability < (8, 0) else "bfloat16"


def cuda_capability(device: Any) -> tuple[int, ...] | None:
    """The compute capability of an NVIDIA GPU, such as (7, 5) for a T4; None for other devices."""
    try:
        return tuple(int(part) for part in device.compute_capability.split("."))
    except (AttributeError, ValueError):  # a TPU has none, an AMD GPU has a name
        return None


def default_remat() -> Remat:
    """Accelerators save memory. A CPU recomputes all but matmuls as fast as it would write and read the results."""
    return "products" if jax.default_backend() == "cpu" else "layers"


def default_stacked() -> bool:
    """Whether stacked layers decode fastest: True on a TPU, which reads the stack in place.

    A CPU or GPU would copy every layer out of the stack in every step. Fine-tuning uses `stacked=True` on all devices,
    because only one layer is compiled.
    """
    return jax.default_backend() == "tpu"
