"""The output file of `para-jax generate`: answered rows, in order, safe from kills and full disks."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from para_jax.errors import ParaJaxError
from para_jax.files import AppendFile, changes, json_line, remove, replacing, write_json
from para_jax.locks import Locked, open_locked
from para_jax.mounts import RESUME, check_mounted, explain_os_errors


class Answers:
    """OUTPUT.partial, which has the rows that are answered so far, and becomes OUTPUT when all rows are.

    OUTPUT.partial.json describes the inputs, so that --resume refuses to continue with other inputs.
    """

    def __init__(self, output: str | Path, rows: int, window: int):
        """For `rows` answers, which are written in windows. A window that is incomplete is answered again."""
        self.output, self.rows, self.window = Path(output).resolve(), rows, window
        self.partial = self.output.with_name(f"{self.output.name}.partial")
        self.inputs = self.output.with_name(f"{self.output.name}.partial.json")
        self.partial_files = (self.partial, self.inputs)
        self.done = 0
        self._lock: Locked | None = None
        self._file: AppendFile | None = None

    def check(self, resume: bool, overwrite: bool) -> None:
        """Raises ParaJaxError if answers exist and may be neither continued nor replaced."""
        if self.partial.exists() and not resume and not overwrite:
            raise ParaJaxError(
                f"{self.partial} holds the answers of a stopped run; continue with --resume, start again with "
                "--overwrite, or choose another --output"
            )
        if self.output.exists() and not overwrite and not resume:
            raise ParaJaxError(f"{self.output} exists; choose another --output or pass --overwrite")

    def open(self, inputs: dict[str, Any], resume: bool) -> None:
        """Opens the file, and with `resume` continues after the last complete window.

        Raises ParaJaxError for a file that cannot be written, or that has answers to other inputs.
        """
        check_mounted(self.output)
        inputs = json.loads(json.dumps(inputs))
        with explain_os_errors(self.partial, "nothing was answered"):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = open_locked(self.partial)
            except BlockingIOError:
                raise ParaJaxError(f"another process is writing {self.partial}") from None
            try:
                kept = self._check_inputs(inputs) if resume else 0
                self._file = AppendFile(self.partial, kept)  # from here on, the partial files may be removed
                if not kept:
                    write_json(self.inputs, inputs)
            except BaseException:
                self._lock.close()
                raise

    def _check_inputs(self, inputs: dict[str, Any]) -> int:
        """Sets `done` to the number of rows in complete windows, and returns their bytes.

        Raises ParaJaxError unless they are answers to these inputs.
        """
        if not self.inputs.exists():
            if self.partial.stat().st_size:
                raise ParaJaxError(
                    f"{self.inputs}, which describes the inputs of {self.partial}, is missing; move the answers "
                    "elsewhere, and start again with --overwrite"
                )
            return 0
        changed = list(changes(_read(self.inputs), inputs))
        if changed:
            raise ParaJaxError(
                f"{self.partial} holds answers to other inputs: {'; '.join(changed[:5])}; give the same rows and "
                "options, or start again with --overwrite"
            )
        ends = [0]
        for line in self.partial.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                ends.append(ends[-1] + len(line))
        lines = min(len(ends) - 1, self.rows)
        self.done = lines if lines == self.rows else lines // self.window * self.window
        return ends[self.done]

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Appends a window. Raises ParaJaxError if the disk is full; earlier answers are kept."""
        assert self._file is not None
        with explain_os_errors(self.partial, f"the first {self.done} answers are saved", RESUME):
            self._file.write("".join(map(json_line, rows)).encode())
            self._file.reopen()
        self.done += len(rows)

    def finish(self) -> None:
        """Copies all answers to the output, because a rename may lose them, and removes the partial files."""
        assert self._file is not None
        safe = f"all answers are in {self.partial}"
        with explain_os_errors(self.output, safe, RESUME):
            self._file.close()
            with replacing(self.output, safe, RESUME) as file, self.partial.open("rb") as answers:
                shutil.copyfileobj(answers, file)
            for path in self.partial_files:
                remove(path)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Removes the partial files of a run without answers. Ctrl-C reports where the answers are."""
        if self._file is None:
            return
        with suppress(OSError):
            self._file.close()
        if self._lock is not None:
            with suppress(OSError):
                self._lock.close()
        if not self.done:
            for path in self.partial_files:
                remove(path)
        elif kind is KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; {self.done} answers are in {self.partial}, and --resume continues")

    def finished(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Whether OUTPUT has answers to exactly these rows."""
        try:
            lines = self.output.read_text(encoding="utf-8").split("\n")[:-1]
            answered = [json.loads(line) for line in lines]
        except ValueError:
            return False
        return [_without_answer(row) for row in answered] == [_without_answer(row) for row in rows]


ANSWER = ("text", "finish_reason")


def _without_answer(row: Any) -> Any:
    return {key: row[key] for key in row if key not in ANSWER} if isinstance(row, dict) else row


def digest(values: Sequence[Any]) -> str:
    """A hash of JSON values.

    >>> digest([{"prompt": "a"}]) == digest([{"prompt": "a"}]) != digest([])
    True
    """
    found = hashlib.sha256()
    for value in values:
        found.update(json_line(value).encode())
    return found.hexdigest()


def stamps(folder: Path, *patterns: str) -> dict[str, list[int]]:
    """Sizes and modification times of files in a folder, a quick identification of a model or adapter."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ParaJaxError(f"{path} is damaged ({error}); start again with --overwrite") from None
