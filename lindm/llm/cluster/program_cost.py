r"""The cost of a compiled program: matrix products, memory traffic, and communication between devices.

XLA's own `cost_analysis` counts the body of a loop once, and a decoder is one loop over its layers. So the text of the optimized
program is parsed (`lindm.llm.cluster.hlo`): from the entry computation down, every computation counts as often as it runs, bodies
of `while` loops as often as they iterate. The text is the program of one device, so all numbers are per device.

    flops          2 m n k of every product (dot, convolution, library call, attention kernel), inside fusions too; elementwise
                   operations are not counted; of a conditional, the branch with most
    memory_bytes   what every operation outside fusions reads and writes in main memory; a slice that is read or written in place
                   counts as the slice, and arrays that a TPU keeps in its vector memory cost nothing
    sent_bytes     what a device sends, with the algorithms that send least: all-gather of shards of s bytes on n devices
                   s (n - 1); reduce-scatter and all-to-all of arrays of S bytes S (n - 1) / n; all-reduce 2 S (n - 1) / n;
                   permute s
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from lindm.llm.attention_kernels import WINDOW_SCOPE
from lindm.llm.cluster.hlo import (
    Computation,
    Instruction,
    Shape,
    get_attribute,
    parse_hlo,
    root_instruction,
    skip_copies,
    trip_count,
)

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# operations without traffic of their own: aliases, the ends of asynchronous operations, and operations that call computations
NO_TRAFFIC = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "while",
}
NO_TRAFFIC |= {"conditional", "call", "opt-barrier", "optimization-barrier", "add-dependency", "async-start", "async-update"}
NO_TRAFFIC_CALLS = (
    "AllocateBuffer",
    "ConcatBitcast",
    "AsyncCollectiveStart",
    "AsyncCollectiveDone",
    "AssumeGatherIndicesInBound",
)
ASYNC_START = "AsyncCollectiveStart"  # a collective that overlaps with several fusions appears in each; it starts in one of them


class Collective(NamedTuple):
    """All collectives of one kind and shape in one run of the program."""

    kind: str
    group_size: int  # devices that take part
    shape: str  # of a device's input, "bf16[1,256,4096]"
    count: float  # per run
    sent_bytes: float  # per device and run, all of them together


@dataclass
class ProgramCost:
    """The cost of one run of the program on one device."""

    flops: float = 0.0
    memory_bytes: float = 0.0
    # (kind, group size, shape) -> (count, bytes)
    totals: dict[tuple[str, int, str], tuple[float, float]] = field(default_factory=dict)
    unknown_loops: int = 0  # loops whose trip count is unknown; they count once

    def add(self, other: "ProgramCost", times: float) -> None:
        """Adds `times` runs of another program."""
        self.flops += times * other.flops
        self.memory_bytes += times * other.memory_bytes
        self.unknown_loops += other.unknown_loops
        for key, (count, sent) in other.totals.items():
            own_count, own_sent = self.totals.get(key, (0.0, 0.0))
            self.totals[key] = own_count + times * count, own_sent + times * sent

    @property
    def sent_bytes(self) -> float:
        return sum(sent for _, sent in self.totals.values())

    @property
    def collectives(self) -> list[Collective]:
        """The collectives, those that send most first."""
        collectives = [Collective(*key, count, sent) for key, (count, sent) in self.totals.items()]
        return sorted(collectives, key=lambda c: (-c.sent_bytes, c.kind, c.shape))


def program_cost(text: str, loops: bool = True) -> ProgramCost:
    """The cost of an optimized program, from `compiled.as_text()`; without `loops`, every loop body counts once, as in XLA."""
    return _CostCounter(text, loops).total()


class _CostCounter:
    def __init__(self, text: str, loops: bool):
        self.computations, self.entry = parse_hlo(text)
        self.loops = loops
        partitions = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
        self.devices = int(partitions[1]) if partitions else 1
        self.started = {
            _channel(i) for c in self.computations.values() if _has_async_start(c) for i in c.values() if _collective(i.opcode)
        }
        self.reads: dict[str, dict[int, float]] = {}

    def total(self) -> ProgramCost:
        cost = ProgramCost()
        self._add(cost, self.entry, 1.0, fused=False)
        return cost

    def _add(self, cost: ProgramCost, name: str, times: float, fused: bool) -> None:
        computation = self.computations[name]
        for i in computation.values():
            cost.flops += times * _flops(i, computation)
            if (kind := _collective(i.opcode)) and (_channel(i) not in self.started or _has_async_start(computation)):
                self._add_collective(cost, kind, i, computation, times)
            if not fused:
                cost.memory_bytes += times * self._traffic(i, computation)
            for called, trips in self._called(cost, i, computation):
                self._add(cost, called, times * trips, fused or i.opcode in ("fusion", "custom-call"))
            if i.opcode == "conditional":
                cost.add(self._largest_branch(i, fused), times)

    def _largest_branch(self, i: Instruction, fused: bool) -> ProgramCost:
        """The cost of the branch of a conditional that computes most: an upper bound."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
        names = (
            re.findall(r"%([\w.\-]+)", listed[1])
            if listed
            else re.findall(r"(?:true|false)_computation=%([\w.\-]+)", i.attributes)
        )
        costs = [ProgramCost() for _ in names]
        for cost, name in zip(costs, names, strict=True):
            self._add(cost, name, 1.0, fused)
        return max(costs, key=lambda cost: (cost.flops, cost.memory_bytes))

    def _called(self, cost: ProgramCost, i: Instruction, computation: Computation) -> Iterator[tuple[str, float]]:
        """The computations that an instruction runs, and how often; reduction functions are not among them."""
        if i.opcode == "while":
            trips = trip_count(i, computation, self.computations) if self.loops else 1
            cost.unknown_loops += trips is None
            yield get_attribute(i, "body"), trips or 1
        elif i.opcode in ("fusion", "call", "async-start", "custom-call"):
            names = re.findall(r"(?:calls|to_apply|\w+_computation)=%([\w.\-]+)", i.attributes)
            yield from ((name, 1.0) for name in names)

    # --- communication ---

    def _add_collective(self, cost: ProgramCost, kind: str, i: Instruction, computation: Computation, times: float) -> None:
        shapes = [s for name in i.operands if name in computation for s in computation[name].shapes]
        size, n = sum(s.num_bytes for s in shapes), self._group_size(i)
        sent_share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}
        largest = max(shapes, key=lambda s: s.num_bytes)
        shape = f"{largest.dtype}[{','.join(map(str, largest.dims))}]" + (
            f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        )
        count, sent = cost.totals.get((kind, n, shape), (0.0, 0.0))
        cost.totals[kind, n, shape] = count + times, sent + times * size * sent_share.get(kind, (n - 1) / n)

    def _group_size(self, i: Instruction) -> int:
        """Number of devices that take part in one collective; all devices in a permute."""
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", i.attributes):
            return listed[1].count(",") + 1
        if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", i.attributes):
            return int(tiled[1])
        if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{,]*\{([^}]*)\}", i.attributes):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
            axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])  # of a split axis, the part that takes part
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        return self.devices

    # --- memory ---

    def _traffic(self, i: Instruction, computation: Computation) -> float:
        """Bytes that an instruction outside fusions reads and writes in main memory."""
        if (
            i.opcode in NO_TRAFFIC
            or i.opcode.endswith("-done")
            or (i.opcode == "custom-call" and any(c in i.attributes for c in NO_TRAFFIC_CALLS))
        ):
            return 0.0
        operands = [computation[name] for name in i.operands if name in computation]
        if i.opcode in ("copy-start", "slice-start"):  # (source, destination, ...) in either order; one may be on the chip
            source, destination = operands[0].shapes[0], min(i.shapes[:2], key=lambda s: s.num_bytes)
            on_chip = i.shapes[0].on_chip if i.opcode == "copy-start" else i.shapes[1].on_chip
            return destination.num_bytes * ((not source.on_chip) + (not on_chip))
        if i.opcode == "fusion":
            return self._fused_traffic(i, operands)
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _main_memory_bytes(i.shapes)
        if i.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * sum(_main_memory_bytes(g.shapes) for g in operands[1 if i.opcode == "dynamic-update-slice" else 2 :][:1])
        results = i.shapes[1:2] if i.opcode.endswith("-start") else i.shapes
        return _main_memory_bytes(results) + sum(_main_memory_bytes(g.shapes) for g in operands)

    def _fused_traffic(self, i: Instruction, operands: list[Instruction]) -> float:
        """Bytes that a fusion reads and writes in main memory."""
        name = get_attribute(i, "calls")
        total, inner, reads = 0.0, self.computations[name], self._parameter_reads(name)
        for number, g in enumerate(operands):
            total += min(_main_memory_bytes(g.shapes), reads.get(number, 0.0))
        roots = [root_instruction(inner)]
        if roots[0].opcode == "tuple":
            roots = [inner[name] for name in roots[0].operands]
        if _has_async_start(inner):
            return total + sum(_main_memory_bytes(c.shapes) for c in inner.values() if _collective(c.opcode))
        for root, shape in zip(roots, i.shapes, strict=False):
            end = skip_copies(inner, root.name)
            if end.opcode == "dynamic-update-slice" and not shape.on_chip:  # in place
                total += inner[end.operands[1]].shapes[0].num_bytes
            elif end.opcode not in ("parameter", "custom-call") and not _collective(
                end.opcode
            ):  # passed through, or started elsewhere
                total += _main_memory_bytes([shape])
        return total

    def _parameter_reads(self, name: str) -> dict[int, float]:
        """Bytes that a fused computation reads of each parameter: all, unless every use reads or writes a slice."""
        if name in self.reads:
            return self.reads[name]
        inner = self.computations[name]
        users: dict[str, list[Instruction]] = {}
        for user in inner.values():
            for operand in dict.fromkeys(user.operands):
                users.setdefault(operand, []).append(user)

        def bytes_read(value: Instruction) -> float:
            total = 0.0
            for user in users.get(value.name, []):
                first = user.operands[0] == value.name
                if user.opcode == "bitcast":
                    total += bytes_read(user)
                elif user.opcode in ("dynamic-slice", "slice", "gather") and first:
                    total += user.shapes[0].num_bytes
                elif user.opcode == "fusion":
                    inside = self._parameter_reads(get_attribute(user, "calls"))
                    total += sum(inside.get(k, 0.0) for k, operand in enumerate(user.operands) if operand == value.name)
                elif user.opcode in ("tuple", "custom-call") or (user.opcode == "dynamic-update-slice" and first):
                    continue  # passed through, or written in place
                elif not _collective(user.opcode) or _channel(user) not in self.started or _has_async_start(inner):
                    return value.shapes[0].num_bytes
            return min(total, value.shapes[0].num_bytes)

        self.reads[name] = {int(p.operand_text): bytes_read(p) for p in inner.values() if p.opcode == "parameter"}
        return self.reads[name]


def _main_memory_bytes(shapes: Iterable[Shape]) -> float:
    """Bytes of the arrays that are in main memory."""
    return sum(s.num_bytes for s in shapes if not s.on_chip)


def _collective(op: str) -> str | None:
    kind = op.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _channel(i: Instruction) -> str | None:
    match = re.search(r"channel_id=(\d+)", i.attributes)
    return match[1] if match else None


def _has_async_start(computation: Computation) -> bool:
    return any(i.opcode == "custom-call" and ASYNC_START in i.attributes for i in computation.values())


# --- products ----------------------------------------------------------------------------------------------------------------


def _flops(i: Instruction, computation: Computation) -> float:
    if i.opcode == "convolution":
        return _convolution_flops(i, computation[i.operands[0]].shapes[0], computation[i.operands[1]].shapes[0])
    if i.opcode == "custom-call" and (kernel := re.search(rf"{WINDOW_SCOPE}(\d+)/.*splash_mha_(\w+?)_", i.attributes)):
        operands = (computation[name].shapes[0] for name in i.operands)
        queries = next(shape for shape in operands if shape.dtype in ("bf16", "f16", "f32"))  # after tables of integers
        return _attention_flops(queries.dims, kernel[2], int(kernel[1]), i.attributes)
    library = i.opcode == "custom-call" and re.search(r'custom_call_target="[^"]*(matmul|gemm|dot)', i.attributes)
    if i.opcode != "dot" and not library:
        return 0.0
    contracting = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', i.attributes)
    left = computation[i.operands[0]].shapes[0].dims
    axes = [int(d) for d in contracting[1].replace('"', "").split(",") if d] if contracting else [len(left) - 1]
    return 2.0 * i.shapes[0].num_elements * math.prod(left[axis] for axis in axes)


def _attention_flops(queries: tuple[int, ...], phase: str, window: int, attributes: str) -> float:
    """Products of the splash kernel, of the blocks that order and window leave: queries [B, N, T, H], of one row [N, T, H].

    Forward, it multiplies queries with keys and weights with values. Backward, one kernel multiplies scores, gradients of the
    weights and of the queries, another one scores, gradients of the weights, of the values and of the keys.
    """
    *heads, T, H = queries
    block = int(re.search(r'block_q\w*\\?": ?(\d+)', attributes)[1])  # pyright: ignore[reportOptionalSubscript]
    first = (max(0, start - window + 1) // block if window else 0 for start in range(0, T, block))
    pairs = sum(i + 1 - j for i, j in enumerate(first)) * block**2
    return {"fwd": 2, "dq": 3, "dkv": 4}[phase] * 2.0 * math.prod(heads) * pairs * H


def _convolution_flops(i: Instruction, left: Shape, right: Shape) -> float:
    """Products with padding are not counted: XLA:TPU writes batched products as convolutions with much padding."""
    lhs, rhs, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes).groups()  # pyright: ignore[reportOptionalMemberAccess]
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    sizes = dict(part.split("=") for part in window[1].split()) if window else {}
    result = i.shapes[0]
    pairs = 1
    for axis in (c for c in lhs if c.isdigit()):
        n, m, size = left.dims[lhs.index(axis)], result.dims[out.index(axis)], right.dims[rhs.index(axis)]

        def window_field(name: str, default: str, axis: str = axis) -> str:
            return sizes[name].split("x")[int(axis)] if name in sizes else default

        stride, low = int(window_field("stride", "1")), int(window_field("pad", "0_0").split("_")[0])
        rhs_dilation, lhs_dilation = int(window_field("rhs_dilate", "1")), int(window_field("lhs_dilate", "1"))
        positions = (o * stride + k * rhs_dilation - low for o in range(m) for k in range(size))
        pairs *= sum(0 <= p < (n - 1) * lhs_dilation + 1 and p % lhs_dilation == 0 for p in positions)
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    batch = left.dims[lhs.index("b")] / (int(groups[1]) if groups else 1)
    features = right.dims[rhs.index("i")]  # of one group
    return 2.0 * pairs * batch * features * result.dims[out.index("f")]
