"""metrics.jsonl through a full disk, and signals that stop a run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from para_jax import ParaJaxError
from para_jax.training.metrics import MetricsFile, read_metrics
from para_jax.training.signals import stop_signals


def test_a_full_disk_is_named_and_keeps_the_lines(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "metrics.jsonl"
    words = f"{path} could not be written: File too large; make room and run again with --resume"
    with MetricsFile(path, 0) as metrics, pytest.raises(ParaJaxError, match=words):
        for step in range(1, 100):
            metrics.write({"step": step, "loss": {"a": float("nan")}})
    kept = read_metrics(path)
    assert [line["step"] for line in kept] == list(range(1, len(kept) + 1)) and len(kept) > 10
    with MetricsFile(path, 5) as metrics:
        metrics.write({"step": 6})
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_ctrl_c_says_what_is_lost() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.kind == signal.SIGINT
        with pytest.raises(KeyboardInterrupt, match="stopped at once, before the step was saved; --resume goes on"):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
