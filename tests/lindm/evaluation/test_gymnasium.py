"""Environments of Gymnasium: its own checks, the law of a step beside the arrays, and returns beside exact values."""

import sys
import warnings
from typing import Any

import gymnasium
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import lindm as ld
from lindm.errors import UsageError
from lindm.problems.cassandra import parse
from lindm.problems.cassandra_problems import to_mdp
from lindm.problems.stationary import stationary

ARRIVE = """discount: 0.8
states: far near goal
actions: walk rest
{}start: 1 0 0
T: walk
0.3 0.7 0
0 0.4 0.6
0 0 1
T: rest identity
{}E: goal
R: * : * : * : * -1
R: walk : near : goal : * 10"""
SEEN = ARRIVE.format("", "")
HIDDEN = ARRIVE.format("observations: dark light\n", "O: *\n0.9 0.1\n0.5 0.5\n0.1 0.9\n")


def pomdp(tmp_path):
    (tmp_path / "arrive.pomdp").write_text(HIDDEN)
    return ld.read_pomdp(tmp_path / "arrive.pomdp", horizon=4)


@pytest.fixture(scope="module")
def ambiguous(brute):
    return brute.random(21, S=3, A=2, O=2, M=2, H=3, alpha=0.7)


@pytest.fixture(params=["mdp", "pomdp", "stationary", "endless mdp", "linear", "game", "one model"])
def env(request, tmp_path, ambiguous):
    if request.param in ("game", "one model"):
        return ld.to_gymnasium(ambiguous.problem(), nature="game" if request.param == "game" else 1)
    if request.param == "linear":
        return ld.to_gymnasium(ld.linear_mdp([[[1.0, 0.0]], [[0.0, 1.0]]], [[[0, 1], [1, 0]]] * 2, [[0.0, 1.0]] * 2))
    made = {"mdp": to_mdp(parse(SEEN), 4), "stationary": stationary(parse(HIDDEN)), "endless mdp": stationary(parse(SEEN))}
    return ld.to_gymnasium(made[request.param] if request.param in made else pomdp(tmp_path))


def test_gymnasium_accepts_every_kind_of_problem(env):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env, skip_render_check=True)
    ours = [str(w.message) for w in caught if "check_env" in str(w.message) or "WARN" in str(w.message)]
    assert not ours, ours


def episode(env, seed, actions, steps=4):
    seen, info = env.reset(seed=seed)
    rows: list[tuple] = [(seen, info)]
    for t in range(steps):
        rows.append(env.step(actions[t]))
        if rows[-1][2]:
            break
    return rows


def test_a_seed_gives_an_episode_and_another_seed_another_one(env):
    episodes = {seed: episode(env, seed, [0] * 4) for seed in range(12)}
    for seed, rows in episodes.items():
        assert rows == episode(env, seed, [0] * 4)
    if env.action_space.n > 1:
        assert len({str(rows) for rows in episodes.values()}) > 1


def test_rewards_are_those_of_the_file_and_the_episode_ends_with_the_goal_or_the_horizon(tmp_path):
    env, ends = ld.to_gymnasium(pomdp(tmp_path)), set()
    assert env.observation_space.n == 3 and env.action_space.n == 2 and env.discount == 0.8
    for seed in range(60):
        seen, info = env.reset(seed=seed)
        assert (seen, info) == (2, {"stage": 0, "state": 0})  # nothing is observed before the first action
        for t in range(4):
            before = info["state"]
            seen, reward, terminated, truncated, info = env.step(0)
            arrived = before == 1 and info["state"] == 2
            assert reward == (10.0 if arrived else -1.0) and seen in (0, 1) and not truncated
            mean = {0: -1.0, 1: 0.6 * 10 - 0.4}[before]
            assert info["discounted_mean_reward"] == pytest.approx(0.8**t * mean, rel=1e-12) and info["stage"] == t + 1
            assert terminated == (arrived or t == 3)
            if terminated:
                break
        ends.add(t)
        with pytest.raises(gymnasium.error.ResetNeeded, match="call reset before step"):
            env.step(0)
    assert ends == {1, 2, 3}


def returns(env, policy, n):
    """Discounted returns of n episodes under `policy(observations, actions, random) -> action`."""
    random, found = np.random.default_rng(5), []
    env.reset(seed=11)
    for _ in range(n):
        seen, _ = env.reset()
        observations, actions, total, terminated = [seen], [], 0.0, False
        while not terminated:
            actions.append(policy(observations, actions, random))
            seen, reward, terminated, _, _ = env.step(actions[-1])
            observations.append(seen)
            total += env.discount ** (len(actions) - 1) * reward
        found.append(total)
    return np.array(found)


def within_five_errors(sample, mean):
    error = sample.std(ddof=1) / np.sqrt(len(sample))
    assert error > 0 and abs(sample.mean() - mean) < 5 * error


def test_discounted_returns_of_an_mdp_are_the_value_of_the_policy():
    problem = to_mdp(parse(SEEN), 4)
    T, R = np.array([[[0.3, 0.7, 0], [0, 0.4, 0.6], [0, 0, 1]], np.eye(3)]), np.full((2, 3, 3), -1.0)
    R[0, 1, 2], R[:, 2] = 10, 0
    pi, V = np.array([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5]]), np.zeros(3)
    for _ in range(4):
        V = np.einsum("sa,asu,asu->s", pi, T, R + 0.8 * V)
    sample = returns(ld.to_gymnasium(problem), lambda seen, acts, random: int(random.random() < pi[seen[-1], 1]), 4000)
    within_five_errors(sample, V[0])


def test_discounted_returns_of_a_pomdp_are_the_value_of_a_policy_of_the_last_observation(tmp_path):
    T, Z = np.array([[[0.3, 0.7, 0], [0, 0.4, 0.6], [0, 0, 1]], np.eye(3)]), np.array([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]])
    R = np.full((2, 3, 3), -1.0)
    R[0, 1, 2], R[:, 2] = 10, 0
    walk = np.array([0.9, 0.4, 0.7])  # probability after dark, light and nothing
    law, value = np.zeros((3, 3)), 0.0  # [S, last observation]
    law[0, 2] = 1
    for t in range(4):
        acted = np.einsum("so,ao->as", law, [walk, 1 - walk])
        value += 0.8**t * np.einsum("as,asu,asu->", acted, T, R)
        law = np.c_[np.einsum("as,asu,uo->uo", acted, T, Z), np.zeros(3)]
    env = ld.to_gymnasium(pomdp(tmp_path))
    within_five_errors(returns(env, lambda seen, acts, random: int(random.random() >= walk[seen[-1]]), 4000), value)


def steps_of(brute, observations, actions):
    """History (a, m, o) of observations m O + o."""
    return tuple((a, *divmod(seen, brute.obs)) for a, seen in zip(actions, observations[1:], strict=True))


def test_in_the_game_the_optimal_policy_earns_its_value(ambiguous):
    """The optimal policy of the recursion of this test; nature plays against it in the environment."""
    acts, beliefs = {}, {(): list(ambiguous.rho)}
    for t in range(ambiguous.H):
        for history, b in ambiguous.histories(t):
            beliefs[history] = b
            acts[history] = int(ambiguous.Q(b, t, history).argmax())
    env = ld.to_gymnasium(ambiguous.problem(), nature="game")
    sample = returns(env, lambda seen, done, random: acts[steps_of(ambiguous, seen, done)], 1500)
    within_five_errors(sample, ambiguous.V(list(ambiguous.rho), 0))


def test_under_one_model_a_policy_earns_its_value_under_that_model(ambiguous):
    def value(m, b, t, probabilities):
        """Of uniformly random first actions, then of the last observation."""
        total = 0.0
        for a, p in enumerate(probabilities):
            total += p * float(b @ ambiguous.r[m, t, :, a])
            for o in range(ambiguous.obs if t + 1 < ambiguous.H else 0):
                q, after = ambiguous.step(b, t, a, m, o)
                total += p * q * value(m, after, t + 1, np.eye(2)[o])
        return total

    for m in range(2):
        env = ld.to_gymnasium(ambiguous.problem(), nature=m)

        def act(seen, acts, random, m=m):
            assert all(x // ambiguous.obs == m for x in seen[1:]), "the model is seen"
            return int(seen[-1] % ambiguous.obs) if acts else int(random.integers(2))

        within_five_errors(returns(env, act, 2500), value(m, ambiguous.rho[m], 0, [0.5, 0.5]))
        assert env.nature == m


def test_the_table_of_an_mdp_is_as_that_of_toy_text():
    """Read as FrozenLake's: value iteration over it gives the value of the problem."""
    problem = to_mdp(parse(SEEN), 5)
    env = ld.to_gymnasium(problem)
    assert env.P[1][0] == [(0.4, 1, -1.0, False), (0.6, 2, 10.0, True)] and env.P[2][1] == [(1.0, 2, 0.0, True)]
    assert env.initial_state_distrib.tolist() == [1, 0, 0]
    V = np.zeros(3)
    for _ in range(5):
        Q = [[sum(p * (r + 0.8 * V[u] * (not end)) for p, u, r, end in env.P[s][a]) for a in range(2)] for s in range(3)]
        V = np.array(Q).max(-1)
    assert V[0] == pytest.approx(ld.solve(problem).value, rel=1e-9)
    endless = ld.to_gymnasium(stationary(parse(SEEN)))
    assert endless.P == env.P and endless.observation_space.n == 3 and endless.horizon is None
    changing = ld.mdp(problem.P, np.arange(30.0).reshape(5, 3, 2), problem.rho)
    assert not hasattr(ld.to_gymnasium(changing), "P")


def test_a_problem_comes_back_from_its_environment():
    problem = to_mdp(parse(SEEN), 5)
    source: Any = ld.from_gymnasium(ld.to_gymnasium(problem), horizon=5, discount=0.8)
    again = source.problem
    for name in ("P", "rho"):
        np.testing.assert_array_equal(getattr(again, name), getattr(problem, name))
    np.testing.assert_allclose(again.r, problem.r, rtol=1e-14, atol=1e-14)
    possible = np.asarray(problem.P)[..., None] > 0
    np.testing.assert_array_equal(np.where(possible, again.paid.R, 0), np.where(possible, problem.paid.R, 0))
    endless = ld.from_gymnasium(ld.to_gymnasium(problem), horizon=np.inf, discount=0.8)
    assert ld.to_gymnasium(endless).P == ld.to_gymnasium(problem).P


def test_an_environment_of_gymnasium_comes_back_from_its_problem():
    lake: Any = gymnasium.make("FrozenLake-v1").unwrapped
    ours = ld.to_gymnasium(ld.from_gymnasium("FrozenLake-v1", discount=0.9))

    def law(P):
        """Probability of (state, action, next state, reward, end), where several entries may lead to one state."""
        total = {}
        for s, actions in P.items():
            for a, moves in actions.items():
                for p, u, r, end in moves:
                    total[s, a, u, r, bool(end)] = total.get((s, a, u, r, bool(end)), 0) + p
        return total

    theirs, mine = law(lake.P), law(ours.P)
    assert theirs.keys() == mine.keys() and ours.horizon == 100
    np.testing.assert_allclose([theirs[key] for key in mine], list(mine.values()), rtol=1e-12)
    assert {r for _, _, _, r, _ in mine} == {0.0, 1.0}  # the goal pays one on arrival, with no discount


def test_a_problem_without_a_horizon_ends_in_the_goal_alone():
    env = ld.to_gymnasium(stationary(parse(HIDDEN)))
    assert env.horizon is None and env.names["states"] == ("far", "near", "goal")
    _, info = env.reset(seed=0)
    rewards, terminated = [], False
    while not terminated:
        _, reward, terminated, _, info = env.step(0)
        rewards.append(reward)
    assert info["state"] == 2 and rewards[-1] == 10 and set(rewards[:-1]) <= {-1.0}
    env.reset()
    assert not any(env.step(1)[2] for _ in range(50))  # resting never arrives
    timed = gymnasium.wrappers.TimeLimit(ld.to_gymnasium(stationary(parse(HIDDEN))), 3)
    timed.reset(seed=1)
    assert [timed.step(1)[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]


def test_wrong_arguments_are_refused(ambiguous, tmp_path, monkeypatch):
    problem = pomdp(tmp_path)
    with pytest.raises(ValueError, match=r"^nature must be 'game' or a model of this ambiguous problem \(0 to 1\); got None$"):
        ld.to_gymnasium(ambiguous.problem())
    with pytest.raises(ValueError, match=r"\(JH, UCSF, UofT, PRIAS\); got 'XY'$"):
        ld.to_gymnasium(ld.make("prostate", horizon=2), nature="XY")
    assert ld.to_gymnasium(ld.make("prostate", horizon=2), nature="UofT").nature == 2
    with pytest.raises(ValueError, match=r"^nature must be left out for a problem with one model; got 'game'$"):
        ld.to_gymnasium(problem, nature="game")
    env = ld.to_gymnasium(problem)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"^action must be a whole number from 0 to 1; got 2$"):
        env.step(2)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(UsageError, match=r"pip install -e '.\[gym\]'"):
        ld.to_gymnasium(problem)


def test_stage_dependent_arrays_are_read_by_their_stage():
    """Deterministic: the state after stage h, and the reward of stage h, tell which arrays were used."""
    P = np.zeros((3, 4, 1, 4))
    for h in range(3):
        P[h, :, 0, h + 1] = 1
    r = jnp.arange(12.0).reshape(3, 4, 1)
    env = ld.to_gymnasium(ld.mdp(P, r, np.eye(4)[0]))
    env.reset(seed=0)
    rows = [env.step(0) for _ in range(3)]
    assert [row[0] for row in rows] == [1, 2, 3] and [row[1] for row in rows] == [0.0, 5.0, 10.0]
    assert [row[2] for row in rows] == [False, False, True]


def test_a_mask_tells_which_actions_are_legal_and_another_one_is_refused():
    P = np.zeros((1, 2, 2, 2))
    P[0, 0, :, 1] = P[0, 1, :, 0] = 1
    problem = ld.mdp(P, np.zeros((3, 2, 2)) + 1.0, np.array([1.0, 0]), legal=[[True, False], [True, True]])
    env = ld.to_gymnasium(problem)
    _, info = env.reset(seed=0)
    assert info["action_mask"].tolist() == [1, 0] and env.action_space.sample(info["action_mask"]) == 0
    with pytest.raises(ValueError, match=r"^action must be legal in the state: \[0\] in state 0; got 1$"):
        env.step(1)
    assert env.step(0)[-1]["action_mask"].tolist() == [1, 1] and not hasattr(env, "P")  # a table cannot say what is legal


LIMITED = HIDDEN.format("", "") + "\nillegal: rest : near\nillegal: walk : far\n"


@pytest.mark.parametrize("kind", ["mdp", "pomdp", "stationary", "game"])
def test_gymnasium_accepts_problems_whose_actions_are_not_all_legal(kind, tmp_path):
    (tmp_path / "a.pomdp").write_text(LIMITED.replace("start: 1 0 0", "start: 0.5 0 0.5"))
    problem: Any = ld.read_pomdp(tmp_path / "a.pomdp", horizon=4)
    if kind == "mdp":
        problem = to_mdp(parse(SEEN + "\nillegal: rest : near\nillegal: walk : far\n"), 4)
    env = ld.to_gymnasium(
        {"mdp": problem, "pomdp": problem, "stationary": stationary(parse(LIMITED))}.get(kind)
        or ld.apomdp([problem.problem, problem.problem], 0.5),
        nature="game" if kind == "game" else None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(env, skip_render_check=True)
    info = env.reset(seed=0)[1]  # the game has no state yet: what is legal in all first states
    assert info["action_mask"].tolist() == ([0, 1] if info.get("state", 0) == 0 else [1, 1])
    env.action_space.seed(0)
    for seed in range(20):  # whoever samples takes legal actions alone
        _, info = env.reset(seed=seed)
        ended = False
        while not ended and info["stage"] < 4:
            action = env.action_space.sample()
            assert info["action_mask"][action]
            _, _, ended, _, info = env.step(action)


@pytest.mark.parametrize("observed", [True, False])
def test_a_large_file_pays_by_the_transition_too(observed, tmp_path, monkeypatch):
    by_observation = HIDDEN.replace("goal : * 10", "goal : light 10\nR: walk : far : near : dark 2")
    (tmp_path / "a.pomdp").write_text(SEEN if observed else by_observation)
    dense = ld.to_gymnasium(ld.read_stationary_pomdp(tmp_path / "a.pomdp"))
    monkeypatch.setattr("lindm.problems.stationary.DENSE", 0)
    sparse = ld.to_gymnasium(ld.read_stationary_pomdp(tmp_path / "a.pomdp"))
    paid = set()
    for seed in range(30):
        rows = [episode(env, seed, [0, 0, 0, 0, 0, 0], steps=6) for env in (dense, sparse)]
        assert str(rows[0]) == str(rows[1])
        paid |= {row[1] for row in rows[1][1:]}
    assert paid >= ({-1.0, 10.0} if observed else {-1.0, 2.0, 10.0})
