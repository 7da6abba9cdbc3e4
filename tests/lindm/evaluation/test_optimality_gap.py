"""What a policy loses: by plain recursion over histories in the test, by sampling, and by the tree's own tables."""
# what may be None is there in these tests
# pyright: reportOptionalOperand=false, reportOptionalSubscript=false, reportOperatorIssue=false

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.evaluation.calibration import score
from lindm.evaluation.environments import double_precision, make_tasks
from lindm.evaluation.intervals import mean_interval
from lindm.evaluation.optimality_gap import PolicyLoss, evaluate_policy, summarize
from lindm.evaluation.policies.demonstrations import BC
from lindm.evaluation.policy import FunctionPolicy, Observation, Policy
from lindm.problems.apomdp import as_apomdp
from lindm.problems.mdp import mdp
from lindm.solvers import tree
from lindm.text import Step
from lindm.types import POMDP


def coin(*facts, of):
    """An arbitrary but fixed choice that depends on everything that is seen."""
    return hashlib.sha256(repr(facts).encode()).digest()[0] % of


def evaluate(problems, policy, **options) -> list[PolicyLoss]:
    """Where every problem can be evaluated."""
    losses = evaluate_policy(make_tasks(problems, [()] * len(problems)), policy, **options)
    assert all(one is not None for one in losses)
    return [one for one in losses if one is not None]


def fields(steps, rewards=True):
    return tuple((s.action, s.state, s.model, s.observation, s.reward if rewards else None) for s in steps)


def arbitrary(A, rewards=True):
    return lambda demonstrations, history: coin(fields(history, rewards), of=A)


def random_mdp(seed, S=3, A=2, H=3):
    rng = np.random.default_rng(seed)
    P, r, rho = rng.dirichlet(np.ones(S), (H, S, A)), rng.uniform(size=(H, S, A)), rng.dirichlet(np.ones(S))
    return mdp(P, r, rho), (P, r, rho)


def value_of(P, r, rho, A, rewards):
    """V of the arbitrary policy, recursing over histories with Python's own arithmetic."""
    H, S = r.shape[:2]

    def after(t, s, past):
        a = coin(fields((*past, Step(None, state=s))), of=A)
        total = r[t, s, a]
        if t + 1 < H:
            seen = (*past, Step(a, state=s, reward=float(r[t, s, a]) if rewards else None))
            total += sum(P[t, s, a, u] * after(t + 1, u, seen) for u in range(S))
        return total

    return sum(rho[s] * after(0, s, ()) for s in range(S))


def best_of(P, r, rho):
    V = np.zeros(r.shape[1])
    for t in reversed(range(len(r))):
        V = (r[t] + P[t] @ V).max(-1)
    return rho @ V


@pytest.mark.parametrize("rewards", [False, True])
def test_the_loss_of_a_policy_of_an_mdp_is_that_of_plain_recursion(rewards):
    problems, arrays = zip(*(random_mdp(seed) for seed in range(3)), strict=True)
    for loss, (P, r, rho) in zip(evaluate(problems, arbitrary(2, rewards)), arrays, strict=True):
        assert loss.exact
        np.testing.assert_allclose(loss.optimal_value, best_of(P, r, rho), rtol=1e-12)
        wanted = best_of(P, r, rho) - value_of(P, r, rho, 2, rewards)
        np.testing.assert_allclose(loss.suboptimality, wanted, rtol=1e-10, atol=1e-12)
        assert loss.normalized_gap > 0 and loss.decisions == 3 + 9 + 27


def test_sampled_episodes_estimate_the_same_loss():
    problem, (P, r, rho) = random_mdp(5)
    exact = best_of(P, r, rho) - value_of(P, r, rho, 2, False)
    policy = arbitrary(2, rewards=False)
    losses = [evaluate([problem], policy, episodes=50, seed=seed, max_histories=0)[0] for seed in range(60)]
    gaps = np.array([one.suboptimality for one in losses])
    assert not any(one.exact for one in losses)
    assert abs(gaps.mean() - exact) < 5 * gaps.std(ddof=1) / np.sqrt(len(gaps))
    assert evaluate([problem], policy, episodes=50, seed=3, max_histories=0)[0] == losses[3]


@pytest.mark.parametrize("M, alpha", [(1, 0.5), (2, 0.7), (2, 0.0), (3, 1.0)])
def test_the_loss_under_hidden_states_and_ambiguity_is_that_of_plain_recursion(brute, M, alpha):
    reference = brute.random(3, S=3, A=2, O=2, M=M, H=3, alpha=alpha)
    problem = reference.problem()
    ambiguous = M > 1
    if not ambiguous:
        problem = jax.tree.map(lambda x: x[0], problem.models)
        assert isinstance(problem, POMDP)

    def act(t, history):
        steps = [Step(a, model=m if ambiguous else None, observation=o) for a, m, o in history]
        return np.eye(reference.A)[coin(fields((*steps, Step(None))), of=reference.A)]

    (loss,) = evaluate([problem], arbitrary(reference.A))
    V, best = reference.V(list(reference.rho), 0, (), act), reference.V(list(reference.rho), 0)
    assert loss.exact
    np.testing.assert_allclose(loss.suboptimality, best - V, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(loss.optimal_value, best, rtol=1e-12)
    uniform = reference.V(list(reference.rho), 0, (), lambda t, h: np.full(reference.A, 1 / reference.A))
    np.testing.assert_allclose(loss.uniform_value, uniform, rtol=1e-12)


def test_sampled_histories_of_a_pomdp_estimate_the_same_loss_and_an_ambiguous_one_is_left_out(brute):
    reference = brute.random(4, S=3, A=2, O=2, M=1, H=4)
    problem = jax.tree.map(lambda x: x[0], reference.problem().models)
    exact = evaluate([problem], arbitrary(2))[0].suboptimality
    losses = [evaluate([problem], arbitrary(2), episodes=40, seed=s, max_histories=1)[0] for s in range(60)]
    gaps = np.array([loss.suboptimality for loss in losses])
    assert abs(gaps.mean() - exact) < 5 * gaps.std(ddof=1) / np.sqrt(len(gaps))
    ambiguous = make_tasks([brute.random(4, S=2, A=2, O=2, M=2, H=3).problem()], [()])
    assert evaluate_policy(ambiguous, arbitrary(2), max_histories=3) == [None]
    (loss,) = evaluate_policy(ambiguous, arbitrary(2), max_histories=16)
    assert loss is not None and loss.decisions == 1 + 4 + 16


def test_an_optimal_policy_loses_nothing_and_agrees_always(brute):
    problem = jax.tree.map(lambda x: x[0], brute.random(6, S=3, A=2, O=2, M=1, H=3).problem().models)
    apomdp = as_apomdp(problem)
    best = tree.optimal_policy(apomdp, tree.tree(apomdp))

    def act(demonstrations, history):
        number = sum((s.action * 2 + s.observation) * 4**t for t, s in enumerate(history[:-1]))
        return int(best[len(history) - 1][number])

    for max_histories in (2048, 1):
        loss = evaluate([problem], act, max_histories=max_histories)[0]
        assert abs(loss.suboptimality) < 1e-12 and loss.agreement == pytest.approx(1, rel=1e-12)


def test_a_history_continues_the_one_that_it_names():
    problem, _ = random_mdp(1)
    before: list = []

    class Recorder(Policy):
        """The last observed states and actions of every history, by nothing but the rows of the parents."""

        def init(self, tasks):
            return [()]

        def step(self, state, observation: Observation):
            assert observation.state is not None and (observation.task == 0).all()
            new = list(observation.state)
            if observation.action is not None:
                new = list(zip(observation.action, observation.state, strict=True))
            histories = [(*state[parent], x) for parent, x in zip(observation.parent, new, strict=True)]
            before[:] = histories
            return histories, np.tile([1.0, 0.0], (len(histories), 1))

    evaluate([problem], Recorder())
    assert len(set(before)) == len(before) == 27


@pytest.mark.parametrize("max_histories", [10_000, 30, 1])
def test_the_loss_of_a_stochastic_policy_equals_the_recursion_and_is_sampled_above_the_limit(max_histories):
    problem, (P, r, rho) = random_mdp(4)

    def law(history):
        p = 0.1 + 0.8 * coin(fields(history, rewards=False), of=7) / 6
        return np.array([p, 1 - p])

    def value(t, s, past):
        history = (*past, Step(None, state=s))
        total = law(history) @ r[t, s]
        if t + 1 < 3:
            for a, p in enumerate(law(history)):
                total += p * sum(P[t, s, a, u] * value(t + 1, u, (*past, Step(a, state=s))) for u in range(3))
        return total

    wanted = best_of(P, r, rho) - sum(rho[s] * value(0, s, ()) for s in range(3))
    losses = [
        evaluate([problem], lambda demonstrations, history: law(history), episodes=40, seed=seed, max_histories=max_histories)[0]
        for seed in range(1 if max_histories == 10_000 else 40)
    ]
    gaps = np.array([loss.suboptimality for loss in losses])
    if max_histories == 10_000:
        assert losses[0].exact and losses[0].decisions == 3 + 3 * 6 + 3 * 6 * 6
        np.testing.assert_allclose(gaps, wanted, rtol=1e-12)
    else:
        assert not any(loss.exact for loss in losses)
        assert abs(gaps.mean() - wanted) < 5 * gaps.std(ddof=1) / np.sqrt(len(gaps))


def test_tasks_are_evaluated_in_batches_as_alone():
    problems, _ = zip(*(random_mdp(seed) for seed in range(5)), strict=True)
    calls = []

    class Batched(FunctionPolicy):
        batch_size = 8

        def init(self, tasks):
            calls.append(len(tasks))
            return tasks, [()] * 1

    losses = evaluate(problems, Batched(arbitrary(2)), episodes=4, seed=7, max_histories=1)
    assert calls == [2, 2, 1] and losses == evaluate(problems, arbitrary(2), episodes=4, seed=7, max_histories=1)


@pytest.mark.parametrize(
    "answer, message",
    [([0.5, 0.6], r"must not be negative and sum to 1; got \[0.5, 0.6\]"), ([1.0], r"shape \(3, 2\); got \(3, 1\)")],
)
def test_invalid_probabilities_raise_an_error(answer, message):
    with pytest.raises(ValueError, match=message):
        evaluate([random_mdp(0)[0]], lambda demonstrations, history: answer)


def test_evaluation_uses_double_precision_with_any_precision_of_the_model():
    problem, (P, r, rho) = random_mdp(2)
    jax.config.update("jax_enable_x64", False)
    try:
        with double_precision():
            assert jnp.zeros(1).dtype == np.float64
        assert jnp.zeros(1).dtype == np.float32
        loss = evaluate([problem], arbitrary(2))[0]
    finally:
        jax.config.update("jax_enable_x64", True)
    np.testing.assert_allclose(loss.optimal_value, best_of(P, r, rho), rtol=1e-12)


def test_bc_does_what_the_demonstrations_did_most():
    def episode(*pairs):
        return tuple(Step(a, state=s) for s, a in pairs)

    problem, _ = random_mdp(0, S=6, A=3)
    demonstrations = [episode((0, 1), (1, 0), (0, 1)), episode((0, 2), (1, 2), (1, 2))]
    wanted = {0: 1, 1: 2, 5: 2}  # state 5 was never seen: what they did most often at all
    for state, action in wanted.items():
        assert BC().act(demonstrations, [Step(None, state=state)], problem).probabilities.argmax() == action


def test_problems_of_two_horizons_raise_an_error():
    with pytest.raises(ValueError, match=r"tasks must have one horizon; got \[2, 3\]"):
        evaluate([random_mdp(0, H=2)[0], random_mdp(0, H=3)[0]], arbitrary(2))


def test_the_interval_is_that_of_a_t_distribution_over_tasks():
    summary = summarize([lost(float(x), uniform=-6.0) for x in (4, 5, 6)])
    half = 4.302652729911275 * 0.1 / 3**0.5  # the 0.975 quantile for two degrees of freedom, from a table
    assert summary["gap"] == pytest.approx(0.5) and summary["gap_ci"] == pytest.approx([0.5 - half, 0.5 + half])
    assert summary["gap_of_value"] == pytest.approx(1.25)
    assert summary["gap_of_value_ci"] == pytest.approx([1.25 - 2.5 * half, 1.25 + 2.5 * half])
    assert summary["suboptimality"] == 5 and summary["suboptimality_ci"] == pytest.approx([5 - 10 * half, 5 + 10 * half])
    assert (summary["value"], summary["optimal_lower"], summary["uniform_value"]) == (-1, 4, -6)
    assert summary["interval_over"] == "tasks" and summary["note"] is None


def test_an_interval_of_what_cannot_be_negative_begins_at_zero():
    summary = summarize([lost(float(x)) for x in range(3)])  # of few tasks: the mean is 1 and the half width 2.5
    half = 4.302652729911275 * 0.5 / 3**0.5
    assert half > 0.5 and summary["gap_ci"] == pytest.approx([0, 0.5 + half])
    assert summary["suboptimality_ci"] == pytest.approx([0, 1 + 2 * half])
    assert mean_interval([0.0, 1.0, 2.0], 0.0)[1] == pytest.approx([0, 1 + 2 * half])
    assert mean_interval([0.0, 1.0, 2.0])[1] == pytest.approx([1 - 2 * half, 1 + 2 * half])  # of a difference


def lost(suboptimality, optimal=4.0, uniform=2.0, **fields):
    values = {"agreement": 0.5, "exact": True, "decisions": 1} | fields
    return PolicyLoss(suboptimality=suboptimality, optimal_value=optimal, uniform_value=uniform, **values)


@pytest.mark.parametrize("r, share", [(0.0, None), (0.1, 0.0)])
def test_where_every_policy_is_optimal_the_gap_is_undefined_and_a_note_says_so(r, share):
    problem = mdp(np.full((1, 2, 2, 2), 0.5), np.full((3, 2, 2), r), np.array([0.3, 0.7]))
    summary = summarize(evaluate([problem], arbitrary(2)))
    assert (summary["gap"], summary["gap_ci"], summary["suboptimality_ci"], summary["agreement"]) == (None, None, None, 1)
    assert summary["suboptimality"] == pytest.approx(0, abs=1e-12)
    assert summary["gap_of_value"] == (share if share is None else pytest.approx(share, abs=1e-12))
    assert summary["note"] == "V* = V^random in every task: there the normalized gap is undefined"


def test_values_that_cancel_to_rounding_are_zero():
    """V* = V^random = 0.1 + 0.2 - 0.3, which is not zero in floating point."""
    r = np.array([0.1, 0.2, -0.3])[:, None, None] * np.ones((3, 2, 2))
    (loss,) = evaluate([mdp(np.full((1, 2, 2, 2), 0.5), r, np.array([0.3, 0.7]))], arbitrary(2))
    assert loss.optimal_value == loss.uniform_value == 0 and loss.normalized_gap is None


def test_a_task_without_a_gap_is_left_out_of_the_mean_and_counted_in_the_note():
    summary = summarize([lost(1.0), lost(0.5), lost(0.0, optimal=2.0)])
    assert summary["gap"] == pytest.approx(0.375) and summary["n"] == 3 and summary["suboptimality"] == pytest.approx(0.5)
    assert summary["note"] == "V* = V^random in 1 of 3 tasks, which are left out: there the normalized gap is undefined"


def test_there_is_no_interval_where_nothing_varies_and_one_over_episodes_for_a_single_task():
    for same in ([lost(1.0)], [lost(1.0), lost(1.0 + 1e-13)]):
        summary = summarize(same, "demonstrations")
        assert summary["gap"] == pytest.approx(0.5)
        assert [summary[name] for name in ("gap_ci", "suboptimality_ci", "gap_of_value_ci", "interval_over")] == [None] * 4
    summary = summarize([lost(1.0, exact=False, episodes=3, error=0.2)], "demonstrations")
    half = 4.302652729911275 * 0.2  # two degrees of freedom
    assert summary["suboptimality_ci"] == pytest.approx([1 - half, 1 + half]) and summary["interval_over"] == "episodes"
    assert summary["gap_ci"] == pytest.approx([0.5 - half / 2, 0.5 + half / 2]) and summary["method"] == "rollout"


def test_the_error_of_sampled_episodes_is_that_of_their_mean():
    problem, _ = random_mdp(5)
    losses = [evaluate([problem], arbitrary(2), episodes=40, seed=seed, max_histories=0)[0] for seed in range(60)]
    spread = np.std([loss.suboptimality for loss in losses], ddof=1)
    assert np.mean([loss.error for loss in losses]) == pytest.approx(spread, rel=0.35) and losses[0].episodes == 40


@pytest.mark.parametrize("answer", [2, -1, 0.5, None, "left"])
def test_an_answer_that_is_no_action_raises_an_error(answer):
    problem = mdp(np.full((1, 2, 2, 2), 0.5), np.zeros((2, 2, 2)), np.array([0.3, 0.7]))
    with pytest.raises(ValueError, match=f"a policy must return .*; got {answer!r}"):
        evaluate([problem], lambda demonstrations, history: answer)


def test_the_scored_histories_of_a_policy_are_those_of_plain_recursion():
    """The mean of -ln of the probability of the best action, over all stages, with the probabilities of the histories."""
    problem, (P, r, rho) = random_mdp(6)

    def law(history):
        p = 0.1 + 0.8 * coin(fields(history, rewards=False), of=7) / 6
        return np.array([p, 1 - p])

    Q = np.zeros(r.shape)
    for t in reversed(range(3)):
        Q[t] = r[t] + (P[t] @ Q[t + 1].max(-1) if t < 2 else 0)

    def total(t, s, past):
        history = (*past, Step(None, state=s))
        p = law(history)
        loss = -np.log(p[Q[t, s].argmax()])
        if t < 2:
            for a in range(2):
                loss += p[a] * sum(P[t, s, a, u] * total(t + 1, u, (*past, Step(a, state=s))) for u in range(3))
        return loss

    (loss,) = evaluate([problem], lambda demonstrations, history: law(history), max_histories=10_000)
    wanted = sum(rho[s] * total(0, s, ()) for s in range(3)) / 3
    assert score([loss.scored]).log_loss == pytest.approx(wanted, rel=1e-12)
    assert loss.scored.weight.sum() == pytest.approx(1, rel=1e-12) and len(loss.scored.weight) <= 7 * 2 * 2


def test_the_mass_on_optimal_actions_is_the_agreement():
    problem, _ = random_mdp(7)
    for options in ({"max_histories": 10_000}, {"max_histories": 1, "episodes": 20}):
        (loss,) = evaluate([problem], lambda demonstrations, history: [0.3, 0.7], **options)
        mass = np.where(loss.scored.optimal, np.exp(loss.scored.log_p), 0).sum(-1)
        assert loss.scored.weight @ mass == pytest.approx(loss.agreement, rel=1e-12)
