"""Behavior cloning (`bc`): the most frequent action of the demonstrations after the same last observation."""

from collections.abc import Sequence

import numpy as np

from lindm.evaluation.environments import Environment, MDPEnvironment, PolicyTask
from lindm.evaluation.policy import Observation, Policy, one_hot
from lindm.text import Step


class BC(Policy):
    """The most frequent action of the task's demonstrations after the same last observation.

    The last observation is the state of an MDP, otherwise the model and the observation of the step before. If no demonstration
    has it, the most frequent action over all steps is taken. Ties go to the lowest action. The state is a table of actions per
    task.
    """

    markov = True

    def init(self, tasks: Sequence[PolicyTask]) -> tuple[Environment, np.ndarray]:
        return tasks[0].known, np.array([_table(task) for task in tasks])

    def step(self, state, observation: Observation):
        env, tables = state
        if observation.state is not None:
            seen = observation.state
        elif observation.observation is None:
            seen = np.zeros(len(observation), int)
        else:
            m = 0 if observation.model is None else observation.model
            seen = _seen(env, m, observation.observation)
        return state, one_hot(tables[observation.task, seen], env.num_actions)


def _seen(env: Environment, m, o):
    """The number of the last observation: 0 for none yet, then the pairs (model, observation)."""
    assert not isinstance(env, MDPEnvironment)
    return 1 + m * env.num_observations + o


def _table(task: PolicyTask) -> np.ndarray:
    """An action for each state, or for each number of `_seen`."""
    env = task.known
    size = env.num_states if isinstance(env, MDPEnvironment) else 1 + env.num_models * env.num_observations
    counts = np.zeros((size, env.num_actions))
    for steps in task.required_demonstrations():
        before: Step | None = None
        for step in steps:
            if isinstance(env, MDPEnvironment):
                seen = step.state
            else:
                seen = 0 if before is None else _seen(env, before.model or 0, before.observation)
            counts[seen, step.action] += 1
            before = step
    return np.where(counts.any(-1), counts.argmax(-1), counts.sum(0).argmax())
