"""The folder of a run: one process writes it at a time, and a run that is replaced stays until there is a new one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from para_jax import ParaJaxError
from para_jax.training.claim import Claim

ABOUT = {"rows": 4, "tenants": {"acme": {}, "globex": {}}}


def old_run(out: Path) -> dict[str, str]:
    (out / "acme").mkdir(parents=True)
    (out / "run.json").write_text(json.dumps(ABOUT))
    (out / "metrics.jsonl").write_text("{}\n")
    (out / "acme" / "adapter_config.json").write_text("years of work")
    return files(out)


def files(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def test_a_run_that_is_replaced_goes_with_the_first_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = old_run(out)
    with Claim(out, False, True) as claim:
        assert not claim.begin({"rows": 8})
        assert {name: text for name, text in files(out).items() if name != ".lock"} == before
        claim.commit()
        assert sorted(files(out)) == [".lock", "run.json"] and beside(out) == ["out"]
    assert files(out) == {"run.json": '{\n "rows": 8\n}\n'}


@pytest.mark.parametrize("error", [ParaJaxError, KeyboardInterrupt, ZeroDivisionError])
def test_a_run_that_is_replaced_stays_until_then(tmp_path: Path, error: type[BaseException]) -> None:
    """Whatever ends the new run before its first step, before or after it has a folder."""
    out = tmp_path / "out"
    before = old_run(out)
    with pytest.raises(error), Claim(out, False, True) as claim:
        raise error
    with pytest.raises(error), Claim(out, False, True) as claim:
        claim.begin({"rows": 8})
        raise error
    assert files(out) == before and beside(out) == ["out"]


def test_a_new_run_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Claim(tmp_path / "out", False, False) as claim:
        claim.begin(ABOUT)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), Claim(tmp_path / "out", False, False) as claim:
        claim.begin(ABOUT)
        claim.commit()
        raise ZeroDivisionError
    assert list(files(tmp_path / "out")) == ["run.json"]


def test_a_kill_before_the_first_step_loses_nothing(tmp_path: Path) -> None:
    """The run before it stays, however often the new one is begun, until one has done a step."""
    out = tmp_path / "out"
    before = old_run(out)

    def killed() -> None:
        claim = Claim(out, False, True)
        claim.__enter__()
        claim.begin({"rows": 8})
        assert claim._lock is not None
        claim._lock._file.close()  # as the system does

    killed()
    with pytest.raises(ParaJaxError, match=r"out exists; pass --resume to continue it, --overwrite to replace it"):
        Claim(out, False, False).__enter__()
    killed()
    with Claim(out, True, False) as claim:
        assert claim.begin(ABOUT), "it can even be resumed"
    assert files(out) == before and beside(out) == ["out"]
    with Claim(out, False, True) as claim:
        claim.begin({"rows": 8})
        claim.commit()
    assert files(out) == {"run.json": '{\n "rows": 8\n}\n'} and beside(out) == ["out"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old_run(out)
    with Claim(out, True, False) as claim:
        claim.begin(ABOUT)
        for resume in (True, False):
            with pytest.raises(ParaJaxError, match=r"another process \(process \d+ on .+\) is writing .*/out"):
                Claim(out, resume, not resume).__enter__()
    # As a kill leaves them, and a lost machine.
    (out / ".acme-0a1b2c3d").mkdir()
    (out / "globex").mkdir()
    (out / "globex" / "adapter_model.safetensors").write_text("half")
    with Claim(out, True, False) as claim:
        claim.begin(ABOUT)
        assert sorted(path.name for path in out.iterdir()) == [".lock", "acme", "metrics.jsonl", "run.json"]
    # Two that begin at once: there was no folder to lock when they looked.
    new = tmp_path / "new"
    with Claim(new, False, False) as one, Claim(new, False, False) as two:
        one.begin(ABOUT)
        with pytest.raises(ParaJaxError, match=r"another process \(process \d+ on .+\) is writing .*/new"):
            two.begin(ABOUT)
        one.commit()
    assert json.loads(files(new)["run.json"]) == ABOUT


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
    assert sorted(files(out)) == ["acme/adapter_config.json", "metrics.jsonl", "run.json"], "no lock is left"
