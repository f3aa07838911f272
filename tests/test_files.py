"""Files that appear whole or not at all, with nothing left beside them, and locks that end with their process."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from para_jax import ParaJaxError
from para_jax.files import (
    AppendFile,
    changes,
    json_line,
    read_back,
    replacing,
    safetensors,
    wait_until_visible,
    write_file,
    write_json,
    write_text,
)
from para_jax.locks import Lock, open_locked


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": "é"})
    inode = path.stat().st_ino
    with replacing(path) as file:
        file.write(b"more")
        assert path.read_text() == '{\n "a": "\\u00e9"\n}\n'
    assert path.read_bytes() == b"more" and path.stat().st_ino != inode
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("a")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a").read_text() == "x"


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "a"
    with pytest.raises(ParaJaxError, match=f"{path} could not be written: File too large; nothing was written"):
        write_text(path, "x" * 5000)
    assert list(tmp_path.iterdir()) == []
    write_text(path, "kept")
    with pytest.raises(
        ParaJaxError, match=f"{path} could not be written: File too large; the existing file is unchanged"
    ):
        write_text(path, "x" * 5000)
    assert path.read_text() == "kept" and list(tmp_path.iterdir()) == [path]


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_lock_keeps_others_out_and_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    code = (
        "import sys, pathlib, para_jax.locks as f; lock = f.Lock(pathlib.Path(sys.argv[1]), 'it'); print(1, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}; sys.stdin.read()", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"1\n"
        with pytest.raises(ParaJaxError, match=rf"another process \(process {other.pid} on .+\) is writing the run"):
            Lock(path, "the run")
        with pytest.raises(BlockingIOError):
            open_locked(path)
        other.kill()
    lock = Lock(path, "the run")
    lock.release()
    assert not path.exists()


def test_lines_and_changes() -> None:
    assert json_line({"a": "é"}) == '{"a": "é"}\n' and json_line({"a": "é\ud800"}) == '{"a": "\\u00e9\\ud800"}\n'
    assert list(changes({"a": 1, "b": {"c": 2}}, {"b": {"c": 3}})) == ["a was 1 and is None", "b.c was 2 and is 3"]


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Nor has the folder for temporary files any: nobody is kept out, which is said."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "it").mkdir()
    first, second = (Lock(tmp_path / "it" / ".lock", "it") for _ in range(2))
    words = f"para-jax: {tmp_path}/it is on a file system without locks; other processes are not locked out\n"
    assert capsys.readouterr().err == 2 * words
    first.release()
    second.release()
    assert list((tmp_path / "it").iterdir()) == []


def test_a_file_that_grows(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    with AppendFile(path, keep=3) as file:
        file.write(b"x")
        file.reopen()
        file.write(b"y")
        assert path.read_bytes() == b"123xy"
    with pytest.raises(IsADirectoryError):
        AppendFile(tmp_path)


def test_tensors_are_written_as_safetensors_writes_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "b": rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
        "a": rng.standard_normal((2, 3, 4), np.float32).T,
        "scalar": np.float64(3),
        "empty": np.zeros((0, 4), np.float16),
        "i": np.arange(7, dtype=np.int8),
        "é": np.array([True, False]),
    }
    tensors = {name: np.asarray(x) for name, x in tensors.items()}
    written = write_file(tmp_path / "a", safetensors(tensors, {"format": "pt"}))
    assert written == read_back(tmp_path / "a")
    theirs = save({name: np.ascontiguousarray(x).reshape(x.shape) for name, x in tensors.items()}, {"format": "pt"})
    assert (tmp_path / "a").read_bytes() == theirs


def test_what_does_not_appear_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("para_jax.files.PATIENCE", 0.01)
    (tmp_path / "a").write_bytes(b"12")
    wait_until_visible(tmp_path / "a", 2)
    for path, size in ((tmp_path / "a", 3), (tmp_path / "b", None)):
        with pytest.raises(OSError, match="it was written, and is not visible after"):
            wait_until_visible(path, size)
