# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false, reportCallIssue=false

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from lindm_theory import margin as margins
from lindm_theory import mean_policy

# compiled once for all seeds
rung, policy_loss = jax.jit(mean_policy.mean_policy_rung), jax.jit(mean_policy.policy_loss)
margin_rung = jax.jit(mean_policy.high_probability_margin_rung)
difference_moments = jax.jit(mean_policy.difference_moments)
chernoff_flip_probability = jax.jit(mean_policy.chernoff_flip_probability)


def setting(W, seed, N=6):
    """A design over the pairs and one weight matrix a stage."""
    n, d = W.phi.shape[0] * W.phi.shape[1], W.phi.shape[2]
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(2 * np.ones(n))
    flat = W.phi.reshape(n, d)
    Lambda = np.einsum("n,ni,nj->ij", weights, flat, flat)
    A = np.stack([np.linalg.inv(Lambda + np.eye(d) / (N + h)) for h in range(len(W.w))])
    return flat, weights, Lambda, A


def all_contexts(W, flat, weights, A, M, h, noise=0.0):
    """(chance, Qhat[S, A]) of stage h over all contexts of M pairs with labels off by +-noise."""
    points = [(i, e) for i in range(len(flat)) for e in ((-noise, noise) if noise else (0.0,))]
    for context in itertools.product(points, repeat=M):
        chance = np.prod([weights[i] / (2 if noise else 1) for i, _ in context])
        S = sum(flat[i] * (flat[i] @ W.w[h] + e) for i, e in context) / M
        yield chance, W.phi @ A[h] @ S


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_over_all_contexts_is_the_loss_of_the_mean_policy_and_the_rung_is_above_it(make_problem, seed):
    W = make_problem(seed, S=2, A=2, d=2, H=2)
    flat, weights, _, A = setting(W, seed)
    M = 3
    stages = [list(all_contexts(W, flat, weights, A, M, h)) for h in range(2)]
    mean_loss = sum(p * q * W.loss(np.stack([Q0.argmax(1), Q1.argmax(1)])) for (p, Q0), (q, Q1) in itertools.product(*stages))
    pibar = np.zeros((2, 2, 2))
    for h, stage in enumerate(stages):
        for p, Q in stage:
            pibar[h, np.arange(2), Q.argmax(1)] += p
    np.testing.assert_allclose(W.loss(pibar), mean_loss, atol=1e-12)
    P, gap, rho = jnp.asarray(W.P), jnp.asarray(W.gap), jnp.asarray(W.rho)
    np.testing.assert_allclose(policy_loss(P, gap, rho, jnp.asarray(pibar)), mean_loss, atol=1e-12)
    np.testing.assert_allclose(rung(P, gap, rho, jnp.asarray(pibar)), mean_loss, atol=1e-12)
    moments = difference_moments(jnp.asarray(W.phi), jnp.asarray(A), jnp.asarray(W.w), jnp.asarray(weights))
    chernoff = chernoff_flip_probability(jnp.asarray(W.phi), jnp.asarray(A), jnp.asarray(W.w), jnp.asarray(weights), M)
    for probability in (mean_policy.flip_probability(*moments, M), chernoff):
        caps = mean_policy.action_caps(probability)
        assert np.all(np.asarray(caps) >= pibar - 1e-12)
        assert mean_loss <= rung(P, gap, rho, caps) + 1e-12


def test_dependent_stages_break_the_identity_of_the_mean_policy():
    # two stages share one coin: the loss needs both errors, whose chance is 1/2, not 1/4
    P = np.zeros((2, 2, 2, 2))
    P[0, :, 0, 0] = P[0, :, 1, 1] = P[1, :, :, 0] = 1.0  # the action of stage 0 is the state of stage 1
    r = np.zeros((2, 2, 2))
    r[1, 1, 1] = -1.0

    def value(a, b):
        return r[1, a, b]

    shared = (value(0, 0) + value(1, 1)) / 2
    independent = sum(value(a, b) for a in (0, 1) for b in (0, 1)) / 4
    assert shared == -0.5 and independent == -0.25


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_moments_of_the_differences_are_those_of_enumeration(make_problem, noise):
    W = make_problem(4, S=2, A=3, d=2, H=2)
    flat, weights, _, A = setting(W, 4)
    got = difference_moments(jnp.asarray(W.phi), jnp.asarray(A), jnp.asarray(W.w), jnp.asarray(weights), noise, noise**2)
    for h in range(2):
        single = list(all_contexts(W, flat, weights, A, 1, h, noise))
        for s, a, b in itertools.product(range(2), range(3), range(3)):
            values = np.array([Q[s, b] - Q[s, a] for _, Q in single])
            chances = np.array([p for p, _ in single])
            mean = chances @ values
            expected = [mean, chances @ (values - mean) ** 2, np.max(mean - values)]
            np.testing.assert_allclose([m[h, s, a, b] for m in got], expected, atol=1e-10)


def test_the_greedy_filling_solves_the_linear_program(make_problem):
    W = make_problem(5)
    rng = np.random.default_rng(5)
    caps = np.minimum(rng.uniform(0.1, 0.9, size=W.r.shape), 1.0)
    U = np.zeros(4)
    for h in reversed(range(3)):
        value = W.gap[h] + W.P[h] @ U
        U = np.array(
            [
                -scipy.optimize.linprog(-value[s], A_eq=np.ones((1, 3)), b_eq=[1.0], bounds=[(0, c) for c in caps[h, s]]).fun
                if caps[h, s].sum() >= 1
                else caps[h, s] @ value[s] + (1 - caps[h, s].sum()) * value[s].max()
                for s in range(4)
            ]
        )
    got = rung(jnp.asarray(W.P), jnp.asarray(W.gap), jnp.asarray(W.rho), jnp.asarray(caps))
    np.testing.assert_allclose(got, W.rho @ U, rtol=1e-9)


def test_caps_of_one_give_the_worst_policy_and_caps_on_an_optimal_policy_give_zero(make_problem):
    W = make_problem(6, S=2, A=2, d=2, H=2)
    worst = max(W.loss(np.array(pi).reshape(2, 2)) for pi in itertools.product(range(2), repeat=4))
    P, gap, rho = jnp.asarray(W.P), jnp.asarray(W.gap), jnp.asarray(W.rho)
    np.testing.assert_allclose(rung(P, gap, rho, jnp.ones((2, 2, 2))), worst, rtol=1e-12)
    optimal = jax.nn.one_hot(jnp.argmax(jnp.asarray(W.Qstar), -1), 2)
    assert abs(rung(P, gap, rho, optimal)) < 1e-14


def test_the_high_probability_margin_rung_holds_with_its_probability_and_reaches_zero(make_problem):
    W = make_problem(7, S=2, A=2, d=2, H=2)
    flat, weights, Lambda, A = setting(W, 7, N=10**6)
    P, gap, rho = jnp.asarray(W.P), jnp.asarray(W.gap), jnp.asarray(W.rho)
    moments = difference_moments(jnp.asarray(W.phi), jnp.asarray(A), jnp.asarray(W.w), jnp.asarray(weights))
    for M, delta in ((3, 0.9), (4, 0.5)):
        bound = float(margin_rung(P, gap, rho, *moments, M, delta))
        stages = [list(all_contexts(W, flat, weights, A, M, h)) for h in range(2)]
        failing = sum(
            p * q
            for (p, Q0), (q, Q1) in itertools.product(*stages)
            if W.loss(np.stack([Q0.argmax(1), Q1.argmax(1)])) > bound + 1e-12
        )
        assert failing <= delta
    assert np.all(
        np.asarray(
            margins.bias_margin(
                margins.infinite_context_values(jnp.asarray(W.phi), jnp.asarray(A), jnp.asarray(Lambda), jnp.asarray(W.w)),
                jnp.asarray(W.Qstar),
            )
        )
        > 0
    )
    assert abs(margin_rung(P, gap, rho, *moments, 10**9, 0.05)) < 1e-12


def test_the_decay_exponent_bounds_the_mean_loss_for_every_length(make_problem):
    W = make_problem(8, S=2, A=2, d=2, H=2)
    flat, weights, _, A = setting(W, 8, N=10**6)
    moments = difference_moments(jnp.asarray(W.phi), jnp.asarray(A), jnp.asarray(W.w), jnp.asarray(weights))
    rate = float(mean_policy.decay_exponent(jnp.asarray(W.gap), *moments))
    assert rate > 0
    for M in (1, 2, 4):
        pibar = np.zeros((2, 2, 2))
        for h in range(2):
            for p, Q in all_contexts(W, flat, weights, A, M, h):
                pibar[h, np.arange(2), Q.argmax(1)] += p
        assert W.loss(pibar) <= 2 * 1 * W.gap.max() * np.exp(-M * rate) + 1e-12


def test_the_margin_bound_says_nothing_below_the_informative_length(make_problem):
    # two actions whose difference is small against the spread of one pair's part of it: the exponent is 7e-5
    W = make_problem(28, S=2, A=2, d=2, H=2)
    _, weights, _, A = setting(W, 28, N=10**6)
    moments = difference_moments(jnp.asarray(W.phi), jnp.asarray(A), jnp.asarray(W.w), jnp.asarray(weights))
    rate = float(mean_policy.decay_exponent(jnp.asarray(W.gap), *moments))
    trivial = 2 * W.gap.max()  # H max(gap)
    assert 0 < rate < 1e-4 and trivial * np.exp(-512 * rate) > 0.95 * trivial
    for share in (0.5, 0.01):
        length = float(mean_policy.informative_length(rate, 2, share))
        np.testing.assert_allclose(trivial * np.exp(-length * rate), share * trivial, rtol=1e-9)
        margin, variance = (np.asarray(m) for m in moments[:2])
        ratio = min(
            margin[h, s, a, 1 - a] ** 2 / variance[h, s, a, 1 - a] for h, s, a in np.ndindex(2, 2, 2) if W.gap[h, s, a] > 0
        )
        assert length >= 2 / ratio * np.log(1 / share)
    # three actions: more than the trivial bound until log(2)/exponent
    assert mean_policy.informative_length(rate, 3) > 7000 and mean_policy.informative_length(rate, 2) == 0


def test_noise_without_a_bound_makes_the_exponent_zero(make_problem):
    W = make_problem(8, S=2, A=2, d=2, H=2)
    _, weights, _, A = setting(W, 8, N=10**6)
    arrays = [jnp.asarray(x) for x in (W.phi, A, W.w, weights)]
    rates = [float(mean_policy.decay_exponent(jnp.asarray(W.gap), *difference_moments(*arrays, b, 0.01))) for b in (0.1, jnp.inf)]
    assert rates[0] > 0 and rates[1] == 0
