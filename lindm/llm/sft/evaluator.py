"""Evaluation during training: the held-out loss, and the optimality gap of the model's decisions on held-out tasks."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from lindm.errors import Preempted
from lindm.evaluation import optimality_gap
from lindm.evaluation.environments import double_precision, make_tasks
from lindm.evaluation.policies.demonstrations import BC
from lindm.evaluation.policy import Observation, Policy
from lindm.io import signals
from lindm.llm.parallel import sharding
from lindm.llm.parallel.processes import detect_lost_peer
from lindm.llm.policy import LanguageModelPolicy
from lindm.llm.sft import packing
from lindm.llm.sft.batches import place_rows, shape_limits
from lindm.llm.sft.loss import label_weight, lm_loss
from lindm.llm.sft.setup import TrainingSetup
from lindm.llm.sft.shapes import Sizes, evaluation_shape

ROLLOUTS_PER_TASK = 8  # where a task has too many histories to enumerate
MAX_EXACT_HISTORIES = 512  # histories of one stage of a task that are enumerated


class Evaluator:
    """Evaluates a run, always on the same rows, tasks and episodes.

    A long evaluation must not delay the checkpoint after a request to stop, so it is interrupted, in all processes at once.
    """

    def __init__(self, setup: TrainingSetup, graphdef: Any):
        self.setup, self.graphdef = setup, graphdef
        rows = setup.eval_rows
        self.num_labels = int(rows.labels.sum())
        self.groups: list[list[int]] = []  # of rows of documents that share a row of a batch
        if len(rows):
            self.shape, self.groups = evaluation_shape(Sizes(rows.tokens, rows.labels), *shape_limits(setup))
        compute, mesh, objective = setup.compute, setup.mesh, setup.objective

        def eval_loss(params: nnx.State, frozen: nnx.State, batch: packing.Batch) -> tuple[jax.Array, ...]:
            """Sums over the labels of a batch: of the loss, of the correct ones, and of the weights."""
            return (*lm_loss(nnx.merge(graphdef, params, frozen), batch, compute, mesh, objective), label_weight(batch))

        self.eval_loss = jax.jit(eval_loss)
        self.baseline: dict[str, float] | None = None
        if setup.decision_tasks is not None:
            with double_precision():
                problems = [task.problem() for task in setup.decision_tasks.tasks]
            self.tasks = make_tasks(problems, setup.decision_tasks.demonstrations)

    def __call__(self, params: nnx.State, frozen: nnx.State) -> dict[str, Any]:
        """loss and accuracy of the held-out labels; where decisions are evaluated, also the normalized optimality gap, its
        interval and `bc_gap`, the gap of behavior cloning on the demonstrations.

        Raises:
          Preempted: the run has to stop.
        """
        values: dict[str, Any] = {}
        if self.groups:
            totals = []
            for batch in self.batches():
                _raise_if_interrupted()
                totals.append([float(x) for x in jax.device_get(self.eval_loss(params, frozen, batch))])
            loss, num_correct, weight = (sum(column) for column in zip(*totals, strict=True))
            values["loss"], values["accuracy"] = loss / (weight or 1), num_correct / self.num_labels
        if self.setup.decision_tasks is not None:
            values |= self._evaluate_decisions(params, frozen)
        return values

    def batches(self) -> Iterator[packing.Batch]:
        """All held-out documents, packed into batches of one shape (`shapes.evaluation_shape`); one batch exists at a time.

        The sums over all batches do not depend on who shares a row.
        """
        eval_rows, batch_sharding = self.setup.eval_rows, NamedSharding(self.setup.mesh, sharding.BATCH_SPEC)
        for start in range(0, len(self.groups), self.shape.rows):
            groups = self.groups[start : start + self.shape.rows]
            rows = [[number for i in members for number in eval_rows.numbers(i)] for members in groups]
            yield place_rows(eval_rows.table, rows, self.shape, batch_sharding)

    def _evaluate_decisions(self, params: nnx.State, frozen: nnx.State) -> dict[str, Any]:
        s = self.setup
        assert s.decision_tasks is not None
        model = nnx.merge(self.graphdef, params, frozen)
        policy = _InterruptiblePolicy(model, s.tokenizer, s.decision_tasks.text, dtype=s.compute.dtype)
        results = self._losses(policy)
        if not results:
            return {}
        if self.baseline is None:
            self.baseline = {"bc_gap": optimality_gap.summarize(self._losses(BC()))["gap"]}
        tasks_are = "demonstrations" if len({id(task.environment) for task in self.tasks}) == 1 else "tasks"
        return optimality_gap.summarize(results, tasks_are) | self.baseline

    def _losses(self, policy: Policy) -> list[optimality_gap.PolicyLoss]:
        """What a policy loses on each task; ambiguous tasks with too many histories are left out."""
        limits = {"episodes": ROLLOUTS_PER_TASK, "max_histories": MAX_EXACT_HISTORIES}
        results = optimality_gap.evaluate_policy(self.tasks, policy, seed=self.setup.config.seed, **limits)
        return [loss for loss in results if loss is not None]


class _InterruptiblePolicy(LanguageModelPolicy):
    """A policy that raises between two stages if the run has to stop."""

    def step(self, state: Any, observation: Observation):
        _raise_if_interrupted()
        return super().step(state, observation)


def summarize(values: dict[str, Any]) -> str:
    """One line about an evaluation."""
    parts = []
    if "loss" in values:
        parts.append(f"held-out loss {values['loss']:.4g}, accuracy {values['accuracy']:.1%}")
    if values.get("gap") is not None:
        interval = "" if values["gap_ci"] is None else " [{:.4f}, {:.4f}]".format(*values["gap_ci"])
        bc = "" if values["bc_gap"] is None else f"; bc {values['bc_gap']:.4f}"
        parts.append(f"normalized optimality gap {values['gap']:.4f}{interval} ({values['method']}, {values['n']} tasks{bc})")
    if values.get("note"):
        parts.append(values["note"])
    return "; ".join(parts)


def _raise_if_interrupted() -> None:
    requested = signals.stop_requested()
    if jax.process_count() > 1:
        with detect_lost_peer():
            requested = bool(multihost_utils.process_allgather(np.int32(requested)).any())
    if requested:
        raise Preempted("the evaluation was interrupted by a request to stop")
