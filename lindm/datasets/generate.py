"""What is drawn from a source of tasks: a problem, its oracle, demonstrations and queries, labelled at every step.

Task i draws from fold_in(key(seed), i), and episode k of either role from a key of its own below that. So the tasks of a longer
run begin with those of a shorter one, more demonstrations leave the others as they are, and two splits of a suite differ by
their law alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lindm import validate
from lindm.families.suites import Suite, draw_task
from lindm.problems.apomdp import as_apomdp
from lindm.solvers import dp, tree
from lindm.solvers.rollout import demonstrate
from lindm.solvers.solve import BUDGET, Solution, method_for, solve
from lindm.types import MDP, Episodes, Labels, Problem

BEHAVIORS = ("oracle", "epsilon", "uniform")
BLOCK = 16  # tasks of one compiled call
LARGEST_SHARD, SHARD_BYTES = 256, 1 << 26

Draws = tuple[Problem | None, dict[str, np.ndarray], tuple[Episodes, Labels]]
"""Problems (None where all tasks are one), their scalars, and episodes with labels [tasks, demos + queries, H]."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """How much is drawn, and who acts."""

    tasks: int
    demos: int = 5
    """demonstration episodes of a task"""
    queries: int = 1
    """query episodes of a task"""
    behavior: str = "oracle"
    """who makes the demonstrations: oracle, epsilon (with probability epsilon a uniform action, else the oracle's) or uniform"""
    epsilon: float = 0.2
    query_behavior: str = "epsilon"
    """who makes the queries; a learner's own mistakes lead off the oracle's path, so labels are wanted there too"""
    query_epsilon: float = 0.2
    seed: int = 0
    method: str = "auto"
    """of the oracle: auto, tree, hsvi or net"""
    budget: int = BUDGET
    """bytes that an exact oracle may take"""
    shard: int | None = None
    """tasks of a file [default: 256, fewer where they are large]"""

    def __post_init__(self):
        for name in ("tasks", "demos", "queries", "budget"):
            validate.count(getattr(self, name), name)
        if validate.count(self.seed, "seed", 0) >= 2**32 or validate.count(self.tasks, "tasks") >= 2**31:
            raise ValueError(f"seed must be below 2^32 and tasks below 2^31; got {self.seed} and {self.tasks}")
        if self.shard is not None:
            validate.count(self.shard, "shard")
        for name in ("behavior", "query_behavior"):
            if getattr(self, name) not in BEHAVIORS:
                raise ValueError(f"{name} must be one of {', '.join(BEHAVIORS)}; got {getattr(self, name)!r}")
        validate.fraction(self.epsilon, "epsilon")
        validate.fraction(self.query_epsilon, "query_epsilon")

    @property
    def exploration(self) -> tuple[float, float]:
        """The probability of a uniform action, in demonstrations and in queries."""
        demos, queries = (
            {"oracle": 0.0, "epsilon": epsilon, "uniform": 1.0}[behavior]
            for behavior, epsilon in ((self.behavior, self.epsilon), (self.query_behavior, self.query_epsilon))
        )
        return demos, queries


class TaskGenerator:
    """The tasks of a source, a range at a time. A fixed problem is solved once, when it is first asked for."""

    def __init__(self, source: Suite | Problem, recipe: DatasetConfig):
        if not isinstance(source, Suite):
            source = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float)), source)
        self.source: Suite | Problem = source
        self.recipe = recipe
        self.root = jax.random.key(recipe.seed, impl="threefry2x32")
        # a task with its sizes and no numbers
        shapes = jax.eval_shape(lambda: draw_task(self.root, source) if isinstance(source, Suite) else source)
        self.like: Problem = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        self.method = method_for(self.like, recipe.budget) if recipe.method == "auto" else recipe.method
        counts = (recipe.demos, recipe.queries)
        self.episodes = sum(counts)
        self._plays = (
            jnp.array(np.repeat(range(2), counts)),
            jnp.array(np.concatenate([np.arange(n) for n in counts])),
            jnp.array(np.repeat(recipe.exploration, counts)),
        )
        self._solved: tuple[Problem, Solution, dict[str, Array]] | None = None

    @property
    def shard(self) -> int:
        """Tasks of a file: the recipe's, or what keeps a shard in tens of megabytes. A matter of sizes alone, not of `tasks`."""
        H, A = self.like.horizon, self.like.num_actions
        arrays = sum(x.size for x in jax.tree.leaves(self.like)) if isinstance(self.source, Suite) else 0
        fits = SHARD_BYTES // (8 * (arrays + self.episodes * H * (A + 7)))
        return self.recipe.shard or min(LARGEST_SHARD, max(1, fits))

    def draw(self, first: int, last: int, tick: Callable[[int], None]) -> Draws:
        """Tasks first, ..., last - 1 as numpy arrays; `tick` hears how far it is."""
        parts, at = [], first
        while at < last:
            stop = min(at + BLOCK, last)
            if not isinstance(self.source, Suite):
                if self._solved is None:
                    solution = solve(self.source, self.recipe.method, self.recipe.budget)
                    self._solved = self.source, solution, _worth(self.source, solution)
                problem, solution, worth = self._solved
                played = _replayed(self.root, at, stop, self._plays, problem, solution)
                part = None, jax.tree.map(lambda x: jnp.broadcast_to(x, BLOCK), worth), played
            elif self.method == "net":  # on the host: one task at a time
                stop = at + 1
                problem = _problem(self.root, at, self.source)
                solution = solve(problem, self.recipe.method, self.recipe.budget)
                played = _replayed(self.root, at, stop, self._plays, problem, solution)
                part = (*jax.tree.map(lambda x: x[None], (problem, _worth(problem, solution))), played)
            else:
                part = _drawn(self.root, at, stop, self._plays, self.source, self.recipe.method, self.recipe.budget)
            part = jax.tree.map(lambda x, n=stop - at: np.asarray(x)[:n], part)
            if part[0] is not None and not all(np.isfinite(x).all() for x in jax.tree.leaves(part[0])):
                raise ValueError(f"no task {at} to {stop - 1} of the source {self.source} could be drawn: its gap is too large")
            parts.append(part)
            at = stop
            tick(at)
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def _keys(root: Array, i: Array) -> Array:
    """The two keys of task i: of its problem and of its episodes."""
    return jax.random.split(jax.random.fold_in(root, i))


def _play(key: Array, problem: Problem, solution: Solution, plays: tuple[Array, ...]) -> tuple[Episodes, Labels]:
    """Episodes and labels [n, H] of plays (role, number, epsilon) [n]."""

    def episode(role: Array, number: Array, epsilon: Array):
        own = jax.random.fold_in(jax.random.fold_in(key, role), number)
        return jax.tree.map(lambda x: x[0], demonstrate(own, problem, solution, 1, epsilon))

    return jax.vmap(episode)(*plays)


def _worth(problem: Problem, solution: Solution) -> dict[str, Array]:
    """Scalars of a task; what a uniform policy is worth only where that costs no more than the solution did."""
    found = {"value": solution.value, "lower": solution.lower, "upper": solution.upper}
    if isinstance(problem, MDP):
        uniform = jnp.full_like(problem.r, 1 / problem.num_actions)
        found["uniform_value"] = problem.rho @ dp.policy_value(problem, uniform)[0]
    elif solution.exact:
        found["uniform_value"] = tree.uniform_value(as_apomdp(problem))
    return found


def _block(one: Callable[[Array], Any], first: Array, last: Array) -> Any:
    """`one` of the tasks first, first + 1, ... that are below `last`, one after the other; one program for every block."""
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
    return jax.lax.map(lambda i: jax.lax.cond(i < last, one, lambda _: blank, i), first + jnp.arange(BLOCK))


@partial(jax.jit, static_argnames=("suite", "method", "budget"))
def _drawn(root: Array, first: Array, last: Array, plays: tuple[Array, ...], suite: Suite, method: str, budget: int) -> Any:
    def one(i: Array):
        of_problem, of_episodes = _keys(root, i)
        problem = draw_task(of_problem, suite)
        solution = solve(problem, method, budget)
        return problem, _worth(problem, solution), _play(of_episodes, problem, solution, plays)

    return _block(one, first, last)


@jax.jit
def _replayed(root: Array, first: Array, last: Array, plays: tuple[Array, ...], problem: Problem, solution: Solution) -> Any:
    return _block(lambda i: _play(_keys(root, i)[1], problem, solution, plays), first, last)


@partial(jax.jit, static_argnames="suite")
def _problem(root: Array, i: Array, suite: Suite) -> Problem:
    return draw_task(_keys(root, i)[0], suite)
