"""Shared prompts: every statement against the enumeration of all trajectories and of all prompts, in numpy."""

# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false, reportCallIssue=false

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from lindm_theory import in_context, moments, pooled
from tests.theory.trajectories import all_trajectories, moments_of, prompts_of_two


@pytest.mark.parametrize("law", ["oracle", "returned"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_moments_of_a_trajectory_are_those_of_enumeration(make_problem, seed, law):
    W = make_problem(seed, S=2, A=2, d=2, H=3)
    T = all_trajectories(W, seed)
    Z = T.sums(W, getattr(T, law))
    mean, second = moments_of(W, T, law)
    np.testing.assert_allclose(mean, np.einsum("n,nhd->hd", T.chance, Z), atol=1e-13)
    np.testing.assert_allclose(second, np.einsum("n,nid,nje->ijde", T.chance, Z, Z), atol=1e-13)


def test_labels_with_a_rollout_of_their_own_add_their_variance_to_the_diagonal_alone(make_problem):
    W = make_problem(2, S=2, A=2, d=2, H=2)
    T = all_trajectories(W)
    variance = np.random.default_rng(0).uniform(0.1, 1, size=W.r.shape)
    start, kernels = pooled.pair_chain(W.P, W.rho, T.pi)
    phi, q = W.phi.reshape(4, -1), W.Qstar.reshape(2, -1)
    _, second = pooled.trajectory_moments(kernels, start, jnp.asarray(phi), jnp.asarray(q), jnp.asarray(variance.reshape(2, -1)))
    # labels Q* +- one standard deviation, all four signs
    expected = 0.0
    deviation = np.sqrt(variance[np.arange(2), T.s, T.a])
    for signs in itertools.product((-1, 1), repeat=2):
        Z = T.sums(W, T.oracle + np.array(signs) * deviation)
        expected = expected + np.einsum("n,nid,nje->ijde", T.chance, Z, Z) / 4
    np.testing.assert_allclose(second, expected, atol=1e-13)


def test_treating_return_labels_as_independent_noise_is_wrong_for_a_pooled_prompt_and_right_within_a_stage(make_problem):
    W = make_problem(3, S=2, A=2, d=2, H=3)
    T = all_trajectories(W)
    start, kernels = pooled.pair_chain(W.P, W.rho, T.pi)
    phi = jnp.asarray(W.phi.reshape(4, -1))
    value, square = pooled.return_values(kernels, jnp.asarray(W.r.reshape(3, -1)))
    _, free = pooled.trajectory_moments(kernels, start, phi, value, square - value**2)
    _, true = moments_of(W, T, "returned")
    for i, j in itertools.product(range(3), repeat=2):
        assert (np.abs(free[i, j] - true[i, j]).max() < 1e-12) == (i == j)
    # nor is the covariance of the noises all that is missing: early noise depends on the features of later pairs
    noise = T.returned - np.stack([np.asarray(value)[h, T.s[:, h] * 2 + T.a[:, h]] for h in range(3)], 1)
    Z, E = T.sums(W, T.returned - noise), T.sums(W, noise)
    both = np.einsum("n,nid,nje->ijde", T.chance, Z, Z) + np.einsum("n,nid,nje->ijde", T.chance, E, E)
    cross = np.einsum("n,nd,ne->de", T.chance, E[:, 0], Z[:, 1])
    assert np.abs(cross).max() > 1e-3
    np.testing.assert_allclose(both[0, 1] + cross, true[0, 1], atol=1e-13)
    np.testing.assert_allclose(np.einsum("n,nd,ne->de", T.chance, E[:, 1], Z[:, 0]), 0, atol=1e-13)


@pytest.mark.parametrize("law", ["oracle", "returned"])
def test_the_risk_of_every_reader_is_that_of_all_prompts(make_problem, law):
    W = make_problem(4, S=2, A=2, d=2, H=2)
    T = all_trajectories(W)
    chance, S = prompts_of_two(T.chance, T.sums(W, getattr(T, law)))
    m, C = pooled.stack(*moments_of(W, T, law))
    rng = np.random.default_rng(5)
    Lq = np.array([[1.0, 0.2], [0.2, 0.5]])
    for B in (
        np.stack([rng.normal(size=(2, 2)) @ pooled.block(h, 2, 2) for h in range(2)]),
        rng.normal(size=(2, 2, 4)),
        np.stack([rng.normal(size=(2, 2)) @ pooled.average(2, 2)] * 2),
    ):
        error = np.einsum("hdm,nm->nhd", B, S.reshape(-1, 4)) - W.w
        expected = np.einsum("n,nhd,de,nhe->h", chance, error, Lq, error)
        got = pooled.reader_risk(B, jnp.stack([m] * 2), jnp.stack([C / 2] * 2), W.w, Lq)
        np.testing.assert_allclose(got.total, expected, rtol=1e-11)
        assert np.all(np.asarray(got.estimation) > 0)


def test_a_prompt_relabeled_for_one_stage_has_the_moments_of_the_dependent_chain(make_problem):
    W = make_problem(5, S=2, A=2, d=2, H=3)
    T = all_trajectories(W)
    start, kernels = pooled.pair_chain(W.P, W.rho, T.pi)
    phi = jnp.asarray(W.phi.reshape(4, -1))
    w = W.w[0]
    m, C = pooled.stack(*pooled.trajectory_moments(kernels, start, phi, jnp.broadcast_to(phi @ w, (3, 4))))
    mean, second = moments.chain_moments(kernels, start, phi, np.outer(w, w), 3)
    T_bar = pooled.average(3, 2)
    np.testing.assert_allclose(T_bar @ m, mean @ w, atol=1e-13)
    np.testing.assert_allclose(T_bar @ C @ T_bar.T, second - np.outer(mean @ w, mean @ w), atol=1e-13)


def test_if_the_pairs_do_not_depend_on_the_task_a_trajectory_is_one_pair_in_dimension_Hd(make_problem):
    """Oracle labels, one kernel for all tasks: risk, optimum and modes of the i.i.d. theory, with trajectories as pairs."""
    W = make_problem(6, S=2, A=2, d=2, H=2)
    T = all_trajectories(W)
    tasks = np.random.default_rng(0).normal(size=(7, 2, 2))
    phi = W.phi[T.s, T.a]  # [n, H, d]
    L = np.zeros((4, 4))
    for h in range(2):
        L[2 * h : 2 * h + 2, 2 * h : 2 * h + 2] = np.einsum("n,nd,ne->de", T.chance, phi[:, h], phi[:, h])
    start, kernels = pooled.pair_chain(W.P, W.rho, T.pi)
    flat = jnp.asarray(W.phi.reshape(4, -1))
    Psi = np.einsum("thd,tie->hdie", tasks, tasks).reshape(4, 4) / 7
    K = np.zeros((4, 4))
    pairs = []
    for w in tasks:
        mean, second = pooled.trajectory_moments(kernels, start, flat, jnp.einsum("nd,hd->hn", flat, w))
        m, C = pooled.stack(mean, second)
        pairs.append((m, C, w))
        K += (C + np.outer(m, m)) / 7
    N, M = 3, 5
    A = in_context.optimal_weights(L, Psi, K, N)
    ESS = in_context.context_second_moment(L, Psi, K, N)
    np.testing.assert_allclose(pooled.best_reader(jnp.eye(4), ESS, L @ Psi), A, rtol=1e-9)
    Lq = np.array([[1.0, 0.3], [0.3, 0.8]])
    B = A.reshape(2, 2, 4)
    risks = [pooled.reader_risk(B, jnp.stack([m] * 2), jnp.stack([C / M] * 2), w, Lq).total.sum() for m, C, w in pairs]
    whole = in_context.risk(A, L, Psi, K, M, np.kron(np.eye(2), Lq))
    np.testing.assert_allclose(np.mean(risks), whole.total, rtol=1e-10)
    x, q = in_context.modes(L, Psi, K, np.kron(np.eye(2), Lq))
    np.testing.assert_allclose(in_context.modal_risk(x, q, M, N).total, whole.total, rtol=1e-8)


def test_stage_augmented_features_are_never_worse_than_one_layer_a_stage_and_that_never_worse_than_blind(make_problem):
    gains = []
    ESS, ESw, Psi, H, d = np.zeros((4, 4)), np.zeros((2, 4, 2)), np.zeros((2, 2, 2)), 2, 2
    problems = [make_problem(s, S=2, A=2, d=2, H=2) for s in range(6)]
    for W in problems:
        T = all_trajectories(W)
        m, C = pooled.stack(*moments_of(W, T, "oracle"))
        ESS += (np.outer(m, m) + C / 3) / 6
        ESw += np.einsum("m,hd->hmd", m, W.w) / 6
        Psi += np.einsum("hd,he->hde", W.w, W.w) / 6

    def risk(B: np.ndarray, h: int) -> float:
        return float(np.trace(B @ ESS @ B.T - 2 * B @ ESw[h] + Psi[h]))

    rng = np.random.default_rng(0)
    for h in range(H):
        best = pooled.best_reader(jnp.eye(4), ESS, ESw[h])
        own = pooled.best_reader(pooled.block(h, H, d), ESS, ESw[h])
        gains.append(risk(own, h) - risk(best, h))
        np.testing.assert_allclose(gains[-1], np.trace((own - best) @ ESS @ (own - best).T), rtol=1e-8)
        for _ in range(5):
            assert risk(best + 0.01 * rng.normal(size=(2, 4)), h) > risk(best, h)
            assert risk(own + 0.01 * rng.normal(size=(2, 2)) @ pooled.block(h, H, d), h) > risk(own, h)
    assert min(gains) > 1e-6


def test_the_blind_floor_is_the_least_square_over_a_grid_of_matrices_and_contains_the_spread_of_the_stages(make_problem):
    rng = np.random.default_rng(1)
    s, w = rng.normal(size=(9, 2)), rng.normal(size=(9, 3, 2))
    w[:, :, 0] += s[:, None, 0]
    Lq = np.array([[1.0, 0.3], [0.3, 0.8]])
    floor, spread = pooled.blind_floor(
        s.T @ s / 9, np.einsum("nd,nhe->hde", s, w) / 9, np.einsum("nhd,nie->hide", w, w) / 9, jnp.asarray(Lq)
    )

    def risk(A) -> float:
        error = np.asarray(A).reshape(2, 2) @ s[:, None, :, None] - w[..., None]
        return float(np.einsum("nhdk,de,nhek->", error, Lq, error) / 27)

    found = scipy.optimize.minimize(risk, np.zeros(4), options={"gtol": 1e-10})
    np.testing.assert_allclose(floor, found.fun, rtol=1e-8)
    away = w - w.mean(1, keepdims=True)
    np.testing.assert_allclose(spread, np.einsum("nhd,de,nhe->", away, Lq, away) / 27, rtol=1e-10)
    assert spread < floor
    # equal covariances: s = Lambda wbar, and the spread is all of it
    L = np.array([[2.0, 0.5], [0.5, 1.0]])
    s = w.mean(1) @ L
    same = pooled.blind_floor(
        s.T @ s / 9, np.einsum("nd,nhe->hde", s, w) / 9, np.einsum("nhd,nie->hide", w, w) / 9, jnp.asarray(Lq)
    )
    np.testing.assert_allclose(same[0], same[1], rtol=1e-9)
