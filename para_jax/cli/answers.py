"""The file that `para-jax generate` writes: answered rows in order, as they come, kept through kills and full disks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from para_jax.errors import ParaJaxError
from para_jax.files import RESUME, append, changes, json_line, naming, open_locked, write_json


class Answers:
    """OUTPUT.partial, which holds the rows that are answered so far and becomes OUTPUT when all are.

    OUTPUT.partial.json says what they are answers to, so that another command does not go on with them.
    """

    def __init__(self, output: str | Path, rows: int, window: int):
        """For `rows` answers; `window` of them are written at once, and are redone if they are not all there."""
        self.output, self.rows, self.window = Path(output).resolve(), rows, window
        self.partial = self.output.with_name(f"{self.output.name}.partial")
        self.about = self.output.with_name(f"{self.output.name}.partial.json")
        self.beside = (self.partial, self.about)
        self.done = 0
        self._file: IO[bytes] | None = None

    def check(self, resume: bool, overwrite: bool) -> None:
        """Raises ParaJaxError for answers that are there and are neither to be gone on with nor to be replaced."""
        if self.partial.exists() and not resume and not overwrite:
            raise ParaJaxError(
                f"{self.partial} holds the answers of a run that was stopped; go on with --resume, begin again with "
                "--overwrite, or choose another --output"
            )
        if self.output.exists() and not overwrite and not resume:
            raise ParaJaxError(f"{self.output} exists; choose another --output or pass --overwrite")

    def open(self, about: dict[str, Any], resume: bool) -> None:
        """Begins, or goes on behind the last window that is whole.

        Raises ParaJaxError for a file that cannot be written, or holds answers to something else.
        """
        about = json.loads(json.dumps(about))
        with naming(self.partial, "nothing was answered"):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            try:
                file = open_locked(self.partial)
            except BlockingIOError:
                raise ParaJaxError(f"another process is writing {self.partial}") from None
            try:
                whole = self._whole(about) if resume and self.about.exists() else 0
                file.truncate(whole)
                write_json(self.about, about)
            except BaseException:
                file.close()
                raise
        self._file = file  # from here on what is there is ours to remove

    def _whole(self, about: dict[str, Any]) -> int:
        """The bytes of the windows that are whole. Raises ParaJaxError unless they are answers to this."""
        changed = list(changes(_read(self.about), about))
        if changed:
            raise ParaJaxError(
                f"{self.partial} holds answers to something else: {'; '.join(changed[:5])}; give the same rows and "
                "options, or begin again with --overwrite"
            )
        return self._kept()

    def _kept(self) -> int:
        """The bytes of the windows that are whole; notes how many rows they are."""
        ends = [0]
        for line in self.partial.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                ends.append(ends[-1] + len(line))
        lines = min(len(ends) - 1, self.rows)
        self.done = lines if lines == self.rows else lines // self.window * self.window
        return ends[self.done]

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Appends a window. Raises ParaJaxError if the disk is full; what is there stays."""
        assert self._file is not None
        with naming(self.partial, f"the first {self.done} answers are there; {RESUME}"):
            append(self._file, "".join(map(json_line, rows)).encode())
        self.done += len(rows)

    def finish(self) -> None:
        """All are there: the file takes the output's name."""
        assert self._file is not None
        with naming(self.output, f"all answers are in {self.partial}"):
            os.fsync(self._file.fileno())
            os.replace(self.partial, self.output)
            self.about.unlink()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Nothing is left of a run that has answered nothing. Ctrl-C says where the others are."""
        if self._file is None:
            return
        self._file.close()
        if not self.done:
            for path in self.beside:
                path.unlink(missing_ok=True)
        elif kind is KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; {self.done} answers are in {self.partial}, and --resume goes on")

    def finished(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Whether OUTPUT has an answer to each of these rows."""
        try:
            lines = self.output.read_text(encoding="utf-8").split("\n")[:-1]
            answered = [json.loads(line) for line in lines]
        except ValueError:
            return False
        return [_asked(row) for row in answered] == [_asked(row) for row in rows]


ANSWER = ("text", "finish_reason")


def _asked(row: Any) -> Any:
    return {key: row[key] for key in row if key not in ANSWER} if isinstance(row, dict) else row


def digest(values: Sequence[Any]) -> str:
    """A hash of values that JSON can write.

    >>> digest([{"prompt": "a"}]) == digest([{"prompt": "a"}]) != digest([])
    True
    """
    found = hashlib.sha256()
    for value in values:
        found.update(json_line(value).encode())
    return found.hexdigest()


def stamps(folder: Path, *patterns: str) -> dict[str, list[int]]:
    """Size and time of change of the files of a folder, which tell one model or adapter from another quickly."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ParaJaxError(f"{path} is damaged ({error}); begin again with --overwrite") from None
