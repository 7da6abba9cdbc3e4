"""The oracle, the uniformly random policy, and the behavior policy between the two that makes demonstrations."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lindm import validate
from lindm.datasets import DatasetConfig
from lindm.evaluation.environments import Environment, MDPEnvironment, PolicyTask, double_precision
from lindm.evaluation.policies.beliefs import BestBound
from lindm.evaluation.policies.registry import KINDS
from lindm.evaluation.policy import ChosenPolicy, Observation, Policy, one_hot
from lindm.solvers import ties, tree
from lindm.solvers.belief import child_history, first_history, step_index


class Oracle(ChosenPolicy):
    """An optimal action at every history, the lowest index among ties; the state is the numbers of the histories.

    In a POMDP that is too large for exact action values, the action with the best certified lower bound.
    """

    markov = exhaustive = True
    knows_problem = KINDS

    def choose(self, tasks: Sequence[PolicyTask]) -> Policy:
        return BestBound() if tasks[0].known.bounded else _Tables()


class _Tables(Policy):
    """The actions of tables over all histories."""

    def init(self, tasks: Sequence[PolicyTask]) -> tuple[list[Environment], list[Any], np.ndarray]:
        environments = [task.known for task in tasks]
        tables = {id(env): optimal_table(env) for env in {id(env): env for env in environments}.values()}
        return environments, [tables[id(env)] for env in environments], np.zeros(1, int)

    def step(self, state, observation: Observation):
        environments, tables, before = state
        index = np.zeros(len(observation), int) if observation.state is None else observation.state
        actions = np.zeros(len(observation), int)
        for i, env in enumerate(environments):
            rows = np.flatnonzero(observation.task == i)
            if not isinstance(env, MDPEnvironment) and observation.stage:
                assert observation.action is not None and observation.observation is not None
                a, o = observation.action[rows], observation.observation[rows]
                m = np.zeros_like(a) if observation.model is None else observation.model[rows]
                parents = before[observation.parent[rows]]
                index[rows] = child_history(env.apomdp, observation.stage - 1, parents, step_index(env.apomdp, a, m, o))
            actions[rows] = tables[i][observation.stage][index[rows]]
        return (environments, tables, index), one_hot(actions, environments[0].num_actions)

    def q_bounds(self, state, observation: Observation):
        environments, _, index = state
        Q = np.zeros((len(observation), environments[0].num_actions))
        for i, env in enumerate(environments):
            rows = np.flatnonzero(observation.task == i)
            if isinstance(env, MDPEnvironment):
                Q[rows] = env.Q[observation.stage, index[rows]]
            else:
                Q[rows] = env.Q[first_history(env.branching, observation.stage) + index[rows]]
        return Q, Q


def optimal_table(env: Environment) -> Sequence[np.ndarray]:
    """An optimal action at every history of each stage: [S] of an MDP, [histories] otherwise."""
    with double_precision():
        if isinstance(env, MDPEnvironment):
            return ties.greedy(env.Q)
        return tuple(map(np.asarray, tree.optimal_policy(env.apomdp, tree.Tree(Q=jnp.asarray(env.Q)))))


class Random(Policy):
    """Every action with the same probability."""

    markov = exhaustive = True

    def init(self, tasks: Sequence[PolicyTask]) -> int:
        return tasks[0].known.num_actions

    def step(self, state, observation: Observation):
        legal = np.ones((len(observation), state)) if observation.legal is None else observation.legal
        return state, legal / legal.sum(-1, keepdims=True)


class Behavior(Policy):
    """The oracle, but with probability epsilon a uniformly random action."""

    markov = exhaustive = True
    knows_problem = KINDS

    def __init__(self, epsilon: float = 0.2):
        validate.fraction(epsilon, "epsilon")
        self.epsilon, self.oracle = epsilon, Oracle()

    @classmethod
    def for_tasks(cls, source: Any, dataset: DatasetConfig) -> "Behavior":
        return cls(dataset.exploration[0])

    def init(self, tasks: Sequence[PolicyTask]) -> Any:
        return self.oracle.init(tasks)

    def step(self, state, observation: Observation):
        state, best = self.oracle.step(state, observation)
        _, uniform = Random().step(best.shape[-1], observation)
        return state, (1 - self.epsilon) * best + self.epsilon * uniform

    def q_bounds(self, state, observation: Observation):
        return self.oracle.q_bounds(state, observation)
