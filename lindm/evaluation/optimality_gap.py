r"""The suboptimality of a policy on tasks: exact, over all histories that it reaches, or over those of sampled episodes.

By the performance difference identity (Kakade, Langford, 2002) the suboptimality is

    V* - V^pi = sum_h E_{history_h ~ pi} [ max_a Q*_h(history_h, a) - sum_a pi(a | history_h) Q*_h(history_h, a) ],

an expectation of exact one-step losses. If the policy reaches few histories, it is stepped at all of them, weighted by their
probabilities, and the loss is exact; histories of an MDP that end in the same state are merged if the policy acts on the state
alone (`Policy.markov`). Otherwise the expectation is taken over sampled episodes: an estimate far less noisy than returns, and
without error for an optimal policy. In an ambiguous problem nature's choice depends on the policy, so the identity does not
hold; there the policy's actions fill a table over all histories, and the recursion of `lindm.solvers.tree` gives its value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from lindm.evaluation.environments import (
    NO_HISTORIES,
    BeliefEnvironment,
    Environment,
    Histories,
    MDPEnvironment,
    PolicyTask,
    double_precision,
)
from lindm.evaluation.policy import BATCH_SIZE, Observation, as_policy
from lindm.solvers import tree
from lindm.solvers.ties import TOLERANCE

MAX_HISTORIES = 2048  # at which a policy is stepped, in one stage of one task
SEEN = ("state", "action", "model", "observation", "reward")


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The suboptimality of a policy on one task, in units of reward."""

    suboptimality: float  # V* - V^pi
    agreement: float  # how often it takes an optimal action, over the histories that it reaches
    optimal_value: float  # V*
    uniform_value: float  # V of uniformly random actions
    exact: bool
    decisions: int  # histories at which the policy was stepped
    invalid: int | None = None  # of a language model: histories at which its likeliest token was not an action

    @property
    def normalized_gap(self) -> float:
        """The normalized optimality gap: 0 is optimal, 1 is the uniformly random policy. 0 where every policy is optimal."""
        spread = self.optimal_value - self.uniform_value
        if spread <= TOLERANCE * abs(self.optimal_value):  # the uniformly random policy is optimal, hence all of its actions
            return 0.0
        return self.suboptimality / spread


def evaluate_policy(
    tasks: Sequence[PolicyTask], policy: Any, *, episodes: int = 8, seed: int = 0, max_histories: int = MAX_HISTORIES
) -> list[PolicyLoss | None]:
    """The suboptimality of a policy on each task. All tasks have the same kind, horizon and number of actions.

    Args:
      policy: of the protocol of `lindm.evaluation.policy`, or a function of demonstrations and history.
      episodes: number sampled for a task with over `max_histories` histories at its last stage; task i has the seed (seed, i).
    Returns: None for a task of an APOMDP with more than `max_histories`.

    Raises:
      ValueError: tasks of several horizons, or a policy that does not return action probabilities [n, A].
    """
    policy = as_policy(policy)
    if len(horizons := {task.known.horizon for task in tasks}) > 1:
        raise ValueError(f"tasks must have one horizon; got {sorted(horizons)}")
    limit = None if getattr(policy, "exhaustive", False) else max_histories

    def histories(env: Environment) -> int:
        """Approximate number of histories of one task at which the policy is stepped in one call."""
        if _merges(policy, env):
            return env.num_states
        n = env.num_histories()
        if limit is None:
            return n * env.num_actions ** (env.horizon - 1)  # it may be stochastic
        return n if n <= limit else episodes

    batch = max(1, getattr(policy, "batch_size", BATCH_SIZE) // max((histories(task.known) for task in tasks), default=1))
    losses: list[PolicyLoss | None] = []
    for first in range(0, len(tasks), batch):
        losses += _evaluate(tasks[first : first + batch], policy, episodes, [seed, first], limit)
    return losses


def _merges(policy: Any, env: Environment) -> bool:
    return isinstance(env, MDPEnvironment) and getattr(policy, "markov", False)


class _Walk:
    """The histories of one task, stage by stage, with the loss of the policy so far."""

    def __init__(self, env: Environment, merges: bool, limit: int | None, exact: bool, episodes: int, seeds: Sequence[int]):
        self.env, self.merges, self.limit, self.exact = env, merges, limit, exact
        self.evaluated = exact or not env.ambiguous
        self.rng = None if exact else np.random.default_rng(seeds)
        self.rng_of_actions = np.random.default_rng(
            [*seeds, 1]
        )  # its own stream: episodes do not depend on whether a policy draws actions
        self.at = env.start(self.rng, episodes) if self.evaluated else NO_HISTORIES
        self.lost = self.agreed = self.reached = 0.0
        self.decisions, self.invalid = 0, None
        self.table: list[np.ndarray] = []  # of an ambiguous problem

    def step(self, stage: int, probabilities: np.ndarray, invalid: np.ndarray | None) -> None:
        env, at = self.env, self.at
        Q, optimal = env.Q_at(stage, at)
        weight = at.weight
        self.lost += float(weight @ (Q.max(-1) - (probabilities * Q).sum(-1)))
        self.agreed += float(weight @ (probabilities * optimal).sum(-1))
        self.reached += float(weight.sum())
        self.decisions += len(at)
        if invalid is not None:
            self.invalid = (self.invalid or 0) + int(invalid.sum())
        if isinstance(env, BeliefEnvironment) and env.ambiguous:
            self.table.append(_table(env.branching**stage, at, probabilities))
        if stage + 1 == env.horizon:
            return
        actions = probabilities.argmax(-1)
        if self.rng is not None and (probabilities.max(-1) < 1).any():
            u = self.rng_of_actions.random(len(at))
            cdf = probabilities.cumsum(-1)
            actions = (cdf <= (u * cdf[:, -1])[:, None]).sum(-1)
        self.at = env.step(stage, at, probabilities, self.rng, actions)
        if self.merges:
            assert isinstance(env, MDPEnvironment)
            self.at = env.merged(self.at)
        elif self.exact and self.limit is not None and len(self.at) > self.limit:
            self.at, self.evaluated = NO_HISTORIES, False  # a stochastic policy reaches more than the limit

    def result(self) -> PolicyLoss | None:
        env = self.env
        if not self.evaluated:
            return None
        suboptimality = self.lost
        if isinstance(env, BeliefEnvironment) and env.ambiguous:
            with double_precision():
                value = tree.policy_value(env.apomdp, tuple(map(jnp.asarray, self.table)))
            suboptimality = env.optimal_value - float(value)
        return PolicyLoss(
            suboptimality=suboptimality,
            agreement=self.agreed / self.reached,
            optimal_value=env.optimal_value,
            uniform_value=env.uniform_value,
            exact=self.exact,
            decisions=self.decisions,
            invalid=self.invalid,
        )


def _evaluate(
    tasks: Sequence[PolicyTask], policy: Any, episodes: int, seeds: list[int], limit: int | None, sampled: bool = False
) -> list[PolicyLoss | None]:
    """`evaluate_policy` of tasks that are stepped together; `seeds`: the seed and the number of the first task."""
    walks = []
    for i, env in enumerate(task.known for task in tasks):
        merges = _merges(policy, env)
        exact = not sampled and (merges or limit is None or env.num_histories() <= limit)
        walks.append(_Walk(env, merges, limit, exact, episodes, [seeds[0], seeds[1] + i]))
    if any(walk.evaluated for walk in walks):
        state, before = policy.init(tasks), np.zeros(len(walks), int)
        for stage in range(tasks[0].known.horizon):
            counts = np.array([len(walk.at) for walk in walks])
            if not counts.any():
                break
            observation = _observation(stage, walks, before)
            state, probabilities = policy.step(state, observation)
            probabilities = _checked(probabilities, len(observation), tasks[0].known.num_actions)
            invalid = getattr(state, "invalid", None)  # [n], of a language model
            parts = np.cumsum(counts)[:-1]
            flags = [None] * len(walks) if invalid is None else np.split(np.asarray(invalid), parts)
            for walk, rows, flag in zip(walks, np.split(probabilities, parts), flags, strict=True):
                if len(walk.at):
                    walk.step(stage, rows, flag)
            before = counts
    losses = [walk.result() for walk in walks]
    for i, (walk, task) in enumerate(zip(walks, tasks, strict=True)):
        if losses[i] is None and not walk.env.ambiguous:
            (losses[i],) = _evaluate([task], policy, episodes, [seeds[0], seeds[1] + i], limit, sampled=True)
    return losses


def _observation(stage: int, walks: Sequence[_Walk], before: np.ndarray) -> Observation:
    """The histories of all tasks as one observation; `before`: how many each task had at the stage before."""
    offsets = np.concatenate([[0], np.cumsum(before)[:-1]]) if stage else np.zeros(len(walks), int)
    levels = [(i, walk.at) for i, walk in enumerate(walks) if len(walk.at)]

    def joined(name: str) -> np.ndarray | None:
        parts = [getattr(at, name) for _, at in levels]
        return None if not parts or parts[0] is None else np.concatenate(parts)

    return Observation(
        stage=stage,
        task=np.concatenate([np.zeros(0, int), *(np.full(len(at), i) for i, at in levels)]),
        parent=np.concatenate([np.zeros(0, int), *(at.parent + offsets[i] for i, at in levels)]),
        **{name: joined(name) for name in SEEN},
    )


def _checked(probabilities: Any, n: int, num_actions: int) -> np.ndarray:
    checked = np.asarray(probabilities, float)
    if checked.shape != (n, num_actions):
        raise ValueError(f"a policy must return action probabilities of shape {(n, num_actions)}; got {checked.shape}")
    if not ((checked >= 0).all() and np.allclose(checked.sum(-1), 1, atol=1e-6)):
        row = int((~((checked >= 0).all(-1) & np.isclose(checked.sum(-1), 1, atol=1e-6))).argmax())
        raise ValueError(f"action probabilities must not be negative and sum to 1; got {checked[row].tolist()}")
    return checked


def _table(size: int, at: Histories, probabilities: np.ndarray) -> np.ndarray:
    """A stage of a `tree.Policy` [size] or [size, A]; entries of histories that are not reached are arbitrary."""
    if (probabilities.max(-1) == 1).all():
        table = np.zeros(size, np.int32)
        table[at.index] = probabilities.argmax(-1)
    else:
        table = np.zeros((size, probabilities.shape[-1]))
        table[at.index] = probabilities
    return table


def summarize(losses: Sequence[PolicyLoss]) -> dict[str, Any]:
    """Means over tasks, with 95 % intervals by a t-distribution over tasks.

    gap: the normalized optimality gap, (V* - V^pi) / (V* - V^random); gap_of_value: (V* - V^pi) / |V*|, None where V* is zero in
    a task; agreement: how often the action is an optimal one; method: exact or rollout.
    """
    from scipy import stats

    def mean(values: Sequence[float]) -> tuple[float, list[float]]:
        one, half = float(np.mean(values)), 0.0
        if len(values) > 1:
            half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
        return one, [one - half, one + half]

    gap, gap_ci = mean([one.normalized_gap for one in losses])
    share, share_ci = None, None
    if all(one.optimal_value for one in losses):
        share, share_ci = mean([one.suboptimality / abs(one.optimal_value) for one in losses])
    return {
        **{"gap": gap, "gap_ci": gap_ci, "gap_of_value": share, "gap_of_value_ci": share_ci},
        "agreement": float(np.mean([one.agreement for one in losses])),
        "n": len(losses),
        "method": "exact" if all(one.exact for one in losses) else "rollout",
    }
