"""The file that `para-jax generate` writes: answered rows in order, as they come, kept through kills and full disks."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from para_jax.errors import ParaJaxError
from para_jax.files import Growing, changes, json_line, remove, replacing, write_json
from para_jax.locks import Locked, open_locked
from para_jax.mounts import RESUME, check_mounted, naming


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
        self._lock: Locked | None = None
        self._file: Growing | None = None

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
        check_mounted(self.output)
        about = json.loads(json.dumps(about))
        with naming(self.partial, "nothing was answered"):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = open_locked(self.partial)
            except BlockingIOError:
                raise ParaJaxError(f"another process is writing {self.partial}") from None
            try:
                whole = self._whole(about) if resume else 0
                self._file = Growing(self.partial, whole)  # from here on what is there is ours to remove
                if not whole:
                    write_json(self.about, about)
            except BaseException:
                self._lock.close()
                raise

    def _whole(self, about: dict[str, Any]) -> int:
        """The bytes of the windows that are whole. Raises ParaJaxError unless they are answers to this."""
        if not self.about.exists():
            if self.partial.stat().st_size:
                raise ParaJaxError(
                    f"{self.about} is gone, which says what {self.partial} holds answers to; keep these elsewhere, and "
                    "begin again with --overwrite"
                )
            return 0
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
        with naming(self.partial, f"the first {self.done} answers are there", RESUME):
            self._file.write("".join(map(json_line, rows)).encode())
            self._file.settle()
        self.done += len(rows)

    def finish(self) -> None:
        """All are there: they are copied to the output, for a rename may lose them, and are then removed."""
        assert self._file is not None
        safe = f"all answers are in {self.partial}"
        with naming(self.output, safe, RESUME):
            self._file.close()
            with replacing(self.output, safe, RESUME) as file, self.partial.open("rb") as all_of_them:
                shutil.copyfileobj(all_of_them, file)
            for path in self.beside:
                remove(path)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Nothing is left of a run that has answered nothing. Ctrl-C says where the others are."""
        if self._file is None:
            return
        with suppress(OSError):
            self._file.close()
        if self._lock is not None:
            with suppress(OSError):
                self._lock.close()
        if not self.done:
            for path in self.beside:
                remove(path)
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
