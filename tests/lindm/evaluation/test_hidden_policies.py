"""Policies where the state is hidden: behavior cloning, and QMDP against its definition."""
# what may be None is there in these tests
# pyright: reportOptionalOperand=false, reportOptionalSubscript=false, reportOperatorIssue=false

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.datasets import DatasetConfig
from lindm.evaluation import policies
from lindm.evaluation.environments import make_tasks
from lindm.evaluation.optimality_gap import evaluate_policy
from lindm.evaluation.policies import registry
from lindm.problems.apomdp import apomdp
from lindm.problems.pomdp import draw_pomdp, pomdp
from lindm.text import Step
from tests.lindm.evaluation.test_policies import HIDDEN, tasks_of


def test_the_likeliest_state_at_the_start_is_that_of_the_mean_of_the_models():
    def model(rho):
        return pomdp(np.eye(2)[:, None].repeat(2, 1), np.full((2, 2, 1), 1.0), np.eye(2), rho, horizon=1)

    problem = apomdp([model([0.6, 0.4]), model([0.0, 1.0])], alpha=0.5)
    assert policies.certainty_equivalence().act([], [Step(None)], problem).probabilities.argmax() == 1


def loss_of(problem, name):
    (loss,) = evaluate_policy(make_tasks([problem], [()]), registry.make_policy(name, problem, DatasetConfig(tasks=1)))
    assert loss is not None
    return loss


def test_bc_of_a_hidden_state_sees_the_observation_and_not_the_state(tmp_path_factory):
    """The files of a dataset contain the hidden states, which `bc` must not use."""
    hidden = tasks_of(tmp_path_factory, HIDDEN, tasks=8, demos=5)
    steps = 0
    for task in hidden.tasks:
        counts = {}
        for episode in task.demonstrations:
            for before, step in zip((None, *episode), episode, strict=False):
                counts.setdefault(before and before.observation, np.zeros(2))[step.action] += 1
        for seen, votes in counts.items():
            history = [Step(None)] if seen is None else [Step(0, observation=seen), Step(None)]
            assert policies.bc().act(task.demonstrations, history, task.known.problem).probabilities.argmax() == votes.argmax()
            steps += votes.argmax() != np.sum(list(counts.values()), axis=0).argmax()
    assert steps > 0, "votes must depend on what was observed"


def test_both_rules_are_optimal_if_observations_reveal_the_state():
    problem = draw_pomdp(jax.random.key(0), 3, 2, 3, 4, quality=1.0)
    known = replace(problem, rho=jnp.array([0.0, 1.0, 0.0]))
    for name, one in (("qmdp", problem), ("qmdp", known), ("certainty-equivalence", known)):
        loss = loss_of(one, name)
        assert abs(loss.suboptimality) < 1e-12 and loss.exact, name


@pytest.mark.parametrize("M, alpha", [(1, 0.5), (2, 0.7), (3, 0.2)])
def test_qmdp_maximizes_the_action_values_of_the_observed_state(brute, M, alpha):
    small = brute.random(7, S=3, A=2, O=2, M=M, H=3, alpha=alpha)
    problem = small.problem()
    models = jax.tree.map(np.asarray, problem.models)

    def seen(t, s):
        """Value of a state that is seen, and its action values under each model."""
        if t == 3:
            return 0.0, np.zeros((M, 2))
        G = np.array([[models.r[m, t, s, a] for a in range(2)] for m in range(M)])
        for m in range(M):
            for a in range(2):
                P = models.P[m, t if models.P.shape[1] > 1 else 0, s, a]
                G[m, a] += sum(P[u] * seen(t + 1, u)[0] for u in range(3))
        return (alpha * G.min(0) + (1 - alpha) * G.max(0)).max(), G

    def act(demonstrations, history):
        beliefs, stage = [np.array(rho) for rho in models.rho], len(history) - 1
        for t, step in enumerate(history[:-1]):
            m, b = step.model or 0, beliefs[step.model or 0]
            P, O = (x[m, t if x.shape[1] > 1 else 0] for x in (models.P, models.O))
            b = np.array(
                [sum(b[s] * P[s, step.action, u] for s in range(3)) * O[step.action, u, step.observation] for u in range(3)]
            )
            beliefs = [b / b.sum()] * M
        G = np.array([sum(beliefs[m][s] * seen(stage, s)[1][m] for s in range(3)) for m in range(M)])
        action = (alpha * G.min(0) + (1 - alpha) * G.max(0)).argmax()
        assert policies.qmdp().act((), history, problem).probabilities.argmax() == action
        return action

    (by_hand,) = evaluate_policy(make_tasks([problem], [()]), act)
    assert by_hand == loss_of(problem, "qmdp") and by_hand is not None and by_hand.exact and by_hand.suboptimality >= -1e-12
