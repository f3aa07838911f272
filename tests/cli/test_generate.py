"""`para-jax generate --input`: answers as they come, that no kill and no full disk loses; keys that are not its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from para_jax.cli import answers, main

# Two windows of 8 batches of one row each, and a part of a third.
OPTIONS = ["--batch-size", "1", "--max-new-tokens", "3", "--temperature", "0.7", "--seed", "4294967290"]
KEYS = {"text", "finish_reason"}


def rows(count: int = 19) -> list[dict]:
    words = ["river", "house", "garden", "letter", "horse"]
    return [{"prompt": "The old " + " and the ".join(words[: i * 3 % 5 + 1]), "id": i} for i in range(count)]


def write(path: Path, some: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return str(path)


def generate(source: str, output: Path, *more: str) -> int:
    return main(["generate", "--input", source, "--output", str(output), *OPTIONS, *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """The rows, and their answers without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    source = write(folder / "in.jsonl", rows())
    assert generate(source, folder / "out.jsonl") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "out.jsonl"]
    return source, (folder / "out.jsonl").read_bytes()


def test_answers_come_in_order_and_a_stop_loses_a_window_at_most(whole, tmp_path, monkeypatch, capsys) -> None:
    source, wanted = whole
    assert [json.loads(line)["id"] for line in wanted.splitlines()] == list(range(19))
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    written = answers.Answers.write

    def stop(self, some):
        written(self, some)
        if self.done == 16:
            raise KeyboardInterrupt

    monkeypatch.setattr(answers.Answers, "write", stop)
    assert generate(source, output) == 130
    words = f"para-jax generate: stopped; 16 answers are in {partial}, and --resume continues\n"
    assert capsys.readouterr().err.endswith(words)
    assert partial.read_bytes() == b"".join(wanted.splitlines(keepends=True)[:16]) and not output.exists()
    # A kill may come within a line.
    partial.write_bytes(partial.read_bytes()[:-40])
    monkeypatch.setattr(answers.Answers, "write", written)
    capsys.readouterr()
    assert generate(source, output) == 1
    assert "out.jsonl.partial holds the answers of a stopped run; continue with --resume" in capsys.readouterr().err
    assert generate(source, output, "--top-k", "5", "--resume") == 1
    said = capsys.readouterr().err
    assert "holds answers to other inputs: options.top_k was None and is 5; give the same rows and options" in said
    assert partial.exists()
    assert generate(source, output, "--resume") == 0
    said = capsys.readouterr()
    assert "continuing after 8 of 19 rows" in said.err and said.out == f"19 rows in {output}\n"
    assert output.read_bytes() == wanted and list(tmp_path.iterdir()) == [output]
    # What is finished stays as it is.
    assert generate(source, output, "--resume") == 0
    assert capsys.readouterr().out == f"19 rows were in {output} already\n"
    assert generate(write(tmp_path / "others.jsonl", rows(3)), output, "--resume") == 1
    assert "out.jsonl exists and answers other rows; choose another --output" in capsys.readouterr().err
    assert output.read_bytes() == wanted


def test_what_answers_nothing_leaves_nothing(whole, tmp_path, capsys) -> None:
    output = tmp_path / "out.jsonl"
    assert generate(whole[0], output, "--max-new-tokens", "100000") == 1
    assert "the backbone's context is" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    output.write_text("years of work")
    assert generate(whole[0], output, "--max-new-tokens", "100000", "--overwrite") == 1
    assert output.read_text() == "years of work" and list(tmp_path.iterdir()) == [output]


def test_keys_that_are_not_read_go_to_the_output(tmp_path, capsys) -> None:
    given = [
        {"prompt": "The house", "id": 5, "meta": {"a": [1, None]}, "tenant_id": "x", "text": "old"},
        {"prompt": "The river", "note": "\ud800", "finish_reason": 3},
    ]
    source, output = write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    assert generate(source, output) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [
        f"{source}: keys that are not read are copied to the output: id, meta, note, tenant_id",
        f"{source}: the output replaces text and finish_reason of the rows",
    ]
    answered = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k not in KEYS} for row in answered] == [
        {k: v for k, v in row.items() if k not in KEYS} for row in given
    ]
    assert answered[0]["text"] != "old" and answered[1]["finish_reason"] in ("stop", "length")
    # Its own output is an input.
    assert generate(str(output), tmp_path / "again.jsonl") == 0
    assert (tmp_path / "again.jsonl").read_bytes() == output.read_bytes()
    capsys.readouterr()
    for key, near in (("tennant", "tenant"), ("mesages", "messages"), ("Prompt", "prompt"), ("respons", "response")):
        write(tmp_path / "in.jsonl", [{"prompt": "x"}, {"prompt": "x", key: None}])
        assert generate(source, tmp_path / "new.jsonl") == 1
        wanted = f"{source}:2: unknown key {key!r}; did you mean {near!r}? If not, rename it\n"
        assert capsys.readouterr().err == f"para-jax generate: {wanted}"


def command(source: str, output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "para_jax", "generate", "--input", source, "--output", str(output), *OPTIONS, *more]


@pytest.mark.slow
def test_kill_9_in_the_middle(tmp_path) -> None:
    source, output = write(tmp_path / "in.jsonl", rows(120)), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    subprocess.run(command(source, tmp_path / "whole.jsonl"), check=True)
    for lines in (1, 60):
        with subprocess.Popen(command(source, output, "--resume"), stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not (partial.exists() and partial.read_bytes().count(b"\n") >= lines):
                time.sleep(0.002)
            os.kill(process.pid, signal.SIGKILL)
        assert partial.exists() and not output.exists()
    subprocess.run(command(source, output, "--resume"), check=True)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_there(tmp_path, whole) -> None:
    source, wanted = whole
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))"
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    ours = command(source, output, "--compile-cache", "off")
    code = f"{limited}; import sys; from para_jax.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *ours[3:]], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith(
        f"para-jax generate: {partial} could not be written: File too large; the first 8 answers are saved; "
        "make room and run again with --resume\n"
    )
    assert partial.read_bytes() == wanted[:1500]
    assert generate(source, output, "--resume") == 0
    assert output.read_bytes() == wanted and list(tmp_path.iterdir()) == [output]
