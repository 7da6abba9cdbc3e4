"""Least-squares value iteration (LSVI) on the demonstrations' transitions, and its pessimistic form (PEVI)."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from lindm.evaluation.environments import PolicyTask
from lindm.evaluation.policies.tables import TablePolicy, mdp_of, transitions
from lindm.icl import predictors

LAM = 1.0  # ridge penalty of the regressions
BETA = 1.0  # scale of PEVI's bonus for rewards in [0, 1]; the value of its theory is larger and makes all estimates zero


class LSVI(TablePolicy):
    """LSVI with one feature per state and action; rewards are scaled to [0, 1] by the range of the task's rewards.

    Kernels and rewards are assumed to be the same at all stages, as in the suites, so every transition is used at every stage.
    """

    pessimistic = False

    def action_values(self, tasks: Sequence[PolicyTask]) -> list[np.ndarray]:
        values = []
        for task in tasks:
            env = mdp_of(task)
            H, S, A = env.problem.r.shape
            s, a, r, u = transitions(task).T
            low, high = r.min(), r.max()
            phi = np.eye(S * A).reshape(S, A, S * A)
            x = np.repeat(phi[s.astype(int), a.astype(int)][None], H, axis=0)
            x[: H - 1, u < 0] = 0  # the next state of an episode's last step is not known; only the last stage needs none
            after = np.repeat(phi[u.astype(int)][None], H, axis=0)
            scaled = env.discount ** np.arange(H)[:, None] * ((r - low) / (high - low if high > low else 1.0))
            given = [jnp.asarray(array) for array in (phi, x, scaled, after)]
            Q = predictors.pevi(*given, lam=LAM, beta=BETA) if self.pessimistic else predictors.lsvi(*given, lam=LAM)[0]
            values.append(np.asarray(Q))
        return values


class PEVI(LSVI):
    """LSVI less a bonus for uncertainty, clipped (Jin, Yang, Wang, 2021)."""

    pessimistic = True
