"""What a machine is taken for: by what Colab and Kaggle say of their runtimes, and by a driver's own tool."""

from __future__ import annotations

from pathlib import Path

import pytest

from para_jax.machine import accelerator, cuda_extra, host_memory, installed, nvidia_driver


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment that says nothing, and a PATH with one empty folder."""
    for name in ("COLAB_TPU_1VM", "TPU_ACCELERATOR_TYPE", "COLAB_GPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def tool(folder: Path, says: str, code: int = 0) -> None:
    """A program called nvidia-smi."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        # Colab's three images; the first is its TPU's, seen in public notes.
        ({"COLAB_TPU_1VM": "1", "TPU_ACCELERATOR_TYPE": "v5e-1", "COLAB_GPU": ""}, "tpu"),
        ({"COLAB_TPU_1VM": "", "COLAB_GPU": "1"}, "gpu"),
        ({"COLAB_TPU_1VM": "", "COLAB_GPU": ""}, ""),
        ({"COLAB_GPU": "0"}, ""),
        ({"TPU_ACCELERATOR_TYPE": "v5e-8", "ISTPUVM": "1"}, "tpu"),  # Kaggle's
        ({"TPU_ACCELERATOR_TYPE": "tpu7x-8"}, "tpu"),
        # What libtpu puts there where it finds nothing.
        ({"TPU_ACCELERATOR_TYPE": "WARNING: could not determine TPU accelerator type"}, ""),
    ],
)
def test_runtimes(says: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in says.items():
        monkeypatch.setenv(name, value)
    assert accelerator() == expected


def test_a_gpu(bare: Path) -> None:
    assert nvidia_driver() == "" and accelerator() == ""
    tool(bare, "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver", 9)
    assert nvidia_driver() == "" and accelerator() == ""
    tool(bare, "550.54.15\n550.54.15")
    assert nvidia_driver() == "550.54.15" and accelerator() == "gpu"


@pytest.mark.parametrize(
    ("driver", "extra"), [("", "cuda12"), ("535.104.05", "cuda12"), ("580.65.06", "cuda13"), ("1000.1", "cuda13")]
)
def test_cuda_by_the_driver(driver: str, extra: str) -> None:
    assert cuda_extra(driver) == extra


def test_memory_and_packages() -> None:
    host = host_memory()
    total, available = host["memory"], host["memory_available"]
    assert total is not None and available is not None and 0 < available < total
    assert installed("jax") and not installed("no-such-package-at-all")
