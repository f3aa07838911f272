"""The four steps on the command line, on the tiny backbone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from para_jax import Backbone, FanLoraConfig, LoraConfig, load_adapter, save_adapter, tiny_backbone_path
from para_jax.cli import main
from para_jax.data.examples import read_examples
from para_jax.importance.scores import importance_scores
from tests.helpers import random_adapter


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.from_pretrained(tiny_backbone_path(), dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> Path:
    """An adapter of every linear module, one of two, and held-out rows."""
    folder = tmp_path_factory.mktemp("fanlora")
    for name, targets in (("all", "all-linear"), ("two", ["q_proj", "v_proj"])):
        config = LoraConfig(r=2, lora_alpha=3, target_modules=targets)
        save_adapter(random_adapter(config, backbone.config, 1, scale=0.05), folder / name, backbone.config)
    rows = [{"prompt": f"The {word} is", "response": word} for word in ("house", "river", "horse")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(folder: Path, *arguments: str) -> int:
    paths = ["--adapter", str(folder / "all"), "--data", str(folder / "rows.jsonl"), "--dtype", "float32"]
    return main(["fanlora", *paths, *arguments])


def failure(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    assert run(folder, *arguments) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.slow
def test_from_an_adapter_to_a_tuned_task(
    folder: Path, backbone: Backbone, tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "setting"
    assert run(folder, "--keep", "2", "--r", "4", "--variants", "19", "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["fanlora.json", "importance.png", "scores.json"]
    record = json.loads((out / "scores.json").read_text())
    assert (record["score"], record["rows"], record["sites"]) == ("ablation", 3, list(backbone.config.sites))
    scores = np.array(record["scores"])

    config = FanLoraConfig.load(out / "fanlora.json")
    kept = config.kept(backbone.config)
    best = [{record["sites"][i] for i in np.argsort(-layer)[:2]} for layer in scores]
    assert [set(layer) for layer in kept] == best and [list(layer) for layer in kept] == record["kept"]
    assert (config.r, config.lora_alpha) == (4, 3)
    assert record["parameters"] == config.size(backbone.config)
    assert f"8 of 28 modules, {config.size(backbone.config):,} parameters at r=4" in said

    # The same scores as from the library.
    examples = read_examples(folder / "rows.jsonl", tiny[1], backbone.config.eos_token_ids)
    adapter = load_adapter(folder / "all", backbone.config)
    np.testing.assert_allclose(
        importance_scores("ablation", backbone, adapter, examples, variants=19), scores, atol=1e-5
    )

    task = ["--tenant", f"mail={folder / 'rows.jsonl'}", "--rows", "2", "--steps", "1", "--out", str(folder / "mail")]
    assert main(["finetune", "--method", str(out / "fanlora.json"), *task]) == 0
    tuned = load_adapter(folder / "mail" / "mail", backbone.config)
    assert tuned.config.modules(backbone.config) == config.modules(backbone.config)
    assert json.loads((folder / "mail" / "mail" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_budget_and_a_score_without_rows(folder: Path, backbone: Backbone) -> None:
    out = folder / "budget"
    arguments = ["--adapter", str(folder / "all"), "--score", "norm", "--budget", "9000", "--out", str(out)]
    assert main(["fanlora", *arguments]) == 0
    config = FanLoraConfig.load(out / "fanlora.json")
    largest = max(2 * (site.inputs + site.outputs) for site in backbone.config.sites.values())
    assert config.r == 2 and 9000 - largest < config.size(backbone.config) <= 9000
    assert main(["fanlora", *arguments, "--overwrite"]) == 0


def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken, new = str(folder), str(tmp_path / "new")
    assert "exists; choose another --out or pass --overwrite" in failure(capsys, folder, "--keep", "1", "--out", taken)
    assert "did you mean 'gradient'" in failure(capsys, folder, "--score", "grad", "--keep", "1", "--out", new)
    assert "--keep must be from 1 to 7" in failure(capsys, folder, "--keep", "9", "--out", new)
    two = ["--adapter", str(folder / "two")]
    assert "no k_proj, o_proj" in failure(capsys, folder, *two, "--keep", "1", "--out", new)
    alone = ["fanlora", "--adapter", str(folder / "all"), "--keep", "1", "--out", new]
    assert main(alone) == 1
    assert "give --data SOURCE" in capsys.readouterr().err
    # A folder that holds something else is not replaced.
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("years of work")
    assert "holds no fanlora.json" in failure(capsys, folder, "--keep", "1", "--out", str(full), "--overwrite")
    assert f"holds --adapter {folder / 'all'}, which it would replace" in failure(
        capsys, folder, "--keep", "1", "--out", taken, "--overwrite"
    )
    useless = "--data has no effect with --score norm, which is computed without rows"
    assert useless in failure(capsys, folder, "--score", "norm", "--keep", "1", "--out", new)
    assert not Path(new).exists()
    for neither_nor_both in ([], ["--keep", "1", "--budget", "10000"]):
        assert "--budget" in failure(capsys, folder, *neither_nor_both, "--out", new)
