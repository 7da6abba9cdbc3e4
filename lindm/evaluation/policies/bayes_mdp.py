"""Posteriors of an MDP given transitions and rewards, and policies that plan with them (see `bayes_policies`).

Kernels and rewards are the same at every stage, as in all suites. In a suite of random MDPs the rows of the kernel are
independent with symmetric Dirichlet laws, and the rewards are independent and uniform on a grid. Given transitions, a row has a
Dirichlet law again, whose parameters grow by the counts; a reward that was seen is known, and the others keep their law.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lindm.evaluation.environments import PolicyTask
from lindm.evaluation.policies.bayes_evidence import action_evidence, normalized_weights
from lindm.evaluation.policies.prior import draw_models
from lindm.evaluation.policies.tables import mdp_of, transitions
from lindm.evaluation.policy import Observation, Policy, one_hot
from lindm.families.random_suites import RandomSuite
from lindm.families.suites import Suite
from lindm.problems.mdp import reward_levels
from lindm.solvers.ties import greedy
from lindm.types import MDP

Seen = tuple[tuple[int, float], ...]
"""Rewards that the episode so far has shown first: pairs of s A + a and the reward, in the order of the numbers."""


def reward_values(suite: RandomSuite) -> np.ndarray:
    """The rewards that tasks of the suite may have, equally likely: the multiples of its step in [low, high].

    Raises:
      ValueError: the step is zero.
    """
    if suite.step == 0:
        raise ValueError("step must be above 0 for a posterior over rewards, which are then on a grid; got 0")
    return reward_levels(suite.low, suite.high, suite.step)


def plan(P: np.ndarray, r: np.ndarray, stages: int, discount: float = 1.0) -> np.ndarray:
    """Q* [stages, ..., S, A] of the last stages of an episode.

    Args:
      P, r: kernels [..., S, A, S] and rewards [..., S, A], not discounted.
      stages: number of stages to go.
    """
    Q, V = np.zeros((stages, *r.shape)), np.zeros(r.shape[:-1])
    for stage in reversed(range(stages)):
        Q[stage] = r + discount * np.einsum("...sau,...u->...sa", P, V, optimize=True)
        V = Q[stage].max(-1)
    return Q


def count_transitions(suite: RandomSuite, tasks: Sequence[PolicyTask]) -> tuple[np.ndarray, np.ndarray]:
    """The posterior given the demonstrations of n tasks: Dirichlet parameters [n, S, A, S], and the rewards that were seen
    [n, S, A], NaN where none was."""
    S, A = suite.states, suite.actions
    parameters, rewards = np.full((len(tasks), S, A, S), suite.concentration), np.full((len(tasks), S, A), np.nan)
    for i, task in enumerate(tasks):
        s, a, r, u = transitions(task).T
        at, moved = (s.astype(int), a.astype(int)), u >= 0
        np.add.at(parameters[i], (at[0][moved], at[1][moved], u[moved].astype(int)), 1)
        rewards[i][at] = r
    return parameters, rewards


# --- the closed form ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Counts:
    """What is known at n histories."""

    before: tuple[np.ndarray, np.ndarray]  # parameters and rewards of every task before its episode
    horizon: int
    parameters: np.ndarray  # [n, S, A, S] of the Dirichlet laws
    rewards: np.ndarray  # [n, S, A] posterior means
    state: np.ndarray  # [n]
    Q: np.ndarray  # [n, A] by which the policy chooses


class MeanPlanning(Policy):
    """Plans with the posterior mean of a suite of random MDPs, without the condition on the action gap; exact given uniform
    demonstrations."""

    def __init__(self, suite: RandomSuite, *, rewards: bool = True):
        self.suite, self.rewards = suite, rewards
        self.values = reward_values(suite)

    def init(self, tasks: Sequence[PolicyTask]) -> _Counts:
        parameters, seen = count_transitions(self.suite, tasks)
        rewards = np.where(np.isnan(seen) | (not self.rewards), self.values.mean(), seen)
        empty = np.zeros(0)
        return _Counts(
            before=(parameters, rewards),
            horizon=tasks[0].known.horizon,
            parameters=parameters,
            rewards=rewards,
            state=empty,
            Q=empty,
        )

    def step(self, state: _Counts, observation: Observation) -> tuple[_Counts, np.ndarray]:
        now = observation.state
        assert now is not None
        if observation.stage == 0:
            parameters, rewards = (array[observation.task] for array in state.before)
        else:
            parameters, rewards = state.parameters[observation.parent], state.rewards[observation.parent]
            at = (np.arange(len(observation)), state.state[observation.parent], observation.action)
            parameters[*at, now] += 1
            if self.rewards:
                rewards[at] = observation.reward
        Q = plan(parameters / parameters.sum(-1, keepdims=True), rewards, state.horizon - observation.stage)[0]
        chosen = Q[np.arange(len(now)), now]
        after = _Counts(before=state.before, horizon=state.horizon, parameters=parameters, rewards=rewards, state=now, Q=chosen)
        return after, one_hot(greedy(chosen, per_row=True), Q.shape[-1])

    def q_bounds(self, state: _Counts, observation: Observation):
        return state.Q, state.Q


# --- a weighted sample -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Paths:
    """n histories of several tasks."""

    tasks: "list[_TaskPosterior]"
    steps: np.ndarray  # [n, t, 4] (s, a, r, s') of the episode so far
    state: np.ndarray  # [n]
    effective: np.ndarray  # [n] effective sample size
    Q: np.ndarray  # [n, A] by which the policy chooses


class SampledPosterior(Policy):
    """Plans with the mean of a weighted sample of the posterior.

    In a suite of random MDPs, models are drawn from the posterior given the transitions and rewards of the demonstrations. In
    other suites they are drawn from the suite and weighted with the probability of the transitions. Rewards that are seen are put
    into every model; what they tell of others, in suites whose rewards depend on each other, is not used.

    Args:
      epsilon: of the demonstrators, whose actions are data; None: they are not. With actions, the condition of the suite on the
        action gap is used, too.
      thompson: take each action with the weight of the models for which it is the best.
    """

    def __init__(
        self,
        suite: Suite,
        *,
        epsilon: float | None,
        samples: int,
        seed: int,
        thompson: bool = False,
        rewards: bool = True,
    ):
        self.suite, self.epsilon, self.samples, self.seed = suite, epsilon, samples, seed
        self.thompson, self.rewards = thompson, rewards
        self.batch_size = max(1, (1 << 24) // samples)

    def init(self, tasks: Sequence[PolicyTask]) -> _Paths:
        posteriors = [_TaskPosterior(self, task) for task in tasks]
        none = np.zeros(0)
        return _Paths(tasks=posteriors, steps=np.zeros((1, 0, 4)), state=none, effective=none, Q=none)

    def step(self, state: _Paths, observation: Observation) -> tuple[_Paths, np.ndarray]:
        now, n = observation.state, len(observation)
        assert now is not None
        if observation.stage == 0:
            steps = np.zeros((n, 0, 4))
        else:
            last = [state.state[observation.parent], observation.action, observation.reward, now]
            steps = np.concatenate([state.steps[observation.parent], np.stack(last, -1)[:, None]], axis=1)
        A = self.suite.sizes.actions
        probabilities, Q, effective = np.zeros((n, A)), np.zeros((n, A)), np.zeros(n)
        for i, posterior in enumerate(state.tasks):
            rows = np.flatnonzero(observation.task == i)
            if len(rows):
                probabilities[rows], Q[rows], effective[rows] = posterior.decide(observation.stage, steps[rows], now[rows])
        return _Paths(tasks=state.tasks, steps=steps, state=now, effective=effective, Q=Q), probabilities

    def q_bounds(self, state: _Paths, observation: Observation):
        return state.Q, state.Q


class _TaskPosterior:
    """The sample of one task: kernels P [K, S, A, S], rewards r [K, S, A], and log weights that depend on the rewards seen."""

    def __init__(self, policy: SampledPosterior, task: PolicyTask):
        env, suite = mdp_of(task), policy.suite
        self.policy, self.horizon, self.discount = policy, env.horizon, env.discount
        data = transitions(task)
        s, a, u = data[:, 0].astype(int), data[:, 1].astype(int), data[:, 3].astype(int)
        stages = np.concatenate([np.arange(len(steps)) for steps in task.required_demonstrations()])
        self.demonstrated = stages, s, a
        S, A, K = env.num_states, env.num_actions, policy.samples
        known = np.full((S, A), np.nan)
        if policy.rewards:
            known[s, a] = data[:, 2]
        moved = u >= 0
        if isinstance(suite, RandomSuite):
            rng = np.random.default_rng([policy.seed, zlib.crc32(np.ascontiguousarray(data).tobytes())])
            counts = np.full((S, A, S), suite.concentration)
            np.add.at(counts, (s[moved], a[moved], u[moved]), 1)
            gammas = rng.standard_gamma(np.broadcast_to(counts, (K, S, A, S)))
            P, drawn = gammas / gammas.sum(-1, keepdims=True), rng.choice(reward_values(suite), (K, S, A))
            self.log_weight = np.zeros(K)
        else:
            models = draw_models(suite, K, policy.seed)
            assert isinstance(models, MDP)
            P, drawn = np.asarray(models.P[:, 0]), np.asarray(models.r[:, 0])
            with np.errstate(divide="ignore"):
                self.log_weight = np.log(P[:, s[moved], a[moved], u[moved]]).sum(-1)
        self.P: np.ndarray = P
        self.seen = ~np.isnan(known)
        self.r = np.where(self.seen, known, drawn)
        self._groups: dict[Seen, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def decide(self, stage: int, steps: np.ndarray, states: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probabilities and values [n, A] of the actions, and effective sample sizes [n], after steps [n, t, 4]."""
        s, a, u = (steps[..., field].astype(int) for field in (0, 1, 3))
        with np.errstate(divide="ignore"):
            path = np.log(self.P[:, s, a, u]).sum(-1).T  # [n, K]
        K, S, A, _ = self.P.shape
        probabilities, values, effective = np.zeros((len(s), A)), np.zeros((len(s), A)), np.zeros(len(s))
        for seen, rows in self._by_rewards(steps).items():
            r, best, log_weight = self._with_rewards(seen)
            weight = normalized_weights(log_weight + path[rows])
            effective[rows] = 1 / np.maximum((weight**2).sum(-1), 1e-300)
            at = states[rows]
            if self.policy.thompson:
                taken = best[stage][:, at].T  # [n, K]
                values[rows] = probabilities[rows] = np.stack([(weight * (taken == a)).sum(-1) for a in range(A)], -1)
                continue
            mean = (weight @ self.P.reshape(K, -1)).reshape(-1, S, A, S), (weight @ r.reshape(K, -1)).reshape(-1, S, A)
            values[rows] = plan(*mean, self.horizon - stage, self.discount)[0][np.arange(len(rows)), at]
            probabilities[rows] = one_hot(greedy(values[rows], per_row=True), A)
        return probabilities, values, effective

    def _by_rewards(self, steps: np.ndarray) -> dict[Seen, np.ndarray]:
        """The rows of histories that have shown the same rewards for the first time."""
        groups: dict[Seen, list[int]] = {}
        for row, taken in enumerate(steps):
            new = {}
            if self.policy.rewards:
                new = {int(s) * self.seen.shape[1] + int(a): r for s, a, r, _ in taken if not self.seen[int(s), int(a)]}
            groups.setdefault(tuple(sorted(new.items())), []).append(row)
        return {seen: np.array(rows) for seen, rows in groups.items()}

    def _with_rewards(self, seen: Seen) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rewards [K, S, A], best actions [H, K, S] and log weights [K] of the models once these rewards are known."""
        if seen not in self._groups:
            r = self.r.copy()
            for number, reward in seen:
                r[:, number // r.shape[2], number % r.shape[2]] = reward
            Q = plan(self.P, r, self.horizon, self.discount)
            best = greedy(Q)
            self._groups[seen] = r, best.astype(np.int8), self.log_weight + self._evidence(Q, best)
        return self._groups[seen]

    def _evidence(self, Q: np.ndarray, best: np.ndarray) -> np.ndarray | float:
        """Log probability [K] of the demonstrators' actions, -inf for models that do not have the action gap of the suite."""
        epsilon, suite = self.policy.epsilon, self.policy.suite
        if epsilon is None:
            return 0.0
        stages, states, actions = self.demonstrated
        log_p = action_evidence(best[stages, :, states] == actions[:, None], epsilon, Q.shape[-1])
        if not isinstance(suite, RandomSuite) or suite.gap == 0:
            return log_p
        first, second = np.partition(Q, -2, axis=-1)[..., -1], np.partition(Q, -2, axis=-1)[..., -2]
        allowed = (first - second).min((0, 2)) >= suite.gap * (1 - 1e-9)
        conditioned = np.where(allowed, log_p, -np.inf)
        return conditioned if np.isfinite(conditioned).any() else log_p
