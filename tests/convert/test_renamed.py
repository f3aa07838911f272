"""Tensors under other names: what transformers loads is loaded, with its logits, or refused by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from para_jax import Backbone, ParaJaxError
from para_jax.convert.checkpoint import save_backbone
from para_jax.families.table import FAMILIES
from tests.helpers import families, family_backbone, random_backbone

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9), dtype=np.int32)


def is_theirs(folder: Path) -> None:
    """Sees that our logits are transformers'."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        logits = theirs(torch.from_numpy(TOKENS).long()).logits.numpy()
    ours = np.asarray(Backbone.from_pretrained(folder, dtype="float32", stacked=True)(jnp.asarray(TOKENS)))
    assert np.abs(ours - logits).max() < 1e-4 * np.abs(logits).max()


def edited(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **fields: Any) -> Path:
    """The folder with its tensors changed, and some fields of config.json."""
    tensors = edit(load_file(folder / "model.safetensors"))
    save_file({name: x.clone() for name, x in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): x for name, x in tensors.items()}


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    save_backbone(random_backbone(tie_word_embeddings=False), tmp_path / "a")
    return tmp_path / "a"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    save_backbone(random_backbone(tie_word_embeddings=True), tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize("family", families())
def test_names_without_the_base_models_prefix(family: str, tmp_path: Path) -> None:
    save_backbone(family_backbone(family), tmp_path / "a")
    prefix = f"{FAMILIES[family].names.stem.partition('.')[0]}."

    def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): x for name, x in tensors.items()}

    # Some classes have a padding token by default, which is beyond this vocabulary.
    is_theirs(edited(tmp_path / "a", renamed, pad_token_id=0))


# The masks and frequencies that checkpoints of the hub have in each layer.
BUFFERS = {
    "gpt2": {"attn.bias": torch.ones(1, 1, 128, 128), "attn.masked_bias": torch.tensor(-1e4)},
    "gpt_neox": {"attention.bias": torch.ones(1, 1, 128, 128, dtype=torch.uint8),
                 "attention.masked_bias": torch.tensor(-1e9), "attention.rotary_emb.inv_freq": torch.ones(2)},
}  # fmt: skip


@pytest.mark.parametrize("torch_file", [False, True])
@pytest.mark.parametrize("family", BUFFERS)
def test_buffers_that_no_code_reads(
    family: str, torch_file: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_backbone(family_backbone(family), tmp_path / "a")
    names = FAMILIES[family].names
    more = {f"{names.stem}.{names.layers}.{i}.{name}": x for i in (0, 1) for name, x in BUFFERS[family].items()}
    folder = edited(tmp_path / "a", lambda tensors: {**tensors, **more}, pad_token_id=0)
    if torch_file:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    is_theirs(folder)
    assert not [record for record in caplog.records if record.name.startswith("para_jax")]


def test_another_tensor_of_a_layer_is_refused(tmp_path: Path) -> None:
    save_backbone(family_backbone("gpt2"), tmp_path / "a")
    folder = edited(tmp_path / "a", lambda x: {**x, "h.0.crossattention.bias": torch.ones(1)})
    with pytest.raises(ParaJaxError, match=r" h\.0\.crossattention\.bias is not expected"):
        Backbone.from_pretrained(folder)


def test_the_head_of_gpt_neox_by_its_new_name(tmp_path: Path) -> None:
    save_backbone(family_backbone("gpt_neox"), tmp_path / "a")
    is_theirs(edited(tmp_path / "a", lambda x: {name.replace("embed_out", "lm_head"): t for name, t in x.items()}))


def test_names_with_the_prefix_twice(untied: Path) -> None:
    is_theirs(edited(untied, lambda tensors: {f"model.{name}": x for name, x in tensors.items()}))


def test_what_a_base_model_saves(tied: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(tied).save_pretrained(tmp_path / "base")
    assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / "base" / "model.safetensors")
    is_theirs(tmp_path / "base")


def test_a_base_model_that_is_not_tied_has_no_head(untied: Path, tmp_path: Path) -> None:
    """transformers draws one at random."""
    AutoModel.from_pretrained(untied).save_pretrained(tmp_path / "base")
    with pytest.raises(ParaJaxError) as error:
        Backbone.from_pretrained(tmp_path / "base")
    assert str(error.value).splitlines()[1:] == [
        "  lm_head.weight [61, 32] is missing; if the head is the embedding, set tie_word_embeddings to true in "
        "config.json"
    ]


@pytest.mark.parametrize("edit", [lambda x: x, without_prefix])
def test_a_tied_file_with_the_head_only(tied: Path, edit: Callable) -> None:
    def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return edit({"lm_head.weight": tensors.pop("model.embed_tokens.weight"), **tensors})

    is_theirs(edited(tied, renamed))


def test_a_tied_file_with_both(tied: Path) -> None:
    is_theirs(edited(tied, lambda x: {**x, "lm_head.weight": x["model.embed_tokens.weight"]}))


def test_a_tied_file_with_neither(tied: Path) -> None:
    folder = edited(tied, lambda x: {name: x[name] for name in x if "embed" not in name})
    with pytest.raises(ParaJaxError, match=r"model\.embed_tokens\.weight \[61, 32\] is missing"):
        Backbone.from_pretrained(folder)


def test_a_tied_file_with_two_that_differ(untied: Path) -> None:
    """transformers 4 ties them, and transformers 5 does not."""
    with pytest.raises(ParaJaxError) as error:
        Backbone.from_pretrained(edited(untied, lambda x: x, tie_word_embeddings=True))
    assert str(error.value).splitlines()[1:] == [
        "  lm_head.weight differs from the embedding: set tie_word_embeddings to false in config.json to use it, "
        "as in transformers 5. If it should not be used, as in transformers 4, take it out of the file"
    ]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_as_transformers_5_holds_them(family: str, tmp_path: Path) -> None:
    save_backbone(family_backbone(family), tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", save_original_format=False)
    assert load_file(tmp_path / "b" / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj"].ndim == 3
    is_theirs(tmp_path / "b")
    is_theirs(edited(tmp_path / "b", without_prefix))


def test_mixtrals_experts_under_mlp(tmp_path: Path) -> None:
    save_backbone(family_backbone("mixtral"), tmp_path / "a")
    is_theirs(edited(tmp_path / "a", lambda x: {name.replace("block_sparse_moe", "mlp"): t for name, t in x.items()}))


def test_tensors_of_no_decoder_are_ignored_with_a_line(untied: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = {"v_head.summary.weight": torch.ones(1, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = edited(untied, lambda x: {**x, **more})
    is_theirs(folder)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("para_jax")]
    assert said == [f"{folder}: tensors that no decoder has are ignored: v_head.summary.weight"]


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight", "lm_head.bias", "model.norm.bias",
     "layers.0.mlp.up_proj.weight"],
)  # fmt: skip
def test_tensors_of_another_decoder_are_refused(untied: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """transformers ignores them; whoever made the file meant them to be used."""
    caplog.set_level(logging.WARNING)
    with pytest.raises(ParaJaxError) as error:
        Backbone.from_pretrained(edited(untied, lambda x: {**x, name: torch.ones(3)}))
    assert str(error.value).splitlines()[1:] == [f"  {name} is not expected"]


def test_what_was_renamed_is_written_under_the_table_names(tied: Path, tmp_path: Path) -> None:
    whole = load_file(tied / "model.safetensors")
    folder = edited(tied, without_prefix)
    save_backbone(Backbone.from_pretrained(folder), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == whole.keys() and all(torch.equal(written[name], x) for name, x in whole.items())
