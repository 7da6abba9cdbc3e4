"""Certainty equivalence: an estimate is taken for the truth.

In an MDP the kernel and the rewards are estimated from the demonstrations; where the state is hidden the model is known and the
state is estimated.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from lindm.evaluation.environments import MDPEnvironment, PolicyTask
from lindm.evaluation.policies.beliefs import LikeliestState
from lindm.evaluation.policies.registry import HIDDEN
from lindm.evaluation.policies.tables import TablePolicy, mdp_of, transitions
from lindm.evaluation.policy import ChosenPolicy, Policy
from lindm.problems.mdp import over_stages
from lindm.solvers import dp
from lindm.types import MDP


class CertaintyEquivalence(ChosenPolicy):
    """`EstimatedModel` of an MDP, `LikeliestState` of a POMDP or an APOMDP."""

    markov = True
    knows_problem = HIDDEN

    def choose(self, tasks: Sequence[PolicyTask]) -> Policy:
        return EstimatedModel() if isinstance(tasks[0].known, MDPEnvironment) else LikeliestState()


class EstimatedModel(TablePolicy):
    """Planning in the MDP of the demonstrations' relative frequencies and average rewards."""

    def action_values(self, tasks: Sequence[PolicyTask]) -> list[np.ndarray]:
        estimates = [estimate(task) for task in tasks]
        return [np.asarray(dp.backward_induction(estimated).Q) for estimated in estimates]


def estimate(task: PolicyTask) -> MDP:
    """The kernel and the rewards that the demonstrations show, in an MDP of the task's sizes and law of the first state.

    One transition to every state alike, and one average reward, are added to what was seen of each state and action.
    """
    problem = mdp_of(task).problem
    H, S, A = problem.r.shape
    s, a, r, u = transitions(task).T
    at = (s.astype(int), a.astype(int))
    counts, rewards, n = np.full((S, A, S), 1 / S), np.full((S, A), r.mean()), np.ones((S, A))
    np.add.at(rewards, at, r)
    np.add.at(n, at, 1)
    known = u >= 0
    np.add.at(counts, (at[0][known], at[1][known], u[known].astype(int)), 1)
    return MDP(
        P=jnp.asarray(counts / counts.sum(-1, keepdims=True))[None],
        r=over_stages(jnp.asarray(rewards / n), H, problem.discount),
        rho=problem.rho,
        legal=problem.legal,
    )
