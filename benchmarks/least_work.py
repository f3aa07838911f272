"""What a decode step cannot do without: its bytes at the rate they can be read, and its products alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp

from para_jax.backbones.linear import matmul


def products_program(backbone: Any, rows: int) -> Callable[[], float]:
    """Seconds that the products of one decode step take, each on the result of the one before."""
    c, steps = backbone.config, 8

    def multiply(x: Any, weight: Any) -> Any:
        return matmul(x[:, None], weight).reshape(rows, -1)

    def layer(x: Any, block: Any) -> tuple[Any, None]:
        x = multiply(x, block["qkv"][...])[:, : c.num_attention_heads * c.head_dim]
        x = multiply(multiply(x, block["out"][...]), block["gate_up"][...])[:, : c.intermediate_size]
        x = multiply(x, block["down"][...])
        # Kept near one: numbers that fade to the smallest there are would make products slow.
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=1, keepdims=True)), None

    @jax.jit
    def chain(backbone: Any, x: Any) -> Any:
        def step(_: Any, x: Any) -> Any:
            if backbone.stacked:
                x, _ = jax.lax.scan(layer, x, backbone.blocks)
            else:
                for block in backbone.blocks:
                    x, _ = layer(x, block)
            head = backbone.embed if c.tie_word_embeddings else backbone.head
            return x + 0.01 * jnp.max(multiply(x, head[...]), axis=1, keepdims=True)

        return jax.lax.fori_loop(0, steps, step, x)

    x = jnp.ones((rows, c.hidden_size), backbone.dtype)

    def seconds() -> float:
        return common.timed(lambda: chain(backbone, x).block_until_ready())[0] / steps

    return seconds


def wide_program(backbone: Any, rows: int) -> Callable[[], float]:
    """Bytes a second at which wide products, (rows, d) by (d, 8192), read their weights."""
    d, size = backbone.config.hidden_size, backbone.dtype.itemsize
    # More than any cache of a processor's core holds.
    count = max(1, int((3e8 if jax.default_backend() == "cpu" else 4e9) / (8192 * d * size)))
    weights = [jnp.full((8192, d), 0.01, backbone.dtype) for _ in range(count)]
    x = jnp.ones((rows, d), backbone.dtype)

    @jax.jit
    def read(x: Any, weights: Any) -> Any:
        return [jnp.max(matmul(x[:, None], w)) for w in weights]

    def rate() -> float:
        seconds = min(common.timed(lambda: jax.block_until_ready(read(x, weights)))[0] for _ in range(3))
        return sum(w.nbytes for w in weights) / seconds

    return rate
