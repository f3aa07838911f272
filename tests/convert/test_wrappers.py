"""Models that have a text decoder among other parts: what is read, what is refused, and how they are written."""

from __future__ import annotations

import json
import logging
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from para_jax import Backbone, BackboneConfig, LoraConfig, ParaJaxError, save_adapter, tiny_backbone_path
from para_jax.cli import main
from para_jax.convert import tensors as reading
from para_jax.convert.checkpoint import save_backbone
from para_jax.convert.tokenizer import load_tokenizer
from para_jax.families.wrappers import WRAPPERS
from para_jax.families.writing import hf_fields
from tests.helpers import random_adapter
from tests.wrappers import saved, wrapped

Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each, as on the hub."""
    return {name: saved(wrapped(name), tmp_path_factory.mktemp(name) / "a") for name in WRAPPERS}


def edited(folder: Path, to: Path, edit: Edit = dict, **fields: Any) -> Path:
    """The folder with its tensors changed, and some fields of config.json."""
    shutil.copytree(folder, to)
    save_file(edit(load_file(to / WEIGHTS)), to / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **fields}))
    return to


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("para_jax")]


# config.json


SEES = {"vision_config": {"hidden_size": 8}, "torch_dtype": "bfloat16"}
QWEN2_5_VL = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652,
    "vision_end_token_id": 151653, "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 128000, "max_window_layers": 70, "model_type": "qwen2_5_vl", "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "use_cache": True, "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 151936, **SEES,
}  # fmt: skip
QWEN3_VL_TEXT = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "dtype": "bfloat16",
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
    "intermediate_size": 9728, "max_position_embeddings": 262144, "model_type": "qwen3_vl_text",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    "rope_theta": 5000000, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 151936,
}  # fmt: skip
# The number of parameters of the text part, and config.json as it is published.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Gemma 3 4B": (3_880_263_168, {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        }, **SEES,
    }),
    "Mistral Small 3.1": (23_572_403_200, {
        "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10, "model_type": "mistral3",
        "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2, "text_config": {
            "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
            "initializer_range": 0.02, "intermediate_size": 32768, "max_position_embeddings": 131072,
            "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0, "sliding_window": None, "use_cache": True,
            "vocab_size": 131072,
        }, "vision_feature_layer": -1, **SEES,
    }),
    "Qwen2.5-VL 3B": (3_085_938_688, QWEN2_5_VL),
    # transformers 4 wrote both from 4.52 on; text_config is what counts.
    "Qwen2.5-VL 3B, saved again": (3_085_938_688, {
        **QWEN2_5_VL, "hidden_size": 8, "text_config": {
            **{key: value for key, value in QWEN2_5_VL.items() if key not in SEES and "_token_id" not in key},
            "bos_token_id": 151643, "eos_token_id": 151645, "image_token_id": None, "model_type": "qwen2_5_vl_text",
        },
    }),
    "Qwen3-VL 4B": (4_022_468_096, {
        "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655, "model_type": "qwen3_vl",
        "text_config": QWEN3_VL_TEXT, "tie_word_embeddings": True, "video_token_id": 151656,
        "vision_end_token_id": 151653, "vision_start_token_id": 151652, **SEES,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is said of keys of the whole, and the text part alone is the same architecture."""
    parameters, fields = PUBLISHED[name]
    with caplog.at_level(logging.WARNING):
        config = BackboneConfig.from_hf(fields)
        assert config.size == parameters and hf_fields(config) == fields
        alone = hf_fields(config, text_only=True)
        assert BackboneConfig.from_hf(alone) == config and alone["model_type"] == config.family
    assert said(caplog) == []


def test_end_tokens_are_the_wholes_or_else_the_text_parts() -> None:
    """As in a generation config that transformers makes of such a config.json."""
    text = PUBLISHED["Qwen3-VL 4B"][1]
    assert BackboneConfig.from_hf(text).eos_token_ids == (151645,)
    above = BackboneConfig.from_hf({**text, "eos_token_id": [7, 8], "bos_token_id": 9})
    assert (above.eos_token_ids, above.bos_token_id) == ((7, 8), 9)
    fields = PUBLISHED["Gemma 3 4B"][1]
    assert BackboneConfig.from_hf({k: v for k, v in fields.items() if k != "eos_token_id"}).eos_token_ids == ()
    assert BackboneConfig.from_hf(fields).bos_token_id == 2


def test_keys_of_the_text_part_that_nothing_reads(caplog: pytest.LogCaptureFixture) -> None:
    text = {**QWEN3_VL_TEXT, "unk_token_id": 0, "rope_scaling": {**QWEN3_VL_TEXT["rope_scaling"], "finetuned": True}}
    with caplog.at_level(logging.WARNING):
        BackboneConfig.from_hf({**PUBLISHED["Qwen3-VL 4B"][1], "text_config": text, "anything": 1}, "their/model")
    assert said(caplog) == [
        "their/model: keys that transformers' Qwen3VLForConditionalGeneration does not read are ignored: "
        "text_config.unk_token_id, text_config.rope_scaling.finetuned"
    ]


GEMMA = PUBLISHED["Gemma 3 4B"][1]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"text_config": None}, "config.json of gemma3 has no text_config; supported is one of gemma3_text"),
    ({"text_config": [1]}, "config.json of gemma3 has text_config=[1], which holds no options; supported is one of "
     "gemma3_text"),
    ({"model_type": "mistral3", "text_config": {"model_type": "ministral"}}, "their/model is a mistral3 with a "
     "text_config of architecture 'ministral', which is not supported; supported is mistral or ministral3"),
    ({"text_config": {"model_type": "llama"}}, "their/model is a gemma3 with a text_config of architecture 'llama', "
     "which is not supported; supported is gemma3_text"),
    ({"text_config": {"model_type": ["gemma3_text"]}}, "their/model is a gemma3 with a text_config of architecture "
     "['gemma3_text'], which is not supported; supported is gemma3_text"),
    # Of its class in transformers the whole does not look at it.
    ({"text_config": {"final_logit_softcapping": 3.0}}, "config.json has text_config.final_logit_softcapping=3.0; only "
     "None is supported"),
    ({"text_config": {"use_bidirectional_attention": True}}, "config.json has text_config.use_bidirectional_attention="
     "True; only False is supported"),
    ({"text_config": {"num_experts": 4}}, "config.json has text_config.num_experts=4, which is not implemented for "
     "Gemma3ForConditionalGeneration and may change what it computes. If it does not, take it out of config.json"),
    ({"text_config": {"vocab_size": None}}, "config.json lacks vocab_size"),
    ({"text_config": {"hidden_size": 0}}, "config.json has hidden_size=0, which is not a whole number from 1"),
    ({"tie_word_embeddings": "yes"}, "config.json has tie_word_embeddings='yes', which is neither true nor false"),
    ({"quantization_config": {"bits": 4}}, "config.json has a quantization_config; only float32, float16 and bfloat16 "
     "are read"),
    ({"model_type": "qwen2_5_vl", "text_config": None}, "config.json lacks vocab_size, hidden_size, intermediate_size, "
     "num_hidden_layers, num_attention_heads"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ParaJaxError) as error:
        BackboneConfig.from_hf({**GEMMA, **fields}, "their/model")
    assert str(error.value) == message


# Tensors


def test_what_is_left_out_is_named_with_its_size(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Backbone.from_pretrained(folders["mistral3"])
    assert said(caplog) == [
        f"{folders['mistral3']}: of Mistral3ForConditionalGeneration the text part is read; left out: "
        "multi_modal_projector (4 tensors, 2,576 parameters), vision_tower (11 tensors, 4,912 parameters)"
    ]


HUB = "language_model.model.layers.0.mlp"
WRONG: list[tuple[Edit, list[str]]] = [
    (lambda x: {**x, "v_head.weight": torch.ones(3)}, ["v_head.weight is not expected"]),
    # Of another decoder than the one that is there, and of another layer of it.
    (lambda x: {**x, "model.layers.0.mlp.up_proj.weight": torch.ones(3)},
     ["model.layers.0.mlp.up_proj.weight is not expected"]),
    (lambda x: {**x, f"{HUB}.up_proj.bias": torch.ones(3)}, [f"{HUB}.up_proj.bias is not expected"]),
    (lambda x: {key: t for key, t in x.items() if key != f"{HUB}.up_proj.weight"},
     [f"{HUB}.up_proj.weight [48, 32] is missing"]),
    (lambda x: {**x, f"{HUB}.up_proj.weight": torch.ones(3)}, [f"{HUB}.up_proj.weight is [3] and should be [48, 32]"]),
    (lambda x: {key: t for key, t in x.items() if "lm_head" not in key},
     ["lm_head.weight [61, 32] is missing; if the head is the embedding, set tie_word_embeddings to true in "
      "config.json"]),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "lines"), WRONG)
def test_every_tensor_is_accounted_for(edit: Edit, lines: list[str], folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ParaJaxError) as error:
        Backbone.from_pretrained(edited(folders["gemma3"], tmp_path / "a", edit))
    assert str(error.value).splitlines()[1:] == [f"  {line}" for line in lines]


def test_a_text_model_with_the_config_of_the_whole(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its names are none of a wrapper's, and transformers would draw all weights at random."""
    folder = edited(
        folders["gemma3"],
        tmp_path / "a",
        lambda x: {key.removeprefix("language_model."): t for key, t in x.items() if "language_model.m" in key},
    )
    assert main(["convert", "--model", str(folder), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        f"para-jax convert: {folder} has no tensors of the text part of a Gemma3ForConditionalGeneration, whose names "
        "begin with model.language_model. or language_model. or language_model.model.; the folder's are like "
        "model.embed_tokens.weight. If it is a text model, model_type in config.json must be gemma3_text\n"
    )


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_mix_of_prefixes(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    def mixed(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        first = r"^(language_model\.model|model\.language_model|model)\.layers\.1"
        other = "language_model.model" if name.startswith(("qwen", "gemma4")) else "model.language_model"
        return {re.sub(first, f"{other}.layers.1", key): t for key, t in x.items()}

    folder = edited(folders[name], tmp_path / "a", mixed)
    with pytest.raises(ParaJaxError, match=r"has different prefixes for its text part, such as in .*\.weight and "):
        Backbone.from_pretrained(folder)


# Written


def test_into_the_whole_as_it_was(folders: dict[str, Path], tmp_path: Path) -> None:
    """A head that is there twice, other dtypes and processors too; the text part merged, and nothing else changed."""
    twice = saved(wrapped("gemma3", tied=True), tmp_path / "tied")
    embed = "language_model.model.embed_tokens.weight"

    def edit(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        half = {key: t.half() if "vision_tower" in key else t.bfloat16() for key, t in x.items()}
        return {**half, "language_model.lm_head.weight": half[embed].clone()}

    folder = edited(twice, tmp_path / "a", edit, dtype="bfloat16", auto_map={"AutoModel": "x.Y"})
    for name in ("preprocessor_config.json", "generation_config.json", "chat_template.json"):
        (folder / name).write_text("{}")
    config = BackboneConfig.from_pretrained(folder)
    targets = ("q_proj", "up_proj")
    save_adapter(random_adapter(LoraConfig(r=2, target_modules=targets), config, 0), tmp_path / "acme", config)
    shutil.copy(Path(tiny_backbone_path(), "tokenizer.json"), folder)
    out = tmp_path / "out"
    arguments = ["--model", str(folder), "--out", str(out), "--adapter", str(tmp_path / "acme"), "--shard-size", "9KB"]
    assert main(["convert", *arguments]) == 0
    before = load_file(folder / WEIGHTS)
    after = {key: x for path in out.glob("*.safetensors") for key, x in load_file(path).items()}
    assert before.keys() == after.keys() and len([*out.glob("*.safetensors")]) > 2
    for key, x in before.items():
        merged = any(key.endswith(f"{target}.weight") for target in targets) and "language_model" in key
        assert x.dtype == after[key].dtype and torch.equal(x, after[key]) is not merged, key
    fields = json.loads((folder / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == {k: v for k, v in fields.items() if k != "auto_map"}
    assert {"preprocessor_config.json", "generation_config.json", "chat_template.json"} <= {
        path.name for path in out.iterdir()
    }


def test_cast(folders: dict[str, Path], tmp_path: Path) -> None:
    """All parts, and what config.json says of each."""
    out, fields = tmp_path / "out", json.loads((folders["qwen3_vl"] / "config.json").read_text())
    old = {"torch_dtype": "float32", "text_config": {**fields["text_config"], "dtype": "float32"}}
    folder = edited(folders["qwen3_vl"], tmp_path / "b", **old)
    assert main(["convert", "--model", str(folder), "--out", str(out), "--dtype", "bfloat16"]) == 0
    before, after = load_file(folder / WEIGHTS), load_file(out / WEIGHTS)
    assert all(torch.equal(x.bfloat16(), after[key]) for key, x in before.items())
    text = {**fields["text_config"], "dtype": "bfloat16"}
    assert json.loads((out / "config.json").read_text()) == {**fields, "text_config": text, "dtype": "bfloat16"}
    folder = edited(
        folders["qwen3_vl"], tmp_path / "a", lambda x: {k: t * 1e9 if "visual" in k else t for k, t in x.items()}
    )
    with pytest.raises(ParaJaxError, match=r"model\.visual\..* has a weight beyond the range of float16"):
        save_backbone(Backbone.from_pretrained(folder), tmp_path / "half", like=folder, dtype="float16")
    assert not (tmp_path / "half").exists()


def test_the_text_part_alone(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out, model) = str(tmp_path / "out"), str(folders["gemma3"])
    assert main(["convert", "--model", model, "--text-only", "--out", out]) == 0
    assert "parameters, family gemma3_text, the text part of Gemma3ForConditionalGeneration" in capsys.readouterr().out
    whole, text = Backbone.from_pretrained(model).config, Backbone.from_pretrained(out).config
    assert (text.name, whole.name) == (out, model) and BackboneConfig.from_hf(json.loads(whole.hf), out) == text
    assert all(key.startswith(("model.layers.", "model.embed", "model.norm", "lm_head")) for key in load_file(
        Path(out, WEIGHTS)
    ))  # fmt: skip
    # The second time it is no part of anything.
    assert main(["convert", "--model", out, "--text-only", "--out", f"{out}-again"]) == 1
    assert "is a text model, and nothing else is in it; leave the option out" in capsys.readouterr().err
    assert main(["convert", "--model", model, "--text-only", "--check"]) == 1


def test_the_whole_needs_its_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    backbone = Backbone.from_pretrained(folders["gemma3"])
    with pytest.raises(ParaJaxError, match="is the text part of a Gemma3ForConditionalGeneration; give like=FOLDER"):
        save_backbone(backbone, tmp_path / "a")
    with pytest.raises(ParaJaxError, match="is not the checkpoint that the backbone was read from: it has no "):
        save_backbone(backbone, tmp_path / "a", like=folders["mistral3"])
    assert not (tmp_path / "a").exists()


def test_other_parts_are_in_memory_one_tensor_at_a_time(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And reading the text part does not look at them."""
    read = reading.SafetensorsFiles.read
    alive: list[weakref.ref[np.ndarray]] = []
    most: list[int] = []

    def counted(self: Any, key: str) -> np.ndarray:
        x = read(self, key)
        if "vision_tower" in key:
            alive.append(weakref.ref(x))
            most.append(sum(ref() is not None for ref in alive))
        return x

    monkeypatch.setattr(reading.SafetensorsFiles, "read", counted)
    backbone = Backbone.from_pretrained(folders["gemma3"])
    assert most == []
    save_backbone(backbone, tmp_path / "a", like=folders["gemma3"])
    assert len(most) == 32 and max(most) <= 2


# Tokenizers


@pytest.mark.parametrize("name", WRAPPERS)
def test_tokenizers(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """That of transformers' class of the whole; a chat template that only a processor has is the tokenizer's too."""
    folder = edited(folders[name], tmp_path / "a")
    for path in Path(tiny_backbone_path()).glob("tokenizer*"):
        shutil.copy(path, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs) and ours("A captain").input_ids == theirs("A captain").input_ids
    assert ours.chat_template is None
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    messages = [{"role": "user", "content": "Who sat?"}]
    assert load_tokenizer(folder).apply_chat_template(messages, tokenize=False) == "user: Who sat?\n"
    # Of the text part alone there is no processor.
    assert main(["convert", "--model", str(folder), "--text-only", "--out", str(tmp_path / "out")]) == 0
    for read in (load_tokenizer, AutoTokenizer.from_pretrained):
        assert read(tmp_path / "out").apply_chat_template(messages, tokenize=False) == "user: Who sat?\n"
    (folder / "chat_template.jinja").write_text("{{ messages | length }}")
    assert load_tokenizer(folder).apply_chat_template(messages, tokenize=False) == "1"
