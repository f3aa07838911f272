"""The folder of a run: one process writes it at a time, and a run that is replaced stays until there is a new one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from para_jax import ParaJaxError
from para_jax.training.claim import Claim

ABOUT = {"rows": 4}


def old_run(out: Path) -> dict[str, str]:
    (out / "acme").mkdir(parents=True)
    (out / "run.json").write_text(json.dumps(ABOUT))
    (out / "metrics.jsonl").write_text("{}\n")
    (out / "acme" / "adapter").write_text("years of work")
    return files(out)


def files(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def test_a_run_that_is_replaced_goes_with_the_first_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old_run(out)
    with Claim(out, False, True) as claim:
        claim.begin({"rows": 8})
        assert sorted(files(out)) == [".lock", "run.json"] and beside(out) == [".out-replaced", "out"]
        claim.settle()
        assert beside(out) == ["out"]
    assert files(out) == {"run.json": '{\n "rows": 8\n}\n'}


@pytest.mark.parametrize("error", [ParaJaxError, KeyboardInterrupt, ZeroDivisionError])
def test_a_run_that_is_replaced_comes_back(tmp_path: Path, error: type[BaseException]) -> None:
    """Whatever ends the new run before its first step, before or after it has a folder."""
    out = tmp_path / "out"
    before = old_run(out)
    with pytest.raises(error), Claim(out, False, True) as claim:
        raise error
    with pytest.raises(error), Claim(out, False, True) as claim:
        claim.begin({"rows": 8})
        (out / "checkpoints").mkdir()
        raise error
    assert files(out) == before and beside(out) == ["out"]


def test_a_new_run_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Claim(tmp_path / "out", False, False) as claim:
        claim.begin(ABOUT)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), Claim(tmp_path / "out", False, False) as claim:
        claim.begin(ABOUT)
        claim.settle()
        raise ZeroDivisionError
    assert list(files(tmp_path / "out")) == ["run.json"]


def test_a_kill_before_the_first_step_loses_nothing(tmp_path: Path) -> None:
    """The run before it stays aside, however often the new one is begun, until one has done a step."""
    out = tmp_path / "out"
    before = old_run(out)

    def killed(overwrite: bool) -> None:
        claim = Claim(out, not overwrite, overwrite)
        claim.__enter__()
        claim.begin({"rows": 8})
        assert claim._lock is not None
        claim._lock._file.close()  # as the system does

    killed(overwrite=True)
    with pytest.raises(ParaJaxError, match=r"out exists; .*The run that it replaces is still in .*\.out-replaced"):
        Claim(out, False, False).__enter__()
    killed(overwrite=True)
    killed(overwrite=False)
    assert files(tmp_path / ".out-replaced") == before
    with pytest.raises(ZeroDivisionError), Claim(out, False, True) as claim:
        claim.begin({"rows": 8})
        raise ZeroDivisionError
    assert files(out) == before and beside(out) == ["out"]
    killed(overwrite=True)
    with Claim(out, True, False) as claim:
        claim.begin({"rows": 8})
        claim.settle()
    assert beside(out) == ["out"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old_run(out)
    with Claim(out, True, False) as claim:
        claim.begin(ABOUT)
        for resume in (True, False):
            with pytest.raises(ParaJaxError, match=r"another process \(process \d+ on .+\) is writing .*/out"):
                Claim(out, resume, not resume).__enter__()
    (out / ".acme-0a1b2c3d").mkdir()  # as a kill leaves it
    with Claim(out, True, False) as claim:
        claim.begin(ABOUT)
        assert not (out / ".acme-0a1b2c3d").exists() and (out / "acme").exists()
    # Two that begin at once: there was no folder to lock when they looked.
    new = tmp_path / "new"
    with Claim(new, False, False) as one, Claim(new, False, False) as two:
        one.begin(ABOUT)
        with pytest.raises(ParaJaxError, match="new exists; pass --resume"):
            two.begin(ABOUT)
    assert files(new) == {"run.json": '{\n "rows": 4\n}\n'}


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old_run(out)
    with (
        pytest.raises(ParaJaxError, match=r"holds another run, .*: rows was 4 and is 8"),
        Claim(out, True, False) as claim,
    ):
        claim.begin({"rows": 8})
    (out / "run.json").write_text("{")
    with (
        pytest.raises(ParaJaxError, match=r"run\.json is damaged .* cannot be resumed"),
        Claim(out, True, False) as claim,
    ):
        claim.begin(ABOUT)
    assert sorted(files(out)) == ["acme/adapter", "metrics.jsonl", "run.json"], "no lock is left"
