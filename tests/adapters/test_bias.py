"""Bias vectors against transformers' Llama, whose projections have biases if its config says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from para_jax import AdapterBank, Backbone, BiasConfig, ParaJaxError, load_adapter, merge_adapter, save_adapter
from para_jax.adapters.adapter import Adapter
from para_jax.adapters.files import CONFIG
from para_jax.adapters.rows import Rows
from para_jax.backbones.packed import Segments
from para_jax.config import BackboneConfig
from tests.helpers import SMALL, family_backbone, random_adapter, random_backbone

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 61, (3, 9))
# In one layer all linear sites, in the other two of them.
APART = BiasConfig(r".*layers\.0.*|.*\.1\.(self_attn.o_proj|mlp.up_proj)")


def with_biases(model: LlamaForCausalLM, adapter: Adapter) -> LlamaForCausalLM:
    """transformers' model of the same weights with a bias on every projection: its own plus the adapter's."""
    made = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)).eval()
    made.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        own = model.state_dict()
        for name, bias in made.named_parameters():
            if not name.endswith(".bias"):
                continue
            bias[:] = own.get(name, torch.zeros_like(bias))
            _, _, layer, _, site, _ = name.split(".")
            if site in adapter.config.modules(SMALL)[int(layer)]:
                bias += torch.from_numpy(np.array(adapter.tensors()[f"bias.{site}"][int(layer)]))
    return made


@pytest.mark.parametrize(
    ("stacked", "own"), [(False, True), (True, False)], ids=["unrolled, biases of its own", "stacked, no biases"]
)
def test_logits_and_gradients_are_those_of_transformers(stacked: bool, own: bool, tmp_path: Path) -> None:
    """Of two tenants and a bare row in one batch; one of them has its vectors in some modules only."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=own, mlp_bias=own)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(float("norm" in name), 0.2)
    model.save_pretrained(tmp_path)
    backbone = Backbone.from_pretrained(tmp_path, dtype="float32", stacked=stacked)
    adapters = {
        n: random_adapter(c, backbone.config, i) for i, (n, c) in enumerate({"a": BiasConfig(), "b": APART}.items())
    }
    bank = AdapterBank.stack(adapters, backbone.config)
    ours = np.asarray(backbone(jnp.asarray(TOKENS), bank=bank, tenants=["a", None, "b"]))

    theirs = {n: with_biases(model, adapter) for n, adapter in adapters.items()}
    for row, made in enumerate((theirs["a"], model, theirs["b"])):
        expected = made(torch.from_numpy(TOKENS[row : row + 1])).logits[0].detach().numpy()
        np.testing.assert_allclose(ours[row], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert min(np.abs(ours[0] - ours[1]).max(), np.abs(ours[1] - ours[2]).max()) > 0.1

    for name, adapter in adapters.items():
        theirs[name](torch.from_numpy(TOKENS[:1])).logits.sin().sum().backward()
        found = Adapter(adapter.config, gradient(adapter.layers, backbone, bank.rows([name]))).tensors()
        at = {n: x.grad.numpy() for n, x in theirs[name].named_parameters() if n.endswith(".bias")}
        largest = max(np.abs(x).max() for x in at.values())
        for layer, sites in enumerate(adapter.config.modules(SMALL)):
            for site in found:
                path = SMALL.sites[site.removeprefix("bias.")].path
                expected = at[f"model.layers.{layer}.{path}.bias"] * (site.removeprefix("bias.") in sites)
                np.testing.assert_allclose(found[site][layer], expected, rtol=0, atol=2e-5 * largest, err_msg=site)


@jax.jit
@jax.grad
def gradient(layers: Any, backbone: Backbone, rows: Rows) -> jax.Array:
    """Of the sum of the sines of all logits of the first row, by one tenant's weights."""
    rows = dataclasses.replace(rows, layers=(jax.tree.map(lambda leaf: leaf[None], layers),))
    everything = jnp.ones(TOKENS[:1].shape, bool)
    hidden, _, _ = backbone.forward(jnp.asarray(TOKENS[:1]), everything, everything, rows)
    return jnp.sum(jnp.sin(backbone.logits(hidden)))


def test_packed_sequences() -> None:
    """Two in a row, with padding behind them, are what each is alone."""
    backbone = random_backbone(stacked=True)
    bank = AdapterBank.stack({"a": random_adapter(BiasConfig(), SMALL, 1)}, SMALL)
    tokens, everything = jnp.asarray(TOKENS[:1]), jnp.ones((1, 9), bool)
    segments = Segments.of(jnp.array([[4, 3]]), 9)
    forward = jax.jit(Backbone.forward)
    hidden, _, _ = forward(backbone, tokens, segments.mask_bt, everything, bank.rows(["a"]), segments=segments)
    for start, end in ((0, 4), (4, 7)):
        alone = jnp.asarray(TOKENS[:1, start:end])
        expected = backbone(alone, bank=bank, tenants=["a"])
        ours = backbone.logits(hidden[:, start:end])
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
    "config",
    [BiasConfig(), BiasConfig(("q_proj", "up_proj")), BiasConfig(exclude_modules=("layers.1.mlp.down_proj",)), APART],
    ids=["all", "two", "but one", "a pattern"],
)
def test_a_folder(config: BiasConfig, tmp_path: Path) -> None:
    adapter = random_adapter(config, SMALL, 0)
    save_adapter(adapter, tmp_path / "a", SMALL)
    again = load_adapter(tmp_path / "a", SMALL)
    assert again.config == config and jax.tree.structure(again) == jax.tree.structure(adapter)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(adapter), strict=True))
    written = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert written["peft_type"] == "BIAS" and set(written["base_model"]["sites"]) == set(dict(adapter.layers.bias))


def test_a_folder_for_another_backbone(tmp_path: Path) -> None:
    save_adapter(random_adapter(BiasConfig(("layers.1.mlp.up_proj",)), SMALL, 0), tmp_path / "a", SMALL)
    sizes = {**SIZES, "model_type": "llama"}
    for other, message in (
        ({"num_hidden_layers": 1}, "num_hidden_layers 2 there and 1 here"),
        ({"intermediate_size": 64}, r"sites \{'up_proj': \[32, 48\]\} there and \{'up_proj': \[32, 64\]\} here"),
    ):
        with pytest.raises(ParaJaxError, match=f"made for another backbone .*{message}"):
            load_adapter(tmp_path / "a", BackboneConfig.from_hf({**sizes, **other}))
    assert load_adapter(tmp_path / "a", BackboneConfig.from_hf({**sizes, "num_key_value_heads": 4}))
    written = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**written, "target_modules": ["layers.2.mlp.up_proj"]}))
    with pytest.raises(ParaJaxError, match=r"adapter_config.json: unknown entry of .* 'layers.2.mlp.up_proj'"):
        load_adapter(tmp_path / "a", SMALL)


def test_what_is_refused() -> None:
    experts = family_backbone("mixtral").config
    with pytest.raises(ParaJaxError, match=r"up_proj, which is the projections of many experts .* but not added to"):
        BiasConfig(("up_proj",)).modules(experts)
    assert set(BiasConfig().modules(experts)[0]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    backbone = random_backbone()
    with pytest.raises(
        ParaJaxError, match=r"method bias cannot be merged: only the methods that PEFT has can be\. Serve"
    ):
        merge_adapter(backbone, random_adapter(BiasConfig(), SMALL, 0))
