"""Policies of an MDP that compute action values from the demonstrations alone, before the first stage."""

from collections.abc import Sequence

import numpy as np

from lindm.evaluation.environments import MDPEnvironment, PolicyTask, double_precision
from lindm.evaluation.policy import Episodes, Observation, Policy, one_hot
from lindm.solvers.ties import greedy


class TablePolicy(Policy):
    """The greedy policy of action values Q [H, S, A] of each task; the state is a table of actions for each task."""

    markov = True

    def action_values(self, tasks: Sequence[PolicyTask]) -> list[np.ndarray]:
        """Estimates of Q* [H, S, A], one for each task."""
        raise NotImplementedError

    def init(self, tasks: Sequence[PolicyTask]) -> tuple[int, np.ndarray]:
        for task in tasks:
            mdp_of(task)
        with double_precision():
            tables = [greedy(np.asarray(Q)) for Q in self.action_values(tasks)]
        return tasks[0].known.num_actions, np.array(tables)

    def step(self, state, observation: Observation):
        num_actions, tables = state
        assert observation.state is not None
        return state, one_hot(tables[observation.task, observation.stage, observation.state], num_actions)


def mdp_of(task: PolicyTask) -> MDPEnvironment:
    """The environment of a task whose problem is an MDP. ValueError where it is none."""
    if not isinstance(env := task.known, MDPEnvironment):
        raise ValueError(f"problem must be an MDP for this policy; got {type(env.problem).__name__}")
    return env


def transitions(demonstrations: Episodes) -> np.ndarray:
    """(s, a, r, s') of all steps [n, 4]; s' is -1 at the end of an episode."""
    rows = []
    for steps in demonstrations:
        after = [*(step.state for step in steps[1:]), -1]
        rows += [(step.state, step.action, step.reward, u) for step, u in zip(steps, after, strict=True)]
    return np.array(rows, float)
