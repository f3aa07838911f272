"""`para-jax env`: what it says where all is well, and that it says something where nothing is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from para_jax.cli import main
from para_jax.cli.env import environment
from para_jax.planning.chips import parse_topology
from para_jax.planning.topology import environment as for_topology

HERE = str(Path(__file__).parents[2])


def env(*arguments: str, first: Path | None = None, **more: str) -> tuple[str, str]:
    """What a fresh process prints, and what it says on stderr; `first` is a folder of modules that shadow others."""
    path = os.pathsep.join([*([str(first)] if first else []), HERE])
    command = [sys.executable, "-m", "para_jax", "env", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **more})
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def problem(printed: str) -> str:
    (line,) = [line for line in printed.splitlines() if line.startswith("problem: ")]
    return line.removeprefix("problem: ")


def test_all_is_well(tmp_path: Path) -> None:
    out, cache = tmp_path / "env.json", tmp_path / "cache"
    cache.mkdir()
    (cache / "a-program").write_bytes(b"x" * 1500)
    printed, said = env("--json", str(out), JAX_COMPILATION_CACHE_DIR=str(cache))
    assert said == ""
    found = json.loads(out.read_text())
    assert found["versions"]["jax"] == version("jax") and found["versions"]["numpy"] == version("numpy")
    assert found["devices"] == [{"platform": "cpu", "kind": "cpu", "bytes": None}] and found["problem"] is None
    assert found["kernels"] == {"attention": {"kernel": "plain", "why": "no other kernel for a CPU"}}
    assert found["cache"] == {"folder": str(cache), "files": 1, "bytes": 1500}
    assert all(free > 0 for free in found["disk_free"].values()) and len(found["disk_free"]) == 2
    for words in (f"jax {version('jax')}, ", "devices: 1 x cpu (cpu)", "attention: plain (no other kernel for a CPU)"):
        assert words in printed
    assert f"compiled programs: 1 files, 1.50 kB, in {cache}" in printed and "problem" not in printed


def test_in_a_process_that_has_jax(tmp_path: Path, capsys) -> None:
    """Such as a notebook's, which has the accelerator: nobody else is asked."""
    found = environment()
    assert len(found["devices"]) == 8 and found["problem"] is None  # those of this process
    assert main(["env"]) == 0 and "devices: 8 x cpu" in capsys.readouterr().out
    assert environment(str(tmp_path))["problem"].endswith("is not a checkpoint: it has no config.json")


@pytest.mark.parametrize(
    ("runtime", "why"),
    [
        (
            {"COLAB_TPU_1VM": "1"},
            "this is a TPU runtime, but JAX does not see it because JAX_PLATFORMS=cpu leaves it out",
        ),
        ({"COLAB_GPU": "1"}, "this is a GPU runtime, but JAX does not see it because JAX_PLATFORMS=cpu leaves it out"),
        (
            {"COLAB_GPU": "1", "JAX_PLATFORMS": "", "CUDA_VISIBLE_DEVICES": ""},
            "this is a GPU runtime, but JAX does not see it because jax-cuda12-plugin or jax-cuda13-plugin is not",
        ),
        (
            {"COLAB_TPU_1VM": "1", "JAX_PLATFORMS": ""},
            "this is a TPU runtime, but JAX does not see it because Backend 'tpu' failed to initialize: ",
        ),
        ({"JAX_PLATFORMS": "nonsense"}, "Unable to initialize backend 'nonsense'"),
    ],
)
@pytest.mark.slow
def test_an_accelerator_that_is_not_seen(runtime: dict[str, str], why: str) -> None:
    # The compiler for TPUs looks for one and finds none.
    quiet = {**for_topology(parse_topology("v5e:1x1")), "JAX_PLATFORMS": "cpu"}
    printed, _ = env(**{**quiet, "TPU_ACCELERATOR_TYPE": "", **runtime})
    assert problem(printed).startswith(why)
    assert not printed.startswith("{") and "jax 0." in printed


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("raise ImportError('libjax_common.so is damaged')", "libjax_common.so is damaged"),
        ("import os, sys; print('sent a signal', file=sys.stderr); sys.stderr.flush(); os._exit(3)",
         "JAX did not start: its process exited with code 3; its last output: sent a signal"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_a_jax_that_does_not_start(module: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text(module)
    printed, _ = env(first=tmp_path)
    assert problem(printed) == why and "host: " in printed and "compiled programs: not kept" in printed


def test_a_file_that_exists_is_not_replaced(tmp_path: Path, capsys) -> None:
    (tmp_path / "env.json").write_text("")
    assert main(["env", "--json", str(tmp_path / "env.json")]) == 1
    assert "exists; choose another --json or pass --overwrite" in capsys.readouterr().err
