"""Small random backbones and adapters. Identity-initialised adapters prove nothing, so these are never fresh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from para_jax.adapters.bank import Adapter, AdapterBank
from para_jax.adapters.method import MethodConfig
from para_jax.backbones.config import BackboneConfig
from para_jax.backbones.decoder import Backbone

SMALL = BackboneConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
    max_position_embeddings=128,
    eos_token_ids=(0,),
)


def random_backbone(seed: int = 0, stacked: bool = False, **overrides) -> Backbone:
    """A small backbone whose weights are large enough for its logits to differ a lot from token to token."""
    config = dataclasses.replace(SMALL, **overrides)
    backbone = Backbone(config, jax.random.key(seed), dtype="float32", stacked=stacked)

    def louder(path, x):
        return x if "norm" in jax.tree_util.keystr(path) else 10 * x

    return jax.tree_util.tree_map_with_path(louder, backbone)


def random_adapter(config: MethodConfig, shape: BackboneConfig, seed: int, scale: float = 0.5) -> Adapter:
    """An adapter with every weight drawn from N(0, scale), far from the identity."""
    fresh = Adapter.create(config, shape, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    drawn = [scale * jax.random.normal(k, x.shape, jnp.float32) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def random_bank(
    configs: dict[str, MethodConfig], shape: BackboneConfig, seed: int = 0, scale: float = 0.5
) -> AdapterBank:
    """Random adapters under these names; a tenant's weights depend on its place in the dict."""
    adapters = {name: random_adapter(c, shape, seed + 10 * i, scale) for i, (name, c) in enumerate(configs.items())}
    return AdapterBank.stack(adapters, shape)
