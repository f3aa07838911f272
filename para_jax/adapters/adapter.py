"""One tenant's trained weights, and which arrays they have to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from para_jax.adapters.method import BackboneShape, MethodConfig
from para_jax.compat import drop_fields
from para_jax.errors import ParaJaxError

if TYPE_CHECKING:
    from jax import Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers"],
    meta_fields=["config"],
    drop_fields=drop_fields("chat_template"),
)
@dataclass(frozen=True)
class Adapter:
    """One tenant's trained weights: a method's layer with every leaf stacked over the layers, float32.

    `chat_template` is the text that `load_adapter` found beside the weights, which `save_adapter` puts there again.
    No program depends on it: it is no part of the pytree, and what `jax.tree.map` or a bank makes has none.
    """

    config: MethodConfig
    layers: Any
    chat_template: str | None = None

    @classmethod
    def create(cls, config: MethodConfig, shape: BackboneShape, key: Array) -> Adapter:
        """A fresh adapter, which is the identity."""
        return cls(config, _fresh(config, shape, key))

    def tensors(self) -> dict[str, Array]:
        """The weights by name: `down` (layers, d, r), and so on."""
        return named_leaves(self.layers)

    def check(self, shape: BackboneShape) -> None:
        """Raises ParaJaxError, with all that is wrong, unless the weights are float32 and fit this backbone."""
        problems = mismatches(self.tensors(), self.config, shape)
        if problems:
            raise ParaJaxError(f"an adapter does not fit the backbone it is used with: {'; '.join(problems)}")


@partial(jax.jit, static_argnums=(0, 1))
def _fresh(config: MethodConfig, shape: BackboneShape, key: Array) -> Any:
    keys = jax.random.split(key, shape.num_hidden_layers)
    # One layer after the other: random bits of many keys at once take seconds to compile.
    return jax.lax.map(
        lambda of: config.layer(shape, nnx.Rngs(of[0]), of[1]), (keys, jnp.arange(shape.num_hidden_layers))
    )


@lru_cache(maxsize=64)
def abstract_layers(config: MethodConfig, shape: BackboneShape) -> Any:
    """The layers of an adapter with shapes and dtypes only."""
    return jax.eval_shape(partial(_fresh, config, shape), jax.random.key(0))


def mismatches(tensors: Mapping[str, Any], config: MethodConfig, shape: BackboneShape) -> list[str]:
    """All that keeps these arrays, by name, from being an adapter's weights."""
    expected = named_leaves(abstract_layers(config, shape))
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not expected" for name in tensors if name not in expected]
    for name, x in tensors.items():
        if name in expected and (x.shape != expected[name].shape or x.dtype != np.float32):
            problems.append(f"{name} is {x.dtype}{list(x.shape)}, not float32{list(expected[name].shape)}")
    return problems


def named_leaves(tree: Any) -> dict[str, Array]:
    """The arrays of a Flax module by their dotted names."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): x for path, x in leaves}
