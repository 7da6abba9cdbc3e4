"""Fine-tuning from A_N(Psi_0): paths against ODE solvers, limits against enumeration and searches in numpy."""
# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.optimize

from lindm_theory import fine_tuning as tuning
from lindm_theory import gradient_flow as flow
from lindm_theory import in_context, robustness
from lindm_theory.moments import design_fourth
from tests.theory.two_laws import Case, N, ode, second_moment


@pytest.fixture
def case(design):
    return lambda seed, d=3: Case(design, seed, d)


def test_the_reduced_path_is_the_matrix_exponential_of_the_whole_operator(case):
    c = case(0)
    times = jnp.array([0.0, 0.3, 2.0, 40.0])
    path = tuning.reduced_path(c.A0, c.B1, c.C1, c.Lq, times)
    operator = np.kron(c.Lq, c.B1)  # of the rows of A, one after the other
    for t, A in zip(times, path, strict=True):
        wanted = c.A1 + (scipy.linalg.expm(-float(t) * operator) @ (c.A0 - c.A1).ravel()).reshape(3, 3)
        np.testing.assert_allclose(A, wanted, atol=1e-10)


def test_all_weights_follow_the_balanced_field_to_the_new_optimum(case):
    c = case(1)
    U, u = flow.limit(jnp.asarray(c.A0))
    dU, du = flow.vector_field(U, u, c.B1, c.C1, c.Lq)
    np.testing.assert_allclose(tuning.balanced_field(c.A0, c.B1, c.C1, c.Lq), (u * dU + du * U).T, rtol=1e-9, atol=1e-12)
    assert c.risk(c.A0, 1) < c.risk(0 * c.A0, 1)
    step = 0.2 / (np.linalg.norm(c.A0) * np.linalg.norm(c.B1, 2) * np.linalg.norm(c.Lq, 2) + 1)
    path_U, path_u = flow.integrate(U, u, c.B1, c.C1, c.Lq, step=step, steps=80_000)
    end = np.asarray(path_u[-1] * path_U[-1].T)
    assert c.risk(end, 1) - c.risk(c.A1, 1) < 1e-3 * (c.risk(c.A0, 1) - c.risk(c.A1, 1))
    np.testing.assert_allclose(flow.conserved(path_U[-1], path_u[-1]), 0.0, atol=1e-6)


def test_the_key_query_matrix_alone_goes_the_same_way_at_another_speed(case):
    c = case(2)
    U0, u = (np.asarray(a) for a in flow.limit(jnp.asarray(c.A0)))

    def slope(y):
        U = y.reshape(3, 3)
        return -(u**2 * c.B1 @ U @ c.Lq - u * c.C1 @ c.Lq).ravel()

    end = u * ode(slope, U0.ravel(), 1.7).reshape(3, 3).T
    np.testing.assert_allclose(tuning.key_query_path(c.A0, c.B1, c.C1, c.Lq, jnp.array([1.7]))[0], end, atol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_the_value_weight_alone_only_rescales_and_no_greedy_action_changes(case, seed):
    c = case(seed)
    U, u0 = (np.asarray(a) for a in flow.limit(jnp.asarray(c.A0)))
    times = jnp.linspace(0, 5, 6)
    scales = np.asarray(tuning.value_path(c.A0, c.B1, c.C1, c.Lq, times))

    def slope(u):
        return -(u * np.trace(c.B1 @ U @ c.Lq @ U.T) - np.trace(c.C1 @ c.Lq @ U.T))

    np.testing.assert_allclose(scales[-1], ode(slope, [float(u0)], 5.0)[0] / u0, rtol=1e-7)
    limit = float(tuning.value_limit(c.A0, c.B1, c.C1, c.Lq))
    around = [c.risk(s * c.A0, 1) for s in (limit - 1e-3, limit, limit + 1e-3)]
    assert around[1] < min(around[0], around[2])
    assert (limit > 0.5) == (c.risk(c.A0, 1) < c.risk(0 * c.A0, 1))
    contexts = np.random.default_rng(seed).normal(size=(200, 3))
    Q = np.einsum("ai,ij,cj->ca", c.D.phi, c.A0, contexts)
    if limit > 0:
        for s in scales:
            assert (s * Q).argmax(1).tolist() == Q.argmax(1).tolist()


def test_the_best_scale_can_be_negative_and_then_the_old_layer_is_worse_than_none(case):
    """A single new task in a direction that the old layer maps backwards, seen from the queries."""
    c = case(3)
    Lq = np.eye(3)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(4000):
        root = rng.normal(size=(3, 3)) * np.geomspace(30, 0.1, 3)
        Lq = root @ root.T
        gain = Lq @ c.A0 @ c.D.Lambda
        values, vectors = np.linalg.eigh(gain + gain.T)
        if values[0] < -1e-3:
            found.append((Lq, vectors[:, 0]))
    assert found
    Lq, w = found[0]
    Psi = np.outer(w, w)
    B = second_moment(c.D, Psi)
    assert tuning.value_limit(c.A0, B, c.D.Lambda @ Psi, Lq) < 0
    assert tuning.value_path(c.A0, B, c.D.Lambda @ Psi, Lq, jnp.array([1e6]))[0] < 0
    # the risk of A_0 on this task, over all contexts; the noise of the labels is independent, so it only adds
    contexts = np.array(list(itertools.product(range(len(c.D.weights)), repeat=N)))
    x = c.D.phi[contexts]
    error = np.einsum("cni,cn,ji->cj", x, x @ w, c.A0) / N - w
    risk = c.D.weights[contexts].prod(1) @ np.einsum("ci,ij,cj->c", error, Lq, error)
    assert risk > w @ Lq @ w
    risk += np.trace(Lq @ c.A0 @ c.D.noise @ c.A0.T) / N
    np.testing.assert_allclose(risk, np.trace(Lq @ (c.A0 @ B @ c.A0.T - 2 * c.A0 @ c.D.Lambda @ Psi + Psi)), rtol=1e-9)


def test_forgetting_rises_all_the_way_if_old_and_new_moments_commute_and_may_fall_if_not(case):
    c = case(4)
    times = jnp.geomspace(1e-2, 1e5, 200)

    def forgetting(B0, A0, A1, B1, Lq):
        path = np.asarray(tuning.reduced_path(A0, B1, (A1 @ B1).T, Lq, times))
        return np.array([np.trace(Lq @ (A - A0) @ B0 @ (A - A0).T) for A in path])

    B1, power = c.B1, c.B1 @ c.B1
    assert np.all(np.diff(forgetting(power, c.A0, c.A1, B1, c.Lq)) >= -1e-12)
    # two modes of which the fast one moves out and the slow one back, seen through B_0
    B0 = np.array([[1.0, 0.9], [0.9, 1.0]])
    A1 = np.array([[1.0, -1.0], [0.0, 0.0]])
    away = forgetting(B0, np.zeros((2, 2)), A1, np.diag([1.0, 1e-3]), np.eye(2))
    assert away.max() > 4 * away[-1]


def test_replay_is_the_optimum_of_the_mixed_tasks_and_no_layer_is_below_its_frontier(case):
    c = case(5)
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 0.8, 1.0):
        A = np.asarray(tuning.replay_weights(share, c.B0, c.C0, c.B1, c.C1))
        Psi = share * c.Psi0 + (1 - share) * c.Psi1
        mixed = in_context.optimal_weights(c.D.Lambda, Psi, c.fourth(Psi), N, c.D.noise)
        np.testing.assert_allclose(A, mixed, rtol=1e-9)
        least = share * c.risk(A, 0) + (1 - share) * c.risk(A, 1)
        paths = [
            *np.asarray(tuning.reduced_path(c.A0, c.B1, c.C1, c.Lq, jnp.geomspace(0.01, 100, 20))),
            *(s * c.A0 for s in np.linspace(0.3, 2, 20)),
            *(A + 0.1 * rng.normal(size=A.shape) for _ in range(50)),
        ]
        assert all(share * c.risk(B, 0) + (1 - share) * c.risk(B, 1) > least - 1e-12 for B in paths)


def test_in_one_dimension_every_stopping_time_is_on_the_frontier(case):
    c = case(6, d=1)
    for A in tuning.reduced_path(c.A0, c.B1, c.C1, c.Lq, jnp.array([0.1, 1.0, 3.0]) / (c.B1 * c.Lq).item()):
        # the share whose optimum is A: (A - A_0) p B_0 + (A - A_1) (1 - p) B_1 = 0
        old, new = ((A - c.A0) @ c.B0).item(), ((A - c.A1) @ c.B1).item()
        share = new / (new - old)
        assert 0 < share < 1
        np.testing.assert_allclose(tuning.replay_weights(share, c.B0, c.C0, c.B1, c.C1), A, rtol=1e-8)


def _excess(off, Lq, B):
    return np.trace(Lq @ off @ B @ off.T)


def _left_by_replay(forgotten, A0, A1, B0, B1, Lq):
    """What replay with the share that forgets as much leaves to learn, by bisection."""

    def replay(share):
        return np.asarray(tuning.replay_weights(share, B0, B0 @ A0.T, B1, B1 @ A1.T))

    share = scipy.optimize.brentq(lambda p: _excess(replay(p) - A0, Lq, B0) - forgotten, 0, 1, xtol=1e-13)
    return _excess(replay(share) - A1, Lq, B1)


def test_with_proportional_moments_early_stopping_is_worse_than_replay_if_its_rates_differ():
    B, A0, A1 = np.diag([1.0, 0.1]), np.array([[1.0, 1.0], [0.0, 0.0]]), np.zeros((2, 2))
    for scale in (1.0, 3.0):  # B_0 = scale B_1
        path = np.asarray(tuning.reduced_path(A0, B, B @ A1.T, np.eye(2), jnp.array([0.2, 1.0, 4.0])))
        left = [_excess(A - A1, np.eye(2), B) for A in path]
        replay = [_left_by_replay(_excess(A - A0, np.eye(2), scale * B), A0, A1, scale * B, B, np.eye(2)) for A in path]
        assert np.all(np.array(left) > 1.01 * np.array(replay))
        # at time 1: rates 1 and .1; replay goes straight
        np.testing.assert_allclose(left[1], np.exp(-2) + 0.1 * np.exp(-0.2), rtol=1e-9)
        straight = np.sqrt(((1 - np.exp(-1)) ** 2 + 0.1 * (1 - np.exp(-0.1)) ** 2) / 1.1)
        np.testing.assert_allclose(replay[1], 1.1 * (1 - straight) ** 2, rtol=1e-7)
        np.testing.assert_allclose([left[1], replay[1]], [0.217, 0.173], atol=5e-4)


def test_early_stopping_is_replay_if_the_step_has_one_rate_and_its_moments_are_proportional_and_not_if_one_of_both_fails():
    """Lq Delta B_1 = lambda Delta, Delta B_1 = beta Delta B_0, for a Delta of rank 2 in three dimensions."""
    rng = np.random.default_rng(0)
    P, R = (np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(2))
    Delta = P[:, :2] @ np.diag([1.0, -0.7]) @ R[:, :2].T
    A1, beta, rate = rng.normal(size=(3, 3)), 0.6, 2.0
    A0, times = A1 + Delta, np.array([0.1, 0.5, 1.5])

    def gaps(queries=(1.0, 2.0, 0.3), old=(2.0, 1.0)):
        """(left by early stopping) / (left by replay) - 1, and the stopped layers."""
        Lq, B1 = P @ np.diag(queries) @ P.T, R @ np.diag([2.0, 1.0, 0.4]) @ R.T
        B0 = R @ np.diag([*(np.array(old) / beta), 5.0]) @ R.T  # not proportional to B_1
        path = np.asarray(tuning.reduced_path(A0, B1, B1 @ A1.T, Lq, jnp.asarray(times)))
        left = [_excess(A - A1, Lq, B1) / _left_by_replay(_excess(A - A0, Lq, B0), A0, A1, B0, B1, Lq) for A in path]
        return np.array(left) - 1, path, B0, B1

    gap, path, B0, B1 = gaps()
    np.testing.assert_allclose(gap, 0, atol=1e-7)
    for A, t in zip(path, times, strict=True):
        left = np.exp(-rate * t)
        np.testing.assert_allclose(A, A1 + left * Delta, atol=1e-10)
        share = beta * left / (1 - left + beta * left)
        np.testing.assert_allclose(tuning.replay_weights(share, B0, B0 @ A0.T, B1, B1 @ A1.T), A, atol=1e-9)
    assert np.all(gaps(queries=(1.0, 4.0, 0.3))[0] > 1e-3)  # two rates
    assert np.all(gaps(old=(2.0, 3.0))[0] > 1e-3)  # old and new moments not proportional on Delta


@pytest.mark.parametrize("seed", range(3))
def test_forgetting_starts_with_the_square_of_the_gain(case, seed):
    c = case(seed)

    def ratio(A):
        return (c.risk(A, 0) - c.risk(c.A0, 0)) / (c.risk(c.A0, 1) - c.risk(A, 1)) ** 2

    small = 2e-5
    reduced = np.asarray(tuning.reduced_path(c.A0, c.B1, c.C1, c.Lq, jnp.array([small])))[0]
    velocity = -c.Lq @ (c.A0 @ c.B1 - c.C1.T)
    kappa = tuning.start_curvature(velocity, c.A0, c.B0, c.B1, c.C1, c.Lq)
    np.testing.assert_allclose(ratio(reduced), kappa, rtol=2e-3)
    balanced = tuning.balanced_field(c.A0, c.B1, c.C1, c.Lq)
    other = tuning.start_curvature(balanced, c.A0, c.B0, c.B1, c.C1, c.Lq)
    np.testing.assert_allclose(ratio(c.A0 + small * np.asarray(balanced)), other, rtol=2e-3)
    least = tuning.least_start_curvature(c.A0, c.B0, c.B1, c.C1, c.Lq)
    rng = np.random.default_rng(seed)
    for V in (velocity, balanced, c.A0, *rng.normal(size=(30, 3, 3))):
        assert tuning.start_curvature(V, c.A0, c.B0, c.B1, c.C1, c.Lq) >= least * (1 - 1e-12)
    natural = (c.A0 @ c.B1 - c.C1.T) @ np.linalg.inv(c.B0)
    np.testing.assert_allclose(tuning.start_curvature(natural, c.A0, c.B0, c.B1, c.C1, c.Lq), least, rtol=1e-9)
    replay = np.asarray(tuning.replay_weights(1 - 1e-4, c.B0, c.C0, c.B1, c.C1))
    np.testing.assert_allclose(ratio(replay), least, rtol=5e-3)


def test_forgetting_with_few_new_tasks_follows_its_first_order(case):
    c = case(9)
    rng = np.random.default_rng(1)
    tasks = np.linalg.cholesky(c.Psi1) @ rng.uniform(-1, 1, size=(3, 400)) * np.sqrt(3)
    tasks = tasks.T
    Psi = tasks.T @ tasks / len(tasks)
    noise, L = c.D.noise, c.D.Lambda

    def forgetting(Psi):
        A = Psi @ L @ np.linalg.inv(second_moment(c.D, Psi))
        return np.trace(c.Lq @ (A - c.A0) @ c.B0 @ (A - c.A0).T)

    T = 60
    coefficient = float(tuning.few_task_forgetting(c.A0, c.B0, tasks, L, c.fourth, N, c.Lq, noise))
    x = np.stack([np.outer(w, w) for w in tasks])
    A, inverse = Psi @ L @ np.linalg.inv(second_moment(c.D, Psi)), np.linalg.inv(second_moment(c.D, Psi))

    def first_order(E):
        Z = E @ L - A @ (second_moment(c.D, E) - noise / N)
        return 2 * np.trace(c.Lq @ Z @ inverse @ c.B0 @ (A - c.A0).T)  # of mean zero: subtracting it removes most of the variance

    draws = [x[rng.integers(0, len(x), T)].mean(0) for _ in range(1500)]
    values = np.array([forgetting(P) - first_order(P - Psi) for P in draws])
    error = values.std() / np.sqrt(len(values))
    measured = T * (values.mean() - forgetting(Psi))
    assert abs(measured - coefficient) < 4 * T * error + 0.15 * abs(coefficient)
    assert abs(coefficient) > 4 * T * error  # the comparison can fail


@jax.jit
def _correction(phi, weights, Lambda, noise, Lq, A0, B0, tasks, times):
    fourth = partial(design_fourth, phi, weights)
    return tuning.few_task_correction(A0, B0, tasks, Lambda, fourth, N, Lq, times, noise)


def correction(c, tasks, times, length=300):
    """One compiled program for all tests."""
    padded = np.append(times, np.full(length - len(times), times[-1]))
    both = _correction(c.D.phi, c.D.weights, c.D.Lambda, c.D.noise, c.Lq, c.A0, c.B0, tasks, padded)
    return [np.asarray(part)[: len(times)] for part in both]


def slowest(c):
    return np.linalg.eigvalsh(c.Lq)[0] * np.linalg.eigvalsh(c.B1)[0]


def gaussian_tasks(c, seed, number=100):
    w = np.random.default_rng(seed).normal(size=(number, 3))
    w = np.linalg.solve(np.linalg.cholesky(w.T @ w / number), w.T).T @ np.linalg.cholesky(c.Psi1).T
    return w  # their second moment is Psi_1


def test_the_correction_of_few_tasks_at_every_time_is_that_of_many_small_sets(case):
    c = case(0)
    tasks, times = gaussian_tasks(c, 0), np.array([0.02, 0.2, 1.0]) / slowest(c)
    x, T = np.einsum("pi,pj->pij", tasks, tasks), 100
    queries, P = np.linalg.eigh(c.Lq)

    def risks(Psi):
        B, C = second_moment(c.D, Psi), c.D.Lambda @ Psi
        A = C.T @ np.linalg.inv(B)
        out = []
        for t in times:
            rows = [scipy.linalg.expm(-t * q * B) for q in queries]
            path = A + P @ np.stack([row @ e for row, e in zip(P.T @ (c.A0 - A), rows, strict=True)])
            out.append([np.trace(c.Lq @ (path - Z) @ M @ (path - Z).T) for Z, M in ((c.A1, c.B1), (c.A0, c.B0))])
        return np.array(out)

    rng = np.random.default_rng(5)
    # every set with its mirror image about Psi_1: what is odd in the deviation cancels
    deviations = [x[rng.integers(0, len(x), T)].mean(0) - c.Psi1 for _ in range(200)]
    values = np.array([(risks(c.Psi1 + E) + risks(c.Psi1 - E)) / 2 - risks(c.Psi1) for E in deviations])
    measured, error = T * values.mean(0), T * values.std(0) / np.sqrt(len(values))
    exact = np.stack(correction(c, tasks, times), axis=1)
    assert np.all(np.abs(measured - exact) < 4 * error + 0.05 * np.abs(exact))
    assert np.all(np.abs(exact) > 3 * error)  # the comparison can fail


def test_the_correction_tends_to_the_constants_of_the_optimum_of_few_tasks_which_may_forget_less(case):
    signs = []
    for seed in (0, 1):
        c = case(seed)
        tasks = gaussian_tasks(c, seed)
        new, old = correction(c, tasks, np.array([30.0]) / slowest(c))
        forgotten = tuning.few_task_forgetting(c.A0, c.B0, tasks, c.D.Lambda, c.fourth, N, c.Lq, c.D.noise)
        np.testing.assert_allclose(old[0], forgotten, rtol=1e-6)
        scores = [robustness.few_task_score(c.A1, np.outer(w, w) - c.Psi1, c.D.Lambda, c.fourth, N) for w in tasks]
        learned = np.mean([np.trace(c.Lq @ Z @ np.linalg.solve(c.B1, Z.T)) for Z in scores])
        np.testing.assert_allclose(new[0], learned, rtol=1e-6)
        signs.append(np.sign(old[0]))
    assert signs == [1, -1]


def test_the_best_stopping_time_grows_as_the_logarithm_of_the_tasks_or_there_is_none(case):
    """To first order in 1/T: it is finite where c_1 comes to its limit from below, and none where it comes from above."""
    for seed, below in ((11, True), (10, False)):
        c = case(seed)
        r = slowest(c)
        times = np.linspace(0.02, 24, 300) / r
        new, _ = correction(c, gaussian_tasks(c, seed), times)
        assert np.all((new[-200:-120] < new[-1]) == below)
        learned = np.array([c.risk(A, 1) for A in np.asarray(tuning.reduced_path(c.A0, c.B1, c.C1, c.Lq, jnp.asarray(times)))])
        best = [times[np.argmin(learned - c.risk(c.A1, 1) + new / T)] * r for T in (1e3, 1e5)]
        if below:
            assert best[1] < 20
            assert 0.5 * np.log(100) < best[1] - best[0] < 2 * np.log(100)
        else:
            assert min(best) > 20
