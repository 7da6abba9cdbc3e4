"""The certified net against an independent recursion over histories: what it says always holds, and closes where it should."""

import itertools
import tracemalloc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lindm.oracles import net as nets
from lindm.types import APOMDP, POMDP

ALPHAS = (0.0, 0.3, 0.5, 0.7, 1.0)
PER_POINT = ("beliefs", "lower", "upper", "radius", "slope_low", "slope_high")


class Cloud(NamedTuple):
    P: np.ndarray  # [M, H|1, S, A, S]
    O: np.ndarray  # [M, H|1, A, S, O]
    r: np.ndarray  # [M, H, S, A]
    rho: np.ndarray  # [M, S]
    alpha: float

    def problem(self) -> APOMDP:
        P, O, r, rho = (jnp.asarray(part) for part in self[:4])
        return APOMDP(cloud=POMDP(P=P, O=O, r=r, rho=rho), alpha=jnp.asarray(self.alpha))


def random_cloud(seed: int, S: int, A: int, O: int, M: int, H: int) -> Cloud:
    """Sharp or flat laws with exact zeros, rewards of both signs, laws of the first state that differ, stages that may."""
    rng = np.random.default_rng(seed)
    stages, sharpness = rng.choice([1, H]), rng.choice([0.3, 1.0, 3.0])

    def laws(n: int, *shape: int) -> np.ndarray:
        p = rng.dirichlet(np.full(n, sharpness), shape)
        p = p * ((rng.uniform(size=p.shape) > 0.15) | (p == p.max(-1, keepdims=True)))
        return p / p.sum(-1, keepdims=True)

    P, Z, rho = laws(S, M, stages, S, A), laws(O, M, stages, A, S), laws(S, M)
    return Cloud(P, Z, rng.normal(size=(M, H, S, A)) + rng.normal(), rho, float(rng.choice(ALPHAS)))


def after(cloud: Cloud, h: int, b: np.ndarray, m: int, a: int, o: int) -> tuple[np.ndarray, np.ndarray]:
    """The probability of an observation and the belief it leaves, for beliefs [n, S]; any belief where it cannot be seen."""
    P, O = cloud.P[m, h % cloud.P.shape[1]], cloud.O[m, h % cloud.O.shape[1]]
    joint = np.stack([sum(b[:, i] * P[i, a, j] for i in range(b.shape[1])) * O[a, j, o] for j in range(b.shape[1])], 1)
    p = joint.sum(1)
    return p, np.where(p[:, None] > 0, joint / np.where(p > 0, p, 1)[:, None], 1 / b.shape[1])


def value(cloud: Cloud, h: int, *starts: np.ndarray) -> np.ndarray:
    """V_h by recursion over histories: beliefs [n, S], one for all models or one for each."""
    M, H, _, A = cloud.r.shape
    if h == H:
        return np.zeros(len(starts[0]))
    best = np.full(len(starts[0]), -np.inf)
    for a in range(A):
        gains = []
        for m in range(M):
            b = starts[m % len(starts)]
            gain = b @ cloud.r[m, h, :, a]
            for o in range(cloud.O.shape[-1]):
                p, child = after(cloud, h, b, m, a, o)
                gain = gain + p * value(cloud, h + 1, child)
            gains.append(gain)
        best = np.maximum(best, cloud.alpha * np.min(gains, 0) + (1 - cloud.alpha) * np.max(gains, 0))
    return best


def root(cloud: Cloud) -> float:
    return float(value(cloud, 0, *(law[None] for law in cloud.rho))[0])


def histories(cloud: Cloud, rng: np.random.Generator, n: int) -> list[np.ndarray]:
    """Beliefs [n, S] after random histories that can happen, for every stage from 1 on."""
    M, H, S, A = cloud.r.shape
    found = np.zeros((H, n, S))
    for i in range(n):
        b = None
        for h in range(H - 1):
            m, a = rng.integers(M), rng.integers(A)
            start = cloud.rho[m] if b is None else b
            steps = [after(cloud, h, start[None], m, a, o) for o in range(cloud.O.shape[-1])]
            b = steps[rng.choice([o for o, (p, _) in enumerate(steps) if p[0] > 0])][1][0]
            found[h + 1, i] = b
    return list(found[1:])


def anywhere(rng: np.random.Generator, n: int, S: int) -> np.ndarray:
    return np.concatenate([np.eye(S), rng.dirichlet(np.ones(S), n - S)])


def filled(net: nets.Net, n: int) -> nets.Net:
    """The same net with more points that repeat the first, so that nets of several sizes share a compilation."""
    more = n - net.beliefs.shape[1]
    fields = {k: np.asarray(getattr(net, k)) for k in PER_POINT}
    longer = {k: jnp.asarray(np.concatenate([x, np.repeat(x[:, :1], more, 1)], 1)) for k, x in fields.items()}
    return nets.Net(**longer, low=net.low, high=net.high, lipschitz=net.lipschitz, points=net.points)


value_bounds = jax.jit(nets.value_bounds)
QUERIES = 20


def bounds(net: nets.Net, h: int, beliefs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lower, upper = value_bounds(filled(net, 128), h, jnp.asarray(beliefs))
    return np.asarray(lower), np.asarray(upper)


def holds(lower, exact, upper, scale: float = 1.0) -> None:
    tolerance = 1e-12 * scale
    assert (np.asarray(lower) <= exact + tolerance).all(), (lower - exact).max()
    assert (exact <= np.asarray(upper) + tolerance).all(), (exact - upper).max()


# --- what is said holds


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1, 4), (2, 2, 2, 3, 4), (3, 2, 2, 2, 4), (4, 2, 3, 1, 4), (3, 1, 2, 3, 4)])
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), points=st.sampled_from([1, 5, 20, 100]))
def test_the_exact_value_lies_between_the_bounds_at_the_start_after_any_history_and_anywhere_else(sizes, seed, points):
    cloud, rng = random_cloud(seed, *sizes), np.random.default_rng(seed)
    net = nets.net(cloud.problem(), points=points)
    assert (np.asarray(net.points)[1:] <= points).all()
    holds(net.lower[0], root(cloud), net.upper[0], 10)
    for h, reached in enumerate(histories(cloud, rng, QUERIES // 2), 1):
        beliefs = np.concatenate([reached, anywhere(rng, QUERIES // 2, sizes[0])])
        lower, upper = bounds(net, h, beliefs)
        assert (lower <= upper).all()
        holds(lower, value(cloud, h, beliefs), upper, 10)
