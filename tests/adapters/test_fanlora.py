"""FanLoRA's setting: its file, its modules, and its adapters in real peft."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import (
    AdapterBank,
    Backbone,
    BackboneConfig,
    FanLoraConfig,
    LoraConfig,
    ParaJaxError,
    load_adapter,
    save_adapter,
)
from para_jax.adapters.registry import config_from_dict
from para_jax.convert.checkpoint import save_backbone
from tests.helpers import SMALL, random_adapter, random_backbone

KEPT = (("q_proj", "up_proj"), ("down_proj",))
PATHS = ("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.mlp.down_proj")


def test_it_is_lora_on_these_modules() -> None:
    config = FanLoraConfig.of(KEPT, SMALL, r=3, lora_alpha=6)
    assert config.target_modules == PATHS and config.kept(SMALL) == KEPT
    assert config.modules(SMALL) == LoraConfig(r=3, lora_alpha=6, target_modules=PATHS).modules(SMALL)
    assert config.size(SMALL) == 3 * ((32 + 32) + (32 + 48) + (48 + 32))
    assert config == FanLoraConfig(r=3, lora_alpha=6, target_modules=[f"model.{path}" for path in PATHS])
    assert config != LoraConfig(r=3, lora_alpha=6, target_modules=PATHS)


def test_layers_past_nine_are_told_apart() -> None:
    shape = dataclasses.replace(SMALL, num_hidden_layers=12)
    kept = tuple(("v_proj",) if layer in (1, 11) else () for layer in range(12))
    assert FanLoraConfig.of(kept, shape).kept(shape) == kept


def test_the_file_round_trips(tmp_path: Path) -> None:
    config = FanLoraConfig.of(
        KEPT, SMALL, r=4, lora_alpha=2.5, rank_pattern={"q_proj": 2}, use_rslora=True, lora_dropout=0.1
    )
    config.save(tmp_path / "new" / "fanlora.json")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["fanlora.json"]
    loaded = FanLoraConfig.load(tmp_path / "new" / "fanlora.json")
    assert loaded == config and hash(loaded) == hash(config)
    # It is also what --method takes.
    fields = json.loads((tmp_path / "new" / "fanlora.json").read_text())
    assert config_from_dict(fields.pop("method"), fields) == config

    other = FanLoraConfig.of(KEPT[::-1], SMALL)
    with pytest.raises(ParaJaxError, match=r"fanlora\.json exists; choose another name, or pass overwrite"):
        other.save(tmp_path / "new" / "fanlora.json")
    assert FanLoraConfig.load(tmp_path / "new" / "fanlora.json") == config
    other.save(tmp_path / "new" / "fanlora.json", overwrite=True)
    assert FanLoraConfig.load(tmp_path / "new" / "fanlora.json") == other
    with pytest.raises(ParaJaxError, match="could not be written"):
        other.save(tmp_path / "new" / "fanlora.json" / "below.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"method": "lora", "r": 8}', 'it has no "method": "fanlora"'),
        ('{"method": "fanlora"}', "names the modules of each layer"),
        ('{"method": "fanlora", "target_modules": "all-linear"}', "names the modules of each layer"),
        ('{"method": "fanlora", "target_modules": 3}', "names the modules of each layer"),
        ('{"method": "fanlora", "target_modules": ["q_proj"]}', "'q_proj', which is not the path of one module"),
        ('{"method": "fanlora", "target_modules": [3]}', "names of modules, not 3"),
        ('{"method": "fanlora", "target_modules": ["layers.0.q_proj"], "rank": 3}', "unknown option .* 'rank'"),
        ('{"method": "fanlora", "target_modules": ["layers.0.q_proj"], "r": "3"}', "whole numbers from 1, not '3'"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ParaJaxError, match=message) as error:
        FanLoraConfig.load(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ParaJaxError, match=r"could not be read: .* give the fanlora\.json of para-jax fanlora"):
        FanLoraConfig.load(tmp_path / "none.json")


def test_modules_that_the_backbone_lacks() -> None:
    with pytest.raises(ParaJaxError, match=r"'layers\.2\.mlp\.up_proj'; did you mean .* The backbone has 2 layers"):
        FanLoraConfig(target_modules=["layers.2.mlp.up_proj"]).size(SMALL)
    with pytest.raises(ParaJaxError, match=r"did you mean 'layers\.1\.mlp\.up_proj'\?"):
        FanLoraConfig(target_modules=["layers.1.mlp.up_prj"]).size(SMALL)
    with pytest.raises(ParaJaxError, match=r"unknown module 'up_prj'; did you mean 'up_proj'\?"):
        FanLoraConfig.of([["up_prj"], []], SMALL)
    with pytest.raises(ParaJaxError, match="entries for 1 layers; the backbone has 2"):
        FanLoraConfig.of([["up_proj"]], SMALL)


# In peft. More than twenty modules: peft takes longer lists another way.
DEEP: dict[str, Any] = {"num_hidden_layers": 4}
MANY = (
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"),
    ("k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
)


# peft reads a property of the model that transformers is about to drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kept", [(("q_proj", "up_proj"), ("down_proj",), ("up_proj",), ("v_proj",)), MANY])
def test_peft_opens_its_adapter(tmp_path: Path, kept: tuple[tuple[str, ...], ...]) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    backbone = random_backbone(seed=4, **DEEP)
    save_backbone(backbone, tmp_path / "base")
    shape = BackboneConfig.from_pretrained(tmp_path / "base")
    config = FanLoraConfig.of(kept, shape, r=3, lora_alpha=5)
    adapter = random_adapter(config, shape, 5, scale=0.2)
    save_adapter(adapter, tmp_path / "adapter", shape)

    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 9))
    ours = logits(backbone, adapter, tokens)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    adapted = [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert sorted(name.removeprefix("base_model.model.model.") for name in adapted) == sorted(config.target_modules)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    assert np.abs(ours - logits(backbone, None, tokens)).max() > 0.1 * np.abs(theirs).max()

    # The folder says no more than that it is LoRA on these modules.
    loaded = load_adapter(tmp_path / "adapter", shape)
    assert type(loaded.config) is LoraConfig and loaded.config.modules(shape) == config.modules(shape)
    assert all(np.array_equal(x, adapter.tensors()[name]) for name, x in loaded.tensors().items())
    np.testing.assert_array_equal(logits(backbone, loaded, tokens), ours)


def logits(backbone: Backbone, adapter: Any, tokens: np.ndarray) -> np.ndarray:
    tokens = jnp.asarray(tokens, jnp.int32)
    if adapter is None:
        return np.asarray(backbone(tokens))
    bank = AdapterBank.stack({"a": adapter}, backbone.config)
    return np.asarray(backbone(tokens, bank=bank, tenants=["a", "a"]))
