"""FUSE's kernel protocol, as much of it as a file system for tests needs (linux/fuse.h, version 7.31).

It is spoken here, without libfuse, so that a bare clone with pip can mount: /dev/fuse and mount(2) are the kernel's.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import stat
import struct
import subprocess
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

DEVICE = "/dev/fuse"
HELPER = shutil.which("fusermount3") or shutil.which("fusermount")  # for those who may not mount
LARGEST = 1 << 17  # bytes of a write
FLOCK_LOCKS, POSIX_LOCKS, BIG_WRITES = 1 << 10, 1 << 1, 1 << 5

HEADER = struct.Struct("<IIQQIIII")  # length, opcode, unique, node, uid, gid, pid
ANSWER = struct.Struct("<IiQ")
LOOKUP, FORGET, INIT, INTERRUPT, DESTROY, BATCH_FORGET = 1, 2, 26, 36, 38, 42
SILENT = (FORGET, INTERRUPT, BATCH_FORGET)


class Found(Protocol):
    """A file or folder, as a file system gives it to the kernel."""

    number: int
    folder: bool

    @property
    def size(self) -> int: ...


class Fails(Exception):
    """An operation's answer is this error."""

    def __init__(self, number: int):
        super().__init__(os.strerror(number))
        self.number = number


def mount(folder: str) -> int:
    """Mounts a file system there and returns what to read requests from. Raises OSError where that is not possible."""
    try:
        return _mounted(folder)
    except OSError:
        if HELPER is None:
            raise
        return _mounted_by(HELPER, folder)


def _mounted(folder: str) -> int:
    device = os.open(DEVICE, os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},default_permissions"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"drive", os.fsencode(folder), b"fuse", 0, options.encode()) != 0:
        os.close(device)
        raise OSError(ctypes.get_errno(), f"mount: {os.strerror(ctypes.get_errno())}, and there is no fusermount3")
    return device


def _mounted_by(helper: str, folder: str) -> int:
    """What somebody who may not mount gets from the helper that may."""
    ours, its = socket.socketpair()
    with ours, its:
        environment = {**os.environ, "_FUSE_COMMFD": str(its.fileno())}
        subprocess.run([helper, "--", folder], pass_fds=[its.fileno()], env=environment, check=True)
        _, (device, *_), _, _ = socket.recv_fds(ours, 1, 1)
    return device


def unmount(folder: str) -> None:
    detach = 2
    if ctypes.CDLL(None).umount2(os.fsencode(folder), detach) != 0 and HELPER is not None:
        subprocess.run([HELPER, "-uz", folder], check=False, capture_output=True)


def attributes(found: Found) -> bytes:
    kind, links = (stat.S_IFDIR | 0o755, 2) if found.folder else (stat.S_IFREG | 0o644, 1)
    times = (0,) * 6
    rest = kind, links, os.getuid(), os.getgid(), 0, 4096, 0
    return struct.pack("<3Q3Q3I7I", found.number, found.size, -(-found.size // 512), *times, *rest)


def entry(found: Found) -> bytes:
    """A name's answer. The kernel is to ask again each time: names come and go here."""
    return struct.pack("<4QII", found.number, 0, 0, 0, 0, 0) + attributes(found)


def attr(found: Found) -> bytes:
    return struct.pack("<QII", 0, 0, 0) + attributes(found)


def opened(handle: int) -> bytes:
    return struct.pack("<QII", handle, 0, 0)


def listing(found: list[tuple[str, Found]], offset: int, room: int) -> bytes:
    """As many names of a folder, from `offset` on, as there is room for."""
    made = b""
    for place, (name, of) in enumerate(found[offset:], offset + 1):
        raw = name.encode()
        kind = (stat.S_IFDIR if of.folder else stat.S_IFREG) >> 12
        line = struct.pack("<QQII", of.number, place, len(raw), kind) + raw
        line += bytes(-len(line) % 8)
        if len(made) + len(line) > room:
            break
        made += line
    return made


def names(data: bytes) -> list[str]:
    return [part.decode() for part in data.split(b"\0")[:-1]]


class Requests:
    """Reads the kernel's requests and answers them by `handle(opcode, node, body, pid)`, which may raise Fails."""

    def __init__(self, device: int, handle: Callable[[int, int, bytes, int], bytes]):
        self.device, self.handle = device, handle

    def serve(self) -> bool:
        """Answers one request; False when the file system is no longer mounted."""
        try:
            request = os.read(self.device, LARGEST + 4096)
        except OSError as error:
            return error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT)
        _, opcode, unique, node, _, _, pid, _ = HEADER.unpack_from(request)
        body = request[HEADER.size :]
        if opcode in SILENT:
            return True
        if opcode == INIT:
            self._answer(unique, self._begun(body))
            return True
        try:
            self._answer(unique, self.handle(opcode, node, body, pid))
        except Fails as fails:
            self._answer(unique, b"", -fails.number)
        return opcode != DESTROY

    def _begun(self, body: bytes) -> bytes:
        major, _, ahead, offered = struct.unpack_from("<4I", body)
        flags = offered & (FLOCK_LOCKS | POSIX_LOCKS | BIG_WRITES)
        sizes: tuple[Any, ...] = (16, 12, LARGEST, 1, LARGEST >> 12, 0, 0)
        return struct.pack("<4I2H2I2HI", major, 31, ahead, flags, *sizes) + bytes(28)

    def _answer(self, unique: int, body: bytes, error: int = 0) -> None:
        with suppress(FileNotFoundError):  # whoever asked was killed
            os.write(self.device, ANSWER.pack(ANSWER.size + len(body), error, unique) + body)
