"""Ambiguous problems by brute force: plain recursion over histories in numpy, with normalized beliefs and no tables."""

import jax.numpy as jnp
import numpy as np
import pytest

from lindm.types import APOMDP, POMDP


class Brute:
    """An APOMDP as numpy arrays: P [M, H|1, S, A, S], O [M, H|1, A, S, O], r [M, H, S, A], rho [M, S]; its values."""

    def __init__(self, P, O, r, rho, alpha):
        self.P, self.O, self.r, self.rho, self.alpha = (np.asarray(x, float) for x in (P, O, r, rho, alpha))
        self.M, self.H, self.S, self.A = self.r.shape
        self.obs = self.O.shape[-1]

    @classmethod
    def random(cls, seed, *, S=3, A=2, O=2, M=2, H=4, alpha=0.3, staged=False, sparse=False, same_start=False):
        rng = np.random.default_rng(seed)
        T = H if staged else 1
        P, Z = rng.dirichlet(np.ones(S), (M, T, S, A)), rng.dirichlet(np.ones(O), (M, T, A, S))
        if sparse:  # deterministic moves and observations: most branches have probability zero
            P, Z = (np.eye(x.shape[-1])[x.argmax(-1)] for x in (P, Z))
        r = rng.normal(size=(M, H, S, A))
        rho = rng.dirichlet(np.ones(S), M)
        return cls(P, Z, r, np.repeat(rho[:1], M, 0) if same_start else rho, alpha)

    def problem(self) -> APOMDP:
        models = POMDP(P=jnp.asarray(self.P), O=jnp.asarray(self.O), r=jnp.asarray(self.r), rho=jnp.asarray(self.rho))
        return APOMDP(models=models, alpha=jnp.asarray(self.alpha))

    def step(self, b, t, a, m, o):
        """Probability of o and the next belief."""
        P, O = self.P[m, t % len(self.P[m])], self.O[m, t % len(self.O[m])]
        u = np.array([sum(b[s] * P[s, a, x] for s in range(self.S)) * O[a, x, o] for x in range(self.S)])
        return u.sum(), (u / u.sum() if u.sum() > 0 else u)

    def mix(self, G):
        return self.alpha * min(G) + (1 - self.alpha) * max(G)

    def G(self, beliefs, t, history, a, policy=None):
        """Value of action a under each model; beliefs: one per model."""
        values = []
        for m in range(self.M):
            g = float(beliefs[m] @ self.r[m, t, :, a])
            for o in range(self.obs):
                p, b = self.step(beliefs[m], t, a, m, o)
                if p > 0 and t + 1 < self.H:
                    g += p * self.V([b] * self.M, t + 1, (*history, (a, m, o)), policy)
            values.append(g)
        return values

    def Q(self, beliefs, t, history=(), policy=None):
        return np.array([self.mix(self.G(beliefs, t, history, a, policy)) for a in range(self.A)])

    def V(self, beliefs, t, history=(), policy=None):
        """Optimal, or of `policy(t, history) -> probabilities [A]`."""
        Q = self.Q(beliefs, t, history, policy)
        return Q.max() if policy is None else float(policy(t, history) @ Q)

    def histories(self, t, beliefs=None, k=0, history=()):
        """Every history of stage t with positive probability, and the beliefs after it."""
        beliefs = list(self.rho) if beliefs is None else beliefs
        if k == t:
            yield history, beliefs
            return
        for a in range(self.A):
            for m in range(self.M):
                for o in range(self.obs):
                    p, b = self.step(beliefs[m], k, a, m, o)
                    if p > 0:
                        yield from self.histories(t, [b] * self.M, k + 1, (*history, (a, m, o)))


@pytest.fixture(scope="session")
def brute():
    return Brute
