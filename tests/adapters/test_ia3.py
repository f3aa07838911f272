"""(IA)3's vectors against NumPy: both usual forms, layers that differ, and vectors behind a learned projection."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import AdapterBank, IA3Config, ParaJaxError
from para_jax.adapters.adapter import Adapter, abstract_layers
from para_jax.adapters.method import Prompt
from para_jax.adjustment import Adjustment
from para_jax.convert.merging import merge_adapter
from tests.helpers import SMALL, family_backbone, random_adapter

D = SMALL.hidden_size
PROMPT = Prompt(jnp.zeros((2, D)), jnp.zeros((2, D)), jnp.ones(2, bool))
PEFTS = IA3Config()
GROUPS = IA3Config(target_modules=("q_proj", "k_proj", "up_proj"), feedforward_modules=())
CONFIGS = {
    "peft's": PEFTS,
    "the group's": GROUPS,
    "up and down": IA3Config(target_modules=("up_proj", "down_proj")),
    "layers that differ": IA3Config(
        target_modules=("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "v_proj"),
        feedforward_modules=("layers.1.mlp.down_proj",),
    ),
    "output of down": IA3Config(target_modules=("down_proj", "o_proj"), feedforward_modules=()),
    "expression": IA3Config(target_modules=r".*\.1\..*(gate|down)_proj", feedforward_modules=r".*down_proj"),
    "projection": IA3Config(
        target_modules=("k_proj", "layers.1.mlp.down_proj"),
        feedforward_modules=("layers.1.mlp.down_proj",),
        projection=3,
    ),
}


def vectors_of(adapter: Adapter) -> list[dict[str, np.ndarray]]:
    """Each layer's vectors by site, in float64, from the adapter's tensors."""
    tensors = {name: np.asarray(x, np.float64) for name, x in adapter.tensors().items()}
    layers = []
    for layer, sites in enumerate(adapter.config.modules(SMALL)):
        if adapter.config.projection:
            product = 1 + tensors["short"][layer] @ tensors["matrix"][layer]
            # Sites stand in the model's order, whether this layer has them or not.
            widths = {"k_proj": SMALL.sites["k_proj"].outputs, "down_proj": SMALL.sites["down_proj"].inputs}
            every = dict(zip(widths, np.split(product, [widths["k_proj"]]), strict=True))
            layers.append({site: every[site] for site in sites})
        else:
            layers.append({site: tensors[f"vectors.{site}"][layer] for site in sites})
    return layers


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_vectors_against_numpy(name: str, stacked: bool) -> None:
    """y' = l * y, or W (l * x) for the feed-forward's last."""
    config = CONFIGS[name]
    adapter = random_adapter(config, SMALL, seed=2)
    rng = np.random.default_rng(0)
    for layer, vectors in enumerate(vectors_of(adapter)):
        weights = jax.tree.map(lambda x, i=layer: x[i], adapter.layers)
        made = jax.tree.map(lambda x: x[None], weights.prepare(PROMPT, jnp.int32(layer) if stacked else layer))

        def draw(width: int) -> np.ndarray:
            return rng.normal(size=(1, 3, width)).astype(np.float32)

        def apply(site: str, y: np.ndarray, made: Adjustment = made) -> np.ndarray:
            return np.asarray(made.apply(site, jnp.asarray(y), jnp.asarray(y)))

        forward = "down_proj" in vectors and bool(config.feedforward_modules)
        for site in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"):
            y = draw(SMALL.sites[site].outputs)
            np.testing.assert_allclose(apply(site, y), y * vectors.get(site, np.ones(1)), rtol=1e-4, atol=1e-5)
        # The feed-forward block: silu(gate) * up is what down_proj reads.
        gate, up = draw(SMALL.intermediate_size), draw(SMALL.intermediate_size)
        inner = gate * up * vectors.get("up_proj", np.ones(1)) * (vectors["down_proj"] if forward else 1)
        np.testing.assert_allclose(gate * apply("up_proj", up), inner, rtol=1e-4, atol=1e-5)
        out = draw(D)
        scale = 1 if forward or "down_proj" not in vectors else vectors["down_proj"]
        np.testing.assert_allclose(apply("down_proj", out), out * scale, rtol=1e-4, atol=1e-5)
        if vectors:
            assert max(np.abs(x).max() for x in jax.tree.leaves(made)) > 0.5


@pytest.mark.parametrize("name", CONFIGS)
def test_size_and_first_weights(name: str) -> None:
    """The vectors that layers have, ones at first; a fresh adapter is the identity either way."""
    config = CONFIGS[name]
    fresh = Adapter.create(config, SMALL, jax.random.key(0))
    if config.projection:
        leaves = jax.tree.leaves(abstract_layers(config, SMALL))
        assert config.size(SMALL) == sum(x.size for x in leaves) == 2 * 3 * (1 + 16 + 48)
    else:
        assert config.size(SMALL) == sum(x.size for layer in vectors_of(fresh) for x in layer.values())
        assert all(np.all(np.asarray(x) == 1) for x in fresh.tensors().values())
    made = jax.tree.map(lambda x: x[0], fresh.layers).prepare(PROMPT, 0)
    assert not any(np.any(x) for x in jax.tree.leaves(made))


def test_sizes_at_7b() -> None:
    """L (d_k + d_v + d_ff), and the same with q, k and up."""
    from para_jax import BackboneConfig

    llama_7b = BackboneConfig(32000, 4096, 11008, 32, 32, 32, 128)
    assert PEFTS.size(llama_7b) == GROUPS.size(llama_7b) == 32 * (4096 + 4096 + 11008)


def test_names_of_tensors() -> None:
    bank = AdapterBank.create({"a": PEFTS, "b": CONFIGS["projection"]}, SMALL)
    assert set(bank["a"].tensors()) == {"vectors.k_proj", "vectors.v_proj", "vectors.down_proj"}
    assert bank["a"].tensors()["vectors.down_proj"].shape == (2, SMALL.intermediate_size)
    assert set(bank["b"].tensors()) == {"short", "matrix"}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_merged_into_experts(family: str) -> None:
    """The up projections of all experts, with their biases, before anything is clamped."""
    backbone = family_backbone(family, stacked=True)
    adapter = random_adapter(GROUPS, backbone.config, seed=3)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 62, (2, 7), dtype=np.int32))
    bank = AdapterBank.stack({"a": adapter}, backbone.config)
    adapted, bare = backbone(tokens, bank=bank, tenants=["a", "a"]), backbone(tokens)
    merged = merge_adapter(backbone, adapter)(tokens)
    assert jnp.abs(merged - adapted).max() < 1e-5 * jnp.abs(adapted).max() < 1e-3 * jnp.abs(adapted - bare).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ("k_porj", "down_proj")}, "entry of target_modules 'k_porj'; did you mean 'k_proj'"),
        ({"target_modules": 3}, "target_modules must be names of modules, not 3"),
        ({"target_modules": (), "feedforward_modules": ()}, "target_modules is empty; choose among q_proj"),
        ({"exclude_modules": ("kproj",)}, "entry of exclude_modules 'kproj'; did you mean 'k_proj'"),
        ({"exclude_modules": ("k_proj", 1)}, "exclude_modules must be names of modules, not 1"),
        ({"feedforward_modules": ("up_proj",)}, "feedforward_modules has up_proj, which target_modules lacks"),
        ({"feedforward_modules": ("v_proj",)}, "feedforward_modules has v_proj; only down_proj's input can be scaled"),
        (
            {"feedforward_modules": ".*gate.*"},
            r"feedforward_modules has '\.\*gate\.\*', which is not one of the targeted",
        ),
        (
            {
                "target_modules": ("layers.0.mlp.down_proj", "layers.1.mlp.down_proj"),
                "feedforward_modules": ("layers.1.mlp.down_proj",),
            },
            "feedforward_modules has down_proj in some of the targeted layers and not in others",
        ),
        ({"projection": -1}, "projection must be a whole number from 0, not -1"),
        ({"projection": True}, "projection must be a whole number from 0, not True"),
        ({"projection": 2.0}, "projection must be a whole number from 0, not 2.0"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParaJaxError, match=message):
        IA3Config(**options).size(SMALL)
