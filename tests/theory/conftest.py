"""Small problems in numpy, which share no code with the predictions that are compared with them."""

from dataclasses import dataclass

import numpy as np
import pytest


@dataclass(frozen=True)
class Design:
    """A law of features with finite support, a second moment of tasks, and noise."""

    phi: np.ndarray  # [n, d]
    weights: np.ndarray  # [n]
    Psi: np.ndarray  # [d, d]
    variance: np.ndarray  # [n]

    @property
    def Lambda(self) -> np.ndarray:
        return np.sum([p * np.outer(x, x) for p, x in zip(self.weights, self.phi, strict=True)], axis=0)

    @property
    def K(self) -> np.ndarray:
        return np.sum(
            [p * np.outer(x, x) @ self.Psi @ np.outer(x, x) for p, x in zip(self.weights, self.phi, strict=True)], axis=0
        )

    @property
    def noise(self) -> np.ndarray:
        return np.sum([p * v * np.outer(x, x) for p, v, x in zip(self.weights, self.variance, self.phi, strict=True)], axis=0)


@dataclass(frozen=True)
class Problem:
    """A linear MDP with simplex features, solved by loops."""

    phi: np.ndarray  # [S, A, d]
    P: np.ndarray  # [H, S, A, S]
    r: np.ndarray  # [H, S, A]
    rho: np.ndarray  # [S]
    w: np.ndarray  # [H, d]
    Qstar: np.ndarray  # [H, S, A]

    def value(self, pi: np.ndarray) -> float:
        """Value of a deterministic [H, S] or stochastic [H, S, A] policy, backwards, by loops."""
        H, S, A = self.r.shape
        V = np.zeros(S)
        for h in reversed(range(H)):
            rule = pi[h] if pi.ndim == 3 else np.eye(A)[pi[h]]
            V = np.array([sum(rule[s, a] * (self.r[h, s, a] + self.P[h, s, a] @ V) for a in range(A)) for s in range(S)])
        return float(self.rho @ V)

    def loss(self, pi: np.ndarray) -> float:
        return float(self.rho @ self.Qstar[0].max(1)) - self.value(pi)

    def occupancy(self, pi: np.ndarray) -> np.ndarray:
        H, S = self.r.shape[:2]
        d = np.zeros((H, S))
        d[0] = self.rho
        for h in range(H - 1):
            for s in range(S):
                d[h + 1] += d[h, s] * self.P[h, s, pi[h, s]]
        return d

    @property
    def gap(self) -> np.ndarray:
        return self.Qstar.max(-1, keepdims=True) - self.Qstar


def make_design(seed: int, n: int = 5, d: int = 3) -> Design:
    rng = np.random.default_rng(seed)
    F = rng.normal(size=(d, d))
    return Design(
        phi=rng.normal(size=(n, d)) + 0.3,
        weights=rng.dirichlet(np.ones(n)),
        Psi=F @ F.T / d + 0.1 * np.eye(d),
        variance=rng.uniform(0.1, 1.0, size=n),
    )


def random_problem(seed: int, S: int = 4, A: int = 3, d: int = 3, H: int = 3) -> Problem:
    rng = np.random.default_rng(seed)
    phi = rng.dirichlet(0.5 * np.ones(d), size=(S, A))
    mu = rng.dirichlet(np.ones(S), size=(H, d))
    theta = rng.uniform(-1, 1, size=(H, d))
    P = np.einsum("sad,hdt->hsat", phi, mu)
    r = np.einsum("sad,hd->hsa", phi, theta)
    w, Q, V = np.zeros((H, d)), np.zeros((H, S, A)), np.zeros(S)
    for h in reversed(range(H)):
        w[h] = theta[h] + mu[h] @ V
        Q[h] = r[h] + P[h] @ V
        V = Q[h].max(1)
    return Problem(phi=phi, P=P, r=r, rho=rng.dirichlet(np.ones(S)), w=w, Qstar=Q)


@pytest.fixture(scope="session")
def design():
    """make_design(seed, n, d) -> Design."""
    return make_design


@pytest.fixture(scope="session")
def make_problem():
    """random_problem(seed, S, A, d, H) -> Problem."""
    return random_problem
