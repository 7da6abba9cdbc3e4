"""The policy protocol of solvers' policies, heuristics, language models and a user's own function.

    state = policy.init(tasks)
    state, probabilities = policy.step(state, observation)         observation of stage 0, 1, 2, ...

`step` takes all histories of one stage of all tasks and returns action probabilities [n, A]. The memory of a policy for a history
(a belief, cached keys and values, the steps themselves) is a row of its state, and `observation.parent` is the row of the history
that each history continues. A history may have several continuations, or none, so a policy selects the rows of the parents
(`state[observation.parent]`) and never changes a state in place.

A function `f(demonstrations, history)` that returns an action or the probabilities of all actions is a policy, too
(`as_policy`), and so is any object with `init` and `step`.

`Policy.act` asks a policy for one decision; `DecisionMaker` asks for several in one task.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lindm.evaluation.environments import PolicyTask, environment
from lindm.evaluation.history import History, ProblemInfo, check_history, problem_info, read_history
from lindm.problems.stationary import StationaryPOMDP
from lindm.text import Step

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
    legal: np.ndarray | None = None  # [n, A] bool, which actions are legal; None: all

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
        legal = None if self.legal is None else tuple(np.flatnonzero(self.legal[row]).tolist())
        return Step(None, state=None if self.state is None else int(self.state[row]), legal=legal)


class Policy:
    """A policy of the protocol. Subclasses define `init` and `step`, both without side effects on states."""

    markov = False  # acts on stage and state alone: in an MDP, histories that end in the same state are merged
    exhaustive = False  # is evaluated at every history that it reaches, without a limit: its steps are cheap
    batch_size = BATCH_SIZE
    knows_problem: tuple[str, ...] = ()  # kinds of problems, mdp, pomdp or apomdp, of which it knows more than a context tells

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

    def q_bounds(self, state: Any, observation: Observation) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Lower and upper bounds [n, A] of the action values by which the policy chooses; None where it computes none.

        Args:
          state, observation: the state that `step` returned for this observation.

        Returns: the same array twice for values that are no bounds; None in place of upper bounds that the policy does not have.
        """
        return None

    def note(self, state: Any, observation: Observation) -> str | None:
        """What to know about the decision at the first history: that it has a reason of another kind; None: nothing.

        Args:
          state, observation: the state that `step` returned for this observation.
        """
        return None

    def act(self, demonstrations: Episodes, history: History, problem: Any = None) -> "Decision":
        """The decision at one history: the action, and the probabilities of all actions.

        Args:
          demonstrations: episodes of the problem, as steps.
          history: the steps of the episode in progress, as text in the problem's names ("listen hear-left"), as `Step`s, or as
            mappings; without them, the first decision. Of an MDP its end is the current state.
          problem: with or without names. [default: the policy's own; required by policies that compute from it]

        Raises:
          ValueError: the history is none of this problem, an observation in it is impossible, or the policy needs the problem
            or demonstrations.

        >>> tiger = ld.read_pomdp("tiger.pomdp", horizon=4)
        >>> decision = ld.policies.oracle().act((), "listen hear-left listen hear-left", tiger)
        >>> decision.action, decision.belief.round(3).tolist()
        ('open-right', [0.97, 0.03])
        """
        return DecisionMaker(self, demonstrations, problem).decide(history)


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """One decision of a policy."""

    action: int | str  # the likeliest action, the lowest one among equals; by name where actions have names
    probabilities: np.ndarray  # [A] of the actions, 0 where they are not legal
    masked: float = 0.0  # the probability that the policy gave to actions that are not legal, before it was removed
    lower: np.ndarray | None = None  # [A] lower bounds of the action values by which the policy chooses
    upper: np.ndarray | None = None  # [A] upper bounds; the same numbers where the values are no bounds
    belief: np.ndarray | None = None  # [S] over the hidden state, where the problem is known; [M, S] at an ambiguous start
    invalid: bool | None = None  # of a language model: whether its likeliest text is no action
    stage: int  # number of the decision, from 0
    note: str | None = None  # of the policy: that the decision has a reason of another kind than usual

    @property
    def Q(self) -> np.ndarray | None:
        """The action values [A] by which the policy chooses; None where it computes none, or bounds."""
        known = self.lower is not None and self.upper is not None and np.array_equal(self.lower, self.upper)
        return self.lower if known else None


class DecisionMaker:
    """A policy that is asked for decisions in one task: what it computes before the first stage is computed once.

    Args:
      policy: as of `as_policy`.
      demonstrations, problem: as of `Policy.act`.
      notes: what to know about every decision; it is kept for whoever shows them.

    Attributes:
      info: what is known of the problem; None where nothing is, and histories are then `Step`s that are not checked.

    Raises:
      ValueError: the policy needs the problem, or demonstrations.
    """

    def __init__(self, policy: Any, demonstrations: Episodes = (), problem: Any = None, notes: Sequence[str] = ()):
        self.policy, self.notes = as_policy(policy), tuple(notes)
        problem = getattr(self.policy, "problem", None) if problem is None else problem
        self.info: ProblemInfo | None = None if problem is None else problem_info(problem)
        known = None if self.info is None or isinstance(self.info.problem, StationaryPOMDP) else self.info.problem
        task = PolicyTask(
            environment=None if known is None else environment(known),
            demonstrations=demonstrations,
            names={} if self.info is None else self.info.names,
        )
        self._before = self.policy.init([task])

    def decide(self, history: History = ()) -> Decision:
        """The decision at one history. Arguments and errors as of `Policy.act`."""
        steps, belief, state, probabilities, observation = *self._read(history), self._before, np.zeros((1, 0)), None
        legal: np.ndarray | None = None
        zero = np.zeros(1, int)
        for t, step in enumerate(steps):
            seen = {"state": step.state}
            if t:
                seen |= {name: getattr(steps[t - 1], name) for name in ("action", "model", "observation", "reward")}
            arrays = {name: np.array([value]) for name, value in seen.items() if value is not None}
            legal = self._legal(step)
            observation = Observation(stage=t, task=zero, parent=zero, legal=legal, **arrays)
            state, probabilities = self.policy.step(state, observation)
        probabilities, masked = only_legal(np.asarray(probabilities, float), legal)
        bounds = self.policy.q_bounds(state, observation) if hasattr(self.policy, "q_bounds") else None
        lower, upper = (None, None) if bounds is None else (None if bound is None else bound[0] for bound in bounds)
        invalid = getattr(state, "invalid", None)
        actions = [] if self.info is None else self.info.names.get("actions", [])
        action = int(np.argmax(probabilities[0]))
        return Decision(
            action=actions[action] if actions else action,
            probabilities=probabilities[0],
            masked=float(masked[0]),
            lower=lower,
            upper=upper,
            belief=belief,
            invalid=None if invalid is None else bool(invalid[0]),
            note=self.policy.note(state, observation) if hasattr(self.policy, "note") else None,
            stage=len(steps) - 1,
        )

    def _legal(self, step: Step) -> np.ndarray | None:
        """Which actions are legal [1, A] at a step; None: all."""
        if self.info is None or step.legal is None:
            return None
        if not step.legal:
            raise ValueError("history must leave an action that every possible state allows; after this one there is none")
        return np.isin(np.arange(self.info.sizes["actions"]), step.legal)[None]

    def _read(self, history: History) -> tuple[Sequence[Step], np.ndarray | None]:
        """The steps of a history, and the belief after them."""
        if self.info is not None:
            return check_history(read_history(history, self.info), self.info)
        steps = [step for step in history if isinstance(step, Step)]
        if (
            not steps
            or len(steps) < len(history)
            or [t for t, step in enumerate(steps) if step.action is None] != [len(steps) - 1]
        ):
            rule = "steps with actions and, at the end, an open one, Step(None, ...), where the problem is not given"
            raise ValueError(f"history must be {rule}; got {history!r}")
        return steps, None


def only_legal(probabilities: np.ndarray, legal: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, A] of legal actions alone, and the mass [n] that others had; without any left, all legal ones alike."""
    if legal is None:
        return probabilities, np.zeros(len(probabilities))
    kept = np.where(legal, probabilities, 0)
    mass = kept.sum(-1, keepdims=True)
    kept = np.where(mass > 0, kept / np.where(mass > 0, mass, 1), legal / legal.sum(-1, keepdims=True))
    return kept, 1 - np.minimum(mass[:, 0], 1)


class _Chosen(NamedTuple):
    """The chosen policy and its own state, whose figures are also those of this state."""

    policy: Policy
    own: Any

    @property
    def effective(self) -> np.ndarray | None:
        return getattr(self.own, "effective", None)


class ChosenPolicy(Policy):
    """A policy that is another one, which it chooses by the tasks."""

    def choose(self, tasks: Sequence[PolicyTask]) -> Policy:
        """The policy for these tasks."""
        raise NotImplementedError

    def init(self, tasks: Sequence[PolicyTask]) -> _Chosen:
        policy = self.choose(tasks)
        return _Chosen(policy, policy.init(tasks))

    def step(self, state, observation: Observation):
        policy, own = state
        own, probabilities = policy.step(own, observation)
        return _Chosen(policy, own), probabilities

    def q_bounds(self, state, observation: Observation):
        policy, own = state
        return policy.q_bounds(own, observation)

    def note(self, state, observation: Observation) -> str | None:
        policy, own = state
        return policy.note(own, observation)


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
            try:
                answer = self.function(tasks[task].demonstrations, history)
            except Exception as error:
                name = getattr(self.function, "__name__", type(self.function).__name__)
                error.add_note(f"raised by the policy {name}(demonstrations, history) for {len(history)} step(s) of history")
                raise
            answers.append(_probabilities(answer, tasks[task]))
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
