"""The fine-tuning recipe from rows to scores, and every config that it can run."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

from para_jax import BackboneConfig, LoraConfig, ParaJaxError, tiny_backbone_path
from para_jax.data.templates import shipped
from para_jax.sharding import AXES, auto_mesh, check_mesh, parse_mesh
from para_jax.training.places import TenantLayout
from para_jax.training.shapes import Device

sys.path.insert(0, str(Path(__file__).parents[2] / "train"))

import configs

RECIPE = str(Path(__file__).parents[2] / "train" / "finetune.py")
# What the config.json files of the models say.
SHAPES = {
    "meta-llama/Llama-3.2-1B": BackboneConfig(128256, 2048, 8192, 16, 32, 8, 64, max_position_embeddings=131072),
    "meta-llama/Llama-2-7b-hf": BackboneConfig(32000, 4096, 11008, 32, 32, 32, 128, max_position_embeddings=4096),
    "meta-llama/Meta-Llama-3-70B": BackboneConfig(128256, 8192, 28672, 80, 64, 8, 128, max_position_embeddings=8192),
    tiny_backbone_path(): BackboneConfig.from_pretrained(tiny_backbone_path()),
}


@pytest.mark.parametrize("name", configs.names())
def test_a_config_fits_its_model_and_its_devices(name):
    recipe = configs.load(name)
    shape = SHAPES[recipe.model]
    recipe.check(shape)
    chips = recipe.topology.partition(":")[2].removeprefix("h100") if recipe.topology else "1"
    devices = math.prod(map(int, re.findall(r"\d+", chips)))
    sizes = parse_mesh(recipe.mesh) if recipe.mesh else auto_mesh(shape, devices)
    assert math.prod(sizes.values()) == devices
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)
    check_mesh(shape, mesh)
    layout = TenantLayout.of(mesh, len(recipe.tenants), recipe.rows)
    # A micro-batch is no larger than a step whose rows are all full, of which a device has its groups' share.
    full = len(recipe.tenants) * recipe.rows * recipe.max_length // layout.groups
    assert recipe.max_length <= Device.of(shape, recipe.micro_batch_tokens, "tpu").tokens <= max(full, 8192)
    for tenant in recipe.tenants.values():
        sources = (tenant.train, tenant.dev, tenant.test)
        assert len({str(source) for source in sources}) == 3, (
            "rows to learn, to choose and to score by are not the same"
        )
        for source in sources:
            assert not isinstance(source, str) or source.split(":")[1] in shipped(), "a template makes its prompts"


@pytest.mark.parametrize("name", configs.names())
def test_a_config_says_how_it_runs_and_what_comes_out(name):
    about = import_module(f"configs.{name}").__doc__
    assert f"python train/finetune.py {name} --" in about
    assert ("Time: " in about and "Score" in about) or "Time and score: not measured." in about


def test_what_does_not_fit_is_refused():
    recipe = configs.load("tiny_cpu")
    with pytest.raises(ParaJaxError, match="did you mean 'tiny_cpu'"):
        configs.load("tiny_cpus")
    with pytest.raises(ParaJaxError, match="max_length=4096 is more than the 512 tokens"):
        replace(recipe, max_length=4096).check(SHAPES[recipe.model])
    wrong = replace(recipe.tenants["mood"], method=LoraConfig(target_modules=("q_porj",)))
    with pytest.raises(ParaJaxError, match="did you mean 'q_proj'"):
        replace(recipe, tenants={"mood": wrong}).check(SHAPES[recipe.model])


@pytest.mark.slow
def test_the_tiny_config_from_rows_to_scores(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, RECIPE, "tiny_cpu", "--out", str(out), "--steps", "3"]
    done = subprocess.run([*command, "--test-rows", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = json.loads((out / "scores.json").read_text())
    assert set(scores) == {"mood", "place", "question"} and all(of["rows"] == 4 for of in scores.values())
    kinds = [json.loads((out / name / "adapter_config.json").read_text())["peft_type"] for name in scores]
    assert kinds == ["PARA", "PARA", "LORA"]
    tenants = json.loads((out / "report.json").read_text())["tenants"]
    assert all(of["state"] == "done" and of["steps"] == 3 and of["best_dev_step"] == 3 for of in tenants.values())
    assert "from the bare backbone" in done.stdout

    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "pass --resume" in again.stderr and "Traceback" not in again.stderr
    unknown = subprocess.run([sys.executable, RECIPE, "tiny", "--out", str(out)], capture_output=True, text=True)
    assert unknown.returncode == 2 and "did you mean 'tiny_cpu'" in unknown.stderr
