"""The policy of a solved problem."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lindm.evaluation.environments import Task, double_precision
from lindm.evaluation.policy import Observation, Policy, one_hot
from lindm.solvers.solve import Solution, StatePolicy


class SolutionPolicy(Policy):
    """The action of a solution at every history: optimal where the solution is exact, otherwise that of the best lower bound.

    The state is the memory of the solution's policy at every history, with a leading axis. Tasks of another problem are acted on
    as if they were the solved one.
    """

    def __init__(self, solution: Solution):
        self.num_actions = solution.problem.num_actions
        self.markov = self.exhaustive = solution.exact
        with double_precision():
            self.policy = solution.policy

    def init(self, tasks: Sequence[Task]) -> Any:
        """The memory before the first stage; None for an MDP, whose memory is the stage and the state."""
        if isinstance(self.policy, StatePolicy):
            return None
        with double_precision():
            return jax.tree.map(lambda x: x[None], self.policy.init())

    def step(self, state: Any, observation: Observation) -> tuple[Any, np.ndarray]:
        with double_precision():
            if isinstance(self.policy, StatePolicy):
                actions = np.asarray(self.policy.actions)[observation.stage, observation.state]
                return state, one_hot(actions, self.num_actions)
            memory = jax.tree.map(lambda x: x[observation.parent], state)
            if observation.stage:
                assert observation.action is not None and observation.observation is not None
                model = np.zeros_like(observation.action) if observation.model is None else observation.model
                memory = _update(self.policy, memory, *map(jnp.asarray, (observation.action, observation.observation, model)))
            return memory, one_hot(np.asarray(_action(self.policy, memory)), self.num_actions)


@jax.jit
def _update(policy: Any, memory: Any, action: jax.Array, observation: jax.Array, model: jax.Array) -> Any:
    return jax.vmap(policy.update)(memory, action, observation, model)


@jax.jit
def _action(policy: Any, memory: Any) -> jax.Array:
    return jax.vmap(policy.action)(memory)
