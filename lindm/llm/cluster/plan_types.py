"""The nouns of a plan: the step, the memory and the limits of a device, and what a mesh takes."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from lindm.choices import Moments, Optimizer, check_choices
from lindm.llm.cluster.program_cost import ProgramCost
from lindm.llm.config import BaseFormat, ModelConfig, Remat
from lindm.llm.sft.options import Method


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """The training step of a run."""

    model_config: ModelConfig
    batch: int  # rows per micro-batch, over all devices
    seq: int  # tokens per row
    labels_per_row: int = 64  # maximum
    accumulate: int = 1  # micro-batches per step
    method: Method = "full"
    lora_rank: int = 16
    base: BaseFormat = "f32"
    dtype: Literal["f32", "bf16"] = "bf16"  # of the activations
    remat: Remat = "selective"
    optimizer: Optimizer = "adamw"
    moments: Moments = "f32"  # storage of AdamW's first moments

    def __post_init__(self):
        for name in ("batch", "seq", "labels_per_row", "accumulate", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.labels_per_row <= self.seq <= self.model_config.max_position_embeddings:
            longest = self.model_config.max_position_embeddings
            limit = f"at least labels_per_row = {self.labels_per_row} and at most the model's {longest}"
            raise ValueError(f"seq must be {limit}; got {self.seq}")
        bases = {"full": ("f32",), "lora": get_args(BaseFormat), "qlora": ("int8", "nf4")}
        check_choices(self)
        if self.base not in bases[self.method]:
            raise ValueError(f"base must be one of {', '.join(bases[self.method])} with method {self.method}; got {self.base!r}")


class DeviceMemory(NamedTuple):
    """Bytes on one device, as reported by the compiler, or estimated."""

    arguments: int  # weights, optimizer state, batch
    outputs: int  # that do not reuse the memory of arguments
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        return sum(self)


class DeviceLimits(NamedTuple):
    """Memory and peak rates of a device; None where not known."""

    device_kind: str
    memory: int | None  # bytes
    peak_flops: float  # operations per second
    memory_bandwidth: float | None  # bytes per second
    link_bandwidth: float | None  # bytes per second


@dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """The step on one mesh, compiled or estimated; all numbers are per device and step."""

    mesh: dict[str, int]
    fits: bool
    estimated: bool = False  # by `lindm.llm.cluster.estimate`, not compiled
    memory: DeviceMemory | None = None  # None: the compiler refused the program
    refusal: str = ""  # the compiler's message
    required_bytes: int | None = None  # by that message
    cost: ProgramCost | None = None
    time_bounds: dict[str, float] | None = None  # least seconds for each of compute, memory, links
    compile_seconds: float = 0.0

    @property
    def bound_seconds(self) -> float:
        """Least seconds per step."""
        return max(self.time_bounds.values()) if self.time_bounds else math.inf
