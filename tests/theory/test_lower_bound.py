# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false, reportCallIssue=false

import itertools

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from lindm_theory import lower_bound, moments


def population(seed, P=5, d=3):
    """Lambda [P, d, d], w [P, d], weights [P] and a query moment."""
    rng = np.random.default_rng(seed)
    F = rng.normal(size=(P, d, d))
    return F @ np.swapaxes(F, 1, 2) / d, rng.normal(size=(P, d)), rng.dirichlet(np.ones(P)), np.diag([1.0, 2.0, 0.5])


@pytest.mark.parametrize("seed", range(3))
def test_the_floor_is_the_least_error_of_any_matrix_on_infinite_contexts(seed):
    Lambda, w, p, Lq = population(seed)

    def error(A):
        off = np.array([A.reshape(3, 3) @ L @ v - v for L, v in zip(Lambda, w, strict=True)])
        return np.sum(p * np.einsum("pi,ij,pj->p", off, Lq, off))

    Psi, m, D = lower_bound.task_moments(Lambda, w, p)
    floor = float(lower_bound.floor(Psi, m, D, Lq))
    found = scipy.optimize.minimize(error, np.zeros(9), method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(found.fun, floor, rtol=1e-6)
    np.testing.assert_allclose(error(np.asarray(lower_bound.limit_weights(m, D)).ravel()), floor, rtol=1e-9)
    assert floor > 0.05


def test_one_task_and_a_singular_moment_leave_no_floor():
    Lambda, w, _, Lq = population(0, P=1)
    Psi, m, D = lower_bound.task_moments(Lambda, w, np.ones(1))  # D has rank one
    assert abs(lower_bound.floor(Psi, m, D, Lq)) < 1e-12


def test_the_risk_is_that_of_all_contexts_of_all_tasks_and_never_below_the_floor():
    rng = np.random.default_rng(1)
    phi, laws, w = rng.normal(size=(3, 2)), rng.dirichlet(np.ones(3), size=4), rng.normal(size=(4, 2))
    p, Lq, M = np.array([0.3, 0.4, 0.1, 0.2]), np.diag([1.0, 3.0]), 3
    Lambda = np.array([(phi * law[:, None]).T @ phi for law in laws])
    Psi, m, D = lower_bound.task_moments(Lambda, w, p)
    R = sum(p[t] * np.asarray(moments.pair_covariance(phi, laws[t], w[t])) for t in range(4))
    floor = float(lower_bound.floor(Psi, m, D, Lq))
    for A in (rng.normal(size=(2, 2)), np.asarray(lower_bound.limit_weights(m, D))):
        wanted = 0.0
        for t in range(4):
            for context in itertools.product(range(3), repeat=M):
                x = phi[list(context)]
                off = A @ (x.T @ (x @ w[t]) / M) - w[t]
                wanted += p[t] * np.prod(laws[t][list(context)]) * off @ Lq @ off
        got = lower_bound.task_risk(A, Psi, m, D, R, M, Lq)
        np.testing.assert_allclose(got.total, wanted, rtol=1e-10)
        assert got.bias >= floor * (1 - 1e-12) > 0.01 and got.estimation > 0
    np.testing.assert_allclose(got.bias, floor, rtol=1e-9)
    np.testing.assert_allclose(lower_bound.task_risk(A, Psi, m, D, R, 1e9, Lq).total, floor, rtol=1e-6)


def product_law(c, Psi, Lambda):
    """Tasks w = columns of a root of d Psi, each with every scale: w independent of c."""
    d = len(Psi)
    tasks = np.sqrt(d) * np.linalg.cholesky(Psi).T
    pairs = list(itertools.product(range(len(c)), range(d)))
    return np.array([c[i] * Lambda for i, _ in pairs]), np.array([tasks[j] for _, j in pairs]), [i for i, _ in pairs]


def test_of_scales_alone_the_floor_is_the_relative_variance_and_normalization_removes_it():
    c, p = np.array([0.2, 0.5, 1.0]), np.array([0.5, 0.3, 0.2])
    Psi, Lambda, Lq = np.array([[1.0, 0.3], [0.3, 0.5]]), np.diag([2.0, 0.7]), np.diag([1.0, 4.0])
    Lambdas, w, which = product_law(c, Psi, Lambda)
    weights = p[which] / 2
    got = lower_bound.floor(*lower_bound.task_moments(Lambdas, w, weights), Lq)
    wanted = lower_bound.scale_floor(c, p, Psi, Lq)
    variance = p @ c**2 - (p @ c) ** 2
    np.testing.assert_allclose([got, wanted], np.trace(Lq @ Psi) * variance / (p @ c**2), rtol=1e-10)
    normalized = Lambdas / np.trace(Lambdas, axis1=1, axis2=2)[:, None, None]
    assert abs(lower_bound.floor(*lower_bound.task_moments(normalized, w, weights), Lq)) < 1e-10


def test_covariances_that_differ_where_no_task_looks_and_d_tasks_leave_no_floor():
    def floor(w):
        Lambda = np.array([np.diag([1.0, 1.0]), np.diag([1.0, 3.0])])
        pairs = np.array([L for L in Lambda for _ in w]), np.tile(w, (2, 1)), np.full(2 * len(w), 0.5 / len(w))
        return lower_bound.floor(*lower_bound.task_moments(*pairs), np.eye(2))

    # w = +-e_1, and Lambda differs in the second coordinate only: Psi is singular
    assert abs(floor(np.array([[1.0, 0.0], [-1.0, 0.0]]))) < 1e-12
    assert floor(np.array([[1.0, 1.0], [-1.0, 1.0]])) > 0.1
    # as many tasks as dimensions: A sends each Lambda_t w to its w
    Lambda, w, p, Lq = population(5, P=3)
    assert abs(lower_bound.floor(*lower_bound.task_moments(Lambda, w, p), Lq)) < 1e-9


def test_depth_follows_its_recursion_and_goes_through_the_floor():
    Lambda, w, p, Lq = population(2)
    A = 1.0 / np.linalg.eigvalsh(Lambda).max() * np.eye(3)
    floor = float(lower_bound.floor(*lower_bound.task_moments(Lambda, w, p), Lq))
    guess = np.zeros_like(w)
    for k in (1, 2, 3):
        guess = guess + np.array([A @ (L @ v - L @ g) for L, v, g in zip(Lambda, w, guess, strict=True)])
        wanted = np.sum(p * np.einsum("pi,ij,pj->p", guess - w, Lq, guess - w))
        np.testing.assert_allclose(lower_bound.depth_floor(A, Lambda, w, p, Lq, k), wanted, rtol=1e-10)
    assert lower_bound.depth_floor(A, Lambda, w, p, Lq, 1) >= floor
    assert lower_bound.depth_floor(A, Lambda, w, p, Lq, 20_000) < 0.05 * floor


def test_the_rate_of_depth_is_a_bound_and_is_attained():
    Lambda, w, p, _ = population(3)
    spectrum = np.linalg.eigvalsh(Lambda)
    low, high = spectrum.min(), spectrum.max()
    A, Lq = 2 / (low + high) * np.eye(3), np.diag([1.0, 2.0, 0.5])
    Psi, _, _ = lower_bound.task_moments(Lambda, w, p)
    for k in (1, 5, 50):
        assert lower_bound.depth_floor(A, Lambda, w, p, Lq, k) <= lower_bound.depth_bound(low, high, k, Psi, Lq)
    ends = np.array([np.diag([low, high, low]), np.diag([high, high, low])])
    w = w[:2]
    Psi, _, _ = lower_bound.task_moments(ends, w, np.full(2, 0.5))
    got = lower_bound.depth_floor(A, ends, w, np.full(2, 0.5), np.eye(3), 4)
    np.testing.assert_allclose(got, lower_bound.depth_bound(low, high, 4, Psi, np.eye(3)), rtol=1e-10)
    # one power less of the rate is no bound
    assert got > ((high - low) / (high + low)) * lower_bound.depth_bound(low, high, 4, Psi, np.eye(3))


def test_the_testing_bound_is_the_least_mean_loss_over_all_decision_rules():
    rng = np.random.default_rng(4)
    first, second = rng.dirichlet(np.ones(5), size=2)
    gaps = 0.7, 1.9
    losses = []
    for rule in itertools.product((0, 1), repeat=5):  # the action at each value of S; task 0 wants 0, task 1 wants 1
        picked = np.array(rule)
        losses.append((gaps[0] * first @ picked + gaps[1] * second @ (1 - picked)) / 2)
    np.testing.assert_allclose(lower_bound.testing_bound(first, second, *gaps), min(losses), rtol=1e-12)


BEST, OTHER, Z, CHANCE = 2.0, 0.8, np.array([1.1, 0.7]), np.array([0.4, 0.6])


def contexts(M):
    """Contexts of M pairs of the two twin tasks: (task, chance, x [M, 2], w)."""
    r2, w = (np.asarray(v) for v in lower_bound.twin_tasks(BEST, OTHER, Z))
    for task in range(2):
        for actions in itertools.product(range(2), repeat=M):
            actions = list(actions)
            yield task, np.prod(CHANCE[actions]), np.sqrt(r2[task][actions])[:, None] * np.eye(2)[actions], w[task]


def wrong_share(layer, M, signs=(1.0, -1.0)):
    """Share of wrong actions of `layer(G, S, c)` -> yhat [2] over all contexts; a tie goes to the first action."""
    total = 0.0
    for _, chance, x, w in contexts(M):
        for sign in signs:
            y = sign * x @ w
            yhat = layer(x.T @ x / M, x.T @ y / M, y @ y / M)
            picked = 0 if yhat[0] >= yhat[1] - 1e-12 else 1
            total += chance / 2 / len(signs) * (picked != np.argmax(sign * w))
    return total


def full_layer(v, U, u, z):
    return lambda G, S, c: v @ G @ U + u * S @ U + (v @ S) * z + u * c * z


def test_twin_tasks_have_one_law_of_S_other_covariances_and_opposite_best_actions():
    laws, means = ({}, {}), np.zeros((2, 2, 2))
    for task, chance, x, w in contexts(3):
        S = tuple(np.round(x.T @ (x @ w) / 3, 9))
        laws[task][S] = laws[task].get(S, 0.0) + chance
        means[task] += chance * x.T @ x / 3
    assert laws[0].keys() == laws[1].keys()
    np.testing.assert_allclose([laws[0][S] for S in laws[0]], [laws[1][S] for S in laws[0]], rtol=1e-12)
    assert np.abs(means[0] - means[1]).max() > 0.2
    w = np.asarray(lower_bound.twin_tasks(BEST, OTHER, Z)[1])
    assert w[0].argmax() != w[1].argmax()
    law = np.array(list(laws[0].values()))
    gap = BEST - OTHER
    np.testing.assert_allclose(lower_bound.testing_bound(law, law, gap, gap), gap / 2)


@pytest.mark.parametrize("M", [1, 2, 5])
def test_every_reduced_layer_is_wrong_half_of_the_time_on_the_twins(M):
    rng = np.random.default_rng(M)
    for A in rng.normal(size=(20, 2, 2)):
        for signs in ((1.0,), (1.0, -1.0)):
            np.testing.assert_allclose(wrong_share(lambda G, S, c, A=A: A @ S, M, signs), 0.5, rtol=1e-12)


def test_every_full_layer_is_wrong_a_quarter_of_the_time_on_the_signed_twins_and_need_not_be_on_the_unsigned():
    rng = np.random.default_rng(0)
    shares = []
    for M in (1, 3):
        for _ in range(150):
            scale = np.exp(rng.normal(size=4))
            blocks = (rng.normal(size=2), rng.normal(size=(2, 2)), rng.normal(), rng.normal(size=2))
            shares.append(wrong_share(full_layer(*(s * b for s, b in zip(scale, blocks, strict=True))), M))
    assert min(shares) >= 0.25 - 1e-12
    assert min(shares) < 0.45  # better than any reduced layer
    # without the signs G alone tells the tasks apart: the action with the smaller second moment is the better one
    chance = CHANCE * Z
    v = -1 / chance
    assert wrong_share(full_layer(v, np.eye(2), 0.0, np.zeros(2)), 12, signs=(1.0,)) < 0.2


def test_symmetric_noise_breaks_the_quarter_of_the_full_layer():
    """Contexts of one pair; the label of the better action has noise +-(BEST + OTHER) r, that of the other action none."""
    layer = full_layer(np.array([-0.5, 0.5]), np.array([[-1.2, 0.0], [1.2, 0.0]]), 1.0, np.array([1.0, 0.0]))
    wrong = {False: 0.0, True: 0.0}
    for noisy, (_, chance, x, w), sign, side in itertools.product(wrong, contexts(1), (1.0, -1.0), (1.0, -1.0)):
        size = (BEST + OTHER) * np.linalg.norm(x) * (noisy and x.sum() * (BEST + OTHER) / 2 < (x @ w).item())
        y = sign * x @ w + side * size
        yhat = layer(x.T @ x, x.T @ y, y @ y)
        wrong[noisy] += chance / 8 * (np.argmax(yhat) != np.argmax(sign * w))
    np.testing.assert_allclose(wrong[True], 0.125, rtol=1e-12)
    assert wrong[False] >= 0.25


def test_the_hand_set_full_layer_attains_the_quarter_on_long_contexts():
    layer = full_layer(*(np.asarray(b) for b in lower_bound.twin_full_weights(BEST, OTHER, Z, CHANCE)))
    r2, w = (np.asarray(v) for v in lower_bound.twin_tasks(BEST, OTHER, Z))
    M, share, wrong = 400, np.arange(401) / 400, 0.0
    for n, chance in zip(share, scipy.stats.binom.pmf(np.arange(401), M, CHANCE[0]), strict=True):
        for task, sign in itertools.product(range(2), (1.0, -1.0)):
            G = np.diag(np.array([n, 1 - n]) * r2[task])
            yhat = layer(G, sign * G @ w[task], w[task] @ G @ w[task])
            wrong += chance / 4 * (np.argmax(yhat) != np.argmax(sign * w[task]))
    np.testing.assert_allclose(wrong, 0.25, atol=1e-6)
