"""Checkpoints in other forms than one safetensors file: several files, PyTorch's, in few bits, broken."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from para_jax import Backbone, BackboneConfig, ParaJaxError, merge_adapter
from para_jax.adapters.adapter import named_leaves
from para_jax.backbones.linear import dequantized
from para_jax.convert.checkpoint import save_backbone
from para_jax.families.table import FAMILIES
from para_jax.parameters import leaf, table
from para_jax.quantization import QUANTIZED, quantized
from para_jax.sharding import make_mesh
from tests.helpers import FAMILY_METHODS, families, family_backbone, family_fields, random_adapter, random_backbone

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 9), dtype=np.int32))


def same(a: Backbone, b: Backbone) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in leaves)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_backbone(random_backbone(tie_word_embeddings=False), tmp_path / "one")
    return tmp_path / "one"


@pytest.mark.parametrize("stacked", [False, True])
def test_files_of_a_size(folder: Path, tmp_path: Path, stacked: bool) -> None:
    backbone = Backbone.from_pretrained(folder, stacked=stacked)
    save_backbone(backbone, tmp_path / "many", shard_size=20_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    whole = load_file(folder / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for name, x in whole.items():
        assert torch.equal(load_file(tmp_path / "many" / index["weight_map"][name])[name], x)
    sizes = [(tmp_path / "many" / name).stat().st_size for name in files]
    assert all(
        size < 21_000 or len(load_file(tmp_path / "many" / name)) == 1 for size, name in zip(sizes, files, strict=True)
    )
    assert same(Backbone.from_pretrained(tmp_path / "many", stacked=stacked), backbone)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "many").eval()
    with torch.inference_mode():
        logits = theirs(torch.from_numpy(np.array(TOKENS))).logits.numpy()
    assert np.abs(np.asarray(backbone(TOKENS)) - logits).max() < 1e-4 * np.abs(logits).max()


def as_torch_files(folder: Path, to: Path, files: int, **options) -> Path:
    """The same checkpoint in PyTorch's .bin files."""
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = list(load_file(folder / "model.safetensors").items())
    if files == 1:
        torch.save(dict(tensors), to / "pytorch_model.bin", **options)
        return to
    place = {}
    for i in range(files):
        name = f"pytorch_model-{i + 1:05}-of-{files:05}.bin"
        torch.save(dict(tensors[i::files]), to / name, **options)
        place |= {key: name for key, _ in tensors[i::files]}
    (to / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": place}))
    return to


@pytest.mark.parametrize(("files", "options"), [(1, {}), (3, {}), (1, {"_use_new_zipfile_serialization": False})])
def test_torch_files(folder: Path, tmp_path: Path, files: int, options: dict) -> None:
    theirs = as_torch_files(folder, tmp_path / "torch", files, **options)
    assert same(Backbone.from_pretrained(theirs), Backbone.from_pretrained(folder))


def test_torch_files_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = {name: x.to(torch.bfloat16) for name, x in load_file(folder / "model.safetensors").items()}
    torch.save(tensors, tmp_path / "torch" / "pytorch_model.bin")
    save_file(tensors, folder / "model.safetensors")
    assert same(Backbone.from_pretrained(tmp_path / "torch"), Backbone.from_pretrained(folder))


def test_a_hub_id_without_safetensors(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its .bin files are fetched only then."""
    hub = as_torch_files(folder, tmp_path / "torch", 1)
    fetched = tmp_path / "cache"
    fetched.mkdir()

    def download(name: str, allow_patterns: list[str]) -> str:
        for path in hub.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                (fetched / path.name).write_bytes(path.read_bytes())
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert same(Backbone.from_pretrained("somebody/something"), Backbone.from_pretrained(folder))


class Code:
    """What a pickle runs when it is read."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_torch_files_that_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = as_torch_files(folder, tmp_path / "torch", 1)
    path = theirs / "pytorch_model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ParaJaxError, match=r"pytorch_model\.bin is damaged or holds more than tensors"):
        Backbone.from_pretrained(theirs)
    torch.save({"model.norm.weight": Code()}, path)
    with pytest.raises(ParaJaxError, match="holds more than tensors"):
        Backbone.from_pretrained(theirs)
    assert not (tmp_path / "executed").exists()
    torch.save({"model.norm.weight": torch.zeros(3, dtype=torch.int64), "a": 1}, path)
    with pytest.raises(ParaJaxError, match=r"model\.norm\.weight is torch\.int64; supported: bfloat16"):
        Backbone.from_pretrained(theirs)
    torch.save([torch.zeros(3)], path)
    with pytest.raises(ParaJaxError, match="holds more than tensors"):
        Backbone.from_pretrained(theirs)


def test_an_index_that_names_no_files(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": 5}}))
    with pytest.raises(ParaJaxError, match=r"lacks 5, which model\.safetensors\.index\.json names"):
        Backbone.from_pretrained(folder)


def test_an_index_of_a_file_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    theirs = as_torch_files(folder, tmp_path / "torch", 2)
    (theirs / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ParaJaxError, match=r"lacks pytorch_model-00002-of-00002\.bin, which .* names"):
        Backbone.from_pretrained(theirs)


def test_weights_that_are_no_numbers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    Backbone.from_pretrained(folder)
    with pytest.raises(ParaJaxError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has NaN or infinite values"):
        Backbone.from_pretrained(folder, check_finite=True)


def test_weights_that_float16_cannot_hold(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 4] = -65520.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    Backbone.from_pretrained(folder, dtype="float32")
    words = r": model\.layers\.1\.self_attn\.k_proj\.weight has weights beyond float16's range.*\(--dtype float32\)"
    with pytest.raises(ParaJaxError, match=words):
        Backbone.from_pretrained(folder, dtype="float16")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 4] = 65504.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert Backbone.from_pretrained(folder, dtype="float16").dtype == jnp.float16


@pytest.mark.parametrize("name", QUANTIZED)
def test_few_bits_are_the_nearest(name: str) -> None:
    bits = QUANTIZED[name]
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 5, 192)).astype(np.float32)
    weight[0, 0] = 0
    whole, scale = quantized(weight, bits)
    assert whole.dtype == bits.dtype and whole.shape == weight.shape
    assert scale.shape == (3, 5, 1 if bits.group is None else 2), "two groups of 96"
    again = np.asarray(dequantized(jnp.asarray(whole), jnp.asarray(scale), jnp.float32))
    step = np.repeat(scale, 192 // scale.shape[-1], axis=-1)
    assert np.all(np.abs(again - weight) <= 0.5001 * step)
    assert np.abs(whole.astype(np.int32)).max() == bits.most


@pytest.mark.parametrize("family", families(fast=("mixtral",)))
def test_quantised_is_near(family: str, tmp_path: Path) -> None:
    """Read in few bits it computes what the rounded weights compute, and not far from the whole ones."""
    backbone = family_backbone(family)
    save_backbone(backbone, tmp_path / "a")
    logits = np.asarray(backbone(TOKENS))
    errors, quantizable = [], {parameter.name for parameter in table(backbone.config, 0) if parameter.quantizable}
    for name, bits in QUANTIZED.items():
        few = [Backbone.from_pretrained(tmp_path / "a", stacked=stacked, quantize=name) for stacked in (False, True)]
        outputs = [np.asarray(b(TOKENS)) for b in few]
        assert np.abs(outputs[0] - outputs[1]).max() < 1e-4 * np.abs(logits).max()
        rounded = {
            key: jnp.asarray(dequantized(*map(jnp.asarray, quantized(np.asarray(x), bits)), jnp.float32))
            if key.rpartition(".")[2] in quantizable
            else x
            for key, x in named_leaves(backbone).items()
        }
        again = jax.tree.unflatten(jax.tree.structure(backbone), list(rounded.values()))
        assert np.abs(outputs[0] - np.asarray(again(TOKENS))).max() < 1e-4 * np.abs(logits).max()
        errors.append(np.sqrt(np.mean((outputs[0] - logits) ** 2) / np.mean(logits**2)))
    assert errors[0] < 0.15 and errors[0] < errors[1]


def test_quantised_backbones_take_adapters_and_are_not_written(folder: Path, tmp_path: Path) -> None:
    backbone = Backbone.from_pretrained(folder, quantize="int8")
    whole = Backbone.from_pretrained(folder)
    few = sum(x.nbytes for n, x in named_leaves(backbone).items() if n.startswith("blocks"))
    assert few < 0.45 * sum(x.nbytes for n, x in named_leaves(whole).items() if n.startswith("blocks"))
    adapter = random_adapter(FAMILY_METHODS["lora"], backbone.config, 0)
    for write in (lambda: save_backbone(backbone, tmp_path / "b"), lambda: merge_adapter(backbone, adapter)):
        with pytest.raises(ParaJaxError, match="quantized"):
            write()
    with pytest.raises(ParaJaxError, match=r"unknown dtype 'bf16'"):
        save_backbone(whole, tmp_path / "b", dtype="bf16")
    large = jax.tree.map(lambda x: x * 1e6, whole)
    with pytest.raises(ParaJaxError, match=r"has a weight beyond the range of float16"):
        save_backbone(large, tmp_path / "b", dtype="float16")
    assert not (tmp_path / "b").exists()
    with pytest.raises(ParaJaxError, match=r"unknown quantize 'int9'; did you mean 'int8'\?"):
        Backbone.from_pretrained(folder, quantize="int9")


@pytest.mark.parametrize("family", families(fast=("phi", "mixtral")))
@pytest.mark.parametrize("quantize", [None, *QUANTIZED])
def test_each_device_gets_its_part(family: str, quantize: str | None, tmp_path: Path) -> None:
    """Read by parts, a backbone is the one read whole, bit for bit; a part of the file is what a part needs."""
    save_backbone(family_backbone(family), tmp_path / "a")
    whole = Backbone.from_pretrained(tmp_path / "a", stacked=False, quantize=quantize)
    for stacked in (False, True):
        mesh = make_mesh("data=2,fsdp=2,tensor=2")
        split = Backbone.from_pretrained(tmp_path / "a", stacked=stacked, quantize=quantize, mesh=mesh)
        leaves = named_leaves(split)
        for name, x in named_leaves(whole).items():
            ours = leaves.get(name)
            if stacked and name.startswith("blocks."):
                _, layer, weight = name.split(".")
                array, index = leaf(whole.config, True, int(layer), weight)
                ours = leaves[array][index]
            assert ours.dtype == x.dtype and np.array_equal(ours, x), name
        # Four parts of what has two axes that are split.
        out = leaves[leaf(whole.config, stacked, 0, "out")[0]]
        assert {shard.data.size for shard in out.addressable_shards} == {out.size // 4}


def test_a_block_reads_its_part_only() -> None:
    """What lies outside of a block is not looked at: it may be no number, or not be there."""
    drawn = np.random.default_rng(0)
    for family in FAMILIES:
        for entry in table(BackboneConfig.from_hf(family_fields(family)), 1):
            parts = [drawn.normal(size=part.shape).astype(np.float32) for part in entry.parts]
            ours = entry.join(parts)
            merged = len(entry.shape) - len(entry.joined)
            for _ in range(5):
                ends = [sorted(drawn.choice(n + 1, 2, replace=False)) for n in entry.shape]
                place = tuple(
                    slice(0, n) if i < merged + bool(merged) else slice(*map(int, x))
                    for i, (n, x) in enumerate(zip(entry.shape, ends, strict=True))
                )
                outside = np.full(entry.shape, np.nan, np.float32)
                outside[place] = ours[place]
                out = np.empty(outside[place].shape, "bfloat16")
                entry.block([x.reshape(p.shape) for x, p in zip(entry.split(outside), entry.parts, strict=True)],
                            place, out)  # fmt: skip
                np.testing.assert_array_equal(out, ours[place].astype("bfloat16"), err_msg=f"{family} {entry.name}")
