"""Ambiguous POMDPs in evaluations: the value of a policy at the histories that it reaches, and bounds of V* beyond a tree of all.

Nature answers a policy by the values of that policy's own continuation, so V^pi is no mean over sampled episodes, and the
performance difference identity does not hold. It is a recursion over all histories that the policy reaches, under every model:

    V^pi(h) = sum_a pi(a | h) [ alpha min_m G_m(h, a) + (1 - alpha) max_m G_m(h, a) ],
    G_m(h, a) = b_h . r_m(., a) + sum_o |b_h K_m[a, o]|_1 V^pi(h a m o).

A policy that is not random reaches (M O)^t histories of stage t, far fewer than the (A M O)^t of the tree of V*.
"""

from collections.abc import Sequence
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lindm.evaluation.environments import BeliefEnvironment, CertifiedEnvironment, Histories, double_precision
from lindm.problems.apomdp import alpha_maxmin
from lindm.solvers.solve import Tables, q_bounds
from lindm.types import APOMDP


def policy_value(env: BeliefEnvironment, levels: Sequence[tuple[Histories, np.ndarray]]) -> float:
    """V^pi at the start, from the histories of each stage that the policy reaches and its probabilities [n, A] there."""
    alpha, M, O = np.asarray(env.apomdp.alpha), env.num_models, env.num_observations
    after, value = None, np.zeros(1)
    for stage in reversed(range(len(levels))):
        at, probabilities = levels[stage]
        assert at.belief is not None
        value_below, value = value, np.zeros(len(at))
        for a in range(env.num_actions):
            rows = np.flatnonzero(probabilities[:, a])
            G = np.einsum("nms,ms->nm", at.belief[rows], env.r[:, stage, :, a])
            if after is not None:
                assert after.action is not None and after.observation is not None
                V, taken = np.zeros((len(at), M, O)), np.flatnonzero(after.action == a)
                m = np.zeros(len(taken), int) if after.model is None else after.model[taken]
                V[after.parent[taken], m, after.observation[taken]] = value_below[taken]
                G += (env.joint(stage, a, at.belief[rows]).sum(-1) * V[rows]).sum(-1)
            value[rows] += probabilities[rows, a] * alpha_maxmin(alpha, G, 1)
        after = at
    return float(value[0])


class NetEnvironment(CertifiedEnvironment):
    """An ambiguous POMDP with more histories than fit in memory: V* has the certified bounds of a net of beliefs."""

    method = "net"

    @cached_property
    def uniform_value(self) -> None:
        """Not known: random actions reach all histories."""

    def lower_bounds(self, stage: int, beliefs: np.ndarray) -> np.ndarray:
        """Lower bounds [n, A] of the action values at beliefs [n, M, S] of a stage."""
        n = len(beliefs)
        padded = np.concatenate([beliefs, np.repeat(beliefs[:1], (1 << (n - 1).bit_length()) - n, 0)])  # few programs
        with double_precision():
            return np.asarray(_lower_bounds(self.apomdp, self.solution.tables, jnp.asarray(stage), jnp.asarray(padded)))[:n]

    def _number(self, stage: int, parents: np.ndarray, a: np.ndarray, m: np.ndarray, o: np.ndarray) -> np.ndarray:
        """Zeros: the numbers of long histories are no machine integers, and there is no table that they could index."""
        return np.zeros_like(parents)


@jax.jit
def _lower_bounds(problem: APOMDP, tables: Tables, stage: Array, beliefs: Array) -> Array:
    of_history = partial(q_bounds, problem, tables, stage, jnp.zeros((), jnp.int32))
    return jax.vmap(lambda belief: of_history(belief)[0])(beliefs)
