"""The training loop: steps, evaluations and checkpoints, in an order in which the devices do not wait for the host.

A step is only started here (jax is asynchronous). While it runs, the host fills and places the batch of the next step, and reads
and logs the metrics of the step before: metrics are one step late. Before an evaluation, a checkpoint or the end, the metrics of
the last step are read as well, so nothing is evaluated or saved that is not finite, and the records have the order of the steps.

A checkpoint is written while the next steps run, and the next one waits for it. A kill loses the steps since the last complete
checkpoint: one interval, and the steps that ran while the next checkpoint was written, always fewer than a second interval.
"""

import contextlib
import time
from typing import NamedTuple

import jax
from flax import nnx

from lindm.errors import NonFiniteError, Preempted
from lindm.io import files, signals
from lindm.io.progress import Progress, ProgressTask
from lindm.llm.parallel import devices, processes
from lindm.llm.sft import checkpoints
from lindm.llm.sft.batches import BatchLoader, LoadedBatch
from lindm.llm.sft.compilation import TrainPrograms
from lindm.llm.sft.evaluator import Evaluator, summarize
from lindm.llm.sft.flops import useful_flops
from lindm.llm.sft.metrics import MetricsLogger, Throughput
from lindm.llm.sft.profile import StepProfiler
from lindm.llm.sft.setup import TrainingSetup
from lindm.llm.sft.step import StepMetrics, TrainState

CHECKPOINTS, BEST = "checkpoints", "best"


class EvalHistory(NamedTuple):
    """Summary of the evaluations so far; part of a checkpoint."""

    last_step: int = -1  # step of the last evaluation
    best_loss: float | None = None  # lowest held-out loss
    best_step: int = 0
    evals_since_best: int = 0


class StartedStep(NamedTuple):
    """A step whose metrics were not read yet."""

    batch: LoadedBatch
    metrics: StepMetrics
    start: float  # seconds, when it was started


class TrainLoop:
    """Steps, evaluations and checkpoints."""

    def __init__(
        self,
        setup: TrainingSetup,
        programs: TrainPrograms,
        loader: BatchLoader,
        evaluator: Evaluator,
        logger: MetricsLogger,
        profiler: StepProfiler,
        progress: Progress,
        task: ProgressTask,
    ):
        self.config, self.programs, self.loader, self.evaluator = setup.config, programs, loader, evaluator
        self.table = setup.train_rows.table
        self.logger, self.profiler, self.progress, self.task = logger, profiler, progress, task
        self.total = setup.optimizer.steps
        self.eval_every = self.config.eval_every or max(1, -(-self.total // 4))
        self.save_every = self.config.save_every or self.eval_every
        self.model_config, self.throughput = setup.model_config, Throughput(devices.peak_flops(jax.devices()))
        self.started: StartedStep | None = None
        self.next_batch: LoadedBatch | None = None
        self.last_read = 0.0  # when the metrics of a step were read last
        self.writer = checkpoints.CheckpointWriter()
        self.saved = 0  # step of the last checkpoint, which may still be written

    def run(self, state: TrainState, frozen: nnx.State, history: EvalHistory, step: int) -> tuple[TrainState, EvalHistory, int]:
        """Train until the last step, or until patience ends.

        Raises:
          Preempted: the run stopped on a signal, after saving.
          NonFiniteError: a step or an evaluation is not finite.
        """
        with self.writer, contextlib.closing(self.profiler):
            return self._run(state, frozen, history, step)

    def _run(self, state: TrainState, frozen: nnx.State, history: EvalHistory, step: int) -> tuple[TrainState, EvalHistory, int]:
        self.saved, stop = step, False
        while True:
            if stop or self._waits_after(history, step):
                stop |= self._read_metrics()
            if (table := self.profiler.after(step)) is not None:
                self.progress.print(table)
            if not stop:
                try:
                    history = self._maybe_evaluate(state, frozen, history, step)
                except Preempted:
                    stop = True
            done = step == self.total or self._out_of_patience(history)
            if step > self.saved and (done or stop or step % self.save_every == 0):
                self.writer.save(self.config.out / CHECKPOINTS, step, state, history._asdict(), self.config.keep)
                self.saved = step
            if stop:
                self.writer.wait()
                kept = f"saved step {self.saved} of {self.total}" if self.saved else "no step was finished yet"
                raise Preempted(f"stopped by a signal: {kept}; the same command resumes")
            if done:
                return state, history, step
            state, stop = self._start_step(state, frozen, step)
            step += 1

    def _start_step(self, state: TrainState, frozen: nnx.State, step: int) -> tuple[TrainState, bool]:
        """Start one step, prepare the batch of the next one, and read the metrics of the step before.

        Returns:
          The state after the step, and whether any process had to stop when the step before was started.
        """
        self.writer.check()
        batch = self.next_batch or self.loader.load(step)
        with processes.detect_lost_peer():
            start = time.perf_counter()
            state, metrics = self.programs(state, frozen, batch)
            self.next_batch = self.loader.load(step + 1) if step + 1 < self.total else None
        stop = self._read_metrics()
        self.started = StartedStep(batch, metrics, start)
        return state, stop

    def _read_metrics(self) -> bool:
        """Wait for the started step, if there is one, and log it; whether any process had to stop when it was started."""
        if self.started is None:
            return False
        (batch, device_metrics, start), self.started = self.started, None
        with processes.detect_lost_peer():
            metrics = jax.device_get(device_metrics)
        loss, grad_norm, num_labels = float(metrics.loss), float(metrics.grad_norm), int(metrics.num_labels)
        step = batch.step + 1
        if not metrics.finite:
            sources = ", ".join(str(self.table[i].source) for i in batch.documents[:4].tolist())
            kept = f"the last checkpoint is step {self.saved}" if self.saved else "there is no checkpoint"
            values = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
            raise NonFiniteError(f"step {step} is not finite ({values}); its batch starts with {sources}; {kept}")
        now = time.perf_counter()
        seconds, self.last_read = now - max(start, self.last_read), now
        signals.allow_seconds(3 * seconds)  # the rest of two steps that were started and, with the flag set, another one
        tokens, labels = self.table.lengths[batch.documents], self.table.num_labels[batch.documents]
        flops = useful_flops(self.model_config, self.config.method, tokens, labels)
        self.throughput.update(seconds, int(tokens.sum()), num_labels, flops)
        self.task.update(step, detail=", ".join(filter(None, (f"loss {loss:.4g}", str(self.throughput)))))
        self.logger.log(
            "train",
            step,
            loss=loss,
            accuracy=float(metrics.accuracy),
            grad_norm=grad_norm,
            num_labels=num_labels,
            batch_sha256=batch.sha256,
        )
        return bool(metrics.stop)

    def _out_of_patience(self, history: EvalHistory) -> bool:
        return self.config.patience is not None and history.evals_since_best >= self.config.patience

    def _evaluates_after(self, history: EvalHistory, step: int) -> bool:
        return history.last_step != step and (step % self.eval_every == 0 or step == self.total)

    def _waits_after(self, history: EvalHistory, step: int) -> bool:
        """Whether the last step has to be finished before this loop goes on: the state is used, or a trace begins or ends."""
        saves = step == self.total or step % self.save_every == 0
        return saves or self._evaluates_after(history, step) or self.profiler.changes_after(step)

    def _maybe_evaluate(self, state: TrainState, frozen: nnx.State, history: EvalHistory, step: int) -> EvalHistory:
        """Evaluate and log if an evaluation is due after this step."""
        if not self._evaluates_after(history, step):
            return history
        self.task.update(step, detail="evaluating")
        values = self.evaluator(state.params, frozen)
        history = history._replace(last_step=step)
        if not values:
            return history
        if (path := files.find_non_finite(values)) is not None:
            raise NonFiniteError(f"the evaluation after step {step} is not finite: {path}")
        self.logger.log("eval", step, **values)
        self.progress.print(f"step {step} of {self.total}: {summarize(values)}")
        if (loss := values.get("loss")) is None or self.config.patience is None:
            return history
        if history.best_loss is not None and loss >= history.best_loss:
            return history._replace(evals_since_best=history.evals_since_best + 1)
        self.writer.save(self.config.out / BEST, step, state, {}, keep=1)
        return EvalHistory(last_step=step, best_loss=loss, best_step=step)
