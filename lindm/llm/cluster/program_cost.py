r"""What one run of a compiled program does: matrix products, memory traffic, and what its devices send each other.

XLA's own `cost_analysis` counts the body of a loop once, and a decoder is one loop over its layers. So the text of the optimised
program is read (`lindm.llm.cluster.hlo`): from ENTRY down, every computation is met as often as it runs, `while` bodies as often
as they turn. The text is that of one device; so are all numbers.

    flops     2 m n k of every product (dot, convolution, library call), inside fusions too; elementwise work is not counted
    bytes     what every operation outside fusions reads and writes in main memory; a slice that is read or written in place
              counts as the slice, and what a TPU keeps in its vector memory costs nothing
    sent      by a device, with the algorithms that send least: to gather shards of s bytes on n devices s (n - 1), to reduce and
              scatter, or exchange, arrays of S bytes S (n - 1) / n, to reduce them everywhere 2 S (n - 1) / n, to pass on s
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from lindm.llm.cluster.hlo import Computation, Instruction, Shape, attribute, end_of, parse, root_of, turns_of

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# these move nothing: names for what is there already, the ends of what began elsewhere, and what holds other operations
STILL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "while"}
STILL |= {"conditional", "call", "opt-barrier", "optimization-barrier", "add-dependency", "async-start", "async-update"}
STILL_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone", "AssumeGatherIndicesInBound")
BEGUN = "AsyncCollectiveStart"  # a collective that runs beside several fusions is written in each of them; it begins in one


class Collective(NamedTuple):
    kind: str
    group: int  # devices that take part in one
    shape: str  # of what a device puts in, "bf16[1,256,4096]"
    count: float  # a run
    sent: float  # bytes a device and run, all of them together


@dataclass
class Work:
    """Of one device and one run of the program."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[tuple[str, int, str], tuple[float, float]] = field(default_factory=dict)
    unread: int = 0  # loops whose turns could not be read and are counted once

    @property
    def sent(self) -> float:
        return sum(sent for _, sent in self.collectives.values())

    def listed(self) -> list[Collective]:
        """The collectives, those that send most first."""
        found = [Collective(*key, count, sent) for key, (count, sent) in self.collectives.items()]
        return sorted(found, key=lambda c: (-c.sent, c.kind, c.shape))


def work(text: str, loops: bool = True) -> Work:
    """What a run of an optimised program does, from `compiled.as_text()`; without `loops`, every body once, as XLA counts."""
    return _Reader(text, loops).total()


class _Reader:
    def __init__(self, text: str, loops: bool):
        self.computations, self.entry = parse(text)
        self.loops = loops
        partitions = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
        self.devices = int(partitions[1]) if partitions else 1
        self.begun = {_channel(i) for c in self.computations.values() if _starts(c) for i in c.values() if _collective(i.op)}
        self.read: dict[str, dict[int, float]] = {}

    def total(self) -> Work:
        found = Work()
        self._add(found, self.entry, 1.0, fused=False)
        return found

    def _add(self, found: Work, name: str, times: float, fused: bool) -> None:
        here = self.computations[name]
        for i in here.values():
            found.flops += times * _flops(i, here)
            if (kind := _collective(i.op)) and (_channel(i) not in self.begun or _starts(here)):
                self._collect(found, kind, i, here, times)
            if not fused:
                found.bytes += times * self._traffic(i, here)
            for called, turns in self._called(found, i, here):
                self._add(found, called, times * turns, fused or i.op in ("fusion", "custom-call"))

    def _called(self, found: Work, i: Instruction, here: Computation) -> Iterator[tuple[str, float]]:
        """The computations that an operation runs, and how often; those that combine two numbers are not among them."""
        if i.op == "while":
            turns = turns_of(i, here, self.computations) if self.loops else 1
            found.unread += turns is None
            yield attribute(i, "body"), turns or 1
        elif i.op in ("fusion", "call", "async-start", "custom-call", "conditional"):
            names = re.findall(r"(?:calls|to_apply|\w+_computation)=%([\w.\-]+)", i.rest)
            branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
            names += re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
            yield from ((name, 1.0) for name in names)  # of a conditional, all branches: at most what it does

    # --- what devices send each other ---

    def _collect(self, found: Work, kind: str, i: Instruction, here: Computation, times: float) -> None:
        shapes = [s for name in i.operands if name in here for s in here[name].shapes]
        size, n = sum(s.bytes for s in shapes), self._group(i)
        ways = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}
        largest = max(shapes, key=lambda s: s.bytes)
        what = f"{largest.kind}[{','.join(map(str, largest.dims))}]" + (f" and {len(shapes) - 1} more" if len(shapes) > 1 else "")
        count, sent = found.collectives.get((kind, n, what), (0.0, 0.0))
        found.collectives[kind, n, what] = count + times, sent + times * size * ways.get(kind, (n - 1) / n)

    def _group(self, i: Instruction) -> int:
        """Devices that take part in one collective; of what is passed on, all."""
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", i.rest):
            return listed[1].count(",") + 1
        if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", i.rest):
            return int(tiled[1])
        if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{,]*\{([^}]*)\}", i.rest):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
            axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])  # of a cut axis, the part that takes part
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        return self.devices

    # --- memory ---

    def _traffic(self, i: Instruction, here: Computation) -> float:
        if i.op in STILL or i.op.endswith("-done") or (i.op == "custom-call" and any(c in i.rest for c in STILL_CALLS)):
            return 0.0
        given = [here[name] for name in i.operands if name in here]
        if i.op in ("copy-start", "slice-start"):  # (what is read, what is written, ...) in either order, one may be near
            read, written = given[0].shapes[0], min(i.shapes[:2], key=lambda s: s.bytes)
            near = i.shapes[0].near if i.op == "copy-start" else i.shapes[1].near
            return written.bytes * ((not read.near) + (not near))
        if i.op == "fusion":
            return self._fused_traffic(i, given)
        if i.op in ("dynamic-slice", "slice", "gather"):
            return 2 * _far(i.shapes)
        if i.op in ("dynamic-update-slice", "scatter"):
            return 2 * sum(_far(g.shapes) for g in given[1 if i.op == "dynamic-update-slice" else 2 :][:1])
        results = i.shapes[1:2] if i.op.endswith("-start") else i.shapes
        return _far(results) + sum(_far(g.shapes) for g in given)

    def _fused_traffic(self, i: Instruction, given: list[Instruction]) -> float:
        name = attribute(i, "calls")
        total, inner, read = 0.0, self.computations[name], self._reads(name)
        for number, g in enumerate(given):
            total += min(_far(g.shapes), read.get(number, 0.0))
        roots = [root_of(inner)]
        if roots[0].op == "tuple":
            roots = [inner[name] for name in roots[0].operands]
        if _starts(inner):
            return total + sum(_far(c.shapes) for c in inner.values() if _collective(c.op))
        for root, shape in zip(roots, i.shapes, strict=False):
            end = end_of(inner, root.name)
            if end.op == "dynamic-update-slice" and not shape.near:  # into what is there already
                total += inner[end.operands[1]].shapes[0].bytes
            elif end.op not in ("parameter", "custom-call") and not _collective(
                end.op
            ):  # which are passed on, or began elsewhere
                total += _far([shape])
        return total

    def _reads(self, name: str) -> dict[int, float]:
        """Bytes that a fused computation reads of each parameter: all, unless every use takes a slice or writes one."""
        if name in self.read:
            return self.read[name]
        inner = self.computations[name]
        users: dict[str, list[Instruction]] = {}
        for user in inner.values():
            for operand in dict.fromkeys(user.operands):
                users.setdefault(operand, []).append(user)

        def of(value: Instruction) -> float:
            total = 0.0
            for user in users.get(value.name, []):
                first = user.operands[0] == value.name
                if user.op == "bitcast":
                    total += of(user)
                elif user.op in ("dynamic-slice", "slice", "gather") and first:
                    total += user.shapes[0].bytes
                elif user.op == "fusion":
                    inside = self._reads(attribute(user, "calls"))
                    total += sum(inside.get(k, 0.0) for k, operand in enumerate(user.operands) if operand == value.name)
                elif user.op in ("tuple", "custom-call") or (user.op == "dynamic-update-slice" and first):
                    continue  # passed on, or written in place
                elif not _collective(user.op) or _channel(user) not in self.begun or _starts(inner):
                    return value.shapes[0].bytes
            return min(total, value.shapes[0].bytes)

        self.read[name] = {int(p.text): of(p) for p in inner.values() if p.op == "parameter"}
        return self.read[name]


def _far(shapes: Iterable[Shape]) -> float:
    """Bytes in main memory."""
    return sum(s.bytes for s in shapes if not s.near)


def _collective(op: str) -> str | None:
    kind = op.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _channel(i: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", i.rest)
    return found[1] if found else None


def _starts(computation: Computation) -> bool:
    return any(i.op == "custom-call" and BEGUN in i.rest for i in computation.values())


# --- products ----------------------------------------------------------------------------------------------------------------


def _flops(i: Instruction, here: Computation) -> float:
    if i.op == "convolution":
        return _convolution(i, here[i.operands[0]].shapes[0], here[i.operands[1]].shapes[0])
    library = i.op == "custom-call" and re.search(r'custom_call_target="[^"]*(matmul|gemm|dot)', i.rest)
    if i.op != "dot" and not library:
        return 0.0
    summed = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', i.rest)
    left = here[i.operands[0]].shapes[0].dims
    axes = [int(d) for d in summed[1].replace('"', "").split(",") if d] if summed else [len(left) - 1]
    return 2.0 * i.shapes[0].elements * math.prod(left[axis] for axis in axes)


def _convolution(i: Instruction, left: Shape, right: Shape) -> float:
    """Products that fall inside the padding are not counted: XLA:TPU writes batched products as convolutions with much of it."""
    lhs, rhs, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()  # pyright: ignore[reportOptionalMemberAccess]
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    given = dict(part.split("=") for part in window[1].split()) if window else {}
    result = i.shapes[0]
    pairs = 1
    for axis in (c for c in lhs if c.isdigit()):
        n, m, size = left.dims[lhs.index(axis)], result.dims[out.index(axis)], right.dims[rhs.index(axis)]

        def at(name: str, default: str, axis: str = axis) -> str:
            return given[name].split("x")[int(axis)] if name in given else default

        stride, low = int(at("stride", "1")), int(at("pad", "0_0").split("_")[0])
        spread, hole = int(at("rhs_dilate", "1")), int(at("lhs_dilate", "1"))
        places = (o * stride + k * spread - low for o in range(m) for k in range(size))
        pairs *= sum(0 <= p < (n - 1) * hole + 1 and p % hole == 0 for p in places)
    groups = re.search(r"batch_group_count=(\d+)", i.rest)
    batch = left.dims[lhs.index("b")] / (int(groups[1]) if groups else 1)
    features = right.dims[rhs.index("i")]  # of one group
    return 2.0 * pairs * batch * features * result.dims[out.index("f")]
