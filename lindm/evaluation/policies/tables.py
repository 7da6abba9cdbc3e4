"""Policies of an MDP that compute action values from the demonstrations alone, before the first stage."""

from collections.abc import Sequence

import numpy as np

from lindm.evaluation.environments import MDPEnvironment, PolicyTask, double_precision
from lindm.evaluation.policy import Observation, Policy, one_hot
from lindm.solvers.ties import greedy


class TablePolicy(Policy):
    """The greedy policy of action values Q [H, S, A] of each task; the state is these tables and those of the greedy actions."""

    markov = True

    def action_values(self, tasks: Sequence[PolicyTask]) -> list[np.ndarray]:
        """Estimates of Q* [H, S, A], one for each task."""
        raise NotImplementedError

    def init(self, tasks: Sequence[PolicyTask]) -> tuple[np.ndarray, np.ndarray]:
        for task in tasks:
            mdp_of(task)
        with double_precision():
            values = [np.asarray(Q) for Q in self.action_values(tasks)]
            return np.array(values), np.array([greedy(Q) for Q in values])

    def step(self, state, observation: Observation):
        values, actions = state
        chosen = actions[_rows(observation)]
        if observation.legal is not None:
            chosen = greedy(np.where(observation.legal, values[_rows(observation)], -np.inf), per_row=True)
        return state, one_hot(chosen, values.shape[-1])

    def q_bounds(self, state, observation: Observation):
        Q = state[0][_rows(observation)]
        return Q, Q


def _rows(observation: Observation) -> tuple[np.ndarray, int, np.ndarray]:
    """Where the histories stand in tables of every task, stage and state."""
    assert observation.state is not None
    return observation.task, observation.stage, observation.state


def mdp_of(task: PolicyTask) -> MDPEnvironment:
    """The environment of a task whose problem is an MDP. ValueError where it is none."""
    if not isinstance(env := task.known, MDPEnvironment):
        raise ValueError(f"problem must be an MDP for this policy; got {type(env.problem).__name__}")
    return env


def transitions(task: PolicyTask) -> np.ndarray:
    """(s, a, r, s') of all steps of the demonstrations [n, 4]; s' is -1 at the end of an episode. ValueError without any."""
    rows = []
    for steps in task.required_demonstrations(rewards=True):
        after = [*(step.state for step in steps[1:]), -1]
        rows += [(step.state, step.action, step.reward, u) for step, u in zip(steps, after, strict=True)]
    return np.array(rows, float)
