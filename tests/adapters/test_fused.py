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
from tests.helpers import SMALL, random_adapter

SHAPE = dataclasses.replace(SMALL, family="phi3")


def config_of(rng: random.Random, use_rslora: bool) -> LoraConfig:
    """Some modules of some layers; ranks and alphas are powers of two, so that no scale is rounded."""
    paths = [module_path(i, site, SHAPE) for i in range(SHAPE.num_hidden_layers) for site in SHAPE.sites]
    names = list(SHAPE.sites)
    targets = rng.sample(names, rng.randint(1, 7)) if rng.random() < 0.5 else rng.sample(paths, rng.randint(1, 14))

    def pattern() -> dict[str, int]:
        return {target: rng.choice([1, 2, 4]) for target in rng.sample(targets, rng.randint(0, min(3, len(targets))))}

    r, alpha = rng.choice([1, 2, 4]), rng.choice([1, 8, 64])
    return LoraConfig(r, alpha, targets, rank_pattern=pattern(), alpha_pattern=pattern(), use_rslora=use_rslora)


def changes(adapter: Adapter) -> dict[tuple[int, str], np.ndarray]:
    """What the adapter adds to each weight, without those it leaves alone."""
    leaves = {name: np.asarray(x) for name, x in adapter.tensors().items()}
    found = {
        (layer, site): module.scale * leaves[f"up.{site}"][layer] @ leaves[f"down.{site}"][layer]
        for layer, modules in enumerate(adapter.config.modules(SHAPE))
        for site, module in modules.items()
    }
    return {place: change for place, change in found.items() if change.any()}


@pytest.mark.parametrize("seed", range(20))
def test_random_adapters(seed: int, tmp_path: Path) -> None:
    rounded = seed % 4 == 3  # the root of a rank is
    adapter = random_adapter(config_of(random.Random(seed), rounded), SHAPE, seed)
    save_adapter(adapter, tmp_path / "a", SHAPE)
    loaded = load_adapter(tmp_path / "a", SHAPE)
    assert loaded.config == adapter.config
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_allclose(x, y, rtol=2.4e-7 if rounded else 0, atol=0)

    save_file(load_file(tmp_path / "a" / WEIGHTS), tmp_path / "a" / WEIGHTS)  # no metadata
    expected, found = changes(adapter), changes(load_adapter(tmp_path / "a", SHAPE))
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
    assert view.rows("qkv_proj") == {"q_proj": slice(0, 32), "k_proj": slice(32, 48), "v_proj": slice(48, 64)}
    assert view.linear_sites == view.sites
