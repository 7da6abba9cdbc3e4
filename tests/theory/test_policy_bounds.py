# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from lindm_theory import in_context, policy_bounds

# compiled once: a rung is a loop of sixty steps
span_rung, statewise, sup = (
    jax.jit(policy_bounds.span_rung),
    jax.jit(policy_bounds.span_statewise_rung),
    jax.jit(policy_bounds.sup_rung),
)
margin_rung, margin_statewise = jax.jit(policy_bounds.margin_rung), jax.jit(policy_bounds.margin_statewise_rung)


def span(x):
    return max(x) - min(x)


def noisy(W, seed, scale=0.4):
    """Estimates, their greedy policy, its occupancy and its exact loss."""
    rng = np.random.default_rng(seed)
    Qhat = rng.uniform(0.2, 2.0) * W.Qstar + scale * rng.normal(size=W.Qstar.shape)
    pi = Qhat.argmax(-1)
    return Qhat, pi, W.occupancy(pi), W.loss(pi)


def rung_1_by_loops(W, Qhat, occupancy):
    total = 0.0
    for h in range(len(Qhat)):
        minimum = scipy.optimize.minimize_scalar(
            lambda c, h=h: sum(d * span(c * q - p) for d, q, p in zip(occupancy[h], Qhat[h], W.Qstar[h], strict=True)),
            bounds=(0, 50),
            method="bounded",
            options={"xatol": 1e-10},
        )
        total += minimum.fun
    return total


@given(st.integers(0, 10**6))
def test_the_identity_holds_and_every_rung_is_above_it(make_problem, seed):
    W = make_problem(seed)
    Qhat, pi, occupancy, loss = noisy(W, seed)
    args = (jnp.asarray(occupancy), jnp.asarray(W.Qstar), jnp.asarray(Qhat))
    np.testing.assert_allclose(policy_bounds.loss_identity(args[0], args[1], jnp.asarray(pi)), loss, atol=1e-12)
    state, (one, c), two = statewise(*args), span_rung(*args), sup(*args)
    margin, margin_state = margin_rung(*args), margin_statewise(*args)
    tiny = 1e-10
    assert loss <= state + tiny and state <= one + tiny and one <= two + tiny
    assert loss <= margin_state + tiny and margin_state <= state + tiny
    assert loss <= margin + tiny and margin <= one + tiny
    assert jnp.all(c >= 0)


@pytest.mark.parametrize("seed", range(5))
def test_the_rungs_are_those_of_loops(make_problem, seed):
    W = make_problem(seed)
    Qhat, _, occupancy, _ = noisy(W, seed)
    args = (jnp.asarray(occupancy), jnp.asarray(W.Qstar), jnp.asarray(Qhat))
    one, c = span_rung(*args)
    np.testing.assert_allclose(one, rung_1_by_loops(W, Qhat, occupancy), rtol=1e-6)
    H, S, _ = W.r.shape
    margin = two = 0.0
    for h in range(H):
        for s in range(S):
            q, p = Qhat[h, s], W.Qstar[h, s]
            size, gap = span(float(c[h]) * q - p), np.sort(p)[-1] - np.sort(p)[-2]
            margin += occupancy[h, s] * size * (size >= gap)
            two += 2 * occupancy[h, s] * max(abs(q - p))
    np.testing.assert_allclose(margin_rung(*args), margin, rtol=1e-10)
    np.testing.assert_allclose(sup(*args), two, rtol=1e-12)


def test_rung_1_is_invariant_to_a_positive_scale_and_a_shift_of_each_state_and_rung_2_is_not(make_problem):
    W = make_problem(0)
    occupancy = W.occupancy(W.Qstar.argmax(-1))
    Qhat = 0.1 * W.Qstar + np.random.default_rng(0).normal(size=(3, 4, 1))
    args = (jnp.asarray(occupancy), jnp.asarray(W.Qstar), jnp.asarray(Qhat))
    one, c = span_rung(*args)
    assert one < 1e-10
    np.testing.assert_allclose(c, 10.0, rtol=1e-6)
    assert sup(*args) > 1.0


@pytest.mark.parametrize("seed", range(5))
def test_with_two_actions_the_statewise_rung_is_the_truth(make_problem, seed):
    W = make_problem(seed, A=2)
    Qhat, _, occupancy, loss = noisy(W, seed, scale=1.0)
    got = statewise(jnp.asarray(occupancy), jnp.asarray(W.Qstar), jnp.asarray(Qhat))
    np.testing.assert_allclose(got, loss, atol=1e-9)


def test_a_constant_estimate_gives_the_trivial_bound():
    Qstar = jnp.array([[[1.0, 0.0, 0.5]]])
    bound, c = span_rung(jnp.ones((1, 1)), Qstar, jnp.zeros((1, 1, 3)))
    np.testing.assert_allclose(bound, 1.0)
    assert jnp.isfinite(c).all()


def test_the_gap_is_taken_to_the_best_strictly_worse_action():
    Q = jnp.array([[1.0, 1.0, 0.4], [2.0, 1.5, 1.9], [1.0, 1.0 + 1e-14, 0.0], [1.0, 1.0, 1.0]])
    np.testing.assert_allclose(policy_bounds.strict_gap(Q), [0.6, 0.1, 1.0, np.inf], atol=1e-12)
    occupancy, Qstar = jnp.ones((1, 1)), jnp.array([[[1.0, 1.0, 0.0]]])
    Qhat = jnp.array([[[1.2, 1.0, 0.3]]])  # right action; the second-best gap of zero would have kept the whole span
    assert policy_bounds.margin_rung(occupancy, Qstar, Qhat, jnp.ones(1)) == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_the_parts_add_up_and_rung_3_is_above_rung_2(make_problem, seed):
    W = make_problem(seed)
    rng = np.random.default_rng(seed)
    Lambda = np.einsum("sai,saj->ij", W.phi, W.phi) / 12
    A, Ahat, S = rng.normal(size=(3, 3, 3)), rng.normal(size=(3, 3, 3)), rng.normal(size=(3, 3))
    Qhat = np.einsum("sai,hij,hj->hsa", W.phi, Ahat, S)
    bias, estimation = policy_bounds.error_parts(*map(jnp.asarray, (W.phi, A, Lambda, W.w, S)))
    optimization = np.einsum("sai,hij,hj->hsa", W.phi, Ahat - A, S)
    np.testing.assert_allclose(bias + estimation + optimization, Qhat - W.Qstar, atol=1e-12)
    occupancy = W.occupancy(Qhat.argmax(-1))
    two = policy_bounds.sup_rung(jnp.asarray(occupancy), jnp.asarray(W.Qstar), jnp.asarray(Qhat))
    three = policy_bounds.decomposed_rung(jnp.asarray(occupancy), bias, estimation, jnp.asarray(optimization))
    assert two <= three + 1e-12
    expected = 2 * sum(
        occupancy[h, s] * sum(abs(np.asarray(part)[h, s]).max() for part in (bias, estimation, optimization))
        for h in range(3)
        for s in range(4)
    )
    np.testing.assert_allclose(three, expected, rtol=1e-11)


def test_the_tightened_expected_rung_is_below_the_stated_one():
    L, est, bias = jnp.array([2.0, 3.0]), jnp.array([0.4, 0.1]), jnp.array([0.01, 0.3])
    np.testing.assert_allclose(
        policy_bounds.expected_rung(L, est, bias),
        2 * sum(a * (b**0.5 + c**0.5) for a, b, c in [(2.0, 0.4, 0.01), (3.0, 0.1, 0.3)]),
    )
    np.testing.assert_allclose(policy_bounds.expected_rung_tight(2 * L, est, bias), 2 * (2 * 0.41**0.5 + 3 * 0.4**0.5))
    assert policy_bounds.expected_rung_tight(2 * L, est, bias) < policy_bounds.expected_rung(L, est, bias)


def test_the_scale_free_risk_is_the_least_over_multiples_of_the_weights(design):
    D = design(0)
    M, Lq = 5, np.eye(3)
    A = np.asarray(in_context.optimal_weights(D.Lambda, D.Psi, D.K, 2, D.noise))
    minimum = scipy.optimize.minimize_scalar(
        lambda c: float(in_context.risk(c * A, D.Lambda, D.Psi, D.K, M, Lq, D.noise).total), bounds=(0, 20), method="bounded"
    )
    B = in_context.context_second_moment(D.Lambda, D.Psi, D.K, M, D.noise)
    np.testing.assert_allclose(policy_bounds.scale_free_risk(A, D.Lambda @ D.Psi, B, D.Psi, Lq), minimum.fun, rtol=1e-7)
    useless = policy_bounds.scale_free_risk(-A, D.Lambda @ D.Psi, B, D.Psi, Lq)
    np.testing.assert_allclose(useless, np.trace(D.Psi), rtol=1e-12)


def test_the_scale_free_risk_does_not_depend_on_the_training_length_under_isotropy():
    K = (2 + 4) * np.eye(4)
    risks = [
        policy_bounds.scale_free_risk(
            in_context.optimal_weights(np.eye(4), np.eye(4), K, N),
            np.eye(4),
            in_context.context_second_moment(np.eye(4), np.eye(4), K, 8),
            np.eye(4),
            np.eye(4),
        )
        for N in (1, 10, 1000)
    ]
    np.testing.assert_allclose(risks, risks[0], rtol=1e-12)


def test_rung_4_holds_for_the_exact_mean_over_all_contexts_and_tasks(make_problem):
    W = make_problem(3, S=3, A=2, d=2, H=1)
    flat, weights = W.phi.reshape(-1, 2), np.full(6, 1 / 6)
    Lambda = flat.T @ flat / 6
    tasks = np.array([[1.0, -0.5], [-0.3, 0.8], [0.4, 0.5]])
    Psi = tasks.T @ tasks / 3
    K = sum(np.outer(x, x) @ Psi @ np.outer(x, x) for x in flat) / 6
    for N, M in ((2, 2), (30, 3)):
        A = np.asarray(in_context.optimal_weights(Lambda, Psi, K, N))
        loss = 0.0
        for w in tasks:
            for context in np.ndindex(*([6] * M)):
                S = np.mean([flat[i] * (flat[i] @ w) for i in context], axis=0)
                Q = W.phi @ w
                chosen = (W.phi @ A @ S).argmax(1)
                loss += np.prod(weights[list(context)]) / 3 * W.rho @ (Q.max(1) - Q[np.arange(3), chosen])
        risk = in_context.risk(A, Lambda, Psi, K, M, Lambda)
        est, bias = risk.estimation[None], risk.bias[None]
        L = policy_bounds.feature_norm(W.phi, Lambda)
        free = policy_bounds.scale_free_risk(A, Lambda @ Psi, in_context.context_second_moment(Lambda, Psi, K, M), Psi, Lambda)
        difference = policy_bounds.difference_norm(W.phi, Lambda)
        ladder = [
            loss,
            policy_bounds.expected_rung_tight(difference, free[None], jnp.zeros(1)),
            policy_bounds.expected_rung_tight(difference, est, bias),
            policy_bounds.expected_rung_tight(2 * L, est, bias),
            policy_bounds.expected_rung(L, est, bias),
        ]
        assert ladder == sorted(ladder)


def test_the_rungs_work_under_vmap(make_problem):
    problems = [make_problem(seed) for seed in range(3)]
    Q = jnp.stack([jnp.asarray(W.Qstar) for W in problems])
    occupancy = jnp.full((3, 3, 4), 0.25)
    Qhat = Q + 0.1
    for rung in (statewise, sup, margin_rung, lambda *x: span_rung(*x)[0]):
        batched = jax.jit(jax.vmap(rung))(occupancy, Q, Qhat)
        np.testing.assert_allclose(batched, [rung(*x) for x in zip(occupancy, Q, Qhat, strict=True)], atol=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6])
def test_the_gap_scales_with_the_rewards_however_small_they_are(scale):
    Q = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 3)))
    tied = Q.at[0, 0].set(jnp.asarray([1.0, 1.0 + 1e-12, 0.5]))
    np.testing.assert_allclose(policy_bounds.strict_gap(scale * tied), scale * policy_bounds.strict_gap(tied), rtol=1e-12)
