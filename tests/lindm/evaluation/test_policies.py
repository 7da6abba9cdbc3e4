"""Policies beside the language model: tables against asking, estimates by hand, and cases in which each is optimal."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.datasets import Dataset, DatasetConfig, make_dataset
from lindm.datasets.generate import TaskGenerator
from lindm.evaluation import losses as playing
from lindm.evaluation import policies
from lindm.evaluation.losses import tabled, world
from lindm.evaluation.policies import Answers, Tasks
from lindm.families.suites import Suite
from lindm.problems.apomdp import as_apomdp
from lindm.problems.mdp import mdp
from lindm.problems.pomdp import draw_pomdp
from lindm.solvers.belief import branching
from lindm.text import Step
from lindm.types import APOMDP, MDP

SEEN = Suite(name="seen", horizon=3, S=3, A=2, concentration=0.5, gap=0.02)
HIDDEN = replace(SEEN, name="hidden", O=2, quality=0.8)
CLOUD = replace(HIDDEN, name="cloud", M=2, distance=0.3, alpha=0.7)


def tasks_of(tmp_path_factory, suite, **changes) -> Tasks:
    recipe = DatasetConfig(**({"tasks": 6, "demos": 3, "behavior": "epsilon", "seed": 3} | changes))
    path = tmp_path_factory.mktemp(suite.name)
    make_dataset(path, suite, recipe)
    loaded = Dataset(path).load()
    demos = [[episode.steps() for episode in task.demonstrations] for task in loaded]
    return Tasks(problems=[task.problem() for task in loaded], demonstrations=demos, source=suite, recipe=recipe)


@pytest.fixture(scope="module", params=[SEEN, HIDDEN, CLOUD], ids=lambda s: s.name)
def tasks(request, tmp_path_factory):
    return tasks_of(tmp_path_factory, request.param)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return tasks_of(tmp_path_factory, SEEN)


def played(tasks, name):
    policy = policies.policy(name, tasks)
    worlds = [world(problem) for problem in tasks.problems]
    if not isinstance(policy, Answers):
        return [tabled(one, table) for one, table in zip(worlds, policy, strict=True)]
    return playing.play_all(worlds, policy.given, policy.policy, episodes=4, seed=0, listed=2048, at_once=40)


def tables(tasks, name):
    found = policies.policy(name, tasks)
    assert isinstance(found, list)
    return found


def number(problem, steps):
    """Of a history within its stage."""
    cloud = as_apomdp(problem)
    M, _, _, _, O = cloud.models.O.shape
    return sum(((s.action * M + (s.model or 0)) * O + s.observation) * branching(cloud) ** t for t, s in enumerate(steps[:-1]))


def asking(problem, table):
    """The policy of a table, as one that is asked."""
    if isinstance(problem, MDP):
        return lambda stage, level: [[int(table[stage][asked.steps[-1].state]) for asked in asks] for asks in level]
    return lambda stage, level: [[int(table[stage][number(problem, asked.steps)]) for asked in asks] for asks in level]


def random_table(problem, rng):
    if isinstance(problem, MDP):
        return rng.integers(0, problem.num_actions, problem.r.shape[:2])
    cloud = as_apomdp(problem)
    _, H, _, A = cloud.models.r.shape
    return tuple(rng.integers(0, A, branching(cloud) ** t) for t in range(H))


# --- tables ------------------------------------------------------------------------------------------------------------------


def test_a_table_loses_what_the_same_policy_loses_when_it_is_asked(tasks):
    rng = np.random.default_rng(0)
    for problem in tasks.problems[:3]:
        table = random_table(problem, rng)
        (asked,) = playing.play([world(problem)], asking(problem, table))
        found = tabled(world(problem), table)
        assert found.exact and asked.exact and 0 < found.agreement < 1
        assert (found.gap, found.agreement) == pytest.approx((asked.gap, asked.agreement), abs=1e-12)
        assert (found.optimal, found.uniform) == (asked.optimal, asked.uniform)


def test_a_mixture_is_the_mean_of_the_tables_that_are_drawn_from_it(tasks):
    problem, rng = tasks.problems[0], np.random.default_rng(1)
    if isinstance(problem, APOMDP):
        pytest.skip("nature answers a mixture, not its draws")
    one, mixture = world(problem), policies.behaviour(tasks)[0]

    def drawn(probabilities):
        return (rng.random(probabilities.shape[:-1])[..., None] > probabilities.cumsum(-1)[..., :-1]).sum(-1)

    found = [tabled(one, drawn(mixture) if isinstance(problem, MDP) else tuple(map(drawn, mixture))) for _ in range(400)]
    exact = tabled(one, mixture)
    gaps = np.array([x.gap for x in found])
    assert abs(gaps.mean() - exact.gap) < 5 * gaps.std(ddof=1) / 20 and exact.gap > 0
    if isinstance(problem, MDP):  # over histories of one table the mean over draws weighs them as the mixture reaches them
        shares = np.array([x.agreement for x in found])
        assert abs(shares.mean() - exact.agreement) < 5 * shares.std(ddof=1) / 20


def test_the_oracle_loses_nothing_random_play_everything_and_behaviour_its_share(tasks):
    oracle, behaviour, random = (played(tasks, name) for name in ("oracle", "behaviour", "random"))
    for best, some, worst in zip(oracle, behaviour, random, strict=True):
        assert abs(best.gap) < 1e-12 and best.agreement == pytest.approx(1)
        assert worst.relative == pytest.approx(1) and 0 < some.relative < 0.6
        assert some.agreement >= 1 - 0.2 / 2 - 1e-9  # of two actions, epsilon / 2 is the other one
    assert all(0.5 - 1e-9 <= one.agreement < 0.7 for one in random), "of two actions one is the best, or both are"


def test_of_an_ambiguous_problem_random_play_is_worth_what_the_recursion_says(brute):
    small = brute.random(2, S=2, A=2, O=2, M=2, H=3, alpha=0.6)
    problem = small.problem()
    tables = policies.random(Tasks(problems=[problem], demonstrations=[()], source=problem, recipe=DatasetConfig(tasks=1)))
    V = small.V(list(small.rho), 0, (), lambda t, h: np.full(small.A, 1 / small.A))
    found = tabled(world(problem), tables[0])
    assert found.optimal - found.gap == pytest.approx(V, rel=1e-12) and found.relative == pytest.approx(1)


# --- the state is seen -----------------------------------------------------------------------------------------------------


def test_cloning_repeats_what_was_done_most_often_in_a_state(seen):
    for table, demos in zip(tables(seen, "bc"), seen.demonstrations, strict=True):
        steps = [step for episode in demos for step in episode]
        for s in range(3):
            counts = np.bincount([x.action for x in steps if x.state == s] or [x.action for x in steps], minlength=2)
            assert table.shape == (3, 3) and (table[:, s] == counts.argmax()).all()


def test_the_estimated_model_is_that_of_the_counts(monkeypatch):
    demos = (
        (Step(0, state=0, reward=1.0), Step(1, state=1, reward=0.0)),
        (Step(0, state=0, reward=0.5), Step(1, state=0, reward=0.3)),
        (Step(0, state=0, reward=0.6), Step(0, state=1, reward=0.0)),
    )
    problem = mdp(np.full((1, 2, 2, 2), 0.5), np.zeros((2, 2, 2)), np.array([0.5, 0.5]))
    tasks = Tasks(problems=[problem], demonstrations=[demos], source=problem, recipe=DatasetConfig(tasks=1))
    planned, plan = [], policies.dp.backward_induction
    monkeypatch.setattr(policies.dp, "backward_induction", lambda estimate: planned.append(estimate) or plan(estimate))
    (table,) = policies.certainty_equivalence(tasks)
    (estimate,) = planned
    # the average reward, 0.4, counts once everywhere: (0,0) was 1, .5 and .6, (0,1) was .3, (1,0) and (1,1) were 0
    r = np.array([[2.5 / 4, 0.7 / 2], [0.4 / 2, 0.4 / 2]])
    # (0,0) led to 1, 0 and 1; the others end an episode: everywhere alike
    P = np.full((2, 2, 2), 0.5)
    P[0, 0] = [1.5 / 4, 2.5 / 4]
    np.testing.assert_allclose(estimate.r, np.stack([r, r]), rtol=1e-12)
    np.testing.assert_allclose(estimate.P, P[None], rtol=1e-12)
    assert table.tolist() == [(r + P @ r.max(-1)).argmax(-1).tolist(), r.argmax(-1).tolist()]


@pytest.mark.parametrize("name", ["certainty-equivalence", "lsvi", "pevi"])
def test_with_enough_demonstrations_of_everything_planning_finds_the_optimum(tmp_path_factory, name):
    many = tasks_of(tmp_path_factory, replace(SEEN, gap=0.05), tasks=4, demos=300, behavior="uniform")
    assert np.mean([one.relative for one in played(many, name)]) < 0.02


def test_the_layer_has_the_weights_of_least_squares_over_other_tasks(seen, monkeypatch):
    monkeypatch.setattr(policies, "TASKS", 64)
    found = tables(seen, "layer")
    generator = TaskGenerator(SEEN, DatasetConfig(tasks=64, demos=3, behavior="epsilon", seed=policies.SEED))
    problems, _, episodes, _ = generator.generate(0, 64)
    assert isinstance(problems, MDP)

    def statistic(s, a, r, h):
        S = np.zeros(6)
        for k in range(3):
            S[s[k][h] * 2 + a[k][h]] += sum(r[k][h:]) / 3
        return S

    for h in range(3):
        X, W = [], []
        for i in range(64):
            X.append(statistic(episodes.s[i], episodes.a[i], episodes.r[i], h))
            V = np.zeros(3)
            for t in reversed(range(h, 3)):
                P = problems.P[i][t if problems.P.shape[1] > 1 else 0]
                Q = problems.r[i][t] + P @ V
                V = Q.max(-1)
            W.append(Q.reshape(-1))
        A = np.linalg.lstsq(np.array(X), np.array(W), rcond=1e-10)[0].T
        for table, demos in zip(found, seen.demonstrations, strict=True):
            told = ([[getattr(step, k) for step in steps] for steps in demos] for k in ("state", "action", "reward"))
            Q = (A @ statistic(*told, h)).reshape(3, 2)
            clear = np.abs(Q[:, 0] - Q[:, 1]) > 1e-9
            assert (table[h] == Q.argmax(-1))[clear].all() and clear.any()


# --- the state is hidden ---------------------------------------------------------------------------------------------------


def of_problem(problem):
    return Tasks(problems=[problem], demonstrations=[()], source=problem, recipe=DatasetConfig(tasks=1))


def test_where_observations_tell_the_state_both_rules_are_optimal():
    problem = draw_pomdp(jax.random.key(0), 3, 2, 3, 4, quality=1.0)
    known = replace(problem, rho=jnp.array([0.0, 1.0, 0.0]))
    for name, one in (("qmdp", problem), ("qmdp", known), ("certainty-equivalence", known)):
        (found,) = played(of_problem(one), name)
        assert abs(found.gap) < 1e-12 and found.exact, name


@pytest.mark.parametrize("M, alpha", [(1, 0.5), (2, 0.7), (3, 0.2)])
def test_qmdp_maximises_what_would_be_worth_if_the_state_were_seen(brute, M, alpha):
    small = brute.random(7, S=3, A=2, O=2, M=M, H=3, alpha=alpha)
    problem = small.problem()
    cloud = jax.tree.map(np.asarray, problem.models)

    def seen(t, s):
        """Value of a state that is seen, and its action values under each model."""
        if t == 3:
            return 0.0, np.zeros((M, 2))
        G = np.array([[cloud.r[m, t, s, a] for a in range(2)] for m in range(M)])
        for m in range(M):
            for a in range(2):
                P = cloud.P[m, t if cloud.P.shape[1] > 1 else 0, s, a]
                G[m, a] += sum(P[u] * seen(t + 1, u)[0] for u in range(3))
        return (alpha * G.min(0) + (1 - alpha) * G.max(0)).max(), G

    answers = policies.policy("qmdp", of_problem(problem))
    assert isinstance(answers, Answers)
    policy = answers.policy(answers.given)

    def checked(stage, level):
        found = policy(stage, level)
        for asked, action in zip(level[0], found[0], strict=True):
            beliefs = [np.array(rho) for rho in cloud.rho]
            for t, step in enumerate(asked.steps[:-1]):
                m, b = step.model or 0, beliefs[step.model or 0]
                P, O = (x[m, t if x.shape[1] > 1 else 0] for x in (cloud.P, cloud.O))
                b = np.array(
                    [sum(b[s] * P[s, step.action, u] for s in range(3)) * O[step.action, u, step.observation] for u in range(3)]
                )
                beliefs = [b / b.sum()] * M
            G = np.array([sum(beliefs[m][s] * seen(stage, s)[1][m] for s in range(3)) for m in range(M)])
            assert action == (alpha * G.min(0) + (1 - alpha) * G.max(0)).argmax()
        return found

    (found,) = playing.play([world(problem)], checked)
    assert found.exact and found.gap >= -1e-12


@pytest.mark.parametrize("suite, name", [(SEEN, "qmdp"), (HIDDEN, "lsvi"), (CLOUD, "layer")])
def test_a_policy_that_these_tasks_do_not_have_is_refused(tmp_path_factory, suite, name):
    tasks = tasks_of(tmp_path_factory, suite, tasks=1, demos=1)
    with pytest.raises(
        ValueError, match=f"policy must be one of oracle, random, behaviour, bc, .* is (seen|hidden); got '{name}'"
    ):
        policies.policy(name, tasks)
