"""All trajectories of a behavior policy, and the prompts made of them."""

# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false, reportCallIssue=false

import itertools
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from lindm_theory import pooled


@dataclass(frozen=True)
class Trajectories:
    """All trajectories of a behavior policy: chances, pairs, and labels of every law by their names."""

    chance: np.ndarray  # [n]
    s: np.ndarray  # [n, H]
    a: np.ndarray  # [n, H]
    oracle: np.ndarray  # [n, H]
    returned: np.ndarray  # [n, H]
    pi: np.ndarray  # [H, S, A]

    def sums(self, W, labels: np.ndarray) -> np.ndarray:
        """Z [n, H, d]."""
        return labels[..., None] * W.phi[self.s, self.a]


def all_trajectories(W, seed: int = 0) -> Trajectories:
    H, S, A = W.r.shape
    pi = np.random.default_rng(seed).dirichlet(np.ones(A), size=(H, S))
    rows = []
    for steps in itertools.product(range(S), range(A), repeat=H):
        s, a = np.array(steps[::2]), np.array(steps[1::2])
        chance = W.rho[s[0]] * np.prod([pi[h, s[h], a[h]] for h in range(H)])
        chance *= np.prod([W.P[h, s[h], a[h], s[h + 1]] for h in range(H - 1)])
        rewards = np.array([W.r[h, s[h], a[h]] for h in range(H)])
        rows.append((chance, s, a, [W.Qstar[h, s[h], a[h]] for h in range(H)], rewards[::-1].cumsum()[::-1]))
    chance, s, a, oracle, returned = (np.array(x) for x in zip(*rows, strict=True))
    return Trajectories(chance=chance, s=s, a=a, oracle=oracle, returned=returned, pi=pi)


def moments_of(W, T: Trajectories, law: str):
    """(E[Z], E[Z Z']) of the module under test."""
    H, S, A = W.r.shape
    start, kernels = pooled.pair_chain(W.P, W.rho, T.pi)
    phi = jnp.asarray(W.phi.reshape(S * A, -1))
    if law == "returned":
        return pooled.return_trajectory_moments(kernels, start, phi, jnp.asarray(W.r.reshape(H, -1)))
    return pooled.trajectory_moments(kernels, start, phi, jnp.asarray(W.Qstar.reshape(H, -1)))


def prompts_of_two(chance: np.ndarray, Z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chances [n^2] and sums S [n^2, ...] of all prompts of K = 2 trajectories."""
    both = chance[:, None] * chance[None, :]
    return both.ravel(), ((Z[:, None] + Z[None, :]) / 2).reshape(-1, *Z.shape[1:])
