"""The backbones that are measured: sizes, and random weights for them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

# Sizes in the names of transformers' LlamaConfig. Heads have their own keys and values; no token ends a text.
SHAPES: dict[str, dict[str, Any]] = {
    # 97.5M parameters, of which the embedding and the head, which are not tied, have 6.3M each.
    "100m": {
        "vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 12, "head_dim": 64,
    },
    # 31.5M, head tied to the embedding.
    "32m": {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "llama2-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    },
    # For smoke tests.
    "small": {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2,
        "num_attention_heads": 2, "head_dim": 64,
    },
}  # fmt: skip


def config_of(shape: str) -> Any:
    from para_jax import BackboneConfig

    sizes = SHAPES[shape]
    return BackboneConfig(**sizes, num_key_value_heads=sizes["num_attention_heads"], name=shape)


def random_backbone(shape: str, dtype: str = "auto", stacked: bool | None = None, seed: int = 0) -> Any:
    """Drawn on the device in one program, so that nothing but the weights themselves is ever held."""
    import jax

    from para_jax import Backbone

    make = partial(Backbone, config_of(shape), dtype=dtype, stacked=stacked)
    return jax.block_until_ready(jax.jit(make)(jax.random.key(seed)))


def random_bank(config: Any, method: Any, tenants: int, scale: float = 0.2) -> Any:
    """Adapters far from the identity, named tenant-0, tenant-1, ..."""
    import jax

    from para_jax import Adapter, AdapterBank

    @jax.jit
    def draw(key: Any) -> Any:
        leaves, tree = jax.tree.flatten(Adapter.create(method, config, key).layers)
        keys = jax.random.split(key, len(leaves))
        drawn = [scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(tree, drawn)

    keys = jax.random.split(jax.random.key(1), tenants)
    adapters = {f"tenant-{i}": Adapter(method, draw(key)) for i, key in enumerate(keys)}
    return AdapterBank.stack(adapters, config)


def write_random(folder: Path, shape: str) -> None:
    """A random float32 checkpoint, the same for every system that is compared."""
    from para_jax import save_backbone

    save_backbone(random_backbone(shape, "float32", stacked=False), folder)


def writing() -> dict[str, Any]:
    """What a worker that writes checkpoints can be asked."""
    return {"write": write_random}
