"""Policies of shared prompts: rungs and prices against the enumeration of all trajectories and of all prompts, in numpy."""

# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false, reportCallIssue=false

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from lindm_theory import mean_policy, policy_bounds, pooled
from tests.theory.trajectories import Trajectories, all_trajectories, moments_of, prompts_of_two

rung = jax.jit(pooled.shared_context_rung)


def shared_policies(W, T: Trajectories, B: np.ndarray, law: str = "oracle"):
    """(chance, pihat [n, H, S], occupancy [n, H, S], loss [n]) over all prompts of two trajectories."""
    chance, S = prompts_of_two(T.chance, T.sums(W, getattr(T, law)))
    Q = np.einsum("sad,hdm,nm->nhsa", W.phi, B, S.reshape(len(S), -1))
    pi = Q.argmax(-1)
    seen: dict = {}
    for rule in pi:
        if rule.tobytes() not in seen:
            seen[rule.tobytes()] = (W.occupancy(rule), W.loss(rule))
    d, loss = zip(*(seen[rule.tobytes()] for rule in pi), strict=True)
    return chance, pi, np.array(d), np.array(loss)


@pytest.fixture(scope="module")
def shared(make_problem):
    cases = []
    for seed in range(4):
        W = make_problem(seed, S=2, A=2, d=2, H=3)
        T = all_trajectories(W, seed)
        A = np.random.default_rng(seed).normal(size=(3, 2, 2)) + 2 * np.eye(2)
        B = np.stack([A[h] @ pooled.block(h, 3, 2) for h in range(3)])
        cases.append((W, T, B, *shared_policies(W, T, B)))
    return cases


def test_the_policy_weighted_by_occupancy_has_the_mean_loss_over_all_prompts_and_the_mean_policy_has_not(shared):
    off = []
    for W, _, _, chance, pi, d, loss in shared:
        rule = np.asarray(pooled.occupancy_rule(chance, d, pi, 2))
        np.testing.assert_allclose(W.loss(rule), chance @ loss, atol=1e-12)
        mean = np.asarray(pooled.mean_rule(chance, pi, 2))
        price = pooled.sharing_price(jnp.asarray(W.P), jnp.asarray(W.gap), chance, d, pi)
        np.testing.assert_allclose(chance @ loss - W.loss(mean), price, atol=1e-12)
        off.append(float(price))
    assert max(np.abs(off)) > 1e-3
    assert min(off) < -1e-5 or max(off) > 1e-5


def test_rung_4_holds_in_the_mean_over_all_shared_prompts(shared):
    """Means over four tasks and all prompts; the distance that the proof bounds is within a factor two of its bound."""
    Lq = np.array([[1.0, 0.2], [0.2, 0.7]])
    L = policy_bounds.feature_norm(jnp.asarray(np.stack([W.phi for W, *_ in shared]).reshape(-1, 2, 2)), jnp.asarray(Lq))
    mean_loss, estimation, bias, distance = 0.0, 0.0, 0.0, 0.0
    for W, T, B, chance, _, _, loss in shared:
        m, C = pooled.stack(*moments_of(W, T, "oracle"))
        parts = pooled.reader_risk(B, jnp.stack([m] * 3), jnp.stack([C / 2] * 3), W.w, Lq)
        mean_loss, estimation, bias = mean_loss + chance @ loss / 4, estimation + parts.estimation / 4, bias + parts.bias / 4
        error = np.einsum("hdm,nm->nhd", B, prompts_of_two(T.chance, T.sums(W, T.oracle))[1].reshape(len(chance), -1)) - W.w
        distance = distance + chance @ np.sqrt(np.einsum("nhd,de,nhe->nh", error, Lq, error)) / 4
    assert mean_loss <= policy_bounds.expected_rung(L, estimation, bias)
    size = np.sqrt(np.asarray(estimation + bias))
    assert np.all(distance <= size + 1e-12) and np.all(size <= 2 * distance)


def test_for_independent_stages_both_policies_are_one(make_problem):
    W = make_problem(1, S=2, A=2, d=2, H=2)
    rng = np.random.default_rng(0)
    rules, p, q = rng.integers(0, 2, size=(2, 3, 2)), rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3))
    pairs = list(itertools.product(range(3), repeat=2))
    pi = np.array([[rules[0, i], rules[1, j]] for i, j in pairs])
    chance = np.array([p[i] * q[j] for i, j in pairs])
    d = np.array([W.occupancy(rule) for rule in pi])
    visited = np.einsum("n,nhs->hs", chance, d) > 0
    np.testing.assert_allclose(
        np.asarray(pooled.occupancy_rule(chance, d, pi, 2))[visited], np.asarray(pooled.mean_rule(chance, pi, 2))[visited]
    )


def test_the_largest_chance_of_a_state_is_that_of_all_policies(make_problem):
    W = make_problem(2, S=2, A=2, d=2, H=3)
    occupancies = [W.occupancy(np.array(pi).reshape(3, 2)) for pi in itertools.product(range(2), repeat=6)]
    np.testing.assert_allclose(pooled.reach(jnp.asarray(W.P), jnp.asarray(W.rho)), np.max(occupancies, 0), atol=1e-13)


def worst_mean_occupancy(W, limit: np.ndarray) -> tuple[float, np.ndarray]:
    """The linear program over occupancies mu <= limit, and the multipliers of its bounds."""
    H, S, A = limit.shape
    index = np.arange(H * S * A).reshape(H, S, A)
    flow, right = np.zeros((H * S, H * S * A)), np.zeros(H * S)
    for h, s in itertools.product(range(H), range(S)):
        flow[h * S + s, index[h, s]] = 1
        if h == 0:
            right[s] = W.rho[s]
        else:
            flow[h * S + s, index[h - 1].ravel()] -= W.P[h - 1, :, :, s].ravel()
    out = scipy.optimize.linprog(-W.gap.ravel(), A_eq=flow, b_eq=right, bounds=[(0, u) for u in limit.ravel()])
    assert out.status == 0
    return -out.fun, -out.upper.marginals.reshape(H, S, A)


def test_the_shared_context_rung_is_the_linear_program_above_the_mean_loss(shared):
    for W, T, B, chance, pi, _, loss in shared:
        P, gap, rho = jnp.asarray(W.P), jnp.asarray(W.gap), jnp.asarray(W.rho)
        m, C = pooled.stack(*moments_of(W, T, "oracle"))
        caps = pooled.reader_caps(jnp.asarray(W.phi), B, jnp.stack([m] * 3), jnp.stack([C / 2] * 3))
        pibar = pooled.mean_rule(chance, pi, 2)
        assert np.all(np.asarray(caps) >= np.asarray(pibar) - 1e-12)
        for cap in (np.asarray(caps), np.asarray(pibar)):
            limit = np.asarray(pooled.reach(P, rho))[..., None] * cap
            program, multipliers = worst_mean_occupancy(W, limit)
            np.testing.assert_allclose(rung(P, gap, rho, cap, multipliers), program, atol=1e-8)
            assert chance @ loss <= program + 1e-9
            for other in (np.zeros_like(limit), W.gap, 0.5 * W.gap):
                assert rung(P, gap, rho, cap, other) >= program - 1e-9
        np.testing.assert_allclose(rung(P, gap, rho, cap, W.gap), np.sum(W.gap * limit), rtol=1e-12)


def test_the_price_of_sharing_is_within_its_bound(shared):
    for W, _, _, chance, pi, d, _ in shared:
        P, gap, rho = jnp.asarray(W.P), jnp.asarray(W.gap), jnp.asarray(W.rho)
        price = pooled.sharing_price(P, gap, chance, d, pi)
        assert abs(price) <= pooled.sharing_bound(P, gap, rho, pooled.mean_rule(chance, pi, 2)) + 1e-12


def copying(p: float, gap: float, H: int, last: float | None = None):
    """The instance of `copied_trajectory_loss`: kernels, gaps, and the policies that copy each of the 2^H trajectories.

    last: the chance of action 1 at the last stage, p if not given.
    """
    P = np.zeros((H, 2, 2, 2))
    P[:, 0, 1, 0] = P[:, 0, 0, 1] = P[:, 1, :, 1] = 1.0
    gaps = np.zeros((H, 2, 2))
    gaps[-1, 0, 1] = gap
    chance, pi, d = [], [], []
    for actions in itertools.product((0, 1), repeat=H):
        rule, occupancy, s, weight = np.zeros((H, 2), int), np.zeros((H, 2)), 0, 1.0
        for h, a in enumerate(actions):
            one = last if h == H - 1 and last is not None else p
            weight *= one if a else 1 - one
            rule[h, s] = a  # seen: positive; unseen states keep action 0
            occupancy[h, s] = 1
            s = 0 if (s == 0 and a == 1) else 1
        chance.append(weight)
        pi.append(rule)
        d.append(occupancy)
    return P, gaps, np.array(chance), np.array(pi), np.array(d)


@pytest.mark.parametrize(("p", "gap", "H"), [(0.5, 1.0, 2), (0.7, 0.4, 3)])
def test_a_copied_trajectory_attains_the_shared_rung_and_breaks_the_mean_policy_rung(p, gap, H):
    P, gaps, chance, pi, d = copying(p, gap, H)
    rho = np.array([1.0, 0.0])
    loss = np.einsum("n,nhs,nhsa,hsa->", chance, d, np.eye(2)[pi], gaps)
    mean = pooled.mean_rule(chance, pi, 2)
    expected = pooled.copied_trajectory_loss(p, gap, H)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-12)
    args = jnp.asarray(P), jnp.asarray(gaps), jnp.asarray(rho)
    of_mean = mean_policy.policy_loss(*args, mean)
    np.testing.assert_allclose(of_mean, expected[1], rtol=1e-12)
    np.testing.assert_allclose(rung(*args, mean, gaps), loss, rtol=1e-12)
    # with the exact chances as caps the rung of independent stages is below the truth
    np.testing.assert_allclose(mean_policy.mean_policy_rung(*args, mean), expected[1], rtol=1e-12)
    assert expected[1] < 0.6 * loss
    price = float(pooled.sharing_price(args[0], args[1], chance, d, pi))
    np.testing.assert_allclose(price, loss - of_mean, atol=1e-12)
    assert price <= pooled.sharing_bound(*args, mean) + 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_a_policy_that_copies_its_trajectory_is_the_behavior_policy_where_transitions_are_deterministic(seed):
    """All A^H prompts of one trajectory each; fresh prompts for every stage lose more or less than the behavior policy."""
    H, S, A = 3, 3, 2
    rng = np.random.default_rng(seed)
    P = np.eye(S)[(rng.integers(S, size=(H, S, 1)) + np.arange(A)) % S]  # the actions part
    r = rng.uniform(0.5, 1.5, size=(H, S, A))
    Q, V = np.zeros_like(r), np.zeros(S)
    for h in reversed(range(H)):
        Q[h] = r[h] + P[h] @ V
        V = Q[h].max(-1)
    beta = rng.dirichlet(np.ones(A), size=(H, S))
    chance, pi, d = [], [], []
    for actions in itertools.product(range(A), repeat=H):
        s, weight, Qhat, occupancy = 0, 1.0, np.zeros_like(r), np.zeros((H, S))
        for h, a in enumerate(actions):
            weight *= beta[h, s, a]
            Qhat[h, s, a] = Q[h, s, a]  # one one-hot pair, layer I: what was not seen has the value zero
            occupancy[h, s] = 1
            s = int(P[h, s, a].argmax())
        chance.append(weight)
        pi.append(Qhat.argmax(-1))
        d.append(occupancy)
    chance, pi, d = np.array(chance), np.array(pi), np.array(d)
    args = jnp.asarray(P), jnp.asarray(Q.max(-1, keepdims=True) - Q), jnp.eye(S)[0]
    loss = mean_policy.policy_loss(*args, pooled.occupancy_rule(chance, d, pi, A))
    np.testing.assert_allclose(loss, np.einsum("n,nhs,nhsa,hsa->", chance, d, np.eye(A)[pi], args[1]), atol=1e-12)
    np.testing.assert_allclose(loss, mean_policy.policy_loss(*args, jnp.asarray(beta)), atol=1e-12)
    assert abs(mean_policy.policy_loss(*args, pooled.mean_rule(chance, pi, A)) - loss) > 1e-3


def test_the_bound_of_the_price_is_attained():
    # the state is kept just when the action of the last stage is wrong there
    P, gaps, chance, pi, d = copying(0.3, 0.8, 2, last=1.0)
    mean = pooled.mean_rule(chance, pi, 2)
    price = pooled.sharing_price(jnp.asarray(P), jnp.asarray(gaps), chance, d, pi)
    np.testing.assert_allclose(price, 0.8 * 0.3 * 0.7, rtol=1e-12)
    np.testing.assert_allclose(pooled.sharing_bound(jnp.asarray(P), jnp.asarray(gaps), jnp.array([1.0, 0.0]), mean), price)


def test_sharing_can_also_lower_the_loss():
    # the loss needs different actions at the two stages: never with one coin, half the time with two
    P = np.zeros((2, 2, 2, 2))
    P[0, :, 0, 0] = P[0, :, 1, 1] = P[1, :, :, 0] = 1.0
    gap = np.zeros((2, 2, 2))
    gap[1, 0, 1] = gap[1, 1, 0] = 1.0
    pi = np.array([[[a, a], [a, a]] for a in (0, 1)])
    d = np.array([[[1.0, 0.0], np.eye(2)[a]] for a in (0, 1)])
    price = pooled.sharing_price(jnp.asarray(P), jnp.asarray(gap), jnp.asarray([0.5, 0.5]), d, pi)
    np.testing.assert_allclose(price, -0.5)


@pytest.mark.parametrize("S", [2, 5])
def test_the_factor_S_of_the_union_over_states_is_attained(S):
    """Stage 1 goes to state j, where stage 2 errs only in context j: every flip has chance 1/S, the loss is certain."""
    P = np.zeros((2, S, S, S))
    P[0, :, np.arange(S), np.arange(S)] = 1.0
    P[1, :, :, 0] = 1.0
    gap = np.zeros((2, S, S))
    gap[1, :, 1] = 1.0
    pi = np.array([[np.full(S, j), (np.arange(S) == j).astype(int)] for j in range(S)])
    d = np.array([[np.eye(S)[0], np.eye(S)[j]] for j in range(S)])
    chance = np.full(S, 1 / S)
    pibar = pooled.mean_rule(chance, pi, S)
    assert float(pibar[1, :, 1].max()) == pytest.approx(1 / S)
    args = jnp.asarray(P), jnp.asarray(gap), jnp.asarray(np.eye(S)[0])
    loss = mean_policy.policy_loss(*args, pooled.occupancy_rule(chance, d, pi, S))
    np.testing.assert_allclose(loss, 1.0)
    np.testing.assert_allclose(rung(*args, pibar, gap), 1.0)
    np.testing.assert_allclose(mean_policy.policy_loss(*args, pibar), 1 / S)
