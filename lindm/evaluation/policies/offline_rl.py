"""Least-squares value iteration (LSVI) on the demonstrations' transitions, and its pessimistic form (PEVI).

With one feature per state and action the regressions of `lindm.icl.predictors.lsvi` and `pevi` have diagonal matrices. A weight
is then a sum of targets divided by a count, for all tasks at once:

    w_h(s, a) = sum_i 1[(s_i, a_i) = (s, a)] (r_i + V_{h+1}(s'_i)) / (n_h(s, a) + LAM),      V_h(s) = max_a Q_h(s, a),

and the bonus of PEVI is BETA / sqrt(n_h(s, a) + LAM).
"""

from collections.abc import Sequence

import numpy as np

from lindm.evaluation.environments import PolicyTask
from lindm.evaluation.policies.tables import TablePolicy, mdp_of, transitions

LAM = 1.0  # ridge penalty of the regressions
BETA = 1.0  # scale of PEVI's bonus for rewards in [0, 1]; the value of its theory is larger and makes all estimates zero


class LSVI(TablePolicy):
    """LSVI with one feature per state and action; rewards are scaled to [0, 1] by the range of the task's rewards.

    Kernels and rewards are assumed to be the same at all stages, as in the suites, so every transition is used at every stage.
    The next state of an episode's last step is not known, so only the last stage, which needs none, uses this step.
    """

    def action_values(self, tasks: Sequence[PolicyTask]) -> list[np.ndarray]:
        H, S, A = mdp_of(tasks[0]).problem.r.shape
        discount = np.array([mdp_of(task).discount for task in tasks])[:, None, None]
        moves = np.zeros((len(tasks), S, A, S))  # transitions whose next state is known
        rewards = np.zeros((2, len(tasks), S, A))  # sums of their scaled rewards, and of those of all steps
        steps = np.zeros((len(tasks), S, A))
        for i, task in enumerate(tasks):
            s, a, r, u = transitions(task).T
            at, known = (s.astype(int), a.astype(int)), u >= 0
            scaled = (r - r.min()) / (np.ptp(r) or 1.0)
            np.add.at(moves[i], (at[0][known], at[1][known], u[known].astype(int)), 1)
            np.add.at(rewards[0, i], (at[0][known], at[1][known]), scaled[known])
            np.add.at(rewards[1, i], at, scaled)
            np.add.at(steps[i], at, 1)
        Q = np.zeros((H, len(tasks), S, A))
        for h in reversed(range(H)):
            last = h == H - 1
            targets = discount**h * rewards[int(last)]
            if not last:
                targets = targets + (moves @ Q[h + 1].max(-1)[:, None, :, None])[..., 0]
            Q[h] = self.stage_values(targets, steps if last else moves.sum(-1), H - h)
        return list(Q.swapaxes(0, 1))

    def stage_values(self, targets: np.ndarray, counts: np.ndarray, stages_to_go: int) -> np.ndarray:
        """Q [n, S, A] of a stage from sums of targets and numbers of transitions [n, S, A]."""
        return targets / (counts + LAM)


class PEVI(LSVI):
    """LSVI less a bonus for uncertainty, clipped to the values that are possible (Jin, Yang, Wang, 2021)."""

    def stage_values(self, targets: np.ndarray, counts: np.ndarray, stages_to_go: int) -> np.ndarray:
        return np.clip(super().stage_values(targets, counts, stages_to_go) - BETA / np.sqrt(counts + LAM), 0, stages_to_go)
