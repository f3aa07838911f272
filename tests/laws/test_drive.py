"""Law 7 on Google Drive, or worse (`tests.drive`): whatever happens to the file system or the machine, and whenever,
the same command with --resume ends with what an uninterrupted one writes, bit for bit.

`--kills 1000` lets it happen at every change of a file.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from para_jax import Backbone, LoraConfig, ParaConfig, ParaJaxError, load_adapter, save_adapter
from para_jax.adapters.adapter import Adapter
from para_jax.cli import main
from para_jax.convert.checkpoint import save_backbone
from para_jax.data.examples import Example
from para_jax.files import left_of, write_json
from para_jax.training.claim import Claim
from para_jax.training.finetune import finetune
from para_jax.training.settings import Settings
from tests.drive.drive import mounted
from tests.helpers import SMALL, random_adapter, random_backbone

STEPS, EVERY = 6, 2
CONFIGS = {"acme": ParaConfig(r=2), "globex": LoraConfig(r=2, lora_dropout=0.3)}
ROWS = [Example.of(tuple(range(2 + i, 6 + i)), (3 * i % 50 + 1, 0)) for i in range(9)]
GONE, FULL = "Transport endpoint is not connected", "No space left on device"


def spread(changes: int, kills: int) -> list[int]:
    """So many of the changes, in order; all, if there are no more."""
    return sorted(random.Random(kills).sample(range(1, changes + 1), min(kills, changes)))


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("kills")


@contextlib.contextmanager
def fails(words: str) -> Iterator[None]:
    """What happens to the file system is said, unless it happens where nobody has to know."""
    try:
        yield
    except ParaJaxError as error:
        assert words in str(error) and "\n" not in str(error), error


# A run


def tune(out: str | Path, **more: object) -> list[str]:
    """Returns what it says. One tenant is looked at while it learns, so its best adapter is replaced now and then."""
    backbone, said = random_backbone(num_hidden_layers=1, vocab_size=64), list[str]()
    settings = {name: Settings(steps=STEPS, lr=1e-2, eval_every=EVERY * (name == "acme")) for name in CONFIGS}
    finetune(
        backbone, dict.fromkeys(CONFIGS, ROWS[:6]), out, methods=CONFIGS, settings=settings,
        dev={"acme": ROWS[6:]}, rows=2, checkpoint_every=EVERY, **{"resume": True, "show": said.append, **more},
    )  # fmt: skip
    return said


def alone(code: str, *arguments: object) -> int:
    """Runs a program in a process of its own, and returns its exit code."""
    begin = f"import jax, sys\njax.config.update('jax_num_cpu_devices', {jax.device_count()})\n"
    command = [sys.executable, "-c", begin + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False).returncode


def files(out: Path) -> dict[str, bytes]:
    """All but what tells of time and memory, and pictures."""
    found = [p for p in out.rglob("*") if p.is_file() and "checkpoints" not in p.parts]
    return {str(p.relative_to(out)): p.read_bytes() for p in found if p.suffix != ".png" and p.stem != "report"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int, int]:
    """The files of a run to which nothing happens, how many changes it makes there, and how many bytes it writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    tune(out)
    with mounted() as drive:
        tune(drive.root / "out")
        assert files(drive.root / "out") == files(out)
        assert {path.name for path in (drive.root / "out" / "checkpoints").iterdir()} == {"4", "6"}
        return files(out), drive.changes, drive.used


def test_a_run_that_is_killed(run, kills: int) -> None:
    wanted, changes, _ = run
    for change in spread(changes - 2, kills):  # the last are closing and removing the lock
        with mounted() as drive:
            drive.kill_at(change)
            code = alone("from tests.laws.test_drive import tune; tune(sys.argv[1])", drive.root / "out")
            assert code == -signal.SIGKILL, change
            drive.back()
            tune(drive.root / "out")
            assert files(drive.root / "out") == wanted, change


def test_a_run_whose_file_system_goes(run, kills: int) -> None:
    wanted, changes, _ = run
    for change in spread(changes, kills):
        with mounted() as drive:
            drive.gone_at(change)
            with fails(GONE):
                tune(drive.root / "out")
            drive.back()
            tune(drive.root / "out")
            assert files(drive.root / "out") == wanted, change


def test_a_run_whose_machine_is_lost(run, kills: int) -> None:
    """Of what was closed last some came into the cloud, whatever came before or after it."""
    wanted, changes, _ = run
    for change in spread(changes, kills):
        with mounted() as drive:
            drive.gone_at(change)
            with fails(GONE):
                tune(drive.root / "out")
            drive.lose(seed=change)
            tune(drive.root / "out")
            assert files(drive.root / "out") == wanted, change


def test_a_run_that_has_no_room(run, kills: int) -> None:
    wanted, changes, size = run
    for part in spread(changes, kills):
        with mounted() as drive:
            drive.room(part * size // changes)
            with fails("make room"):
                tune(drive.root / "out")
            drive.room(None)
            tune(drive.root / "out")
            assert files(drive.root / "out") == wanted, part


def test_what_is_safe_is_said(run) -> None:
    with mounted() as drive:
        out = drive.root / "out"

        def logger(line: dict) -> None:
            if line["step"] == 5:
                drive.gone_at(1)

        with pytest.raises(ParaJaxError) as error:
            tune(out, loggers=[logger])
        said = re.fullmatch(
            f"{out}/metrics.jsonl could not be written: {GONE}; check that its file system is mounted and run again "
            "with --resume; the checkpoint of step ([24]) is complete, and --resume continues from it",
            str(error.value),
        )
        assert said is not None, error.value
        drive.back()
        drive.room(100)
        with pytest.raises(ParaJaxError, match=r"the checkpoint of step [24] is complete, and --resume") as error:
            tune(out)
        assert FULL in str(error.value) and "make room" in str(error.value)
        drive.room(None)
        (resumed,) = [line for line in tune(out) if line.startswith("resuming after step")]
        assert int(resumed.split()[-1]) >= int(said[1])
        assert files(out) == run[0]


def test_two_processes_of_a_machine_are_kept_apart(capsys: pytest.CaptureFixture) -> None:
    with mounted() as drive, Claim(drive.root / "out", False, False) as claim:
        claim.begin({})
        words = "out is on a file system without locks; processes on other machines are not locked out"
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
        with (
            pytest.raises(ParaJaxError, match=r"another process \(process \d+ on .+\) is writing .*/out"),
            Claim(drive.root / "out", False, False),
        ):
            pass


def test_a_drive_that_is_not_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Nothing is written to the folder under it, which the mount would hide."""
    top = tmp_path / "content" / "drive"
    monkeypatch.setattr("para_jax.mounts.DRIVES", (str(top),))
    out = str(top / "MyDrive" / "out")
    (tmp_path / "in.jsonl").write_text(ASKED)
    wanted = (
        f"{out} is on Google Drive, which is not mounted; run `from google.colab import drive; drive.mount('{top}', "
        "force_remount=True)` in the notebook and run again\n"
    )
    for command in (
        ["finetune", "--tenant", f"a={tmp_path / 'in.jsonl'}", "--out", out],
        ["generate", "--input", str(tmp_path / "in.jsonl"), "--output", out],
        ["convert", "--out", out],
        ["quickstart", "--out", out],
    ):
        assert main(command) == 1
        assert capsys.readouterr().err == f"para-jax {command[0]}: {wanted}"
    for write in (an_adapter, a_backbone, a_file):
        with pytest.raises(ParaJaxError, match="not mounted"):
            write(Path(out), True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_google_drive_has_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted() as drive:
        monkeypatch.setattr("para_jax.mounts.DRIVES", (str(drive.root),))
        drive.room(0)
        with pytest.raises(ParaJaxError, match=r"left on device; nothing was written; make room on Google Drive \(its"):
            a_file(drive.root / "it", True)
        drive.gone_at(1)
        with pytest.raises(ParaJaxError, match=r"drive.mount\(.*, force_remount=True\)` in the notebook and run again"):
            a_file(drive.root / "it", True)


# Files and folders that replace others


@functools.cache
def adapter_of(seed: int) -> Adapter:
    return random_adapter(ParaConfig(r=2), SMALL, seed)


@functools.cache
def backbone_of(seed: int) -> Backbone:
    return random_backbone(num_hidden_layers=1, vocab_size=64, seed=seed)


def an_adapter(folder: Path, new: bool) -> None:
    save_adapter(adapter_of(int(new)), folder, SMALL, overwrite=True)


def a_backbone(folder: Path, new: bool) -> None:
    save_backbone(backbone_of(int(new)), folder, overwrite=True, shard_size=20_000)


def a_file(path: Path, new: bool) -> None:
    write_json(path, {"new": new})


def contents(path: Path) -> dict[str, bytes]:
    return files(path) if path.is_dir() else {"": path.read_bytes()} if path.exists() else {}


@pytest.mark.parametrize(
    ("write", "how"),
    [*itertools.product([an_adapter, a_backbone, a_file], ["gone", "lost", "full"]), (an_adapter, "killed")],
)
def test_what_is_replaced_or_what_replaces_it_is_there(
    write: Callable[[Path, bool], None], how: str, tmp_path: Path, kills: int
) -> None:
    """At its name, or, when it happens between two renames, at a hidden one beside it."""
    old, new = ((write(tmp_path / name, name == "new"), contents(tmp_path / name))[1] for name in ("old", "new"))
    with mounted() as drive:
        path = drive.root / "it"
        write(path, False)
        before = drive.changes
        write(path, True)
        for change in spread(drive.changes - before, kills // 3 if how == "killed" else 5 * kills):
            drive.empty()
            write(path, False)
            drive.settle()
            if how == "killed":
                drive.kill_at(change)
                code = f"from tests.laws.test_drive import {write.__name__} as write; from pathlib import Path"
                alone(f"{code}; write(Path(sys.argv[1]), True)", path)
            else:
                drive.room(change * 40) if how == "full" else drive.gone_at(change)
                with fails(FULL if how == "full" else GONE):
                    write(path, True)
            drive.room(None)
            drive.lose(seed=change) if how == "lost" else drive.back()
            found = [contents(each) for each in (path, *left_of(path))]
            if how != "lost":
                assert found[0] in (old, new, {}) and (found[0] or how != "full"), change
                # A single file is not worth a second copy of it while it is renamed.
                assert old in found or new in found or (write is a_file and drive.log[-1].startswith("rename")), change
            elif found[0] not in (old, new, {}):
                continue  # some of its files came and others did not, which it takes somebody to look at
            write(path, True)
            assert contents(path) == new, change


def test_an_adapter_that_is_gone_is_said_to_be_beside(tmp_path: Path) -> None:
    with mounted() as drive:
        path = drive.root / "it"
        an_adapter(path, False)
        done = drive.changes
        an_adapter(path, True)
        renames = [i for i, what in enumerate(drive.log[done:], 1) if what.startswith("rename")]
        drive.gone_at(renames[2])
        with pytest.raises(ParaJaxError, match=r"the old or the new folder is complete in .*previous or .*rename it"):
            an_adapter(path, True)
        drive.back()
        with pytest.raises(
            ParaJaxError, match=r"there is no folder .* A process that was killed while writing it left"
        ):
            load_adapter(path, SMALL)
        assert [load_adapter(each, SMALL).config.r for each in left_of(path)] == [2, 2]


# Answers

ASKED = "".join(json.dumps({"prompt": f"The old {word}"}) + "\n" for word in ("house river letter horse " * 5).split())


def answer(folder: Path, output: Path, how: str = "--resume") -> int:
    (folder / "in.jsonl").write_text(ASKED)
    options = ["--batch-size", "1", "--max-new-tokens", "2", how]
    return main(["generate", "--input", str(folder / "in.jsonl"), "--output", str(output), *options])


@pytest.mark.parametrize("how", ["gone", "lost", "full", "killed"])
def test_answers(how: str, tmp_path: Path, kills: int, capsys: pytest.CaptureFixture) -> None:
    assert answer(tmp_path, tmp_path / "out.jsonl") == 0
    wanted = (tmp_path / "out.jsonl").read_bytes()
    with mounted() as drive:
        output = drive.root / "out.jsonl"
        assert answer(tmp_path, output) == 0
        assert [path.name for path in drive.root.iterdir()] == ["out.jsonl"]
        changes = drive.changes
        for change in spread(changes, kills // 3 if how == "killed" else kills):
            drive.empty()
            if how == "killed":
                drive.kill_at(change)
                code = "from pathlib import Path; from tests.laws.test_drive import answer; sys.exit(answer"
                alone(f"{code}(Path(sys.argv[1]), Path(sys.argv[2])))", tmp_path, output)
            else:
                drive.room(change * 2 * len(wanted) // changes) if how == "full" else drive.gone_at(change)
                capsys.readouterr()
                if answer(tmp_path, output) != 0:
                    said = capsys.readouterr().err
                    assert (FULL if how == "full" else GONE) in said and "Traceback" not in said, said
                    assert "make room" in said or "mounted" in said, said
            drive.room(None)
            drive.lose(seed=change) if how == "lost" else drive.back()
            if answer(tmp_path, output) != 0:
                # What the answers are to was lost, and nothing is thrown away without being asked.
                assert how == "lost" and "says what" in capsys.readouterr().err
                assert answer(tmp_path, output, "--overwrite") == 0
            assert output.read_bytes() == wanted, change
