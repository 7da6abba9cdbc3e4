"""Problems of files: known values, discounts, MDPs without observations, illegal actions."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from lindm.errors import DataError, LindmError
from lindm.problems import cassandra_sections
from lindm.problems.cassandra import Model, parse, read
from lindm.problems.cassandra_problems import to_mdp, to_pomdp, to_pomdps
from lindm.problems.cassandra_sparse import parse_sparse
from lindm.problems.cassandra_writer import write
from lindm.types import MDP
from tests.lindm.problems.cassandra_cases import FILES, FINE, HALF, RICH, A, O, S, refusal, same

# ---------------------------------------------------------------------------------------------------------------- known problems


def tree_value(m: Model, gamma: float, horizon: int) -> float:
    """The best expected discounted reward: recursion over normalized beliefs, which are remembered."""
    seen: dict = {}

    def value(b: np.ndarray, left: int) -> float:
        key = (left, tuple(b.round(13)))
        if left and key not in seen:
            choices = []
            for a in range(len(m.actions)):
                joint = (b @ m.P[:, a])[:, None] * m.O[a]  # next state and observation
                chances = joint.sum(0)
                branches = (p * value(joint[:, o] / p, left - 1) for o, p in enumerate(chances) if p > 1e-14)
                choices.append(b @ m.r[:, a] + gamma * sum(branches))
            seen[key] = max(choices)
        return seen[key] if left else 0.0

    return value(m.start, horizon)


@pytest.mark.parametrize(
    "name, gamma, horizon, value",
    [
        ("tiger", 0.95, 1, -1.0),
        ("tiger", 0.95, 2, -1.95),
        ("tiger", 0.95, 3, 2.3098),
        ("tiger", 0.95, 5, 2.7630961931),
        ("tiger", 1.0, 5, 3.60915),
        ("1d", 0.75, 5, 0.9482417793),
        ("4x3", 0.95, 5, 0.0899850532),
    ],
)
def test_values_are_those_of_pomdp_solve(name, gamma, horizon, value):
    m = read(FILES / f"{name}.pomdp")
    assert gamma in (m.discount, 1.0)
    assert tree_value(m, gamma, horizon) == pytest.approx(value, abs=1e-6)


def test_the_tiger_is_the_published_one():
    m = read(FILES / "tiger.pomdp")
    assert m.actions == ("listen", "open-left", "open-right") and np.array_equal(m.start, [0.5, 0.5])
    assert np.array_equal(m.r, [[-1, -100, 10], [-1, 10, -100]])
    assert np.array_equal(m.O, [[[0.85, 0.15], [0.15, 0.85]], HALF[:2], HALF[:2]])
    assert np.array_equal(m.P[:, 0], np.eye(2)) and (m.P[:, 1:] == 0.5).all()


def test_the_corridor_is_the_published_one():
    m = read(FILES / "1d.pomdp")
    west, east = [0, 0, 3], [1, 3, 2]
    for a, ends in enumerate((west, east)):
        np.testing.assert_allclose(m.P[:, a], [*np.eye(4)[ends], [1 / 3, 1 / 3, 1 / 3, 0]], rtol=1e-15)
    assert np.array_equal(m.r, m.P[:, :, 3])  # being at the goal after a move
    assert np.array_equal(m.O[:, :, 1], [[0, 0, 0, 1]] * 2)


def test_the_maze_is_its_geometry():
    m = read(FILES / "4x3.pomdp")
    cells = [(row, column) for row in range(3) for column in range(4) if (row, column) != (1, 1)]
    P = np.zeros((11, 4, 11))
    for s, (row, column) in enumerate(cells):
        for a, (down, right) in enumerate([(-1, 0), (1, 0), (0, 1), (0, -1)]):
            for chance, move in ((0.8, (down, right)), (0.1, (right, down)), (0.1, (-right, -down))):
                end = (row + move[0], column + move[1])
                P[s, a, cells.index(end) if end in cells else s] += chance
    free = np.ones(11)
    free[[3, 6]] = 0
    P[[3, 6]] = free / 9
    np.testing.assert_allclose(m.P, P, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(m.start, free / 9, rtol=1e-15)
    for s, (row, column) in enumerate(cells):
        left, right = (row, column - 1) not in cells, (row, column + 1) not in cells
        wall = {(True, False): "left", (False, True): "right", (True, True): "both", (False, False): "neither"}[left, right]
        seen = {3: "good", 6: "bad"}.get(s, wall)
        assert np.array_equal(m.O[:, s], np.broadcast_to(np.eye(6)[m.observations.index(seen)], (4, 6)))
    assert np.array_equal(
        m.r, np.broadcast_to(np.where(free, -0.04, 0)[:, None] + np.eye(11)[3][:, None] - np.eye(11)[6][:, None], (11, 4))
    )


# ------------------------------------------------------------------------------------------------------------- to the problems


@pytest.mark.parametrize("discount, gamma", [(None, 0.9), (0.5, 0.5), (1, 1.0), (0, 0.0)])
def test_a_model_becomes_a_problem_with_the_discount_in_its_rewards(discount, gamma):
    m = parse(RICH)
    problem = to_pomdp(m, 4, discount)
    assert problem.P.shape == (1, S, A, S) and problem.O.shape == (1, A, S, O) and problem.rho.shape == (S,)
    assert {x.dtype for x in (problem.P, problem.O, problem.r, problem.rho)} == {jnp.dtype("float64")}
    assert np.array_equal(problem.P[0], m.P) and np.array_equal(problem.O[0], m.O) and np.array_equal(problem.rho, m.start)
    np.testing.assert_allclose(problem.r, [gamma**h * m.r for h in range(4)], rtol=1e-12)


@pytest.mark.parametrize(
    "horizon, discount, name",
    [(0, None, "horizon"), (2.5, None, "horizon"), (3, -0.1, "discount"), (3, 1.1, "discount"), (3, float("nan"), "discount")],
)
def test_an_invalid_horizon_or_discount_raises_an_error(horizon, discount, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        to_pomdp(parse(RICH), horizon, discount)


def test_models_of_one_problem_fit_together_and_others_raise_an_error_that_names_them():
    one, two = parse(RICH), parse(RICH.replace("0.85 0.15", "0.75 0.25"))
    problems = to_pomdps([one, two], ["one", "two"], 3)
    assert len(problems) == 2 and problems[1].O[0, 1, 0, 0] == 0.75 and problems[0].r.shape == (3, S, A)
    for old, new, rule in (
        ("actions: x y", "actions: x y z", r"^two: actions must be as in one, .*'x', 'y'.*; got .*'z'"),
        ("discount: 0.9", "discount: 0.8", "^two: discount must be as in one, '0.9'; got '0.8'"),
        ("states: a b c", "states: c a b", "^two: states must be as in one"),
        ("observations: u v", "observations: u v w", "^two: observations must be as in one"),
    ):
        text = "discount: 0.9\nstates: a b c\nactions: x y\nobservations: u v\nT: * identity\nO: * uniform"
        with pytest.raises(LindmError, match=rule):
            to_pomdps([parse(text), parse(text.replace(old, new))], ["one", "two"], 3)
    other = Model(**{**one.__dict__, "discount": 0.5})
    assert np.array_equal(to_pomdps([one, other], ["one", "two"], 2, 0.8)[1].r[1], 0.8 * one.r)
    for models, names in (([], []), ([one], ["one", "two"])):
        with pytest.raises(ValueError, match="models must be at least one"):
            to_pomdps(models, names, 3)


def test_reserved_words_of_the_format_are_not_names():
    for word in cassandra_sections.RESERVED:
        assert "word of the format" in refusal(FINE.replace("states: a b c", f"states: a b c {word}"))


# ------------------------------------------------------------------------------------------------------------------------ MDPs

FOREST = read(FILES / "forest.pomdp")


def test_a_file_without_observations_is_an_mdp():
    assert FOREST.observations == () and FOREST.O.shape == (2, 3, 0)
    same(parse(write(FOREST)), FOREST)
    problem = to_mdp(FOREST, 3)
    assert isinstance(problem, MDP) and problem.r.shape == (3, 3, 2)
    # the forest of pymdptoolbox: it grows or burns; the longer it stands, the more the owner likes it
    assert np.array_equal(FOREST.P[:, 0], [[0.1, 0.9, 0], [0.1, 0, 0.9], [0.1, 0, 0.9]]) and (FOREST.P[:, 1, 0] == 1).all()
    assert np.array_equal(FOREST.r, [[0, 0], [0, 1], [4, 2]])


def test_rewards_of_an_mdp_have_every_form_of_the_grammar():
    head = "discount: 0.9\nstates: a b\nactions: x y\nT: x identity\nT: y uniform\n"
    table = np.array([[1.0, 2], [3, 4]])  # by state and next state
    forms = (
        "R: * : a : a 1 R: * : a : b 2 R: * : b : a 3 R: * : b : b 4",
        "R: * : a : a : * 1 R: * : a : b : * 2 R: * : b : a : * 3 R: * : b : b : * 4",
        "R: * : a 1 2\nR: * : b 3 4",
        "R: *\n1 2\n3 4",
    )
    for form in forms:
        got = parse(head + form).r
        assert np.array_equal(got, np.stack([np.diag(table), table.mean(1)], axis=1)), form
    assert "'0' is no observation of this MDP" in refusal(head + "R: x : a : a : 0 1")
    with pytest.raises(LindmError, match=r"^two: observations must be given in several files"):
        to_pomdps([parse(head + "R: * : a : a 1"), parse(head)], ["two", "three"], 3)


@pytest.mark.parametrize("observations", ["observations: u v\nO: * : * : u 0.5 O: * : * : v .5\n", ""])
def test_an_episode_ends_where_e_says_and_nothing_is_paid_afterward(observations):
    preamble, _, O = observations.partition("\n")
    head = f"discount: 0.9\nstates: far goal E\nactions: N E\n{preamble}\nstart: far\n{O}"
    text = head + "T: * : far : goal 1\nT: E : E : far 1\nT : N : E : E 1\nE: goal\nR: * : * : goal 10\nR: * : E : E -1\n"
    text = text.replace("goal 10", "goal : * 10").replace("E -1", "E : * -1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = parse(text)
    assert np.array_equal(got.P[1], np.eye(3)[[1, 1]])  # T of the goal is not given: it is kept
    assert np.array_equal(got.r, [[10, 10], [0, 0], [-1, 0]])
    same(parse(write(got)), got)  # as standard entries, which every reader of the format understands
    assert "\nE:" not in write(got)
    with pytest.warns(UserWarning, match="^f.pomdp:[0-9]+: the reward of actions in 'goal' is never paid"):
        parse(text + "R: N : goal : * : * 3", "f.pomdp")


def test_with_discount_zero_the_first_reward_counts_alone():
    got = parse("discount: 0\nstates: 2\nactions: 2\nT: * identity\nR: 1 : 0 : * : * 3", "f.pomdp")
    assert got.discount == 0 and to_mdp(got, 3).r[:, 0, 1].tolist() == [3, 0, 0]


# -------------------------------------------------------------------------------------------------------------- illegal actions


def test_an_entry_makes_an_action_illegal_in_a_state_or_in_all():
    head = "discount: 0.9\nstates: a b c\nactions: x y z\nT: x identity\nT: z uniform\nR: y : * : * : * 5\n"
    got = parse(head + "illegal: y : *\nillegal: z : b\nillegal: 0 : c\nR: z : b : * : * 3\nE: a\n", "f.pomdp")
    assert got.legal is not None  # where an episode has ended every action is the same
    assert np.array_equal(got.legal, [[True, True, True], [True, False, False], [False, False, True]])
    assert np.array_equal(got.P[1], [[0, 1, 0], [0, 1, 0], [0, 1, 0]]) and (got.r == 0).all()  # rows of T may be missing
    same(parse(write(got)), got)
    assert np.array_equal(parse(write(got)).legal, got.legal) and "illegal: y : b" in write(got)
    problem = to_mdp(got, 2)
    assert problem.legal is not None and problem.legal.dtype == bool and np.array_equal(problem.legal, got.legal)
    named = parse("discount: 0.9\nstates: illegal a\nactions: x y\nT: * identity\nillegal: x : illegal", "f.pomdp")
    assert named.legal is not None and np.array_equal(named.legal, [[False, True], [True, True]])
    for wrong, line, rule in (
        ("illegal: y", 7, "'illegal' takes action : state; got 'y'"),
        ("illegal: w : a", 7, "'w' is none of the actions"),
        ("illegal: y : d", 7, "'d' is none of the states"),
        ("illegal: * : b", 7, "state 'b' has no legal action"),
        ("", 7, "T of action 'y', state 'a' is missing"),
    ):
        assert refusal(head + wrong).startswith(f"f.pomdp:{line if wrong else 6}: {rule}")
    other = parse(write(got).replace("observations", "observations").replace("illegal: y : b\n", "") + "T: y identity")
    assert other.legal is not None and other.legal[1, 1]


def test_a_sparse_reader_has_the_same_illegal_actions():
    text = "discount: 0.9\nstates: a b c\nactions: x y z\nT: x identity\nT: z uniform\nR: y : * : * : * 5\nR: z : * : * : * 2\n"
    for more in ("illegal: y : *\nillegal: z : b\nillegal: 0 : c\nE: a\n", "illegal: y : *\n"):
        dense, sparse = parse(text + more), parse_sparse(text + more)
        assert sparse.legal is not None and np.array_equal(sparse.legal, dense.legal) and np.array_equal(sparse.r, dense.r)
        assert np.array_equal(np.stack([P.toarray() for P in sparse.P], axis=1), dense.P)
    with pytest.raises(DataError, match="state 'b' has no legal action"):
        parse_sparse(text + "illegal: * : b")


def test_several_files_must_have_the_same_illegal_actions():
    text = "discount: 0.9\nstates: a b\nactions: x y\nobservations: u\nT: * identity\nO: * uniform\n"
    one, two = parse(text + "illegal: x : a"), parse(text)
    assert to_pomdps([one, one], ["one", "two"], 2)[1].legal is not None
    with pytest.raises(DataError, match=r"^two: `illegal` must be as in one"):
        to_pomdps([one, two], ["one", "two"], 2)
    with pytest.raises(ValueError, match="legal must have the shape"):
        write(Model(**{**one.__dict__, "legal": np.zeros((2, 2), bool)}))
