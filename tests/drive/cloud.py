"""A file system as Google Drive's is, or worse. Run as a program it mounts itself and takes its orders as JSON lines.

What a machine sees: links, locks and fsync fail. What was closed or renamed can be found only some operations later;
who makes a file of its name before that replaces it. A rename removes both names first and then adds the new one.

What is left when the machine is lost is the cloud. A file's new version gets there after the file was closed, some
changes later, each file by itself.
"""

from __future__ import annotations

import errno
import json
import os
import random
import select
import signal
import struct
import sys
from typing import Any

from tests.drive.fuse import Fails, Requests, attr, entry, listing, mount, names, opened, unmount

ROOT = 1
Version = tuple["Node | None", str, bytes] | None  # a folder, a name in it, and contents; None: it is gone


class Node:
    """A file or a folder: what the machine sees of it, what the cloud has, and what is on its way there."""

    def __init__(self, number: int, folder: bool):
        self.number, self.folder = number, folder
        self.parent: Node | None = None
        self.name, self.data = "", bytearray()
        self.hidden = self.handles = 0  # until which operation it cannot be found; who has it open
        self.changed = False
        self.cloud: Version = None
        self.sent: list[tuple[int, Version]] = []

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def version(self) -> Version:
        return None if self.parent is None else (self.parent, self.name, bytes(self.data))


class Cloud:
    """Attributes that tests set: see `Drive` in drive.py."""

    def __init__(self) -> None:
        self.made_so_far = ROOT
        self.empty()

    def empty(self) -> None:
        """All is as at the beginning."""
        self.nodes = {ROOT: Node(ROOT, True)}
        self.operations = self.changes = 0
        self.late, self.upload = 5, 12
        self.room = 1 << 40
        self.kill_at = self.gone_at = 0
        self.gone = False
        self.log: list[str] = []

    # What changes is counted, and may be the last that happens

    def change(self, what: str, pid: int) -> None:
        """Another change is about to be made. Raises Fails if it is not."""
        self.changes += 1
        self.log.append(what)
        if pid and 0 < self.kill_at <= self.changes and pid != os.getppid():
            self.kill_at = 0
            os.kill(pid, signal.SIGKILL)
            raise Fails(errno.EIO)
        if 0 < self.gone_at <= self.changes:
            self.gone = True
            raise Fails(errno.ENOTCONN)
        for node in self.nodes.values():
            while node.sent and node.sent[0][0] + self.upload <= self.changes:
                node.cloud = node.sent.pop(0)[1]

    def send(self, node: Node) -> None:
        node.sent.append((self.changes, node.version))
        node.changed = False

    def arrive(self) -> None:
        """All that is on its way to the cloud gets there."""
        for node in self.nodes.values():
            if node.sent:
                node.cloud, node.sent = node.sent[-1][1], []

    def lose(self, seed: int) -> None:
        """The machine is gone, and what was on its way got there or did not, each file by itself."""
        chance = random.Random(seed)
        for node in self.nodes.values():
            arrived = node.sent[: chance.randint(0, len(node.sent))]
            node.cloud = arrived[-1][1] if arrived else node.cloud
            node.sent, node.hidden, node.handles, node.changed = [], 0, 0, False
            node.parent, node.name, data = node.cloud or (None, "", b"")
            node.data = bytearray(data)
        self.nodes = {number: node for number, node in self.nodes.items() if number == ROOT or self._reaches(node)}

    def _reaches(self, node: Node | None) -> bool:
        while node is not None and node.number != ROOT:
            node = node.parent
        return node is not None

    # Names

    def children(self, folder: Node) -> list[Node]:
        return [node for node in self.nodes.values() if node.parent is folder]

    def seen(self, node: Node) -> bool:
        return node.handles > 0 or node.hidden <= self.operations

    def find(self, folder: int, name: str, all_of_it: bool = False) -> Node:
        """Raises Fails if there is none; with `all_of_it` one that is late counts."""
        for node in self.children(self.nodes[folder]):
            if node.name == name and (all_of_it or self.seen(node)):
                return node
        raise Fails(errno.ENOENT)

    def made(self, folder: int, name: str, is_folder: bool) -> Node:
        for late in self.children(self.nodes[folder]):
            if late.name == name:  # it was there already, and whoever makes it did not wait
                late.parent = None
        self.made_so_far += 1
        node = Node(self.made_so_far, is_folder)
        node.parent, node.name = self.nodes[folder], name
        self.nodes[node.number] = node
        return node

    def vanish(self, node: Node) -> None:
        node.parent = None
        self.send(node)

    # Requests

    def handle(self, opcode: int, number: int, body: bytes, pid: int) -> bytes:
        self.operations += 1
        if self.gone:
            raise Fails(errno.ENOTCONN)
        method = HANDLERS.get(opcode)
        if method is None:
            raise Fails(errno.ENOSYS)
        if number not in self.nodes:
            raise Fails(errno.ESTALE)
        return method(self, number, body, pid)

    def lookup(self, number: int, body: bytes, pid: int) -> bytes:
        return entry(self.find(number, names(body)[0]))

    def getattr(self, number: int, body: bytes, pid: int) -> bytes:
        return attr(self.nodes[number])

    def setattr(self, number: int, body: bytes, pid: int) -> bytes:
        valid, _, _, size = struct.unpack_from("<IIQQ", body)
        node, of_size = self.nodes[number], 8
        if valid & of_size:
            self.change(f"truncate {node.name}", pid)
            self._check_room(size - node.size)
            node.data[size:] = bytes(max(0, size - node.size))
            node.changed = True
            if not node.handles:
                self.send(node)
        return attr(node)

    def mkdir(self, number: int, body: bytes, pid: int) -> bytes:
        name = names(body[8:])[0]
        self.change(f"mkdir {name}", pid)
        node = self.made(number, name, True)
        self.send(node)
        return entry(node)

    def create(self, number: int, body: bytes, pid: int) -> bytes:
        name = names(body[16:])[0]
        self.change(f"create {name}", pid)
        node = self.made(number, name, False)
        node.handles, node.changed = 1, True
        return entry(node) + opened(node.number)

    def open(self, number: int, body: bytes, pid: int) -> bytes:
        self.nodes[number].handles += 1
        return opened(number)

    def read(self, number: int, body: bytes, pid: int) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        return bytes(self.nodes[number].data[offset : offset + size])

    def write(self, number: int, body: bytes, pid: int) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        node = self.nodes[number]
        self.change(f"write {node.name}", pid)
        self._check_room(offset + size - node.size)
        node.data[node.size :] = bytes(max(0, offset - node.size))
        node.data[offset : offset + size] = body[40 : 40 + size]
        node.changed = True
        return struct.pack("<II", size, 0)

    def _check_room(self, more: int) -> None:
        if more > 0 and self.used + more > self.room:
            raise Fails(errno.ENOSPC)

    @property
    def used(self) -> int:
        return sum(node.size for node in self.nodes.values() if node.parent is not None)

    def release(self, number: int, body: bytes, pid: int) -> bytes:
        node = self.nodes[number]
        node.handles -= 1
        if node.changed and not node.handles:
            self.change(f"close {node.name}", 0)
            node.hidden = self.operations + self.late
            self.send(node)
        return b""

    def unlink(self, number: int, body: bytes, pid: int) -> bytes:
        node = self.find(number, names(body)[0])
        self.change(f"unlink {node.name}", pid)
        if self.children(node):
            raise Fails(errno.ENOTEMPTY)
        self.vanish(node)
        return b""

    def rename(self, number: int, body: bytes, pid: int) -> bytes:
        (target,) = struct.unpack_from("<Q", body)
        old, new = names(body[8:])
        node = self.find(number, old)
        self.change(f"rename {old}", pid)
        there = [of for of in self.children(self.nodes[target]) if of.name == new and of is not node]
        if any(self.children(of) for of in there):
            raise Fails(errno.ENOTEMPTY)
        for of in there:
            self.vanish(of)
        self.vanish(node)
        self.change(f"rename to {new}", pid)
        node.hidden = self.operations + self.late
        node.parent, node.name = self.nodes[target], new
        self.send(node)
        return b""

    def readdir(self, number: int, body: bytes, pid: int) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        found = [(node.name, node) for node in self.children(self.nodes[number]) if self.seen(node)]
        return listing(found, offset, size)

    def statfs(self, number: int, body: bytes, pid: int) -> bytes:
        block = 1
        left = max(0, self.room - self.used)
        return struct.pack("<5Q4I", self.room, left, left, 1 << 20, 1 << 20, block, 255, block, 0) + bytes(24)

    def opendir(self, number: int, body: bytes, pid: int) -> bytes:
        return opened(0)

    def nothing(self, number: int, body: bytes, pid: int) -> bytes:
        return b""

    def fsync(self, number: int, body: bytes, pid: int) -> bytes:
        raise Fails(errno.EINVAL)

    def flock(self, number: int, body: bytes, pid: int) -> bytes:
        raise Fails(errno.ENOTSUP)

    def link(self, number: int, body: bytes, pid: int) -> bytes:
        raise Fails(errno.EPERM)


HANDLERS: dict[int, Any] = {
    1: Cloud.lookup, 3: Cloud.getattr, 4: Cloud.setattr, 9: Cloud.mkdir, 10: Cloud.unlink, 11: Cloud.unlink,
    12: Cloud.rename, 13: Cloud.link, 14: Cloud.open, 15: Cloud.read, 16: Cloud.write, 17: Cloud.statfs,
    18: Cloud.release, 20: Cloud.fsync, 25: Cloud.nothing, 27: Cloud.opendir, 28: Cloud.readdir,
    29: Cloud.nothing, 30: Cloud.fsync, 31: Cloud.flock, 32: Cloud.flock, 33: Cloud.flock, 35: Cloud.create,
}  # fmt: skip


def main(folder: str) -> None:
    """Serves until nobody gives orders any more. An order is {"set": {...}}, {"get": NAME} or {"call": [NAME, ...]}."""
    cloud, device = Cloud(), mount(folder)
    requests = Requests(device, cloud.handle)
    print(json.dumps("mounted"), flush=True)
    try:
        while True:
            ready, _, _ = select.select([device, sys.stdin], [], [])
            if device in ready and not requests.serve():
                return
            if sys.stdin in ready:
                line = sys.stdin.readline()
                if not line:
                    return
                order = json.loads(line)
                answer = getattr(cloud, order["get"]) if "get" in order else None
                for name, value in order.get("set", {}).items():
                    setattr(cloud, name, value)
                if "call" in order:
                    name, *given = order["call"]
                    answer = getattr(cloud, name)(*given)
                print(json.dumps(answer), flush=True)
    finally:
        unmount(folder)


if __name__ == "__main__":
    main(sys.argv[1])
