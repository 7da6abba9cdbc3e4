r"""The suboptimality of a policy on tasks: exact, over all histories that it reaches, or over those of sampled episodes.

By the performance difference identity (Kakade, Langford, 2002) the suboptimality is

    V* - V^pi = sum_h E_{history_h ~ pi} [ max_a Q*_h(history_h, a) - sum_a pi(a | history_h) Q*_h(history_h, a) ],

an expectation of exact one-step losses. If the policy reaches few histories, it is stepped at all of them, weighted by their
probabilities, and the loss is exact; histories of an MDP that end in the same state are merged if the policy acts on the state
alone (`Policy.markov`). The probability that a policy gives to actions that are not legal is removed, and the rest scaled to one.
Otherwise the expectation is taken over sampled episodes: an estimate far less noisy than returns, and
without error for an optimal policy. The episodes of a task are drawn with the same random numbers for every policy. In a POMDP
with too many histories for Q*, the same sum with a lower bound in place of the values gives V^pi, and V* has certified bounds
(`lindm.evaluation.environments.BoundedEnvironment`).

In an ambiguous problem nature's choice depends on the policy, so the identity does not hold; there the value is a recursion over
all histories that the policy reaches (`lindm.evaluation.ambiguous`), and V* is exact or has bounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from lindm.evaluation.ambiguous import NetEnvironment, policy_value
from lindm.evaluation.calibration import ScoredHistories, merge
from lindm.evaluation.environments import (
    NO_HISTORIES,
    BeliefEnvironment,
    BoundedEnvironment,
    Environment,
    Histories,
    MDPEnvironment,
    PolicyTask,
)
from lindm.evaluation.intervals import VARIES
from lindm.evaluation.policy import BATCH_SIZE, Observation, as_policy, only_legal
from lindm.evaluation.sampling import draw_indices
from lindm.solvers.ties import TOLERANCE

MAX_HISTORIES = 2048  # at which a policy is stepped, in one stage of one task
SEEN = ("state", "action", "model", "observation", "reward")


Rows = np.ndarray | None  # something for each history

Unit = Literal["reward", "random", "optimal"]
"""Of a suboptimality: rewards, V* - V^random (the normalized optimality gap) or |V*|."""


class Range(NamedTuple):
    """A suboptimality in some unit for the lowest and the highest V*, and the standard errors of both by sampled episodes."""

    low: float
    high: float
    low_error: float
    high_error: float


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The suboptimality of a policy on one task, in units of reward."""

    suboptimality: float  # V* - V^pi, for the lowest possible V*
    agreement: float | None  # how often it takes an optimal action, over the histories that it reaches; None: Q* is not known
    optimal_value: float  # V*, or its lower bound
    uniform_value: float | None  # V of uniformly random actions; None: it is not known
    exact: bool  # over all histories that the policy reaches
    decisions: int  # histories at which the policy was stepped
    invalid: int | None = None  # of a language model: histories at which its likeliest token was not an action
    masked: float = 0.0  # the mean probability of actions that were not legal: it went to the legal ones in proportion
    width: float = 0.0  # the upper bound of V* less the lower one
    episodes: int = 0  # that were sampled
    error: float = 0.0  # standard error of the suboptimality over these episodes
    effective: float | None = None  # mean effective sample size of the posterior that a policy samples
    scored: ScoredHistories | None = field(default=None, compare=False, repr=False)  # None: Q* is not known

    @property
    def normalized_gap(self) -> float | None:
        """The normalized optimality gap: 0 is optimal, 1 is the uniformly random policy; None where every policy is optimal.

        Where V* has bounds, the middle of the gap's range.
        """
        gap = self.range("random")
        return None if gap is None else (gap.low + gap.high) / 2

    @property
    def spread(self) -> tuple[float, float] | None:
        """V* - V^random for the lowest and the highest V*; None where every policy may be optimal."""
        if self.uniform_value is None or self.range("random") is None:
            return None
        return self.optimal_value - self.uniform_value, self.optimal_value + self.width - self.uniform_value

    def range(self, unit: Unit) -> Range | None:
        """The suboptimality in this unit; None where the unit is zero for a possible V*."""
        ends = []
        for optimal, lost in (
            (self.optimal_value, self.suboptimality),
            (self.optimal_value + self.width, self.suboptimality + self.width),
        ):
            random = 0.0 if self.uniform_value is None else optimal - self.uniform_value
            size = {"reward": 1.0, "random": random, "optimal": abs(optimal)}[unit]
            if size <= (TOLERANCE * abs(optimal) if unit == "random" else 0):
                return None
            ends.append((lost / size, self.error / size))
        if unit == "optimal" and self.optimal_value < 0 < self.optimal_value + self.width:
            return None
        (low, low_error), (high, high_error) = sorted(ends)
        return Range(low, high, low_error, high_error)


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
    exhaustive = getattr(policy, "exhaustive", False) and not any(task.known.bounded for task in tasks)
    limit = None if exhaustive else max_histories

    def histories(env: Environment) -> int:
        """Approximate number of histories of one task at which the policy is stepped in one call."""
        if _merges(policy, env):
            return env.num_states
        n = env.num_histories()
        if limit is None:
            return n * env.num_actions ** (env.horizon - 1)  # it may be stochastic
        return n if n <= limit else limit if env.ambiguous else episodes

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
        self.lost: float | np.ndarray = 0.0 if exact else np.zeros(episodes)  # in all, or in each episode
        self.agreed = self.reached = self.masked = 0.0
        self.decisions, self.invalid = 0, None
        self.effective: float | None = None
        self.levels: list[tuple[Histories, np.ndarray]] = []  # of an ambiguous problem
        self.scored: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # of each stage, as `merge` returns them

    def step(self, stage: int, probabilities: np.ndarray, invalid: Rows, log_p: Rows, effective: Rows) -> None:
        env, at = self.env, self.at
        weight = at.weight
        if isinstance(env, BoundedEnvironment):
            losses = env.losses(stage, at, probabilities)
        elif env.bounded:
            losses = np.zeros(len(at))  # of an ambiguous problem, without Q*: its value is computed at the end
        else:
            Q, optimal = env.Q_at(stage, at)
            losses = Q.max(-1) - (probabilities * np.where(probabilities > 0, Q, 0)).sum(-1)
            self.agreed += float(weight @ (probabilities * optimal).sum(-1))
            with np.errstate(divide="ignore"):
                self.scored.append(merge(weight, np.log(probabilities) if log_p is None else log_p, optimal))
        self.lost += float(weight @ losses) if self.exact else losses
        self.reached += float(weight.sum())
        self.decisions += len(at)
        if invalid is not None:
            self.invalid = (self.invalid or 0) + int(invalid.sum())
        if effective is not None:
            self.effective = (self.effective or 0) + float(weight @ effective)
        if env.ambiguous:
            self.levels.append((at, probabilities))
        if stage + 1 == env.horizon:
            return
        actions = probabilities.argmax(-1)
        if self.rng is not None and (probabilities.max(-1) < 1).any():
            actions = draw_indices(probabilities, self.rng_of_actions)
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
        suboptimality = float(np.mean(self.lost))
        optimal, width, agreement = env.optimal_value, 0.0, self.agreed / self.reached
        if isinstance(env, BoundedEnvironment | NetEnvironment):
            width, agreement = env.optimal_upper - optimal, None
        if isinstance(env, BoundedEnvironment):
            suboptimality += optimal - float(env.bound_at(0, env.rho[0]))
        elif isinstance(env, BeliefEnvironment) and env.ambiguous:
            suboptimality = optimal - policy_value(env, self.levels)
        episodes = np.size(self.lost) if not self.exact else 0
        rounding = TOLERANCE * float(np.abs(env.r).max((1, 2) if env.r.ndim == 3 else (0, 2, 3)).sum())  # of the largest return
        optimal, uniform = 0.0 if abs(optimal) <= rounding else optimal, env.uniform_value
        return PolicyLoss(
            suboptimality=suboptimality,
            agreement=agreement,
            optimal_value=optimal,
            uniform_value=optimal if uniform is not None and abs(optimal - uniform) <= rounding else uniform,
            exact=self.exact,
            decisions=self.decisions,
            invalid=self.invalid,
            effective=None if self.effective is None else self.effective / self.reached,
            masked=self.masked / self.reached,
            width=width,
            episodes=episodes,
            error=float(np.std(self.lost, ddof=1) / np.sqrt(episodes)) if episodes > 1 else 0.0,
            scored=self._scored(),
        )

    def _scored(self) -> ScoredHistories | None:
        if not self.scored:
            return None
        weight, log_p, optimal = merge(*(np.concatenate(parts) for parts in zip(*self.scored, strict=True)))
        return ScoredHistories(weight=weight / weight.sum(), log_p=log_p, optimal=optimal)


def _evaluate(
    tasks: Sequence[PolicyTask], policy: Any, episodes: int, seeds: list[int], limit: int | None, sampled: bool = False
) -> list[PolicyLoss | None]:
    """`evaluate_policy` of tasks that are stepped together; `seeds`: the seed and the number of the first task."""
    walks = []
    for i, env in enumerate(task.known for task in tasks):
        merges = _merges(policy, env)
        exact = env.ambiguous or (not sampled and (merges or limit is None or env.num_histories() <= limit))
        walks.append(_Walk(env, merges, limit, exact, episodes, [seeds[0], seeds[1] + i]))
    if any(walk.evaluated for walk in walks):
        state, before = policy.init(tasks), np.zeros(len(walks), int)
        for stage in range(tasks[0].known.horizon):
            counts = np.array([len(walk.at) for walk in walks])
            if not counts.any():
                break
            observation = _observation(stage, walks, before)
            state, probabilities = policy.step(state, observation)
            checked = _checked(probabilities, len(observation), tasks[0].known.num_actions)
            probabilities, masked = only_legal(checked, observation.legal)
            parts = np.cumsum(counts)[:-1]
            # of a language model [n] and [n, A]: its own probabilities, however it decides; of a sampled posterior [n]
            own = (_split(getattr(state, name, None), parts) for name in ("invalid", "log_p", "effective"))
            each = (np.split(probabilities, parts), *own)
            for walk, mass, *rows in zip(walks, np.split(masked, parts), *each, strict=True):
                if len(walk.at):
                    walk.masked += float(walk.at.weight @ mass)
                    walk.step(stage, *rows)
            before = counts
    losses = [walk.result() for walk in walks]
    for i, (walk, task) in enumerate(zip(walks, tasks, strict=True)):
        if losses[i] is None and not walk.env.ambiguous:
            (losses[i],) = _evaluate([task], policy, episodes, [seeds[0], seeds[1] + i], limit, sampled=True)
    return losses


def _split(rows: Any, parts: np.ndarray) -> list:
    """Rows of all tasks as those of each; None for each where there are none."""
    return [None] * (len(parts) + 1) if rows is None else np.split(np.asarray(rows), parts)


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
        legal=_legal(stage, levels, walks),
    )


def _legal(stage: int, levels: list[tuple[int, Histories]], walks: Sequence[_Walk]) -> np.ndarray | None:
    """Which actions are legal [n, A]; None where all are."""
    environments = [walks[i].env for i, _ in levels]
    problems = [env.problem if isinstance(env, MDPEnvironment) else env.apomdp.models for env in environments]
    if all(problem.legal is None for problem in problems):
        return None
    return np.concatenate([env.legal_at(stage, at) for env, (_, at) in zip(environments, levels, strict=True)])


def _checked(probabilities: Any, n: int, num_actions: int) -> np.ndarray:
    checked = np.asarray(probabilities, float)
    if checked.shape != (n, num_actions):
        raise ValueError(f"a policy must return action probabilities of shape {(n, num_actions)}; got {checked.shape}")
    if not ((checked >= 0).all() and np.allclose(checked.sum(-1), 1, atol=1e-6)):
        row = int((~((checked >= 0).all(-1) & np.isclose(checked.sum(-1), 1, atol=1e-6))).argmax())
        raise ValueError(f"action probabilities must not be negative and sum to 1; got {checked[row].tolist()}")
    return checked


def summarize(losses: Sequence[PolicyLoss], tasks_are: str = "tasks") -> dict[str, Any]:
    """Means over tasks, with 95 % intervals by a t-distribution over tasks, or over the sampled episodes of a single task.

    An interval is None where nothing varies. Where V* has bounds, the number is the middle of its range over them, and the
    interval goes from the lower end of the interval for one end of the range to the upper end of that for the other. It covers
    the truth at least as often as the intervals do.

    Args:
      tasks_are: what differs from task to task: tasks (the problems), or demonstrations of one problem.

    Returns:
      gap: the normalized optimality gap, (V* - V^pi) / (V* - V^random), over the tasks that have one; suboptimality: V* - V^pi,
      in units of reward; gap_of_value: (V* - V^pi) / |V*|, None where V* may be zero in a task. gap_ci, suboptimality_ci,
      gap_of_value_ci: their intervals; interval_over: what varies in them. value, uniform_value: V^pi and V^random;
      optimal_lower, optimal_upper: the bounds of V*, equal where it is exact. agreement: how often the action is an optimal one;
      method: exact, rollout, or bounds where V* has bounds; note: what is undefined, or None; n: number of tasks.
    """
    names: dict[Unit, str] = {"random": "gap", "reward": "suboptimality", "optimal": "gap_of_value"}
    bounded, sampled = any(one.width > 0 for one in losses), not all(one.exact for one in losses)
    result: dict[str, Any] = {}
    varied = False
    for unit, name in names.items():
        ranges = [one.range(unit) for one in losses]
        known = [one for one in ranges if one is not None]
        if not known or (unit == "optimal" and len(known) < len(ranges)):
            result |= {name: None, f"{name}_ci": None}
            continue
        mean, interval, varies = _mean(known, losses[0].episodes, bounded)
        varied = varied or varies
        result |= {name: mean, f"{name}_ci": interval}
    sources = [
        *([tasks_are] if len(losses) > 1 else []),
        *(["episodes"] if sampled and (len(losses) == 1 or tasks_are != "tasks") else []),
    ]
    agreements = [one.agreement for one in losses if one.agreement is not None]
    uniform_values = [one.uniform_value for one in losses if one.uniform_value is not None]
    return result | {
        "interval_over": " and ".join(sources) if varied else None,
        "value": float(np.mean([one.optimal_value - one.suboptimality for one in losses])),
        "optimal_lower": float(np.mean([one.optimal_value for one in losses])),
        "optimal_upper": float(np.mean([one.optimal_value + one.width for one in losses])),
        "uniform_value": float(np.mean(uniform_values)) if len(uniform_values) == len(losses) else None,
        "agreement": float(np.mean(agreements)) if len(agreements) == len(losses) else None,
        "n": len(losses),
        "method": "bounds" if bounded else "rollout" if sampled else "exact",
        "note": _note(losses),
    }


def _mean(ranges: Sequence[Range], episodes: int, bounded: bool) -> tuple[float, list[float] | None, bool]:
    """The mean over tasks, its interval, and whether anything varies. Nothing here is below 0, so no end of an interval is."""
    from scipy import stats

    rows = np.array(ranges)  # [n, 4]
    ends, n = rows[:, :2].mean(0), len(rows)
    errors = rows[0, 2:] if n == 1 else rows[:, :2].std(0, ddof=1) / np.sqrt(n)
    varies = bool((errors > VARIES * max(1.0, np.abs(ends).max())).any())
    half = stats.t.ppf(0.975, max(n - 1 or episodes - 1, 1)) * errors
    interval = np.maximum([ends[0] - half[0], ends[1] + half[1]], 0)
    ends = np.maximum(ends, 0) if bounded else ends  # where V* has bounds, the lowest range may be below
    return float(ends.mean()), interval.tolist() if varies or ends[1] > ends[0] else None, varies


def _note(losses: Sequence[PolicyLoss]) -> str | None:
    """What has no value, and why."""
    undefined = sum(one.range("random") is None for one in losses)
    if not undefined:
        return None
    some = "every task" if undefined == len(losses) else f"{undefined} of {len(losses)} tasks, which are left out"
    if any(one.uniform_value is None for one in losses):
        return "V^random is not known, since random actions reach too many histories: the normalized gap has no unit"
    why = "V* may be V^random" if any(one.width > 0 for one in losses) else "V* = V^random"
    return f"{why} in {some}: there the normalized gap is undefined"
