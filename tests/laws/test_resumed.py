"""Law 7: a run that is killed and resumed ends where an uninterrupted one ends, bit for bit, data order included."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from para_jax import tiny_backbone_path

STEPS, EVERY = 45, 7


def command(tmp_path, out, *more):
    tenants = []
    for name, rows in (("acme", 7), ("globex", 30)):
        path = tmp_path / f"{name}.jsonl"
        words = ["river", "house", "garden", "letter", "horse", "window", "sister", "evening"]
        path.write_text(
            "".join(
                json.dumps({"prompt": f"{name} {words[i % 8]} {i}:", "response": words[(i * 3) % 8]}) + "\n"
                for i in range(rows)
            )
        )
        tenants += ["--tenant", f"{name}={path}"]
    return [
        sys.executable, "-m", "para_jax", "finetune", "--model", tiny_backbone_path(), *tenants, "--out", str(out),
        "--rows", "2", "--steps", str(STEPS), "--steps", "acme=40", "--lr", "5e-3", "--checkpoint-every", str(EVERY),
        *more,
    ]  # fmt: skip


def results(out):
    """All but what tells of time and memory, and pictures."""
    files = [p for p in out.rglob("*") if p.is_file() and "checkpoints" not in p.parts and p.suffix != ".png"]
    return {str(p.relative_to(out)): p.read_bytes() for p in files if p.stem != "report"}


def kill_at(arguments, out, step, how, seed=0):
    """Runs until the metrics hold `step` lines, then sends the signal. Returns the exit code."""
    # It reads programs and writes none: half of one would be somebody else's.
    own = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own)
    metrics = out / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < step):
        time.sleep(0.002)
    # Somewhere in a step, or in a save.
    time.sleep(random.Random(seed).random() * 0.1)
    process.send_signal(how)
    process.communicate()
    return process.returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(command(folder, folder / "out"), check=True, capture_output=True)
    return folder / "out"


@pytest.fixture(scope="module")
def uninterrupted(whole):
    return results(whole)


def test_killed_at_several_moments(tmp_path, uninterrupted, request):
    """`--kills 25` kills so often, and `--kills-json FILE` writes down when."""
    out, kills = tmp_path / "out", request.config.getoption("kills")
    # In order, because a run begins again where its last checkpoint was.
    moments = sorted(random.Random(kills).choices(range(1, STEPS - 2), k=kills))
    found = []
    for number, step in enumerate(moments):
        code = kill_at(command(tmp_path, out, "--resume"), out, step, signal.SIGKILL, seed=number)
        assert code == -signal.SIGKILL
        saved = [int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit()]
        found.append({"killed_after": (out / "metrics.jsonl").read_text().count("\n"), "saved": max(saved, default=0)})
    done = subprocess.run(command(tmp_path, out, "--resume"), check=True, capture_output=True, text=True)
    assert "resuming after step" in done.stdout
    assert results(out) == uninterrupted
    if path := request.config.getoption("kills_json"):
        record = {"steps": STEPS, "checkpoint_every": EVERY, "kills": found, "same_to_the_last_bit": True}
        Path(path).write_text(json.dumps(record, indent=1) + "\n")


def test_sigterm_saves_and_ends_well(tmp_path, uninterrupted):
    """A machine announces so that it will be taken away."""
    out = tmp_path / "out"
    assert kill_at(command(tmp_path, out, "--checkpoint-every", "1000"), out, 30, signal.SIGTERM) == 0
    subprocess.run(command(tmp_path, out, "--resume"), check=True, capture_output=True)
    assert results(out) == uninterrupted


def test_ctrl_c_saves_and_says_so(tmp_path, uninterrupted):
    out = tmp_path / "out"
    assert kill_at(command(tmp_path, out, "--checkpoint-every", "1000"), out, 4, signal.SIGINT) == 130
    (step,) = [int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit()]
    assert 4 <= step < STEPS, "saved at the step of the signal, which no schedule asked for"
    assert (out / "loss.png").stat().st_size > 0
    subprocess.run(command(tmp_path, out, "--resume"), check=True, capture_output=True)
    assert results(out) == uninterrupted


def test_a_finished_run_resumes_to_itself(tmp_path, whole, uninterrupted):
    out = shutil.copytree(whole, tmp_path / "out")
    os.remove(out / "acme" / "adapter_model.safetensors")
    subprocess.run(command(tmp_path, out, "--resume"), check=True, capture_output=True)
    assert results(out) == uninterrupted


def test_two_runs_do_not_share_a_folder(tmp_path, uninterrupted):
    """The second one is refused while the first one lives; one that is killed locks nobody out."""
    out = tmp_path / "out"
    with subprocess.Popen(command(tmp_path, out), stdout=subprocess.DEVNULL) as process:
        while not (out / "metrics.jsonl").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)  # it lives, and does not get on
        for more in ("--resume", "--overwrite"):
            other = subprocess.run(command(tmp_path, out, more), capture_output=True, text=True)
            assert other.returncode == 1 and f"(process {process.pid} on " in other.stderr, other.stderr
            assert other.stderr.endswith(f") is writing {out}\n") and other.stderr.count("\n") == 1
        process.kill()
    subprocess.run(command(tmp_path, out, "--resume"), check=True, capture_output=True)
    assert results(out) == uninterrupted


def test_other_data_or_settings_are_refused(tmp_path, whole):
    out = shutil.copytree(whole, tmp_path / "out")
    before = results(out)
    refused = subprocess.run(command(tmp_path, out, "--resume", "--steps", "acme=30"), capture_output=True, text=True)
    assert refused.returncode == 1
    assert "tenants.acme.steps was 40 and is 30" in refused.stderr and "Traceback" not in refused.stderr
    exists = subprocess.run(command(tmp_path, out), capture_output=True, text=True)
    assert exists.returncode == 1 and "--resume" in exists.stderr and "--overwrite" in exists.stderr
    assert results(out) == before
