"""Estimators against numpy's own solvers, conditional Gaussians and plain backward loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lindm.icl import label_laws, predictors
from lindm.icl import prompts as contexts
from lindm.types import MDP, Prompt

D = 4


def arrays(seed: int, N: int = 9, Q: int = 3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, D)), rng.normal(size=N), rng.normal(size=(Q, D))


def prompt_of(x, y, query) -> Prompt:
    return Prompt(x=jnp.asarray(x), y=jnp.asarray(y), query=jnp.asarray(query))


def numpy_covariance(seed: int, rank: int = D):
    root = np.random.default_rng(seed).normal(size=(D, rank))
    return root @ root.T


# --- predictors


def test_the_closed_form_is_the_sum_over_pairs():
    x, y, query = arrays(0)
    A = np.random.default_rng(1).normal(size=(D, D))
    want = [sum(y[i] * (q @ A @ x[i]) for i in range(9)) / 9 for q in query]
    np.testing.assert_allclose(predictors.closed_form(A)(prompt_of(x, y, query)), want, rtol=1e-12)


def test_one_iteration_is_the_closed_form_and_many_are_least_squares():
    prompt = prompt_of(*arrays(2))
    A = 0.1 * np.eye(D)
    np.testing.assert_allclose(predictors.iterated(A, 1)(prompt), predictors.closed_form(A)(prompt), rtol=1e-12)
    np.testing.assert_allclose(predictors.iterated(A, 4000)(prompt), predictors.ols()(prompt), rtol=1e-8)


def test_three_iterations_follow_the_recursion_written_with_moments():
    x, y, query = arrays(3)
    A = np.random.default_rng(1).normal(size=(D, D))
    G, S_N, w = x.T @ x / 9, x.T @ y / 9, np.zeros(D)
    for _ in range(3):
        w = w + A @ (S_N - G @ w)
    np.testing.assert_allclose(predictors.iterated(A, 3)(prompt_of(x, y, query)), query @ w, rtol=1e-11)


@pytest.mark.parametrize("N", [1, 3, 4, 12])
def test_ridge_is_least_squares_on_data_extended_by_the_penalty(N):
    x, y, query = arrays(4, N)
    extended = np.vstack([x, np.sqrt(0.3) * np.eye(D)])
    w = np.linalg.lstsq(extended, np.concatenate([y, np.zeros(D)]), rcond=None)[0]
    np.testing.assert_allclose(predictors.ridge(0.3)(prompt_of(x, y, query)), query @ w, rtol=1e-11)


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), N=st.sampled_from([1, 2, 4, 9]))
def test_ols_is_the_shortest_least_squares_solution(seed, N):
    x, y, query = arrays(seed, N)
    if N == 9:
        x[:, 1] = 2 * x[:, 0]  # rank deficient though N > d
    w = np.linalg.pinv(x) @ y
    np.testing.assert_allclose(predictors.ols()(prompt_of(x, y, query)), query @ w, rtol=1e-7, atol=1e-7 * np.abs(w).max())


def test_ols_on_repeated_one_hot_pairs_is_the_mean_label_and_zero_where_unseen():
    x = np.eye(D)[[0, 0, 2]]
    got = predictors.ols()(prompt_of(x, np.array([1.0, 3.0, -5.0]), np.eye(D)))
    np.testing.assert_allclose(got, [2, 0, -5, 0], atol=1e-12)


@pytest.mark.parametrize(("N", "rank"), [(2, 4), (9, 4), (9, 2), (2, 1)])
@pytest.mark.parametrize("sigma", [0.5, 1e-3])
def test_bayes_is_the_conditional_mean_of_the_joint_gaussian(N, rank, sigma):
    x, y, query = arrays(5, N)
    Psi, mean = numpy_covariance(6, rank), np.random.default_rng(7).normal(size=D)
    want = query @ mean + query @ Psi @ x.T @ np.linalg.solve(x @ Psi @ x.T + sigma**2 * np.eye(N), y - x @ mean)
    got = predictors.bayes(Psi, sigma, mean)(prompt_of(x, y, query))
    np.testing.assert_allclose(got, want, rtol=1e-5 if sigma < 0.1 else 1e-10)


def test_bayes_without_noise_interpolates_and_is_the_limit_of_little_noise():
    x, _, query = arrays(8, 3)
    Psi = numpy_covariance(9)
    y = x @ np.random.default_rng(1).normal(size=D)
    exact = predictors.bayes(Psi, 0.0)
    np.testing.assert_allclose(exact(prompt_of(x, y, x)), y, rtol=1e-9)
    np.testing.assert_allclose(exact(prompt_of(x, y, query)), predictors.bayes(Psi, 1e-5)(prompt_of(x, y, query)), rtol=1e-5)


def test_bayes_with_an_isotropic_prior_is_ridge():
    prompt = prompt_of(*arrays(10))
    np.testing.assert_allclose(predictors.bayes(2.0 * np.eye(D), 0.6)(prompt), predictors.ridge(0.18)(prompt), rtol=1e-11)


def test_bayes_has_the_smallest_error_on_its_own_prior():
    Psi, sigma, N = numpy_covariance(11), 0.4, 6
    root = jnp.asarray(np.linalg.cholesky(Psi))

    def errors(key):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        x, w = jax.random.normal(k1, (N, D)), root @ jax.random.normal(k2, (D,))
        query = jax.random.normal(k3, (1, D))
        prompt = Prompt(x=x, y=label_laws.noisy_labels(k4, x, w, sigma), query=query)
        others = (predictors.bayes(Psi, sigma), predictors.ridge(sigma**2), predictors.ols(), predictors.closed_form(np.eye(D)))
        return jnp.stack([(predict(prompt) - query @ w)[0] ** 2 for predict in others])

    squared = np.asarray(jax.vmap(errors)(jax.random.split(jax.random.key(0), 4_000)))
    for other in range(1, 4):
        gain = squared[:, other] - squared[:, 0]
        assert gain.mean() > 2 * gain.std() / np.sqrt(len(gain))


def test_random_predictions_are_standard_normal_and_differ_between_contexts():
    key = jax.random.key(0)
    x, y = jax.random.normal(key, (3_000, 5, D)), jax.random.normal(key, (3_000, 5))
    stack = Prompt(x=x, y=y, query=jnp.ones((3_000, 3, D)))
    predict = predictors.random(jax.random.key(1))
    drawn = np.asarray(jax.vmap(predict)(stack))
    assert len(np.unique(drawn)) == drawn.size
    assert abs(drawn.mean()) < 5 / np.sqrt(drawn.size)
    assert abs((drawn**2).mean() - 1) < 5 * np.sqrt(2 / drawn.size)
    assert abs((drawn[:, 0] * drawn[:, 1]).mean()) < 5 / np.sqrt(3_000)
    again = predict(jax.tree.map(lambda leaf: leaf[7], stack))
    np.testing.assert_array_equal(again, drawn[7])


@pytest.mark.parametrize(
    "build",
    [
        lambda: predictors.closed_form(np.eye(D)),
        lambda: predictors.iterated(0.1 * np.eye(D), 3),
        lambda: predictors.ridge(0.1),
        predictors.ols,
        lambda: predictors.bayes(np.eye(D), 0.1),
        lambda: predictors.bayes(np.eye(D), 0.0),
        lambda: predictors.random(jax.random.key(0)),
    ],
)
def test_every_predictor_under_jit_and_vmap_is_itself_in_a_loop(build):
    predict = build()
    prompts = [prompt_of(*arrays(seed)) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *prompts)
    got = jax.jit(jax.vmap(predict))(stack)
    assert got.shape == (3, 3)
    for i, prompt in enumerate(prompts):
        np.testing.assert_allclose(got[i], predict(prompt), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "build",
    [
        lambda: predictors.ridge(0.1),
        predictors.ols,
        lambda: predictors.closed_form(np.eye(D, dtype=np.float32)),
        lambda: predictors.random(jax.random.key(0)),
    ],
)
def test_single_precision_prompts_give_single_precision_predictions(build):
    prompt = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), prompt_of(*arrays(0)))
    assert build()(prompt).dtype == jnp.float32


def test_weights_may_be_traced_so_that_gradients_pass():
    prompt = prompt_of(*arrays(0))
    grad = jax.grad(lambda A: predictors.closed_form(A)(prompt)[0])(jnp.eye(D))
    x, y, query = arrays(0)
    np.testing.assert_allclose(grad, np.outer(query[0], y @ x / 9), rtol=1e-12)


@pytest.mark.parametrize(
    ("build", "rule"),
    [
        (lambda: predictors.closed_form(np.zeros((2, 3))), "A must be a square matrix"),
        (lambda: predictors.closed_form(np.full((2, 2), np.nan)), "A must be finite"),
        (lambda: predictors.iterated(np.eye(2), 0), "steps must be a whole number of at least 1"),
        (lambda: predictors.ridge(0.0), "lam must be finite and greater than 0"),
        (lambda: predictors.ridge(np.nan), "lam must be finite"),
        (lambda: predictors.bayes(np.eye(2), -0.1), "sigma must be finite and at least 0"),
        (lambda: predictors.bayes(np.diag([1.0, -1.0]), 0.1), "Psi must be positive semidefinite"),
        (lambda: predictors.bayes(np.array([[1.0, 0.5], [0.0, 1.0]]), 0.1), "Psi must be symmetric"),
        (lambda: predictors.bayes(np.eye(2), 0.1, np.zeros(3)), "mean must have shape"),
        (lambda: predictors.bayes(np.eye(2), 0.1, np.array([0.0, np.inf])), "mean must be finite"),
    ],
)
def test_predictors_out_of_range_raise_an_error_that_names_them(build, rule):
    with pytest.raises(ValueError, match=rule):
        build()


# --- from transitions

S, A, H = 5, 3, 4


def offline(seed: int, n: int = 20):
    """phi, and a data set of transitions, as numpy arrays."""
    rng = np.random.default_rng(seed)
    phi = rng.dirichlet(np.ones(D), (S, A))
    pairs, after = rng.integers(0, S * A, (H, n)), rng.integers(0, S, (H, n))
    return phi, phi.reshape(S * A, D)[pairs], rng.uniform(size=(H, n)), phi[after]


@pytest.mark.parametrize("n", [2, 20])
def test_lsvi_is_the_backward_loop_of_ridge_regressions(n):
    phi, x, r, after = offline(0, n)
    Q, w = predictors.lsvi(*map(jnp.asarray, (phi, x, r, after)), lam=0.1)
    behind = np.zeros(D)
    for h in reversed(range(H)):
        gram, moment = 0.1 * np.eye(D), np.zeros(D)
        for i in range(n):
            gram += np.outer(x[h, i], x[h, i])
            moment += x[h, i] * (r[h, i] + max(after[h, i, a] @ behind for a in range(A)))
        behind = np.linalg.inv(gram) @ moment
        np.testing.assert_allclose(w[h], behind, rtol=1e-9)
        np.testing.assert_allclose(Q[h], phi @ behind, rtol=1e-9)


@pytest.mark.parametrize("clip", [True, False])
def test_pevi_subtracts_the_width_of_the_ellipsoid_and_clips(clip):
    phi, x, r, after = offline(1, 20)
    r = 2.5 * r  # high enough for the upper clip to matter in some pairs, low enough to leave others inside
    beta, lam = 0.1, 0.5
    Q = predictors.pevi(*map(jnp.asarray, (phi, x, r, after)), lam=lam, beta=beta, clip=clip)

    def value(features, w, inverse, h):
        if w is None:
            return 0.0
        q = features @ w - beta * np.sqrt(features @ inverse @ features)
        return min(max(q, 0.0), H - h) if clip else q

    w, inverse = None, None
    for h in reversed(range(H)):
        target = [r[h, i] + max(value(after[h, i, a], w, inverse, h + 1) for a in range(A)) for i in range(20)]
        inverse = np.linalg.inv(x[h].T @ x[h] + lam * np.eye(D))
        w = inverse @ x[h].T @ target
        for s, a in itertools.product(range(S), range(A)):
            assert Q[h, s, a] == pytest.approx(value(phi[s, a], w, inverse, h), rel=1e-9, abs=1e-12)
    if clip:
        at_top = np.asarray(Q) == np.arange(H, 0, -1)[:, None, None]
        assert at_top.any()
        assert not at_top.all((1, 2)).any()


def test_pevi_without_penalty_and_clipping_is_lsvi():
    data = tuple(map(jnp.asarray, offline(2)))
    np.testing.assert_allclose(
        predictors.pevi(*data, lam=0.2, beta=0.0, clip=False), predictors.lsvi(*data, lam=0.2)[0], rtol=1e-9, atol=1e-12
    )


def test_pevi_clips_to_the_stages_that_are_left():
    phi, x, r, after = map(jnp.asarray, offline(3))
    high = predictors.pevi(phi, x, r + 10.0, after, lam=1e-3, beta=0.0)
    np.testing.assert_allclose(high.max((1, 2)), [4, 3, 2, 1])
    low = predictors.pevi(phi, x, r, after, lam=1e-3, beta=1e6)
    np.testing.assert_array_equal(low, 0)


def tiny_mdp(seed: int):
    """A linear MDP with simplex features as numpy arrays: phi, P, r, rho and the exact Q by a backward loop."""
    rng = np.random.default_rng(seed)
    phi, mu = rng.dirichlet(np.ones(D), (S, A)), rng.dirichlet(np.ones(S), (H, D))
    theta = rng.uniform(size=(H, D))
    P, r = np.einsum("sad,hdt->hsat", phi, mu), np.einsum("sad,hd->hsa", phi, theta)
    Q, V = np.zeros((H, S, A)), np.zeros(S)
    for h in reversed(range(H)):
        Q[h] = r[h] + P[h] @ V
        V = Q[h].max(-1)
    return phi, MDP(P=jnp.asarray(P), r=jnp.asarray(r), rho=jnp.full(S, 1 / S)), Q


def test_lsvi_and_pevi_with_much_data_come_to_the_exact_action_values():
    phi, mdp, Q = tiny_mdp(0)
    idx = contexts.draw_pairs(jax.random.key(0), contexts.design_cdf(np.full(S * A, 1 / (S * A))), (H, 40_000))
    data = contexts.transitions(jax.random.key(1), mdp, jnp.asarray(phi), idx)
    np.testing.assert_allclose(predictors.lsvi(jnp.asarray(phi), *data, lam=1.0)[0], Q, atol=0.03)
    np.testing.assert_allclose(predictors.pevi(jnp.asarray(phi), *data, lam=1.0, beta=0.01), Q, atol=0.03)


def test_bootstrap_with_ridge_is_lsvi_on_the_same_transitions():
    phi, mdp, _ = tiny_mdp(1)
    n, lam, key = 25, 0.3, jax.random.key(5)
    idx = jnp.asarray(np.random.default_rng(0).integers(0, S * A, (H, n)), jnp.int32)
    cdf = contexts.design_cdf(np.full(S * A, 1 / (S * A)))
    Q = predictors.bootstrap(key, mdp, jnp.asarray(phi), cdf, n, lambda h, prompt: predictors.ridge(lam)(prompt), idx)
    keys = jax.random.split(jax.random.split(key)[1], H)  # the keys of the stages' labels
    states = [label_laws.next_states(keys[h], mdp, h, idx[h]) for h in range(H)]
    x = phi.reshape(S * A, D)[np.asarray(idx)]
    r = np.asarray(mdp.r).reshape(H, S * A)[np.arange(H)[:, None], np.asarray(idx)]
    want, _ = predictors.lsvi(*map(jnp.asarray, (phi, x, r, phi[np.asarray(states)])), lam=lam)
    np.testing.assert_allclose(Q, want, rtol=1e-9)


def test_bootstrap_hands_every_stage_its_own_index():
    phi, mdp, _ = tiny_mdp(2)
    cdf = contexts.design_cdf(np.full(S * A, 1 / (S * A)))
    Q = predictors.bootstrap(jax.random.key(0), mdp, jnp.asarray(phi), cdf, 3, lambda h, p: h + jnp.zeros(p.query.shape[0]))
    np.testing.assert_array_equal(Q, np.broadcast_to(np.arange(H)[:, None, None], (H, S, A)))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan])
def test_a_penalty_that_leaves_the_system_singular_raises_an_error(bad):
    data = tuple(map(jnp.asarray, offline(0)))
    with pytest.raises(ValueError, match="lam must be finite and greater than 0"):
        predictors.lsvi(*data, lam=bad)
    with pytest.raises(ValueError, match="lam must be finite and greater than 0"):
        predictors.pevi(*data, lam=bad, beta=1.0)
    with pytest.raises(ValueError, match="beta must be finite and at least 0"):
        predictors.pevi(*data, lam=1.0, beta=-1.0)
