"""The value row in fine-tuning: its best and its risk against all contexts, zero-shot training, and what old tasks lose."""
# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lindm_theory import fine_tuning as tuning
from lindm_theory import gradient_flow as flow
from lindm_theory import in_context
from tests.theory.two_laws import Case, N, ode


@pytest.fixture
def case(design):
    return lambda seed, d=3: Case(design, seed, d)


def enumerated(c, tasks, chances, U, length=2):
    """All contexts of `length` pairs, without noise: (chance, G, w) of every task and context."""
    n = len(c.D.weights)
    for w, chance in zip(tasks, chances, strict=True):
        for context in itertools.product(range(n), repeat=length):
            x = c.D.phi[list(context)]
            yield chance * np.prod(c.D.weights[list(context)]), x.T @ x / length, w


def test_the_value_row_is_the_least_squares_solution_over_all_contexts(case):
    c = case(7)
    rng = np.random.default_rng(3)
    tasks, chances, U = rng.normal(size=(4, 3)) + 0.8, rng.dirichlet(np.ones(4)), rng.normal(size=(3, 3))
    mean, Psi = chances @ tasks, np.einsum("t,ti,tj->ij", chances, tasks, tasks)
    root = np.linalg.cholesky(c.Lq)
    rows, targets = [], []
    for chance, G, w in enumerated(c, tasks, chances, U):
        rows.append(np.sqrt(chance) * root.T @ U.T @ np.column_stack([G, G @ w]))
        targets.append(np.sqrt(chance) * root.T @ w)
    rows, targets = np.concatenate(rows), np.concatenate(targets)
    best = np.linalg.lstsq(rows, targets, rcond=None)[0]
    row = tuning.value_row_limit(U, c.D.Lambda, Psi, mean, c.fourth, 2, c.Lq)
    np.testing.assert_allclose(row.v, best[:3], rtol=1e-7)
    np.testing.assert_allclose(row.u, best[3], rtol=1e-7)
    for v, u in ((best[:3], best[3]), (rng.normal(size=3), 0.4), (rng.normal(size=3), 0.0)):
        risk = np.sum((rows @ np.append(v, u) - targets) ** 2)
        value = tuning.value_row_risk(tuning.ValueRow(v, jnp.asarray(u)), U, c.D.Lambda, Psi, mean, c.fourth, 2, c.Lq)
        np.testing.assert_allclose(value, risk, rtol=1e-9)


def test_what_zero_shot_training_gains_is_what_old_tasks_of_mean_zero_lose(case):
    c = case(8)
    U, u0 = flow.limit(jnp.asarray(c.A0))
    m = np.array([0.7, -0.4, 0.5])
    shared = (c.D.Lambda,), (c.fourth, N, c.Lq)
    times = jnp.array([0.1, 1.0, 10.0, 1e7])
    path, cost = tuning.zero_shot_path(U, c.D.Lambda, m, c.fourth, N, c.Lq, times)
    C = np.asarray(U @ c.Lq @ U.T)
    K = np.asarray(in_context.context_second_moment(c.D.Lambda, C, c.fourth(C), N))
    pull = c.D.Lambda @ np.asarray(U) @ c.Lq @ m
    np.testing.assert_allclose(path[1], ode(lambda v: pull - K @ v, np.zeros(3), 1.0), atol=1e-7)

    def risk(v, u, Psi, mean, noise):
        return tuning.value_row_risk(tuning.ValueRow(v, u), U, *shared[0], Psi, mean, *shared[1], noise)

    zero = jnp.zeros(())
    Psi1 = c.Psi1 + np.outer(m, m)
    gain = [risk(0 * v, zero, Psi1, m, None) - risk(v, zero, Psi1, m, None) for v in path]
    lost = [risk(v, u0, c.Psi0, 0 * m, c.D.noise) - c.risk(c.A0, 0) for v in path]
    np.testing.assert_allclose(lost, cost, rtol=1e-7)
    assert all(f <= g * (1 + 1e-9) for f, g in zip(lost, gain, strict=True))
    np.testing.assert_allclose(lost[-1], gain[-1], rtol=1e-6)
    assert lost[0] < 0.5 * gain[0]


def labeled_change(length, Psi0, sigma, m, times):
    """Zero-shot training in d = 1, Gaussian x: v, u_0 and K, the function's change of risk on labeled prompts of new tasks."""
    one = np.ones((1, 1))

    def fourth(P):
        return 3 * P

    A0 = in_context.optimal_weights(one, Psi0 * one, fourth(Psi0 * one), length, sigma**2 * one)
    U, u0 = flow.limit(A0)
    mean, Psi = np.array([m]), (m**2 + 0.5) * one
    v, _ = tuning.zero_shot_path(U, one, mean, fourth, length, one, times)

    def risk(v):
        return tuning.value_row_risk(tuning.ValueRow(v, u0), U, one, Psi, mean, fourth, length, one, sigma**2 * one)

    change = np.array([risk(a) - risk(0 * a) for a in v])
    return np.asarray(v)[:, 0], float(u0), U.item(), change


def test_labeled_prompts_of_the_new_tasks_lose_by_zero_shot_training_when_long_and_may_gain_when_short():
    """N = 2: all contexts of the law with three points that has the moments of a Gaussian, and noise of two values."""
    sigma, m, times = 3.0, 1.0, jnp.array([1.0, 10.0, 1e5])
    v, u0, U, change = labeled_change(2, 0.2, sigma, m, times)
    z, weight = np.polynomial.hermite_e.hermegauss(3)
    weight = weight / weight.sum()
    before, after = 0.0, np.zeros(3)
    for w in m + np.sqrt(0.5) * np.array([-1, 1]):
        for i, j, *signs in itertools.product(range(3), range(3), (-1, 1), (-1, 1)):
            x = z[[i, j]]
            y = x * w + sigma * np.array(signs)
            chance = weight[i] * weight[j] / 8
            before += chance * (U * u0 * np.mean(x * y) - w) ** 2
            after += chance * (U * (np.mean(x * x) * v + u0 * np.mean(x * y)) - w) ** 2
    np.testing.assert_allclose(change, after - before, rtol=1e-8)
    np.testing.assert_allclose(after[-1] - before, -0.42, atol=5e-3)
    # by hand: K = 2 U^2, K b = U m
    K, b = 2 * U**2, m / (2 * U)
    np.testing.assert_allclose(v[-1], b, rtol=1e-9)
    np.testing.assert_allclose(change, K * v**2 + 2 * u0 * K * m * v - 2 * K * b * v, rtol=1e-8)
    np.testing.assert_allclose(change[-1], 2 * u0 * b * K * m - b * K * b, rtol=1e-8)
    *_, long = labeled_change(400, 0.2, sigma, m, times)
    assert long[-1] > 0.5


def test_the_change_on_labeled_prompts_of_new_tasks_in_three_dimensions_is_that_of_all_contexts(case):
    c = case(8)
    rng = np.random.default_rng(4)
    tasks, chances = rng.normal(size=(4, 3)) + 0.8, rng.dirichlet(np.ones(4))
    m, U, u0 = chances @ tasks, rng.normal(size=(3, 3)), 0.4
    path, _ = tuning.zero_shot_path(U, c.D.Lambda, m, c.fourth, 2, c.Lq, jnp.array([1e9]))
    b, C = np.asarray(path)[0], U @ c.Lq @ U.T
    change, K = 0.0, np.zeros((3, 3))
    for chance, G, w in enumerated(c, tasks, chances, U):  # without noise, which does not enter the change
        for sign, v in ((1, b), (-1, 0 * b)):
            off = U.T @ (G @ v + u0 * G @ w) - w
            change += sign * chance * off @ c.Lq @ off
        K += chance * G @ C @ G
    np.testing.assert_allclose(b, np.linalg.solve(K, c.D.Lambda @ U @ c.Lq @ m), rtol=1e-6)
    np.testing.assert_allclose(change, 2 * u0 * b @ K @ m - b @ K @ b, rtol=1e-6)
