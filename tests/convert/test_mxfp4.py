"""MXFP4 checkpoints of GPT-OSS: read as transformers widens them, and written in floating point."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from para_jax import Backbone, BackboneConfig, ParaJaxError
from para_jax.adapters.adapter import named_leaves
from para_jax.cli import main
from para_jax.convert.checkpoint import save_backbone
from para_jax.convert.mxfp4 import BLOCKS, SCALES, widened
from para_jax.sharding import make_mesh
from tests.helpers import OF_SWIGLU, drawn, family_fields
from tests.parity.models import plain

FIELDS = {**family_fields("gpt_oss"), "hidden_size": 64, "intermediate_size": 32}
QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in MXFP4, and the same in bfloat16."""
    at = tmp_path_factory.mktemp("gpt_oss")
    folders = {name: at / name for name in ("bfloat16", "mxfp4")}
    save_backbone(drawn(BackboneConfig.from_hf(FIELDS), 0, True, 0.2), folders["bfloat16"], dtype="bfloat16")
    tensors, packed = load_file(folders["bfloat16"] / "model.safetensors"), {}
    rng = np.random.default_rng(0)
    for name, x in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = x.shape
            blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
            scales = rng.integers(122, 127, blocks.shape[:-1], np.uint8)
            as_torch = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
            tensors[name] = as_torch.view(torch.int16).numpy().view(x.dtype)
            packed |= {f"{name}{BLOCKS}": blocks, f"{name}{SCALES}": scales}
        else:
            packed[name] = x
    folders["mxfp4"].mkdir()
    for name, of in (("bfloat16", tensors), ("mxfp4", packed)):
        save_file(of, folders[name] / "model.safetensors", {"format": "pt"})
    fields = json.loads((folders["bfloat16"] / "config.json").read_text())
    (folders["mxfp4"] / "config.json").write_text(json.dumps({**fields, "quantization_config": QUANTIZATION}))
    return folders


def test_every_byte_and_scale() -> None:
    """Bit for bit, zeros and values beyond bfloat16's range included; the scale 255 is NaN in the format."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (256, 16, 16))
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 16))
    theirs = convert_moe_packed_tensors(torch.tensor(blocks)[None], torch.tensor(scales)[None])[0].T
    ours, bits = widened(blocks, scales), theirs.contiguous().view(torch.int16).numpy()
    assert np.array_equal(ours.view(np.int16)[:255], bits[:255])
    assert not np.isfinite(ours[255].astype(np.float32)).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{"stacked": False}, {"quantize": "int8"}, {"mesh": "fsdp=4,tensor=2"}])
def test_read_as_the_widened_folder(folders: dict[str, Path], dtype: str, options: dict) -> None:
    options = {**options, "mesh": make_mesh(options["mesh"])} if "mesh" in options else options
    ours, theirs = (
        named_leaves(Backbone.from_pretrained(folders[name], dtype=dtype, **options)) for name in ("mxfp4", "bfloat16")
    )
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert ours[name].dtype == x.dtype and ours[name].sharding == x.sharding
        assert np.array_equal(np.asarray(ours[name]), np.asarray(x)), name


def test_written_in_floating_point(folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers opens what is written, and computes what it computes from MXFP4."""
    assert main(["convert", "--model", str(folders["mxfp4"]), "--out", str(tmp_path / "a")]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "a" / "config.json").read_text())
    written, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "a", folders["bfloat16"]))
    assert written.keys() == expected.keys()
    for name, x in expected.items():
        assert np.array_equal(written[name].view(np.int16), x.view(np.int16)), name
    tokens = np.random.default_rng(1).integers(0, 62, (2, 9))
    logits = []
    # transformers before 5.19 mixes dtypes in the weights that it dequantizes itself.
    for folder in (tmp_path / "a", *([folders["mxfp4"]] if OF_SWIGLU else [])):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **plain("gpt_oss")).eval()
        with torch.inference_mode():
            logits.append(model(torch.tensor(tokens)).logits.numpy())
    assert all(np.array_equal(x, logits[0]) for x in logits)
    ours = np.asarray(Backbone.from_pretrained(folders["mxfp4"], dtype="float32")(jnp.asarray(tokens)))
    assert np.abs(ours - logits[0]).max() < 1e-5 * np.abs(logits[0]).max()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}},
         "config.json has a quantization_config of quant_method 'bitsandbytes'; only float32, float16, bfloat16 and "
         "mxfp4 are read"),
        ({"model_type": "llama", "quantization_config": QUANTIZATION},
         "config.json has a quantization_config of quant_method 'mxfp4'; only float32, float16 and bfloat16 are read"),
    ],
)  # fmt: skip
def test_other_formats_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ParaJaxError, match=message):
        BackboneConfig.from_hf({**family_fields(fields.get("model_type", "gpt_oss")), **fields})


def test_parts_that_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(folders["mxfp4"] / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[f"{name}{SCALES}"] = tensors[f"{name}{SCALES}"][:, :1]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders["mxfp4"] / "config.json").read_text())
    with pytest.raises(ParaJaxError, match=rf"{name} in MXFP4 takes .* \[4, 64, 1, 16\] and \[4, 1, 1\]"):
        Backbone.from_pretrained(tmp_path)


def test_one_tensor_at_a_time(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor in MXFP4 is widened once."""
    counted: list[int] = []
    monkeypatch.setattr("para_jax.convert.tensors.widened", lambda *x: (counted.append(1), widened(*x))[1])
    jax.block_until_ready(Backbone.from_pretrained(folders["mxfp4"], stacked=False))
    config = BackboneConfig.from_hf(FIELDS)
    assert config.experts is not None
    assert len(counted) == 2 * config.experts.count * config.num_hidden_layers
