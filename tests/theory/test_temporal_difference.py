"""Linear attention as batch TD(0): against loops over transitions in numpy, and attention written out column by column."""

import numpy as np
import pytest

from lindm_theory import temporal_difference as td


def transitions(seed, N=9, d=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, d)), rng.normal(size=(N, d)), rng.normal(size=N)


def td_loop(C, x, x_next, r, gamma, E=None):
    """w after every sweep; each sweep sums the TD errors of all transitions at the old weights."""
    w, u, out = np.zeros(x.shape[1]), np.zeros(x.shape[1]), []
    for k in range(len(C)):
        total = np.zeros_like(w)
        for i in range(len(r)):
            total += x[i] * (r[i] + gamma * x_next[i] @ u - x[i] @ w)
        w, u = w + C[k] @ total / len(r), u + (C if E is None else E)[k] @ total / len(r)
        out.append(w)
    return np.array(out)


def attention(W_PV, W_KQ, x, y, query):
    """Linear self-attention on the embedding, E <- E - F(E), with the N x N scores; minus the label row of the query."""
    N = len(y)
    E = np.vstack([np.column_stack([x.T, query]), np.append(y, 0.0)])
    for P, K in zip(W_PV, W_KQ, strict=True):
        E = E - P @ E[:, :N] @ (E[:, :N].T @ K @ E) / N
    return -E[-1, -1]


@pytest.mark.parametrize("second", [False, True])
def test_batch_td_is_a_loop_over_transitions(second):
    x, x_next, r = transitions(0)
    rng = np.random.default_rng(1)
    C, E = 0.2 * rng.normal(size=(6, 3, 3)), 0.2 * rng.normal(size=(6, 3, 3))
    E = E if second else None
    got = td.batch_td(C, *td.td_statistics(x, x_next, r, 0.7), E)
    np.testing.assert_allclose(got, td_loop(C, x, x_next, r, 0.7, E), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_the_hand_set_attention_takes_one_td_step_a_layer(depth):
    x, x_next, r = transitions(depth)
    C, q = 0.2 * np.random.default_rng(2).normal(size=(depth, 3, 3)), np.array([0.3, -1.0, 2.0])
    W_PV, W_KQ = (np.asarray(W) for W in td.td_attention(C))
    got = attention(W_PV, W_KQ, np.hstack([x, 0.9 * x_next]), r, np.append(q, np.zeros(3)))
    np.testing.assert_allclose(got, q @ td_loop(C, x, x_next, r, 0.9)[-1], rtol=1e-12)


def regression(blocks, x, y):
    """The reduced layer: w <- w + A (S - G w)."""
    w = np.zeros(x.shape[1])
    for A in blocks:
        w = w + A @ (x.T @ (y - x @ w)) / len(y)
    return w


def test_the_blocks_make_the_reduced_layer_td_with_one_and_two_matrices_and_residual_gradient():
    x, x_next, r = transitions(5)
    rng = np.random.default_rng(6)
    C, E = 0.1 * rng.normal(size=(4, 3, 3)), 0.1 * rng.normal(size=(4, 3, 3))
    both = np.hstack([x, 0.8 * x_next])
    w = regression(np.asarray(td.td_blocks(C)), both, r)
    np.testing.assert_allclose(w[:3], td_loop(C, x, x_next, r, 0.8)[-1], rtol=1e-12)
    np.testing.assert_allclose(w[3:], -w[:3], rtol=1e-12)
    w = regression(np.asarray(td.td_blocks(C, E)), both, r)
    np.testing.assert_allclose(w[:3], td_loop(C, x, x_next, r, 0.8, E)[-1], rtol=1e-12)
    w, v = regression(np.asarray(td.residual_gradient_blocks(C)), both, r), np.zeros(3)
    for k in range(4):
        v = v + C[k] @ sum((x[i] - 0.8 * x_next[i]) * (r[i] + (0.8 * x_next[i] - x[i]) @ v) for i in range(9)) / 9
    np.testing.assert_allclose(w[:3], v, rtol=1e-12)


def test_td_contracts_to_lstd_with_the_powers_of_one_matrix():
    x, x_next, r = transitions(7, N=40)
    C = 0.3 * np.eye(3)
    b, G, F = (np.asarray(a) for a in td.td_statistics(x, x_next, r, 0.5))
    lstd = np.linalg.solve(G - F, b)
    for k in (1, 5, 20):
        steps = td_loop(np.broadcast_to(C, (k, 3, 3)), x, x_next, r, 0.5)
        np.testing.assert_allclose(td.td_error(C, b, G, F, k), steps[-1] - lstd, rtol=1e-9, atol=1e-12)
    assert np.abs(np.asarray(td.td_error(C, b, G, F, 200))).max() < 1e-6


def test_softmax_td_is_a_loop_over_points_and_with_a_large_matrix_tabular_td():
    x, x_next, r = transitions(8)
    W, q = np.random.default_rng(9).normal(size=(3, 3)), np.array([[0.3, -1.0, 2.0], [0.0, 1.0, 0.0]])
    points = np.vstack([x, x_next, q])
    v = np.zeros(len(points))
    for _ in range(3):
        errors = np.array([r[i] + 0.7 * v[9 + i] - v[i] for i in range(9)])
        new = v.copy()
        for j, point in enumerate(points):
            weight = np.exp([x[i] @ W @ point for i in range(9)])
            new[j] = v[j] + 0.5 * weight @ errors / weight.sum()
        v = new
    np.testing.assert_allclose(td.softmax_td(W, x, x_next, r, q, 0.7, 0.5, 3), v[-2:], rtol=1e-12)
    # every state once, one-hot features, a large matrix: tabular TD, which is exact value iteration of the policy at rate 1
    following = np.array([1, 2, 0, 0])
    eye, rewards = np.eye(4), np.array([1.0, 0.0, -1.0, 2.0])
    got = td.softmax_td(60 * eye, eye, eye[following], rewards, eye, 0.5, 1.0, 60)
    np.testing.assert_allclose(got, np.linalg.solve(eye - 0.5 * eye[following], rewards), rtol=1e-10)


def test_two_softmax_heads_take_one_sweep_a_layer():
    x, x_next, r = transitions(11)
    W, gamma, rate, N = np.random.default_rng(12).normal(size=(3, 3)), 0.7, 0.5, len(r)
    W_PV, W_KQ = (np.asarray(a) for a in td.softmax_td_attention(W, gamma, rate, 4))
    q = np.array([0.3, -1.0, 2.0])

    def predict(query):
        E = np.vstack([np.column_stack([np.hstack([x, x_next]).T, np.append(query, np.zeros(3))]), np.append(r, 0.0)])
        for layer in range(4):
            step = 0
            for head in range(2):
                scores = np.exp(E[:, :N].T @ W_KQ[layer, head] @ E)
                step = step + W_PV[layer, head] @ E[:, :N] @ (scores / scores.sum(0))
            E = E - step
        return -E[-1, -1]

    got = predict(q) + gamma / (1 - gamma) * predict(0 * q)
    np.testing.assert_allclose(got, td.softmax_td(W, x, x_next, r, q[None], gamma, rate, 4)[0], rtol=1e-12)


def test_the_odd_floor_is_attained_by_the_odd_part_and_no_odd_predictor_is_below():
    rng = np.random.default_rng(10)
    theta = rng.uniform(-1, 1, size=(400, 2))
    theta = np.concatenate([theta, -theta])  # a law that negation does not change
    value, negated = theta.max(1, keepdims=True), (-theta).max(1, keepdims=True)
    floor = float(td.odd_floor(value, negated, np.ones(1)))
    np.testing.assert_allclose(floor, np.square(theta[:, 0] - theta[:, 1]).mean() / 4, rtol=1e-12)
    np.testing.assert_allclose(np.square(theta.mean(1) - value[:, 0]).mean(), floor, rtol=1e-12)  # linear, attained
    center = value.mean(0)
    lower = float(td.odd_floor(value, negated, np.ones(1), center))
    assert lower < floor
    for predict in (np.tanh, np.sin, lambda t: t**3, lambda t: t):
        f = predict(theta @ rng.normal(size=2))  # odd in the rewards
        assert np.square(f - value[:, 0]).mean() >= floor * (1 - 1e-12)
        assert np.square(center[0] + f - value[:, 0]).mean() >= lower * (1 - 1e-12)
    assert np.square(center[0] + theta.mean(1) - value[:, 0]).mean() < 2 * lower  # twice the floor is no floor
