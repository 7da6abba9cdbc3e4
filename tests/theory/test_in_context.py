# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from lindm_theory import in_context as theory
from lindm_theory import moments as law

SPOTS = [  # Lambda, N, M, sigma, exact risk, eq. (6) where it applies
    (np.eye(5), 10, 20, 0.0, 1.289, 3.30),
    (np.diag([4.0, 1.0, 0.1]), 20, 5, 0.0, 2.412, 8.76),
    (np.diag([2.0, 1.0, 0.5, 0.25]), 8, 30, 0.5, 0.769, None),
]


def enumerate_contexts(D, w, N):
    """All contexts of N pairs with two-point noise of the right variance: (chance, S)."""
    points = [(i, s) for i in range(len(D.phi)) for s in (-1.0, 1.0)]
    for context in itertools.product(points, repeat=N):
        chance = np.prod([D.weights[i] / 2 for i, _ in context])
        yield chance, sum(D.phi[i] * (D.phi[i] @ w + s * np.sqrt(D.variance[i])) for i, s in context) / N


def two_tasks(D):
    """Two equally likely tasks (not centered) and their second moment."""
    rng = np.random.default_rng(11)
    tasks = rng.normal(size=(2, D.phi.shape[1])) + 0.5
    return tasks, sum(np.outer(w, w) for w in tasks) / 2


@pytest.mark.parametrize(("Lambda", "N", "M", "sigma", "exact", "eq6"), SPOTS)
def test_the_spot_values_of_the_specification_come_out(Lambda, N, M, sigma, exact, eq6):
    d = len(Lambda)
    K, noise = law.gaussian_fourth(Lambda, np.eye(d)), sigma**2 * Lambda
    A = theory.optimal_weights(Lambda, np.eye(d), K, N, noise)
    np.testing.assert_allclose(theory.risk(A, Lambda, np.eye(d), K, M, Lambda, noise).total, exact, atol=6e-4)
    np.testing.assert_allclose(theory.gaussian_risk(jnp.asarray(Lambda), M, N, sigma).total, exact, atol=6e-4)
    if eq6 is not None:
        np.testing.assert_allclose(theory.paper_bound(jnp.asarray(Lambda), M, N).total, eq6, atol=5e-3)


def test_the_context_moments_are_those_of_all_contexts(design):
    D = design(0, n=3)
    tasks, Psi = two_tasks(D)
    K = law.design_fourth(D.phi, D.weights, Psi)
    for N in (1, 2, 3):
        second, cross = np.zeros((3, 3)), np.zeros((3, 3))
        for w in tasks:
            for chance, S in enumerate_contexts(D, w, N):
                second += chance / 2 * np.outer(S, S)
                cross += chance / 2 * np.outer(S, w)
        np.testing.assert_allclose(theory.context_second_moment(D.Lambda, Psi, K, N, D.noise), second, rtol=1e-11)
        np.testing.assert_allclose(cross, D.Lambda @ Psi, rtol=1e-11)
        np.testing.assert_allclose(
            theory.optimal_weights(D.Lambda, Psi, K, N, D.noise), theory.solve_normal_equations(cross, second), rtol=1e-8
        )


def test_the_risk_of_any_weights_under_any_query_law_is_that_of_all_contexts(design):
    D = design(1, n=3)
    tasks, Psi = two_tasks(D)
    K = law.design_fourth(D.phi, D.weights, Psi)
    rng = np.random.default_rng(1)
    A, F = rng.normal(size=(3, 3)), rng.normal(size=(3, 3))
    for M in (1, 2):
        expected = sum(
            chance / 2 * (A @ S - w) @ F @ F.T @ (A @ S - w) for w in tasks for chance, S in enumerate_contexts(D, w, M)
        )
        np.testing.assert_allclose(theory.risk(A, D.Lambda, Psi, K, M, F @ F.T, D.noise).total, expected, rtol=1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_the_closed_form_minimizes_the_risk_whatever_the_query_law(design, seed):
    D = design(seed)
    A = np.asarray(theory.optimal_weights(D.Lambda, D.Psi, D.K, 6, D.noise))
    B = np.asarray(theory.context_second_moment(D.Lambda, D.Psi, D.K, 6, D.noise))
    rng = np.random.default_rng(seed)
    F = rng.normal(size=(3, 3))
    Lq = F @ F.T + 0.1 * np.eye(3)

    def loss(flat):
        C = flat.reshape(3, 3)
        return np.trace(Lq @ (C @ B @ C.T - 2 * C @ D.Lambda @ D.Psi + D.Psi))

    def slope(flat):
        return (2 * Lq @ (flat.reshape(3, 3) @ B - D.Psi @ D.Lambda)).ravel()

    minimum = scipy.optimize.minimize(loss, np.zeros(9), jac=slope, method="BFGS", options={"gtol": 1e-10, "maxiter": 2000})
    np.testing.assert_allclose(minimum.x.reshape(3, 3), A, atol=1e-6 * np.abs(A).max() * 10)


def test_the_gaussian_closed_form_is_the_inverse_of_the_papers_gamma():
    Lambda = np.diag([2.0, 0.7, 0.1])
    A = theory.optimal_weights(Lambda, np.eye(3), law.gaussian_fourth(Lambda, np.eye(3)), 9, 0.3**2 * Lambda)
    np.testing.assert_allclose(A, np.linalg.inv(theory.gaussian_gamma(jnp.asarray(Lambda), 9, 0.3)), rtol=1e-12, atol=1e-14)


def test_the_onehot_closed_form_is_the_inverse_of_another_gamma():
    rho = np.array([0.5, 0.3, 0.2])
    A = theory.optimal_weights(np.diag(rho), np.eye(3), law.onehot_fourth(jnp.asarray(rho), np.eye(3)), 9, 0.3**2 * np.diag(rho))
    np.testing.assert_allclose(A, np.linalg.inv(theory.onehot_gamma(jnp.asarray(rho), 9, 0.3)), rtol=1e-12, atol=1e-14)
    assert np.linalg.norm(A - np.linalg.inv(theory.gaussian_gamma(jnp.diag(rho), 9, 0.3))) > 0.05 * np.linalg.norm(A)


@pytest.mark.parametrize(("Lambda", "N", "M", "sigma"), [spot[:4] for spot in SPOTS])
def test_the_gaussian_form_of_the_risk_is_the_general_one(Lambda, N, M, sigma):
    K, noise = law.gaussian_fourth(Lambda, np.eye(len(Lambda))), sigma**2 * Lambda
    A = theory.optimal_weights(Lambda, np.eye(len(Lambda)), K, N, noise)
    general, special = (
        theory.risk(A, Lambda, np.eye(len(Lambda)), K, M, Lambda, noise),
        theory.gaussian_risk(jnp.asarray(Lambda), M, N, sigma),
    )
    np.testing.assert_allclose([general.estimation, general.bias], [special.estimation, special.bias], rtol=1e-11)


def test_at_equal_lengths_the_excess_of_other_weights_is_the_optimization_error_alone(design):
    D = design(2)
    N, rng = 7, np.random.default_rng(2)
    A = theory.optimal_weights(D.Lambda, D.Psi, D.K, N, D.noise)
    Ahat = A + 0.1 * rng.normal(size=(3, 3))
    for M in (N, 2 * N):
        B = theory.context_second_moment(D.Lambda, D.Psi, D.K, M, D.noise)
        excess = (
            theory.risk(Ahat, D.Lambda, D.Psi, D.K, M, D.Lambda, D.noise).total
            - theory.risk(A, D.Lambda, D.Psi, D.K, M, D.Lambda, D.noise).total
        )
        square = theory.optimization_error(Ahat, A, B, D.Lambda)
        cross = theory.optimization_cross(Ahat, A, D.Lambda @ D.Psi, B, D.Lambda)
        np.testing.assert_allclose(excess, square + cross, rtol=1e-9)
        assert (abs(cross) < 1e-12) == (M == N)


@pytest.mark.parametrize("seed", range(4))
def test_the_modes_give_the_risk_of_the_closed_form(design, seed):
    D = design(seed)
    x, q = theory.modes(D.Lambda, D.Psi, D.K, np.eye(3), D.noise)
    for N, M in ((1, 3), (8, 8), (50, 2)):
        A = theory.optimal_weights(D.Lambda, D.Psi, D.K, N, D.noise)
        exact, modal = theory.risk(A, D.Lambda, D.Psi, D.K, M, np.eye(3), D.noise), theory.modal_risk(x, q, M, N)
        np.testing.assert_allclose([modal.estimation, modal.bias], [exact.estimation, exact.bias], rtol=1e-9)


def test_the_modes_allow_tasks_in_a_subspace(design):
    D = design(5)
    Psi = np.outer([1.0, 2.0, 0.0], [1.0, 2.0, 0.0])
    K = law.design_fourth(D.phi, D.weights, Psi)
    x, q = theory.modes(D.Lambda, Psi, K, D.Lambda, D.noise)
    A = theory.optimal_weights(D.Lambda, Psi, K, 12, D.noise)
    exact, modal = theory.risk(A, D.Lambda, Psi, K, 9, D.Lambda, D.noise), theory.modal_risk(x[-1:], q[-1:], 9, 12)
    np.testing.assert_allclose([modal.estimation, modal.bias], [exact.estimation, exact.bias], rtol=1e-9)
    assert exact.bias < theory.modal_risk(x[-1:], q[-1:], 9, 6).bias / 2


@pytest.mark.parametrize("seed", range(4))
def test_the_general_bound_holds_at_every_length_and_is_attained_in_the_limit(design, seed):
    D = design(seed)
    for N in (1, 4, 30, 10**5):
        A = theory.optimal_weights(D.Lambda, D.Psi, D.K, N, D.noise)
        exact = theory.risk(A, D.Lambda, D.Psi, D.K, 7, D.Lambda, D.noise)
        bound = theory.general_bound(D.Lambda, D.Psi, D.K, 7, N, D.Lambda, D.noise)
        assert exact.estimation <= bound.estimation and exact.bias <= bound.bias
    np.testing.assert_allclose([exact.estimation, exact.bias], [bound.estimation, bound.bias], rtol=1e-2)


def test_the_general_bound_is_eq_6_without_its_slack_in_the_kappa_term():
    Lambda = jnp.diag(jnp.array([4.0, 1.0, 0.1]))
    K = law.gaussian_fourth(Lambda, jnp.eye(3))
    ours, theirs = theory.general_bound(Lambda, jnp.eye(3), K, 5, 20, Lambda), theory.paper_bound(Lambda, 5, 20)
    np.testing.assert_allclose(ours.estimation, theirs.estimation, rtol=1e-12)
    trace = 5.1
    np.testing.assert_allclose(ours.bias, (trace + 6 * trace + trace**2 * (0.25 + 1 + 10)) / 400, rtol=1e-12)
    assert ours.bias < theirs.bias


def test_eq_6_as_an_inequality_holds_on_onehot_features_while_its_gamma_predicts_another_risk():
    rng = np.random.default_rng(0)
    for _ in range(20):
        rho = rng.dirichlet(np.ones(5))
        Lambda, K = np.diag(rho), law.onehot_fourth(jnp.asarray(rho), np.eye(5))
        for N, M in ((2, 3), (20, 40), (300, 10)):
            bound = theory.paper_bound(jnp.asarray(Lambda), M, N)
            gaussian = np.linalg.inv(theory.gaussian_gamma(jnp.asarray(Lambda), N))
            for A in (theory.optimal_weights(Lambda, np.eye(5), K, N), gaussian):
                exact = theory.risk(A, Lambda, np.eye(5), K, M, Lambda)
                assert exact.estimation <= 4 / M + 1e-12 and exact.estimation <= bound.estimation
                assert exact.bias <= bound.bias
    A = theory.optimal_weights(Lambda, np.eye(5), K, 20)
    exact = theory.risk(A, Lambda, np.eye(5), K, 20, Lambda).total
    assert theory.gaussian_risk(jnp.asarray(Lambda), 20, 20).total > 1.05 * exact


def test_eq_6_fails_under_label_noise_and_under_heavy_tails():
    Lambda, N, M = np.eye(3), 50, 10
    K, noise = law.gaussian_fourth(Lambda, np.eye(3)), 9.0 * Lambda
    bound = theory.paper_bound(jnp.asarray(Lambda), M, N).total
    A = theory.optimal_weights(Lambda, np.eye(3), K, N, noise)
    assert theory.risk(A, Lambda, np.eye(3), K, M, Lambda, noise).total > bound
    heavy = 20.0 * K  # x = 0 with probability .95, else N(0, 20 Lambda)
    A = theory.optimal_weights(Lambda, np.eye(3), heavy, N)
    assert theory.risk(A, Lambda, np.eye(3), heavy, M, Lambda).total > bound


def test_sign_symmetry_alone_does_not_make_the_weights_isotropic():
    root = np.sqrt(2.0)
    phi = np.array([[a, b] for a in (-1.0, 1.0) for b in (0.0, 0.0, root, -root)])
    weights = np.full(8, 1 / 8)
    np.testing.assert_allclose(law.design_moment(phi, weights), np.eye(2), atol=1e-15)
    K = law.design_fourth(phi, weights, np.eye(2))
    np.testing.assert_allclose(K, np.diag([2.0, 3.0]), atol=1e-14)
    A = np.asarray(theory.optimal_weights(np.eye(2), np.eye(2), K, 4))
    assert abs(A[0, 0] - A[1, 1]) > 0.05


def test_the_direction_of_the_weights_is_the_same_for_all_lengths_when_psi_is_the_inverse_of_lambda():
    Lambda = np.diag([4.0, 1.0, 0.1])
    Psi = np.linalg.inv(Lambda)
    K = law.gaussian_fourth(Lambda, Psi)
    for N in (1, 5, 100):
        A = np.asarray(theory.optimal_weights(Lambda, Psi, K, N))
        np.testing.assert_allclose(A / A[0, 0], Psi / Psi[0, 0], rtol=1e-12, atol=1e-12)
    isotropic_tasks = np.asarray(theory.optimal_weights(Lambda, np.eye(3), law.gaussian_fourth(Lambda, np.eye(3)), 5))
    assert abs(isotropic_tasks[2, 2] / isotropic_tasks[0, 0] - 40) > 1


def test_uniform_onehot_features_and_exchangeable_tasks_give_a_multiple_of_the_identity_plus_a_constant():
    rho, Psi = np.full(4, 0.25), 0.3 * np.eye(4) + 2.0
    A = np.asarray(theory.optimal_weights(np.diag(rho), Psi, law.onehot_fourth(jnp.asarray(rho), Psi), 6, 0.2 * np.diag(rho)))
    beta = A[0, 1]
    np.testing.assert_allclose(A, (A[0, 0] - beta) * np.eye(4) + beta, rtol=1e-12)
    assert A[0, 0] > beta > 0


def test_for_given_test_length_the_best_training_length_is_the_test_length(design):
    D = design(3)
    x, q = theory.modes(D.Lambda, D.Psi, D.K, D.Lambda, D.noise)
    grid = np.arange(1, 60)
    for M in (3, 17):
        total = jax.vmap(lambda N, M=M: theory.modal_risk(x, q, M, N).total)(jnp.asarray(grid, float))
        assert grid[int(jnp.argmin(total))] == M


def test_the_two_errors_are_equal_at_the_balance_length(design):
    D = design(4)
    x, q = theory.modes(D.Lambda, D.Psi, D.K, D.Lambda, D.noise)
    lengths = jax.vmap(lambda M: theory.balance_length(x, q, M))(jnp.array([1.0, 10.0, 1e8]))
    for M, N in zip((1.0, 10.0, 1e8), lengths, strict=True):
        parts = theory.modal_risk(x, q, M, N)
        np.testing.assert_allclose(parts.estimation, parts.bias, rtol=1e-9)
    np.testing.assert_allclose(lengths[2], np.sqrt(1e8 * np.sum(q / x**2) / np.sum(q / x)), rtol=1e-2)


def test_a_dependent_context_has_the_risk_of_its_enumeration(design):
    D = design(6, n=3)
    rng = np.random.default_rng(6)
    P, rho, w = rng.dirichlet(np.ones(3), size=3), rng.dirichlet(np.ones(3)), rng.normal(size=3)
    A, Psi, expected = rng.normal(size=(3, 3)), np.outer(w, w), 0.0
    for i, j, k in itertools.product(range(3), repeat=3):
        G = sum(np.outer(D.phi[n], D.phi[n]) for n in (i, j, k)) / 3
        error = A @ G @ w - w
        expected += rho[i] * P[i, j] * P[j, k] * error @ D.Lambda @ error
    mean, second = law.chain_moments(jnp.asarray(P), jnp.asarray(rho), jnp.asarray(D.phi), jnp.asarray(Psi), 3)
    got = theory.moment_risk(jnp.asarray(A), mean, Psi, second - mean @ Psi @ mean, D.Lambda)
    np.testing.assert_allclose(got.total, expected, rtol=1e-11)


def test_predictions_are_differentiable_and_batched():
    Lambdas = jnp.stack([jnp.eye(3), 2 * jnp.eye(3)])
    risks = jax.vmap(lambda L: theory.gaussian_risk(L, 5, 7))(Lambdas)
    assert isinstance(risks, theory.Prediction) and risks.total.shape == (2,)
    assert jnp.isfinite(jax.grad(lambda N: theory.gaussian_risk(jnp.eye(3), 5, N).total)(7.0))


def test_an_action_never_sampled_has_value_zero_under_diagonal_weights_and_an_imputed_one_otherwise():
    rho, S = np.full(4, 0.25), np.array([0.5, 0.25, 0.25, 0.0])  # the last pair is not in the prompt
    for Psi, imputed in ((np.diag([1.0, 2.0, 3.0, 4.0]), False), (np.eye(4) + 2.0, True)):
        A = np.asarray(theory.optimal_weights(np.diag(rho), Psi, law.onehot_fourth(jnp.asarray(rho), Psi), 8))
        unseen = (A @ S)[3]
        np.testing.assert_allclose(unseen, A[0, 1] * S.sum() if imputed else 0.0, atol=1e-14)
        assert (unseen > 0.1) == imputed


def test_two_unseen_actions_are_imputed_differently_unless_the_design_is_uniform():
    rho, Psi, S, N = np.array([0.05, 0.15, 0.3, 0.5]), np.eye(4) + 2.0, np.array([0.0, 0.0, 0.45, 0.6]), 32
    A = np.asarray(in_context_weights(rho, Psi, N))
    first, second = (A @ S)[:2]
    assert first > 1.5 * second > 0.2
    # Sherman-Morrison: the imputed values are as 1/t_i, t_i = (1 - 1/N) rho_i + Psi_ii/N for Psi = I + b 11'
    t = (1 - 1 / N) * rho + 3.0 / N
    np.testing.assert_allclose(first / second, t[1] / t[0], rtol=1e-12)
    unseen = S == 0
    assert np.ptp((in_context_weights(np.full(4, 0.25), Psi, N) @ S)[unseen]) < 1e-12


def in_context_weights(rho, Psi, N):
    return theory.optimal_weights(np.diag(rho), Psi, law.onehot_fourth(jnp.asarray(rho), Psi), N)


def test_the_policy_can_be_blind_to_the_training_length_where_the_weights_are_not():
    # R Lambda^-1 side = r Lambda Psi side for the difference of the two actions of every state, r another number in each
    Psi, rng = np.diag([1.0, 2.0, 4.0]), np.random.default_rng(0)
    K = law.gaussian_fourth(jnp.eye(3), Psi)
    weights = [np.asarray(theory.optimal_weights(np.eye(3), Psi, K, N)) for N in (1, 5, 50, 10**6)]
    assert np.abs(weights[0] / weights[0][0, 0] - weights[-1] / weights[-1][0, 0]).max() > 0.1  # not isotropic
    S = rng.normal(size=(2000, 3))
    for side, blind in ((np.array([1.0, 0, 0]), True), (np.array([0, 0, -2.0]), True), (np.array([1.0, 1.0, 0]), False)):
        chosen = [np.sign(S @ A.T @ side) for A in weights]
        changes = max(np.mean(c != chosen[0]) for c in chosen)
        assert (changes == 0) == blind


def test_under_permutation_symmetry_the_greedy_action_is_the_same_for_every_training_length():
    rng = np.random.default_rng(0)
    rho, Psi = np.full(6, 1 / 6), np.eye(6) + 2.0  # two states of three actions
    weights = [theory.optimal_weights(np.diag(rho), Psi, law.onehot_fourth(jnp.asarray(rho), Psi), N) for N in (1, 7, 500)]
    # the weights themselves change by more than a factor
    assert abs(weights[0][0, 1] / weights[0][0, 0] - weights[2][0, 1] / weights[2][0, 0]) > 0.1
    for _ in range(50):
        S = rng.normal(size=6)
        chosen = [np.asarray(A @ S).reshape(2, 3).argmax(1) for A in weights]
        assert all(np.array_equal(c, chosen[0]) for c in chosen)


def test_the_weights_are_equivariant_so_that_no_change_of_coordinates_changes_a_prediction():
    rng = np.random.default_rng(11)
    x, rho = rng.normal(size=(9, 3)), rng.dirichlet(np.ones(9))
    w = rng.normal(size=(40, 3)) + 0.5
    T = rng.normal(size=(3, 3)) + 2 * np.eye(3)

    def weights(x, w):
        L = (x * rho[:, None]).T @ x
        Psi = w.T @ w / len(w)
        K = (x * (rho * np.einsum("ni,ij,nj->n", x, Psi, x))[:, None]).T @ x
        return np.asarray(theory.optimal_weights(L, Psi, K, 7, 0.2 * L))

    A, carried = weights(x, w), weights(x @ T.T, w @ np.linalg.inv(T))
    np.testing.assert_allclose(carried, np.linalg.inv(T).T @ A @ np.linalg.inv(T), rtol=1e-9)
    context = rng.integers(9, size=5)
    y = x[context] @ w[0]
    plain = x @ A @ (x[context].T @ y)
    np.testing.assert_allclose((x @ T.T) @ carried @ (T @ x[context].T @ y), plain, rtol=1e-9)
