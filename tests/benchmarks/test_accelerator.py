"""`benchmarks/accelerator.py`: stages that end well, fail, hang or find no time left, and a small run of all."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import accelerator
import accelerator_report
import accelerator_stages
import accelerator_train
from accelerator_stages import Context, Skip, Stage

SAY = "import json, sys; say = lambda line: print(json.dumps(line), file=open(sys.argv[1], 'a'));"
# By the name of a stage, what its process does.
CODE = {
    "decode": "say({'device': {'name': 'Card 80GB', 'kind': 'gpu'}}); say({'name': 'a', 'figures': {'step_ms': 2.0}})",
    "device_rates": "rate = dict.fromkeys(('median', 'min', 'max'), 3.0);"
    "say({'name': 'copy', 'figures': {'tb_per_s_read_plus_written': rate}});"
    "print('one'); print('two'); sys.exit(3)",
    "train": "import subprocess, time; say({'name': 'b', 'figures': {'tokens_per_s': 5.0}});"
    "child = subprocess.Popen(['sleep', '60']); say({'name': 'pid', 'figures': {'pid': child.pid}}); time.sleep(60)",
    "train_peft": "say({'skipped': 'torch is not installed'})",
    "attention_kernels": "print(sys.argv[2]); open(sys.argv[1], 'a').write('{\"name\": \"to'); sys.exit(1)",
    "quickstart": "",
}


def run(stages, path, seconds=60.0):
    """The report, what was shown, and the reports as they were on disk after each stage."""
    report = {"quick": False, "device": None, "stages": {}, "environment": {"libraries": {}, "date": "", "commit": ""}}
    shown, written = [], []

    def command(stage, lines, limit, known):
        return [sys.executable, "-c", SAY + CODE[stage.name], str(lines), json.dumps(known)]

    def write(report):
        accelerator.common.write_json(path, "accelerator", report, quiet=True)
        written.append(json.loads(path.read_text()))

    accelerator.run_stages(stages, report, time.monotonic() + seconds, command, write, shown.append)
    return report, shown, written


def stage(name, seconds=30.0, least=0.0):
    return Stage(name, "", seconds, least, f"title of {name}")


def test_a_stage_that_fails_or_hangs_leaves_its_figures_and_the_next_one_goes_on(tmp_path, capsys):
    stages = (stage("decode"), stage("device_rates"), stage("train", seconds=2.0), stage("train_peft"))
    stages += (stage("attention_kernels"), stage("quickstart", least=100.0))
    report, shown, written = run(stages, tmp_path / "report.json")
    found = report["stages"]
    assert [found[s.name]["status"] for s in stages] == ["done", "failed", "timed_out", "skipped", "failed", "skipped"]
    assert report["device"] == {"name": "Card 80GB", "kind": "gpu"}
    assert found["decode"]["results"] == {"a": {"step_ms": 2.0}}
    assert found["device_rates"]["results"] and found["device_rates"]["error"] == ["one", "two"]
    assert found["train"]["results"]["b"] == {"tokens_per_s": 5.0} and 2 <= found["train"]["seconds"] < 20
    assert found["train_peft"]["why"] == "torch is not installed"
    # A torn line is left out; later stages know what earlier ones found.
    assert found["attention_kernels"]["results"] == {}
    assert json.loads(found["attention_kernels"]["error"][-1]) == {"device_kind": "gpu", "copy_bytes_per_s": 3e12}
    assert "it wants 100" in found["quickstart"]["why"] and "results" not in found["quickstart"]
    # The file is whole after every stage.
    assert [list(was["stages"]) for was in written] == [[s.name for s in stages[: i + 1]] for i in range(len(stages))]
    assert shown[0].startswith("decode") and "a 2.00 step ms" in shown[0] and "FAILED; exit code 3" in shown[1]
    assert all("s left" in said for said in shown) and len(shown) == len(stages)
    accelerator_report.print_report(report, stages)
    table = capsys.readouterr().out
    assert "Card 80GB" in table and "title of train\n" in table and "timed out: the limit of 2 s" in table


def test_what_a_hanging_stage_started_ends_with_it(tmp_path):
    report, *_ = run([stage("train", seconds=2.0)], tmp_path / "report.json")
    pid = report["stages"]["train"]["results"]["pid"]["pid"]
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"{pid} goes on")


def test_a_figure_that_fails_does_not_end_its_stage(tmp_path, monkeypatch):
    def broken():
        raise ValueError("first\nsecond")

    def measure(context):
        context.attempt("bad", broken)
        context.attempt("good", lambda: {"step_ms": 1.0})

    def nothing(context):
        raise Skip("not here")

    module = type(sys)("accelerator_of_a_test")
    module.measure, module.nothing, module.bad = measure, nothing, lambda context: context.attempt("bad", broken)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    codes, lines = [], []
    for name in ("measure", "nothing", "bad"):
        context = Context(tmp_path / name, quick=True, seconds=1.0)
        codes.append(accelerator_stages.run_stage(Stage("x", f"{module.__name__}:{name}", 1, 1, ""), context))
        lines.append(accelerator.reported(tmp_path / name))
    failed = {"name": "bad", "figures": {"error": ["ValueError: first", "second"]}}
    assert codes == [0, 0, 1]
    assert lines == [[failed, {"name": "good", "figures": {"step_ms": 1.0}}], [{"skipped": "not here"}], [failed]]


def test_what_does_not_fit_gets_fewer_layers():
    assert accelerator_train.fewer_layers(32, 0.5) == 15
    assert accelerator_train.fewer_layers(32, 1.2) == 31
    assert accelerator_train.fewer_layers(2, 0.01) == 1


def test_every_stage_has_a_function_and_columns():
    for one in accelerator_stages.STAGES:
        module, _, function = one.function.partition(":")
        assert f"def {function}(context: Context)" in (accelerator.common.HERE / f"{module}.py").read_text()
        assert one.name in accelerator_report.COLUMNS and one.least < one.seconds
        assert one.name in accelerator.__doc__


@pytest.mark.slow
def test_a_quick_run_of_all_stages(tmp_path):
    command = [sys.executable, str(accelerator.common.HERE / "accelerator.py"), "--quick", "--minutes", "15"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("accelerator-*.json")
    report = json.loads(path.read_text())
    assert path.name == "accelerator-cpu.json" and report["device"]["kind"] == "cpu" and report["seconds"] > 0
    assert {"jax", "jaxlib", "flax"} <= set(report["environment"]["libraries"])
    assert list(report["stages"]) == [one.name for one in accelerator_stages.STAGES]
    for name, found in report["stages"].items():
        assert found["status"] == "done", f"{name}: {found}"
        for key, figures in found["results"].items():
            assert "error" not in figures, f"{name}, {key}: {figures}"
    kernels = report["stages"]["attention_kernels"]["results"]
    assert len(kernels) == 6 and all(figures["equal_within_2_percent"] for figures in kernels.values())
    assert all("share_of_weight_floor" in figures for figures in report["stages"]["decode"]["results"].values())
