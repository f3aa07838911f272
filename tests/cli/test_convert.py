"""`para-jax convert`, as a user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from para_jax import LoraConfig, ParaConfig, load_adapter, merge_adapter, save_adapter, tiny_backbone_path
from para_jax.cli import main
from tests.helpers import random_adapter


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return {name: x for path in Path(folder).glob("*.safetensors") for name, x in load_file(path).items()}


def test_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is lost: every tensor bit for bit, the tokenizer, the chat template, the stop tokens."""
    out = tmp_path / "out"
    assert main(["convert", "--out", str(out), "--shard-size", "1MB"]) == 0
    assert "4,000,000 parameters, family llama" in capsys.readouterr().out
    before, after = tensors(tiny_backbone_path()), tensors(out)
    assert before.keys() == after.keys()
    assert all(x.dtype == after[name].dtype and torch.equal(x, after[name]) for name, x in before.items())
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (out, tiny_backbone_path()))
    assert ours.chat_template == theirs.chat_template and ours("A captain").input_ids == theirs("A captain").input_ids
    configs = [json.loads(Path(folder, "config.json").read_text()) for folder in (out, tiny_backbone_path())]
    assert configs[0] == configs[1]


def test_templates_of_other_names(tmp_path: Path) -> None:
    """Those that transformers keeps in a folder of their own."""
    shutil.copytree(tiny_backbone_path(), tmp_path / "in")
    (tmp_path / "in" / "additional_chat_templates").mkdir()
    (tmp_path / "in" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert main(["convert", "--model", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name).chat_template for name in ("in", "out"))
    assert after == before and after["tool_use"] == "{{ tools }}"


def test_merged_and_cast(tiny, tmp_path: Path) -> None:
    backbone, _ = tiny
    adapter = random_adapter(LoraConfig(r=2, target_modules="all-linear"), backbone.config, 0, scale=0.1)
    save_adapter(adapter, tmp_path / "acme", backbone.config)
    out = tmp_path / "out"
    assert main(["convert", "--adapter", str(tmp_path / "acme"), "--dtype", "float32", "--out", str(out)]) == 0
    tokens = np.arange(3, 15)[None]
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(out).eval()(torch.from_numpy(tokens)).logits.numpy()
    merged = merge_adapter(backbone, load_adapter(tmp_path / "acme", backbone.config))
    assert np.abs(np.asarray(merged(tokens.astype(np.int32))) - theirs).max() < 1e-4 * np.abs(theirs).max()
    assert np.abs(np.asarray(backbone(tokens.astype(np.int32))) - theirs).max() > 0.1

    assert main(["convert", "--dtype", "float16", "--out", str(tmp_path / "half")]) == 0
    assert {x.dtype for x in tensors(tmp_path / "half").values()} == {torch.float16}


def test_what_is_refused(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(words: str, *arguments: str) -> None:
        assert main(["convert", *arguments]) == 1
        assert words in capsys.readouterr().err

    (tmp_path / "there").mkdir()
    says("exists; choose another --out or pass --overwrite", "--out", str(tmp_path / "there"))
    says("holds no config.json", "--out", str(tmp_path / "there"), "--overwrite")
    says("give --out DIR, or --check alone")
    says("takes a size such as 5GB", "--out", str(tmp_path / "a"), "--shard-size", "much")
    save_adapter(random_adapter(ParaConfig(r=2), tiny[0].config, 0), tmp_path / "para", tiny[0].config)
    says("cannot be merged", "--adapter", str(tmp_path / "para"), "--out", str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()
    assert main(["convert", "--check"]) == 0
