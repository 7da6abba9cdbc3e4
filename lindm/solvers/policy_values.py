"""Exact values of policies: the suboptimality in an MDP, and three criteria of an ambiguous problem.

The three criteria are different problems and have different names:

    stage-wise alpha-maxmin     `lindm.solvers.tree.policy_value`: nature moves at every stage; `APOMDP`
    whole-horizon alpha-maxmin  `whole_horizon_value`: alpha min_m V_m + (1 - alpha) max_m V_m, nature moves once
    a fixed true model          `fixed_model_value`: V_m, where m makes every step
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lindm.problems.apomdp import alpha_maxmin
from lindm.solvers import tree
from lindm.solvers.belief import child_history, step_index
from lindm.solvers.dp import optimal_policy, policy_value
from lindm.types import APOMDP, MDP, in_given_precision


@in_given_precision
def suboptimality(mdp: MDP, pi: Array) -> Array:
    """V*_1 - V^pi_1 [] averaged over the first state, by dynamic programming; pi as in `policy_value`."""
    return mdp.rho @ (optimal_policy(mdp)[0][0] - policy_value(mdp, pi)[0])


# --- ambiguous problems ----------------------------------------------------------------------------------------------------


def fixed_model_value(problem: APOMDP, policy: tree.Policy, m: int) -> Array:
    """V_m [] of a policy over histories when model m makes every step. Its histories contain the model."""
    tree.check_shapes(problem, policy)
    return tree.policy_value(_only(problem, m), _restricted(problem, policy, m))


def whole_horizon_value(problem: APOMDP, policy: tree.Policy) -> Array:
    """alpha min_m V_m + (1 - alpha) max_m V_m [], V_m by `fixed_model_value`."""
    values = jnp.stack([fixed_model_value(problem, policy, m) for m in range(problem.num_models)])
    return alpha_maxmin(problem.alpha, values, 0)


def _only(problem: APOMDP, m: int) -> APOMDP:
    M = problem.num_models
    if not 0 <= m < M:
        raise ValueError(f"m must be the number of a model from 0 to {M - 1}; got {m}")
    return APOMDP(models=jax.tree.map(lambda x: x[m : m + 1], problem.models), alpha=problem.alpha)


def _restricted(problem: APOMDP, policy: tree.Policy, m: int) -> tree.Policy:
    """The rows of a policy over histories in which every model is m."""
    a, o = np.indices((problem.num_actions, problem.num_observations)).reshape(2, -1)
    steps = step_index(problem, a, m, o)
    tables, index = [], np.zeros(1, int)
    for t, table in enumerate(policy):
        tables.append(table[index])
        index = child_history(problem, t, index, steps[:, None]).reshape(-1)
    return tuple(tables)
