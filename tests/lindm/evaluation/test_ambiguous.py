"""Evaluations of ambiguous problems: against a plain recursion, and with bounds of V* in place of a tree of all histories."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import lindm as ld
from lindm.cli.main import main
from lindm.evaluation import environments
from lindm.evaluation.ambiguous import NetEnvironment
from lindm.evaluation.environments import make_tasks
from lindm.evaluation.optimality_gap import evaluate_policy, summarize
from lindm.evaluation.policies.beliefs import QMDP
from lindm.evaluation.policies.optimal import Oracle, Random
from lindm.evaluation.policy import DecisionMaker, Policy
from lindm.types import APOMDP

S, A, O, M, H = 3, 2, 2, 2, 3
LAW = np.random.default_rng(0).dirichlet(np.ones(A), (H, M, 1 + O))


class ByLastStep(Policy):
    """Random actions, by the stage and by the last model and observation."""

    def init(self, tasks):
        return None

    def step(self, state, observation):
        if not observation.stage:
            return None, LAW[0, np.zeros(len(observation), int), 0]
        assert observation.observation is not None
        return None, LAW[observation.stage, observation.model, 1 + observation.observation]


@pytest.fixture(scope="module", params=[0.0, 0.7, 1.0])
def problem(request, brute):
    return brute.random(11, S=S, A=A, O=O, M=M, H=H, alpha=request.param).problem()


@pytest.fixture(scope="module")
def tasks(problem):
    """With Q* at all histories, and without."""
    exact, bounded = make_tasks([problem], [()]), make_tasks([problem], [()], budget=0, effort=50)
    assert isinstance(bounded[0].environment, NetEnvironment)
    return exact, bounded


def value(problem: APOMDP, beliefs: np.ndarray, stage: int, m: int = 0, o: int = -1) -> float:
    """V of `ByLastStep` at a history, from the belief [M, S] under each model."""
    models, alpha, total = problem.models, float(problem.alpha), 0.0
    P, K, r = (np.asarray(x) for x in (models.P, models.O, models.r))
    for a in range(A):
        G = []
        for model in range(M):
            G.append(float(beliefs[model] @ r[model, stage, :, a]))
            for seen in range(O) if stage + 1 < H else ():
                after = (beliefs[model] @ P[model, min(stage, len(P[model]) - 1), :, a]) * K[
                    model, min(stage, len(K[model]) - 1), a, :, seen
                ]
                if after.sum() > 0:
                    same = np.tile(after / after.sum(), (M, 1))
                    G[-1] += after.sum() * value(problem, same, stage + 1, model, seen)
        total += LAW[stage, m, 1 + o][a] * (alpha * min(G) + (1 - alpha) * max(G))
    return total


def test_the_value_of_a_policy_is_a_recursion_over_the_histories_that_it_reaches(problem, tasks):
    expected = value(problem, np.asarray(problem.models.rho), 0)
    for each in tasks:
        (loss,) = evaluate_policy(each, ByLastStep(), max_histories=10_000)
        assert loss is not None and loss.exact
        assert loss.optimal_value - loss.suboptimality == pytest.approx(expected, rel=1e-12)


def test_beyond_the_tree_the_gap_has_the_bounds_of_the_optimal_value(tasks):
    for policy in (Oracle(), QMDP(), ByLastStep()):
        (one,), (other,) = (evaluate_policy(each, policy, max_histories=10_000) for each in tasks)
        assert one is not None and other is not None and other.decisions == one.decisions
        lower, upper = other.optimal_value, other.optimal_value + other.width
        assert lower - 1e-12 <= one.optimal_value <= upper + 1e-12
        if not isinstance(policy, Oracle):
            assert lower - other.suboptimality == pytest.approx(one.optimal_value - one.suboptimality, rel=1e-12)
        lost = other.range("reward")
        assert (lost is not None and lost.low - 1e-12 <= one.suboptimality <= lost.high + 1e-12) or isinstance(policy, Oracle)
        assert other.normalized_gap is None and other.spread is None and other.agreement is None
        row = summarize([other])
        assert row["method"] == ("bounds" if other.width > 0 else "exact") and row["uniform_value"] is None
        assert row["note"] == (
            "V^random is not known, since random actions reach too many histories: the normalized gap has no unit"
        )


def test_more_histories_than_the_limit_have_no_value(tasks):
    for policy in (Random(), ByLastStep()):
        (loss,) = evaluate_policy(tasks[1], policy, max_histories=(M * O) ** (H - 1))
        assert loss is None  # a random policy reaches more


def test_the_oracle_of_a_net_has_lower_bounds_of_action_values(problem, monkeypatch):
    exact = DecisionMaker(Oracle(), (), problem).decide("0 1 1")
    monkeypatch.setattr(environments, "MEMORY_BUDGET", 0)
    monkeypatch.setattr(environments.environment, "__defaults__", (0, None))
    bounded = DecisionMaker(Oracle(), (), problem).decide("0 1 1")
    assert exact.Q is not None and bounded.lower is not None
    assert bounded.upper is None and (bounded.lower <= exact.Q + 1e-12).all()


def test_the_command_says_what_it_knows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(environments.make_tasks, "__kwdefaults__", {"budget": 0, "effort": None})
    prostate = ["eval", "prostate", "--horizon", "3", "--tasks", "2", "--demos", "1", "--policy", "qmdp", "--policy", "random"]
    assert main([*prostate, "--effort", "50", "--max-histories", "150", "--json"]) == 0
    qmdp, random = json.loads(capsys.readouterr().out)
    assert qmdp["optimal_lower"] <= qmdp["optimal_upper"] and qmdp["gap"] is None and qmdp["suboptimality"] is not None
    assert (
        random["method"].startswith("none: every task has more than 150 histories") and "--max-histories takes" in random["note"]
    )
    assert main([*prostate, "--effort", "50"]) == 0
    assert "V^random = not known" in capsys.readouterr().out


def test_an_ambiguous_problem_with_illegal_actions_needs_its_tree(problem, monkeypatch):
    legal = jnp.ones((M, S, A), bool).at[:, 0, 1].set(False)
    limited = replace(problem, models=replace(problem.models, legal=legal))
    monkeypatch.setattr(environments, "MEMORY_BUDGET", 0)
    with pytest.raises(ValueError, match="horizon of an ambiguous problem with illegal actions must be short enough"):
        ld.evaluate(limited, ["qmdp"], tasks=1, demos=1)
