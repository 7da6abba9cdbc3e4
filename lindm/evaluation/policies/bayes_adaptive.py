"""The Bayes-adaptive value of an MDP: the most that any policy can earn on average, given what is known before the episode.

The state of the Bayes-adaptive problem is what is known (Duff, Optimal learning, 2002): the Dirichlet parameters of the kernel's
rows, the rewards that were seen, and the state of the MDP. An action is valued for what it earns and for what it tells. With R
rewards, the number of histories grows as (A S R)^(H - 1), so the sizes must be small.

The value of planning with the posterior mean before every decision (`MeanPlanning` of `lindm.evaluation.policies.bayes_mdp`) is
computed beside it, over the same histories: that policy values an action for what it earns alone.
"""

import numpy as np

from lindm import validate
from lindm.evaluation.policies.bayes_mdp import plan
from lindm.solvers.ties import greedy

LARGEST = 1 << 21  # histories of a stage


def num_histories(states: int, actions: int, rewards: int, horizon: int) -> int:
    """The largest number of histories of the last stage of an episode."""
    return states * (actions * states * rewards) ** (horizon - 1)


def bayes_adaptive_values(
    parameters: np.ndarray, rewards: np.ndarray, values: np.ndarray, rho: np.ndarray, horizon: int
) -> tuple[float, float]:
    """The values of the Bayes-optimal policy, and of planning with the posterior mean, in a random MDP with independent rows and
    rewards.

    Args:
      parameters: [S, A, S] of the Dirichlet laws of the kernel's rows.
      rewards: [S, A], those that are known; NaN where a reward is one of `values`, all equally likely.
      values: [R].
      rho: [S], law of the first state.

    Raises:
      ValueError: the last stage has more than 2^21 histories.
    """
    S, A, _ = parameters.shape
    validate.count(horizon, "horizon")
    count = num_histories(S, A, len(values) if np.isnan(rewards).any() else 1, horizon)
    if count > LARGEST:
        raise ValueError(f"horizon must be short enough for {LARGEST:,} histories; {horizon} stages have {count:,}")
    optimal, planned = _values(parameters[None].repeat(S, 0), rewards[None].repeat(S, 0), values, np.arange(S), horizon) @ rho
    return float(optimal), float(planned)


def _values(parameters: np.ndarray, rewards: np.ndarray, values: np.ndarray, state: np.ndarray, stages: int) -> np.ndarray:
    """The values [2, n] of both policies at n histories with the given number of stages to go."""
    n, S, A, _ = parameters.shape
    rows, Q = np.arange(n), np.empty((2, n, A))
    for a in range(A):
        known = rewards[rows, state, a]
        seen = ~np.isnan(known)
        Q[:, :, a] = np.where(seen, known, values.mean())
        if stages == 1:
            continue
        law = parameters[rows, state, a]
        law = law / law.sum(-1, keepdims=True)
        for some, shown in ((np.flatnonzero(seen), known[seen][:, None]), (np.flatnonzero(~seen), values[None])):
            if not len(some):
                continue
            shown = np.broadcast_to(shown, (len(some), shown.shape[1]))
            after = np.repeat(some, S * shown.shape[1])
            reward, following = np.repeat(shown, S, axis=1).reshape(-1), np.tile(np.arange(S), len(some) * shown.shape[1])
            counts, table = parameters[after], rewards[after]
            each = np.arange(len(after))
            counts[each, state[after], a, following] += 1
            table[each, state[after], a] = reward
            V = _values(counts, table, values, following, stages - 1).reshape(2, len(some), shown.shape[1], S)
            Q[:, some, a] += (V.mean(2) * law[some]).sum(-1)
    mean = np.where(np.isnan(rewards), values.mean(), rewards)
    planned = plan(parameters / parameters.sum(-1, keepdims=True), mean, stages)[0][rows, state]
    return np.stack([Q[0].max(-1), Q[1][rows, greedy(planned, per_row=True)]])
