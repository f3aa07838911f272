"""The table of costs: its figures against the arrays that adapters and requests really are."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import AdapterBank, Backbone, BackboneConfig
from para_jax.backbones.cost import adapter_cost, step_bytes
from para_jax.cli import main
from para_jax.cli.methods import usual
from tests.helpers import METHODS, SMALL, family_fields, random_adapter, random_backbone

LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
EVERY = {**usual(SMALL), **METHODS}


@pytest.mark.parametrize("name", EVERY)
def test_parameters_and_bytes_stored_are_those_of_a_real_adapter(name: str) -> None:
    """Without the zeros to which layers of other ranks are padded."""
    tensors = random_adapter(EVERY[name], SMALL, 0).tensors().values()
    assert {x.dtype for x in tensors} == {jnp.dtype("float32")}
    made = adapter_cost(EVERY[name], SMALL)
    assert made.parameters == sum(np.count_nonzero(x) for x in tensors)
    assert made.stored == sum(np.count_nonzero(x) * x.dtype.itemsize for x in tensors)
    if name.startswith("lora") or not hasattr(EVERY[name], "lora_alpha"):
        assert made.stored == sum(x.nbytes for x in tensors), "nothing is padded where all layers are alike"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("para r=12", "bfloat16"),
        ("response", "float32"),
        ("ia3 k, v, down (PEFT's)", "bfloat16"),
        ("fanlora r=8, 2 modules a layer", "bfloat16"),
        ("patterned", "float32"),
        ("bias q, up", "bfloat16"),
    ],
)
def test_bytes_in_flight_are_those_of_a_real_state(name: str, dtype: str) -> None:
    backbone = jax.tree.map(lambda x: x.astype(dtype), random_backbone())
    bank = AdapterBank.stack({"acme": random_adapter(EVERY[name], SMALL, 0)}, SMALL)
    tokens, mask = jnp.ones((3, 4), jnp.int32), jnp.ones((3, 4), bool)
    prefill = jax.jit(Backbone.prefill, static_argnames="length")
    _, state = prefill(backbone, tokens, mask, rows=bank.rows(["acme"] * 3), length=5)
    held = sum(x.nbytes for x in jax.tree.leaves(state.adjustments))
    assert held == 3 * adapter_cost(EVERY[name], SMALL, dtype).in_flight


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_the_backbone(tied: bool) -> None:
    """All weights but the embeddings of tokens that no row has."""
    backbone = random_backbone(tie_word_embeddings=tied)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(backbone))
    unread = 0 if tied else 4 * SMALL.hidden_size * (SMALL.vocab_size - 3)
    config = dataclasses.replace(SMALL, tie_word_embeddings=tied)
    assert step_bytes(config, rows=3, dtype="float32") == nbytes - unread
    assert step_bytes(config, rows=3, dtype="bfloat16") == (nbytes - unread) // 2


@pytest.mark.slow
def test_llama_2_7b(tmp_path, capsys) -> None:
    """The paper's 8.9M parameters, and 1.2 MB for each request in flight; from config.json, with no weights."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA_7B))
    out = tmp_path / "costs.json"
    for model in (tmp_path / "model", tmp_path / "model" / "config.json"):
        arguments = ["methods", "--model", str(model), "--rows", "32", "--json", str(out), "--overwrite"]
        assert main(arguments) == 0
    written = json.loads(out.read_text())
    para = written["methods"]["para r=12"]
    assert para["parameters"] == 8_945_664 and para["bytes_stored_a_tenant"] == 4 * 8_945_664
    assert para["bytes_in_flight_a_request"] == 2 * 32 * (4096 + 4096 + 11008) == 1_228_800
    assert para["bytes_read_a_step"] == 32 * 1_228_800
    assert written["backbone"]["parameters"] == BackboneConfig.from_hf(LLAMA_7B).size == 6_738_415_616
    # q and v: 32 layers of two pairs of 4096 to 4096.
    lora = written["methods"]["lora r=16, q and v"]
    assert lora["parameters"] == 32 * 2 * 16 * 8192 and lora["bytes_in_flight_a_request"] == 2 * lora["parameters"]
    printed = capsys.readouterr().out
    assert "8,945,664" in printed and "1.23 MB" in printed and "read by 32 rows" in printed


def test_the_tiny_backbone_is_the_default(capsys) -> None:
    assert main(["methods", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    for name in ("para", "ia3", "bias", "fanlora", "lora r=8", "lora r=64"):
        assert f"\n{name}" in printed


def test_mistakes(tmp_path, capsys) -> None:
    there = tmp_path / "there.json"
    there.write_text("{}")
    for arguments, message in (
        (["--json", str(there)], "exists; choose another --json or pass --overwrite"),
        (["--rows", "0"], "--rows must be a whole number from 1 to 2147483647, not '0'"),
        (["--model", str(there)], "architecture None, which is not supported"),
        (["--model", str(tmp_path)], "is not a checkpoint: it has no config.json"),
    ):
        assert main(["methods", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_a_model_with_experts(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its low-rank pairs are of the attention projections, and PEFT's (IA)3, which scales an input, is not offered."""
    (tmp_path / "config.json").write_text(json.dumps(family_fields("mixtral")))
    assert main(["methods", "--model", str(tmp_path / "config.json")]) == 0
    shown = capsys.readouterr().out
    assert "ia3 q, k, up" in shown and "PEFT's" not in shown
    assert "bias, all linear" in shown and "bias q, up" not in shown
    shape = BackboneConfig.from_hf(family_fields("mixtral"))
    assert usual(shape)["lora r=8, all linear"].size(shape) == 2 * 8 * (32 + 32 + 32 + 16 + 32 + 16 + 32 + 32)
