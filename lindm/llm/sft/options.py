"""The options of `lindm sft`. The command line reads this module, so it imports nothing heavy."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lindm.choices import Loss, Moments, Optimizer, Overlong, Preset, Rewards, Supervise, check_choices
from lindm.io import files
from lindm.llm.config import BaseFormat, LoraScaling, Remat
from lindm.llm.model_families import parse_lora_targets

RUN_FORMAT = "lindm-sft-2"  # of config.json
DRAWN = "drawn"  # key of config.json: what drawn tasks are, whatever name `draw` gives them
TOKENS = "tokens"  # directory of the tokens of rows in OUT, written before config.json

Method = Literal["full", "lora", "qlora"]
# options that decide where a run computes and what it keeps, but not what it computes: a resumed run may change them
CHANGEABLE_ON_RESUME = {
    "out",
    "mesh",
    "coordinator",
    "processes",
    "rank",
    "save_every",
    "keep",
    "profile",
    "tensorboard",
    "token_cache",
    "wandb",
    "fresh",
}
MINIMA = {"lora_rank": 1, "max_length": 2, "steps": 1, "batch": 1, "accumulate": 1, "seed": 0}
LORA_OPTIONS = ("lora_rank", "lora_alpha", "lora_scaling", "lora_targets", "lora_dropout", "adapter")
MINIMA |= {"eval_every": 1, "eval_tasks": 0, "patience": 1, "save_every": 1, "keep": 1}


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Fine-tune a language model on labeled decisions or on prompts and completions. An interrupted run resumes."""

    data: Path | None = None
    """A directory of `lindm data make`, or rows (conversations, prompts with completions, or texts): a .jsonl, .jsonl.gz,
    .json, .parquet or .arrow file, a directory of such files, or a directory of Hugging Face datasets."""
    draw: str | None = None
    """Instead of --data: the arguments of `lindm data make` without --out, such as "mdp --horizon 4 --tasks 4000 --demos 5".
    The tasks are drawn and labeled when the run starts, and never written. The result is bit for bit that of a run on the
    written data."""
    out: Path
    """Directory of the run; the model is written to OUT/model."""
    model: Path | None = None
    """Base model: a Hugging Face directory (see `lindm model import`)."""
    preset: Preset | None = None
    """Instead of --model: a randomly initialized model of 1.4 (tiny) or 11 (small) million weights, with its own vocabulary."""
    fresh: bool = False
    """Remove what an earlier run wrote to OUT."""

    # method
    method: Method = "full"
    """What to train: all weights (full), adapters (lora), or adapters over a quantized base model (qlora)."""
    lora_rank: int | None = None
    """Rank of the adapters. [default: 16]"""
    lora_alpha: float | None = None
    """Scale of the adapters: their product is multiplied by alpha / rank. [default: 32]"""
    lora_scaling: LoraScaling | None = None
    """Scale by alpha / rank (standard), or by alpha / sqrt(rank) (rslora). [default: standard]"""
    lora_targets: str | None = None
    """Linear layers with adapters: all, attention, mlp, or names such as q_proj,v_proj. [default: all]"""
    lora_dropout: float = 0.0
    """Probability of dropout at the input of the adapters."""
    adapter: Path | None = None
    """Continue training this adapter: a PEFT directory, or a run with adapters. It determines rank, alpha, scaling and
    targets."""
    base: BaseFormat | None = None
    """Storage format of the base weights with lora and qlora. [default: nf4 with qlora; with lora bf16 on accelerators and f32 on
    CPUs]"""
    dtype: Literal["auto", "f32", "bf16"] = "auto"
    """Type of the activations; trained weights are always f32. [default: bf16 on accelerators, f32 on CPUs]"""
    remat: Remat | None = None
    """What the backward pass recomputes: full (all activations, least memory), selective (all but products with weights) or
    none. [default: selective; none with a preset]"""

    # data
    supervise: Supervise = "all"
    """Which actions of a dataset are trained: those of demonstrations and queries (all), or those of queries only (query)."""
    loss: Loss = "action"
    """Loss at each action of a dataset: cross-entropy of the oracle's action (action), of its softmax policy (soft) or of the
    demonstrator's action (behavior), or expected regret (regret)."""
    loss_temperature: float = 0.1
    """Temperature of the softmax policy of --loss soft, in units of reward."""
    template: str | None = None
    """Text template: compact, readable, the name of a family (implies --names), or a JSON or TOML file. [default: compact;
    readable with --names]"""
    names: bool = False
    """Use the problem's own names in the text."""
    rewards: Rewards = "auto"
    """Rewards in the text; auto shows them only if the state is observed."""
    max_length: int | None = None
    """Maximum number of tokens of a document, and with --pack of a row. [default: the context of the model; with --pack the
    longest document]"""
    overlong: Overlong = "refuse"
    """A document with more tokens: refuse it with an error, truncate its end, or drop it."""
    pack: bool = False
    """Fill rows up to the maximum length before training starts. --batch then counts full rows, and a step trains more
    documents."""
    chat_template: Path | None = None
    """Chat template to use instead of that of the model; the trained model keeps it."""
    chat_template_kwargs: str | None = None
    """Variables of the chat template as JSON, such as {"enable_thinking": false}. A row may have its own."""
    token_cache: Path | None = None
    """Directory for the tokens of rows. Several runs can share it, and it is safe to remove. [default: OUT/tokens]"""
    held_out: float = 0.1
    """Fraction of the tasks (or rows) that is held out for evaluation. Equal rows are all held out or all trained."""
    held_out_key: str | None = None
    """Column of the rows. Rows with the same value in it, such as all rows of a patient, are all held out or all trained."""
    eval_data: Path | None = None
    """Data for the evaluation, instead of a held-out fraction of the training data."""

    # optimization
    steps: int | None = None
    """Number of steps. With a larger number a run continues, even a finished one. [default: three epochs; 500 steps with a
    preset]"""
    batch: int = 8
    """Documents per micro-batch, over all devices. Short documents share rows, but do not attend to each other."""
    accumulate: int = 1
    """Micro-batches per step (gradient accumulation)."""
    optimizer: Optimizer = "adamw"
    """AdamW, or Adafactor, which needs less memory."""
    moments: Moments = "f32"
    """Storage of AdamW's first moments."""
    learning_rate: float | None = None
    """Peak learning rate. [default: 1e-3 with tiny, 5e-4 with small; otherwise by hidden size, such as 1.3e-4 at 576 and 2.9e-5
    at 4096, and ten times as much with adapters]"""
    warmup: float = 0.1
    """Warm-up, as a fraction of the steps."""
    weight_decay: float = 0.0
    """Weight decay of the matrices."""
    clip: float = 1.0
    """Maximum global norm of the gradient."""
    seed: int = 0
    """Seed of initial weights, held-out tasks and data order."""

    # evaluation and checkpoints
    eval_every: int | None = None
    """Steps between evaluations. [default: a quarter of the steps]"""
    eval_tasks: int = 16
    """Number of held-out tasks on which decisions are evaluated; 0 evaluates the loss only."""
    patience: int | None = None
    """Stop after this many evaluations without a lower held-out loss, and keep the best model."""
    save_every: int | None = None
    """Steps between checkpoints. [default: as --eval-every]"""
    keep: int = 2
    """Number of checkpoints to keep."""
    profile: str | None = None
    """FROM:TO: write a trace of these steps and a table of their slowest operations to OUT/profile."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra: track)."""
    wandb: Literal["offline", "online"] | None = None
    """Also log to Weights & Biases (extra: wandb): offline to files in OUT/wandb, which `wandb sync` uploads, or online."""

    # devices and processes
    mesh: str | None = None
    """Sizes of the axes data, fsdp and tensor, such as fsdp=8,tensor=2. [default: fsdp over all devices]"""
    coordinator: str | None = None
    """HOST:PORT of process 0. SLURM, Open MPI and TPU hosts are detected and do not need it."""
    processes: int | None = None
    """Number of processes."""
    rank: int | None = None
    """Number of this process, from 0."""

    def __post_init__(self):
        if (self.data is None) == (self.draw is None):
            raise ValueError(
                "exactly one of data and draw must be given: a directory or a file, or the options of `lindm data make`"
            )
        if (self.model is None) == (self.preset is None):
            raise ValueError(
                "exactly one of model and preset must be given: the directory of a base model, or one of tiny and small"
            )
        check_choices(self)
        for name, minimum in MINIMA.items():
            if (value := getattr(self, name)) is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}; got {value}")
        for option in dataclasses.fields(self):
            if isinstance(value := getattr(self, option.name), float) and not math.isfinite(value):
                raise ValueError(f"{option.name} must be a finite number; got {value}")
        if self.held_out_key is not None and self.eval_data is not None:
            raise ValueError(f"held_out_key must be left out with eval_data; got {self.held_out_key!r}")
        if self.loss_temperature <= 0:
            raise ValueError(f"loss_temperature must be above 0; got {self.loss_temperature}")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be above 0; got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1); got {self.lora_dropout}")
        for name in LORA_OPTIONS if self.method == "full" else ():
            if getattr(self, name):
                raise ValueError(f"{name} must be left out with method full, which trains all weights; got {getattr(self, name)}")
        if self.lora_targets is not None:
            parse_lora_targets(self.lora_targets)
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be in [0, 1); got {self.held_out}")
        if self.method == "full" and self.base is not None:
            raise ValueError(f"base must be left out with method full, which trains all weights; got {self.base!r}")
        if self.preset and self.method != "full":
            raise ValueError(f"method must be full with a preset, which is randomly initialized; got {self.method!r}")
        if self.method == "qlora" and self.base in ("f32", "bf16"):
            raise ValueError(f"base must be int8 or nf4 with method qlora; got {self.base!r}")
        _ = self.template_variables, self.profiled_steps  # for their errors

    @property
    def template_variables(self) -> dict[str, Any]:
        """`chat_template_kwargs` as an object."""
        try:
            variables = json.loads(self.chat_template_kwargs or "{}")
        except (ValueError, RecursionError):
            variables = None
        if not isinstance(variables, dict):
            raise ValueError(f"chat_template_kwargs must be a JSON object; got {self.chat_template_kwargs!r}")
        return variables

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """First and last step of `profile`, from 1."""
        if self.profile is None:
            return None
        first, _, last = self.profile.partition(":")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ValueError(f"profile must be FROM:TO with 1 <= FROM <= TO; got {self.profile!r}")
        return int(first), int(last)

    def to_json(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


PATH_OPTIONS = tuple(f.name for f in dataclasses.fields(SFTConfig) if Path in (f.type, *get_args(f.type)))


def default_base(method: Method, platform: str) -> BaseFormat:
    """Storage format of the base weights on devices of a platform: under adapters, accelerators hold them as they compute."""
    if method == "qlora":
        return "nf4"
    return "bf16" if method == "lora" and platform != "cpu" else "f32"


def run_options(directory: Path) -> dict[str, Any] | None:
    """The options of a run of `lindm sft`; None for another directory. DataError where another version of lindm wrote it."""
    path = directory / "config.json"
    if not path.is_file():
        return None
    config = files.read_json(path)
    if "options" not in config and not str(config.get("format")).startswith("lindm-sft-"):
        return None
    return files.read_json(path, format=RUN_FORMAT)["options"]


def drawn_description(directory: Path) -> dict[str, Any] | None:
    """What the tasks are that a run of `lindm sft` drew, as the manifest of a dataset says it; None where it drew none."""
    return files.read_json(directory / "config.json", format=RUN_FORMAT).get(DRAWN)


def config_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The settings that differ between two runs and decide what they compute, one sentence each."""
    keys = sorted((old.keys() | new.keys()) - CHANGEABLE_ON_RESUME)
    return [_difference(k, old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)]


def _difference(key: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):  # file name -> SHA-256
        changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        return f"{key} has other files ({', '.join(changed[:3])})"
    return f"{key} was {old!r} and is now {new!r}"
