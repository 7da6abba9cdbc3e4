"""What a policy over texts loses: by plain recursion over histories in the test, by sampling, and by the tree's own tables."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.evaluation import losses as playing
from lindm.evaluation.losses import Played, vote
from lindm.problems.apomdp import as_apomdp
from lindm.problems.mdp import mdp
from lindm.solvers import tree
from lindm.text import Step
from lindm.types import POMDP


def coin(*facts, of):
    """An arbitrary but fixed choice that depends on everything that is told."""
    return hashlib.sha256(repr(facts).encode()).digest()[0] % of


def play(problems, policy, rewards=False, **how) -> list[Played]:
    """Where every problem can be played."""
    found = playing.play([playing.world(problem, rewards) for problem in problems], policy, **how)
    assert all(one is not None for one in found)
    return [one for one in found if one is not None]


def told(steps):
    return tuple((s.action, s.state, s.model, s.observation, s.reward) for s in steps)


def arbitrary(A):
    return lambda stage, level: [[coin(told(asked.steps), of=A) for asked in asks] for asks in level]


def random_mdp(seed, S=3, A=2, H=3):
    rng = np.random.default_rng(seed)
    P, r, rho = rng.dirichlet(np.ones(S), (H, S, A)), rng.uniform(size=(H, S, A)), rng.dirichlet(np.ones(S))
    return mdp(P, r, rho), (P, r, rho)


def value_of(P, r, rho, A, rewards):
    """V of the arbitrary policy, recursing over histories with Python's own arithmetic."""
    H, S = r.shape[:2]

    def after(t, s, past):
        a = coin(told((*past, Step(None, state=s))), of=A)
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
    for played, (P, r, rho) in zip(play(problems, arbitrary(2), rewards=rewards), arrays, strict=True):
        assert played.exact
        np.testing.assert_allclose(played.optimal, best_of(P, r, rho), rtol=1e-12)
        np.testing.assert_allclose(played.gap, best_of(P, r, rho) - value_of(P, r, rho, 2, rewards), rtol=1e-10, atol=1e-12)
        assert played.relative > 0


def test_sampled_episodes_estimate_the_same_loss():
    problem, (P, r, rho) = random_mdp(5)
    exact = best_of(P, r, rho) - value_of(P, r, rho, 2, False)
    found = [play([problem], arbitrary(2), episodes=50, seed=seed, listed=0)[0] for seed in range(60)]
    gaps = np.array([one.gap for one in found])
    assert not any(one.exact for one in found)
    assert abs(gaps.mean() - exact) < 5 * gaps.std(ddof=1) / np.sqrt(len(gaps))
    assert play([problem], arbitrary(2), episodes=50, seed=3, listed=0)[0] == found[3]


@pytest.mark.parametrize("M, alpha", [(1, 0.5), (2, 0.7), (2, 0.0), (3, 1.0)])
def test_the_loss_under_hidden_states_and_ambiguity_is_that_of_plain_recursion(brute, M, alpha):
    world = brute.random(3, S=3, A=2, O=2, M=M, H=3, alpha=alpha)
    problem = world.problem()
    ambiguous = M > 1
    if not ambiguous:
        problem = jax.tree.map(lambda x: x[0], problem.models)
        assert isinstance(problem, POMDP)

    def act(t, history):
        steps = [Step(a, model=m if ambiguous else None, observation=o) for a, m, o in history]
        return np.eye(world.A)[coin(told((*steps, Step(None))), of=world.A)]

    (played,) = play([problem], arbitrary(world.A))
    V, best = world.V(list(world.rho), 0, (), act), world.V(list(world.rho), 0)
    assert played.exact
    np.testing.assert_allclose(played.gap, best - V, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(played.optimal, best, rtol=1e-12)
    uniform = world.V(list(world.rho), 0, (), lambda t, h: np.full(world.A, 1 / world.A))
    np.testing.assert_allclose(played.uniform, uniform, rtol=1e-12)


def test_sampled_histories_of_a_pomdp_estimate_the_same_loss_and_an_ambiguous_one_is_left_out(brute):
    world = brute.random(4, S=3, A=2, O=2, M=1, H=4)
    problem = jax.tree.map(lambda x: x[0], world.problem().models)
    exact = play([problem], arbitrary(2))[0].gap
    gaps = np.array([play([problem], arbitrary(2), episodes=40, seed=s, listed=1)[0].gap for s in range(60)])
    assert abs(gaps.mean() - exact) < 5 * gaps.std(ddof=1) / np.sqrt(len(gaps))
    ambiguous = playing.world(brute.random(4, S=2, A=2, O=2, M=2, H=3).problem())
    assert playing.play([ambiguous], arbitrary(2), listed=3) == [None]
    assert playing.asked_at_once(ambiguous, 5, listed=3) == 5 and playing.asked_at_once(ambiguous, 5, listed=16) == 16


def test_an_optimal_policy_loses_nothing_and_agrees_always(brute):
    problem = jax.tree.map(lambda x: x[0], brute.random(6, S=3, A=2, O=2, M=1, H=3).problem().models)
    cloud = as_apomdp(problem)
    best = tree.optimal_policy(cloud, tree.tree(cloud))

    def answer(stage, level):
        number = [
            [sum((s.action * 2 + s.observation) * 4**t for t, s in enumerate(a.steps[:-1])) for a in asks] for asks in level
        ]
        return [[int(best[stage][i]) for i in row] for row in number]

    for listed in (2048, 1):
        played = play([problem], answer, listed=listed)[0]
        assert abs(played.gap) < 1e-12 and played.agreement == 1


def test_a_history_continues_the_one_that_it_names():
    problem, _ = random_mdp(1)
    before: list = []

    def answer(stage, level):
        (asks,) = level
        for asked in asks:
            assert len(asked.steps) == stage + 1 and asked.steps[-1].action is None
            if stage:
                parent, own = before[asked.parent], asked.steps
                assert own[: stage - 1] == parent[:-1] and own[stage - 1].state == parent[-1].state
        before[:] = [asked.steps for asked in asks]
        return [[0] * len(asks)]

    play([problem], answer)
    assert len(before) == 27


def test_computing_stays_double_whatever_the_model_computes_in():
    problem, (P, r, rho) = random_mdp(2)
    jax.config.update("jax_enable_x64", False)
    try:
        with playing.double_precision():
            assert jnp.zeros(1).dtype == np.float64
        assert jnp.zeros(1).dtype == np.float32
        played = play([problem], arbitrary(2))[0]
    finally:
        jax.config.update("jax_enable_x64", True)
    np.testing.assert_allclose(played.optimal, best_of(P, r, rho), rtol=1e-12)


def test_the_vote_does_what_the_demonstrations_did_most():
    def episode(*pairs):
        return tuple(Step(a, state=s) for s, a in pairs)

    demos = [[episode((0, 1), (1, 0), (0, 1)), episode((0, 2), (1, 2), (1, 2))]]
    level = [[playing.Asked(-1, (Step(None, state=s),)) for s in (0, 1, 5)]]
    assert vote(demos, 3)(0, level) == [[1, 2, 2]]  # state 5 was never seen: what they did most often at all


def test_problems_of_two_horizons_are_refused():
    with pytest.raises(ValueError, match=r"worlds must have one horizon; got \[2, 3\]"):
        play([random_mdp(0, H=2)[0], random_mdp(0, H=3)[0]], arbitrary(2))
