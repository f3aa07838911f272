"""Adapters of GPT-NeoX, GPT-2 and OPT against PEFT: modules fused by head, transposed weights, two of one name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from para_jax import Backbone, IA3Config, LoraConfig, load_adapter, merge_adapter, save_adapter
from para_jax.adapters.files import WEIGHTS
from para_jax.convert.checkpoint import save_backbone
from para_jax.families.table import FAMILIES
from tests.helpers import family_backbone
from tests.parity.test_fused import same
from tests.parity.test_peft import IN_CAUSAL_LM, apart, drawn, opened, ours, same_files, theirs

# The installed peft calls this of the installed transformers; it has nothing to do with the folders.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# What PEFT tunes; without target_modules it takes its own for the architecture.
THEIRS: dict[str, tuple[type, dict[str, Any]]] = {
    "lora": (peft.LoraConfig, {"r": 3}),
    "all-linear": (peft.LoraConfig, {"r": 2, "target_modules": "all-linear"}),
    "ia3": (peft.IA3Config, {}),
}
OURS: dict[str, LoraConfig | IA3Config] = {
    "lora": LoraConfig(r=3, lora_alpha=5),
    "all-linear": LoraConfig(r=2, target_modules="all-linear", rank_pattern={"o_proj": 1}),
    "paths": LoraConfig(target_modules=("layers.0.self_attn.o_proj", "layers.1.mlp.down_proj", "k_proj")),
    "ia3": IA3Config(),
}


class Base(NamedTuple):
    """A checkpoint, and what is read from it."""

    folder: Path
    backbone: Backbone


@pytest.fixture(scope="module", params=["gpt_neox", "gpt2", "opt"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder, backbone = tmp_path_factory.mktemp("older") / "base", family_backbone(request.param)
    save_backbone(backbone, folder)
    return Base(folder, backbone)


@pytest.mark.parametrize("name", THEIRS)
def test_what_peft_tuned(name: str, base: Base, tmp_path: Path) -> None:
    (kind, options), shape = THEIRS[name], base.backbone.config
    transposed = FAMILIES[shape.family].names.transposed
    config = kind(**IN_CAUSAL_LM, fan_in_fan_out=transposed, **options)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base.folder), config)
    torch.manual_seed(0)
    for key, weight in model.named_parameters():
        if "lora_" in key or "ia3_" in key:
            torch.nn.init.normal_(weight, mean=float("ia3_" in key), std=0.5)
    model.save_pretrained(tmp_path / "theirs")
    logits = theirs(model.eval())
    adapter = load_adapter(tmp_path / "theirs", shape)
    assert apart(logits, ours(base.backbone)) > 0.05, "the adapter does something"
    assert apart(ours(base.backbone, adapter), logits) < 1e-4
    assert apart(ours(merge_adapter(base.backbone, adapter)), logits) < 1e-4

    save_adapter(adapter, tmp_path / "ours", shape)
    x, y = load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    assert x.keys() == y.keys() and all(np.array_equal(x[key], y[key]) for key in x), "bit for bit"
    # As PEFT names what it tuned without the head.
    stem = f"{FAMILIES[shape.family].names.stem}."
    save_file({key.replace(stem, "", 1): tensor for key, tensor in x.items()}, tmp_path / "theirs" / WEIGHTS)
    assert same(load_adapter(tmp_path / "theirs", shape), adapter)


@pytest.mark.parametrize("name", OURS)
def test_what_peft_opens(name: str, base: Base, tmp_path: Path) -> None:
    shape = base.backbone.config
    adapter = drawn(OURS[name], shape)
    expected = ours(base.backbone, adapter)
    assert apart(expected, ours(base.backbone)) > 0.05
    save_adapter(adapter, tmp_path / "a", shape)
    model = opened(base.folder, tmp_path / "a")
    assert apart(theirs(model), expected) < 1e-4
    merged = merge_adapter(base.backbone, adapter)
    assert apart(theirs(model.merge_and_unload()), ours(merged)) < 1e-4
    save_backbone(merged, tmp_path / "merged")
    assert apart(theirs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected) < 1e-4

    loaded = load_adapter(tmp_path / "a", shape)
    assert same(loaded, adapter)
    save_adapter(loaded, tmp_path / "b", shape)
    same_files(tmp_path / "a", tmp_path / "b")
