# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats

from lindm_theory import in_context, margin
from lindm_theory import moments as law


def test_the_values_at_infinite_context_are_those_of_loops(make_problem):
    W = make_problem(0)
    rng = np.random.default_rng(0)
    A, Lambda = rng.normal(size=(3, 3, 3)), np.eye(3) + 0.2
    got = margin.infinite_context_values(*map(jnp.asarray, (W.phi, A, Lambda, W.w)))
    for h, s, a in np.ndindex(3, 4, 3):
        np.testing.assert_allclose(got[h, s, a], W.phi[s, a] @ A[h] @ Lambda @ W.w[h], rtol=1e-11)


def test_the_margin_compares_the_best_optimal_action_with_the_best_other():
    Qstar = jnp.array([[1.0, 1.0, 0.2], [1.0, 0.5, 0.2], [3.0, 3.0, 3.0]])
    values = jnp.array([[0.1, 0.9, 0.6], [0.4, 0.7, 0.1], [1.0, 2.0, 3.0]])
    np.testing.assert_allclose(margin.bias_margin(values, Qstar), [0.3, -0.3, np.inf])


def test_the_flip_length_is_the_largest_length_that_flips():
    margins = jnp.array([[[0.1, -1.0]], [[0.2, 0.1]], [[-0.1, 0.3]], [[0.2, 0.4]]])
    assert margin.flip_length(margins, jnp.array([1, 5, 10, 20])) == 10
    assert margin.flip_length(jnp.abs(margins), jnp.array([1, 5, 10, 20])) == 0


def test_the_lengths_that_flip_need_not_be_an_interval():
    # in the coordinates of the modes the margin is sum_i a_i N x_i/(1 + N x_i): with d = 3 it may change sign twice
    x, a = np.array([1.0, 0.05, 0.001]), np.array([1.0, -2.5, 1.8])
    signs = [np.sign(np.sum(a * N * x / (1 + N * x))) for N in (1, 100, 10**5)]
    assert signs == [1, -1, 1]


@pytest.mark.parametrize(("density", "beta"), [(0.7, 1.0), (2.0, 2.0), (0.5, 0.5)])
def test_the_gap_law_is_the_integral_over_the_gaps(density, beta):
    deviation, M = 0.8, 400.0
    exact = scipy.integrate.quad(
        lambda g: density * beta * g ** (beta - 1) * g * scipy.stats.norm.cdf(-g * np.sqrt(M) / deviation), 0, 1, epsabs=1e-14
    )[0]
    np.testing.assert_allclose(margin.gap_law(density, beta, deviation, M), exact, rtol=1e-6)


def test_a_positive_density_at_zero_gives_one_over_M():
    np.testing.assert_allclose(margin.no_gap_law(0.7, 0.8, 400.0), 0.7 * 0.64 / 1600, rtol=1e-12)
    np.testing.assert_allclose(margin.gap_law(0.7, 1.0, 0.8, 400.0), margin.no_gap_law(0.7, 0.8, 400.0), rtol=1e-12)


# --- the training length with the smallest policy loss


def two_actions(seed, points=4):
    """Features of `points` equally likely pairs, the difference of two, and the second moment of Gaussian tasks; d = 2."""
    rng = np.random.default_rng(seed)
    phi, F = rng.normal(size=(points, 2)), rng.normal(size=(2, 2))
    return phi, np.full(points, 1 / points), phi[0] - phi[1], F @ F.T + 0.1 * np.eye(2)


def weights_at(phi, rho, Psi, N, sigma=0.0):
    L = (phi * rho[:, None]).T @ phi
    K = (phi * (rho * np.einsum("ni,ij,nj->n", phi, Psi, phi))[:, None]).T @ phi
    return Psi @ L @ np.linalg.inv(L @ Psi @ L + (K - L @ Psi @ L + sigma**2 * L) / N)


def enumerated(seed, M, lengths, points=4, angles=2000):
    """Exact E SubOpt and risk of Qhat for each training length: all contexts of M pairs; tasks by their angle, on whose radius no
    decision depends."""
    phi, rho, side, Psi = two_actions(seed, points)
    turn = 2 * np.pi * (np.arange(angles) + 0.5) / angles
    w = np.stack([np.cos(turn), np.sin(turn)], 1) @ np.linalg.cholesky(Psi).T
    counts = np.array([c for c in itertools.product(range(M + 1), repeat=points) if sum(c) == M])
    chance = scipy.stats.multinomial.pmf(counts, M, rho)
    S = np.einsum("cn,ni,tn->cti", counts / M, phi, w @ phi.T)
    losses, risks = [], []
    for N in lengths:
        A, g = weights_at(phi, rho, Psi, N), w @ side
        wrong = np.sign(S @ A.T @ side) != np.sign(g)
        losses.append(chance @ (wrong * np.abs(g)).mean(1))
        risks.append(chance @ np.square((S @ A.T - w) @ phi.T).mean((1, 2)) * 2)  # E radius^2 = 2
    return np.array(losses), np.array(risks)


@pytest.mark.parametrize(("seed", "price"), [(17, 3.0), (26, 5.0), (9, 1.5)])
def test_the_best_training_length_is_the_test_length_for_the_risk_and_another_one_for_the_policy(seed, price):
    lengths = np.array([1, 2, 3, 4, 5, 8, 64, 512])
    losses, risks = enumerated(seed, 4, lengths)
    assert lengths[risks.argmin()] == 4
    assert losses[3] > price * losses.min()
    assert (lengths[losses.argmin()] > 4) == (seed != 9)  # both sides occur


def test_the_best_length_for_the_policy_grows_beyond_every_length_that_flips_an_action():
    phi, rho, side, Psi = two_actions(3, points=3)
    turn = 2 * np.pi * (np.arange(20000) + 0.5) / 20000
    w = np.stack([np.cos(turn), np.sin(turn)], 1) @ np.linalg.cholesky(Psi).T
    L, g = phi.T @ phi / 3, w @ side

    def floor(N):
        return np.mean(np.abs(g) * (np.sign(w @ L @ weights_at(phi, rho, Psi, N).T @ side) != np.sign(g)))

    floors = [floor(N) for N in (1, 2, 4, 8)]
    assert floors == sorted(floors, reverse=True) and floors[-1] > 0
    losses, _ = enumerated(3, 40, [1, 2, 4, 8, 40], points=3)
    assert losses[-1] < min(floors[-1], losses[:-1].min())


@pytest.mark.parametrize("seed", [0, 2, 3, 11])
def test_the_ratio_of_the_best_length_to_M_is_that_of_quadrature(seed):
    # mean and variance of side'A S given the task are exact, its law is taken as normal; the best N is found by search
    rng = np.random.default_rng(seed)
    phi, rho, F = rng.normal(size=(5, 2)), rng.dirichlet(3 * np.ones(5)), rng.normal(size=(2, 2))
    Psi, side, sigma, M = F @ F.T + 0.1 * np.eye(2), phi[0] - phi[1], 0.7, 10**4
    L = (phi * rho[:, None]).T @ phi
    v = side @ Psi @ side
    kappa = Psi @ side / v
    spectrum, basis = np.linalg.eigh(Psi - v * np.outer(kappa, kappa))
    nodes, chance = np.polynomial.hermite_e.hermegauss(40)
    t = np.linspace(-1, 1, 1201)
    g, dg = 8 * np.sqrt(v) * t**3, 24 * np.sqrt(v) * t**2 * (t[1] - t[0])
    w = g[:, None, None] * kappa + nodes[None, :, None] * basis[:, -1] * np.sqrt(spectrum[-1])

    def loss(log_N):
        reach = phi @ weights_at(phi, rho, Psi, np.exp(log_N), sigma).T @ side
        y = w @ phi.T * reach
        mean = y @ rho
        variance = y**2 @ rho - mean**2 + sigma**2 * rho @ reach**2
        wrong = scipy.stats.norm.cdf(-np.sign(g)[:, None] * mean * np.sqrt(M / variance))
        return M * np.sum(np.abs(g)[:, None] * wrong * (scipy.stats.norm.pdf(g, scale=np.sqrt(v)) * dg)[:, None] * chance)

    best: Any = scipy.optimize.minimize_scalar(
        loss, bounds=(np.log(M / 10), np.log(50 * M)), method="bounded", options={"xatol": 1e-4}
    )
    got = margin.policy_length_ratio(
        jnp.asarray(side)[None], jnp.ones(1), L, Psi, lambda P: law.design_fourth(phi, rho, P), sigma**2 * L
    )
    np.testing.assert_allclose(np.exp(best.x) / M, got, rtol=0.01)
    assert abs(got - 1) > 0.3


def test_the_ratio_is_one_under_noise_that_does_not_depend_on_the_task_and_the_general_one_for_gaussian_features():
    rng = np.random.default_rng(0)
    L, Psi, side = np.diag([2.0, 1.0, 0.3]), np.diag([1.0, 0.2, 2.0]), rng.normal(size=3)

    def ratio(fourth, noise, Lambda=L):
        return margin.policy_length_ratio(jnp.asarray(side)[None], jnp.ones(1), jnp.asarray(Lambda), Psi, fourth, noise)

    # K = Lambda Psi Lambda: features that do not vary
    np.testing.assert_allclose(ratio(lambda P: L @ P @ L, 0.5 * L), 1.0, rtol=1e-9)
    # Lambda = I, moments m_k = side'Psi^k side: t D/((t - m_2/m_1) D + 2 m_0 (m_0 m_2/m_1^2 - 1)), D = m_-1 - m_0^2/m_1
    m = {k: side @ np.diag(np.diag(Psi) ** k) @ side for k in (-1, 0, 1, 2)}
    t, D = np.trace(Psi) + 0.7**2, m[-1] - m[0] ** 2 / m[1]
    expected = t * D / ((t - m[2] / m[1]) * D + 2 * m[0] * (m[0] * m[2] / m[1] ** 2 - 1))
    got = ratio(lambda P: law.gaussian_fourth(jnp.eye(3), P), 0.7**2 * jnp.eye(3), np.eye(3))
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_where_task_and_context_are_jointly_gaussian_no_weights_lose_less_than_the_closed_form_at_the_test_length():
    # every context shows each of the three pairs m times: G = Lambda, so (w, S) is Gaussian
    rng = np.random.default_rng(1)
    F, side, sigma, M = rng.normal(size=(3, 3)), rng.normal(size=3), 1.5, 6
    Psi, L = F @ F.T + 0.1 * np.eye(3), np.eye(3) / 3

    def moments(N):
        return L @ Psi, L @ Psi @ L + sigma**2 * L / N

    def loss(A):
        return float(margin.gaussian_decision_loss(side, A, Psi, *moments(M)))

    best = np.asarray(in_context.solve_normal_equations(*moments(M)))
    others = [np.asarray(in_context.solve_normal_equations(*moments(N))) for N in (1, 3, 5, 7, 12, 100)]
    others += [best + 0.1 * rng.normal(size=(3, 3)) for _ in range(50)]
    assert min(map(loss, others)) > loss(best)
    w = rng.normal(size=(400_000, 3)) @ np.linalg.cholesky(Psi).T
    S = w @ L + sigma * rng.normal(size=w.shape) / np.sqrt(3 * M)
    for A in (best, others[0]):
        lost = np.abs(w @ side) * (np.sign(S @ A.T @ side) != np.sign(w @ side))
        assert abs(lost.mean() - loss(A)) < 4 * lost.std() / np.sqrt(len(w))


def test_the_greedy_action_can_change_more_often_than_one_pair_of_actions_can():
    # one-hot pairs, d = 2: every pair of actions changes order at most once, the greedy action of the four changes three times
    rho, w = np.array([0.99, 0.01]), np.ones(2)
    t = np.array([0.001, 0.05, 0.3, 0.9])
    actions = np.stack([-(t**2) / 2, t], 1)
    lengths = np.geomspace(1, 10**5, 200)
    values = []
    for N in lengths:
        A = in_context.optimal_weights(np.diag(rho), np.eye(2), law.onehot_fourth(jnp.asarray(rho), np.eye(2)), N)
        values.append(margin.infinite_context_values(jnp.asarray(actions)[None], A[None], np.diag(rho), w[None])[0, 0])
    values = np.array(values)
    assert np.sum(np.diff(values.argmax(1)) != 0) == 3
    for a, b in itertools.combinations(range(4), 2):
        assert np.sum(np.diff(np.sign(values[:, a] - values[:, b])) != 0) <= 1
