"""Compiled programs on disk: what a second start compiles, whose settings win, and what a broken folder costs."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from para_jax import compile_cache
from para_jax.compile_cache import default_folder, keep_compiled, set_up
from para_jax.errors import ParaJaxError

SETTINGS = (
    "jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)  # fmt: skip
COUNT = """
import collections, sys, jax
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event.rpartition("/")[2]]))
"""
COUNTED = "\nprint('hits', seen['cache_hits'], 'misses', seen['cache_misses'])"
COMPUTE = """
from para_jax.compile_cache import set_up
set_up(sys.argv[1])
import jax.numpy as jnp
f = jax.jit(lambda x: jnp.sin(x @ x.T).sum())
f(jnp.ones((8, 8)))
"""


@pytest.fixture
def settings() -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    with warnings.catch_warnings():
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A fresh interpreter without the tests' own cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT", "PARA_JAX"))}
    command = [sys.executable, "-c", COUNT + code + COUNTED, *map(str, arguments)]
    return subprocess.Popen(
        command, env={**kept, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def counts(process: subprocess.Popen[str]) -> tuple[int, int, str]:
    """Programs read and compiled, and what was said on stderr."""
    out, err = process.communicate()
    assert process.returncode == 0, err
    _, hits, _, misses = out.splitlines()[-1].split()
    return int(hits), int(misses), err


@pytest.mark.slow
def test_the_command_compiles_nothing_at_its_second_start(tmp_path: Path) -> None:
    code = "from para_jax.cli import main\nassert main(['convert', '--check']) == 0"
    _, compiled, said = counts(start(code, XDG_CACHE_HOME=str(tmp_path)))
    assert compiled and not said
    folder = tmp_path / "para_jax" / "compiled"
    assert len(list(folder.glob("*-cache"))) == compiled
    assert folder.stat().st_mode & 0o077 == 0 or sys.platform == "win32"
    hits, misses, said = counts(start(code, XDG_CACHE_HOME=str(tmp_path)))
    assert hits >= compiled and not misses and not said


@pytest.mark.slow
def test_the_command_goes_on_without_a_folder(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    code = "from para_jax.cli import main\nassert main(['convert', '--check', '--compile-cache', sys.argv[1]]) == 0"
    hits, misses, said = counts(start(code, blocked / "compiled"))
    assert (hits, misses) == (0, 0)
    assert said.startswith("para-jax: ") and str(blocked) in said and said.endswith("; continuing without a cache\n")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_damaged_program_is_compiled_again_and_kept(tmp_path: Path) -> None:
    _, compiled, said = counts(start(COMPUTE, tmp_path))
    assert compiled and not said
    for path in tmp_path.glob("*-cache"):
        path.write_bytes(path.read_bytes()[:100])
    hits, misses, said = counts(start(COMPUTE, tmp_path))
    assert (hits, misses) == (0, compiled)
    assert said == f"para-jax: a compiled program in {tmp_path} is damaged; compiling it again\n"
    assert counts(start(COMPUTE, tmp_path)) == (compiled, 0, "")


@pytest.mark.slow
def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    both = [start(COMPUTE, tmp_path) for _ in range(2)]
    for process in both:
        assert "Traceback" not in (said := counts(process)[2])
        assert "Warning" not in said and said.count("\n") <= 1
    hits, misses, said = counts(start(COMPUTE, tmp_path))
    assert hits and not misses and not said


def test_a_folder_that_goes_away_costs_one_line(tmp_path: Path) -> None:
    code = "\nimport shutil\nshutil.rmtree(sys.argv[1])\nfor n in (9, 10): f(jnp.ones((n, n)))"
    *_, said = counts(start(COMPUTE + code, tmp_path / "compiled"))
    assert said.startswith(f"para-jax: {tmp_path / 'compiled'} cannot hold compiled programs (")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_the_library_changes_no_setting() -> None:
    code = (
        f"names = {SETTINGS}\nbefore = [getattr(jax.config, n) for n in names]\n"
        "from para_jax import Backbone, tiny_backbone_path\nimport para_jax.compile_cache, para_jax.cli\n"
        "Backbone.from_pretrained(tiny_backbone_path())\nassert before == [getattr(jax.config, n) for n in names]\n"
    )
    assert counts(start(code)) == (0, 0, "")


def test_which_folder(settings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = jax.config.jax_compilation_cache_dir  # as conftest.py sets it by JAX_COMPILATION_CACHE_DIR
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
    set_up()
    assert jax.config.jax_compilation_cache_dir == own
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7.0 != seconds
    monkeypatch.setenv("PARA_JAX_COMPILE_CACHE", str(tmp_path / "b"))
    set_up()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "b")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    set_up(str(tmp_path / "a"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "a")
    set_up("off")
    assert not jax.config.jax_enable_compilation_cache
    assert keep_compiled("gs://bucket/programs") == jax.config.jax_compilation_cache_dir == "gs://bucket/programs"


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_folder() == tmp_path / "x" / "para_jax" / "compiled"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the XDG specification says to ignore
    for platform, base in (("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")):
        monkeypatch.setattr(sys, "platform", platform)
        assert default_folder() == tmp_path / base / "para_jax" / "compiled"


def test_the_least_used_programs_go(settings: None, tmp_path: Path) -> None:
    entries = [tmp_path / f"jit_f-{i:064x}-cache" for i in range(4)]
    for age, path in enumerate(entries):
        path.write_bytes(b"0" * 100)
        os.utime(path, (1e9 - age, 1e9 - age))
    other = tmp_path / "a-file-of-yours-cache"
    other.write_bytes(b"0" * 1000)
    beside = entries[3].with_name(entries[3].name.replace("-cache", "-atime"))
    beside.touch()
    keep_compiled(tmp_path, limit=250)
    assert [path.exists() for path in entries] == [True, True, False, False]
    assert other.exists() and not beside.exists()


def test_a_folder_that_cannot_be_written(settings: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ParaJaxError, match="cannot hold compiled programs"):
        keep_compiled(tmp_path / "file")


def test_noise_is_hidden_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "jaxlib", raising=False)
    for version, level in (("0.10.1", "3"), ("0.10.2", None)):
        monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        compile_cache.quiet_loading()
        assert os.environ.get("TF_CPP_MIN_LOG_LEVEL") == level
