"""Whose the folder of a run is: one process writes it at a time, and what it replaces stays until there is more."""

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
from para_jax.mounts import check_mounted, naming
from para_jax.training.checkpoints import described
from para_jax.training.folder import CHECKPOINTS, METRICS, RUN

LOCK = ".lock"


class Claim:
    """The folder of a run, while the run goes on; of several processes the first one locks and changes it.

    Nothing but the lock is written before a new run has done its first step (`settle`). So one that fails before that
    leaves what was there: nothing, or the run that `overwrite` is to replace.
    """

    def __init__(self, out: Path, resume: bool, overwrite: bool):
        self.out, self.resume, self.overwrite = out.resolve(), resume, overwrite
        self._made = self._resumed = False
        self._lock: Lock | None = None
        self._description: dict[str, Any] = {}

    def __enter__(self) -> Claim:
        """Raises ParaJaxError if the folder is not to be used, or another process writes it."""
        on_main_process(self._enter)
        return self

    def begin(self, description: dict[str, Any]) -> bool:
        """Whether a run is gone on with. Raises ParaJaxError unless it is this one, or a new one may begin."""
        self._description = description
        on_main_process(self._begin)
        self._resumed = broadcast(b"resumed" if self._resumed else b"") == b"resumed"
        return self._resumed

    def settle(self) -> None:
        """A new run has done its first step: the one that it replaces goes."""
        if not self._resumed:
            on_main_process(self._settle)  # in which the other processes wait: what they write next is not to go

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()
        if kind is not None and self._made:
            with suppress(OSError):  # there is something in it, or it is gone
                self.out.rmdir()

    def _enter(self) -> None:
        check_out(self.out, self.resume, self.overwrite)
        if self.out.exists():
            self._take_lock()

    def _begin(self) -> None:
        before = _run_in(self.out) if self.resume else None
        if before is None:
            with naming(self.out, "choose another folder"):
                self._made = not self.out.exists()
                self.out.mkdir(parents=True, exist_ok=True)
                self._take_lock()
            # Once more, because another process may have made a run since.
            check_out(self.out, self.resume, self.overwrite)
            return
        if "weights_sha256" in before:  # a hash of the norm and eight rows of the embedding
            raise ParaJaxError(
                f"{self.out} holds a run of an earlier version of para_jax, which noted only a few of the "
                "backbone's weights; whether these are the same is not known. Finish it with that version, or "
                "pass --overwrite"
            )
        if changed := list(changes(before, self._description)):
            listed = "; ".join(changed[:5])
            raise ParaJaxError(f"{self.out} holds another run, which cannot be resumed with these: {listed}")
        self._resumed = True
        if not (self.out / RUN).is_file():
            write_text(self.out / RUN, as_json(before))
        self._sweep()

    def _sweep(self) -> None:
        """Removes what a process that was killed had begun to write, and an adapter that came in part."""
        for name in self._description.get("tenants", ()):
            folder = self.out / name
            for path in [*left_of(folder), *([] if (folder / CONFIG).is_file() else [folder])]:
                remove(path)

    def _settle(self) -> None:
        with naming(self.out, "choose another folder"):
            # Last what makes it a run: half of one could not be told from anything else.
            for path in sorted(self.out.iterdir(), key=lambda path: path.name == RUN):
                if path.name != LOCK:
                    remove(path)
            write_text(self.out / RUN, as_json(self._description))

    def _take_lock(self) -> None:
        if self._lock is None:
            with naming(self.out / LOCK, "another process cannot be kept from writing this run"):
                self._lock = Lock(self.out / LOCK, str(self.out))


def check_out(out: Path, resume: bool, overwrite: bool) -> None:
    """Raises ParaJaxError unless a run may be begun in this folder, or with `resume` gone on with."""
    check_mounted(out)
    if resume and overwrite:
        raise ParaJaxError("resume goes on with a run and overwrite replaces it; give one of them")
    if out.exists() and not out.is_dir():
        raise ParaJaxError(f"{out} is a file; choose a folder")
    if not (content := _content(out)) or (resume and (_run_in(out) is not None or content <= {METRICS, CHECKPOINTS})):
        return
    if not overwrite:
        way = "it holds no run to resume" if resume else "pass --resume to go on with it"
        raise ParaJaxError(f"{out} exists; {way}, --overwrite to replace it, or choose another folder")
    if not (out / RUN).is_file():
        raise ParaJaxError(f"{out} holds no {RUN}, so it is no run to overwrite; remove it or choose another folder")


def _run_in(out: Path) -> dict[str, Any] | None:
    """What the run in a folder is a run of; None where there is none."""
    there = out / RUN
    try:
        if there.is_file():
            return json.loads(there.read_text(encoding="utf-8"))
        # It is lost with its machine, and the checkpoint is not.
        return described(out / CHECKPOINTS)
    except ValueError as error:
        raise ParaJaxError(f"{there} is damaged ({error}), so the run cannot be resumed") from None


def _content(out: Path) -> set[str]:
    """The files and folders of a run; hidden ones are what a process that was killed has left."""
    return {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.exists() else set()
