"""metrics.jsonl through a full disk, and signals that stop a run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from para_jax import ParaJaxError
from para_jax.training.metrics import MetricsFile, loss_figure, read_metrics
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


def test_a_picture_of_losses_says_what_its_lines_are() -> None:
    lines = [{"step": i, "loss": {"b": 13 / i, "a": 2 + 1 / i}, "dev_loss": {"b": 9.0}} for i in range(1, 61)]
    (axes,) = loss_figure(lines).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["b", "a"], "in the order of the tenants"
    assert axes.get_xlabel() == "step (thin: each step, thick: mean of 3 steps, dotted: dev rows)"
    thick = [line for line in axes.get_lines() if line.get_label() in ("a", "b")]
    assert [line.get_ydata()[-1] for line in thick] == pytest.approx(
        [13 * (1 / 58 + 1 / 59 + 1 / 60) / 3, 2.0169], abs=1e-4
    )
    assert axes.get_yscale() == "log", "from 13 to 0.2"
    for low in (0.0, 0.5):
        (axes,) = loss_figure([{"step": 1, "loss": {"a": low}}, {"step": 2, "loss": {"a": 1.0}}]).axes
        assert axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0


def test_a_second_ctrl_c_says_what_is_lost() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.kind == signal.SIGINT
        with pytest.raises(KeyboardInterrupt, match="stopped at once, before the step was saved; --resume continues"):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
