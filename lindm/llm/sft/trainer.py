"""Supervised fine-tuning: the run behind `lindm sft`.

    OUT/config.json      options and the SHA-256 of data and model: a resumed run must have the same
    OUT/metrics.jsonl    a line a step, and a line an evaluation
    OUT/checkpoints/     what the run resumes from
    OUT/best/            with patience: the step with the lowest held-out loss
    OUT/model/           the result, a Hugging Face directory; OUT/adapter/ too where adapters were trained
    OUT/curves.png, .pdf, manifest.json

A run that is killed at any moment goes on from its last checkpoint and ends with the same bits; one that is asked to stop saves
first and ends with exit code 75, leaving an evaluation to the run that resumes. Every process asks for the stop flag of all in
the same step, so all save the same one.
"""

import contextlib
import gc
import hashlib
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from lindm.errors import NonFiniteError, OutOfMemoryError, Preempted, UsageError
from lindm.io import directories, files, manifest, signals
from lindm.llm.io import peft, weights
from lindm.llm.parallel import chips, processes, sharding
from lindm.llm.sft import checkpoints, packing
from lindm.llm.sft import metrics as journal
from lindm.llm.sft.evaluator import Evaluator, Interrupted, flops_of_step
from lindm.llm.sft.optimizer import make_optimizer
from lindm.llm.sft.options import SFTConfig, config_differences
from lindm.llm.sft.setup import Prepared, build, prepare
from lindm.llm.sft.step import TrainState, init_train_state, jit_train_step, make_train_step, step_shardings
from lindm.llm.tokens import format_example

FORMAT = "lindm-sft-1"  # of config.json
CONFIG, CHECKPOINTS, BEST, MODEL, ADAPTER = "config.json", "checkpoints", "best", "model", "adapter"
OURS = (CONFIG, CHECKPOINTS, BEST, MODEL, ADAPTER, "metrics.jsonl", "manifest.json", "curves.png", "curves.pdf", "events")
OURS += ("tokenizer",)  # of a model from nothing


class Host(NamedTuple):
    """What the host remembers between steps, beside the state."""

    looked: int = -1  # the step after which it was evaluated last
    best: float | None = None  # held-out loss
    best_step: int = 0
    worse: int = 0  # evaluations since


def run(options: SFTConfig) -> int:
    """Train, evaluate, export; 0. Ends by `LindmError` with the exit codes of the command line."""
    signals.stop_on_signals()
    processes.start(options.coordinator, options.processes, options.rank)
    first = jax.process_index() == 0
    with directories.sole_writer(options.out) if first else contextlib.nullcontext():
        if options.fresh and first:
            _start_over(options.out)
        processes.barrier("the directory is ours")
        prepared = prepare(options)
        _same_run(prepared, first)
        return _train(prepared, first)


def _start_over(out: Path) -> None:
    for name in OURS:
        path = out / name
        with files.storage_errors(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _same_run(prepared: Prepared, first: bool) -> None:
    """UsageError if the directory holds a run with other settings or other data; otherwise the settings are written there."""
    options, path = prepared.options, prepared.options.out / CONFIG
    config = {"options": options.to_json(), "inputs": prepared.inputs}
    if path.exists():
        there = files.read_json(path, format=FORMAT)
        found = config_differences(there.get("options", {}), config["options"])
        if there.get("inputs") != config["inputs"]:
            found += config_differences(there.get("inputs", {}), config["inputs"])
        if found:
            raise UsageError(f"{options.out} holds another run: {'; '.join(found)}; choose another --out, or --fresh")
    elif first:
        if foreign := sorted(p.name for p in options.out.iterdir() if p.name not in OURS and not p.name.startswith(".")):
            raise UsageError(f"{options.out} is not empty and holds no run ({', '.join(foreign[:3])}); choose another --out")
        files.write_json(path, config, format=FORMAT)
    processes.barrier("settings")


# --- training --------------------------------------------------------------------------------------------------------------


def _train(prepared: Prepared, first: bool) -> int:
    options, mesh, total = prepared.options, prepared.mesh, prepared.optimizer_config.steps
    out = options.out
    if first:
        _introduce(prepared)
    model = build(prepared)
    optimizer = make_optimizer(prepared.optimizer_config)
    graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
    del model
    shapes = jax.eval_shape(lambda p: init_train_state(p, optimizer), params)
    shardings = step_shardings(shapes, frozen, mesh)
    params, frozen = _placed(params, shardings.state.params), _placed(frozen, shardings.frozen)
    template = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings.state)
    step = jit_train_step(make_train_step(graphdef, optimizer, prepared.compute, mesh), shardings)
    feed = _Feed(prepared, shardings.batch, shardings.stop_flags)
    compiled = _compiled(step, template, frozen, feed)
    signals.note_signals()  # from here on there is work to save
    found = checkpoints.restore(out / CHECKPOINTS, template)
    if found is None:
        state, host, done = jax.jit(lambda p: init_train_state(p, optimizer), out_shardings=shardings.state)(params), Host(), 0
    else:
        state, host, done = found.state, Host(**found.host), found.step
    del params
    gc.collect()
    flops = flops_of_step(prepared.model_config, prepared.options.method, feed.rows, prepared.T, prepared.L)
    progress = journal.Progress(total, done, flops, chips.peak_of(jax.devices()), quiet=not first)
    book = journal.Journal(out, done, host.looked, options.tensorboard, writes=first)
    evaluate = Evaluator(prepared, graphdef)
    if found is not None:
        for line in (*(f"damaged and left out: {reason}" for reason in found.skipped), f"resumed at step {done} of {total}"):
            progress.say(line)
    run = _Run(prepared, compiled, feed, evaluate, book, progress, total)
    try:
        state, host, done = run.go(state, frozen, host, done)
    finally:
        progress.close()
        book.close()
    if options.patience is not None and (best := checkpoints.restore(out / BEST, template)) is not None:
        state = best.state
    _export(prepared, nnx.merge(graphdef, state.params, frozen), first)
    if first:
        records = journal.read(out)
        journal.draw(out, records)
        shutil.rmtree(out / BEST, ignore_errors=True)
        _summary(prepared, records, host, done)
    processes.barrier("done")
    return 0


class _Run:
    """The loop, with everything that it needs and that does not change."""

    def __init__(self, prepared: Prepared, compiled: Any, feed: "_Feed", evaluate: Evaluator, book, progress, total: int):
        self.options, self.compiled, self.feed = prepared.options, compiled, feed
        self.evaluate, self.book, self.progress, self.total = evaluate, book, progress, total
        self.eval_every = self.options.eval_every or max(1, -(-total // 4))
        self.save_every = self.options.save_every or self.eval_every

    def go(self, state: TrainState, frozen: nnx.State, host: Host, done: int) -> tuple[TrainState, Host, int]:
        saved, asked = done, False
        while True:
            if not asked:
                try:
                    host = self._look(state, frozen, host, done)
                except Interrupted:
                    asked = True
            last = done == self.total or self._patient_no_more(host)
            if done > saved and (last or asked or done % self.save_every == 0):
                checkpoints.save(self.options.out / CHECKPOINTS, done, state, host._asdict(), self.options.keep)
                saved = done
            if asked:
                kept = f"saved step {saved} of {self.total}" if saved else "nothing was trained yet"
                raise Preempted(f"asked to stop: {kept}; the same command resumes")
            if last:
                return state, host, done
            state, asked = self._step(state, frozen, done, saved)
            done += 1
            asked = asked and done < self.total

    def _step(self, state: TrainState, frozen: nnx.State, done: int, saved: int) -> tuple[TrainState, bool]:
        """One step, told and written down; and whether any process was asked to stop."""
        begun = time.perf_counter()
        batch, stop, digest = self.feed(done)
        state, metrics = self.compiled(state, frozen, batch, stop)
        metrics = processes.together(lambda: jax.device_get(metrics))
        loss, norm, labels = float(metrics.loss), float(metrics.grad_norm), int(metrics.num_labels)
        if not metrics.finite:
            where = ", ".join(self.feed.sources(done)[:4])
            kept = f"nothing of it was kept, and step {saved} is saved" if saved else "nothing of it was kept"
            what = f"loss {loss:.4g}, gradient norm {norm:.4g}"
            raise NonFiniteError(f"step {done + 1} is not finite ({what}); its batch begins with {where}; {kept}")
        self.progress.step(time.perf_counter() - begun, self.feed.tokens(done), labels, loss)
        values = {"loss": loss, "accuracy": float(metrics.accuracy), "norm": norm, "labels": labels, "batch": digest}
        self.book.write("train", done + 1, **values)
        return state, bool(metrics.stop)

    def _patient_no_more(self, host: Host) -> bool:
        return self.options.patience is not None and host.worse >= self.options.patience

    def _look(self, state: TrainState, frozen: nnx.State, host: Host, done: int) -> Host:
        """Where it is time, evaluate, tell, and remember whether it was better."""
        if host.looked == done or (done % self.eval_every and done < self.total):
            return host
        values = self.evaluate(state.params, frozen)
        host = host._replace(looked=done)
        if not values:
            return host
        if (where := files.find_non_finite(values)) is not None:
            raise NonFiniteError(f"the evaluation after step {done} is not finite: {where}")
        self.book.write("eval", done, **values)
        self.progress.say(f"step {done} of {self.total}: {self.evaluate.tell(values)}")
        if (loss := values.get("loss")) is None or self.options.patience is None:
            return host
        if host.best is not None and loss >= host.best:
            return host._replace(worse=host.worse + 1)
        checkpoints.save(self.options.out / BEST, done, state, {}, keep=1)
        return Host(looked=done, best=loss, best_step=done, worse=0)


class _Feed:
    """Batches on the mesh, by step; and the flag by which a process asks all to stop."""

    def __init__(self, prepared: Prepared, batch: NamedSharding, stop: NamedSharding):
        self.prepared, self.batch, self.stop = prepared, batch, stop
        self.rows = prepared.options.batch * prepared.options.accumulate
        self.order = packing.batch_order(len(prepared.train), self.rows, prepared.options.seed)

    def __call__(self, step: int) -> tuple[packing.Batch, jax.Array, str]:
        """The batch [accumulation, rows, ...] of a step, the flags, and the batch's SHA-256: a resumed run must see it again."""
        options = self.prepared.options
        filled = packing.make_batch([self.prepared.train[i] for i in self.order(step)], self.prepared.T, self.prepared.L)
        digest = hashlib.sha256(b"".join(x.tobytes() for x in jax.tree.leaves(filled))).hexdigest()[:16]
        shaped = jax.tree.map(lambda x: x.reshape(options.accumulate, options.batch, *x.shape[1:]), filled)
        batch = jax.tree.map(lambda x: sharding.shard_array(x, self.batch), shaped)
        flag = np.full(self.prepared.mesh.size, signals.stop_requested(), np.int32)
        return batch, sharding.shard_array(flag, self.stop), digest

    def tokens(self, step: int) -> int:
        """Tokens of the documents of a step, without what fills up rows."""
        return sum(len(e.ids) for i in self.order(step) for e in self.prepared.train[i])

    def sources(self, step: int) -> list[str]:
        return [e.source for i in self.order(step) for e in self.prepared.train[i]]


def _placed(state: nnx.State, shardings: nnx.State) -> nnx.State:
    """Every weight where it belongs; arrays with that sharding are not copied."""

    def one(x: jax.Array, s: NamedSharding) -> jax.Array:
        return x if x.sharding.is_equivalent_to(s, x.ndim) else sharding.shard_array(np.asarray(x), s)

    return jax.tree.map(one, state, shardings)


def _compiled(step: Any, template: TrainState, frozen: nnx.State, feed: _Feed) -> Any:
    """The step as a program, after a look at whether it fits."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (frozen, *feed(0)[:2]))
    try:
        compiled = step.lower(template, *shapes).compile()
    except Exception as e:
        if "RESOURCE_EXHAUSTED" in str(e):
            raise OutOfMemoryError(_too_large(str(e).strip().splitlines()[0][:300])) from e
        raise
    memory, device = compiled.memory_analysis(), jax.local_devices()[0]
    free = chips.available_memory(device)
    if memory is not None and free is not None:
        share = len(jax.local_devices()) if device.platform == "cpu" else 1  # virtual devices share one memory
        state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(template)) if device.platform == "cpu" else 0
        need = share * memory.temp_size_in_bytes + (state or memory.argument_size_in_bytes)
        if need > free:
            raise OutOfMemoryError(_too_large(f"it takes {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"))
    return compiled


def _too_large(why: str) -> str:
    ways = "a smaller --batch with --accumulate, --method lora or qlora, or more devices (`lindm plan` tells what fits)"
    return f"the training step does not fit in memory: {why}; try {ways}"


# --- before and after -------------------------------------------------------------------------------------------------------


def _introduce(prepared: Prepared) -> None:
    """What is about to be trained, and one example with its labels marked."""
    from rich.console import Console

    options, config = prepared.options, prepared.model_config
    examples = [e for row in prepared.train for e in row]
    labels = sum(int((e.target >= 0).sum()) for e in examples)
    tokens, documents = sum(len(e.ids) for e in examples), f"{len(examples):,} documents"
    held = f"{sum(len(row) for row in prepared.held):,} documents"
    decisions = f", decisions on {len(prepared.decisions.tasks)} tasks" if prepared.decisions else ""
    rows = f"{options.accumulate} x {options.batch} rows" if options.accumulate > 1 else f"{options.batch} rows"
    model = f"{config.model_type}, {config.num_parameters:,} weights, {config.num_layers} layers of width {config.hidden_size}"
    lines = [
        f"model     {model}; method {options.method}",
        f"data      {documents}, {tokens:,} tokens, {labels:,} of them trained; rows of {prepared.T} tokens",
        f"held out  {held}{decisions}",
        f"steps     {prepared.optimizer_config.steps:,} of {rows}; mesh {dict(prepared.mesh.shape)}",
    ]
    console = Console(stderr=True)
    for line in (*lines, "", format_example(examples[0], prepared.tokenizer, 600), ""):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _export(prepared: Prepared, model: Any, first: bool) -> None:
    """The model as others read it; what an earlier, finished run of the same settings left is the same and stays."""
    out, options = prepared.options.out, prepared.options
    like = options.model
    if like is None:
        like = out / "tokenizer"
        if first:
            prepared.tokenizer.save_pretrained(str(like))
        processes.barrier("tokenizer")
    if not (out / MODEL).exists():
        weights.save(model, out / MODEL, like=like)
    if options.method != "full" and not (out / ADAPTER).exists():
        peft.save_adapter(model, out / ADAPTER, str(options.model))
    if options.model is None and first:
        shutil.rmtree(like, ignore_errors=True)


def _summary(prepared: Prepared, records: list[dict], host: Host, done: int) -> None:
    out = prepared.options.out
    last = [r for r in records if r["kind"] == "eval"][-1:]
    manifest.write_manifest(out, inputs=prepared.inputs, steps=done, best_step=host.best_step, last=last[0] if last else None)
    print(f"model: {out / MODEL}")
