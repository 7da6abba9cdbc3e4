"""What `lindm sft` is asked to do. Nothing heavy is imported here: the command line reads it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METHODS = ("full", "lora", "qlora")
PRESETS = ("tiny",)
REWARDS = ("auto", "shown", "hidden")
# what decides how and where a run computes, but not what; a resumed run may change it
FREE = {"out", "mesh", "coordinator", "processes", "rank", "save_every", "keep", "tensorboard", "fresh"}


@dataclass(frozen=True, kw_only=True)
class Sft:
    """Fine-tune a language model on labelled decisions, or on prompts and completions. A run that is stopped resumes."""

    data: Path
    """a directory of `lindm data make`, or a .jsonl file with rows {"prompt", "completion"} or {"messages"}"""
    out: Path
    """the run's directory; the model goes to OUT/model"""
    model: Path | None = None
    """a Hugging Face directory (`lindm model import` makes one)"""
    preset: str | None = None
    """tiny: a model of about a million weights from scratch, with a vocabulary of its own; in place of --model"""
    fresh: bool = False
    """start over: remove what an earlier run wrote to the same place"""

    # what is trained
    method: str = "full"
    """full, lora, or qlora (adapters over base weights in few bits)"""
    lora_rank: int = 16
    lora_alpha: float = 32.0
    base: str | None = None
    """of lora and qlora, what the base weights are held in: f32, bf16, int8 or nf4 [default: f32, and nf4 with qlora]"""
    dtype: str = "auto"
    """of the activations: f32 or bf16 [default: bf16 on accelerators]; master weights are f32 always"""
    remat: str | None = None
    """activations computed again in the backward pass: full (all, least memory), selective (all but products with
    weights) or none [default: selective, and none with a preset]"""

    # on what
    supervise: str = "all"
    """of labelled episodes: all (every action of every demonstration and of the query) or query"""
    template: str | None = None
    """of the text: compact, readable, or a JSON or TOML file [default: compact, readable with --names]"""
    names: bool = False
    """use the problem's own names in the text"""
    rewards: str = "auto"
    """shown, hidden or auto: shown where the state is seen, hidden where they could tell of it"""
    seq: int | None = None
    """tokens of a row [default: the longest document]"""
    pack: bool = False
    """several documents in a row; they do not see each other"""
    held_out: float = 0.1
    """share of the tasks (or rows) that are kept for evaluation"""
    eval_data: Path | None = None
    """evaluate on these data in place of a share of the training data"""

    # how
    steps: int | None = None
    """[default: three passes over the data; 500 with --preset tiny]"""
    batch: int = 8
    """rows of a micro-batch, over all devices"""
    accumulate: int = 1
    """micro-batches of a step"""
    learning_rate: float | None = None
    """peak [default: 2e-4, 1e-3 with adapters or a preset]"""
    warmup: float = 0.1
    """share of the steps"""
    weight_decay: float = 0.0
    clip: float = 1.0
    """largest norm of a gradient"""
    seed: int = 0

    # looking and keeping
    eval_every: int | None = None
    """steps between two evaluations [default: a quarter of the steps]"""
    eval_tasks: int = 16
    """held-out tasks on which decisions are measured; 0: only the loss"""
    patience: int | None = None
    """stop after so many evaluations without a better held-out loss, and keep the best model"""
    save_every: int | None = None
    """steps between two checkpoints [default: those between two evaluations]"""
    keep: int = 2
    """checkpoints that are kept"""
    tensorboard: bool = False
    """write events as well (extra: track)"""

    # where
    mesh: str | None = None
    """axes data, fsdp and tensor, such as fsdp=8,tensor=2 [default: fsdp over all devices]"""
    coordinator: str | None = None
    """host:port of the first process; SLURM, Open MPI and TPU hosts are found without"""
    processes: int | None = None
    rank: int | None = None
    """this process, from 0"""

    def __post_init__(self):
        if (self.model is None) == (self.preset is None):
            raise ValueError("one of model and preset must be given: a directory to start from, or tiny")
        choices = {
            "preset": (None, *PRESETS),
            "method": METHODS,
            "base": (None, "f32", "bf16", "int8", "nf4"),
            "dtype": ("auto", "f32", "bf16"),
            "supervise": ("all", "query"),
            "remat": (None, "full", "selective", "none"),
            "rewards": REWARDS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                known = ", ".join(str(word) for word in allowed if word is not None)
                raise ValueError(f"{name} must be one of {known}; got {getattr(self, name)!r}")
        least = {"lora_rank": 1, "seq": 2, "steps": 1, "batch": 1, "accumulate": 1, "seed": 0}
        least |= {"eval_every": 1, "eval_tasks": 0, "patience": 1, "save_every": 1, "keep": 1}
        for name, smallest in least.items():
            if (value := getattr(self, name)) is not None and value < smallest:
                raise ValueError(f"{name} must be at least {smallest}; got {value}")
        if self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be above 0; got {self.lora_alpha}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be in [0, 1); got {self.held_out}")
        if self.method == "full" and self.base is not None:
            raise ValueError(f"base must be left out with method full, which trains all weights; got {self.base!r}")
        if self.preset and self.method != "full":
            raise ValueError(f"method must be full with a preset, whose weights are random at first; got {self.method!r}")
        if self.method == "qlora" and self.base in ("f32", "bf16"):
            raise ValueError(f"base must be int8 or nf4 with method qlora; got {self.base!r}")

    @property
    def held_base(self) -> str:
        return self.base or ("nf4" if self.method == "qlora" else "f32")

    def plain(self) -> dict[str, Any]:
        """JSON-like; what `differences` compares."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """In what two runs' settings differ that decides what they compute."""
    keys = sorted((there.keys() | here.keys()) - FREE)
    return [f"{k} is {there.get(k)!r} there and {here.get(k)!r} here" for k in keys if there.get(k) != here.get(k)]
