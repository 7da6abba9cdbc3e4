"""Losses in POMDPs that are too large for Q*: against exact values of small ones, by plain recursion, and by replication."""

import dataclasses

import jax
import numpy as np
import pytest

from lindm.evaluation import environments
from lindm.evaluation.environments import BoundedEnvironment, make_tasks
from lindm.evaluation.optimality_gap import PolicyLoss, evaluate_policy, summarize
from lindm.evaluation.policies.optimal import Oracle, Random
from lindm.evaluation.policy import FunctionPolicy, Observation, Policy

A = 2
LAW = np.random.default_rng(0).dirichlet(np.ones(A), 4)  # after no observation yet, and after each of two


class ByObservation(Policy):
    """Random actions, by the last observation."""

    def init(self, tasks):
        return None

    def step(self, state, observation: Observation):
        seen = np.zeros(len(observation), int) if observation.observation is None else 1 + observation.observation
        return None, LAW[seen]


def by_observation(t, history):
    return LAW[0 if t == 0 else 1 + history[-1][2]]


@pytest.fixture(scope="module")
def reference(brute):
    return brute.random(4, S=3, A=A, O=2, M=1, H=4)


@pytest.fixture(scope="module")
def problem(reference):
    return jax.tree.map(lambda x: x[0], reference.problem().models)


@pytest.fixture(scope="module")
def task(problem):
    (task,) = make_tasks([problem], [()], budget=0, effort=1)
    assert isinstance(task.environment, BoundedEnvironment)
    return task


def losses(tasks, policy, **options) -> list[PolicyLoss]:
    results = evaluate_policy(tasks, policy, **options)
    assert all(one is not None for one in results)
    return [one for one in results if one is not None]


def test_over_all_histories_the_value_of_a_policy_is_exact_whatever_the_bound_is(reference, task):
    """The bounds after one trial are far apart; the sum over histories is that of plain recursion all the same."""
    (loss,) = losses([task], ByObservation(), max_histories=10_000)
    rho = list(reference.rho)
    best, value = reference.V(rho, 0), reference.V(rho, 0, (), by_observation)
    uniform = reference.V(rho, 0, (), lambda t, history: np.full(A, 1 / A))
    np.testing.assert_allclose(loss.optimal_value - loss.suboptimality, value, rtol=1e-12)
    np.testing.assert_allclose(loss.uniform_value, uniform, rtol=1e-12)
    assert loss.optimal_value <= best <= loss.optimal_value + loss.width and loss.width > 0.01 and loss.exact
    assert loss.agreement is None
    interval = loss.range("random")
    assert interval is not None
    low, high, *_ = interval
    assert low <= (best - value) / (best - uniform) <= high


def test_the_intervals_contain_the_exact_gaps_as_often_as_they_say(reference, task):
    """200 comparisons with 4 tasks of 64 episodes each. Without the width of the bounds, the intervals miss far more often."""
    rho = list(reference.rho)
    best, value = reference.V(rho, 0), reference.V(rho, 0, (), by_observation)
    uniform = reference.V(rho, 0, (), lambda t, history: np.full(A, 1 / A))
    truth = {"gap": (best - value) / (best - uniform), "suboptimality": best - value, "gap_of_value": (best - value) / best}
    inside, narrow = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0)
    for seed in range(200):
        sampled = losses([task] * 4, ByObservation(), seed=seed, episodes=64, max_histories=0)
        assert not any(one.exact for one in sampled)
        half = sampled[0].width / 2
        moved = [(one.optimal_value + half, one.suboptimality + half) for one in sampled]
        middle = [
            dataclasses.replace(one, optimal_value=optimal, suboptimality=suboptimality, width=0)
            for one, (optimal, suboptimality) in zip(sampled, moved, strict=True)
        ]
        for count, rows in ((inside, sampled), (narrow, middle)):
            summary = summarize(rows)
            for name, wanted in truth.items():
                low, high = summary[f"{name}_ci"]
                count[name] += low <= wanted <= high
    assert min(inside.values()) >= 0.94 * 200 and narrow["suboptimality"] < 0.8 * 200, (inside, narrow)


def test_with_closed_bounds_the_interval_is_that_of_the_sampling_and_covers_at_its_rate(problem, reference):
    (task,) = make_tasks([problem], [()], budget=0, effort=64)
    rho = list(reference.rho)
    wanted = reference.V(rho, 0) - reference.V(rho, 0, (), by_observation)
    inside = 0
    for seed in range(300):
        sampled = losses([task] * 4, ByObservation(), seed=seed, episodes=4, max_histories=0)
        assert sampled[0].width < 1e-6
        low, high = summarize(sampled)["suboptimality_ci"]
        inside += low <= wanted <= high
    assert 0.91 * 300 <= inside <= 0.99 * 300  # 95 %, within three standard errors


def test_policies_meet_the_same_episodes(task):
    """Common random numbers: equal actions give equal losses, and a difference varies less than its parts would alone."""
    constant = FunctionPolicy(lambda demonstrations, history: 1)
    almost = FunctionPolicy(lambda demonstrations, history: 1 if len(history) < 4 else 0)
    first, again, other = (losses([task] * 30, p, episodes=2, max_histories=0) for p in (constant, constant, almost))
    assert first == again
    x, y = (np.array([one.suboptimality for one in rows]) for rows in (first, other))
    assert np.var(x - y) < 0.5 * (np.var(x) + np.var(y))


def test_the_oracle_earns_its_certified_lower_bound(problem):
    (task,) = make_tasks([problem], [()], budget=0, effort=2)
    (oracle,) = losses([task], Oracle(), max_histories=10_000)
    assert oracle.exact and oracle.suboptimality <= 1e-12  # V^pi >= the lower bound
    (random,) = losses([task], Random(), max_histories=10_000)
    assert random.uniform_value is not None
    assert random.suboptimality == pytest.approx(random.optimal_value - random.uniform_value, rel=1e-12)


def test_where_the_lower_bound_is_not_above_the_random_policy_there_is_no_normalized_gap():
    loss = PolicyLoss(
        suboptimality=0.2, width=1.0, optimal_value=0.5, uniform_value=0.6, agreement=None, exact=False, decisions=1, episodes=4
    )
    summary = summarize([loss, loss])
    assert summary["gap"] is None and summary["gap_ci"] is None and summary["suboptimality_ci"] == pytest.approx([0.2, 1.2])
    assert summary["method"] == "bounds" and summary["interval_over"] is None
    assert summary["note"] == "V* may be V^random in every task: there the normalized gap is undefined"


def test_a_table_of_all_histories_is_used_as_long_as_it_fits(problem, monkeypatch):
    for budget, bounded in ((1 << 20, False), (1 << 10, True)):
        assert environments.environment(problem, budget).bounded == bounded


def test_long_histories_overflow_no_number(brute):
    """A O = 12 branches over 30 stages: 12^29 histories."""
    problem = jax.tree.map(lambda x: x[0], brute.random(1, S=2, A=3, O=4, M=1, H=30).problem().models)
    (loss,) = losses(make_tasks([problem], [()], effort=2), Random(), episodes=3)
    assert np.isfinite(loss.suboptimality) and loss.decisions == 90 and not loss.exact
