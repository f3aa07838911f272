"""docs/para_reference.py, the reader in PyTorch alone, against ours."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from para_jax import AdapterBank, Backbone, ParaConfig, save_adapter
from para_jax.adapters.method import Prompt
from para_jax.convert.checkpoint import save_backbone
from tests.helpers import SMALL, random_adapter, random_backbone

OPTIONS = [
    {},
    {"pooling": "mean", "activation": "relu", "bias": True, "read": "normed"},
    {"pooling": "max", "activation": "silu", "normalize": False, "target_modules": ("down_proj", "k_proj")},
    {"pooling": "attention", "activation": "rational", "r": 5, "scale": "response", "target_modules": ("up_proj",)},
]


@pytest.fixture(scope="module")
def reference() -> Any:
    path = Path(__file__).parents[2] / "docs" / "para_reference.py"
    spec = importlib.util.spec_from_file_location("para_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_vectors_and_what_they_do(options: dict[str, Any], reference: Any, tmp_path: Path) -> None:
    adapter = random_adapter(ParaConfig(**options), SMALL, seed=3)
    save_adapter(adapter, tmp_path / "a", SMALL)
    config, tensors = reference.load(tmp_path / "a")
    rng = np.random.default_rng(0)
    hidden, normed = (rng.normal(0, 2, (6, SMALL.hidden_size)).astype(np.float32) for _ in range(2))
    mask = np.array([False, True, True, True, True, False])
    for layer in range(SMALL.num_hidden_layers):
        one = jax.tree.map(lambda x, i=layer: x[i], adapter.layers)
        adjustment = one.prepare(Prompt(jnp.asarray(hidden), jnp.asarray(normed), jnp.asarray(mask)), layer)
        found = reference.vectors(
            config, tensors, layer, torch.from_numpy(hidden[mask]), torch.from_numpy(normed[mask])
        )
        assert list(found) == list(adapter.config.target_modules)
        batch = jax.tree.map(lambda x: x[None], adjustment)
        for site, vector in found.items():
            assert np.abs(vector.numpy()).max() > 0.1, "there is something to compare"
            y = rng.normal(0, 1, (6, SMALL.sites[site].outputs)).astype(np.float32)
            scaled = batch.apply(site, jnp.zeros((1, 6, 1)), jnp.asarray(y)[None], jnp.asarray(mask)[None])[0]
            expected = reference.apply(config, vector, torch.from_numpy(y), torch.from_numpy(mask)).numpy()
            np.testing.assert_allclose(scaled, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[3] | {"target_modules": ("q_proj", "v_proj", "up_proj")}])
def test_a_whole_model(options: dict[str, Any], reference: Any, tmp_path: Path) -> None:
    """transformers' model with hooks that call the reference gives our logits."""
    save_backbone(random_backbone(), tmp_path / "base")
    backbone = Backbone.from_pretrained(tmp_path / "base", dtype="float32", stacked=True)
    adapter = random_adapter(ParaConfig(**options), backbone.config, seed=3, scale=0.2)
    save_adapter(adapter, tmp_path / "a", backbone.config)
    config, tensors = reference.load(tmp_path / "a")

    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (1, 9))
    prompt = 5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        bare = model(torch.from_numpy(tokens)).logits[0].numpy()
    made: dict[int, dict[str, torch.Tensor]] = {}

    def prepare(layer: int, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        hidden = args[0][0, :prompt]
        made[layer] = reference.vectors(config, tensors, layer, hidden, module.input_layernorm(hidden))

    def scale(layer: int, site: str, module: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
        return reference.apply(config, made[layer][site], y[0], torch.arange(9) < prompt - 1)[None]

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(partial(prepare, i))
        for site in config["target_modules"]:
            layer.get_submodule(SMALL.sites[site].path).register_forward_hook(partial(scale, i, site))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits[0].numpy()

    bank = AdapterBank.load({"a": tmp_path / "a"}, backbone.config)
    mask = np.arange(9)[None] < prompt
    ours = np.asarray(backbone(jnp.asarray(tokens), prompt_mask=jnp.asarray(mask), bank=bank, tenants=["a"])[0])
    size = np.abs(theirs).max()
    assert np.abs(theirs - bare).max() > 0.05 * size, "the adapter does something"
    assert np.abs(ours - theirs).max() < 1e-4 * size
