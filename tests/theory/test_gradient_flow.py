# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize

from lindm_theory import gradient_flow as flow
from lindm_theory import in_context
from lindm_theory import moments as law


def moments(D, N=6):
    B = np.asarray(in_context.context_second_moment(D.Lambda, D.Psi, D.K, N, D.noise))
    return B, D.Lambda @ D.Psi, np.asarray(in_context.optimal_weights(D.Lambda, D.Psi, D.K, N, D.noise))


def test_the_vector_field_is_minus_the_gradient_of_the_loss(design):
    D = design(0)
    B, ESw, _ = moments(D)
    rng = np.random.default_rng(0)
    U, u, F = rng.normal(size=(3, 3)), 0.7, rng.normal(size=(3, 3))
    Lq = F @ F.T

    def loss(U, u):
        return jnp.trace(u**2 * U.T @ B @ U @ Lq - 2 * u * U.T @ ESw @ Lq + D.Psi @ Lq) / 2

    expected = jax.grad(loss, argnums=(0, 1))(jnp.asarray(U), jnp.asarray(u))
    dU, du = flow.vector_field(jnp.asarray(U), jnp.asarray(u), B, ESw, Lq)
    np.testing.assert_allclose(dU, -expected[0], rtol=1e-11)
    np.testing.assert_allclose(du, -expected[1], rtol=1e-11)
    above = loss(jnp.asarray(U), u) - loss(jnp.zeros((3, 3)), 0.0)
    np.testing.assert_allclose(flow.loss_above_zero_network(jnp.asarray(U), u, B, ESw, Lq), above, rtol=1e-10)


def test_on_gaussian_features_it_is_the_field_of_the_paper():
    Lambda, N, sigma = np.diag([2.0, 0.5, 0.1]), 5, 0.4
    B = in_context.context_second_moment(Lambda, np.eye(3), law.gaussian_fourth(Lambda, np.eye(3)), N, sigma**2 * Lambda)
    U, u = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3))), jnp.asarray(0.6)
    ours, theirs = flow.vector_field(U, u, B, Lambda, Lambda), flow.gaussian_vector_field(U, u, jnp.asarray(Lambda), N, sigma)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-11)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-11)


def test_runge_kutta_agrees_with_scipy_and_conserves_the_balance(design):
    D = design(1)
    B, ESw, _ = moments(D)
    Lq = D.Lambda
    U, u = 0.3 * np.eye(3), 0.5

    def slope(_, flat):
        U, u = flat[:9].reshape(3, 3), flat[9]
        dU = -(u * u) * B @ U @ Lq + u * ESw @ Lq
        return np.append(dU.ravel(), -u * np.sum(U * (B @ U @ Lq)) + np.sum(U * (ESw @ Lq)))

    reference = scipy.integrate.solve_ivp(slope, (0, 2.0), np.append(U.ravel(), u), rtol=1e-11, atol=1e-12)
    path_U, path_u = flow.integrate(jnp.asarray(U), jnp.asarray(u), B, ESw, Lq, step=2e-3, steps=1000)
    np.testing.assert_allclose(path_U[-1].ravel(), reference.y[:9, -1], atol=1e-7)
    np.testing.assert_allclose(path_u[-1], reference.y[9, -1], atol=1e-7)
    np.testing.assert_allclose(flow.conserved(path_U, path_u), 0.25 - 0.27, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_the_flow_ends_at_the_closed_form_for_any_law_from_a_start_below_the_zero_network(design, seed):
    D = design(seed)
    B, ESw, A = moments(D)
    rng = np.random.default_rng(seed)
    Theta = rng.normal(size=(3, 3))
    Lq = D.Lambda
    T = Theta @ Theta.T / np.linalg.norm(Theta @ Theta.T)
    s = 0.5 * np.sqrt(2 * np.trace(ESw @ Lq @ T) / np.trace(B @ T @ Lq @ T)) if np.trace(ESw @ Lq @ T) > 0 else None
    assert s is not None
    U, u = jnp.asarray(s * T), jnp.asarray(s)
    assert flow.loss_above_zero_network(U, u, B, ESw, Lq) < 0
    step = 0.5 / (np.linalg.norm(A) * np.linalg.norm(B, 2) * np.linalg.norm(Lq, 2) * 4 + 1)
    path_U, path_u = flow.integrate(U, u, B, ESw, Lq, step=step, steps=200_000)
    end_U, end_u = flow.limit(A)
    np.testing.assert_allclose(path_U[-1], end_U, atol=2e-3 * float(jnp.linalg.norm(end_U)))
    np.testing.assert_allclose(path_u[-1], end_u, rtol=2e-3)


def test_the_limit_is_balanced_and_multiplies_to_the_weights():
    A = np.random.default_rng(0).normal(size=(4, 4))
    U, u = flow.limit(A)
    np.testing.assert_allclose(u * U, A.T, rtol=1e-12)
    np.testing.assert_allclose(flow.conserved(U, u), 0.0, atol=1e-12)


def test_the_paper_initialization_is_balanced_and_its_assumption_is_checked():
    Theta = np.random.default_rng(0).normal(size=(3, 3))
    U, u = flow.initial(jnp.asarray(Theta), 0.5, jnp.eye(3))
    np.testing.assert_allclose(flow.conserved(U, u), 0.0, atol=1e-12)
    with pytest.raises(ValueError, match=r"scale must satisfy scale\^2"):
        flow.initial(jnp.asarray(Theta), 1.2, jnp.eye(3))
    with pytest.raises(ValueError, match="Theta must not be zero"):
        flow.initial(jnp.zeros((3, 3)), 0.5, jnp.eye(3))
    with pytest.raises(ValueError, match="scale must be positive"):
        flow.initial(jnp.asarray(Theta), 0.0, jnp.eye(3))


def test_the_root_of_d_in_the_assumption_is_not_needed():
    rng = np.random.default_rng(3)
    for _ in range(50):
        Lambda = np.diag(rng.exponential(size=5))
        Gamma = in_context.gaussian_gamma(jnp.asarray(Lambda), 4)
        Theta = rng.normal(size=(5, rng.integers(1, 6)))
        T = Theta @ Theta.T / np.linalg.norm(Theta @ Theta.T)
        s = np.sqrt(1.999 / np.linalg.norm(Gamma, 2))  # far outside s^2 ||Gamma|| sqrt(5) < 2
        assert flow.loss_above_zero_network(s * T, s, Gamma @ Lambda, Lambda, Lambda) < 0


def full_loss(D, tasks, chances, v, z, U, u, N=2):
    """Half the mean squared error of the full layer over all tasks, contexts (noiseless) and queries, by enumeration."""
    total = 0.0
    for w, chance in zip(tasks, chances, strict=True):
        for context in itertools.product(range(len(D.phi)), repeat=N):
            x = D.phi[list(context)]
            G, S, c = x.T @ x / N, x.T @ (x @ w) / N, np.mean((x @ w) ** 2)
            row = v @ G @ U + u * S @ U + (v @ S) * z + u * c * z
            p = chance * np.prod(D.weights[list(context)])
            total += p * sum(q * (row @ xq - w @ xq) ** 2 for q, xq in zip(D.weights, D.phi, strict=True)) / 2
    return total


def symmetric(D):
    """The same law of features with every odd moment zero."""
    return type(D)(np.concatenate([D.phi, -D.phi]), np.concatenate([D.weights, D.weights]) / 2, D.Psi, np.tile(D.variance, 2))


def slope(f, d=3, h=1e-5):
    return np.array([(f(h * e) - f(-h * e)) / (2 * h) for e in np.eye(d)])


def test_the_block_v_leaks_with_the_mean_task_however_symmetric_the_features_are(design):
    D = symmetric(design(4, n=2))
    tasks = np.array([[1.0, 0.2, 0.0], [0.4, -0.3, 0.5]])
    U, u, zero = 0.3 * np.eye(3), 0.4, np.zeros(3)
    numeric = -slope(lambda v: full_loss(D, tasks, (0.5, 0.5), v, zero, U, u))
    got = flow.leak_field(U, u, tasks.mean(0), D.Lambda, lambda C: law.design_fourth(D.phi, D.weights, C), 2, D.Lambda)
    np.testing.assert_allclose(got, numeric, rtol=1e-6, atol=1e-9)
    assert np.linalg.norm(got) > 1e-3


def test_the_block_z_leaks_for_skewed_tasks_of_mean_zero_and_not_for_symmetric_tasks(design):
    D = symmetric(design(5, n=2))
    U, u, zero = 0.3 * np.eye(3), 0.4, np.zeros(3)
    skewed = np.array([[2.0, 1.0, 0.0], [-1.0, -0.5, 0.0]])
    numeric_z = slope(lambda z: full_loss(D, skewed, (1 / 3, 2 / 3), zero, z, U, u))
    numeric_v = slope(lambda v: full_loss(D, skewed, (1 / 3, 2 / 3), v, zero, U, u))
    assert np.linalg.norm(numeric_v) < 1e-8 < 1e-2 < np.linalg.norm(numeric_z)
    even = np.array([[2.0, 1.0, 0.0], [-2.0, -1.0, 0.0]])
    assert np.linalg.norm(slope(lambda z: full_loss(D, even, (0.5, 0.5), zero, z, U, u))) < 1e-8


def test_the_leaky_weights_have_the_loss_of_enumeration_and_gain_from_the_mean(design):
    D = symmetric(design(6, n=3))
    tasks = np.array([[1.0, 0.2, 0.5], [0.9, -0.3, 0.4], [1.1, 0.1, -0.2]])
    Psi, mean = tasks.T @ tasks / 3, tasks.mean(0)
    D = type(D)(D.phi, D.weights, Psi, D.variance)

    def fourth(C):
        return law.design_fourth(D.phi, D.weights, C)

    def loss(b):
        A, cross = flow.leak_weights(jnp.asarray(b), D.Lambda, Psi, mean, fourth, 2)
        return float(jnp.trace(D.Lambda @ (Psi - A @ cross))), A

    b = np.array([0.2, -0.1, 0.3])
    value, A = loss(b)
    np.testing.assert_allclose(full_loss(D, tasks, np.full(3, 1 / 3), b, np.zeros(3), A.T, 1.0), value / 2, rtol=1e-9)
    np.testing.assert_allclose(loss(np.zeros(3))[1], in_context.optimal_weights(D.Lambda, Psi, D.K, 2), rtol=1e-9)
    best = scipy.optimize.minimize(lambda b: loss(b)[0], np.zeros(3))
    assert best.fun < 0.98 * loss(np.zeros(3))[0]
