# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lindm_theory import offline
from tests.theory.conftest import Problem


def bootstrapped(W, seed):
    rng = np.random.default_rng(seed)
    Qhat = W.Qstar + 0.4 * rng.normal(size=W.Qstar.shape) + rng.normal(size=(len(W.r), 1, 1))
    later = np.concatenate([Qhat.max(-1)[1:], np.zeros((1, Qhat.shape[1]))])
    residual = np.stack([W.r[h] + W.P[h] @ later[h] - Qhat[h] for h in range(len(W.r))])
    return Qhat, residual


@given(st.integers(0, 10**6))
def test_the_decomposition_is_an_equality_and_the_bounds_hold_in_order(make_problem, seed):
    W = make_problem(seed)
    Qhat, residual = bootstrapped(W, seed)
    got = offline.bellman_residual(jnp.asarray(W.P), jnp.asarray(W.r), jnp.asarray(Qhat))
    np.testing.assert_allclose(got, residual, atol=1e-12)
    star, hat = W.Qstar.argmax(-1), Qhat.argmax(-1)
    loss = W.loss(hat)
    first, second, greed = offline.suboptimality_decomposition(
        *map(jnp.asarray, (residual, Qhat, W.occupancy(star), star, W.occupancy(hat), hat))
    )
    np.testing.assert_allclose(first - second - greed, loss, atol=1e-11)
    assert greed >= 0
    errors = jnp.asarray(np.abs(residual).max((1, 2)))
    ladder = [loss - 1e-11, offline.span_bound(jnp.asarray(residual)), offline.linear_bound(errors)]
    assert ladder == sorted(ladder)
    assert offline.linear_bound(errors) <= offline.quadratic_bound(errors)


def test_the_linear_bound_is_attained_by_a_greedy_policy():
    # H bandits in a row, two actions of values 0 and -2e; the residual +e on the better and -e on the worse makes a tie
    H, e = 5, 0.3
    r = np.tile(np.array([0.0, -2 * e]), (H, 1, 1))
    Qhat = np.zeros((H, 1, 2))
    for h in reversed(range(H)):
        later = Qhat[h + 1].max() if h + 1 < H else 0.0
        Qhat[h, 0] = r[h, 0] + later - np.array([e, -e])
    residual = offline.bellman_residual(jnp.ones((H, 1, 2, 1)), jnp.asarray(r), jnp.asarray(Qhat))
    np.testing.assert_allclose(jnp.abs(residual), e, rtol=1e-12)
    np.testing.assert_allclose(Qhat[:, 0, 0], Qhat[:, 0, 1], atol=1e-12)
    Qstar = r + 0.0  # the later stages are worth nothing under the optimal policy
    bandits = Problem(phi=np.eye(2)[None], P=np.ones((H, 1, 2, 1)), r=r, rho=np.ones(1), w=r[:, 0], Qstar=Qstar)
    worse = np.ones((H, 1), int)  # greedy in Qhat with ties to the worse action: evaluated by backward recursion
    np.testing.assert_allclose(offline.linear_bound(jnp.full(H, e)), bandits.loss(worse), rtol=1e-12)
    assert bandits.loss(np.zeros((H, 1), int)) == 0  # the other greedy policy: ties decide


def test_the_quadratic_form_counts_each_error_once_for_every_earlier_stage():
    e = np.array([0.3, 0.1, 0.7])
    np.testing.assert_allclose(
        offline.quadratic_bound(jnp.asarray(e)), 2 * sum(e[j] for i in range(3) for j in range(i, 3)), rtol=1e-12
    )
    np.testing.assert_allclose(offline.quadratic_bound(jnp.ones(9)) / offline.linear_bound(jnp.ones(9)), 5.0)


@given(st.integers(0, 10**6))
def test_pessimism_costs_at_most_twice_the_uncertainty_along_the_optimal_policy(make_problem, seed):
    W = make_problem(seed)
    rng = np.random.default_rng(seed)
    Gamma = rng.uniform(0.05, 0.5, size=W.r.shape)
    H, S, _ = W.r.shape
    Qhat, V = np.zeros_like(W.r), np.zeros(S)
    for h in reversed(range(H)):
        Qhat[h] = W.r[h] + W.P[h] @ V + rng.uniform(-1, 1, size=W.r[h].shape) * Gamma[h] - Gamma[h]
        V = Qhat[h].max(1)
    star = W.Qstar.argmax(-1)
    bound = offline.pessimism_bound(jnp.asarray(W.occupancy(star)), jnp.asarray(star), jnp.asarray(Gamma))
    assert W.loss(Qhat.argmax(-1)) <= bound + 1e-11


def test_the_uncertainty_of_features_is_that_of_loops(make_problem):
    phi = make_problem(0).phi
    rng = np.random.default_rng(0)
    gram = np.stack([F @ F.T + np.eye(3) for F in rng.normal(size=(2, 3, 3))])
    got = offline.feature_uncertainty(jnp.asarray(phi), jnp.asarray(gram), 1.5)
    for h, s, a in np.ndindex(2, 4, 3):
        np.testing.assert_allclose(got[h, s, a], 1.5 * np.sqrt(phi[s, a] @ np.linalg.inv(gram[h]) @ phi[s, a]), rtol=1e-11)
