"""Label laws against enumeration and numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.icl import label_laws
from lindm.types import MDP
from tests.lindm.icl.test_prompts import A, D, H, S, numpy_mdp
from tests.lindm.mdps import as_mdp

return_labels = jax.jit(label_laws.return_labels)
return_moments = jax.jit(label_laws.return_moments)


def all_returns(P, r, rho, h, s, a, pi):
    """Every (probability, return-to-go) after (s, a) at stage h under deterministic pi, by walking the tree."""
    if h == H - 1:
        return [(1.0, r[h, s, a])]
    return [(P[h, s, a, t] * p, r[h, s, a] + g) for t in range(S) for p, g in all_returns(P, r, rho, h + 1, t, pi[h + 1, t], pi)]


# --- labels


def test_oracle_labels_are_inner_products():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 6, D)), rng.normal(size=(2, D))
    want = [[x[h, i] @ w[h] for i in range(6)] for h in range(2)]
    np.testing.assert_allclose(label_laws.oracle_labels(jnp.asarray(x), jnp.asarray(w)), want, rtol=1e-12)


def test_gaussian_noise_has_mean_zero_the_given_deviation_and_gaussian_kurtosis():
    n, sigma = 100_000, 0.7
    x, w = jnp.ones((n, 1)), jnp.asarray([2.0])
    noise = np.asarray(label_laws.noisy_labels(jax.random.key(0), x, w, sigma)) - 2.0
    assert abs(noise.mean()) < 5 * sigma / np.sqrt(n)
    assert abs(noise.var() - sigma**2) < 5 * sigma**2 * np.sqrt(2 / n)
    assert abs((noise**4).mean() / sigma**4 - 3) < 5 * np.sqrt(96 / n)


def test_bounded_noise_stays_inside_and_is_uniform():
    n, b = 100_000, 0.3
    noise = np.asarray(label_laws.bounded_labels(jax.random.key(0), jnp.zeros((n, 1)), jnp.ones(1), b))
    assert (np.abs(noise) <= b).all()
    assert abs(noise.mean()) < 5 * b / np.sqrt(3 * n)
    assert abs((noise**2).mean() - b**2 / 3) < 5 * np.sqrt(4 / 45) * b**2 / np.sqrt(n)


def test_return_moments_are_those_of_the_enumerated_tree():
    P, r, rho = numpy_mdp(10)
    pi = np.random.default_rng(2).integers(0, A, (H, S))
    Q, Var = return_moments(as_mdp(P, r, rho), jnp.asarray(pi))
    for h, s, a in itertools.product(range(H), range(S), range(A)):
        p, g = np.array(all_returns(P, r, rho, h, s, a, pi)).T
        assert Q[h, s, a] == pytest.approx(p @ g, rel=1e-12, abs=1e-12)
        assert Var[h, s, a] == pytest.approx(p @ (g - p @ g) ** 2, rel=1e-10, abs=1e-12)


def test_return_moments_of_a_mixed_policy_follow_the_second_moment_recursion():
    P, r, rho = numpy_mdp(11)
    pi = np.random.default_rng(3).dirichlet(np.ones(A), (H, S))
    first, second = np.zeros(S), np.zeros(S)
    Q, Var = return_moments(as_mdp(P, r, rho), jnp.asarray(pi))
    for h in reversed(range(H)):
        q1 = r[h] + P[h] @ first
        q2 = r[h] ** 2 + 2 * r[h] * (P[h] @ first) + P[h] @ second
        np.testing.assert_allclose(Q[h], q1, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(Var[h], q2 - q1**2, rtol=1e-8, atol=1e-10)
        first, second = (pi[h] * q1).sum(-1), (pi[h] * q2).sum(-1)


@pytest.mark.parametrize("mixed", [False, True])
def test_return_labels_have_the_exact_mean_and_variance_at_every_stage(mixed):
    mdp = as_mdp(*numpy_mdp(12))
    rng = np.random.default_rng(4)
    pi = jnp.asarray(rng.dirichlet(np.ones(A), (H, S)) if mixed else rng.integers(0, A, (H, S)))
    Q, Var = (np.asarray(m).reshape(H, S * A) for m in return_moments(mdp, pi))
    n = 8_000
    idx = jnp.broadcast_to(jnp.arange(S * A, dtype=jnp.int32), (n, S * A))
    for h in range(H):
        y = np.asarray(return_labels(jax.random.key(h), mdp, pi, h, idx))
        sem = np.sqrt(Var[h] / n)
        assert (np.abs(y.mean(0) - Q[h]) <= 5 * sem + 1e-12).all()
        fourth = ((y - Q[h]) ** 4).mean(0)
        assert (np.abs(((y - Q[h]) ** 2).mean(0) - Var[h]) <= 5 * np.sqrt(fourth / n) + 1e-12).all()


def test_return_labels_take_a_stage_for_each_pair():
    mdp = as_mdp(*numpy_mdp(13))
    pi = jnp.zeros((H, S), jnp.int32)
    idx = jnp.tile(jnp.arange(S * A, dtype=jnp.int32), (H, 1))
    y = return_labels(jax.random.key(0), mdp, pi, jnp.arange(H)[:, None], idx)
    np.testing.assert_allclose(y[-1], np.asarray(mdp.r)[-1].ravel(), rtol=1e-12)  # nothing is random at the last stage
    # at a deterministic kernel the return is the value
    P = np.zeros((H, S, A, S))
    P[..., 1] = 1.0
    fixed = MDP(P=jnp.asarray(P), r=mdp.r, rho=mdp.rho)
    y = return_labels(jax.random.key(0), fixed, pi, jnp.arange(H)[:, None], idx)
    r = np.asarray(mdp.r)
    want = [[r[h].ravel()[i] + sum(r[k, 1, 0] for k in range(h + 1, H)) for i in range(S * A)] for h in range(H)]
    np.testing.assert_allclose(y, want, rtol=1e-12)


def test_bellman_labels_have_their_exact_moments_and_support():
    P, r, rho = numpy_mdp(14)
    mdp, Q_next = as_mdp(P, r, rho), np.random.default_rng(5).normal(size=(S, A))
    n, h = 8_000, 1
    idx = jnp.broadcast_to(jnp.arange(S * A, dtype=jnp.int32), (n, S * A))
    y = np.asarray(label_laws.bellman_labels(jax.random.key(0), mdp, h, idx, jnp.asarray(Q_next)))
    support = r[h].reshape(-1, 1) + Q_next.max(-1)
    assert (np.abs(y[..., None] - support[None]).min(-1) < 1e-12).all()
    mean, variance = (np.asarray(m).ravel() for m in label_laws.bellman_moments(mdp, h, jnp.asarray(Q_next)))
    V = Q_next.max(-1)
    np.testing.assert_allclose(mean, (r[h] + P[h] @ V).ravel(), rtol=1e-12)
    np.testing.assert_allclose(variance, (P[h] @ V**2 - (P[h] @ V) ** 2).ravel(), rtol=1e-10, atol=1e-13)
    assert (np.abs(y.mean(0) - mean) <= 5 * np.sqrt(variance / n)).all()


def test_the_noise_moment_is_the_mean_of_squared_noise_times_outer_products():
    rng = np.random.default_rng(6)
    phi, design, variance = rng.normal(size=(S, A, D)), rng.dirichlet(np.ones(S * A)), rng.exponential(size=(S, A))
    want = sum(
        design[s * A + a] * variance[s, a] * np.outer(phi[s, a], phi[s, a]) for s, a in itertools.product(range(S), range(A))
    )
    got = label_laws.noise_moment(jnp.asarray(phi), jnp.asarray(design), jnp.asarray(variance))
    np.testing.assert_allclose(got, want, rtol=1e-12)
