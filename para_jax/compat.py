"""What differs between the versions of JAX, Flax and transformers that para_jax runs on.

Each line ends with the version from which on it is not needed. pyproject.toml has the oldest versions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

# What holds modules and parameters in a module.
List: Any = getattr(nnx, "List", list)  # flax 0.12.0
Dict: Any = getattr(nnx, "Dict", dict)  # flax 0.12.0

# What transformers puts beside the settings of RoPE for each type of layer, where the model lacks layers of a type.
ADDED_ROPE = ("rope_type", "default")  # transformers 5.18.0
# What Gemma 1's config.json says for the tanh approximation.
GEMMA_ACTIVATIONS = {"gelu": "gelu_pytorch_tanh"}  # transformers 5.18.0


def compiles_ahead() -> bool:
    """Whether programs can be compiled for a TPU that is not here; an older jaxlib crashes when it has done so."""
    return jax.__version_info__ >= (0, 8, 0)  # jax 0.8.0


def drop_fields(*names: str) -> Any:
    """These names for `register_dataclass`, which drops each letter of a name that is not in a list of its own."""
    return names if jax.__version_info__ >= (0, 10, 0) else [names]  # jax 0.10.0


def varying(x: Any, axis: str) -> Any:
    """The same values, marked as different on each device of this axis (in `jax.shard_map`)."""
    if not hasattr(jax.lax, "pcast"):
        return jax.lax.pvary(x, axis)  # type: ignore[attr-defined,unused-ignore]  # jax 0.8.2
    return jax.lax.pcast(x, axis, to="varying")


def unregister_event_duration_listener(callback: Callable[..., None]) -> None:
    """`jax.monitoring` no longer calls this function."""
    if hasattr(jax.monitoring, "unregister_event_duration_listener"):
        jax.monitoring.unregister_event_duration_listener(callback)
    else:
        from jax._src import monitoring

        own: Any = monitoring
        own._unregister_event_duration_listener_by_callback(callback)  # jax 0.8.1
