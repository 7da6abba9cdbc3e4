"""Instances on which the bounds without an oracle are attained, up to a stated slack: those of value iteration, and PEVI's.

Residuals are (e, -e), and two actions tie.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lindm_experiments.lib.attained import SLACK, Floats, Pair, generator, occupancy_of, optimal_values, pairs_of, value_of
from lindm_theory import offline


@dataclass(frozen=True, kw_only=True)
class Bootstrapped:
    """An MDP, Qhat = T Vhat - l with a chosen residual l, and the loss of the greedy policy."""

    P: Floats  # [H, S, A, S]
    r: Floats  # [H, S, A]
    Qhat: Floats
    truth: float
    uncertainty: Floats  # PEVI's penalty [H, S, A]; zero where the instance is not about it
    occupancy: Floats  # [H, S] of the greedy policy
    occupancy_star: Floats


def _bootstrap(P: Floats, r: Floats, l: Floats) -> Floats:
    Q, V = np.zeros_like(r), np.zeros(r.shape[1])
    for h in reversed(range(len(r))):
        Q[h] = r[h] + P[h] @ V - l[h]
        V = Q[h].max(-1)
    return Q


def _without_penalty(P: Floats, r: Floats, Qhat: Floats, truth: float) -> Bootstrapped:
    H, S, _ = r.shape
    return Bootstrapped(
        P=P, r=r, Qhat=Qhat, truth=truth, uncertainty=0 * r, occupancy=np.zeros((H, S)), occupancy_star=np.zeros((H, S))
    )


def ties(rng: np.random.Generator, penalty: bool = False, H: int = 4, S: int = 3) -> Bootstrapped:
    """Action 2 is worse by a little less than 2 e_h, with residuals (e, -e): it looks better. The action does not move the state.

    `penalty`: residuals (2 e, 0), which a pessimistic estimate with uncertainty (e, 0) may have.
    """
    P = np.repeat(rng.dirichlet(np.ones(S), (H, S, 1)), 2, axis=2)
    e = rng.uniform(0.5, 1.5, H)[:, None, None]
    r = 3 + rng.uniform(0, 0.3, (H, S, 1)) - 2 * e / (1 + SLACK) * np.array([0.0, 1.0])
    l = e * (np.array([2.0, 0.0]) if penalty else np.array([1.0, -1.0])) + np.zeros((H, S, 2))
    Qhat, rho = _bootstrap(P, r, l), rng.dirichlet(np.ones(S))
    pi, pi_star = Qhat.argmax(-1), np.zeros((H, S), int)
    return Bootstrapped(
        P=P,
        r=r,
        Qhat=Qhat,
        truth=float(rho @ (value_of(P, r, pi_star) - value_of(P, r, pi))),
        uncertainty=np.broadcast_to(e * np.array([penalty, 0.0]), (H, S, 2)),
        occupancy=occupancy_of(P, rho, pi),
        occupancy_star=occupancy_of(P, rho, pi_star),
    )


def two_roads(rng: np.random.Generator, H: int = 4) -> Bootstrapped:
    """Each action leads to a state of its own; the better state's value is estimated too low by e, the other's too high."""
    P = np.zeros((H, 3, 2, 3))
    P[:, :, 0, 1] = P[:, :, 1, 2] = 1
    e = rng.uniform(0.5, 1.5)
    r, l = np.zeros((H, 3, 2)), np.zeros((H, 3, 2))
    r[1, 1] = 2 * e / (1 + SLACK)
    l[1, 1], l[1, 2] = e, -e
    Qhat = _bootstrap(P, r, l)
    truth = float(optimal_values(P, r)[0, 0].max() - value_of(P, r, Qhat.argmax(-1))[0])
    return _without_penalty(P, r, Qhat, truth)


def constant_residual(rng: np.random.Generator, H: int = 4, S: int = 3, A: int = 2) -> Bootstrapped:
    """One residual e_h > 0 everywhere: |Qhat_h - Q*_h| is the sum of the later e. `truth`: 2 sum_h of it, as in the proof."""
    P, r = rng.dirichlet(np.ones(S), (H, S, A)), rng.uniform(0, 1, (H, S, A))
    l = np.broadcast_to(rng.uniform(0.5, 1.5, (H, 1, 1)), r.shape)
    Qhat = _bootstrap(P, r, l)
    off = np.abs(Qhat - optimal_values(P, r)).max((1, 2))
    return _without_penalty(P, r, Qhat, float(2 * off.sum()))


@jax.jit
def _offline_bounds(P, r, Qhat, uncertainty, occupancy_star) -> dict[str, jax.Array]:
    residual = offline.bellman_residual(P, r, Qhat)
    e = jnp.abs(residual).max((1, 2))
    first = jnp.zeros(r.shape[:2], int)  # the optimal policy of `ties`
    return {
        "linear": offline.linear_bound(e),
        "span": offline.span_bound(residual),
        "quadratic": offline.quadratic_bound(e),
        "pessimism": offline.pessimism_bound(occupancy_star, first, uncertainty),
    }


def instances(seed: int) -> dict[str, Bootstrapped]:
    """The instances of a seed, by name."""
    rng = generator(seed)
    return {
        "ties": ties(rng),
        "two roads": two_roads(rng),
        "constant": constant_residual(rng),
        "penalized": ties(rng, penalty=True),
    }


# name of a pair -> (instance, bound)
BOUNDS = {
    "linear": ("ties", "linear"),
    "span": ("ties", "span"),
    "span, two roads": ("two roads", "span"),
    "quadratic, inside": ("constant", "quadratic"),
    "pessimism": ("penalized", "pessimism"),
}


def pairs(seed: int) -> dict[str, Pair]:
    """Of every bound [truth, bound] on the instances of a seed."""
    return pairs_of(instances(seed), lambda i: _offline_bounds(i.P, i.r, i.Qhat, i.uncertainty, i.occupancy_star), BOUNDS)
