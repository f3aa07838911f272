"""Whose the folder of a run is: one process writes it at a time, and what it replaces stays until there is more."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from para_jax.distributed import by_first, first
from para_jax.errors import ParaJaxError
from para_jax.files import Lock, changes, naming, write_text
from para_jax.training.folder import CHECKPOINTS, METRICS, RUN

LOCK = ".lock"


class Claim:
    """The folder of a run, while the run goes on; of several processes the first one locks and changes it.

    A run that `overwrite` replaces is put aside, and goes when the new run has done its first step (`settle`). If the
    new run fails before that, nothing of it stays, and the old one takes its place again.
    """

    def __init__(self, out: Path, resume: bool, overwrite: bool):
        self.out, self.resume, self.overwrite = out.resolve(), resume, overwrite
        self._new = self._moved = False  # until the first step: whether the folder is ours, and whose place it has
        self._lock: Lock | None = None

    @property
    def aside(self) -> Path:
        """Where a run is that this one replaces."""
        return self.out.with_name(f".{self.out.name}-replaced")

    def __enter__(self) -> Claim:
        """Raises ParaJaxError if the folder is not to be used, or another process writes it."""
        by_first(self._enter)
        return self

    def begin(self, description: dict[str, Any]) -> None:
        """Makes the folder of a new run, or raises ParaJaxError unless the one to resume is this one."""
        by_first(lambda: self._begin(description))

    def settle(self) -> None:
        """The first step is done: the run that was replaced goes."""
        self._new = self._moved = False
        if first():
            shutil.rmtree(self.aside, ignore_errors=True)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._unlock()
        if kind is not None and self._new:
            shutil.rmtree(self.out, ignore_errors=True)
        if kind is not None and self._moved:
            os.replace(self.aside, self.out)

    def _enter(self) -> None:
        check_out(self.out, self.resume, self.overwrite)
        if self.out.exists():
            self._take_lock()

    def _begin(self, description: dict[str, Any]) -> None:
        there = self.out / RUN
        if self.resume and there.is_file():
            try:
                before = json.loads(there.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ParaJaxError(f"{there} is damaged ({error}), so the run cannot be resumed") from None
            if "weights_sha256" in before:  # a hash of the norm and eight rows of the embedding
                raise ParaJaxError(
                    f"{self.out} holds a run of an earlier version of para_jax, which noted only a few of the "
                    "backbone's weights; whether these are the same is not known. Finish it with that version, or "
                    "pass --overwrite"
                )
            changed = list(changes(before, description))
            if changed:
                listed = "; ".join(changed[:5])
                raise ParaJaxError(f"{self.out} holds another run, which cannot be resumed with these: {listed}")
            self._sweep()
            return
        # Once more, because another process may have made it since.
        check_out(self.out, self.resume, self.overwrite)
        with naming(self.out, "choose another folder, or make room"):
            if _content(self.out):
                self._put_aside()
            self.out.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if _content(self.out):
                raise ParaJaxError(f"another process is writing {self.out}")
            self._new = True
            write_text(there, json.dumps(description, indent=1) + "\n")

    def _sweep(self) -> None:
        """Removes what a process that was killed had begun to write: an adapter's folder that has no name yet."""
        for path in self.out.glob(".*-????????"):
            if re.fullmatch(r"\..+-[0-9a-f]{8}", path.name) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)

    def _put_aside(self) -> None:
        """Keeps the run that is in the folder, or the one before it if that one was stopped before its first step."""
        self._unlock()
        if self.aside.exists() and not _stepped(self.out):
            shutil.rmtree(self.out)
        else:
            if self.aside.exists():
                shutil.rmtree(self.aside)
            os.replace(self.out, self.aside)
        self._moved = True

    def _take_lock(self) -> None:
        if self._lock is None:
            with naming(self.out / LOCK, "another process cannot be kept from writing this run"):
                self._lock = Lock(self.out / LOCK, str(self.out))

    def _unlock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()


def check_out(out: Path, resume: bool, overwrite: bool) -> None:
    """Raises ParaJaxError unless a run may be begun in this folder, or with `resume` gone on with."""
    if resume and overwrite:
        raise ParaJaxError("resume goes on with a run and overwrite replaces it; give one of them")
    if out.exists() and not out.is_dir():
        raise ParaJaxError(f"{out} is a file; choose a folder")
    if not _content(out) or (resume and (out / RUN).is_file()):
        return
    if not overwrite:
        way = "it holds no run to resume" if resume else "pass --resume to go on with it"
        aside = out.with_name(f".{out.name}-replaced")
        more = f". The run that it replaces is still in {aside}" if aside.exists() and not _stepped(out) else ""
        raise ParaJaxError(f"{out} exists; {way}, --overwrite to replace it, or choose another folder{more}")
    if not (out / RUN).is_file():
        raise ParaJaxError(f"{out} holds no {RUN}, so it is no run to overwrite; remove it or choose another folder")


def _content(out: Path) -> bool:
    return out.exists() and any(path.name != LOCK for path in out.iterdir())


def _stepped(out: Path) -> bool:
    """Whether a run has done a step."""
    metrics, checkpoints = out / METRICS, out / CHECKPOINTS
    written = metrics.is_file() and metrics.stat().st_size > 0
    return written or (checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir()))
