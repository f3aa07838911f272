"""One tenant's trained weights, and the check of their names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from para_jax.adapters.method import BackboneShape, MethodConfig, StackShape
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
    """One tenant's trained weights: a method's layer with every leaf stacked over the layers, in float32.

    If the backbone has several stacks of layers, `layers` is a dict with a method's layer for each, by name.

    `load_adapter` sets `chat_template` to the one in the adapter's folder, and `save_adapter` writes it again. It is
    not part of the pytree: adapters from `jax.tree.map` or from a bank have None.
    """

    config: MethodConfig
    layers: Any
    chat_template: str | None = None

    @classmethod
    def create(cls, config: MethodConfig, shape: BackboneShape, key: Array) -> Adapter:
        """A fresh adapter: the identity."""
        return cls(config, _fresh(config, shape, key))

    def tensors(self) -> dict[str, Array]:
        """The weights by name, such as `down` (layers, d, r)."""
        return named_leaves(self.layers)

    def check(self, shape: BackboneShape) -> None:
        """Raises ParaJaxError, listing all problems, unless the weights are float32 and fit this backbone."""
        problems = mismatches(self.tensors(), self.config, shape)
        if problems:
            raise ParaJaxError(f"an adapter does not fit the backbone it is used with: {'; '.join(problems)}")


@partial(jax.jit, static_argnums=(0, 1))
def _fresh(config: MethodConfig, shape: BackboneShape, key: Array) -> Any:
    keys = jax.random.split(key, shape.num_hidden_layers)

    def stack(shape: BackboneShape, keys: Array, numbers: Array) -> Any:
        # `map`, because random bits of many keys under `vmap` take seconds to compile.
        return jax.lax.map(lambda args: config.layer(shape, nnx.Rngs(args[0]), args[1]), (keys, numbers))

    if len(shape.stacks) == 1:
        return stack(shape, keys, jnp.arange(shape.num_hidden_layers))
    numbers = {s: jnp.array(s.layers) for s in shape.stacks}
    return {s.name: stack(StackShape(shape, s), keys[own], own) for s, own in numbers.items()}


def in_stack(layers: Any, name: str) -> Any:
    """The part of an adapter's layers for a stack of the backbone. The name is empty if there is one stack only."""
    return layers[name] if name else layers


@lru_cache(maxsize=64)
def abstract_layers(config: MethodConfig, shape: BackboneShape) -> Any:
    return jax.eval_shape(partial(_fresh, config, shape), jax.random.key(0))


def mismatches(tensors: Mapping[str, Any], config: MethodConfig, shape: BackboneShape) -> list[str]:
    """Lists the missing, extra and misshapen arrays among an adapter's weights by name."""
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
