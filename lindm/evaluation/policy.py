"""The policy protocol of solvers' policies, heuristics, language models and a user's own function.

    state = policy.init(tasks)
    state, probabilities = policy.step(state, observation)         observation of stage 0, 1, 2, ...

`step` takes all histories of one stage of all tasks and returns action probabilities [n, A]. The memory of a policy for a history
(a belief, cached keys and values, the steps themselves) is a row of its state, and `observation.parent` is the row of the history
that each history continues. A history may have several continuations, or none, so a policy selects the rows of the parents
(`state[observation.parent]`) and never changes a state in place.

A function `f(demonstrations, history)` that returns an action or the probabilities of all actions is a policy, too
(`as_policy`), and so is any object with `init` and `step`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lindm.evaluation.environments import PolicyTask, environment
from lindm.text import Step
from lindm.types import Problem

Episodes = Sequence[Sequence[Step]]
BATCH_SIZE = 4096  # approximate number of histories per call


@dataclass(frozen=True, kw_only=True)
class Observation:
    """New observations of n histories since the stage before; None for fields that the problem or stage 0 does not have.

    Rows are ordered by task. If the state is hidden there are no rewards: a reward could reveal information about the state that
    an optimal policy does not have.
    """

    stage: int
    task: np.ndarray  # [n] index of the task among those given to `init`
    parent: np.ndarray  # [n] row, at the stage before, of the history that this one continues; 0 at stage 0
    state: np.ndarray | None = None  # [n] the current state, if it is observed
    action: np.ndarray | None = None  # [n] the action of the step before
    model: np.ndarray | None = None  # [n] the model that nature chose in that step
    observation: np.ndarray | None = None  # [n] the observation of that step
    reward: np.ndarray | None = None  # [n] the reward of that step

    def __len__(self) -> int:
        return len(self.task)

    def last_step(self, row: int, state: int | None = None) -> Step:
        """The step before of one history, without its state; stages from 1 on."""
        fields = {name: getattr(self, name) for name in ("model", "observation", "reward")}
        given = {name: values[row].item() for name, values in fields.items() if values is not None}
        assert self.action is not None
        return Step(int(self.action[row]), state=state, **given)

    def open_step(self, row: int) -> Step:
        """The current step, whose action is not chosen yet."""
        return Step(None, state=None if self.state is None else int(self.state[row]))


class Policy:
    """A policy of the protocol. Subclasses define `init` and `step`, both without side effects on states."""

    markov = False  # acts on stage and state alone: in an MDP, histories that end in the same state are merged
    exhaustive = False  # is evaluated at every history that it reaches, without a limit: its steps are cheap
    batch_size = BATCH_SIZE

    @classmethod
    def for_tasks(cls, source: Any, dataset: Any) -> "Policy":
        """The policy for the tasks of a source (a suite or a problem) and of a `DatasetConfig`."""
        return cls()

    def init(self, tasks: Sequence[PolicyTask]) -> Any:
        """The state before stage 0 of tasks of one kind, horizon and sizes."""
        raise NotImplementedError

    def step(self, state: Any, observation: Observation) -> tuple[Any, np.ndarray]:
        """The state at these histories, and the probabilities [n, A] of the actions."""
        raise NotImplementedError

    def act(self, demonstrations: Episodes, history: Sequence[Step], problem: Problem | None = None) -> np.ndarray:
        """The probabilities [A] of the actions at one history.

        Args:
          demonstrations: episodes of the problem, as steps.
          history: the steps of the episode in progress; the last one is open, `Step(None, state=s)`.
          problem: required by policies that use the model.

        Raises:
          ValueError: the history does not end in an open step, or the policy needs the problem.
        """
        return act(self, demonstrations, history, problem)


def act(policy: Any, demonstrations: Episodes, history: Sequence[Step], problem: Problem | None = None) -> np.ndarray:
    """`Policy.act` of any policy."""
    if not history or history[-1].action is not None or any(step.action is None for step in history[:-1]):
        raise ValueError(f"history must be steps with actions and, at the end, an open one, Step(None, ...); got {list(history)}")
    policy = as_policy(policy)
    state = policy.init(
        [PolicyTask(environment=None if problem is None else environment(problem), demonstrations=demonstrations)]
    )
    zero, probabilities = np.zeros(1, int), np.zeros((1, 0))
    for t, step in enumerate(history):
        seen = {"state": step.state}
        if t:
            seen |= {name: getattr(history[t - 1], name) for name in ("action", "model", "observation", "reward")}
        arrays = {name: np.array([value]) for name, value in seen.items() if value is not None}
        state, probabilities = policy.step(state, Observation(stage=t, task=zero, parent=zero, **arrays))
    return probabilities[0]


class FunctionPolicy(Policy):
    """A function of demonstrations and history; the state is the steps of every history."""

    def __init__(self, function: Callable[[Episodes, Sequence[Step]], Any]):
        self.function = function

    def init(self, tasks: Sequence[PolicyTask]) -> tuple[Sequence[PolicyTask], list[tuple[Step, ...]]]:
        return tasks, [()]

    def step(self, state, observation: Observation):
        tasks, before = state
        histories = []
        for row, parent in enumerate(observation.parent):
            past = before[parent]
            if observation.stage:
                past = (*past[:-1], observation.last_step(row, past[-1].state))
            histories.append((*past, observation.open_step(row)))
        answers = []
        for task, history in zip(observation.task, histories, strict=True):
            answers.append(_probabilities(self.function(tasks[task].demonstrations, history), tasks[task]))
        return (tasks, histories), np.array(answers, float)


def _probabilities(answer: Any, task: PolicyTask) -> np.ndarray:
    """The probabilities [A] that a function of a user returned, as they are or as an action."""
    array = np.asarray(answer)
    if array.ndim == 0 and np.issubdtype(array.dtype, np.integer):
        num_actions = task.known.num_actions
        if not 0 <= array < num_actions:
            raise ValueError(f"a policy must return an action from 0 to {num_actions - 1}, or probabilities; got {answer!r}")
        return one_hot(array[None], num_actions)[0]
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.number):
        raise ValueError(f"a policy must return the number of an action, or a probability for each; got {answer!r}")
    return array


def as_policy(policy: Any) -> Any:
    """A policy unchanged, or a function as a policy. TypeError for anything else."""
    if hasattr(policy, "init") and hasattr(policy, "step"):
        return policy
    if callable(policy):
        return FunctionPolicy(policy)
    raise TypeError(f"policy must have init and step, or be a function of demonstrations and history; got {policy!r}")


def one_hot(actions: np.ndarray, num_actions: int) -> np.ndarray:
    """Probabilities [..., A] of deterministic actions [...]."""
    return np.eye(num_actions)[actions]
