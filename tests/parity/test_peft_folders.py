"""Folders as PEFT's users have them: saved in other ways, with more in them, or with what is not implemented."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
)

from para_jax import AdapterBank, Backbone, ParaJaxError, load_adapter
from para_jax.adapters.adapter import Adapter
from para_jax.adapters.weights import CONFIG, TORCH_WEIGHTS, WEIGHTS

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
)

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 7))
MODEL = "base_model.model.model"
AT = f"{MODEL}.layers"
Make = Callable[..., tuple[Any, Path]]


@pytest.fixture(scope="module")
def backbone(base: Path) -> Backbone:
    return Backbone.from_pretrained(base, dtype="float32", stacked=True)


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Make:
    """Makes an adapter with PEFT, every weight random, and its folder."""

    def made(kind: type = peft.LoraConfig, resize: int = 0, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
        saving = {k: options.pop(k) for k in ("save_embedding_layers", "safe_serialization") if k in options}
        torch.manual_seed(0)
        model = auto.from_pretrained(base)
        if resize:
            model.resize_token_embeddings(resize, mean_resizing=False)
        model = peft.get_peft_model(model, kind(**options))
        for name, weight in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                torch.nn.init.normal_(weight, mean=float("ia3_" in name), std=0.5)
        model.save_pretrained(tmp_path / "a", **saving)
        return model.eval(), tmp_path / "a"

    return made


def same_function(model: Any, backbone: Backbone, adapter: Adapter) -> bool:
    with torch.no_grad():
        theirs = model(torch.from_numpy(TOKENS)).logits.numpy()
    bank = AdapterBank.stack({"a": adapter}, backbone.config)
    ours = np.asarray(backbone(jnp.asarray(TOKENS), bank=bank, tenants=["a", "a"]))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max()) < 1e-4


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    save_file({rename(k): x for k, x in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


def edit(folder: Path, change: Callable[[dict[str, Any]], object], name: str = WEIGHTS) -> None:
    """Changes the tensors or the config of a folder."""
    if name == CONFIG:
        fields = json.loads((folder / CONFIG).read_text())
        change(fields)
        (folder / CONFIG).write_text(json.dumps(fields))
    else:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)


# Other ways to save


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: k.replace(".weight", ".default.weight"),
        lambda k: k.replace(".weight", ".acme-v2.weight"),
        lambda k: k.removeprefix("base_model.model."),
        lambda k: k.removeprefix("base_model.model.model."),
        lambda k: k.replace(AT, f"{MODEL}.language_model.layers"),
        lambda k: k.replace(AT, "base_model.model.language_model.model.layers"),
        lambda k: f"module.{k}",
        lambda k: k.replace(MODEL, "base_model.model._orig_mod.model"),
        lambda k: k.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    ],
    ids=["default", "named", "no peft prefix", "no prefix", "language_model", "older", "ddp", "compiled", "fsdp"],
)
def test_names_that_are_read_one_way_only(rename: Callable[[str], str], make: Make, backbone: Backbone) -> None:
    made, folder = make(r=2, target_modules=["q_proj", "down_proj"], rank_pattern={"layers.1.mlp.down_proj": 3})
    renamed(folder, rename)
    assert same_function(made, backbone, load_adapter(folder, backbone.config))


def test_vectors_of_a_whole_state_dict(make: Make, backbone: Backbone) -> None:
    made, folder = make(peft.IA3Config, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    renamed(folder, lambda k: f"{k}.default")
    assert same_function(made, backbone, load_adapter(folder, backbone.config))


def test_patterns_for_the_text_part_of_another_model(make: Make, backbone: Backbone) -> None:
    """What the pattern means is read where it was made: there the layers are in model.language_model."""
    made, folder = make(r=2, target_modules=r".*layers\.1\.(self_attn\.q|mlp\.up)_proj", lora_alpha=3)
    renamed(folder, lambda k: k.replace(AT, f"{MODEL}.language_model.layers"))
    edit(folder, lambda x: x.update(target_modules=r".*language_model.*layers\.1\.(self_attn\.q|mlp\.up)_proj"), CONFIG)
    adapter = load_adapter(folder, backbone.config)
    assert adapter.config.target_modules == ("layers.1.self_attn.q_proj", "layers.1.mlp.up_proj")
    assert same_function(made, backbone, adapter)


def test_parts_that_texts_do_not_go_through(make: Make, backbone: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    made, folder = make(r=2, target_modules=["q_proj"])
    other = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    edit(folder, lambda x: x.update({other: torch.zeros(2, 8)}))
    with caplog.at_level(logging.WARNING):
        assert same_function(made, backbone, load_adapter(folder, backbone.config))
    assert f"1 tensors of parts that are not for text are ignored, such as {other}" in caplog.text


def test_a_model_that_also_sees(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT on Gemma 3 with its vision tower, and here on its text part."""
    text = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "initializer_range": 0.2,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60)
    whole = Gemma3ForConditionalGeneration(config).eval()
    alone = Gemma3ForCausalLM(config.text_config)
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.save_pretrained(tmp_path / "text")
    backbone = Backbone.from_pretrained(tmp_path / "text", dtype="float32", stacked=True)
    for i, targets in enumerate((["q_proj", "v_proj"], r".*language_model.*\.1\.(self_attn\.o_proj|mlp\.\w+_proj)")):
        model = peft.get_peft_model(whole, peft.LoraConfig(r=2, target_modules=targets), f"{i}").eval()
        model.set_adapter(f"{i}")
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.5)
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            logits = model(torch.from_numpy(TOKENS)).logits.numpy()
        bank = AdapterBank.load({"a": tmp_path / f"{i}"}, backbone.config)
        ours = np.asarray(backbone(jnp.asarray(TOKENS), bank=bank, tenants=["a", "a"]))
        bare = np.asarray(backbone(jnp.asarray(TOKENS)))
        assert np.abs(ours - logits).max() < 1e-4 * np.abs(logits).max() < np.abs(bare - logits).max()
        assert ("tensors of parts that are not for text" in caplog.text) == (i == 0)
        caplog.clear()
        whole = model.unload()


def test_patterns_of_a_file_that_lost_its_prefix(make: Make, backbone: Backbone) -> None:
    made, folder = make(r=2, target_modules=r"model\.layers\.1\.self_attn\.(q|o)_proj")
    renamed(folder, lambda k: k.removeprefix("base_model.model.model."))
    assert same_function(made, backbone, load_adapter(folder, backbone.config))


def test_only_parts_that_texts_do_not_go_through(make: Make, backbone: Backbone) -> None:
    _, folder = make(r=2, target_modules=["q_proj"])
    renamed(folder, lambda k: k.replace(AT, f"{MODEL}.vision_tower.layers"))
    assert "adapts only parts that are not for text, such as base_model.model.model.vision_tower" in refusal(
        folder, backbone
    )


def test_of_a_model_without_a_head(base: Path, make: Make, backbone: Backbone) -> None:
    made, folder = make(r=2, target_modules=r"layers\.\d+\.self_attn\.(q|v)_proj", auto=AutoModel)
    assert all(k.startswith("base_model.model.layers.") for k in load_file(folder / WEIGHTS))
    whole = AutoModelForCausalLM.from_pretrained(base)
    whole.model = made.base_model.model
    assert same_function(whole.eval(), backbone, load_adapter(folder, backbone.config))


def test_bin_files(make: Make, backbone: Backbone) -> None:
    made, folder = make(r=2, target_modules=["q_proj", "o_proj"])
    torch.save(load_file(folder / WEIGHTS), folder / TORCH_WEIGHTS)
    (folder / WEIGHTS).unlink()
    assert same_function(made, backbone, load_adapter(folder, backbone.config))
    torch.save({k: x.double() for k, x in torch.load(folder / TORCH_WEIGHTS).items()}, folder / TORCH_WEIGHTS)
    assert same_function(made, backbone, load_adapter(folder, backbone.config))


class Code:
    """What a pickle executes when it is read, unless nothing in it is."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": Code()}, "adapter_model.bin is damaged or holds more than tensors"),
        ([torch.zeros(2)], "adapter_model.bin is damaged or holds more than tensors: it is a list"),
        ({"x": torch.zeros(2, dtype=torch.int64)}, "x is torch.int64; supported: bfloat16, float16, float32, float64"),
        ({}, "adapter_model.bin is empty: it has no tensors"),
    ],
)
def test_bin_files_that_are_refused(
    content: Any, message: str, make: Make, backbone: Backbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    _, folder = make(r=2, target_modules=["q_proj"])
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / TORCH_WEIGHTS)
    with pytest.raises(ParaJaxError, match=re.escape(message)):
        load_adapter(folder, backbone.config)
    assert not (tmp_path / "executed").exists()


# What is refused, for its own reason


def refusal(folder: Path, backbone: Backbone) -> str:
    with pytest.raises(ParaJaxError) as caught:
        load_adapter(folder, backbone.config)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_resized_embeddings(base: Path, make: Make, backbone: Backbone, tmp_path: Path) -> None:
    """And the way out that the message and docs/adapters.md give."""
    made, folder = make(r=2, target_modules=["q_proj"], resize=64)
    assert "base_model.model.lm_head.weight" in load_file(folder / WEIGHTS)
    message = refusal(folder, backbone)
    assert (
        "adapter_model.safetensors: it contains the model's lm_head and embed_tokens of 64 tokens, and the backbone "
        "has 61: the model was resized to its tokenizer (resize_token_embeddings) before it was tuned, and PEFT saved "
        "them. Resize the base model in the same way, merge the adapter in peft and load the merged model as the "
        "backbone"
    ) in message
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(64)
    peft.PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = Backbone.from_pretrained(tmp_path / "merged", dtype="float32")
    with torch.no_grad():
        theirs = made(torch.from_numpy(TOKENS)).logits.numpy()
    assert np.abs(np.asarray(merged(jnp.asarray(TOKENS))) - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_embeddings_of_fewer_tokens(make: Make, backbone: Backbone) -> None:
    """Models have more rows than their tokenizers have tokens, and many scripts resize to the tokenizer."""
    made, folder = make(r=2, target_modules=["q_proj"], resize=50)
    assert (
        "PEFT saved them. If they were not tuned, save the adapter without them: model.save_pretrained(folder, "
        "save_embedding_layers=False); else resize the base model in the same way, merge the adapter in peft"
    ) in refusal(folder, backbone)
    made.save_pretrained(folder, save_embedding_layers=False)
    bank = AdapterBank.load({"a": folder}, backbone.config)
    tokens = TOKENS % 50
    with torch.no_grad():
        theirs = made(torch.from_numpy(tokens)).logits.numpy()
    ours = np.asarray(backbone(jnp.asarray(tokens), bank=bank, tenants=["a", "a"]))[..., :50]
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_embeddings_that_were_saved_with_it(make: Make, backbone: Backbone) -> None:
    made, folder = make(r=2, target_modules=["q_proj"], save_embedding_layers=True)
    message = refusal(folder, backbone)
    assert "which all tenants share here. If they were tuned, merge the adapter in peft" in message
    assert "save the adapter without them: model.save_pretrained(folder, save_embedding_layers=False)" in message
    made.save_pretrained(folder, save_embedding_layers=False)
    assert same_function(made, backbone, load_adapter(folder, backbone.config))


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_adapted_embeddings(module: str, make: Make, backbone: Backbone) -> None:
    _, folder = make(r=2, target_modules=["q_proj", module])
    assert (
        f"target_modules has {module}, which cannot be adapted here; merge the adapter in peft and "
        f"load the merged model as the backbone, or tune again without {module}"
    ) in refusal(folder, backbone)
    edit(folder, lambda x: x.update(target_modules=["q_proj"]), CONFIG)
    assert f"it adapts {module}, which cannot be adapted here; merge" in refusal(folder, backbone)


def test_no_tensors(make: Make, backbone: Backbone) -> None:
    _, folder = make(r=2, target_modules=["q_proj"])
    save_file({}, folder / WEIGHTS)
    assert "adapter_model.safetensors is empty: it has no tensors. The adapter's weights were not there" in refusal(
        folder, backbone
    )
    (folder / WEIGHTS).write_bytes(b"")
    assert "is empty, 0 bytes: the save or download is incomplete" in refusal(folder, backbone)
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "is a Git LFS pointer instead of the file; run: git lfs pull" in refusal(folder, backbone)


CAUSES: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    (
        "not gathered",
        lambda x: x.update({f"{AT}.0.self_attn.q_proj.lora_A.weight": torch.zeros(0)}),
        "1 of its tensors are empty or flat, as DeepSpeed ZeRO-3 and FSDP leave them in each process; gather the",
    ),
    (
        "dora",
        lambda x: x.update({f"{AT}.0.self_attn.q_proj.lora_magnitude_vector": torch.zeros(32)}),
        "it has DoRA's magnitude vectors, which are not implemented here; merge the adapter in peft",
    ),
    (
        "whole model",
        lambda x: x.update({f"{AT}.0.self_attn.q_proj.base_layer.weight": torch.zeros(32, 32)}),
        "1 of its tensors are weights of the model itself, such as base_model.model.model.layers.0.self_attn.q_proj."
        "base_layer.weight: it is not an adapter but a state dict of the whole model. Save only the adapter",
    ),
    (
        "whole quantized model",
        lambda x: x.update({f"{AT}.0.mlp.up_proj.base_layer.weight": torch.zeros(9, 1, dtype=torch.uint8)}),
        "up_proj.base_layer.weight is U8; adapters are read in float32, float16 and bfloat16; it is a weight of the "
        "model itself. Save only the adapter: model.save_pretrained(folder)",
    ),
    (
        "other method",
        lambda x: x.update({f"{AT}.0.self_attn.q_proj.ia3_l": torch.zeros(32, 1)}),
        "its tensors are those of peft_type IA3, and its config has LORA; use the config of the same run",
    ),
    (
        "more modules",
        lambda x: x.update({k.replace("q_proj", "k_proj"): (y[:16] if "_B" in k else y).clone() for k, y in x.items()}),
        "target_modules in its config lacks k_proj, which the file has: add it",
    ),
    (
        "fewer modules",
        lambda x: [x.pop(k) for k in list(x) if "v_proj" in k],
        "target_modules in its config has v_proj, which the file lacks: take it out",
    ),
    (
        "unknown modules",
        lambda x: x.update({f"{AT}.0.mlp.router.lora_A.weight": torch.zeros(2, 32)}),
        "it adapts mlp.router, which is not a projection that can be adapted here; merge the adapter",
    ),
    (
        "another kind of model",
        lambda x: [x.update({k.replace(AT, "base_model.model.transformer.h"): x.pop(k)}) for k in list(x)],
        "its tensors have names of another kind of model, such as base_model.model.transformer.h.0.self_attn.q_proj.",
    ),
    (
        "a part",
        lambda x: x.pop(f"{AT}.1.self_attn.v_proj.lora_A.weight"),
        "it has 7 of the 8 tensors that its config needs: it is incomplete, or the part of one process; copy the",
    ),
    (
        "two adapters",
        lambda x: x.update(
            {
                f"{AT}.0.self_attn.q_proj.lora_A.{name}.weight": x[f"{AT}.0.self_attn.q_proj.lora_A.weight"].clone()
                for name in ("one", "two")
            }
        ),
        "which are one tensor; take one of them out",
    ),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(*c, id=name) for name, *c in CAUSES])
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, Any]], object], message: str, make: Make, backbone: Backbone
) -> None:
    _, folder = make(r=2, target_modules=["q_proj", "v_proj"])
    edit(folder, change)
    refused = refusal(folder, backbone)
    assert message in refused and "save it again" not in refused


def test_adapters_of_several_names_in_one_file(make: Make, backbone: Backbone) -> None:
    _, folder = make(r=2, target_modules=["q_proj", "v_proj"])
    renamed(folder, lambda k: k.replace(".weight", f".{'one' if 'q_proj' in k else 'two'}.weight"))
    message = refusal(folder, backbone)
    assert "has adapters of several names: " in message and "save each in its own folder" in message


def test_a_pattern_that_fits_nothing(make: Make, backbone: Backbone) -> None:
    _, folder = make(r=2, target_modules=["q_proj", "v_proj"])
    edit(folder, lambda x: x.update(rank_pattern={"v_porj": 4}), CONFIG)
    assert (
        "rank_pattern has 'v_porj', which matches no targeted module; did you mean 'v_proj'? They are like "
        "'model.layers.0.self_attn.q_proj'. Take it out, or target what it names"
    ) in refusal(folder, backbone)
    edit(folder, lambda x: x.update(rank_pattern={}, target_modules=["q_proj", "c_attn"]), CONFIG)
    assert "unknown entry of target_modules 'c_attn'" in refusal(folder, backbone)
    assert "Take it out, or name one of these" in refusal(folder, backbone)


def test_other_methods_of_peft(make: Make, backbone: Backbone) -> None:
    _, folder = make(peft.VeraConfig, target_modules=["q_proj"], r=2)
    assert "unknown method 'vera'" in refusal(folder, backbone)
    assert "or merge the adapter in peft and load the merged model as the backbone" in refusal(folder, backbone)


# NaN


@pytest.mark.parametrize(
    ("value", "file", "dtype"),
    [
        (float("nan"), WEIGHTS, torch.float32),
        (float("inf"), WEIGHTS, torch.bfloat16),
        (float("-inf"), TORCH_WEIGHTS, torch.float16),
    ],
)
def test_nan_adapters(value: float, file: str, dtype: torch.dtype, make: Make, backbone: Backbone) -> None:
    _, folder = make(r=2, target_modules=["q_proj"])
    tensors = {k: x.to(dtype) for k, x in load_file(folder / WEIGHTS).items()}
    name = f"{AT}.1.self_attn.q_proj.lora_B.weight"
    tensors[name][3, 1] = value
    (folder / WEIGHTS).unlink()
    (save_file if file == WEIGHTS else torch.save)(tensors, folder / file)
    message = refusal(folder, backbone)
    assert message.startswith(f"{folder / file}: an adapter with NaN or infinite values gives useless answers")
    assert f"\n  {name} has 1 NaN or infinite values of 64" in message
    adapter = load_adapter(folder, backbone.config, check_finite=False)
    assert not np.isfinite(np.asarray(adapter.tensors()["up.q_proj"][1, 3, 1]))
    with pytest.raises(ParaJaxError, match="NaN or infinite"):
        AdapterBank.load({"a": folder}, backbone.config)
    assert AdapterBank.load({"a": folder}, backbone.config, check_finite=False).names == ("a",)


def test_what_float32_cannot_hold(make: Make, backbone: Backbone) -> None:
    _, folder = make(r=2, target_modules=["q_proj"])
    edit(folder, lambda x: [x.update({k: y.double() * 1e300}) for k, y in list(x.items())])
    assert "lora_A.weight has 64 NaN or infinite values of 64" in refusal(folder, backbone)


def test_a_folder_with_other_adapters_in_it(make: Make, backbone: Backbone, tmp_path: Path) -> None:
    """PEFT saves the adapter named default in the folder, and others in folders in it."""
    made, folder = make(r=2, target_modules=["q_proj"])
    shutil.copytree(folder, folder / "other")
    assert same_function(made, backbone, load_adapter(folder, backbone.config))
    with pytest.raises(ParaJaxError, match=r"is not an adapter but contains adapters: a; give e.g. .*/a"):
        load_adapter(tmp_path, backbone.config)
