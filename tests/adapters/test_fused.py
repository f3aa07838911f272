"""Adapters of fused projections, joined and taken apart: random ones, against the change of each weight."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from para_jax import LoraConfig, load_adapter, save_adapter
from para_jax.adapters.adapter import Adapter
from para_jax.adapters.files import WEIGHTS
from para_jax.adapters.fused import Fused, as_transformers
from para_jax.adapters.targets import module_path
from para_jax.config import BackboneConfig
from tests.helpers import SMALL, random_adapter

SHAPE = dataclasses.replace(SMALL, family="phi3")
BY_HEAD = dataclasses.replace(SMALL, family="gpt_neox", gated=False)


def config_of(rng: random.Random, shape: BackboneConfig, use_rslora: bool) -> LoraConfig:
    """Some modules of some layers; ranks and alphas are powers of two, so that no scale is rounded."""
    paths = [module_path(i, site, shape) for i in range(shape.num_hidden_layers) for site in shape.sites]
    among = list(shape.sites) if rng.random() < 0.5 else paths
    targets = rng.sample(among, rng.randint(1, len(among)))

    def pattern() -> dict[str, int]:
        return {target: rng.choice([1, 2, 4]) for target in rng.sample(targets, rng.randint(0, min(3, len(targets))))}

    r, alpha = rng.choice([1, 2, 4]), rng.choice([1, 8, 64])
    return LoraConfig(r, alpha, targets, rank_pattern=pattern(), alpha_pattern=pattern(), use_rslora=use_rslora)


def changes(adapter: Adapter, shape: BackboneConfig) -> dict[tuple[int, str], np.ndarray]:
    """What the adapter adds to each weight, without those it leaves alone."""
    leaves = {name: np.asarray(x) for name, x in adapter.tensors().items()}
    found = {
        (layer, site): module.scale * leaves[f"up.{site}"][layer] @ leaves[f"down.{site}"][layer]
        for layer, modules in enumerate(adapter.config.modules(shape))
        for site, module in modules.items()
    }
    return {place: change for place, change in found.items() if change.any()}


@pytest.mark.parametrize("seed", range(20))
def test_random_adapters(seed: int, tmp_path: Path) -> None:
    rounded, shape = seed % 4 == 3, (SHAPE, BY_HEAD)[seed // 10]  # the root of a rank is
    adapter = random_adapter(config_of(random.Random(seed), shape, rounded), shape, seed)
    save_adapter(adapter, tmp_path / "a", shape)
    loaded = load_adapter(tmp_path / "a", shape)
    assert loaded.config == adapter.config
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_allclose(x, y, rtol=2.4e-7 if rounded else 0, atol=0)

    save_file(load_file(tmp_path / "a" / WEIGHTS), tmp_path / "a" / WEIGHTS)  # no metadata
    expected, found = changes(adapter, shape), changes(load_adapter(tmp_path / "a", shape), shape)
    assert found.keys() == expected.keys()
    for place, change in expected.items():
        np.testing.assert_allclose(found[place], change, rtol=1e-5, atol=1e-6 * np.abs(change).max())


def test_a_fresh_one_comes_apart_as_it_was(tmp_path: Path) -> None:
    """Its B are all zero, which says nothing of where the blocks are."""
    fresh = Adapter.create(LoraConfig(r=2, target_modules=("v_proj", "q_proj")), SHAPE, jax.random.key(0))
    save_adapter(fresh, tmp_path / "a", SHAPE)
    loaded = load_adapter(tmp_path / "a", SHAPE)
    assert loaded.config == fresh.config
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(fresh), strict=True))


def test_only_where_projections_are_fused() -> None:
    assert as_transformers(SMALL) is None
    view = as_transformers(SHAPE)
    assert isinstance(view, Fused) and list(view.sites) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert view.sites["gate_up_proj"].path == "mlp.gate_up_proj" and view.sites["gate_up_proj"].outputs == 96
    rows = {site: x.tolist() for site, x in view.rows("qkv_proj").items()}
    assert rows == {"q_proj": [*range(32)], "k_proj": [*range(32, 48)], "v_proj": [*range(48, 64)]}
    assert view.linear_sites == view.sites


def test_outputs_by_heads() -> None:
    """Of two keys and values with two queries each, of eight features."""
    view = Fused(BY_HEAD)
    rows = {site: x.tolist() for site, x in view.rows("query_key_value").items()}
    assert rows["q_proj"] == [*range(16), *range(32, 48)]
    assert rows["k_proj"] == [*range(16, 24), *range(48, 56)] and rows["v_proj"] == [*range(24, 32), *range(56, 64)]
    assert view.layers_path == "gpt_neox.layers"


def test_two_modules_of_one_name() -> None:
    view = Fused(dataclasses.replace(SMALL, family="gpt2", gated=False))
    assert list(view.sites) == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    assert module_path(1, "mlp.c_proj", view) == "transformer.h.1.mlp.c_proj"
