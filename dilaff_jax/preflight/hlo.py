"""What a compiled program moves, read from its HLO text: memory traffic and collectives.

XLA's own "bytes accessed" counts a loop's body once, on-chip memory like main memory, and a
prefetch in n slices as n times the whole array: on a TPU, whose scheduler prefetches weights and
keeps small maps in VMEM, several times too much. Here every instruction of the schedule counts its
operands and results that are in main memory, padded as they lie there; slices count what they read,
and bodies of loops count as often as they run. What one instruction reads twice, as overlapping
windows of a convolution, counts once: a lower bound.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128}
# Kinds that move nothing: names, views, and the second halves of what was begun before.
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "add-dependency",
    "domain",
)
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "collective-broadcast",
)
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TILE = re.compile(r"([\d,]*):T\(([\d,]+)\)")
# Layouts name the memory: S(0), the default, is main memory (HBM); others are on chip or host.
_ELSEWHERE = re.compile(r"S\([1-9]\d*\)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = shape kind(operands), attributes`."""

    name: str
    kind: str
    shape: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind: how many run in one execution, and the bytes of their results."""

    kind: str
    count: int
    bytes: int


class Program:
    """A compiled program's text, `compiled.as_text()`."""

    def __init__(self, text: str) -> None:
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ""
        body: dict[str, Instruction] = {}
        for line in text.splitlines():
            head = _COMPUTATION.match(line)
            if head:
                body = self._computations.setdefault(head[2], {})
                self._entry = head[2] if head[1] else self._entry
            elif " = " in line and (instruction := _parse(line)):
                body[instruction.name] = instruction

    def traffic(self) -> int:
        """Bytes read from and written to main memory in one execution."""
        return sum(times * self._moved(body, i) for body, i, times in self._executed())

    def collectives(self) -> list[Collective]:
        """What devices exchange in one execution, most bytes first."""
        count: collections.Counter[str] = collections.Counter()
        size: collections.Counter[str] = collections.Counter()
        seen: set[str] = set()
        for _, instruction, times in self._executed():
            found = [instruction]
            if instruction.kind == "fusion":
                found = self._fused_collectives(instruction, seen)
            for collective in found:
                kind = collective.kind.removesuffix("-start")
                if kind in _COLLECTIVES:
                    count[kind] += times
                    size[kind] += times * _received(collective)
        return [Collective(kind, count[kind], n) for kind, n in size.most_common()]

    def _fused_collectives(self, fusion: Instruction, seen: set[str]) -> list[Instruction]:
        """Those that run beside arithmetic: a TPU cuts one into steps, in several fusions."""
        found = []
        for instruction in self._computations[_called("calls", fusion)[0]].values():
            if instruction.kind in _COLLECTIVES:
                channel = _CHANNEL.search(instruction.attributes)
                if channel is None or channel[1] not in seen:
                    found.append(instruction)
                    seen.update(channel.groups() if channel else ())
        return found

    def loops(self) -> list[int]:
        """How often each loop runs, longest first; 0 where the text does not say."""
        every = (i for body in self._computations.values() for i in body.values())
        return sorted((self._trips(i) for i in every if i.kind == "while"), reverse=True)

    def _executed(
        self, name: str = "", times: int = 1
    ) -> Iterator[tuple[dict[str, Instruction], Instruction, int]]:
        """Every scheduled instruction, its computation, and how often it runs."""
        body = self._computations[name or self._entry]
        for instruction in body.values():
            if instruction.kind == "while":
                runs = times * max(1, self._trips(instruction))
                yield from self._executed(_called("body", instruction)[0], runs)
            elif instruction.kind in ("call", "conditional"):
                for branch in _called("to_apply|branch_computations|\\w+_computation", instruction):
                    yield from self._executed(branch, times)
            else:
                yield body, instruction, times

    def _trips(self, loop: Instruction) -> int:
        """As XLA notes it, else the constant that a counter from 0 stays below; 0 if unknown."""
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        condition = self._computations[_called("condition", loop)[0]]
        for test in condition.values():
            if test.kind == "compare" and "direction=LT" in test.attributes:
                limit = condition[test.operands[1]]
                return int(limit.operands[0]) if limit.kind == "constant" else 0
        return 0

    def _moved(self, body: dict[str, Instruction], instruction: Instruction) -> int:
        kind, result = instruction.kind, _in_memory(instruction.shape)
        operands = [_in_memory(body[o].shape) if o in body else 0 for o in instruction.operands]
        if kind in _FREE or kind.endswith(("-done", "-update")):
            return 0
        if kind in ("slice", "dynamic-slice", "gather"):
            return result + (_size(instruction.shape) if operands[0] else 0)
        if kind == "slice-start":
            _, sliced, *_ = _elements(instruction.shape)
            return _in_memory(sliced) + (_size(sliced) if operands[0] else 0)
        if kind == "copy-start":
            return _in_memory(_elements(instruction.shape)[0]) + sum(operands)
        if kind == "dynamic-update-slice":
            return operands[1] + (_size(body[instruction.operands[1]].shape) if result else 0)
        if kind == "fusion":
            return self._fused(body, instruction)
        if kind.removesuffix("-start") in _COLLECTIVES:
            return sum(operands) + min(result, _received(instruction))
        return sum(operands) + result

    def _fused(self, body: dict[str, Instruction], fusion: Instruction) -> int:
        """What is read of parameters that are only sliced, and written by an update in place."""
        inner = self._computations[_called("calls", fusion)[0]]
        number = {i.name: int(i.operands[0]) for i in inner.values() if i.kind == "parameter"}
        users: dict[str, list[Instruction]] = collections.defaultdict(list)
        for instruction in inner.values():
            for operand in instruction.operands:
                users[operand].append(instruction)
        updates = [i for i in inner.values() if i.kind == "dynamic-update-slice"]
        in_place = {i.operands[0] for i in updates}
        total = 0
        for name, index in number.items():
            outer = body.get(fusion.operands[index])
            whole = _in_memory(outer.shape) if outer else 0
            sliced = users[name] and all(u.kind in ("slice", "dynamic-slice") for u in users[name])
            if name in in_place and len(users[name]) == 1:
                continue
            parts = sum(_size(u.shape) for u in users[name]) if sliced else whole
            total += min(whole, parts)
        written = _in_memory(fusion.shape)
        for update in updates if in_place & number.keys() else ():
            written -= _size(update.shape) - _size(inner[update.operands[1]].shape)
        return total + max(0, written)


def _parse(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    root, name, rest = match.groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    kind, opened, _ = rest.partition("(")
    if not opened:
        return None
    close = _closing(rest, len(kind))
    inside = rest[len(kind) + 1 : close]
    operands = [inside] if kind in ("parameter", "constant") else re.findall(r"%([\w.\-]+)", inside)
    return Instruction(name, kind, shape, tuple(operands), rest[close + 1 :], bool(root))


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _called(attribute: str, instruction: Instruction) -> list[str]:
    groups = re.findall(rf"(?:{attribute})=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.attributes)
    return [name.strip(" %") for group in groups for name in group.strip("{}").split(",")]


def _elements(shape: str) -> list[str]:
    """The shapes in a tuple's shape, in order, nested ones taken apart."""
    return [m[0] for m in _ARRAY.finditer(shape)]


def _in_memory(shape: str) -> int:
    """Bytes of an array, or of a tuple's arrays, that are in main memory."""
    return sum(_size(e) for e in _elements(shape) if not _ELSEWHERE.search(e))


def _size(shape: str) -> int:
    """Bytes of an array or of a tuple's arrays, wherever they lie, padded to whole tiles."""
    total = 0
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or ["0"])[0])
        sizes = [int(d.strip("<=")) for d in dims.split(",") if d]
        total += math.prod(_padded(sizes, layout)) * bits // 8
    return total


def _padded(sizes: list[int], layout: str) -> list[int]:
    """Sizes rounded up to whole tiles: `3,0,2,1:T(8,128)` tiles axis 3 by 128 and axis 0 by 8."""
    tiled = _TILE.match(layout)
    if tiled:
        order = [int(axis) for axis in tiled[1].split(",") if axis]
        tile = [int(n) for n in tiled[2].split(",")]
        for axis, n in zip(order, reversed(tile), strict=False):
            sizes[axis] = -(-sizes[axis] // n) * n
    return sizes


def _received(collective: Instruction) -> int:
    """Bytes of the result. Begun ones but all-reduce's return (operands, results, ...)."""
    shapes = _elements(collective.shape)
    if collective.kind.endswith("-start") and collective.kind != "all-reduce-start":
        shapes = shapes[len(collective.operands) : 2 * len(collective.operands)]
    return sum(map(_size, shapes))
