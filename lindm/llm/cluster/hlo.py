"""The text of a compiled program of XLA, taken apart: computations, instructions, shapes.

    %name (parameter: f32[4]) -> f32[4] {
      ROOT %y.1 = f32[4]{0:T(128)S(1)} multiply(%x.2, %x.2), attribute=value, ...
    }

Layouts say where an array lies: `S(n)` with n above 0 is a memory on the chip (of a TPU: vector memory, scalars, flags), 5 the
host's; without it, the device's main memory.
"""

import math
import re
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LEAF = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")


class Shape(NamedTuple):
    kind: str
    dims: tuple[int, ...]
    near: bool  # in a memory on the chip

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        bits = re.search(r"\d+", self.kind)  # of pred and token there are none
        return self.elements * (int(bits[0]) / 8 if bits else float(self.kind == "pred"))


class Instruction(NamedTuple):
    name: str
    op: str
    shapes: tuple[Shape, ...]  # of the result; of a tuple, all leaves
    operands: tuple[str, ...]
    text: str  # what stands between the brackets of the operands
    rest: str  # attributes
    root: bool


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the name of the one that is run."""
    computations: dict[str, Computation] = {}
    entry, here = "", None
    for line in text.splitlines():
        if here is None:
            if header := _HEADER.match(line):
                here = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            here = None
        elif " = " in line and (instruction := _instruction(line)):
            here[instruction.name] = instruction
    if not entry:
        raise ValueError("text must be an optimised program with an ENTRY computation")
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    name, _, value = line.strip().partition(" = ")
    root, name = name.startswith("ROOT "), name.removeprefix("ROOT ").lstrip("%")
    end = _closing(value, 0) + 1 if value.startswith("(") else value.find(" ")
    shape, (op, bracket, _) = value[:end], value[end:].strip().partition("(")
    if not bracket or not re.fullmatch(r"[\w\-]+", op):
        return None
    begin = value.index("(", end)
    close = _closing(value, begin)
    inside, rest = value[begin + 1 : close], value[close + 1 :]
    return Instruction(name, op, _shapes(shape), tuple(re.findall(r"%([\w.\-]+)", inside)), inside, rest, root)


def _closing(text: str, begin: int) -> int:
    """Where the bracket that opens at `begin` closes."""
    depth = 0
    for i in range(begin, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _shapes(text: str) -> tuple[Shape, ...]:
    def one(kind: str, dims: str, layout: str) -> Shape:
        space = re.search(r"S\((\d+)\)", layout or "")
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        return Shape(kind, sizes, space is not None and space[1] not in ("0", "5"))  # 5: the host's

    return tuple(one(*leaf) for leaf in _LEAF.findall(text))


def root_of(computation: Computation) -> Instruction:
    return next(i for i in computation.values() if i.root)


def attribute(i: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", i.rest)
    if found is None:
        raise ValueError(f"the operation {i.name} ({i.op}) must have {name}; got {i.rest[:200]!r}")
    return found[1]


def end_of(here: Computation, name: str) -> Instruction:
    """What a value is, through copies."""
    i = here[name]
    while i.op in ("copy", "bitcast", "copy-done", "copy-start", "convert") and i.operands and i.operands[0] in here:
        i = here[i.operands[0]]
    return i


# --- loops -------------------------------------------------------------------------------------------------------------------


def turns_of(loop: Instruction, here: Computation, computations: dict[str, Computation]) -> int | None:
    """How often the body of a `while` runs: as XLA noted, or from a counter whose start, step and limit are constants.

    XLA:TPU notes nothing, and unrolls what it overlaps with messages, so that steps above one occur. None: neither is there.
    """
    if known := re.search(r'known_trip_count[^\d}]*"?n"?[:=]\s*"?(\d+)', loop.rest):
        return int(known[1])
    condition, body = (computations[attribute(loop, name)] for name in ("condition", "body"))
    condition, test = _inlined(condition, root_of(condition), computations)
    if test.op != "compare" or "direction=LT" not in test.rest:
        return None
    counter, limit = (end_of(condition, name) for name in test.operands)
    if counter.op != "get-tuple-element" or limit.op != "constant":
        return None
    place, given, kept = int(attribute(counter, "index")), end_of(here, loop.operands[0]), root_of(body)
    if given.op != "tuple" or kept.op != "tuple":
        return None
    start, step = end_of(here, given.operands[place]), _step(body, kept.operands[place], place, computations)
    if start.op != "constant" or not step:
        return None
    return max(0, -(-(int(limit.text) - int(start.text)) // step))


def _step(body: Computation, name: str, place: int, computations: dict[str, Computation]) -> int | None:
    """What is added to the counter in a turn."""
    body, i = _inlined(body, end_of(body, name), computations)
    if i.op != "add":
        return None
    ends = [end_of(body, operand) for operand in i.operands]
    steps = [int(e.text) for e in ends if e.op == "constant"]
    counters = [e for e in ends if e.op == "get-tuple-element" and int(attribute(e, "index")) == place]
    return steps[0] if len(steps) == len(counters) == 1 else None


def _inlined(outer: Computation, i: Instruction, computations: dict[str, Computation]) -> tuple[Computation, Instruction]:
    """Of a fusion, the computation inside and its root, with what the fusion was given in the place of parameters."""
    if i.op != "fusion":
        return outer, i
    inner = dict(computations[attribute(i, "calls")])
    for name, own in list(inner.items()):
        if own.op == "parameter":
            inner[name] = end_of(outer, i.operands[int(own.text)])
    return inner, root_of(inner)
