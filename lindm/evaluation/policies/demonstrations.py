"""Behavior cloning (`bc`): the most frequent action of the demonstrations after the same last observation."""

from collections.abc import Sequence

import numpy as np

from lindm.evaluation.environments import Environment, MDPEnvironment, PolicyTask
from lindm.evaluation.policy import Observation, Policy, one_hot
from lindm.text import Step


class BC(Policy):
    """The most frequent legal action of the task's demonstrations after the same last observation.

    The last observation is the state of an MDP, otherwise the model and the observation of the step before. If no demonstration
    takes a legal action there, the most frequent one over all steps is taken. Ties go to the lowest action. The state is the
    counts of the actions after each last observation, per task.
    """

    markov = True

    def init(self, tasks: Sequence[PolicyTask]) -> tuple[Environment, np.ndarray]:
        return tasks[0].known, np.array([_counts(task) for task in tasks])

    def step(self, state, observation: Observation):
        env, _ = state
        here, everywhere = _legal_counts(state, observation)
        chosen = np.where(here.any(-1, keepdims=True), here, everywhere)
        if observation.legal is not None:
            chosen = np.where(observation.legal, chosen, -1)
        return state, one_hot(chosen.argmax(-1), env.num_actions)

    def note(self, state, observation: Observation) -> str | None:
        env, counts = state
        if _legal_counts(state, observation)[0][0].any():
            return None
        what = "state" if isinstance(env, MDPEnvironment) else "last observation"
        has = "takes a legal action after" if counts[observation.task[0], _last_seen(env, observation)[0]].any() else "has"
        return f"no demonstration {has} this {what}: the action is the most frequent one of all steps"


def _legal_counts(state, observation: Observation) -> tuple[np.ndarray, np.ndarray]:
    """How often each legal action was taken after the same last observation, and in all [n, A]."""
    env, counts = state
    legal = True if observation.legal is None else observation.legal
    here = np.where(legal, counts[observation.task, _last_seen(env, observation)], 0)
    return here, np.where(legal, counts.sum(1)[observation.task], 0)


def _last_seen(env: Environment, observation: Observation) -> np.ndarray:
    """The row of the counts of each history."""
    if observation.state is not None:
        return observation.state
    if observation.observation is None:
        return np.zeros(len(observation), int)
    return _seen(env, 0 if observation.model is None else observation.model, observation.observation)


def _seen(env: Environment, m, o):
    """The number of the last observation: 0 for none yet, then the pairs (model, observation)."""
    assert not isinstance(env, MDPEnvironment)
    return 1 + m * env.num_observations + o


def _counts(task: PolicyTask) -> np.ndarray:
    """How often each action was taken in each state, or after each number of `_seen`."""
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
    return counts
