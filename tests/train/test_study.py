"""The study recipe: equal budgets, honest splits, its report, and a run from files to tables."""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from para_jax import BackboneConfig, ParaConfig, ParaJaxError, tiny_backbone_path
from para_jax.adapters.fanlora import FanLoraConfig
from para_jax.convert.checkpoint import save_backbone
from para_jax.data.quickstart import quickstart_rows
from para_jax.evaluation.choices import choice_log_likelihoods
from para_jax.training.places import TenantLayout
from tests.compilations import compilations
from tests.helpers import random_backbone

sys.path.insert(0, str(Path(__file__).parents[2] / "train"))

import study
import study_data
import study_report
import study_systems
import study_tune

TINY = BackboneConfig.from_pretrained(tiny_backbone_path())


@pytest.mark.parametrize("r", [4, 12])
def test_budgets_are_equal_within_three_per_cent(r):
    """FanLoRA's at every choice of two modules a layer that is alike in all layers, and at one that is not."""
    budget = ParaConfig(r=r).size(TINY)

    def off(config):
        return abs(config.size(TINY) / budget - 1)

    assert off(study_systems.matched("lora", budget, TINY, target_modules="all-linear")) <= 0.03
    sites = list(TINY.sites)
    kept = [[[a, b]] * 4 for i, a in enumerate(sites) for b in sites[:i]] + [
        [[sites[i], sites[-1 - i]] for i in (0, 1, 2, 0)]
    ]
    for modules in kept:
        targets = FanLoraConfig.of(modules, TINY).target_modules
        config = study_systems.matched("fanlora", budget, TINY, target_modules=targets)
        assert off(config) <= 0.03
        scales = {module.scale for layer in config.modules(TINY) for module in layer.values()}
        assert scales == {2.0}, "a site with one rank more is not scaled less"
    if r == 12:
        assert off(study_systems.matched("ia3", budget, TINY, **study_systems.GROUP_IA3)) <= 0.03
        for options in study_systems.variants().values():
            assert off(study_systems.matched("para", budget, TINY, **options)) <= 0.03


def test_a_budget_that_no_size_comes_near_is_refused():
    with pytest.raises(ParaJaxError, match="comes no nearer to 100 parameters"):
        study_systems.matched("para", 100, TINY)


def test_variants_are_the_defaults_and_one_other_choice_each():
    found = study_systems.variants()
    assert found["default"] == {} and all(len(options) == 1 for name, options in found.items() if name != "default")
    assert found["pooling mean"] == {"pooling": "mean"} and found["sites q+v"]["target_modules"] == ("q_proj", "v_proj")
    assert len({ParaConfig(**options) for options in found.values()}) == len(found), "no configuration comes twice"


def write_rows(path: Path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two of quickstart's jobs as files: one of four labels with a dev file, one of texts without."""
    folder = tmp_path_factory.mktemp("data")
    train, held_out = quickstart_rows(train=60, held_out=30)
    write_rows(folder / "mood" / "train.jsonl", train["mood"] + held_out["mood"][:5])
    write_rows(folder / "mood" / "dev.jsonl", held_out["mood"][:15])
    write_rows(folder / "mood" / "test.jsonl", held_out["mood"][15:])
    write_rows(folder / "question" / "train.jsonl", train["question"])
    write_rows(folder / "question" / "test.jsonl", held_out["question"])
    return folder


def read(folder, tiny, **changed):
    sizes = {"dev_rows": 10, "test_rows": 12, "length": 64, "new_tokens": 8} | changed
    return study_data.read_task(folder, tiny[1], tiny[0], **sizes)


@pytest.mark.parametrize("name", ["mood", "question"])
def test_splits_are_disjoint_and_deterministic(data, tiny, name):
    task = read(data / name, tiny)
    prompts = [{e.prompt for e in split} for split in (task.train, task.dev, task.test)]
    assert [len(p) for p in prompts][1:] == [10, 12] and len(prompts[0]) >= 45
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    again = read(data / name, tiny)
    assert again.facts == task.facts
    for ours, theirs in zip([*again.train, *again.dev], [*task.train, *task.dev], strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist() and ours.targets.tolist() == theirs.targets.tolist()
        assert (ours.prompt, ours.response, ours.place) == (theirs.prompt, theirs.response, theirs.place)
    # Even the dev rows that were not drawn are not trained on.
    if name == "mood":
        rows = [json.loads(line)["prompt"] for line in (data / name / "dev.jsonl").read_text().splitlines()]
        assert not prompts[0] & set(rows)
        assert task.score == "choice_accuracy" and {len(e.choices) for e in task.test} == {4}
    else:
        assert task.score == "exact_match" and task.max_new_tokens <= 8


def test_long_rows_are_left_out_of_tuning_only(data, tiny):
    task = read(data / "mood", tiny, length=14)
    longest = [max(map(len, split)) for split in (task.train, task.dev, task.test)]
    assert max(longest[:2]) <= 14 < longest[2]
    with pytest.raises(ParaJaxError, match="mood has no train row of at most 3 tokens"):
        read(data / "mood", tiny, length=3)


def test_runs_are_kept_at_their_lowest_dev_loss_and_compared_on_the_same_rows(data, tiny, monkeypatch):
    """A run's recorded loss is that of its kept adapter on its own dev rows, alone; what its step holds depends on its
    task, its seed and the step only; and the seeds run the programs of the sweep.
    """
    tasks = {name: read(data / name, tiny, dev_rows=rows) for name, rows in (("mood", 5), ("question", 9))}
    backbone = random_backbone(stacked=True, vocab_size=TINY.vocab_size, num_hidden_layers=1)
    steps: list[list[list[str]]] = []
    batches = TenantLayout.batches

    def noted(self, step_tenants, rows, shapes):
        if rows.keys() == set(step_tenants[0]) and {len(own) for own in rows.values()} == {3}:
            steps.append([[e.prompt for e in rows[name]] for name in step_tenants[0]])
        return batches(self, step_tenants, rows, shapes)

    monkeypatch.setattr(TenantLayout, "batches", noted)

    def tune(rates, seeds):
        runs = [study_tune.Run(task, lr, seed) for task in tasks for lr, seed in zip(rates, seeds, strict=True)]
        options = {"steps": 6, "rows": 3, "every": 2, "show": lambda line: None}
        tuned = study_tune.tune(backbone, ParaConfig(r=2), runs, tasks, **options)
        assert [(run["task"], run["lr"], run["seed"]) for run in tuned.runs.values()] == runs
        return tuned

    tuned = tune((1e-2, 3.0), (0, 0))
    for name, run in tuned.runs.items():
        dev = tasks[run["task"]].dev
        prompts, answers = [e.prompt_ids for e in dev], [[e.response_ids] for e in dev]
        sums = choice_log_likelihoods(backbone, prompts, answers, bank=tuned.bank, tenants=[name] * len(dev))
        alone = -np.sum(sums) / sum(len(e.response_ids) for e in dev)
        np.testing.assert_allclose(run["dev_loss"], alone, rtol=1e-4)
        assert run["kept_step"] == min(run["dev_curve"], key=lambda point: point[1])[0]
    assert len({run["kept_step"] for run in tuned.runs.values()}) > 1, "each is kept at a step of its own"
    assert len(steps) == 6 and all(mood == again for mood, again, *_ in steps)

    steps.clear()
    with compilations() as compiled:
        tune((1e-3, 1e-3), (1, 2))
    assert not compiled and all(mood != other for mood, other, *_ in steps)


def results() -> dict:
    """A small study.json by hand."""

    def part(label, size, scores, lr=0.01):
        runs = [{"task": "mood", "lr": lr, "kept_step": 4, "scores": {"choice_accuracy": s}} for s in scores]
        system = {"label": label, "parameters": size, "budget": 3000, "grid": [0.001, 0.01]}
        return {"runs": runs, "system": system}

    return {
        "settings": {"seeds": 2, "steps": 4, "rows": 2, "dev_rows": 4, "every": 2, "test_rows": 8},
        "tasks": {"mood": {"score": "choice_accuracy", "majority": 0.3}},
        "parts": {
            "bare/mood": {"scores": {"mood": {"choice_accuracy": 0.25}}},
            "study/para/seeds/mood": part("para", 3000, [0.5, 0.7]),
            "study/ia3/seeds/mood": part("ia3", 200, [0.4, 0.4]),
            "ablation/default/seeds/mood": part("default", 3000, [0.5, 0.6]),
            "ablation/bias on/seeds/mood": part("bias on", 3010, [0.65, 0.65]),
            "speed/para": {"speed": {"para": {"training": {"median": 1234.5}, "decode": {"median": 99.6}}}},
        },
    }


def test_report(tmp_path):
    study_report.write_report(results(), tmp_path)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert "| para | 3,000 | 0.600 ± 0.141 | 1,234 | 100 |" in table
    assert "| ia3 | 200 | 0.400 ± 0.000 |  |  |" in table and "| bare | 0 | 0.250 |  |  |" in table
    assert "| para | 0.01* (4, 4) |" in table, "the best rate is at the end of the grid"
    ablation = (tmp_path / "ablation.md").read_text().splitlines()
    assert "| bias on | 3,010 | 0.650 ± 0.000 | +0.100 |" in ablation
    for name in ("scores.png", "ablation.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_from_files_to_tables_and_resumed(data, tmp_path, capsys):
    """Two tasks and two methods; a part that is cut out of the results comes back the same, and nothing else runs."""
    model = tmp_path / "model"
    shipped = Path(tiny_backbone_path())
    save_backbone(random_backbone(vocab_size=TINY.vocab_size, num_hidden_layers=1), model, dtype="float32")
    for file in shipped.glob("tokenizer*"):
        shutil.copy(file, model)
    out = tmp_path / "out"
    command = ["--data", str(data), "--model", str(model), "--out", str(out), "--tasks", "mood", "question"]
    command += ["--methods", "para", "fanlora", "--steps", "4", "--every", "2", "--rows", "2", "--dev-rows", "6"]
    command += ["--test-rows", "6", "--seeds", "2", "--mixture-steps", "2", "--max-new-tokens", "4", "--r", "16"]
    command += ["--lr", "para=1e-3,1e-2", "--lr", "lora=1e-2", "--lr", "fanlora=1e-2"]
    study.main(command)
    found = json.loads((out / "study.json").read_text())
    assert [key.split("/")[:3] for key in found["parts"]] == [
        ["bare", "mood+question"],
        ["fanlora", "mood+question"],
        ["study", "para", "sweep"],
        ["study", "para", "seeds"],
        ["study", "fanlora", "seeds"],
        ["speed", "para,fanlora"],
    ]
    rows = study_report.summary(found, "study")
    assert {len(task["scores"]) for row in rows.values() for task in row["tasks"].values()} == {2}
    assert abs(rows["fanlora"]["parameters"] / rows["para"]["parameters"] - 1) <= 0.03
    sweep = found["parts"]["study/para/sweep/mood+question"]["runs"]
    for task, chosen in rows["para"]["tasks"].items():
        losses = {run["lr"]: run["dev_loss"] for run in sweep if run["task"] == task}
        assert chosen["lr"] == min(losses, key=losses.get)
    for run in sweep:
        assert run["dev_loss"] == pytest.approx(min(loss for _, loss in run["dev_curve"]), abs=1e-5)
    assert all((out / name).exists() for name in ("table.md", "scores.png", "importance.png"))

    key = "study/para/seeds/mood+question"
    part = found["parts"].pop(key)
    (out / "study.json").write_text(json.dumps(found))
    capsys.readouterr()
    study.main(command)
    assert capsys.readouterr().out.count("[") == 1
    again = json.loads((out / "study.json").read_text())["parts"]
    assert again[key]["runs"] == part["runs"]
    with pytest.raises(ParaJaxError, match=r"made with steps=4; .*another --out"):
        study.main([*command, "--steps", "5"])


def test_ablation_runs_the_variants(data, tmp_path):
    args = argparse.Namespace(part="ablation", variants=None, r=[12], grids=study_systems.GRIDS)
    found = study.systems(study.Study(args, random_backbone(), None, None, {}, {}))
    assert [system.label for system in found] == list(study_systems.variants())
    assert {system.part for system in found} == {"ablation"}
