"""What a compiled program's text says: its collectives, and the large buffers that its loops write.

Bytes that are sent are those of ring algorithms: a device sends (n - 1) / n of what an all-gather of n makes or an
all-to-all moves, twice that of what is all-reduced, and what a reduce-scatter makes n - 1 times.
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
_ON_CHIP = "S(1)"  # of a layout: not in the device's main memory
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
      devices: how many take part together.
      where: the operation it comes from.
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
        """The names of what it takes."""
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

    @property
    def constant(self) -> int | None:
        """Its value, if it is a whole number."""
        found = re.match(r"(\d+)\)", self.rest) if self.op == "constant" else None
        return int(found[1]) if found else None

    def after(self, word: str) -> str:
        """What stands behind `word=`, up to a comma or a space."""
        found = re.search(rf"\b{word}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of an optimised HLO module for so many devices; those in loops count once for each turn.

    A loop whose end depends on data, as that over new tokens, counts as one turn.
    """
    computations, entry = _parse(text)
    return list(_walk(computations, entry, devices, set()))


def written(text: str) -> int:
    """Bytes of large buffers that the loops of an optimized HLO module write to the device's main memory in one run.

    A buffer is large from 2**20 entries; what is updated in place does not count. Loops turn as in `collectives`. A
    decode step that writes none reads each weight as it is stored.
    """
    computations, entry = _parse(text)
    return _written(computations, entry, looping=False)


def _written(computations: dict[str, list[_Instruction]], name: str, looping: bool) -> int:
    found = 0
    for one in computations.get(name, []):
        if one.op == "while":
            found += _trips(computations, one) * _written(computations, one.after("body"), looping=True)
        elif branches := _BRANCHES.search(one.rest):
            found += max(_written(computations, b.strip(" %"), looping) for b in branches[1].split(","))
        elif one.op == "call":
            found += _written(computations, one.after("to_apply"), looping)
        elif looping and one.op not in _VIEWS and not one.op.endswith("-start"):
            inside = computations.get(one.after("calls"), []) if one.op == "fusion" else []
            if not any(part.op == "dynamic-update-slice" for part in inside):
                made = [x for x in _PLACED.findall(one.result) if _ON_CHIP not in x[3]]
                sizes = [(bits, dims) for _, bits, dims, _ in made if _entries(dims) >= _LARGE]
                found += sum(_bytes(*size) for size in sizes)
    return found


def total(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """By kind: how many run, and the bytes that a device sends.

    >>> total([Collective("all-reduce", 32, 100, 8), Collective("all-reduce", 1, 8, 8)])
    {'all-reduce': {'count': 33, 'bytes': 3208}}
    """
    totals: dict[str, dict[str, int]] = {}
    for one in found:
        of_kind = totals.setdefault(one.kind, {"count": 0, "bytes": 0})
        of_kind["count"] += one.count
        of_kind["bytes"] += one.count * one.sent
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
    computations: dict[str, list[_Instruction]], name: str, devices: int, begun: set[str]
) -> Iterator[Collective]:
    """The collectives of one run of a computation.

    The TPU's compiler begins a collective in one fusion, goes on in others, and ends it in one more. All of these have
    it, on the channel that is among `begun` then.
    """
    instructions = computations.get(name, [])
    begins = any("AsyncCollectiveStart" in one.rest for one in instructions)
    for one in instructions:
        kind = one.op.removesuffix("-start")
        if kind in KINDS:
            channel = one.after("channel_id")
            if channel in begun:
                continue
            if begins:
                begun.add(channel)
            # Its reduce-scatter is a fusion of this name, of an all-reduce and a slice.
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
            where, n = re.search(r'op_name="([^"]*)"', one.rest), _group(one.rest, devices)
            if n > 1:
                yield Collective(kind, 1, _sent(kind, one, n), n, where[1] if where else one.name)
        elif one.op == "while":
            trips = _trips(computations, one)
            for inner in _walk(computations, one.after("body"), devices, begun):
                yield replace(inner, count=inner.count * trips)
        elif branches := _BRANCHES.search(one.rest):
            ways = [list(_walk(computations, b.strip(" %"), devices, begun)) for b in branches[1].split(",")]
            yield from max(ways, key=lambda way: sum(c.count * c.sent for c in way))
        else:
            for called in _CALLED.findall(one.rest):
                yield from _walk(computations, called, devices, begun)


def _trips(computations: dict[str, list[_Instruction]], loop: _Instruction) -> int:
    """How often a loop turns: said by the compiler, or from its counter, which starts at zero.

    The counter is compared with a constant in the condition; the body adds one, or two where it has two turns in one.
    """
    if said := _TRIPS.search(loop.rest):
        return int(said[1])
    condition = {one.name: one for one in computations.get(loop.after("condition"), [])}
    body = {one.name: one for one in computations.get(loop.after("body"), [])}
    ends = next((one for one in condition.values() if one.root), None)
    if ends is None or ends.op != "compare" or ends.after("direction") != "LT":
        return 1
    counter, most = (condition.get(name) for name in ends.operands)
    if counter is None or most is None or most.constant is None:
        return 1
    after = next(one for one in body.values() if one.root).operands[int(counter.after("index"))]
    steps = [body[name].constant for name in body[after].operands if name in body] if body[after].op == "add" else []
    return -(-most.constant // next((step for step in steps if step), 1))


def _sent(kind: str, one: _Instruction, n: int) -> int:
    """Bytes that a device sends."""
    shapes = _SHAPE.findall(one.result)
    if one.op.endswith("-start"):  # and what the device needs to follow it, which is not sent
        shapes = [shape for shape in shapes if shape[2]]
    size = sum(_bytes(bits, dims) for _, bits, dims in shapes)
    if one.op == "all-gather-start":  # a tuple of what goes in and what comes out
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
    """How many devices take part in each group of a collective, in any of the three ways that HLO writes groups."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # an axis, or a part of one
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    return devices
