"""Imitation with the log-loss, against lists of all trajectories in numpy."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm_theory import imitation


def trajectories(problem, policy):
    """(probability, return, states, actions) of every trajectory of a stochastic policy [H, S, A]."""
    H, S, A = problem.r.shape
    for states in product(range(S), repeat=H):
        for actions in product(range(A), repeat=H):
            p, total = problem.rho[states[0]], 0.0
            for h in range(H):
                p *= policy[h, states[h], actions[h]]
                p *= problem.P[h, states[h], actions[h], states[h + 1]] if h + 1 < H else 1.0
                total += problem.r[h, states[h], actions[h]]
            yield p, total, states, actions


def law(problem, policy):
    """Probabilities and returns of all trajectories, as arrays in one order."""
    listed = list(trajectories(problem, policy))
    return np.array([t[0] for t in listed]), np.array([t[1] for t in listed])


def draw_imitator(seed, shape, scale=2.0):
    logits = scale * np.random.default_rng(seed).normal(size=shape)
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def onehot(pi, A):
    return np.eye(A)[pi]


@pytest.fixture(params=range(3))
def case(request, make_problem):
    problem = make_problem(request.param, S=3, A=2, d=2, H=3)
    q = draw_imitator(request.param, problem.r.shape)
    return problem, problem.Qstar.argmax(-1), q


def test_deviation_hellinger_and_log_loss_are_those_of_all_trajectories(case):
    problem, expert, q = case
    p_expert, returns = law(problem, onehot(expert, 2))
    p_imitator, _ = law(problem, q)
    on = p_expert > 0
    args = (problem.P, problem.rho, expert, q)
    deviation = imitation.deviation_probability(*args)
    np.testing.assert_allclose(deviation, np.abs(p_expert - p_imitator).sum() / 2, rtol=1e-12)
    hellinger = imitation.squared_hellinger(*args)
    np.testing.assert_allclose(hellinger, ((np.sqrt(p_expert) - np.sqrt(p_imitator)) ** 2).sum(), rtol=1e-12)
    log_loss = imitation.trajectory_log_loss(*args)
    np.testing.assert_allclose(log_loss, (p_expert[on] * np.log(p_expert[on] / p_imitator[on])).sum(), rtol=1e-12)
    value_range = imitation.return_range(problem.P, problem.r, problem.rho)
    np.testing.assert_allclose(value_range, returns.max() - returns.min(), rtol=1e-12)
    loss = (p_expert - p_imitator) @ returns
    np.testing.assert_allclose(imitation.first_deviation_loss(problem.P, problem.r, problem.rho, expert, q), loss, rtol=1e-10)
    assert loss <= imitation.regret_range(problem.P, problem.r, problem.rho, expert) * deviation <= value_range * deviation
    assert hellinger / 2 <= deviation <= hellinger <= log_loss
    assert deviation <= -np.expm1(-log_loss) <= log_loss
    assert deviation <= imitation.stage_deviations(*args).sum()
    reward_range = problem.r.max() - problem.r.min()
    assert loss <= imitation.classical_bound(imitation.stage_deviations(*args), reward_range)


def test_the_regret_range_is_the_worst_of_all_continuations(make_problem):
    problem = make_problem(5, S=2, A=2, d=2, H=3)
    expert, (H, S, A) = problem.Qstar.argmax(-1), problem.r.shape
    V = problem.Qstar.max(-1)
    worst = -np.inf
    for flat in product(range(A), repeat=(H - 1) * S):  # all policies of the later stages
        after = np.array(flat).reshape(H - 1, S)
        W = np.zeros((H + 1, S))
        for h in reversed(range(H)):
            Q = problem.r[h] + problem.P[h] @ W[h + 1]
            for s, a in product(range(S), range(A)):
                if a != expert[h, s]:
                    worst = max(worst, V[h, s] - Q[s, a])
            W[h] = Q[np.arange(S), after[h - 1]] if h else 0
    np.testing.assert_allclose(imitation.regret_range(problem.P, problem.r, problem.rho, expert), worst, rtol=1e-12)


def test_states_that_the_expert_never_visits_do_not_count_in_the_regret_range():
    P = np.zeros((2, 3, 2, 3))
    P[:, 0, 0, 0] = P[:, 0, 1, 1] = P[:, 1, :, 1] = P[:, 2, :, 2] = 1.0
    r = np.zeros((2, 3, 2))
    r[:, 0, 0], r[:, 2, 0] = 1.0, 100.0  # state 2 is never reached
    expert, rho = np.zeros((2, 3), int), np.array([1.0, 0.0, 0.0])
    np.testing.assert_allclose(imitation.regret_range(P, r, rho, expert), 2.0)
    np.testing.assert_allclose(imitation.return_range(P, r, rho), 2.0)


def cliff(H):
    """State 0 on the road, state 1 fallen for good; the return is one after H right actions (action 0), else zero."""
    P = np.zeros((H, 2, 3, 2))
    P[:, 0, 0, 0] = P[:, 0, 1:, 1] = P[:, 1, :, 1] = 1.0
    r = np.zeros((H, 2, 3))
    r[-1, 0, 0] = 1.0
    return P, r, np.array([1.0, 0.0]), np.zeros((H, 2), int)


@pytest.mark.parametrize("H", [1, 4, 16])
def test_on_the_cliff_the_bound_is_the_loss_at_every_horizon_and_its_mutants_are_not_bounds(H):
    P, r, rho, expert = cliff(H)
    error = 0.3 / H
    q = np.broadcast_to([1 - error, error / 2, error / 2], (H, 2, 3))
    loss = 1 - (1 - error) ** H
    log_loss = imitation.trajectory_log_loss(P, rho, expert, q)
    value_range = imitation.return_range(P, r, rho)
    np.testing.assert_allclose(imitation.first_deviation_loss(P, r, rho, expert, q), loss, rtol=1e-12)
    np.testing.assert_allclose(imitation.log_loss_bound(value_range, log_loss), loss, rtol=1e-12)
    np.testing.assert_allclose(value_range * imitation.deviation_probability(P, rho, expert, q), loss, rtol=1e-12)
    assert loss <= value_range * log_loss <= 1.2 * loss
    assert value_range * imitation.squared_hellinger(P, rho, expert, q) <= 1.2 * loss
    assert imitation.log_loss_bound(value_range, log_loss / 2) < loss  # half the log-loss
    assert 0.5 * imitation.log_loss_bound(value_range, log_loss) < loss
    if H > 1:
        assert imitation.log_loss_bound(value_range, log_loss / H) < loss  # the mean over stages
        assert imitation.log_loss_bound(value_range / H, log_loss) < loss  # the range of one reward
        assert imitation.classical_bound(imitation.stage_deviations(P, rho, expert, q), 1.0) > 0.5 * H * loss


def test_the_greedy_policy_pays_the_log_loss_over_log_two_and_the_rate_is_attained(case):
    problem, expert, q = case
    log_loss = imitation.trajectory_log_loss(problem.P, problem.rho, expert, q)
    value_range = imitation.return_range(problem.P, problem.r, problem.rho)
    assert problem.loss(q.argmax(-1)) <= imitation.greedy_log_loss_bound(value_range, log_loss)
    # two start states; in the second the right action has probability 1/2 - 1e-9
    P, r = np.full((1, 2, 2, 2), 0.5), np.array([[[1.0, 0.0], [1.0, 0.0]]])
    rho, expert = np.array([0.7, 0.3]), np.zeros((1, 2), int)
    q = np.array([[[1.0, 0.0], [0.5 - 1e-9, 0.5 + 1e-9]]])
    bound = imitation.greedy_log_loss_bound(1.0, imitation.trajectory_log_loss(P, rho, expert, q))
    np.testing.assert_allclose(bound, 0.3, rtol=1e-6)
    assert rho @ (1 - r[0, np.arange(2), q[0].argmax(-1)]) == 0.3


def test_hot_soft_labels_have_the_greedy_policy_of_least_squares():
    rng = np.random.default_rng(4)
    n, d, states, A = 40, 3, 5, 4
    phi, S, w = rng.normal(size=(states, A, d)), rng.normal(size=(n, d)), rng.normal(size=(n, d))
    w += S @ rng.normal(size=(d, d))
    Q = np.einsum("sad,nd->nsa", phi, w)
    squares = np.asarray(imitation.least_squares_weights(w, S, np.full(n, 1 / n)))
    design = np.einsum("sai,nj->nsaij", phi, S).reshape(-1, d * d)  # least squares on all queries, by another route
    np.testing.assert_allclose(squares.ravel(), np.linalg.lstsq(design, Q.ravel(), rcond=None)[0], rtol=1e-9)

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    T = 1e4
    target, B = softmax(Q / T), np.zeros((d, d))
    x = np.einsum("sai,nj->nsaij", phi, S).reshape(n, states, A, d * d)
    for _ in range(5):  # Newton
        p = softmax(x @ B.ravel())
        mean = np.einsum("nsa,nsak->nsk", p, x)
        hessian = np.einsum("nsa,nsak,nsal->kl", p, x, x) - np.einsum("nsk,nsl->kl", mean, mean)
        B -= np.linalg.solve(hessian, np.einsum("nsa,nsak->k", p - target, x)).reshape(d, d)
    np.testing.assert_allclose(T * B, squares, atol=1e-2 * abs(squares).max())


def test_a_stochastic_expert_pays_the_square_root_and_the_rate_is_attained(case):
    problem, _, q = case
    soft = draw_imitator(17, problem.r.shape)
    p_soft, returns = law(problem, soft)
    p_q, _ = law(problem, q)
    hellinger = imitation.squared_hellinger(problem.P, problem.rho, soft, q)
    np.testing.assert_allclose(hellinger, ((np.sqrt(p_soft) - np.sqrt(p_q)) ** 2).sum(), rtol=1e-12)
    value_range = imitation.return_range(problem.P, problem.r, problem.rho)
    assert abs((p_soft - p_q) @ returns) <= imitation.stochastic_expert_bound(value_range, hellinger)
    # two actions, rewards one and zero: the expert takes the first with 1/2 + e, the imitator with 1/2 - e
    P, rho = np.ones((1, 1, 2, 1)), np.ones(1)
    for e in (0.4, 0.1, 0.01):
        of_expert, of_imitator = np.array([[[0.5 + e, 0.5 - e]]]), np.array([[[0.5 - e, 0.5 + e]]])
        bound = imitation.stochastic_expert_bound(1.0, imitation.squared_hellinger(P, rho, of_expert, of_imitator))
        assert 2 * e <= bound * (1 + 1e-9) and bound <= 2.0001 * e
        assert imitation.squared_hellinger(P, rho, of_expert, of_imitator) < 2 * e or e == 0.4  # D^2 alone is no bound


def test_soft_labels_cost_at_most_their_price(case):
    problem, _, _ = case
    for temperature in (0.01, 0.1, 1.0):
        soft = np.exp((problem.Qstar - problem.Qstar.max(-1, keepdims=True)) / temperature)
        soft /= soft.sum(-1, keepdims=True)
        assert problem.loss(soft) <= imitation.soft_label_price(temperature, 2, 3)


@pytest.mark.parametrize("A", [2, 3, 10, 1000])
def test_the_price_of_soft_labels_is_attained(A):
    price = float(imitation.soft_label_price(1.0, A, 1))
    gaps = np.linspace(1e-3, 20, 20001)
    others = (A - 1) * np.exp(-gaps)
    np.testing.assert_allclose(price, (gaps * others / (1 + others)).max(), rtol=1e-5)  # all gaps equal
    rng = np.random.default_rng(A)
    unequal = np.concatenate([np.zeros((500, 1)), rng.uniform(0, 10, (500, A - 1))], axis=1)
    weights = np.exp(-unequal)
    assert ((unequal * weights).sum(1) / weights.sum(1)).max() <= price < np.log(A)


def test_the_largest_likelihood_is_within_its_bound_with_its_probability():
    """Exact: a policy that leaves the expert with probability e agrees with n trajectories with probability (1 - e)^n."""
    n, delta = 40, 0.1
    errors = np.linspace(0.0, 0.5, 51)
    bound = float(imitation.maximum_likelihood_bound(1.0, len(errors), n, delta))
    bad = errors[errors > bound]
    assert len(bad) > 5
    assert ((1 - bad) ** n).sum() <= delta  # union bound over the policies that would violate it
    tenth = errors[errors > bound / 10]
    assert (1 - tenth[0]) ** n > delta  # a tenth of the bound is no bound
    assert float(imitation.maximum_likelihood_bound(2.0, 3, 1, 0.1)) == 2.0


def test_the_functions_map_over_tasks(make_problem):
    problems = [make_problem(i, S=3, A=2, d=2, H=2) for i in range(2)]
    P, rho, expert = (np.stack(x) for x in zip(*((p.P, p.rho, p.Qstar.argmax(-1)) for p in problems), strict=True))
    q = np.stack([draw_imitator(i, (2, 3, 2)) for i in range(2)])
    mapped = jax.vmap(imitation.deviation_probability)(*map(jnp.asarray, (P, rho, expert, q)))
    one = [imitation.deviation_probability(P[i], rho[i], expert[i], q[i]) for i in range(2)]
    np.testing.assert_allclose(mapped, one, rtol=1e-12)
