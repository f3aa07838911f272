"""What the decoder computes by kind of layer: RoPE angles, attention with a window, shared keys and values.

Gemma 4's second embeddings, an input for each layer, are here too. `families/kinds.py` reads the kinds.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from para_jax.annotations import Array, Float, Int
from para_jax.backbones import rope
from para_jax.backbones.attention import Seen
from para_jax.backbones.kernels import Kernel, prompt_attention
from para_jax.backbones.layers import At
from para_jax.backbones.linear import matmul, rms_norm
from para_jax.config import BackboneConfig

KeysValues = tuple[Array, Array]  # (b, k, s, hd) each


def angles(config: BackboneConfig, position_bt: Int[Array, "b t"], length_bt: Int[Array, "b t"]) -> list[rope.Angles]:
    """The RoPE angles of each kind of layer."""
    context = config.max_position_embeddings
    return [
        rope.angles(kind.rope, kind.head_dim or config.head_dim, context, position_bt, length_bt)
        for kind in config.layer_kinds
    ]


def attend(
    config: BackboneConfig,
    at: At,
    kernel: Kernel,
    q_btkgh: Float[Array, "b t k g hd"],
    keys_values: KeysValues,
    seen: Seen,
    sinks_kg: Float[Array, "k g"] | None,
    mesh: jax.sharding.Mesh | None,
) -> Float[Array, "b t kghd"]:
    """Attention with the window of the layer's kind, and the layer's sinks if it has some."""
    scale = q_btkgh.shape[-1] ** -0.5 if config.attention_scale is None else config.attention_scale

    def with_window(window: int | None) -> Callable[..., Array]:
        mask, softcap = seen._replace(window=window), config.attn_logit_softcapping
        return lambda q, k, v, sinks: prompt_attention(kernel, q, k, v, mask, scale, softcap, mesh, sinks)

    # Kernels need a static window, so scanned layers of several kinds get a branch per window.
    windows = [kind.window for kind in config.layer_kinds]
    different = list(dict.fromkeys(windows))
    if len(different) == 1:
        return with_window(windows[0])(q_btkgh, *keys_values, sinks_kg)
    if isinstance(at.kind, int):
        return with_window(windows[at.kind])(q_btkgh, *keys_values, sinks_kg)
    branch = jnp.array([different.index(window) for window in windows])[at.kind]
    return jax.lax.switch(branch, [with_window(window) for window in different], q_btkgh, *keys_values, sinks_kg)


def to_share(config: BackboneConfig, dtype: jnp.dtype, b: int, t: int) -> dict[int, KeysValues]:
    """Placeholders for the keys and values that other layers share, by the number of their layer."""
    sources = {kind.shares: config.heads(kind) for kind in config.layer_kinds if kind.shares is not None}
    return {layer: (jnp.zeros((b, k, t, hd), dtype),) * 2 for layer, (k, _, hd) in sorted(sources.items())}


def layer_inputs(
    config: BackboneConfig,
    by_token: Float[Array, "b t lp"],
    x_btd: Float[Array, "b t d"],
    projection: Float[Array, "lp d"],
    norm_p: Float[Array, " p"],
) -> Float[Array, "l b t p"]:
    """Each layer's own input, of the tokens' second embeddings and a projection of the first, x (Gemma 4)."""
    assert config.per_layer_inputs is not None
    width = config.per_layer_inputs[1]
    by_token = by_token.astype(x_btd.dtype) * width**0.5
    by_context = matmul(x_btd.astype(projection.dtype), projection, dtype=x_btd.dtype) * config.hidden_size**-0.5
    by_token, by_context = (x.reshape(*x.shape[:2], -1, width) for x in (by_token, by_context))
    return jnp.moveaxis((rms_norm(by_context, norm_p, config.rms_norm_eps) + by_token) * 2**-0.5, 2, 0)
