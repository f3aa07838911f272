"""Laws 6 and 7 over real processes: two and four of them on one machine, a preemption, and another mesh afterwards."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from para_jax import load_adapter
from para_jax.config import BackboneConfig
from para_jax.convert.checkpoint import save_backbone
from tests.helpers import random_backbone

WORKER = """
import json, os, signal, sys
given = json.loads(sys.argv[1])
import jax
from para_jax.distributed import join_processes
if given["processes"] > 1:
    join_processes(f"127.0.0.1:{given['port']}", given["processes"], given["process"])
import numpy as np
from para_jax import Backbone, LoraConfig, ParaConfig
from para_jax.data.examples import Example
from para_jax.sharding import make_mesh
from para_jax.training.finetune import finetune
from para_jax.training.settings import Settings
from para_jax.training.signals import Interrupted

backbone = Backbone.from_pretrained(given["model"], dtype="float32", mesh=make_mesh(given["mesh"]))
configs = {"acme": ParaConfig(r=2), "globex": ParaConfig(r=2), "initech": LoraConfig(r=2, lora_dropout=0.3)}
rng = np.random.default_rng(0)
def rows(count):
    drawn = rng.integers(1, 61, (count, 6)).tolist()
    return [Example.of(tuple(ids[:5]), (ids[5], 0)) for ids in drawn]
examples = {name: rows(7 + i) for i, name in enumerate(configs)}
dev = {"globex": rows(5)}
settings = {n: Settings(steps=8, lr=1e-2, eval_every=2 if n == "globex" else 0) for n in configs}
if given["stop_at"] and given["process"] == given["processes"] - 1:
    # The last process is told to go, while the first one writes the metrics.
    import threading, time
    from pathlib import Path
    def later():
        metrics = Path(given["out"]) / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\\n") < given["stop_at"]:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=later, daemon=True).start()
try:
    finetune(backbone, examples, given["out"], methods=configs, settings=settings, dev=dev, rows=4,
             checkpoint_every=3, resume=True, show=lambda line: print(line, flush=True))
except Interrupted as stopped:
    print("interrupted", stopped.step, stopped.preempted, flush=True)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(model: Path, out: Path, mesh: str, processes: int, devices: int, stop_at: int = 0) -> list[str]:
    """What each process printed."""
    given = {
        "model": str(model), "out": str(out), "mesh": mesh, "processes": processes, "port": free_port(),
        "stop_at": stop_at,
    }  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps({**given, "process": i})],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(processes)
    ]  # fmt: skip
    said = [process.communicate(timeout=900)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(said)
    return said


def adapters(out: Path, shape: BackboneConfig) -> dict[str, np.ndarray]:
    return {
        f"{name} {key}": np.asarray(x)
        for name in ("acme", "globex", "initech")
        for key, x in load_adapter(out / name, shape).tensors().items()
    }


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, BackboneConfig]:
    """The model, and a run of one process on four devices."""
    folder = tmp_path_factory.mktemp("alone")
    backbone = random_backbone(vocab_size=64)
    save_backbone(backbone, folder / "model")
    run(folder / "model", folder / "out", "fsdp=2,tensor=2", processes=1, devices=4)
    return folder / "model", folder / "out", backbone.config


def same(out: Path, whole: Path, shape: BackboneConfig) -> None:
    theirs = adapters(whole, shape)
    for key, x in adapters(out, shape).items():
        np.testing.assert_allclose(x, theirs[key], rtol=1e-2, atol=2e-4, err_msg=key)
    for a, b in zip(lines(out), lines(whole), strict=True):
        assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        for key in ("loss", "dev_loss"):
            for name, loss in b.get(key, {}).items():
                np.testing.assert_allclose(a[key][name], loss, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "mesh"), [(2, "fsdp=2,tensor=2"), pytest.param(4, "fsdp=4", marks=pytest.mark.whole)]
)
def test_processes_of_which_one_is_preempted(processes: int, mesh: str, alone, tmp_path) -> None:
    """All save at one step and end well; half as many devices go on with the same rows."""
    model, whole, shape = alone
    out = tmp_path / "out"
    said = run(model, out, mesh, processes=processes, devices=4 // processes, stop_at=3)
    assert [f"step {i}/8" in said[0] for i in (1, 8)] == [True, False]
    assert not any("step 1/8" in text for text in said[1:]), "the first process speaks for all"
    steps = {line for text in said for line in text.splitlines() if line.startswith("interrupted")}
    assert len(steps) == 1 and steps.pop().endswith("True"), said
    assert 3 <= len(lines(out)) < 8
    done = len(lines(out))
    (resumed,) = run(model, out, "fsdp=2", processes=1, devices=2)
    assert f"resuming after step {done}" in resumed
    same(out, whole, shape)


SAYING = """
import json, sys
given = json.loads(sys.argv[1])
from para_jax import ParaJaxError
from para_jax.distributed import on_main_process, share_work, join_processes, broadcast
join_processes(f"127.0.0.1:{given['port']}", 2, given["process"])
text = "aä€" * 30_000
assert broadcast((text if given["process"] == 0 else "of another").encode()).decode() == text
assert broadcast(b"") == b""
made = share_work({"a": lambda: b"a" * 5_000_000, "b": lambda: "ä", "c": lambda: list(range(10))})
assert made == {"a": b"a" * 5_000_000, "b": "ä", "c": list(range(10))}
def fail():
    raise ParaJaxError("ä" * 9_000)
try:
    on_main_process(fail)
except ParaJaxError as error:
    assert str(error) == "ä" * 9_000
    print("said")
"""


@pytest.mark.slow
def test_messages_of_any_size() -> None:
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SAYING, json.dumps({"port": port, "process": i})],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]  # fmt: skip
    assert [process.communicate(timeout=150)[0].splitlines()[-1] for process in started] == ["said", "said"]


def write_rows(path: Path, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": f"say {i}", "response": "yes"}) + "\n" for i in range(count)))


def commands(folders: list[Path], *arguments: str, first: str = "") -> list[tuple[int, str]]:
    """`para-jax finetune` in processes that are together, each in its own folder: exit codes, and what went to stderr.

    `first` is what the first one executes beforehand.
    """
    main = "import sys; from para_jax.cli import main; sys.exit(main())"
    command = [
        "finetune", *arguments, "--rows", "4", "--coordinator", f"127.0.0.1:{free_port()}", "--processes",
        str(len(folders)), "--process",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", main if i else f"{first}\n{main}", *command, str(i)],
            env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i, folder in enumerate(folders)
    ]  # fmt: skip
    said = [process.communicate(timeout=150)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


@pytest.mark.slow
def test_each_process_reads_some_tenants(tmp_path) -> None:
    """A row that one of them refuses is refused by all; then each has only its own tenants' files to read."""
    folders = [tmp_path / "first", tmp_path / "second"]
    write_rows(folders[0] / "a.jsonl", 5)
    write_rows(folders[1] / "b.jsonl", 6)
    tenants = ["--tenant", "acme=a.jsonl", "--tenant", "globex=b.jsonl", "--out", str(tmp_path / "out"), "--steps", "2"]
    (folders[1] / "b.jsonl").write_text('{"prompt": "say"}\n')
    for code, text in commands(folders, *tenants):
        assert code == 1 and 'b.jsonl:1: give one of "response" and "completion"' in text
    write_rows(folders[1] / "b.jsonl", 6)
    assert [code for code, _ in commands(folders, *tenants)] == [0, 0]
    known = json.loads((tmp_path / "out" / "run.json").read_text())["tenants"]
    assert {name: of["examples"] for name, of in known.items()} == {"acme": 5, "globex": 6}


@pytest.mark.slow
def test_a_process_whose_disk_is_full(tmp_path) -> None:
    """It says so, and no process waits for another."""
    write_rows(tmp_path / "rows.jsonl", 8)
    no_large_files = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))"
    arguments = ["--tenant", "acme=rows.jsonl", "--out", "out", "--steps", "500"]
    (code, said), (other, of_other) = commands([tmp_path, tmp_path], *arguments, first=no_large_files)
    assert code == 1 and "File too large" in said and other != 0
    assert "Traceback" not in said + of_other
