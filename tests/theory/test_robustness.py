# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false, reportCallIssue=false

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from lindm_theory import in_context, robustness
from lindm_theory import moments as law


def gaussian(Lambda, N):
    Psi = np.eye(len(Lambda))
    return np.asarray(in_context.optimal_weights(Lambda, Psi, law.gaussian_fourth(Lambda, Psi), N))


def test_one_step_of_depth_has_the_bias_of_one_layer_and_more_steps_that_of_the_recursion(design):
    D = design(0)
    A = np.asarray(in_context.optimal_weights(D.Lambda, D.Psi, D.K, 10, D.noise))
    one = in_context.risk(A, D.Lambda, D.Psi, D.K, 5, D.Lambda).bias
    np.testing.assert_allclose(robustness.depth_bias(A, D.Lambda, D.Psi, D.Lambda, 1), one, rtol=1e-12)
    values, basis = np.linalg.eigh(D.Psi)
    expected = 0.0
    for task in (np.sqrt(values) * basis).T:
        guess = np.zeros(3)
        for _ in range(3):
            guess = guess + A @ (D.Lambda @ task - D.Lambda @ guess)
        expected += (guess - task) @ D.Lambda @ (guess - task)
    np.testing.assert_allclose(robustness.depth_bias(A, D.Lambda, D.Psi, D.Lambda, 3), expected, rtol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_closed_form_contracts_for_every_law_by_one_over_one_plus_N_times_the_mode(design, seed):
    D = design(seed)
    x, q = in_context.modes(D.Lambda, D.Psi, D.K, D.Lambda, D.noise)
    for N in (1, 20):
        A = np.asarray(in_context.optimal_weights(D.Lambda, D.Psi, D.K, N, D.noise))
        contraction = np.sort(np.linalg.eigvals(np.eye(3) - A @ D.Lambda).real)
        np.testing.assert_allclose(contraction, np.sort(1 / (1 + N * np.asarray(x))), rtol=1e-7)
        assert np.all((contraction > 0) & (contraction < 1))
        deep = np.sum(q / (1 + N * x) ** 6)
        np.testing.assert_allclose(robustness.depth_bias(A, D.Lambda, D.Psi, D.Lambda, 3), deep, rtol=1e-7)


def test_without_label_noise_depth_removes_the_estimation_error_too():
    rng = np.random.default_rng(0)
    x, w = rng.uniform(-1, 1, size=(40, 3)), rng.normal(size=3)
    G = x.T @ x / 40
    A = np.eye(3)
    one, many = (robustness.depth_error(A, G, G @ w, w, k) for k in (1, 200))
    np.testing.assert_allclose(one, A @ G @ w - w, rtol=1e-10)
    assert np.linalg.norm(many) < 1e-10 < np.linalg.norm(one)
    noisy = G @ w + 0.1 * rng.normal(size=3)
    np.testing.assert_allclose(robustness.depth_error(A, G, noisy, w, 400), np.linalg.solve(G, noisy) - w, atol=1e-10)


def test_on_gaussian_features_depth_diverges_in_the_mean_at_every_finite_length():
    # d = 1: the error after k steps is (1 - a G)^k w with G = chi^2_M / M unbounded
    N = M = 10
    a = 1 / (1 + 2 / N)

    def risk(k):
        return scipy.integrate.quad(lambda g: (1 - a * g) ** (2 * k) * M * scipy.stats.chi2.pdf(M * g, M), 0, 30, limit=500)[0]

    errors = [risk(k) for k in range(1, 13)]
    assert errors[1] < errors[0] and errors[11] > 10 * errors[0]


def test_the_onehot_depth_risk_is_that_of_all_contexts_and_leaves_the_unseen():
    rho, psi, q = np.array([0.6, 0.3, 0.1]), np.array([1.0, 2.0, 0.5]), np.array([0.2, 0.3, 0.5])
    a, M = np.array([1.2, 1.1, 1.5]), 4
    for k in (1, 3):
        expected = 0.0
        for context in itertools.product(range(3), repeat=M):
            count = np.bincount(context, minlength=3)
            expected += np.prod(rho[list(context)]) * np.sum(q * psi * (1 - a * count / M) ** (2 * k))
        got = robustness.onehot_depth_risk(*map(jnp.asarray, (a, rho, psi, q)), M, k)
        np.testing.assert_allclose(got, expected, rtol=1e-9)
    deep = robustness.onehot_depth_risk(*map(jnp.asarray, (a, rho, psi, q)), M, 300)
    np.testing.assert_allclose(deep, np.sum(q * psi * (1 - rho) ** M), rtol=1e-9)


def test_at_the_closed_form_depth_diverges_without_noise_on_onehot_features_of_three_or_more_dimensions():
    def risk(d, N, M, k):
        rho, Psi = np.full(d, 1 / d), np.eye(d)
        a = np.diag(in_context.optimal_weights(np.diag(rho), Psi, law.onehot_fourth(jnp.asarray(rho), Psi), N))
        np.testing.assert_allclose(a, N * d / (N - 1 + d), rtol=1e-12)
        q = rho
        return a[0], float(robustness.onehot_depth_risk(*map(jnp.asarray, (a, rho, np.ones(d), q)), M, k))

    errors = [risk(3, 20, 16, k)[1] for k in (1, 2, 4, 8, 16, 32)]
    np.testing.assert_allclose(errors, [0.1116, 0.03407, 0.009974, 0.009483, 2.4147, 3.7579e7], rtol=1e-3)
    # the boundary N (d - 2) = 2 (d - 1): at it a context of one pair only never settles, beyond it the risk diverges
    unseen = (2 / 3) ** 16
    step, limit = risk(3, 3, 16, 4000)
    assert step < 2
    np.testing.assert_allclose(limit, unseen, rtol=1e-9)
    step, limit = risk(3, 4, 16, 4000)
    np.testing.assert_allclose([step, limit], [2.0, unseen + (1 / 3) ** 16], rtol=1e-9)
    assert all(risk(d, N, 16, 4000)[1] > 1e6 for d, N in ((3, 5), (4, 4), (5, 3)))
    assert all(risk(2, N, 16, 1)[0] < 2 for N in (4, 4000))  # two dimensions: the step can be safe at every length


@pytest.mark.parametrize(("d", "N", "M"), [(3, 20, 40), (4, 64, 60), (2, 400, 30)])
def test_a_smaller_step_is_safe_at_every_depth_and_the_full_step_on_all_but_few_contexts(d, N, M):
    rng = np.random.default_rng(d)
    rho = rng.dirichlet(8 * np.ones(d))
    A = np.asarray(in_context.optimal_weights(np.diag(rho), np.eye(d), law.onehot_fourth(jnp.asarray(rho), np.eye(d)), N))
    assert np.einsum("ni,ij,nj->n", np.eye(d), A, np.eye(d)).max() > 2  # the condition on the full step fails
    eta = 0.999 * float(robustness.largest_step(A, np.eye(d)))
    rest = [jnp.asarray(x) for x in (rho, np.ones(d), rho)]
    damped = [float(robustness.onehot_depth_risk(jnp.asarray(eta * np.diag(A)), *rest, 16, k)) for k in (1, 2, 8, 64, 512)]
    floor = np.sum(rho * (1 - rho) ** 16)
    assert damped == sorted(damped, reverse=True) and damped[-1] >= floor
    np.testing.assert_allclose(robustness.onehot_depth_risk(jnp.asarray(eta * np.diag(A)), *rest, 16, 10**5), floor, rtol=1e-6)
    unstable = sum(scipy.stats.binom.sf(np.ceil(2 * M / a) - 1, M, p) for a, p in zip(np.diag(A), rho, strict=True))
    bound = float(robustness.unstable_chance(A, np.eye(d), M))
    assert 0 < unstable <= bound < 0.5
    assert robustness.unstable_chance(A, np.eye(d), 3 * M) < bound / 20


def test_a_step_beyond_the_largest_one_diverges_on_the_context_that_attains_the_maximum(design):
    D = design(3)
    A = np.linalg.inv(D.Lambda + np.eye(3) / 30)
    x = D.phi[np.einsum("ni,ij,nj->n", D.phi, A, D.phi).argmax()]
    G, w = np.outer(x, x), A @ x
    for factor, grows in ((0.99, False), (1.01, True)):
        step = factor * float(robustness.largest_step(A, D.phi))
        few, many = (np.asarray(robustness.depth_error(step * A, G, G @ w, w, k)) for k in (10, 200))
        assert (many @ np.linalg.inv(A) @ many > few @ np.linalg.inv(A) @ few) == grows


def test_scaling_the_context_is_scaling_the_weights(design):
    D = design(1)
    A, c = np.asarray(in_context.optimal_weights(D.Lambda, D.Psi, D.K, 10, D.noise)), 1.7
    shifted = robustness.scale_shift(A, D.Lambda, D.Psi, D.K, 6, D.Lambda, c)
    scaled = in_context.risk(c**2 * A, D.Lambda, D.Psi, D.K, 6, D.Lambda)
    np.testing.assert_allclose([shifted.estimation, shifted.bias], [scaled.estimation, scaled.bias], rtol=1e-12)
    noisy = robustness.scale_shift(A, D.Lambda, D.Psi, D.K, 6, D.Lambda, c, D.noise)
    direct = in_context.risk(A, c**2 * D.Lambda, D.Psi, c**4 * D.K, 6, D.Lambda, c**2 * D.noise)
    np.testing.assert_allclose(noisy.total, direct.total, rtol=1e-12)


def test_a_scale_shift_leaves_the_floor_of_c_squared_minus_one_and_a_spectrum_shift_its_own():
    Lambda = np.diag([2.0, 0.5])
    A, far = gaussian(Lambda, 10**9), robustness.shift_floor
    np.testing.assert_allclose(far(A, 1.5**2 * Lambda, np.eye(2), Lambda), (1.5**2 - 1) ** 2 * 2.5, rtol=1e-6)
    np.testing.assert_allclose(far(A, np.diag([1.0, 1.0]), np.eye(2), Lambda), 2.0 * 0.25 + 0.5 * 1.0, rtol=1e-6)
    assert far(A, Lambda, np.eye(2), np.diag([1.0, 9.0])) < 1e-12  # query shift alone leaves nothing


def test_the_score_is_the_derivative_of_the_weights_in_psi(design):
    D = design(2)
    E = np.diag([1.0, -0.5, 0.2])

    def fourth(Psi):
        return law.design_fourth(D.phi, D.weights, Psi)

    def weights(t):
        return in_context.optimal_weights(D.Lambda, D.Psi + t * E, fourth(D.Psi + t * E), 5, D.noise)

    A, B = weights(0.0), in_context.context_second_moment(D.Lambda, D.Psi, D.K, 5, D.noise)
    slope = (weights(1e-5) - weights(-1e-5)) / 2e-5
    score = robustness.few_task_score(A, E, D.Lambda, fourth, 5)
    np.testing.assert_allclose(score @ np.linalg.inv(B), slope, rtol=1e-5, atol=1e-7)


def test_the_few_task_coefficient_is_that_of_quadrature_over_the_tasks(design):
    D = design(3, d=2)
    N, nodes = 4, np.polynomial.hermite_e.hermegauss(5)

    def fourth(Psi):
        return law.design_fourth(D.phi, D.weights, Psi)

    A = in_context.optimal_weights(D.Lambda, D.Psi, D.K, N, D.noise)
    B = np.asarray(in_context.context_second_moment(D.Lambda, D.Psi, D.K, N, D.noise))
    root, expected = np.linalg.cholesky(D.Psi), 0.0
    for (s, a), (t, b) in itertools.product(zip(*nodes, strict=True), repeat=2):
        w = root @ np.array([s, t])
        Z = np.asarray(robustness.few_task_score(A, np.outer(w, w) - D.Psi, D.Lambda, fourth, N))
        expected += a * b / (2 * np.pi) * np.trace(D.Lambda @ Z @ np.linalg.solve(B, Z.T))
    got = robustness.few_task_coefficient(D.Lambda, D.Psi, fourth, N, D.Lambda, D.noise)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_the_excess_risk_of_few_tasks_falls_as_the_coefficient_over_T():
    Lambda, N, T, copies = np.diag([1.0, 0.3]), 6, 400, 1500
    rng = np.random.default_rng(0)
    tasks = rng.normal(size=(copies, T, 2))
    B = np.asarray(in_context.context_second_moment(Lambda, np.eye(2), law.gaussian_fourth(Lambda, np.eye(2)), N))
    A = Lambda @ np.linalg.inv(B)
    excess = []
    for Psi in np.einsum("cti,ctj->cij", tasks, tasks) / T:
        K = 2 * Lambda @ Psi @ Lambda + np.trace(Psi @ Lambda) * Lambda
        AT = Psi @ Lambda @ np.linalg.inv((1 - 1 / N) * Lambda @ Psi @ Lambda + K / N)
        excess.append(np.trace(Lambda @ (AT - A) @ B @ (AT - A).T))
    C = robustness.few_task_coefficient(Lambda, np.eye(2), lambda Psi: law.gaussian_fourth(Lambda, Psi), N, Lambda)
    np.testing.assert_allclose(T * np.mean(excess), C, rtol=0.03, atol=5 * T * np.std(excess) / np.sqrt(copies))
    np.testing.assert_allclose(
        robustness.few_task_weights(tasks[0], Lambda, lambda Psi: law.gaussian_fourth(Lambda, Psi), N).shape, (2, 2)
    )


def test_the_few_task_coefficient_falls_as_one_over_N_squared():
    Lambda = np.diag([1.0, 0.3, 0.1])
    low, high = (
        robustness.few_task_coefficient(Lambda, np.eye(3), lambda Psi: law.gaussian_fourth(Lambda, Psi), N, Lambda, Lambda)
        for N in (10**4, 10**5)
    )
    np.testing.assert_allclose(low / high, 100, rtol=1e-2)


def test_tasks_in_a_subspace_leave_directions_that_depth_does_not_contract_and_no_task_uses(design):
    D = design(0)
    Psi = np.outer([1.0, 2.0, 0.0], [1.0, 2.0, 0.0])
    A = np.asarray(in_context.optimal_weights(D.Lambda, Psi, law.design_fourth(D.phi, D.weights, Psi), 20, D.noise))
    eigenvalues = np.sort(np.linalg.eigvals(np.eye(3) - A @ D.Lambda).real)
    np.testing.assert_allclose(eigenvalues[1:], 1.0, rtol=1e-9)
    deep = [robustness.depth_bias(A, D.Lambda, Psi, D.Lambda, k) for k in (1, 2, 3)]
    np.testing.assert_allclose(deep[1] / deep[0], eigenvalues[0] ** 2, rtol=1e-9)
    np.testing.assert_allclose(deep[2] / deep[1], eigenvalues[0] ** 2, rtol=1e-9)


def test_the_weights_of_few_tasks_need_the_noise_of_these_tasks():
    # two tasks, two pairs, noise of variance (x'w)^2 as for labels that depend on the task: the moment of fresh tasks is wrong
    phi, rho, tasks, N = np.eye(2), np.full(2, 0.5), np.array([[2.0, 0.5], [1.0, 1.0]]), 3
    own = sum(np.diag(rho * w**2) for w in tasks) / 2  # E[eps^2 x x'] over the two tasks
    fresh = np.diag(rho)  # over tasks with Psi = I

    def fourth(Psi):
        return law.design_fourth(phi, rho, Psi)

    ESS, ESw = np.zeros((2, 2)), np.zeros((2, 2))
    for w in tasks:
        for context in itertools.product([(i, s) for i in range(2) for s in (-1, 1)], repeat=N):
            S = sum(phi[i] * w[i] * (1 + s) for i, s in context) / N
            ESS += np.outer(S, S) / 2 / 4**N
            ESw += np.outer(S, w) / 2 / 4**N
    best = np.linalg.solve(ESS, ESw).T
    np.testing.assert_allclose(robustness.few_task_weights(tasks, np.diag(rho), fourth, N, own), best, rtol=1e-9)
    assert np.abs(robustness.few_task_weights(tasks, np.diag(rho), fourth, N, fresh) - best).max() > 0.1 * np.abs(best).max()


def test_fewer_tasks_than_dimensions_leave_a_floor_that_no_length_removes():
    Lambda, tasks = np.eye(3), np.array([[1.0, 0, 0], [0, 1.0, 0]])
    for N in (10, 10**6):
        A = robustness.few_task_weights(tasks, Lambda, lambda Psi: law.gaussian_fourth(Lambda, Psi), N)
        assert in_context.risk(A, Lambda, np.eye(3), law.gaussian_fourth(Lambda, np.eye(3)), N, Lambda).total >= 1.0
