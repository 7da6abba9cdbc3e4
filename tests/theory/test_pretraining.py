# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false, reportCallIssue=false

import itertools

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize

from lindm_theory import in_context, pretraining, robustness
from lindm_theory import moments as law


def closed_form(Lambda, Psi, N, sigma):
    """A_N, B and R of Gaussian features in numpy."""
    R = Lambda @ Psi @ Lambda + (np.trace(Psi @ Lambda) + sigma**2) * Lambda
    B = Lambda @ Psi @ Lambda + R / N
    return Psi @ Lambda @ np.linalg.inv(B), B, R


def draw_prompts(rng, T, Lambda, Psi, N, sigma):
    """(w, S, x_q), each [T, d], of Gaussian prompts."""
    d = len(Lambda)
    root = np.linalg.cholesky(Lambda)
    w = rng.normal(size=(T, d)) @ np.linalg.cholesky(Psi).T
    x = rng.normal(size=(T, N, d)) @ root.T
    y = (x @ w[:, :, None])[:, :, 0] + sigma * rng.normal(size=(T, N))
    return w, np.einsum("tn,tnd->td", y, x) / N, rng.normal(size=(T, d)) @ root.T


def exact_risk(Ahat, Lambda, Psi, B):
    return np.trace(Lambda @ (Ahat @ B @ Ahat.T - 2 * Ahat @ Lambda @ Psi + Psi))


def test_the_effective_ridge_solves_its_equation_and_is_zero_without_a_ridge_above_the_threshold():
    s = np.array([3.0, 1.0, 0.2, 0.05])
    for T, ridge in ((2.5, 0.0), (2.0, 0.7), (9.0, 0.7)):
        root = scipy.optimize.brentq(lambda k, T=T, r=ridge: np.sum(s / (s + k)) + r / k - T, 1e-9, 1e3)
        np.testing.assert_allclose(pretraining.effective_ridge(s, T, ridge), root, rtol=1e-9)
    assert pretraining.effective_ridge(s, 5.0, 0.0) < 1e-20


@pytest.mark.parametrize(("T", "ridge"), [(50, 0.0), (50, 20.0), (150, 0.0), (150, 20.0)])
def test_the_equivalent_is_the_mean_and_variance_of_ridge_regression_on_gaussian_features(T, ridge):
    rng = np.random.default_rng(T)
    p, residual = 100, 0.5
    s, target = rng.uniform(0.2, 2.0, p), rng.normal(size=p)
    fits = []
    for _ in range(80):
        Z = rng.normal(size=(T, p)) * np.sqrt(s)
        y = Z @ target + np.sqrt(residual) * rng.normal(size=T)
        fits.append(np.linalg.lstsq(Z, y)[0] if ridge == 0 else np.linalg.solve(Z.T @ Z + ridge * np.eye(p), Z.T @ y))
    mean, variance = (np.asarray(v) for v in pretraining.ridge_equivalent(s, target, residual, T, ridge))
    for measure in (s, np.ones(p), s**2):
        got = np.mean([np.sum(measure * (a - target) ** 2) for a in fits])
        np.testing.assert_allclose(got, np.sum(measure * ((mean - target) ** 2 + variance)), rtol=0.08)
    # the slope of the mean coefficients on the predicted ones
    np.testing.assert_allclose(np.mean(fits, axis=0) @ mean / (mean @ mean), 1.0, atol=0.05)


def test_the_expected_risk_is_the_mean_risk_of_weights_of_that_law(design):
    D, rng = design(0), np.random.default_rng(1)
    rows, columns = (np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(2))
    mean, variance = rng.normal(size=(3, 3)), rng.uniform(0.1, 1.0, size=(3, 3))
    got = pretraining.expected_risk(
        pretraining.WeightLaw(mean, variance, rows, columns),
        D.Lambda,
        D.Psi,
        in_context.pair_variance(D.Lambda, D.Psi, D.K, D.noise),
        7,
        np.diag([1.0, 2.0, 0.5]),
    )
    wanted = []  # one coordinate at a time is off by plus or minus 3 standard deviations: the same covariance
    for i, j, sign in itertools.product(range(3), range(3), (-3.0, 3.0)):
        A = mean + sign * np.sqrt(variance[i, j]) * np.outer(rows[:, i], columns[:, j])
        parts = in_context.risk(A, D.Lambda, D.Psi, D.K, 7, np.diag([1.0, 2.0, 0.5]), D.noise)
        wanted.append([float(parts.estimation), float(parts.bias)])
    np.testing.assert_allclose([got.estimation, got.bias], np.mean(wanted, axis=0), rtol=1e-12)


def onehot_prompts(rho, N):
    """All G of one-hot contexts with their chances: [P, d, d], [P]."""
    contexts = list(itertools.product(range(len(rho)), repeat=N))
    G = np.array([np.diag(np.bincount(c, minlength=len(rho)) / N) for c in contexts])
    return G, np.array([np.prod(rho[list(c)]) for c in contexts])


def test_the_prompt_moment_is_that_of_enumeration_over_contexts_tasks_and_noise():
    rho, Psi, N, sigma = np.array([0.6, 0.4]), np.array([[1.0, 0.3], [0.3, 0.5]]), 2, 0.7
    Lambda = np.diag(rho)
    noise = sigma**2 * Lambda
    K = np.asarray(law.onehot_fourth(rho, Psi))
    A = np.asarray(in_context.optimal_weights(Lambda, Psi, K, N, noise))
    B = np.asarray(in_context.context_second_moment(Lambda, Psi, K, N, noise))
    G, chance = onehot_prompts(rho, N)
    got = pretraining.prompt_moment(G, chance, sigma**2 * G / N, A, B, Psi)
    nodes, mass = np.polynomial.hermite_e.hermegauss(4)
    mass = mass / mass.sum()
    root, wanted = np.linalg.cholesky(Psi), np.zeros((2, 2))
    for context in itertools.product(range(2), repeat=N):
        for at in itertools.product(range(4), repeat=2 + N):
            w = root @ nodes[list(at[:2])]
            S = np.zeros(2)
            for i, k in enumerate(context):
                S[k] += (w[k] + sigma * nodes[at[2 + i]]) / N
            u = w - A @ S
            wanted += np.prod(rho[list(context)]) * np.prod(mass[list(at)]) * np.outer(u, u) * (S @ np.linalg.solve(B, S))
    np.testing.assert_allclose(got, wanted, rtol=1e-10)


def test_the_excess_of_prompts_is_the_coefficient_over_T_for_one_query_and_for_all():
    rng = np.random.default_rng(2)
    Lambda, Psi, N, sigma, T, sets = np.diag([1.5, 0.7]), np.array([[1.0, 0.4], [0.4, 0.8]]), 8, 0.5, 2000, 500
    A, B, _ = closed_form(Lambda, Psi, N, sigma)
    x = rng.normal(size=(200_000, N, 2)) @ np.sqrt(Lambda)
    G = np.einsum("pni,pnj->pij", x, x) / N
    moment = pretraining.prompt_moment(G, np.full(len(G), 1 / len(G)), sigma**2 * G / N, A, B, Psi)
    one, every, noisy = [], [], []
    for _ in range(sets):
        w, S, query = draw_prompts(rng, T, Lambda, Psi, N, sigma)
        Z = (query[:, :, None] * S[:, None, :]).reshape(T, -1)
        y = np.stack([np.sum(query * w, axis=1), np.sum(query * w, axis=1) + rng.normal(size=T)], axis=1)
        fit = np.linalg.solve(Z.T @ Z, Z.T @ y).T.reshape(2, 2, 2)
        for out, off in ((one, fit[0] - A), (noisy, fit[1] - A), (every, np.linalg.solve(S.T @ S, S.T @ w).T - A)):
            out.append(T * np.trace(Lambda @ off @ B @ off.T))
    for values, query, noise in ((one, 4 * Lambda, 0.0), (noisy, 4 * Lambda, 1.0), (every, Lambda, 0.0)):
        C = float(pretraining.prompt_coefficient(moment, query, noise))
        assert abs(np.mean(values) - C) < 4 * np.std(values) / np.sqrt(sets) + 0.04 * C
    # Gaussian features would have residual x p
    assert np.mean(one) > 1.3 * 4 * np.trace(Lambda @ (Psi - A @ Lambda @ Psi))


@pytest.mark.parametrize("seed", range(3))
def test_a_prompt_teaches_at_most_what_its_task_does(seed):
    rng = np.random.default_rng(seed)
    rho, F, N, sigma = rng.dirichlet(np.ones(3)), rng.normal(size=(3, 3)), 3, 0.4
    Lambda, Psi = np.diag(rho), F @ F.T
    noise = sigma**2 * Lambda
    K = np.asarray(law.onehot_fourth(rho, Psi))
    A = in_context.optimal_weights(Lambda, Psi, K, N, noise)
    B = in_context.context_second_moment(Lambda, Psi, K, N, noise)
    G, chance = onehot_prompts(rho, N)
    moment = pretraining.prompt_moment(G, chance, sigma**2 * G / N, A, B, Psi)
    prompt = float(pretraining.prompt_coefficient(moment, Lambda))
    # one-hot queries see one coordinate: E[x x' x'Lq^-1 x] = I
    one = float(pretraining.prompt_coefficient(moment, np.eye(3)))
    task = float(robustness.few_task_coefficient(Lambda, Psi, lambda P: law.onehot_fourth(rho, P), N, Lambda, noise))
    assert task < prompt < one
    np.testing.assert_allclose(pretraining.repeated_task_excess(task, prompt, 50, 1), prompt / 50)
    np.testing.assert_allclose(pretraining.repeated_task_excess(task, prompt, 50, 10**9), task / 50, rtol=1e-6)


def test_tasks_that_serve_several_prompts_have_the_excess_of_their_two_parts():
    rng = np.random.default_rng(5)
    Lambda, Psi, N, sigma, T, m, sets = np.eye(2), np.diag([1.0, 0.5]), 6, 0.3, 150, 16, 500
    A, B, _ = closed_form(Lambda, Psi, N, sigma)
    x = rng.normal(size=(200_000, N, 2))
    G = np.einsum("pni,pnj->pij", x, x) / N
    moment = pretraining.prompt_moment(G, np.full(len(G), 1 / len(G)), sigma**2 * G / N, A, B, Psi)
    prompt = pretraining.prompt_coefficient(moment, Lambda)
    task = robustness.few_task_coefficient(Lambda, Psi, lambda P: law.gaussian_fourth(Lambda, P), N, Lambda, sigma**2 * Lambda)
    values = []
    for _ in range(sets):
        w = np.repeat(rng.normal(size=(T, 2)) * np.sqrt(np.diag(Psi)), m, axis=0)
        x = rng.normal(size=(T * m, N, 2))
        y = (x @ w[:, :, None])[:, :, 0] + sigma * rng.normal(size=(T * m, N))
        S = np.einsum("tn,tnd->td", y, x) / N
        off = np.linalg.solve(S.T @ S, S.T @ w).T - A
        values.append(np.trace(Lambda @ off @ B @ off.T))
    wanted = float(pretraining.repeated_task_excess(task, prompt, T, m))
    assert abs(np.mean(values) - wanted) < 4 * np.std(values) / np.sqrt(sets) + 0.03 * wanted
    assert wanted > 1.1 * float(prompt) / (T * m)  # more than if every prompt had its own task


@pytest.mark.parametrize(("tau", "ridge"), [(0.5, 0.3), (1.0, 0.3), (3.0, 0.3), (3.0, 0.0)])
def test_one_query_per_prompt_follows_the_equivalent_on_matched_and_on_other_tasks(tau, ridge):
    rng = np.random.default_rng(int(8 * tau))
    d, N, sigma, sets = 12, 24, 0.5, 12
    Lambda = np.diag(np.linspace(0.6, 1.4, d))
    Psi, other = np.diag(np.linspace(1.5, 0.5, d)), np.diag(np.linspace(0.2, 2.0, d))
    A, B, R = closed_form(Lambda, Psi, N, sigma)
    _, B_other, R_other = closed_form(Lambda, other, N, sigma)
    x = rng.normal(size=(4000, N, d)) @ np.sqrt(Lambda)
    G = np.einsum("pni,pnj->pij", x, x) / N
    moment = pretraining.prompt_moment(G, np.full(len(G), 1 / len(G)), sigma**2 * G / N, A, B, Psi)
    residual = pretraining.prompt_coefficient(moment, (d + 2) * Lambda) / d**2
    T, penalty = int(tau * d * d), ridge * np.trace(Lambda) * np.trace(B)
    weights = pretraining.one_query_weights(A, B, residual, Lambda, float(T), penalty)
    measured = []
    for _ in range(sets):
        w, S, query = draw_prompts(rng, T, Lambda, Psi, N, sigma)
        Z = (query[:, :, None] * S[:, None, :]).reshape(T, -1)
        Ahat = np.linalg.solve(Z.T @ Z + penalty * np.eye(d * d), Z.T @ np.sum(query * w, axis=1)).reshape(d, d)
        measured.append([exact_risk(Ahat, Lambda, Psi, B), exact_risk(Ahat, Lambda, other, B_other)])
    matched = pretraining.expected_risk(weights, Lambda, Psi, R, N, Lambda).total
    shifted = pretraining.expected_risk(weights, Lambda, other, R_other, N, Lambda).total
    np.testing.assert_allclose(np.mean(measured, axis=0), [matched, shifted], rtol=0.06)
    assert shifted > 1.1 * matched


def test_all_queries_of_a_prompt_move_the_threshold_from_d_squared_to_d():
    rng = np.random.default_rng(3)
    d, N, sigma, sets = 24, 48, 0.5, 40
    Lambda, Psi = np.diag(np.linspace(0.6, 1.4, d)), np.diag(np.linspace(1.5, 0.5, d))
    A, B, R = closed_form(Lambda, Psi, N, sigma)
    residuals = Psi - A @ Lambda @ Psi

    def predicted(T, ridge=0.0):
        fitted = pretraining.all_query_weights(A, B, residuals, Lambda, float(T), ridge)
        return float(pretraining.expected_risk(fitted, Lambda, Psi, R, N, Lambda).total)

    for T in (d // 2, 4 * d):
        values = []
        for _ in range(sets):
            w, S, _ = draw_prompts(rng, T, Lambda, Psi, N, sigma)
            values.append(exact_risk((np.linalg.pinv(S) @ w).T, Lambda, Psi, B))
        np.testing.assert_allclose(np.mean(values), predicted(T), rtol=0.08)
    assert predicted(d + 1) > 4 * max(predicted(d // 2), predicted(2 * d))
    w, S, _ = draw_prompts(rng, 4 * d, Lambda, Psi, N, sigma)
    penalty = 0.5 * np.trace(B)
    # the gradient of sum |w - A S|^2_Lq + ridge |A|^2, row by row, as Lambda is diagonal
    fit = np.stack([np.linalg.solve(q * S.T @ S + penalty * np.eye(d), q * S.T @ w[:, i]) for i, q in enumerate(np.diag(Lambda))])
    np.testing.assert_allclose(exact_risk(fit, Lambda, Psi, B), predicted(4 * d, penalty), rtol=0.12)


def test_the_price_of_other_tasks_is_the_difference_of_two_exact_risks(design):
    D = design(2)
    other = np.diag([0.1, 1.0, 3.0])

    def fourth(P):
        return law.design_fourth(D.phi, D.weights, P)

    price = pretraining.mismatch_excess(D.Lambda, D.Psi, other, fourth, 6, D.Lambda, D.noise)
    risks = [
        in_context.risk(
            in_context.optimal_weights(D.Lambda, P, fourth(P), 6, D.noise), D.Lambda, other, fourth(other), 6, D.Lambda, D.noise
        ).total
        for P in (D.Psi, other)
    ]
    np.testing.assert_allclose(price, risks[0] - risks[1], rtol=1e-9)
    assert price > 0


def ridgeless_limit(alpha, kappa, rho):
    """Result 1 of Lu et al., arXiv 2405.11751, for T/d^2 -> infinity; h is the Stieltjes transform of the Wishart law."""
    c = (1 + rho) / alpha
    edge = c + 1 - 1 / kappa
    h = 2 / (edge + np.sqrt(edge**2 + 4 * c / kappa))
    return rho + c - 2 * c**2 * h + (1 + c) * (c * h) ** 2 / (1 - kappa * (h / (kappa + h)) ** 2)


def test_the_limit_of_many_prompts_is_that_of_the_ridgeless_formula_and_an_integral_over_the_spectrum():
    np.testing.assert_allclose(pretraining.many_prompts_limit(1.0, 10.0, 0.1), 0.63738, atol=5e-6)
    np.testing.assert_allclose(pretraining.many_prompts_limit(1.0, 2.0, 0.1), 0.69898, atol=5e-6)
    for alpha, kappa, rho in itertools.product((0.3, 1.0, 5.0), (0.5, 1.0, 2.0, 10.0), (0.0, 0.1, 1.0)):
        np.testing.assert_allclose(
            pretraining.many_prompts_limit(alpha, kappa, rho), ridgeless_limit(alpha, kappa, rho), rtol=1e-9
        )
    alpha, kappa, rho = 2.0, 0.5, 0.3  # fewer tasks than dimensions: half of the spectrum is zero
    c, y = (1 + rho) / alpha, 1 / kappa
    low, high = (1 - y**0.5) ** 2, (1 + y**0.5) ** 2
    bulk = scipy.integrate.quad(
        lambda s: (c**2 + c * s**2) / (s + c) ** 2 * np.sqrt((high - s) * (s - low)) / (2 * np.pi * y * s), low, high
    )[0]
    np.testing.assert_allclose(pretraining.many_prompts_limit(alpha, kappa, rho), rho + 1 - kappa + bulk, rtol=1e-7)
    many = float(pretraining.many_prompts_limit(1.0, 1e7, 0.1))  # no limit on the tasks: 1/(1 + alpha/(1 + rho)) + rho
    np.testing.assert_allclose(many, 1 / (1 + 1 / 1.1) + 0.1, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kappa", "limit"), [(10, 0.63738), (2, 0.69898)])
def test_direct_simulation_at_d_120_comes_to_the_limits(kappa, limit):
    rng = np.random.default_rng(kappa)
    d, rho = 120, 0.1
    N, Lambda = d, np.eye(d) / d
    tasks = rng.normal(size=(kappa * d, d))
    A = np.asarray(robustness.few_task_weights(tasks, Lambda, lambda P: law.gaussian_fourth(Lambda, P), N, rho * Lambda))
    errors = []
    for _ in range(10):
        w, S, query = draw_prompts(rng, 300, Lambda, np.eye(d), N, np.sqrt(rho))
        label = np.sum(query * w, axis=1) + np.sqrt(rho) * rng.normal(size=300)
        errors.append(np.mean((label - np.sum(query * (S @ A.T), axis=1)) ** 2))
    assert abs(np.mean(errors) - limit) < 4 * np.std(errors) / np.sqrt(10) + 0.01
    assert abs(np.mean(errors) - rho - limit) > 0.05  # the limit contains the noise of the query's label
