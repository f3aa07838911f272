"""Google Drive as tests have it: mounted, slow to show what was written, and soon full, gone or lost."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Drive:
    """A mounted file system (`cloud.Cloud`), served by a process of its own, and what is to happen to it.

    Changes are counted from one: a file is made, written to, cut off, closed, renamed (which is two), removed; a folder
    is made or removed. Looking changes nothing.
    """

    def __init__(self, root: Path, server: subprocess.Popen[str]):
        self.root, self._server = root, server

    def _ordered(self, **order: Any) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    @property
    def changes(self) -> int:
        """How many there were."""
        return int(self._ordered(get="changes"))

    @property
    def log(self) -> list[str]:
        """What they were."""
        return list(self._ordered(get="log"))

    @property
    def used(self) -> int:
        """How many bytes there are."""
        return int(self._ordered(get="used"))

    def empty(self) -> None:
        """All is as if it had just been mounted for the first time."""
        self._ordered(call=["empty"])

    def settle(self) -> None:
        """All that was written so far is in the cloud."""
        self._ordered(call=["arrive"])

    def kill_at(self, change: int) -> None:
        """Whoever makes so many changes from now on is killed in place of the last one."""
        self._ordered(set={"kill_at": self.changes + change})

    def gone_at(self, change: int) -> None:
        """From then on nothing works any more."""
        self._ordered(set={"gone_at": self.changes + change})

    def back(self) -> None:
        """It is there again, as it was left."""
        self._ordered(set={"gone_at": 0, "gone": False, "kill_at": 0})

    def room(self, more: int | None) -> None:
        """So many bytes more can be written; None: as many as you like."""
        self._ordered(set={"room": 1 << 40 if more is None else self.used + more})

    def lose(self, seed: int) -> None:
        """The machine is lost, and another one mounts what had arrived in the cloud."""
        self._ordered(call=["lose", seed])
        self.back()


@contextmanager
def mounted() -> Iterator[Drive]:
    """Mounts a new one, or fails: what it shows is not to be skipped."""
    with tempfile.TemporaryDirectory(prefix="para-jax-drive-") as folder:
        command = [sys.executable, "-m", "tests.drive.cloud", folder]
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with subprocess.Popen(command, text=True, cwd=Path(__file__).parents[2], **pipes) as server:
            assert server.stdin is not None and server.stdout is not None and server.stderr is not None
            if not server.stdout.readline():
                why = server.stderr.read().strip().splitlines()[-1]
                raise RuntimeError(
                    f"a FUSE file system cannot be mounted here ({why}). These tests need Linux with /dev/fuse and the "
                    "right to mount: root's, or the program fusermount3 (package fuse3); in a container --device "
                    "/dev/fuse --cap-add SYS_ADMIN"
                )
            try:
                yield Drive(Path(folder), server)
            finally:
                server.stdin.close()
                server.wait(timeout=30)
