"""Generates tasks: a problem, its oracle's solution, demonstrations and queries, labeled at every step.

The random key of task i is fold_in(key(seed), i), and every episode of a role has a key below that. So a dataset begins with the
tasks of a smaller one, more demonstrations do not change the others, and two splits of a suite differ in their law alone.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lindm.datasets.config import DatasetConfig
from lindm.families.limits import check_labels
from lindm.families.suites import Suite
from lindm.problems.apomdp import as_apomdp
from lindm.solvers import dp, tree
from lindm.solvers.rollout import demonstrate
from lindm.solvers.solve import Method, Solution, method_for, solve
from lindm.types import MDP, Episodes, Labels, Problem, cast

BLOCK = 16  # tasks of one compiled call
LARGEST_SHARD, SHARD_BYTES = 256, 1 << 26


class Generated(NamedTuple):
    """Tasks first, ..., last - 1, as numpy arrays."""

    problems: Problem | None  # [tasks, ...]; None where all tasks are one fixed problem
    values: Mapping[str, Any]  # [tasks] scalars by column
    episodes: Episodes  # [tasks, demos + queries, H]
    labels: Labels  # [tasks, demos + queries, H]


class TaskGenerator:
    """Generates the tasks of a suite, or of one fixed problem (solved once, when the first task is generated)."""

    def __init__(self, source: Suite | Problem, config: DatasetConfig):
        if isinstance(source, Suite):
            check_labels(source)
        else:
            source = cast(source, jnp.result_type(float))
        self.source: Suite | Problem = source
        self.config = config
        self.key = jax.random.key(config.seed, impl="threefry2x32")
        self.example: Problem = source.example if isinstance(source, Suite) else source  # its sizes alone are used
        self.method = method_for(self.example) if config.method == "auto" else config.method
        counts = (config.demos, config.queries)
        self.num_episodes = sum(counts)  # of a task
        self._rollouts = (
            jnp.array(np.repeat(range(2), counts)),
            jnp.array(np.concatenate([np.arange(n) for n in counts])),
            jnp.array(np.repeat(config.exploration, counts)),
        )
        self._solved: tuple[Solution, dict[str, Array]] | None = None

    @property
    def discount(self) -> float:
        """gamma of every task."""
        return float(self.source.discount)

    @property
    def shard_size(self) -> int:
        """Tasks of a file: as configured, or tens of megabytes at most. It depends on sizes alone, not on the number of tasks."""
        H, A = self.example.horizon, self.example.num_actions
        arrays = sum(x.size for x in jax.tree.leaves(self.example)) if isinstance(self.source, Suite) else 0
        fits = SHARD_BYTES // (8 * (arrays + self.num_episodes * H * (A + 7)))
        return self.config.shard_size or min(LARGEST_SHARD, max(1, fits))

    def generate(self, first: int, last: int, progress: Callable[[int], None] = lambda done: None) -> Generated:
        """Tasks first, ..., last - 1; `progress` is called with the number of the task that comes next.

        Raises:
          ValueError: no task of the suite has its gap.
        """
        parts, at = [], first
        while at < last:
            stop = min(at + BLOCK, last)
            if not isinstance(self.source, Suite):
                if self._solved is None:
                    solution = solve(self.source, self.config.method)
                    self._solved = solution, _values(solution)
                solution, values = self._solved
                rollouts = _rollout_block(self.key, at, stop, self._rollouts, solution)
                part = Generated(None, jax.tree.map(lambda x: jnp.broadcast_to(x, BLOCK), values), *rollouts)
            elif self.method == "net":  # solved on the host, one task at a time
                stop = at + 1
                problem = jax.tree.map(lambda x: x[0], draw_block(self.key, at, stop, self.source))
                solution = solve(problem, self.config.method)
                rollouts = _rollout_block(self.key, at, stop, self._rollouts, solution)
                part = Generated(*jax.tree.map(lambda x: x[None], (problem, _values(solution))), *rollouts)
            else:
                problems = draw_block(self.key, at, stop, self.source)
                part = _task_block(self.key, at, stop, self._rollouts, problems, self.config.method)
            part = jax.tree.map(lambda x, n=stop - at: np.asarray(x)[:n], part)
            if part.problems is not None and not all(np.isfinite(x).all() for x in jax.tree.leaves(part.problems)):
                raise ValueError(f"no task {at} to {stop - 1} of the source {self.source} could be drawn: its gap is too large")
            parts.append(part)
            at = stop
            progress(at)
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def _keys(key: Array, i: Array | int) -> Array:
    """The two keys of task i: of its problem and of its episodes."""
    return jax.random.split(jax.random.fold_in(key, i))


def _rollout(key: Array, solution: Solution, rollouts: tuple[Array, ...]) -> tuple[Episodes, Labels]:
    """Episodes and labels [n, H] of rollouts (role, number, epsilon) [n]."""

    def episode(role: Array, number: Array, epsilon: Array):
        own = jax.random.fold_in(jax.random.fold_in(key, role), number)
        return jax.tree.map(lambda x: x[0], demonstrate(own, solution, 1, epsilon))

    return jax.vmap(episode)(*rollouts)


def _values(solution: Solution) -> dict[str, Array]:
    """Value and bounds of a task; the value of the uniform policy only where it costs no more than the solution did."""
    problem = solution.problem
    values = {"value": solution.value, "lower": solution.lower, "upper": solution.upper}
    if isinstance(problem, MDP):
        values["uniform_value"] = problem.rho @ dp.policy_value(problem, dp.uniform_policy(problem))[0]
    elif solution.exact:
        values["uniform_value"] = tree.uniform_value(as_apomdp(problem))
    return values


def _map_block(function: Callable[[Array], Any], first: Array, last: Array) -> Any:
    """`function` of the tasks first, first + 1, ... below `last`, one after the other; one program for every block."""
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first))
    return jax.lax.map(lambda i: jax.lax.cond(i < last, function, lambda _: blank, i), first + jnp.arange(BLOCK))


@partial(jax.jit, static_argnames="method")
def _task_block(
    key: Array, first: Array, last: Array, rollouts: tuple[Array, ...], problems: Problem, method: Method
) -> Generated:
    def task(i: Array) -> Generated:
        problem = jax.tree.map(lambda x: x[i - first], problems)
        solution = solve(problem, method)
        return Generated(problem, _values(solution), *_rollout(_keys(key, i)[1], solution, rollouts))

    return _map_block(task, first, last)


@jax.jit
def _rollout_block(key: Array, first: Array, last: Array, rollouts: tuple[Array, ...], solution: Solution) -> Any:
    return _map_block(lambda i: _rollout(_keys(key, i)[1], solution, rollouts), first, last)


def draw_block(key: Array, first: int, last: int, suite: Suite) -> Problem:
    """The problems [BLOCK] of tasks first, ..., last - 1; the rest are no tasks."""
    if suite.traceable:
        return _traced_block(key, first, last, suite)
    drawn = [suite.draw(_keys(key, i)[0]) for i in range(first, last)]
    return jax.tree.map(lambda *x: jnp.stack([*x, *[x[-1]] * (BLOCK - len(x))]), *drawn)


@partial(jax.jit, static_argnames="suite")
def _traced_block(key: Array, first: Array, last: Array, suite: Suite) -> Problem:
    return _map_block(lambda i: suite.draw(_keys(key, i)[0]), first, last)
