"""Adapters of Phi-3, whose projections are fused, against PEFT: what it tuned there, and ours as it opens them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from para_jax import (
    Backbone,
    FanLoraConfig,
    IA3Config,
    LoraConfig,
    ParaJaxError,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from para_jax.adapters.adapter import Adapter
from para_jax.adapters.files import CONFIG, WEIGHTS
from tests.parity.test_peft import IN_CAUSAL_LM, apart, drawn, meaning, opened, ours, same_files, theirs

# The installed peft calls this of the installed transformers; it has nothing to do with the folders.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# What PEFT tunes, and what it is here: r, and the sites of each layer.
THEIRS: dict[str, tuple[type, dict[str, Any]]] = {
    "names": (peft.LoraConfig, {"r": 4, "lora_alpha": 16, "target_modules": ["qkv_proj", "o_proj", "gate_up_proj"]}),
    "all-linear": (peft.LoraConfig, {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear"}),
    "regular expression": (peft.LoraConfig, {"r": 2, "target_modules": r".*\.(o|gate_up)_proj"}),
    "patterns": (
        peft.LoraConfig,
        {
            "r": 3,
            "target_modules": ["qkv_proj", "mlp.gate_up_proj", "layers.0.mlp.down_proj"],
            "rank_pattern": {"layers.0.self_attn.qkv_proj": 6, "gate_up_proj": 2},
            "alpha_pattern": {r".*\.1\.mlp\.gate_up_proj": 32, ".*_proj": 5},
            "exclude_modules": ["layers.0.mlp.gate_up_proj"],
        },
    ),
    "one layer": (peft.LoraConfig, {"target_modules": ["qkv_proj", "down_proj"], "layers_to_transform": [1]}),
    "ia3": (peft.IA3Config, {"target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "ia3 of all outputs": (peft.IA3Config, {"target_modules": "all-linear", "feedforward_modules": []}),
    "ia3 by layers": (
        peft.IA3Config,
        {
            "target_modules": ["layers.0.self_attn.qkv_proj", "layers.1.mlp.gate_up_proj", "layers.1.mlp.down_proj"],
            "feedforward_modules": ["layers.1.mlp.down_proj"],
        },
    ),
}
OURS: dict[str, LoraConfig | IA3Config] = {
    "q and v": LoraConfig(r=3, lora_alpha=5),
    "all-linear": LoraConfig(r=2, target_modules="all-linear", use_rslora=True),
    "one of a module": LoraConfig(target_modules=["k_proj", "up_proj", "o_proj"], init_lora_weights="orthogonal"),
    "ranks and alphas": LoraConfig(
        r=4,
        target_modules=("v_proj", "q_proj", "gate_proj", "layers.1.mlp.up_proj", "down_proj"),
        exclude_modules="model.layers.0.mlp.down_proj",
        rank_pattern={"layers.0.self_attn.q_proj": 2, "gate_proj": 1},
        alpha_pattern={"layers.0.self_attn.q_proj": 4, "up_proj": 32},
    ),
    "fanlora": FanLoraConfig(r=3, target_modules=("layers.0.mlp.up_proj", "layers.1.self_attn.v_proj")),
    "ia3": IA3Config(),
    "ia3 group": IA3Config(target_modules=("up_proj", "k_proj", "q_proj"), feedforward_modules=()),
    "ia3 by layers": IA3Config(
        target_modules=("layers.0.self_attn.v_proj", "layers.1.mlp.down_proj", "up_proj"),
        feedforward_modules=("layers.1.mlp.down_proj",),
    ),
    "ia3 with a projection": IA3Config(projection=3),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused") / "base"
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
    )
    Phi3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def backbones(base: Path) -> dict[bool, Backbone]:
    return {stacked: Backbone.from_pretrained(base, dtype="float32", stacked=stacked) for stacked in (False, True)}


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    def made(kind: type, **options: Any) -> tuple[Any, Path]:
        torch.manual_seed(0)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), kind(**IN_CAUSAL_LM, **options))
        for name, weight in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                torch.nn.init.normal_(weight, mean=float("ia3_" in name), std=0.5)
        model.save_pretrained(tmp_path / "theirs")
        return model.eval(), tmp_path / "theirs"

    return made


def same(a: Adapter, b: Adapter) -> bool:
    """The same config and weights, bit for bit."""
    leaves = zip(jax.tree.leaves(a.layers), jax.tree.leaves(b.layers), strict=True)
    return a.config == b.config and all(np.array_equal(x, y) for x, y in leaves)


@pytest.mark.parametrize("name", THEIRS)
def test_what_peft_tuned(
    name: str, base: Path, backbones: dict[bool, Backbone], make: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    kind, options = THEIRS[name]
    backbone = backbones[name in ("names", "patterns", "ia3 by layers")]
    model, folder = make(kind, **options)
    logits = theirs(model)
    adapter = load_adapter(folder, backbone.config)
    assert apart(logits, ours(backbone)) > 0.05, "the adapter does something"
    assert apart(ours(backbone, adapter), logits) < 1e-4
    assert apart(ours(merge_adapter(backbone, adapter)), logits) < 1e-4

    save_adapter(adapter, tmp_path / "ours", backbone.config)
    x, y = load_file(folder / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    assert x.keys() == y.keys() and all(np.array_equal(x[key], y[key]) for key in x), "bit for bit"
    assert np.array_equal(theirs(opened(base, tmp_path / "ours")), logits)
    assert same(load_adapter(tmp_path / "ours", backbone.config), adapter)
    if name in ("names", "ia3"):
        assert meaning(tmp_path / "ours") == meaning(folder), "names and no patterns stay what they are"


@pytest.mark.parametrize("name", OURS)
def test_what_peft_opens(name: str, base: Path, backbones: dict[bool, Backbone], tmp_path: Path) -> None:
    backbone = backbones[name in ("all-linear", "ranks and alphas", "ia3")]
    adapter = drawn(OURS[name], backbone.config)
    expected = ours(backbone, adapter)
    assert apart(expected, ours(backbone)) > 0.05
    save_adapter(adapter, tmp_path / "a", backbone.config)
    model = opened(base, tmp_path / "a")
    assert apart(theirs(model), expected) < 1e-4
    assert apart(theirs(model.merge_and_unload()), ours(merge_adapter(backbone, adapter))) < 1e-4

    loaded = load_adapter(tmp_path / "a", backbone.config)
    if name not in ("fanlora", "ia3 with a projection"):  # which load as LoRA and as its vectors
        assert same(loaded, adapter), "what was joined comes apart as it was"
    assert loaded.config.size(backbone.config) <= adapter.config.size(backbone.config)
    save_adapter(loaded, tmp_path / "b", backbone.config)
    same_files(tmp_path / "a", tmp_path / "b")

    # PEFT writes no metadata, after which there is one A for all of a module: the same function.
    model = opened(base, tmp_path / "a")
    model.save_pretrained(tmp_path / "theirs")
    again = load_adapter(tmp_path / "theirs", backbone.config)
    assert apart(ours(backbone, again), expected) < 1e-5
    save_adapter(again, tmp_path / "c", backbone.config)
    same_files(tmp_path / "a", tmp_path / "c")


def test_joined_as_it_is_written(backbones: dict[bool, Backbone], tmp_path: Path) -> None:
    """Blocks on a diagonal, and zeros where there is nothing."""
    shape = backbones[True].config
    adapter = drawn(LoraConfig(r=3, lora_alpha=6, target_modules=("q_proj", "v_proj", "o_proj")), shape)
    save_adapter(adapter, tmp_path / "a", shape)
    fields, tensors = json.loads((tmp_path / "a" / CONFIG).read_text()), load_file(tmp_path / "a" / WEIGHTS)
    assert fields["target_modules"] == ["qkv_proj", "o_proj"]
    scales = {m: fields["alpha_pattern"].get(m, fields["lora_alpha"]) / r for m, r in (("qkv_proj", 6), ("o_proj", 3))}
    assert fields["r"] == 6 and fields["rank_pattern"] == {"o_proj": 3} and scales == {"qkv_proj": 2.0, "o_proj": 2.0}
    at = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_"
    leaves = adapter.tensors()
    assert np.array_equal(
        tensors[f"{at}A.weight"], np.concatenate([leaves["down.q_proj"][1], leaves["down.v_proj"][1]])
    )
    expected = np.zeros((64, 6), np.float32)  # 32 outputs of q, 16 of k, 16 of v
    expected[:32, :3], expected[48:, 3:] = leaves["up.q_proj"][1], leaves["up.v_proj"][1]
    assert np.array_equal(tensors[f"{at}B.weight"], expected)


def test_scales_that_one_module_cannot_have(base: Path, backbones: dict[bool, Backbone], tmp_path: Path) -> None:
    """B takes up the ratio: here a third, which is rounded."""
    backbone = backbones[True]
    adapter = drawn(LoraConfig(r=2, alpha_pattern={"q_proj": 6, "v_proj": 2}), backbone.config)
    save_adapter(adapter, tmp_path / "a", backbone.config)
    assert apart(theirs(opened(base, tmp_path / "a")), ours(backbone, adapter)) < 1e-4
    loaded = load_adapter(tmp_path / "a", backbone.config)
    assert loaded.config == adapter.config
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_allclose(x, y, rtol=2.4e-7)  # two roundings


def test_a_module_with_alpha_zero(base: Path, backbones: dict[bool, Backbone], tmp_path: Path) -> None:
    backbone = backbones[True]
    adapter = drawn(LoraConfig(r=2, lora_alpha=0, target_modules=("q_proj", "v_proj", "down_proj")), backbone.config)
    save_adapter(adapter, tmp_path / "a", backbone.config)
    assert same(load_adapter(tmp_path / "a", backbone.config), adapter)
    assert apart(theirs(opened(base, tmp_path / "a")), ours(backbone)) < 1e-4


CHANGES: dict[str, Callable[[dict[str, Any], dict[str, np.ndarray]], Any]] = {
    "another alpha": lambda fields, tensors: fields.update(lora_alpha=24),
    "another option": lambda fields, tensors: fields.update(lora_dropout=0.5),
    "weights off the diagonal": lambda fields, tensors: next(iter(tensors.values())).fill(0.25),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_changed_means_what_it_says(
    change: str, base: Path, backbones: dict[bool, Backbone], tmp_path: Path
) -> None:
    """What is kept in the metadata is not believed where the file says otherwise."""
    backbone, folder = backbones[True], tmp_path / "a"
    save_adapter(drawn(LoraConfig(r=3, lora_alpha=6), backbone.config), folder, backbone.config)
    fields = json.loads((folder / CONFIG).read_text())
    with safe_open(folder / WEIGHTS, framework="numpy") as f:
        metadata = f.metadata()
    ups = {name: x for name, x in load_file(folder / WEIGHTS).items() if "lora_B" in name}
    CHANGES[change](fields, ups)
    (folder / CONFIG).write_text(json.dumps(fields))
    save_file(load_file(folder / WEIGHTS) | ups, folder / WEIGHTS, metadata=metadata)
    loaded = load_adapter(folder, backbone.config)
    assert loaded.config.target_modules == ("q_proj", "k_proj", "v_proj") and loaded.config.r == 6
    assert loaded.config.lora_dropout == fields["lora_dropout"]
    assert apart(ours(backbone, loaded), theirs(opened(base, folder))) < 1e-4


@pytest.mark.parametrize("kept", ["", "[]", '{"r": 0}', '{"tomorrow": 1}', '{"target_modules": ["qkv_proj"]}'])
def test_metadata_of_others(kept: str, backbones: dict[bool, Backbone], tmp_path: Path) -> None:
    shape, folder = backbones[True].config, tmp_path / "a"
    save_adapter(drawn(LoraConfig(r=3), shape), folder, shape)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"para_jax": kept})
    assert load_adapter(folder, shape).config == LoraConfig(6, 16, ("q_proj", "k_proj", "v_proj"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_floats(dtype: str, backbones: dict[bool, Backbone], tmp_path: Path) -> None:
    shape, folder = backbones[True].config, tmp_path / "a"
    adapter = drawn(LoraConfig(r=3), shape)
    save_adapter(adapter, folder, shape)
    with safe_open(folder / WEIGHTS, framework="numpy") as f:
        metadata = f.metadata()
    save_file({k: x.astype(dtype) for k, x in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS, metadata=metadata)
    assert same(
        load_adapter(folder, shape), jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), adapter)
    )


# What is refused


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            peft.IA3Config,
            {"target_modules": ["gate_up_proj"], "feedforward_modules": ["gate_up_proj"]},
            "feedforward_modules has gate_up_proj; only down_proj's input can be scaled",
        ),
        (peft.LoraConfig, {"target_modules": ["qkv_proj"], "use_dora": True}, "use_dora=True is not implemented here"),
    ],
)
def test_refused(
    kind: type,
    options: dict[str, Any],
    message: str,
    backbones: dict[bool, Backbone],
    make: Callable[..., tuple[Any, Path]],
) -> None:
    with pytest.raises(ParaJaxError, match=message):
        load_adapter(make(kind, **options)[1], backbones[True].config)


def test_errors_have_the_names_of_the_file(backbones: dict[bool, Backbone], tmp_path: Path) -> None:
    """Which are those of transformers' Phi-3."""
    shape = backbones[True].config
    save_adapter(drawn(LoraConfig(r=2), shape), tmp_path / "a", shape)
    fields, tensors = json.loads((tmp_path / "a" / CONFIG).read_text()), load_file(tmp_path / "a" / WEIGHTS)
    at = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_A.weight"
    save_file({name: x for name, x in tensors.items() if name != at}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(ParaJaxError, match=rf"{at} \[4, 32\] is missing"):
        load_adapter(tmp_path / "a", shape)
    (tmp_path / "a" / CONFIG).write_text(json.dumps(fields | {"target_modules": ["q_proj", "v_proj"]}))
    with pytest.raises(ParaJaxError, match="unknown entry of target_modules 'q_proj'; did you mean 'qkv_proj'"):
        load_adapter(tmp_path / "a", shape)
