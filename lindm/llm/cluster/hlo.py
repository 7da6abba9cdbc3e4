"""A parser for the text of a compiled XLA program (HLO): computations, instructions, shapes, trip counts of loops.

    %name (parameter: f32[4]) -> f32[4] {
      ROOT %y.1 = f32[4]{0:T(128)S(1)} multiply(%x.2, %x.2), attribute=value, ...
    }

A layout gives the memory space of an array: `S(n)` with n above 0 is memory on the chip (of a TPU: vector memory, scalars,
flags), except 5, which is host memory; without it, the array is in the main memory of the device.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CONTINUATION = re.compile(r'"|\}\}')
_LEAF = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")


class Shape(NamedTuple):
    """One array."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool  # in memory on the chip

    @property
    def num_elements(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> float:
        bits = re.search(r"\d+", self.dtype)  # pred and token have none
        return self.num_elements * (int(bits[0]) / 8 if bits else float(self.dtype == "pred"))


class Instruction(NamedTuple):
    """One instruction of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; all leaves of a tuple
    operands: tuple[str, ...]  # names
    operand_text: str  # the text between the parentheses
    attributes: str  # the text after the parentheses
    is_root: bool


Computation = dict[str, Instruction]


def parse_hlo(text: str) -> tuple[dict[str, Computation], str]:
    """The computations by name, and the name of the entry computation.

    Raises:
      ValueError: no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, computation = "", None
    for line in _joined_lines(text):
        if computation is None:
            if header := _HEADER.match(line):
                computation = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            computation = None
        elif " = " in line and (instruction := _instruction(line)):
            computation[instruction.name] = instruction
    if not entry:
        raise ValueError("text must be an optimized program with an ENTRY computation")
    return computations, entry


def _joined_lines(text: str) -> Iterator[str]:
    """The lines of a program; the metadata of a Pallas kernel, which has line breaks, is joined to its instruction."""
    parts: list[str] = []
    for line in text.splitlines():
        if parts and not _CONTINUATION.match(line):
            yield "".join(parts)
            parts = []
        parts.append(line)
    yield "".join(parts)


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
    """The position of the parenthesis that closes the one at `begin`."""
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
        return Shape(kind, sizes, space is not None and space[1] not in ("0", "5"))  # 5: host memory

    return tuple(one(*leaf) for leaf in _LEAF.findall(text))


def root_instruction(computation: Computation) -> Instruction:
    return next(i for i in computation.values() if i.is_root)


def get_attribute(i: Instruction, name: str) -> str:
    """The value of an attribute such as body=%name; ValueError where there is none."""
    match = re.search(rf"\b{name}=%?([\w.\-]+)", i.attributes)
    if match is None:
        raise ValueError(f"the instruction {i.name} ({i.opcode}) must have {name}; got {i.attributes[:200]!r}")
    return match[1]


def skip_copies(computation: Computation, name: str) -> Instruction:
    """The instruction that computes a value, through copies, bitcasts and conversions."""
    i = computation[name]
    while i.opcode in ("copy", "bitcast", "copy-done", "copy-start", "convert") and i.operands and i.operands[0] in computation:
        i = computation[i.operands[0]]
    return i


# --- loops -------------------------------------------------------------------------------------------------------------------


def trip_count(loop: Instruction, computation: Computation, computations: dict[str, Computation]) -> int | None:
    """How often the body of a `while` runs: XLA's known_trip_count, or from a counter with constant start, step and limit.

    XLA:TPU writes no known_trip_count, and unrolls loops that overlap with communication, so steps above one occur.

    Returns:
      None where the trip count is unknown.
    """
    if known := re.search(r'known_trip_count[^\d}]*"?n"?[:=]\s*"?(\d+)', loop.attributes):
        return int(known[1])
    condition, body = (computations[get_attribute(loop, name)] for name in ("condition", "body"))
    condition, test = _inline_fusion(condition, root_instruction(condition), computations)
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, limit = (skip_copies(condition, name) for name in test.operands)
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
        return None
    index, initial, result = (
        int(get_attribute(counter, "index")),
        skip_copies(computation, loop.operands[0]),
        root_instruction(body),
    )
    if initial.opcode != "tuple" or result.opcode != "tuple":
        return None
    start = skip_copies(computation, initial.operands[index])
    step = _counter_step(body, result.operands[index], index, computations)
    if start.opcode != "constant" or not step:
        return None
    return max(0, -(-(int(limit.operand_text) - int(start.operand_text)) // step))


def _counter_step(body: Computation, name: str, index: int, computations: dict[str, Computation]) -> int | None:
    """What one iteration adds to the counter; None: no constant."""
    body, i = _inline_fusion(body, skip_copies(body, name), computations)
    if i.opcode != "add":
        return None
    terms = [skip_copies(body, operand) for operand in i.operands]
    steps = [int(e.operand_text) for e in terms if e.opcode == "constant"]
    counters = [e for e in terms if e.opcode == "get-tuple-element" and int(get_attribute(e, "index")) == index]
    return steps[0] if len(steps) == len(counters) == 1 else None


def _inline_fusion(outer: Computation, i: Instruction, computations: dict[str, Computation]) -> tuple[Computation, Instruction]:
    """The computation inside a fusion, with the fusion's operands in place of its parameters, and its root instruction."""
    if i.opcode != "fusion":
        return outer, i
    inner = dict(computations[get_attribute(i, "calls")])
    for name, own in list(inner.items()):
        if own.opcode == "parameter":
            inner[name] = skip_copies(outer, i.operands[int(own.operand_text)])
    return inner, root_instruction(inner)
