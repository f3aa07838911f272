"""Errors that nobody expected, Ctrl-C and a closed or full stdout: one line, never a traceback."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from para_jax.cli import main, methods


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(args: object) -> int:
        raise error

    monkeypatch.setattr(methods, "run", run)


def test_a_fault_of_ours_is_one_line_and_a_file(monkeypatch, capsys, tmp_path) -> None:
    raising(monkeypatch, KeyError("tenant\nand more"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["methods"]) == 1
    said = capsys.readouterr().err
    found = re.fullmatch(
        r"para-jax methods: this is a bug in para_jax, not your mistake: KeyError: 'tenant\\nand more' in "
        r"test_faults\.py:\d+\. Please report it, with the traceback in (\S+/para-jax-methods-\w+\.txt) "
        r"and what para-jax env prints, to (the project's issue tracker|https://\S+/issues)\n",
        said,
    )
    assert found
    kept = Path(found[1]).read_text()
    assert kept.startswith("command: ") and "Traceback (most recent call last)" in kept and "\njax 0." in kept


def test_a_traceback_for_those_who_want_it(monkeypatch, capsys) -> None:
    raising(monkeypatch, AssertionError())
    monkeypatch.setenv("PARA_JAX_TRACEBACK", "1")
    assert main(["methods"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "wanted"),
    [
        (AssertionError(), 1, "this is a bug in para_jax, not your mistake: AssertionError in test_faults.py:"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (KeyboardInterrupt("stopped at once"), 130, "stopped at once\n"),
        (OSError(28, "No space left on device"), 1, "stdout could not be written: No space left on device\n"),
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "a.txt: No such file\n"),
        (OSError(), 1, "OSError\n"),
        (ModuleNotFoundError("x", name="tiktoken.core"), 1, "the package tiktoken is not installed; install it with"),
        (MemoryError(), 1, "out of memory (MemoryError); use fewer or shorter rows at once, or --quantize int8\n"),
        (
            RuntimeError("UNIMPLEMENTED: Unsupported element type for DotThunk::Execute: BF16 x BF16 = F32"),
            1,
            "this jaxlib cannot multiply bfloat16 on this processor (RuntimeError: UNIMPLEMENTED: Unsupported",
        ),
        (RuntimeError("RESOURCE_EXHAUSTED: 5 GB"), 1, "out of memory (RuntimeError: RESOURCE_EXHAUSTED: 5 GB); use"),
        (RuntimeError("x" * 5000), 1, f"this is a bug in para_jax, not your mistake: RuntimeError: {'x' * 300}... in"),
    ],
)
def test_never_blank_and_never_long(monkeypatch, capsys, error, code: int, wanted: str) -> None:
    raising(monkeypatch, error)
    assert main(["methods"]) == code
    said = capsys.readouterr().err
    assert said.startswith(f"para-jax methods: {wanted}") and said.count("\n") == 1


def test_a_fault_on_a_full_disk(monkeypatch, capsys, tmp_path) -> None:
    raising(monkeypatch, KeyError("x"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    assert main(["methods"]) == 1
    said = capsys.readouterr().err
    assert "Its traceback could not be saved" in said and "PARA_JAX_TRACEBACK=1" in said and said.count("\n") == 1


@pytest.mark.slow
def test_a_stdout_that_takes_nothing() -> None:
    command = [sys.executable, "-m", "para_jax", "methods"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "para-jax methods: stdout could not be written: No space left on device\n",
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1
