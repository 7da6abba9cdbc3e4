"""Supervised fine-tuning: the run behind `lindm sft`.

    OUT/config.json      format version, options, SHA-256 of data and model, learning rate: a resumed run must have the same;
                         what the tasks are where they were drawn
    OUT/metrics.jsonl    one line per step and per evaluation
    OUT/tokens/          tokens of rows (`lindm.llm.sft.token_cache`)
    OUT/checkpoints/     what the run resumes from
    OUT/best/            with patience: the checkpoint with the lowest held-out loss
    OUT/model/           the result, a Hugging Face directory; also OUT/adapter/ where adapters were trained
    OUT/curves.png, .pdf, .svg, manifest.json

A run that is killed at any moment resumes from its last checkpoint and ends with the same bits. A run that has to stop saves
first and raises `Preempted`; an evaluation is left to the run that resumes. All processes reduce their stop flags in every step,
so all save the same step. Before and after the steps there is nothing to save, and a signal does what it does elsewhere
(`lindm.io.signals`). With a larger number of steps a run goes on (`lindm.llm.sft.continuation`).
"""

import contextlib
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from lindm.errors import CheckpointError, DataError, OccupiedError, UsageError, library_errors
from lindm.io import directories, files, signals, temporaries, verification
from lindm.io.manifest import FORMAT, write_manifest
from lindm.io.progress import Progress
from lindm.llm.io import peft, weights
from lindm.llm.parallel import processes, sharding
from lindm.llm.sft import checkpoints, continuation, token_cache
from lindm.llm.sft.batches import BatchLoader
from lindm.llm.sft.callbacks import Callback, TensorBoard, WeightsAndBiases
from lindm.llm.sft.compilation import ADVICE, TrainPrograms
from lindm.llm.sft.drawn_tasks import DrawnTasks
from lindm.llm.sft.evaluator import Evaluator
from lindm.llm.sft.generation import describe_generation, write_chat_settings
from lindm.llm.sft.loop import BEST, CHECKPOINTS, EvalHistory, TrainLoop
from lindm.llm.sft.metrics import CURVES, METRICS, MetricsLogger, plot_curves, read_metrics
from lindm.llm.sft.optimizer import make_optimizer
from lindm.llm.sft.options import DRAWN, RUN_FORMAT, TOKENS, SFTConfig, config_differences
from lindm.llm.sft.profile import PROFILE, StepProfiler
from lindm.llm.sft.setup import TrainingSetup, build_model, setup_training
from lindm.llm.sft.step import TrainState, init_train_state, jit_train_step, make_train_step, state_template, step_shardings
from lindm.llm.tokens import format_example

CONFIG, MODEL, ADAPTER = "config.json", "model", "adapter"
OUTPUTS = (
    TOKENS,
    CHECKPOINTS,
    BEST,
    MODEL,
    ADAPTER,
    METRICS,
    "manifest.json",
    *CURVES,
    "events",
    "wandb",
    PROFILE,
    CONFIG,
)


def train(
    config: SFTConfig,
    *,
    draw: Callable[[], DrawnTasks] | None = None,
    callbacks: Sequence[Callback] = (),
    save_on_stop: bool = True,
) -> Path | None:
    """Train, evaluate and export; the directory of the model, in the first process of the run alone.

    Args:
      draw: of a config with `draw`, the tasks that it names; called after the processes have found each other.
      callbacks: get the metrics, beside those of the options.
      save_on_stop: False: a signal stops the run where it is, and it continues from the last checkpoint that its options ask for.

    Raises:
      LindmError: of the kind of the failure (`lindm.errors`).
      Preempted: the run stopped on a signal, after saving.
    """
    with library_errors("the run", ADVICE):
        return _train(config, draw, callbacks, save_on_stop)


def _train(
    config: SFTConfig, draw: Callable[[], DrawnTasks] | None, callbacks: Sequence[Callback], save_on_stop: bool
) -> Path | None:
    processes.initialize(config.coordinator, config.processes, config.rank)
    is_main = jax.process_index() == 0
    with directories.sole_writer(config.out) if is_main else contextlib.nullcontext():
        if is_main:
            _clean(config.out, config.fresh)
        processes.barrier("output directory")
        setup = setup_training(config, draw)
        if config.profiled_steps is not None and config.profiled_steps[1] > setup.optimizer.steps:
            raise UsageError(f"profile must end at step {setup.optimizer.steps} at the latest; got {config.profile!r}")
        callbacks = [*_callbacks(config, is_main), *callbacks]
        _check_same_run(setup, is_main)
        if is_main and config.token_cache is None:
            token_cache.remove_other_entries(config.out / TOKENS, (setup.train_rows.table, setup.eval_rows.table))
        with Progress(quiet=not is_main) as progress:
            if _is_finished(config.out):
                progress.print(
                    f"already finished, with --steps {setup.optimizer.steps}; more of them go on, --fresh trains again"
                )
                return config.out / MODEL if is_main else None
            _run(setup, callbacks, is_main, progress, save_on_stop)
    return config.out / MODEL if is_main else None


def _clean(out: Path, fresh: bool) -> None:
    """Remove what a killed run left half-written; with `fresh`, everything that an earlier run wrote, its config.json last."""
    for directory in (out / CHECKPOINTS, out / BEST):
        temporaries.remove_leftovers(directory)
    for name in OUTPUTS if fresh else ():
        directories.remove(out / name)


def _check_same_run(setup: TrainingSetup, is_main: bool) -> None:
    """Write config.json, or compare with the one that is there, which may have fewer steps.

    All processes compare and raise the same error, before the first one writes: they would report a lost peer otherwise.

    Raises:
      OccupiedError: OUT holds a run with other settings or data, or other files.
      DataError: its config.json is missing, or a model that it has written is damaged.
      CheckpointError: a run with results has no checkpoint to go on from with more steps.
    """
    out, path = setup.config.out, setup.config.out / CONFIG
    config, steps = {"options": setup.config.to_json(), "inputs": setup.inputs}, setup.optimizer.steps
    config["defaults"] = setup.platform_options | {"learning_rate": setup.optimizer.learning_rate}
    drawn = {} if setup.drawn is None else {DRAWN: setup.drawn}  # follows from the inputs, which are compared
    old = files.read_json(path, format=RUN_FORMAT) if path.exists() else None
    longer = old is not None and continuation.is_longer(old, steps)
    if old is None:
        _require_no_run(out)
    else:
        _require_same(out, old, config, longer)
    if longer:
        continuation.require_checkpoint(out, steps)
    else:
        _verify_exports(out)
    processes.barrier("settings are compared")
    if is_main and old is None:
        files.write_json(path, config | drawn | continuation.first_schedule(steps), format=RUN_FORMAT)
    elif is_main and old is not None and longer:
        continuation.extend_run(out, old, config | drawn, steps)
    processes.barrier("settings")


def _require_same(out: Path, old: dict[str, Any], config: dict[str, Any], longer: bool) -> None:
    """OccupiedError where the settings of two runs differ. An option that is left out counts as the default that it has."""
    defaults = old.get("defaults", {})
    options = config["options"] | {name: value for name, value in config["defaults"].items() if name in defaults}
    if longer:
        options["steps"] = old["options"].get("steps")
    before = old.get("options", {}) | defaults
    differences = config_differences(before, options)
    same = [name for name in before.keys() | options.keys() if before.get(name) == options.get(name)]
    # one sentence for an option and the files that follow from it
    was, now = ({k: v for k, v in c.get("inputs", {}).items() if k in same or k not in options} for c in (old, config))
    differences += config_differences(was, now)
    if differences:
        raise OccupiedError(f"{out} holds another run: {'; '.join(differences)}; choose another --out, or --fresh")


def _require_no_run(out: Path) -> None:
    """DataError where a directory without config.json has outputs of a run, OccupiedError where it has anything else."""
    if left := [out / name for name in OUTPUTS if name != TOKENS and (out / name).exists()]:
        raise DataError(f"{out / CONFIG} is missing, although {left[0]} is there; choose another --out, or --fresh")
    if foreign := sorted(p.name for p in out.iterdir() if p.name not in OUTPUTS and not p.name.startswith(".")):
        raise OccupiedError(f"{out} is not empty and holds no run ({', '.join(foreign[:3])}); choose another --out")


def _is_finished(out: Path) -> bool:
    """Whether a run has written its manifest, the last of its files, and all that it lists is there and intact."""
    try:
        return not verification.find_damage(out, verification.read_manifest(out, FORMAT)["outputs"])
    except DataError:  # the run makes its results again
        return False


def _verify_exports(out: Path) -> None:
    """DataError where a model or an adapter that an earlier run has written is damaged."""
    for directory in (out / MODEL, out / ADAPTER):
        if directory.exists():
            try:
                verification.verify_file_list(directory, required=True)
            except DataError as e:
                raise DataError(f"{e}; without {directory} the same command writes it again from its checkpoint") from e


def _callbacks(config: SFTConfig, is_main: bool) -> list[Callback]:
    """The callbacks of the options. UsageError where one needs a package that is not installed."""
    callbacks: list[Callback] = []
    if is_main and config.tensorboard:
        callbacks.append(TensorBoard(config.out / "events"))
    if is_main and config.wandb is not None:
        callbacks.append(WeightsAndBiases(config.out, config.wandb))
    return callbacks


def _run(setup: TrainingSetup, callbacks: Sequence[Callback], is_main: bool, progress: Progress, save_on_stop: bool) -> None:
    """Build, compile, restore, train, export."""
    config, out, total = setup.config, setup.config.out, setup.optimizer.steps
    if is_main:
        _print_setup(setup, progress)
    optimizer = make_optimizer(setup.optimizer)
    graphdef, params, frozen = nnx.split(build_model(setup), nnx.Param, ...)
    template = state_template(params, optimizer, setup.mesh)
    shardings = step_shardings(template, frozen, setup.mesh)
    params, frozen = _reshard(params, shardings.state.params), _reshard(frozen, shardings.frozen)
    loader = BatchLoader(setup, shardings.batch, shardings.stop_flags)
    task = progress.add("train", total)
    task.update(0, detail="compiling")
    train_step = make_train_step(graphdef, optimizer, setup.compute, setup.mesh, setup.objective, config.seed)
    train_step = jit_train_step(train_step, shardings)
    programs = TrainPrograms(train_step, template, frozen, loader)
    progress.print(f"batches   {loader}; compiled in {programs.seconds:.1f} s")
    checkpoint = _restore(out / CHECKPOINTS, template, progress)
    if checkpoint is None:
        state = jax.jit(lambda p: init_train_state(p, optimizer), out_shardings=shardings.state)(params)
        history, step = EvalHistory(), 0
        if (out / METRICS).exists():
            progress.print("an earlier start of this run left no checkpoint: it begins at step 0 (--save-every)")
    else:
        state, history, step = checkpoint.state, EvalHistory(**checkpoint.progress), checkpoint.step
        history, goes_on = continuation.begin_longer_schedule(out, step, history, setup.optimizer)
        progress.print(goes_on or f"resumed at step {step} of {total}")
    del params
    gc.collect()
    if step and is_main and not (out / METRICS).exists():
        progress.print(f"{out / METRICS} is missing: the records of the steps up to {step} are lost")
    logger = MetricsLogger(out, step, history.last_step, is_main, callbacks, config.to_json(), warn=progress.print)
    evaluator = Evaluator(setup, graphdef)
    if config.profiled_steps is not None and config.profiled_steps[0] <= step:
        progress.print(f"step {config.profiled_steps[0]} is trained already: there is no new trace")
    profiler = StepProfiler(out, config.profiled_steps, programs.texts, is_main)
    loop = TrainLoop(setup, programs, loader, evaluator, logger, profiler, progress, task)
    try:
        with signals.unsaved_work(lambda: _last_saved(out)) if save_on_stop else contextlib.nullcontext():
            state, history, step = loop.run(state, frozen, history, step)
    finally:
        logger.close()
    if config.patience is not None and history.best_loss is not None:
        state, history = _best(setup, state, history, template, progress)
    model = nnx.merge(graphdef, state.params, frozen)
    _export(setup, model, is_main)
    if setup.end_tokens:
        example = (setup.eval_rows or setup.train_rows)[0][0]
        answer = describe_generation(model, setup.tokenizer, example, setup.end_tokens, setup.compute.dtype)
        progress.print(f"answer    {answer}")
    if is_main:
        records = read_metrics(out)
        curves = plot_curves(out, records)
        directories.remove(out / BEST)
        checkpoints.remove_old(out / CHECKPOINTS, config.keep)  # a run that was killed after its last save did not
        last_eval = next((r for r in reversed(records) if r["kind"] == "eval"), None)
        if last_eval is None and (losses := [r["loss"] for r in records if r["kind"] == "train"]):
            progress.print(f"loss      {losses[-1]:.4g} in the last step of training; nothing is held out")
        exports = [f"{name}/{verification.MANIFEST}" for name in (MODEL, ADAPTER) if (out / name).exists()]
        outputs = [CONFIG, METRICS, *exports, *(path.name for path in curves)]
        values = {"steps": step, "best_step": history.best_step, "last_eval": last_eval, "compile_seconds": programs.seconds}
        write_manifest(out, outputs, inputs=setup.inputs, **values)
    processes.barrier("end")


def _restore(directory: Path, template: TrainState, progress: Progress) -> checkpoints.Checkpoint | None:
    """`checkpoints.restore`, which says what it skips."""
    checkpoint = checkpoints.restore(directory, template)
    for reason in () if checkpoint is None else checkpoint.skipped:
        progress.print(f"skipped a damaged checkpoint: {reason}")
    return checkpoint


def _best(
    setup: TrainingSetup, state: TrainState, history: EvalHistory, template: TrainState, progress: Progress
) -> tuple[TrainState, EvalHistory]:
    """The state with the lowest held-out loss; any state where the run has exported its model already.

    Raises:
      CheckpointError: there is none, and the model is still to be written.
    """
    out = setup.config.out
    best = _restore(out / BEST, template, progress)
    if best is None:
        exports = (MODEL,) if setup.config.method == "full" else (MODEL, ADAPTER)
        if all((out / name).exists() for name in exports):
            return state, history
        raise CheckpointError(
            f"{out / BEST} is missing, which has the weights with the lowest held-out loss, of step {history.best_step}; "
            "--fresh trains again"
        )
    if best.step != history.best_step:  # of an evaluation before a kill, which gave another loss after it
        progress.print(f"the best weights that are kept are those of step {best.step}, not of step {history.best_step}")
    return best.state, history._replace(best_step=best.step)


def _last_saved(out: Path) -> str:
    steps = checkpoints.checkpoint_steps(out / CHECKPOINTS)
    return f"the last checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"


def _reshard(state: nnx.State, shardings: nnx.State) -> nnx.State:
    """Every weight with its sharding; a weight that has it already is not copied."""

    def reshard(x: jax.Array, s: NamedSharding) -> jax.Array:
        return x if x.sharding.is_equivalent_to(s, x.ndim) else sharding.shard_array(np.asarray(x), s)

    return jax.tree.map(reshard, state, shardings)


# --- before and after ------------------------------------------------------------------------------------------------------


def _print_setup(setup: TrainingSetup, progress: Progress) -> None:
    """Print what will be trained, and one example with its labels marked."""
    config, m = setup.config, setup.model_config
    train, held_out = setup.train_rows, len(setup.eval_rows.members)
    overlong = "".join(f"; {setup.inputs[name]:,} {name}" for name in ("truncated", "dropped") if name in setup.inputs)
    decisions = f"; decisions on {len(setup.decision_tasks.tasks)} tasks" if setup.decision_tasks else ""
    rows = f"{config.accumulate} x {config.batch} rows" if config.accumulate > 1 else f"{config.batch} rows"
    start = "randomly initialized" if config.model is None else str(config.model)
    for line in (
        f"model     {m.model_type}, {m.num_parameters:,} parameters, {m.num_layers} layers, hidden size {m.hidden_size}; {start}",
        f"method    {config.method}{_describe_adapters(setup)}",
        f"steps     {setup.optimizer.steps:,} of {rows}, mesh {dict(setup.mesh.shape)}",
        f"optimizer {_describe_optimizer(setup)}",
        f"data      {len(train.members):,} documents, {train.tokens.sum():,} tokens, {train.labels.sum():,} labels{overlong}; "
        f"rows of {setup.seq_len} tokens, at most {setup.max_labels} labels each",
        f"held out  {held_out:,} document{'s' * (held_out != 1)}{decisions}",
        *_warnings(setup),
        "",
        format_example(train[0][0], setup.tokenizer, 600),
        "",
    ):
        progress.print(line)


def _warnings(setup: TrainingSetup) -> list[str]:
    if not setup.endless:
        return []
    lost = f"{setup.endless:,} truncated document{'s lose' if setup.endless != 1 else ' loses'} the end of a trained answer"
    return [f"warning   {lost}: the model does not learn to stop there; --overlong drop leaves such documents out"]


def _describe_optimizer(setup: TrainingSetup) -> str:
    o, config = setup.optimizer, setup.config
    moments = ", first moments in bf16" if o.moments == "bf16" else ""
    default = f" (the default of {config.preset or config.method} at hidden size {setup.model_config.hidden_size})"
    return f"{o.optimizer}{moments}, learning rate {o.learning_rate:g}{'' if config.learning_rate is not None else default}"


def _describe_adapters(setup: TrainingSetup) -> str:
    if setup.lora is None:
        return ""
    rank, alpha, scaling, targets = setup.lora
    start = f" from {setup.config.adapter}" if setup.config.adapter else ""
    return f" ({scaling} adapters{start} of rank {rank}, alpha {alpha:g} on {', '.join(targets)}; {setup.base} base weights)"


def _export(setup: TrainingSetup, model: Any, is_main: bool) -> None:
    """Write the model as a Hugging Face directory. An export of an earlier, finished run of the same settings is the same."""
    config, out = setup.config, setup.config.out
    missing = {name: not (out / name).exists() for name in (MODEL, ADAPTER)}
    with contextlib.ExitStack() as stack:
        base = config.model
        if base is None:
            base = temporaries.temporary_path(out / "tokenizer")
            if is_main:
                stack.enter_context(temporaries.temporary_directory(out / "tokenizer"))
                setup.tokenizer.save_pretrained(str(base))
        processes.barrier("export")  # every process has looked for the directories, and the tokenizer is written
        if missing[MODEL]:
            weights.save(model, out / MODEL, like=base, edit=lambda directory: _write_chat_settings(setup, directory))
    if config.method != "full" and missing[ADAPTER]:
        assert setup.lora is not None
        peft.save_adapter(model, out / ADAPTER, str(config.model), setup.lora.scaling)


def _write_chat_settings(setup: TrainingSetup, directory: Path) -> None:
    if setup.end_tokens:
        template = None if setup.config.chat_template is None else setup.tokenizer.get_chat_template()
        write_chat_settings(directory, setup.tokenizer, setup.end_tokens, template)
