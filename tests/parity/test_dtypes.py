"""Parity with transformers where dtypes differ: bfloat16 checkpoints read in either, float32 ones cast."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from para_jax import Backbone
from para_jax.convert.checkpoint import save_backbone
from tests.parity.models import TIME, Case, Worst, check_forward, make_model


@pytest.fixture(scope="module")
def bf16_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    fields = {
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": rope,
        "initializer_range": 0.2,
    }
    model = make_model(Case(fields, seed=0), "llama")
    folder = tmp_path_factory.mktemp("bf16") / "theirs"
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stacked", [False, True])
def test_bf16_checkpoint_in_float32(bf16_folder: Path, stacked: bool) -> None:
    """Cast on load, it computes what transformers computes in float32 with the same weights."""
    model = LlamaForCausalLM.from_pretrained(bf16_folder, dtype=torch.float32).eval()
    backbone = Backbone.from_pretrained(bf16_folder, dtype="float32", stacked=stacked)
    assert {x.dtype for x in jax.tree.leaves(backbone)} == {jnp.dtype("float32")}
    errors: Worst = {}
    check_forward(errors, model, backbone, np.random.default_rng(0))


@pytest.mark.parametrize("stacked", [False, True])
def test_bf16_checkpoint_in_bf16(bf16_folder: Path, tmp_path: Path, stacked: bool) -> None:
    """Its bits survive, and rounding costs no more than it costs transformers."""
    backbone = Backbone.from_pretrained(bf16_folder, dtype="bfloat16", stacked=stacked)
    assert {x.dtype for x in jax.tree.leaves(backbone)} == {jnp.dtype("bfloat16")}
    save_backbone(backbone, tmp_path / "ours")
    before, after = load_file(bf16_folder / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], x) for name, x in before.items())

    tokens = np.random.default_rng(0).integers(0, 50, (4, TIME), dtype=np.int32)
    exact, rounded = (LlamaForCausalLM.from_pretrained(bf16_folder, dtype=d) for d in (torch.float32, torch.bfloat16))
    with torch.inference_mode():
        reference = exact(torch.tensor(tokens)).logits.numpy()
        theirs = rounded(torch.tensor(tokens)).logits.float().numpy()
    ours = backbone(jnp.asarray(tokens))
    assert ours.dtype == jnp.float32
    assert np.sqrt(np.mean((np.asarray(ours) - reference) ** 2)) < 1.1 * np.sqrt(np.mean((theirs - reference) ** 2))


def test_float32_checkpoint_cast_to_bf16_as_torch_casts(tmp_path: Path) -> None:
    """Rounded to the nearest, ties to even."""
    case = Case({"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1,
                 "num_attention_heads": 4, "initializer_range": 0.2}, seed=1)  # fmt: skip
    model = make_model(case, "llama")
    model.save_pretrained(tmp_path / "theirs")
    save_backbone(Backbone.from_pretrained(tmp_path / "theirs", dtype="bfloat16"), tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(written[name], x.to(torch.bfloat16)) for name, x in model.state_dict().items())
