"""PEFT's adapters of models that have a text decoder among other parts: read for both models, and written for both."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from para_jax import (
    AdapterBank,
    Backbone,
    FanLoraConfig,
    IA3Config,
    LoraConfig,
    ParaConfig,
    ParaJaxError,
    load_adapter,
    save_adapter,
)
from para_jax.adapters.weights import CONFIG, WEIGHTS
from para_jax.cli import main
from para_jax.convert.checkpoint import save_backbone
from para_jax.families.wrappers import WRAPPERS
from tests.helpers import random_adapter
from tests.wrappers import saved, wrapped

# The installed peft calls this of the installed transformers; it has nothing to do with the folders.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = np.random.default_rng(0).integers(3, 56, (2, 9))
LM = "model.language_model"
# On the whole. In some of them q_proj, k_proj, v_proj and down_proj are modules of the vision tower too.
WHOLE: dict[str, tuple[type, dict[str, Any]]] = {
    "names": (peft.LoraConfig, {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    "all-linear": (peft.LoraConfig, {"r": 2, "target_modules": "all-linear", "lora_alpha": 3}),
    "regular expression": (
        peft.LoraConfig,
        {
            "r": 2,
            "target_modules": r".*language_model.*\.1\.(self_attn\.o_proj|mlp\.\w+_proj)",
            "rank_pattern": {"up_proj": 3},
            "alpha_pattern": {"layers.1.mlp.down_proj": 1},
        },
    ),
    "paths": (peft.LoraConfig, {"target_modules": [f"{LM}.layers.1.self_attn.q_proj", "layers.0.mlp.up_proj"]}),
    "vectors": (
        peft.IA3Config,
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
}
ALONE: dict[str, tuple[type, dict[str, Any]]] = {
    "names": WHOLE["names"],
    "vectors": WHOLE["vectors"],
    "regular expression": (peft.LoraConfig, {"r": 2, "target_modules": r"model\.layers\.\d+\.mlp\.(gate|up)_proj"}),
    "one layer": (peft.LoraConfig, {"r": 2, "target_modules": ["model.layers.0.mlp.up_proj"]}),
}
CASES = [
    pytest.param(case, on_whole, id=f"{'whole' if on_whole else 'alone'}: {name}")
    for on_whole, cases in ((True, WHOLE), (False, ALONE))
    for name, case in cases.items()
]


class Both(NamedTuple):
    """A checkpoint of the whole, its text part as a checkpoint of its own, and the backbones of the two."""

    name: str
    whole: Path
    alone: Path
    of_whole: Backbone
    of_alone: Backbone


# One whose vision tower has modules of the same names, and one whose has others.
SOME = [pytest.param(n, marks=() if n in ("mistral3", "qwen2_5_vl") else pytest.mark.whole) for n in WRAPPERS]


@pytest.fixture(scope="module", params=SOME)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp(request.param)
    whole, alone = saved(wrapped(request.param), folder / "whole"), folder / "alone"
    of_whole = Backbone.from_pretrained(whole, dtype="float32", stacked=True)
    save_backbone(of_whole, alone, text_only=True)
    return Both(request.param, whole, alone, of_whole, Backbone.from_pretrained(alone, dtype="float32", stacked=True))


def opened(folder: Path, whole: bool) -> Any:
    auto = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    return auto.from_pretrained(folder, attn_implementation="eager")


def tuned(model: Any, kind: type, options: dict[str, Any], folder: Path) -> Any:
    """PEFT's model with every weight of the adapter random, saved in the folder."""
    torch.manual_seed(0)
    made = peft.get_peft_model(model, kind(**options)).eval()
    for name, x in made.named_parameters():
        if "lora_" in name or "ia3_" in name:
            torch.nn.init.normal_(x, mean=float("ia3_" in name), std=0.5)
    made.save_pretrained(folder)
    return made


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def with_adapter(backbone: Backbone, folder: Path) -> np.ndarray:
    bank = AdapterBank.load({"a": folder}, backbone.config)
    return np.asarray(backbone(jnp.asarray(TOKENS), bank=bank, tenants=["a", "a"]))


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(("case", "on_whole"), CASES)
def test_read_for_both_and_written_for_both(
    both: Both, case: tuple[type, dict[str, Any]], on_whole: bool, tmp_path: Path
) -> None:
    """Whichever model PEFT tuned, and whichever backbone it is read for, the logits are PEFT's."""
    theirs = logits(tuned(opened(both.whole if on_whole else both.alone, on_whole), *case, tmp_path / "theirs"))
    assert error(np.asarray(both.of_whole(jnp.asarray(TOKENS))), theirs) > 0.1
    for backbone in (both.of_whole, both.of_alone):
        assert error(with_adapter(backbone, tmp_path / "theirs"), theirs) < 1e-4
        adapter = load_adapter(tmp_path / "theirs", backbone.config)
        as_read = backbone is both.of_whole
        for model_type, whole in ((None, as_read), (both.name, True), (backbone.config.family, False)):
            out = tmp_path / f"{as_read}-{model_type}"
            save_adapter(adapter, out, backbone.config, model_type=model_type)
            # With warnings as errors: PEFT warns of tensors that are missing or left over.
            again = peft.PeftModel.from_pretrained(opened(both.whole if whole else both.alone, whole), out).eval()
            assert error(logits(again), theirs) < 1e-6
            names = [name for name, _ in again.named_parameters() if "lora_" in name or "ia3_" in name]
            assert names and all(("language_model" in name) is whole for name in names)
            assert load_adapter(out, both.of_alone.config).config == adapter.config


def test_methods_of_ours_are_written_for_the_whole(both: Both, tmp_path: Path) -> None:
    """Every option comes back, and PARA's folder is the same for both."""
    config = both.of_whole.config
    methods = {
        "a": LoraConfig(
            r=2, target_modules="all-linear", rank_pattern={"q_proj": 1}, use_rslora=True, lora_dropout=0.1
        ),
        "b": LoraConfig(r=2, target_modules=("q_proj", "up_proj"), layers_to_transform=(1,), lora_dropout=0.1),
        "c": IA3Config(target_modules=("q_proj", "up_proj"), feedforward_modules=()),
        "d": FanLoraConfig.of([("q_proj",), ("up_proj", "v_proj")], config, r=2),
        "e": ParaConfig(r=2),
    }
    for name, method in methods.items():
        adapter = random_adapter(method, config, 0)
        save_adapter(adapter, tmp_path / name, config)
        for base in (both.of_whole.config, both.of_alone.config):
            again = load_adapter(tmp_path / name, base)
            assert again.config == adapter.config or (name == "d" and again.config.method == "lora")
            ours, theirs = (x.tensors() for x in (adapter, again))
            assert ours.keys() == theirs.keys() and all(np.array_equal(x, theirs[key]) for key, x in ours.items())
        if method.peft_type:
            model = peft.PeftModel.from_pretrained(opened(both.whole, True), tmp_path / name).eval()
            assert error(with_adapter(both.of_alone, tmp_path / name), logits(model)) < 1e-4


def test_merged_into_the_whole(both: Both, tmp_path: Path) -> None:
    """`para-jax convert --adapter` does what PEFT's merge does to the text part, and no more."""
    kind, options = WHOLE["regular expression"]
    made = tuned(opened(both.whole, True), kind, options, tmp_path / "theirs")
    arguments = ["--model", str(both.whole), "--adapter", str(tmp_path / "theirs")]
    assert main(["convert", *arguments, "--out", str(tmp_path / "whole")]) == 0
    assert main(["convert", *arguments, "--text-only", "--out", str(tmp_path / "alone")]) == 0
    theirs = logits(made)
    assert error(logits(opened(tmp_path / "whole", True).eval()), theirs) < 1e-5
    assert error(logits(opened(tmp_path / "alone", False).eval()), theirs) < 1e-5
    merged = made.merge_and_unload().state_dict()
    ours = opened(tmp_path / "whole", True).state_dict()
    for name, x in merged.items():
        changed = "language_model.layers.1." in name
        torch.testing.assert_close(x, ours[name], rtol=0, atol=1e-5 if changed else 0)


# What names other parts, or nothing


def edit(folder: Path, rename: Callable[[str], str]) -> None:
    save_file({rename(key): x for key, x in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


# Modules of each vision tower that are none of the decoder's.
SEEING = {"gemma3": "mlp.fc1", "mistral3": "attention.q_proj", "qwen2_5_vl": "attn.qkv", "qwen3_vl": "mlp.linear_fc1"}


def test_modules_that_only_the_vision_tower_has(both: Both, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Beside others they are named in one line, with what the config says of them; alone they are refused."""
    last = SEEING[both.name]
    options = {"r": 2, "target_modules": ["up_proj", last], "rank_pattern": {last: 1}, "alpha_pattern": {"up_proj": 3}}
    made = tuned(opened(both.whole, True), peft.LoraConfig, options, tmp_path / "a")
    with caplog.at_level(logging.WARNING):
        assert error(with_adapter(both.of_alone, tmp_path / "a"), logits(made)) < 1e-4
    said = [record.getMessage() for record in caplog.records if "not for text" in record.getMessage()]
    assert len(said) == 1 and f".{last}." in said[0]
    tuned(opened(both.whole, True), peft.LoraConfig, {"r": 2, "target_modules": [last]}, tmp_path / "b")
    with pytest.raises(ParaJaxError, match=r"adapts only parts that are not for text, such as .*"):
        load_adapter(tmp_path / "b", both.of_whole.config)


@pytest.mark.parametrize("prefix", ["model.decoder", "text_decoder.model", "thinker.model"])
def test_a_prefix_that_fits_nothing(both: Both, prefix: str, tmp_path: Path) -> None:
    """Such an adapter would load and do nothing."""
    tuned(opened(both.whole, True), peft.LoraConfig, {"r": 2, "target_modules": ["o_proj"]}, tmp_path / "a")
    for path in (tmp_path / "a").glob("*.safetensors"):
        kept = {key: x for key, x in load_file(path).items() if "language_model" in key}
        save_file(kept, path)
    edit(tmp_path / "a", lambda key: key.replace(LM, prefix))
    with pytest.raises(ParaJaxError) as refused:
        load_adapter(tmp_path / "a", both.of_whole.config)
    assert f"names of another kind of model, such as base_model.model.{prefix}.layers.0." in str(refused.value)


def test_a_model_type_that_has_no_such_decoder(both: Both, tmp_path: Path) -> None:
    config = both.of_whole.config
    adapter = random_adapter(LoraConfig(r=2), config, 0)
    other = "gemma3" if both.name != "gemma3" else "qwen3_vl"
    with pytest.raises(ParaJaxError, match=f"unknown model_type with a {config.family} in it '{other}'"):
        save_adapter(adapter, tmp_path / "a", config, model_type=other)
    assert not (tmp_path / "a").exists()
    save_adapter(adapter, tmp_path / "a", config, model_type=both.name)
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["target_modules"].startswith(LM.replace(".", r"\."))
