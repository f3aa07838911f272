"""The claim on a run's folder: one process writes it at a time, and an old run stays until the new one has a step."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from para_jax.adapters.weights import CONFIG
from para_jax.distributed import broadcast, on_main_process
from para_jax.errors import ParaJaxError
from para_jax.files import as_json, changes, left_of, remove, write_text
from para_jax.locks import Lock
from para_jax.mounts import check_mounted, explain_os_errors
from para_jax.training.checkpoints import read_run
from para_jax.training.folder import CHECKPOINTS, METRICS, RUN

LOCK = ".lock"


class Claim:
    """Holds the folder of a run during the run. Only the main process locks and changes the folder.

    A new run writes nothing but the lock before its first step is done (`commit`). A run that fails earlier leaves the
    folder as it was: missing, or with the run that `overwrite` would have replaced.
    """

    def __init__(self, out: Path, resume: bool, overwrite: bool):
        self.out, self.resume, self.overwrite = out.resolve(), resume, overwrite
        self._made = self._resumed = False
        self._lock: Lock | None = None
        self._description: dict[str, Any] = {}

    def __enter__(self) -> Claim:
        """Raises ParaJaxError if the folder cannot be used, or another process is writing it."""
        on_main_process(self._enter)
        return self

    def begin(self, description: dict[str, Any]) -> bool:
        """Whether the run in the folder is resumed. Raises ParaJaxError if that is another run."""
        self._description = description
        on_main_process(self._begin)
        self._resumed = broadcast(b"resumed" if self._resumed else b"") == b"resumed"
        return self._resumed

    def commit(self) -> None:
        """Call it after the first step. A new run then replaces what was in the folder."""
        if not self._resumed:
            on_main_process(self._commit)  # the others wait, so that what they write next is not removed

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()
        if kind is not None and self._made:
            with suppress(OSError):  # not empty, or removed already
                self.out.rmdir()

    def _enter(self) -> None:
        check_out(self.out, self.resume, self.overwrite)
        if self.out.exists():
            self._take_lock()

    def _begin(self) -> None:
        before = _run_in(self.out) if self.resume else None
        if before is None:
            with explain_os_errors(self.out, "choose another folder"):
                self._made = not self.out.exists()
                self.out.mkdir(parents=True, exist_ok=True)
                self._take_lock()
            # Again: another process may have created a run in the meantime.
            check_out(self.out, self.resume, self.overwrite)
            return
        if "weights_sha256" in before:  # a hash of the norm and eight rows of the embedding
            raise ParaJaxError(
                f"{self.out} holds a run of an earlier version of para_jax, which recorded only a few of the "
                "backbone's weights, so it cannot be checked that the weights are the same. Finish it with that "
                "version, or pass --overwrite"
            )
        if changed := list(changes(before, self._description)):
            listed = "; ".join(changed[:5])
            raise ParaJaxError(f"{self.out} holds another run, which cannot be resumed with these: {listed}")
        self._resumed = True
        if not (self.out / RUN).is_file():
            write_text(self.out / RUN, as_json(before))
        # What a killed process left half written, and incomplete adapters.
        for name in self._description.get("tenants", ()):
            folder = self.out / name
            for path in [*left_of(folder), *([] if (folder / CONFIG).is_file() else [folder])]:
                remove(path)

    def _commit(self) -> None:
        with explain_os_errors(self.out, "choose another folder"):
            # run.json last: without it the rest would not be recognized as a run.
            for path in sorted(self.out.iterdir(), key=lambda path: path.name == RUN):
                if path.name != LOCK:
                    remove(path)
            write_text(self.out / RUN, as_json(self._description))

    def _take_lock(self) -> None:
        if self._lock is None:
            with explain_os_errors(self.out / LOCK, "the run cannot be locked against other processes"):
                self._lock = Lock(self.out / LOCK, str(self.out))


def check_out(out: Path, resume: bool, overwrite: bool) -> None:
    """Raises ParaJaxError unless a run may start in this folder, or with `resume` continue."""
    check_mounted(out)
    if resume and overwrite:
        raise ParaJaxError("resume continues a run and overwrite replaces it; give one of them")
    if out.exists() and not out.is_dir():
        raise ParaJaxError(f"{out} is a file; choose a folder")
    if not (content := _content(out)) or (resume and (_run_in(out) is not None or content <= {METRICS, CHECKPOINTS})):
        return
    if not overwrite:
        way = "it holds no run to resume" if resume else "pass --resume to continue it"
        raise ParaJaxError(f"{out} exists; {way}, --overwrite to replace it, or choose another folder")
    if not (out / RUN).is_file():
        raise ParaJaxError(f"{out} holds no {RUN}, so it is no run to overwrite; remove it or choose another folder")


def _run_in(out: Path) -> dict[str, Any] | None:
    """The description of the run in a folder; None if there is no run."""
    path = out / RUN
    try:
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        # A machine that dies may lose run.json; checkpoints have a copy.
        return read_run(out / CHECKPOINTS)
    except ValueError as error:
        raise ParaJaxError(f"{path} is damaged ({error}), so the run cannot be resumed") from None


def _content(out: Path) -> set[str]:
    """The names in a run's folder. Hidden ones are left by killed processes and do not count."""
    return {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.exists() else set()
