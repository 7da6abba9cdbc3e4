# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lindm_theory import moments as law


def test_the_fourth_moment_of_a_finite_design_is_its_sum_over_the_support(design):
    D = design(0)
    np.testing.assert_allclose(law.design_moment(D.phi, D.weights), D.Lambda, rtol=1e-12)
    np.testing.assert_allclose(law.design_fourth(D.phi, D.weights, D.Psi), D.K, rtol=1e-12)
    np.testing.assert_allclose(law.noise_moment(D.phi, D.weights, D.variance), D.noise, rtol=1e-12)


def test_the_gaussian_fourth_moment_is_that_of_gauss_hermite_quadrature(design):
    D = design(1, d=2)
    nodes, masses = np.polynomial.hermite_e.hermegauss(5)  # exact to degree 9
    root = np.linalg.cholesky(D.Lambda)
    K = sum(
        a * b / (2 * np.pi) * np.outer(x, x) @ D.Psi @ np.outer(x, x)
        for (s, a), (t, b) in itertools.product(zip(nodes, masses, strict=True), repeat=2)
        for x in [root @ np.array([s, t])]
    )
    np.testing.assert_allclose(law.gaussian_fourth(D.Lambda, D.Psi), K, rtol=1e-12)


def test_the_onehot_fourth_moment_is_a_design_moment_on_the_identity(design):
    D = design(2, n=4, d=4)
    expected = law.design_fourth(jnp.eye(4), D.weights, D.Psi)
    np.testing.assert_allclose(law.onehot_fourth(jnp.asarray(D.weights), D.Psi), expected, rtol=1e-12)


def test_the_covariance_of_one_pair_is_that_of_enumeration(design):
    D = design(3)
    w = np.array([0.3, -1.0, 0.7])
    mean, square = np.zeros(3), np.zeros((3, 3))
    for x, p, v in zip(D.phi, D.weights, D.variance, strict=True):
        for eps in (-np.sqrt(v), np.sqrt(v)):
            z = x * (x @ w + eps)
            mean += p / 2 * z
            square += p / 2 * np.outer(z, z)
    np.testing.assert_allclose(law.pair_covariance(D.phi, D.weights, w, D.variance), square - np.outer(mean, mean), rtol=1e-11)


@pytest.mark.parametrize("N", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_chain_moments_are_those_of_all_trajectories(design, N, seed):
    D = design(seed, n=3)
    rng = np.random.default_rng(seed)
    P, rho = rng.dirichlet(np.ones(3), size=3), rng.dirichlet(np.ones(3))
    mean, second = np.zeros((3, 3)), np.zeros((3, 3))
    for path in itertools.product(range(3), repeat=N):
        chance = rho[path[0]] * np.prod([P[i, j] for i, j in itertools.pairwise(path)])
        G = sum(np.outer(D.phi[i], D.phi[i]) for i in path) / N
        mean += chance * G
        second += chance * G @ D.Psi @ G
    got_mean, got_second = law.chain_moments(jnp.asarray(P), jnp.asarray(rho), jnp.asarray(D.phi), jnp.asarray(D.Psi), N)
    np.testing.assert_allclose(got_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(got_second, second, rtol=1e-12)
    np.testing.assert_allclose(
        law.chain_second_moment(P=jnp.asarray(P), rho=jnp.asarray(rho), phi=jnp.asarray(D.phi), Psi=jnp.asarray(D.Psi), N=N),
        second,
        rtol=1e-12,
    )


def test_a_chain_may_change_its_kernel_from_step_to_step(design):
    D = design(5, n=2)
    rng = np.random.default_rng(5)
    P, rho = rng.dirichlet(np.ones(2), size=(2, 2)), rng.dirichlet(np.ones(2))
    second = np.zeros((3, 3))
    for i, j, k in itertools.product(range(2), repeat=3):
        G = sum(np.outer(D.phi[n], D.phi[n]) for n in (i, j, k)) / 3
        second += rho[i] * P[0, i, j] * P[1, j, k] * G @ D.Psi @ G
    got = law.chain_second_moment(jnp.asarray(P), jnp.asarray(rho), jnp.asarray(D.phi), jnp.asarray(D.Psi), 3)
    np.testing.assert_allclose(got, second, rtol=1e-12)


def test_a_chain_that_forgets_at_once_is_an_independent_context(design):
    D = design(6)
    P = jnp.broadcast_to(jnp.asarray(D.weights), (5, 5))
    chain = law.chain_second_moment(P, jnp.asarray(D.weights), jnp.asarray(D.phi), jnp.asarray(D.Psi), 7)
    np.testing.assert_allclose(chain, law.independent_copies(D.Lambda, D.K, D.Psi, 7), rtol=1e-11)


def test_the_effective_sample_size_is_the_length_for_independent_pairs_and_one_for_a_frozen_chain(design):
    D = design(7)
    A, Lq = np.linalg.inv(D.Lambda), D.Lambda
    pair = D.K - D.Lambda @ D.Psi @ D.Lambda
    for P, size in ((np.broadcast_to(D.weights, (5, 5)), 9.0), (np.eye(5), 1.0)):
        mean, second = law.chain_moments(jnp.asarray(P), jnp.asarray(D.weights), jnp.asarray(D.phi), jnp.asarray(D.Psi), 9)
        got = law.effective_sample_size(A, pair, second - mean @ D.Psi @ mean, Lq)
        np.testing.assert_allclose(got, size, rtol=1e-10)
