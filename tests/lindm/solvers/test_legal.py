"""Actions that are not legal, from the problem to the solution: against recursions that never take them."""

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lindm as ld
from lindm.cli.main import main
from lindm.datasets import Dataset
from lindm.errors import DataError
from lindm.evaluation.environments import make_tasks
from lindm.evaluation.optimality_gap import evaluate_policy
from lindm.evaluation.policies.demonstrations import BC
from lindm.evaluation.policies.offline_rl import LSVI
from lindm.evaluation.policies.optimal import Oracle, Random
from lindm.evaluation.policies.planning import EstimatedModel
from lindm.evaluation.policy import DecisionMaker, Observation
from lindm.problems.apomdp import as_apomdp, optimistic
from lindm.problems.stationary import stationary_mdp
from lindm.solvers import dp, tree
from lindm.solvers import stationary_mdp as iteration
from lindm.solvers.rollout import demonstrate
from lindm.solvers.solve import labels, solve
from lindm.text import Step
from lindm.types import POMDP

S, A, O, H = 3, 3, 2, 3


def masks(rng: np.random.Generator) -> np.ndarray:
    """[S, A] with an action that is legal everywhere, so that every belief has one, and some that are not."""
    legal = rng.random((S, A)) < 0.5
    legal[:, rng.integers(A)] = True
    legal[rng.integers(S), (np.flatnonzero(legal.all(0))[0] + 1) % A] = False
    return legal


def rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Distributions with zeros, so that beliefs exclude states."""
    weights = rng.exponential(size=shape) * (rng.random(shape) < 0.6)
    weights[..., 0] += weights.sum(-1) == 0
    return weights / weights.sum(-1, keepdims=True)


def draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    parts = {"P": rows(rng, 1, S, A, S), "O": rows(rng, 1, A, S, O), "r": rng.normal(size=(H, S, A)), "rho": rows(rng, S)}
    return parts | {"legal": masks(rng)}


def mdp(parts):
    return ld.mdp(parts["P"], parts["r"], parts["rho"], legal=parts["legal"])


def pomdp(parts):
    return ld.pomdp(**parts)


def belief_values(parts, b: np.ndarray, h: int) -> tuple[float, float]:
    """V* and V of the uniform policy at an unnormalized belief, over the actions that all of its states allow."""
    if not b.sum() > 0:
        return 0.0, 0.0
    allowed = [a for a in range(A) if parts["legal"][b > 0, a].all()]
    best, mean = -np.inf, 0.0
    for a in allowed:
        here = other = float(b @ parts["r"][h, :, a])
        if h + 1 < H:
            for o in range(O):
                deeper = belief_values(parts, (b @ parts["P"][0, :, a]) * parts["O"][0, a, :, o], h + 1)
                here, other = here + deeper[0], other + deeper[1]
        best, mean = max(best, here), mean + other / len(allowed)
    return best, mean


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_backward_induction_takes_legal_actions_alone(seed):
    parts = draw(seed)
    problem, legal = mdp(parts), parts["legal"]
    plan, (V, pi) = dp.backward_induction(problem), dp.optimal_policy(problem)
    after = np.zeros(S)
    uniform = np.zeros(S)
    for h in reversed(range(H)):
        Q, W = (np.asarray(problem.r[h]) + parts["P"][0] @ following for following in (after, uniform))
        after = np.array([max(Q[s, legal[s]]) for s in range(S)])
        uniform = np.array([W[s, legal[s]].mean() for s in range(S)])
        np.testing.assert_allclose(plan.V[h], after, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(V[h], after, rtol=1e-12, atol=1e-12)
        assert legal[np.arange(S), pi[h]].all() and (np.isneginf(plan.Q[h]) == ~legal).all()
    np.testing.assert_allclose(dp.policy_value(problem, dp.uniform_policy(problem))[0], uniform, rtol=1e-12, atol=1e-12)


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6))
def test_a_tree_takes_actions_that_every_possible_state_allows(seed):
    parts = draw(seed)
    problem = pomdp(parts)
    best, mean = belief_values(parts, parts["rho"], 0)
    solution = solve(problem)
    assert solution.method == "tree" and float(solution.value) == pytest.approx(best, rel=1e-12, abs=1e-12)
    assert float(tree.value(as_apomdp(problem))) == pytest.approx(best, rel=1e-12, abs=1e-12)
    assert float(tree.uniform_value(as_apomdp(problem))) == pytest.approx(mean, rel=1e-12, abs=1e-12)
    one = as_apomdp(problem)
    assert float(tree.policy_value(one, tree.optimal_policy(one, solution.tables))) == pytest.approx(best, rel=1e-12, abs=1e-12)


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), method=st.sampled_from(["value-iteration", "policy-iteration"]))
def test_iteration_takes_legal_actions_alone(seed, method):
    parts = draw(seed)
    legal, r, P = parts["legal"], parts["r"][0], parts["P"][0]
    solution = iteration.solve(stationary_mdp(P, r, parts["rho"], 0.8, legal), method=method)
    values = []
    for policy in itertools.product(*(np.flatnonzero(legal[s]) for s in range(S))):
        kernel = P[np.arange(S), policy]
        values.append(np.linalg.solve(np.eye(S) - 0.8 * kernel, r[np.arange(S), policy]))
    np.testing.assert_allclose(solution.lower_values, np.max(values, axis=0), atol=1e-9)
    assert legal[np.arange(S), solution.policy[0]].all() and solution.regret < 1e-9


@pytest.mark.parametrize("kind", [mdp, pomdp])
def test_demonstrations_and_labels_are_legal(kind):
    parts = draw(3)
    problem = kind(parts)
    solution = solve(problem)
    episodes, labeled = jax.jit(demonstrate, static_argnums=2)(jax.random.key(0), solution, 400, 1.0)
    assert labeled.legal is not None and labeled.legal.dtype == bool
    taken = np.take_along_axis(np.asarray(labeled.legal), np.asarray(episodes.a)[..., None], -1)
    assert taken.all() and np.take_along_axis(np.asarray(labeled.legal), np.asarray(labeled.action)[..., None], -1).all()
    assert (np.isneginf(labeled.Q) == ~labeled.legal).all() and (labels(solution, episodes).legal == labeled.legal).all()
    first = np.asarray(labeled.legal[0, 0])
    if kind is pomdp:  # the first belief is the same: random actions are uniform over its legal ones
        shares = np.bincount(episodes.a[:, 0], minlength=A) / 400
        assert (np.abs(shares - first / first.sum()) < 5 * np.sqrt(0.25 / 400)).all()
    all_seen = parts["legal"][np.asarray(episodes.s)]
    assert (all_seen == labeled.legal).all() if kind is mdp else (labeled.legal <= all_seen).all()


@pytest.mark.parametrize("kind", [mdp, pomdp])
def test_policies_are_evaluated_on_legal_actions_and_the_rest_is_reported(kind):
    parts = draw(3)
    problem = kind(parts)
    (task,) = make_tasks([problem], [[]])
    (best,) = evaluate_policy([task], Oracle())
    (uniform,) = evaluate_policy([task], Random())
    assert best.suboptimality == pytest.approx(0, abs=1e-12) and best.masked == uniform.masked == 0
    assert uniform.uniform_value is not None
    assert uniform.suboptimality == pytest.approx(uniform.optimal_value - uniform.uniform_value, rel=1e-9)
    # a policy that does not know the rule: what it gives to illegal actions is shared by the others
    (ignorant,) = evaluate_policy([task], lambda demonstrations, history: np.full(A, 1 / A))
    assert ignorant.suboptimality == pytest.approx(uniform.suboptimality, rel=1e-9) and 0.05 < ignorant.masked < 0.9
    never = int(np.flatnonzero(~parts["legal"].all(0))[0])
    (stubborn,) = evaluate_policy([task], lambda demonstrations, history: never)
    assert 0 < stubborn.masked <= 1 and stubborn.suboptimality >= -1e-12


@pytest.mark.parametrize("kind", [mdp, pomdp])
def test_a_dataset_has_the_legal_actions_and_its_problem_has_them_too(kind, tmp_path):
    problem = kind(draw(3))
    ld.make_dataset(problem, tmp_path / "data", tasks=2, demos=2, behavior="uniform")
    dataset = Dataset(tmp_path / "data")
    dataset.load()
    for task in dataset:
        for episode in task.episodes:
            assert episode.legal is not None
            for action, label, Q, legal in zip(episode.action, episode.label, episode.Q, episode.legal, strict=True):
                assert legal[action] and legal[label] and [q is not None for q in Q] == legal
    assert "`legal`" in (tmp_path / "data" / "README.md").read_text()
    restored: Any = dataset.problems()[0]
    assert (np.asarray(restored.legal) == np.asarray(problem.legal)).all() and restored.legal.dtype == bool
    ld.evaluate(problem, ["oracle", "random", "bc", "certainty-equivalence"], tasks=2, demos=2)


def test_a_policy_that_is_asked_takes_legal_actions():
    parts = draw(3)
    for state in np.flatnonzero(parts["rho"]):
        allowed = parts["legal"][state]
        decision = Random().act((), f"{state}", mdp(parts))
        np.testing.assert_allclose(decision.probabilities, allowed / allowed.sum())
    first = parts["legal"][parts["rho"] > 0].all(0)
    for policy, masked in ((Random(), 0), (lambda demonstrations, history: np.full(A, 1 / A), 1 - first.mean())):
        decision = DecisionMaker(policy, (), pomdp(parts)).decide()
        np.testing.assert_allclose(decision.probabilities, first / first.sum())
        assert decision.masked == pytest.approx(masked)


def test_policies_that_learn_take_the_best_legal_action():
    legal = np.array([[False, True, True], [True, True, True]])
    P = np.full((1, 2, 3, 2), 0.5)
    problem = ld.mdp(P, np.zeros((3, 2, 3)), [0.5, 0.5], legal=legal)
    shown = [[Step(0, state=0, reward=1.0), Step(2, state=0, reward=1.0), Step(0, state=1, reward=0.0)]]
    tasks = make_tasks([problem], [shown])
    observation = Observation(stage=0, task=np.zeros(2, int), parent=np.zeros(2, int), state=np.arange(2), legal=legal)
    for policy in (BC(), LSVI(), EstimatedModel()):
        _, probabilities = policy.step(policy.init(tasks), observation)
        assert probabilities[0].tolist() == [0, 0, 1], policy
    # where no legal action was shown, the most frequent one of all steps that is legal
    tasks = make_tasks([problem], [[[Step(0, state=0), Step(0, state=1), Step(1, state=1), Step(0, state=1)]]])
    assert BC().step(BC().init(tasks), observation)[1].argmax(-1).tolist() == [1, 0]


FILE = """discount: 0.9
states: up down
actions: go stop
{}start: 0.5 0.5
T: go
0 1
1 0
T: stop identity
{}R: go : * {} 1
illegal: stop : up
"""
SEEN = FILE.format("", "", ": *")
HIDDEN = FILE.format("observations: high low\n", "O: *\n1 0\n0 1\n", ": * : *")


@pytest.mark.parametrize(
    ("text", "history", "rows", "said"),
    [
        (SEEN, "down go up stop up", ["a,0,down,go,", "a,1,up,stop,"], "the action 'stop' is not legal there; legal: go"),
        (HIDDEN, "go high stop high", ["a,0,,go,high", "a,1,,stop,high"], "the action 'stop' is not legal there; legal: go"),
        (HIDDEN, "stop low", ["a,0,,go,low", "b,0,,stop,low"], "the action 'stop' is not legal there; legal: go"),
    ],
)
def test_histories_and_demonstrations_with_an_illegal_action_are_refused(tmp_path, text, history, rows, said):
    (tmp_path / "p.pomdp").write_text(text)
    problem, endless = ld.read_pomdp(tmp_path / "p.pomdp", horizon=4), ld.read_stationary_pomdp(tmp_path / "p.pomdp")
    step = 1 if history.startswith("stop") else 2
    for one in (problem, endless):
        with pytest.raises(ValueError, match=f"^history: step {step}: {said}$"):
            DecisionMaker(lambda demonstrations, steps: 0, (), one).decide(history)
        (tmp_path / "log.csv").write_text("\n".join(["episode,step,state,action,observation", "", *rows]))
        with pytest.raises(DataError, match=f"log.csv:4: {said}$"):
            ld.read_demonstrations(tmp_path / "log.csv", one)
        (tmp_path / "log.csv").write_text("\n".join(["episode,step,state,action,observation", *rows]).replace("stop", "go"))
        assert len(ld.read_demonstrations(tmp_path / "log.csv", one)) == len({row[0] for row in rows})


def test_a_model_that_is_estimated_like_another_has_its_illegal_actions(tmp_path, capsys):
    (tmp_path / "p.pomdp").write_text(SEEN)
    log, out = tmp_path / "log.csv", tmp_path / "out.pomdp"
    log.write_text("episode,step,state,action,reward\na,0,down,go,1\na,1,up,go,1\na,2,down,stop,0\na,3,down,go,1\n")
    arguments = ["estimate", str(log), "--like", str(tmp_path / "p.pomdp"), "--out", str(out)]
    assert main(arguments) == 0
    estimated, like = ld.read_stationary_pomdp(out), ld.read_stationary_pomdp(tmp_path / "p.pomdp")
    assert (estimated.legal == like.legal).all() and "stop in up" not in capsys.readouterr().err
    assert estimated.r[0, 1] == 0 and estimated.P[1].toarray()[0].tolist() == [1, 0]
    log.write_text(log.read_text().replace("a,1,up,go", "a,1,up,stop"))
    assert main(arguments) == 3
    assert f"{log}:3: the action 'stop' is not legal in the state 'up'; legal: go" in capsys.readouterr().err


def test_a_solution_on_disk_keeps_the_legal_actions(tmp_path):
    solution: Any = ld.solve(mdp(draw(3)))
    solution.save(tmp_path / "solution.npz")
    loaded: Any = ld.load_solution(tmp_path / "solution.npz").problem
    assert (loaded.legal == solution.problem.legal).all()


def test_what_has_no_illegal_actions_says_so():
    parts = draw(3)
    problem = pomdp(parts)
    with pytest.raises(ValueError, match="method net has no illegal actions"):
        solve(problem, "net")
    with pytest.raises(ValueError, match="problem must allow every action in every state"):
        optimistic(ld.apomdp([problem], 0.0))
    with pytest.raises(ValueError, match="models must allow the same actions"):
        ld.apomdp([problem, replace(problem, legal=None)], 0.5)
    assert ld.solve(ld.apomdp([problem, problem], 0.5)).value == pytest.approx(ld.solve(problem).value, rel=1e-12)
    # the two states cannot be told apart and allow nothing in common
    blind = POMDP(
        P=jnp.eye(2)[None, :, None].repeat(2, 2),
        O=jnp.ones((1, 2, 2, 1)),
        r=jnp.ones((2, 2, 2)),
        rho=jnp.array([0.5, 0.5]),
        legal=jnp.eye(2) > 0,
    )
    with pytest.raises(ValueError, match="legal must allow an action at every belief that can be reached"):
        solve(blind)
    for legal, rule in ((np.ones((S, A)), "legal must be bool"), (np.zeros((S, A), bool), "got none in state 0")):
        for make in (mdp, pomdp):
            with pytest.raises(ValueError, match=rule):
                make(parts | {"legal": legal})
