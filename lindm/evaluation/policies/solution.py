"""The policy of a solved problem."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lindm import validate
from lindm.evaluation.environments import PolicyTask, double_precision
from lindm.evaluation.policy import Observation, Policy, one_hot
from lindm.families.registry import NamedProblem
from lindm.problems.apomdp import as_apomdp
from lindm.solvers.belief import advance
from lindm.solvers.solve import Solution, Tables, q_bounds
from lindm.solvers.ties import greedy
from lindm.types import APOMDP, MDP, Plan

BeliefState = tuple[Array, Array]  # of n histories: number within the stage [n], and belief under each model [n, M, S]


class SolutionPolicy(Policy):
    """The action of a solution at every history: optimal where the solution is exact, otherwise that of the best lower bound.

    Tasks of another problem are acted on as if they were the solved one. `problem`: the solved one, with its names.
    """

    model: int | None = None  # that is taken to have made every step, whatever a history says

    def __init__(self, solution: Solution, problem: NamedProblem | None = None):
        self.solution = solution
        self.problem = solution.problem if problem is None else problem
        self.num_actions = solution.problem.num_actions
        self.markov = self.exhaustive = solution.exact
        with double_precision():
            self.table = np.asarray(greedy(solution.tables.Q)) if isinstance(solution.tables, Plan) else None  # [H, S] actions

    def assuming(self, model: int | str) -> "SolutionPolicy":
        """The policy of an ambiguous problem where no history says which model made a step: it assumes `model` for all.

        Its histories have actions and observations alone, so it can be evaluated in each model's POMDP: what does it lose if that
        model is right? Where `model` itself is right, this is `fixed_model_value` of `lindm.solvers.policy_values`.

        Args:
          model: by name or number.

        Raises:
          ValueError: the problem has one model, or not this one.
        """
        source = NamedProblem(problem=self.problem) if not isinstance(self.problem, NamedProblem) else self.problem
        problem = source.problem
        if not isinstance(problem, APOMDP):
            raise ValueError(f"assuming is for policies of ambiguous problems; this one is of a {type(problem).__name__}")
        words = source.models or tuple(map(str, range(problem.num_models)))
        made = copy(self)
        made.model = number = validate.index(str(model), words, "model")
        with double_precision():
            made.problem = replace(source, problem=jax.tree.map(lambda x: x[number], problem.models), models=())
        return made

    def init(self, tasks: Sequence[PolicyTask]) -> BeliefState | None:
        """The state before the first stage; None for an MDP."""
        if isinstance(self.solution.problem, MDP):
            return None
        with double_precision():
            return jnp.zeros(1, jnp.int32), as_apomdp(self.solution.problem).models.rho[None]

    def step(self, state: BeliefState | None, observation: Observation) -> tuple[BeliefState | None, np.ndarray]:
        if self.table is not None:
            return None, one_hot(self.table[observation.stage, observation.state], self.num_actions)
        assert state is not None and not isinstance(self.solution.problem, MDP)
        with double_precision():
            problem = as_apomdp(self.solution.problem)
            history, beliefs = (x[observation.parent] for x in state)
            if observation.stage:
                assert observation.action is not None and observation.observation is not None
                seen = (observation.action, self._models(observation), observation.observation)
                steps = (jnp.asarray(x, jnp.int32) for x in seen)
                history, beliefs = _advance(problem, observation.stage - 1, history, beliefs, *steps)
            lower, _ = _q_bounds(problem, self.solution.tables, observation.stage, history, beliefs)
            return (history, beliefs), one_hot(greedy(np.asarray(lower), per_row=True), self.num_actions)

    def _models(self, observation: Observation) -> np.ndarray:
        """The models [n] of the step before."""
        if self.model is None and observation.model is not None:
            return observation.model
        if self.model is None and isinstance(self.solution.problem, APOMDP) and self.solution.problem.num_models > 1:
            rule = "observe which model made each step; histories of this task do not say it"
            raise ValueError(f"the policy of an ambiguous problem must {rule} (`.assuming(model)` takes one model for all steps)")
        return np.full(len(observation), self.model or 0)

    def q_bounds(self, state: BeliefState | None, observation: Observation) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(tables := self.solution.tables, Plan):
            Q = np.asarray(tables.Q)[observation.stage, observation.state]
            return Q, Q
        assert state is not None and not isinstance(self.solution.problem, MDP)
        with double_precision():
            problem = as_apomdp(self.solution.problem)
            lower, upper = _q_bounds(problem, tables, observation.stage, *state)
            return np.asarray(lower), np.asarray(upper)


_advance = jax.jit(jax.vmap(advance, in_axes=(None, None, 0, 0, 0, 0, 0)))


@jax.jit
def _q_bounds(problem: APOMDP, tables: Tables, stage: Array, history: Array, beliefs: Array) -> tuple[Array, Array]:
    """The action values, or their bounds: lower [n, A], upper [n, A]."""
    return jax.vmap(lambda *at: q_bounds(problem, tables, stage, *at)[:2])(history, beliefs)
