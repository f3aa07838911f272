"""Differences between the supported versions of JAX, Flax and transformers.

A comment has the first version that does not need the line. pyproject.toml has the oldest supported versions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

# Containers of submodules and parameters.
List: Any = getattr(nnx, "List", list)  # flax 0.12.0
Dict: Any = getattr(nnx, "Dict", dict)  # flax 0.12.0

# transformers adds this to the RoPE settings by layer type, if the model has no layers of a type.
ADDED_ROPE = ("rope_type", "default")  # transformers 5.18.0
# Gemma 1's config.json has this name for the tanh approximation.
GEMMA_ACTIVATIONS = {"gelu": "gelu_pytorch_tanh"}  # transformers 5.18.0
# Constants of transformers' code that are now the options swiglu_alpha and swiglu_limit of GPT-OSS.
SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}  # transformers 5.19.0


def compiles_ahead() -> bool:
    """Whether programs can be compiled for TPUs without having them. Older jaxlib versions crash afterwards."""
    return jax.__version_info__ >= (0, 8, 0)  # jax 0.8.0


def drop_fields(*names: str) -> Any:
    """Names of `drop_fields` for `register_dataclass`; older versions iterate over the letters of a bare name."""
    return names if jax.__version_info__ >= (0, 10, 0) else [names]  # jax 0.10.0


def varying(x: Any, axis: str) -> Any:
    """Marks values as varying over a mesh axis (in `jax.shard_map`)."""
    if not hasattr(jax.lax, "pcast"):
        return jax.lax.pvary(x, axis)  # type: ignore[attr-defined,unused-ignore]  # jax 0.8.2
    return jax.lax.pcast(x, axis, to="varying")


def unregister_event_duration_listener(callback: Callable[..., None]) -> None:
    """Unregisters a listener of `jax.monitoring`."""
    if hasattr(jax.monitoring, "unregister_event_duration_listener"):
        jax.monitoring.unregister_event_duration_listener(callback)
    else:
        from jax._src import monitoring

        private: Any = monitoring
        private._unregister_event_duration_listener_by_callback(callback)  # jax 0.8.1
