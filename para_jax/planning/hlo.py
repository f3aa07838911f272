"""Reads the collectives, and the large buffers that loops write, from the HLO text of a compiled program.

Sent bytes are those of ring algorithms on n devices. A device sends (n - 1) / n of the result of an all-gather or
all-to-all, 2 (n - 1) / n of the result of an all-reduce, and n - 1 times the result of a reduce-scatter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_PLACED = re.compile(_SHAPE.pattern + r"(\{[^}]*\})?")
_ON_CHIP = "S(1)"  # in a layout: not in the device's main memory
_LARGE = 2**20  # entries
_VIEWS = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "dynamic-update-slice"}
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      count: how often it runs.
      sent: bytes that a device sends in one run.
      devices: the size of the group of devices.
      where: the name of the operation that it comes from.
    """

    kind: str
    count: int
    sent: int
    devices: int
    where: str = ""


@dataclass(frozen=True)
class _Instruction:
    name: str
    root: bool
    result: str
    op: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

    @property
    def constant(self) -> int | None:
        found = re.match(r"(\d+)\)", self.rest) if self.op == "constant" else None
        return int(found[1]) if found else None

    def attribute(self, name: str) -> str:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of an optimized HLO module for a number of devices. Loops count every iteration.

    A loop with a data-dependent end, such as the token loop, counts one iteration.
    """
    computations, entry = _parse(text)
    return list(_walk(computations, entry, devices, set()))


def loop_bytes_written(text: str) -> int:
    """Bytes of large buffers that the loops of an optimized HLO module write to the device's main memory in one run.

    A buffer is large from 2**20 entries; in-place updates do not count. Iterations count as in `collectives`. If a
    decode step writes none, it reads each weight in its stored form.
    """
    computations, entry = _parse(text)
    return _written(computations, entry, looping=False)


def _written(computations: dict[str, list[_Instruction]], name: str, looping: bool) -> int:
    found = 0
    for one in computations.get(name, []):
        if one.op == "while":
            found += _trips(computations, one) * _written(computations, one.attribute("body"), looping=True)
        elif branches := _BRANCHES.search(one.rest):
            found += max(_written(computations, b.strip(" %"), looping) for b in branches[1].split(","))
        elif one.op == "call":
            found += _written(computations, one.attribute("to_apply"), looping)
        elif looping and one.op not in _VIEWS and not one.op.endswith("-start"):
            inside = computations.get(one.attribute("calls"), []) if one.op == "fusion" else []
            if not any(part.op == "dynamic-update-slice" for part in inside):
                results = [x for x in _PLACED.findall(one.result) if _ON_CHIP not in x[3]]
                sizes = [(bits, dims) for _, bits, dims, _ in results if _entries(dims) >= _LARGE]
                found += sum(_bytes(*size) for size in sizes)
    return found


def total(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """The number of collectives and the bytes that a device sends, by kind.

    >>> total([Collective("all-reduce", 32, 100, 8), Collective("all-reduce", 1, 8, 8)])
    {'all-reduce': {'count': 33, 'bytes': 3208}}
    """
    totals: dict[str, dict[str, int]] = {}
    for one in found:
        kind = totals.setdefault(one.kind, {"count": 0, "bytes": 0})
        kind["count"] += one.count
        kind["bytes"] += one.count * one.sent
    return totals


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry = ""
    current: list[_Instruction] = []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_Instruction(found[2], bool(found[1]), found[3], found[4], found[5]))
    return computations, entry


def _walk(
    computations: dict[str, list[_Instruction]], name: str, devices: int, started: set[str]
) -> Iterator[Collective]:
    """The collectives of one run of a computation.

    The TPU compiler splits a collective into several fusions: a start, updates and an end. All of them contain the
    collective with the same channel, which is added to `started` so that it counts once.
    """
    instructions = computations.get(name, [])
    starts = any("AsyncCollectiveStart" in one.rest for one in instructions)
    for one in instructions:
        kind = one.op.removesuffix("-start")
        if kind in KINDS:
            channel = one.attribute("channel_id")
            if channel in started:
                continue
            if starts:
                started.add(channel)
            # A reduce-scatter on TPU is a fusion of an all-reduce and a slice, with this name.
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
            where, n = re.search(r'op_name="([^"]*)"', one.rest), _group(one.rest, devices)
            if n > 1:
                yield Collective(kind, 1, _sent(kind, one, n), n, where[1] if where else one.name)
        elif one.op == "while":
            trips = _trips(computations, one)
            for inner in _walk(computations, one.attribute("body"), devices, started):
                yield replace(inner, count=inner.count * trips)
        elif branches := _BRANCHES.search(one.rest):
            found = [list(_walk(computations, b.strip(" %"), devices, started)) for b in branches[1].split(",")]
            yield from max(found, key=lambda branch: sum(c.count * c.sent for c in branch))
        else:
            for called in _CALLED.findall(one.rest):
                yield from _walk(computations, called, devices, started)


def _trips(computations: dict[str, list[_Instruction]], loop: _Instruction) -> int:
    """The trip count of a loop: the compiler's, or derived from its counter, which starts at zero.

    The condition compares the counter with a constant. The body adds one, or two if the loop is unrolled by two.
    """
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = {one.name: one for one in computations.get(loop.attribute("condition"), [])}
    body = {one.name: one for one in computations.get(loop.attribute("body"), [])}
    compare = next((one for one in condition.values() if one.root), None)
    if compare is None or compare.op != "compare" or compare.attribute("direction") != "LT":
        return 1
    counter, limit = (condition.get(name) for name in compare.operands)
    if counter is None or limit is None or limit.constant is None:
        return 1
    new = next(one for one in body.values() if one.root).operands[int(counter.attribute("index"))]
    steps = [body[name].constant for name in body[new].operands if name in body] if body[new].op == "add" else []
    return -(-limit.constant // next((step for step in steps if step), 1))


def _sent(kind: str, one: _Instruction, n: int) -> int:
    shapes = _SHAPE.findall(one.result)
    if one.op.endswith("-start"):  # without scalars for bookkeeping, which are not sent
        shapes = [shape for shape in shapes if shape[2]]
    size = sum(_bytes(bits, dims) for _, bits, dims in shapes)
    if one.op == "all-gather-start":  # a tuple of the operand and the result
        size = size * n // (n + 1)
    elif one.op == "collective-permute-start":
        size //= 2
    if kind == "reduce-scatter":
        return size * (n - 1) if one.op.startswith("reduce-scatter") else size * (n - 1) // n
    if kind == "collective-permute":
        return size
    return (2 if kind == "all-reduce" else 1) * size * (n - 1) // n


def _bytes(bits: str, dims: str) -> int:
    return math.ceil(_entries(dims) * int(bits or 8) / 8)


def _entries(dims: str) -> int:
    return math.prod(int(n) for n in dims.split(",") if n)


def _group(rest: str, devices: int) -> int:
    """The size of the groups of a collective, in any of the three HLO notations for groups."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # an axis, or a factor of one
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    return devices
