"""The cost of an adapter on a backbone, computed from their configs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from para_jax.adapters.adapter import abstract_layers, in_stack
from para_jax.adapters.method import BackboneShape, MethodConfig, Prompt
from para_jax.backbones.options import wide
from para_jax.config import BackboneConfig


class Cost(NamedTuple):
    """The cost of one adapter.

    Attributes:
      stored: bytes of the float32 weights.
      in_flight: bytes of the prepared Adjustment, which each request holds and each decode step reads.
    """

    parameters: int
    stored: int
    in_flight: int


def adapter_cost(config: MethodConfig, shape: BackboneShape, dtype: str = "bfloat16") -> Cost:
    """The cost of an adapter with this config on this backbone, without creating arrays.

    >>> from para_jax import BackboneConfig, ParaConfig
    >>> adapter_cost(ParaConfig(r=12), BackboneConfig(32000, 4096, 11008, 32, 32, 32, 128))
    Cost(parameters=8945664, stored=35782656, in_flight=1228800)
    """

    def prepared(layers: Any) -> list[Any]:
        hidden = jnp.zeros((1, shape.hidden_size), dtype)
        prompt = Prompt(hidden, hidden, jnp.ones((1,), bool))
        every = [
            jax.tree.map(lambda x, i=i: x[i], in_stack(layers, stack.name)).prepare(prompt, layer)
            for stack in shape.stacks
            for i, layer in enumerate(stack.layers)
        ]
        return [one.for_decoding().astype(wide(jnp.dtype(dtype))) for one in every]

    leaves = jax.tree.leaves(jax.eval_shape(prepared, abstract_layers(config, shape)))
    in_flight = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    parameters = config.size(shape)
    return Cost(parameters, 4 * parameters, in_flight)


def step_bytes(shape: BackboneConfig, rows: int, dtype: str) -> int:
    """Bytes of the backbone's weights that a decode step reads: all weights, but only `rows` rows of the embedding."""
    # If the head is tied, the step reads all of the embedding.
    embedding = 0 if shape.tie_word_embeddings else max(0, shape.vocab_size - rows)
    return jnp.dtype(dtype).itemsize * (shape.size - embedding * shape.hidden_size)
