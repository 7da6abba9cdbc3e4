"""Every form of the format against arrays made by hand, and round trips of random models."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lindm.problems.cassandra import Model, parse, read
from lindm.problems.cassandra_problems import to_mdp, to_pomdp
from lindm.problems.cassandra_writer import write
from tests.lindm.problems.cassandra_cases import (
    FIELDS,
    FILES,
    HALF,
    PREAMBLE,
    dense_reward,
    model,
    refusal,
    reward_entries,
    reward_text,
    same,
    stacked,
)

# ---------------------------------------------------------------------------------------------------------------- the forms

EYE, THIRD = np.eye(3), np.full((3, 3), 1 / 3)
M1 = stacked([0.5, 0.25, 0.25], [0, 1, 0], [0.1, 0.2, 0.7])
M2 = stacked([0, 0, 1], [0.75, 0.25, 0], [1, 0, 0])
TRANSITIONS = {
    "matrices": ("T: x\n.5 .25 .25\n0 1 0\n.1 .2 .7\nT: y\n0 0 1\n.75 .25 0\n1 0 0", (M1, M2)),
    "matrices on one line": ("T:x .5 .25 .25 0 1 0 .1 .2 .7 T:y 0 0 1 .75 .25 0 1 0 0", (M1, M2)),
    "one matrix for all actions": ("T: *\n.5 .25 .25\n0 1 0\n.1 .2 .7", (M1, M1)),
    "identity and uniform": ("T: x identity\nT: y\nuniform", (EYE, THIRD)),
    "a matrix of starts": ("start: b\nT: x reset\nT: y identity", (np.eye(3)[[1, 1, 1]], EYE)),
    "rows": ("T: * identity\nT: x : a .5 .25 .25\nT: 0 : 2\n.1 .2\n.7", (M1, EYE)),
    "a row for all states": ("T: x : * .5 .25 .25\nT: y identity", (M1[[0, 0, 0]], EYE)),
    "a row for all actions": ("T: * identity\nT: * : 2 .1 .2 .7", (stacked(EYE[0], EYE[1], M1[2]),) * 2),
    "a uniform row": ("T: * identity\nT: y : b uniform", (EYE, stacked(EYE[0], THIRD[0], EYE[2]))),
    "a row of starts": ("start: .5 .25 .25\nT: * identity\nT: y : b reset", (EYE, stacked(EYE[0], M1[0], EYE[2]))),
    "single numbers": (
        "T: x : a : a .5  T: x : a : b .25  T: x : a : c .25  T: x : 1 : 1 1  T: x : c : 0 .1 T: x : 2 : b .2 T: x : c : c .7\n"
        "T: y : * : c 1\nT: y : * : * 0\nT: y : a : c 1.0\nT: y : b : a .75\nT: y : b : b .25\nT: y : c : a 1",
        (M1, M2),
    ),
    "every place a star": ("T: * : * : * 0\nT: * : * : b 1", (np.eye(3)[[1, 1, 1]],) * 2),
    "a star of probabilities": ("T: * : * : * 0.3333333333333333", (np.full((3, 3), 0.3333333333333333),) * 2),
    "later entries win, number by number": (
        "T: * uniform\nT: * identity\nT: x : a : a 0.0\nT: x : a : c 1",
        (EYE[[2, 1, 2]], EYE),
    ),
    "colons with and without space": ("T:x:a:a 1\nT :x: a :b 0\nT : * : b : b 1\nT:*:c:c 1 T : y : a\n: a 1", (EYE, EYE)),
    "a star before a colon": ("T:*:*:* 0\nT:*: *:a 1", (EYE[[0, 0, 0]],) * 2),
    "comments": ("T: x # names, T: y 0\nidentity#T: y uniform\n# T\nT: y # : a\nidentity # 1 2", (EYE, EYE)),
    "scientific notation and signs": ("T: * identity\nT: x : a 5e-1 +2.5E-1 + 0.025e+1", (stacked(M1[0], EYE[1], EYE[2]), EYE)),
    "line ends of all kinds": ("T: x\r\n.5 .25 .25\r0 1 0\r\n.1\t.2 .7\rT: y\r\n\r\nidentity # T\rT: y : 0 : 0 1.\n", (M1, EYE)),
}


@pytest.mark.parametrize("form", TRANSITIONS)
def test_transitions_in_every_form(form):
    entries, want = TRANSITIONS[form]
    got = model(entries + "\nO: * uniform").P
    assert np.array_equal(got, np.stack(want, axis=1))


Z1 = stacked([0.85, 0.15], [0, 1], [0.25, 0.75])
OBSERVATIONS = {
    "matrices": ("O: x\n.85 .15\n0 1\n.25 .75\nO: 1 .85 .15 0 1 .25 .75", (Z1, Z1)),
    "one matrix for all actions": ("O: *\n.85 .15\n0 1\n.25 .75", (Z1, Z1)),
    "uniform": ("O: * : * : u 1\nO: y uniform", (stacked([1, 0], [1, 0], [1, 0]), HALF)),
    "rows": ("O: * uniform\nO: y : a .85 .15\nO: y : 1 0 1\nO: y:c\n.25\n.75", (HALF, Z1)),
    "rows for all": ("O: * : * .85 .15\nO: x : b uniform", (stacked(Z1[0], HALF[0], Z1[0]), Z1[[0, 0, 0]])),
    "single numbers": (
        "O: x : a : u .85\nO: x : a : 1 .15\nO: 0 : b : v 1\nO: x : 2 : 0 .25\nO: x : c : v .75\nO: y : * : * .5",
        (Z1, HALF),
    ),
    "later entries win": ("O: * uniform\nO: x : * : u 0\nO: x : * : v 1", (stacked([0, 1], [0, 1], [0, 1]), HALF)),
}


@pytest.mark.parametrize("form", OBSERVATIONS)
def test_observations_in_every_form(form):
    entries, want = OBSERVATIONS[form]
    assert np.array_equal(model("T: * identity\n" + entries).O, np.stack(want))


START = {
    "": [1 / 3] * 3,
    "start: uniform": [1 / 3] * 3,
    "start: 0.5 .25\n# half\n0.25": [0.5, 0.25, 0.25],
    "start: b": [0, 1, 0],
    "start: 2": [0, 0, 1],
    "start include: a 2": [0.5, 0, 0.5],
    "start include : c": [0, 0, 1],
    "start exclude: b": [0.5, 0, 0.5],
    "start exclude: 0\n2": [0, 1, 0],
}


@pytest.mark.parametrize("start", START)
def test_the_start_in_every_form(start):
    assert np.array_equal(model(f"{start}\nT: * identity O: * uniform").start, np.array(START[start]))


@pytest.mark.parametrize(
    "start, fits", [("", True), ("start: 1", True), ("start: 0", True), ("start: 1.0", True), ("start: 2", False)]
)
def test_the_start_of_a_single_state(start, fits):
    text = f"discount: 1 states: 1 actions: 1 observations: 1 {start} T: 0 1 O: 0 1"
    if fits:
        assert parse(text).start == [1]
    else:
        assert "expected a probability" in refusal(text)


# rewards: the numbers of every entry are written into a dense table by loops, and the expectation is taken term by term


@settings(max_examples=60)
@given(entries=reward_entries(), costs=st.booleans())
def test_expected_rewards_of_any_entries_are_those_of_a_dense_table(entries, costs):
    chance = "T: x .5 .25 .25 0 1 0 .1 .2 .7\nT: y identity\nO: x .85 .15 0 1 .25 .75\nO: y uniform\n"
    preamble = PREAMBLE.replace("reward", "cost") if costs else PREAMBLE
    got = model(chance + reward_text(entries), preamble)
    want = dense_reward(entries, got.P, got.O)
    np.testing.assert_allclose(got.r, -want if costs else want, rtol=1e-12, atol=1e-12)


def test_rewards_are_negated_costs_and_nothing_is_not_negative_zero():
    chance = "T: * identity O: * uniform\n"
    rewards = "R: x : a : * : * 3\nR: y : * : * : * -2.5"
    got = model(chance + rewards, PREAMBLE.replace("reward", "cost")).r
    assert np.array_equal(got, [[-3, 2.5], [0, 2.5], [0, 2.5]])
    assert not np.signbit(got[1:, 0]).any()
    assert np.array_equal(model(chance + rewards).r, -got)
    assert np.array_equal(model(chance + rewards, PREAMBLE.replace("values: reward\n", "")).r, -got)


def test_a_reward_that_nothing_changes_is_exact():
    noisy = "T: * : * 0.1 0.2 0.7\nO: * : * 0.3 0.7\n"
    got = model(noisy + "R: * : * : * : * 0.1\nR: y : b : * : * 1e300\nR: x : c : a : u -7\nR: x : c : * : * 0.7").r
    assert np.array_equal(got, [[0.1, 0.1], [0.1, 1e300], [0.7, 0.1]])


def test_rewards_by_next_state_where_there_is_one_observation():
    text = "discount: 1 states: 3 actions: 2 observations: 1 T: * : * .5 .25 .25 O: * uniform\nR: 1 : 2 8 4 2"
    assert np.array_equal(parse(text).r, [[0, 0], [0, 0], [0, 5.5]])
    assert np.array_equal(parse(text + "\nR: 0 : 1 : 1 5").r, [[0, 0], [1.25, 0], [0, 5.5]])


def test_no_number_is_negative_zero():
    got = model("start: 1 -0 -0.0\nT: * identity\nT: x : b -0 1 -0.0\nO: * : * 1 -0.\nR: * : * : * : * -0.0")
    for field in FIELDS:
        assert not np.signbit(getattr(got, field)).any()


def test_the_preamble_may_have_any_order():
    lines = [*PREAMBLE.splitlines(), "start include: b c"]
    want = model("start include: b c\nT: * identity O: * uniform")
    for order in itertools.permutations(lines):
        same(parse("\n".join([*order, "T: * identity O: * uniform"])), want)


def test_counts_make_names_of_indices():
    got = parse("discount: 1\nstates: 2 actions: 3\nobservations: 1\nT: * identity O: * uniform")
    assert (got.states, got.actions, got.observations) == (("0", "1"), ("0", "1", "2"), ("0",))


ODD = (
    "größe",
    "s(1,2)",
    "2nd",
    "a/b",
    "-",
    "+",
    "->",
    "it's",
    '"q"',
    "T1",
    "Start",
    "x=1",
    "1e5x",
    "nan",
    "inf",
    "{0}",
    "%s",
    "**",
)


def test_names_may_have_odd_characters(tmp_path):
    preamble = f"discount: 1 states: {' '.join(ODD)} actions: - + observations: {' '.join(reversed(ODD))}\n"
    text = preamble + "start: ->\nT: * identity\nO: * uniform\nR: - : - : - : - - 2\nR: + : + : * : * + 3\n"
    (tmp_path / "odd.pomdp").write_bytes(b"\xef\xbb\xbf" + text.encode())  # with the mark that some editors put first
    got = read(tmp_path / "odd.pomdp")
    assert got.states == ODD and got.actions == ("-", "+") and got.observations == ODD[::-1]
    assert got.start[ODD.index("->")] == 1 and got.r[ODD.index("+"), 1] == 3
    assert got.r[ODD.index("-"), 0] == -2 / len(ODD)
    same(parse(write(got)), got)


# ---------------------------------------------------------------------------------------------------- there and back, exactly


def random_model(seed: int, r, sizes=(3, 2, 4), names=True) -> Model:
    rng = np.random.default_rng(seed)
    S, A, O = sizes

    def rows(*shape):
        x = rng.dirichlet(np.full(shape[-1], 0.4), shape[:-1])
        x[x < rng.choice([0, 0.05, 0.3])] = 0
        x = np.where(x.sum(-1, keepdims=True) > 0, x, 1)
        return x / x.sum(-1, keepdims=True)

    P, Z = rows(S, A, S), rows(A, S, O)
    if seed % 3 == 0:  # matrices with words of their own, and the same ones for all actions
        P[:, 0] = np.eye(S)
        Z[:] = 1 / O
    return Model(
        states=tuple(f"s-{i}" for i in range(S)) if names else tuple(map(str, range(S))),
        actions=tuple(f"a{i}" for i in range(A)),
        observations=tuple(map(str, range(O))),
        discount=float(rng.uniform(0.01, 1)),
        P=P,
        O=Z,
        r=np.asarray(r, float).reshape(S, A) + 0.0,
        start=rows(S),
    )


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    r=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=6, max_size=6),
    names=st.booleans(),
)
def test_a_model_is_read_exactly_as_written(seed, r, names):
    there = random_model(seed, r, names=names)
    same(parse(write(there)), there)


def test_a_larger_model_is_read_as_written_and_zeros_are_left_out():
    there = random_model(1, np.zeros(40 * 3), sizes=(40, 3, 7))
    P = np.zeros((40, 3, 40))
    P[np.arange(40), :, (np.arange(40) + 1) % 40] = 1
    there = Model(**{**there.__dict__, "P": P})
    text = write(there)
    same(parse(text), there)
    assert sum(line.startswith("T:") for line in text.splitlines()) == 40  # one number for each state, all actions at once
    assert "R:" not in text


@pytest.mark.parametrize("name", ["tiger", "1d", "4x3"])
def test_the_files_come_back(name):
    there = read(FILES / f"{name}.pomdp")
    same(parse(write(there)), there)


@pytest.mark.parametrize(
    "change, rule",
    [
        ({"states": ("a b", "b", "c")}, "'a b'"),
        ({"states": ("a", "b", "#")}, "'#'"),
        ({"states": ("a", "b:", "c")}, "'b:'"),
        ({"states": ("a", "", "c")}, "''"),
        ({"states": ("a", "2", "c")}, "number is an index"),
        ({"states": ("a", "*", "c")}, "stands for all"),
        ({"actions": ("x", "identity")}, "word of the format"),
        ({"actions": ("x", "x")}, "'x': twice"),
        ({"actions": ("x",)}, r"P must .* \(3, 1, 3\)"),
        ({"states": (), "P": np.zeros((0, 2, 0))}, "P must"),
        ({"discount": -0.5}, "discount"),
        ({"discount": 1.5}, "discount"),
        ({"r": np.full((3, 2), np.nan)}, "r must be finite"),
        ({"start": np.array([0.5, 0.25, 0.24])}, "each row of start"),
        ({"start": np.array([1.5, -0.5, 0.0])}, "each row of start"),
    ],
)
def test_a_model_that_a_file_cannot_hold_is_not_written(change, rule):
    fine = model("T: * identity O: * uniform")
    with pytest.raises(ValueError, match=rule):
        write(Model(**{**fine.__dict__, **change}))


def test_what_is_paid_is_the_table_of_the_file_and_its_mean_is_r():
    """Entry by entry by hand: a later entry replaces an earlier one, number by number; costs change the sign."""
    rng = np.random.default_rng(4)
    T, O = rng.dirichlet(np.ones(3), (2, 3)), rng.dirichlet(np.ones(2), (2, 3))
    rows = [f"T: {a} : {s} : {u} {float(T[a, s, u])!r}" for a in range(2) for s in range(3) for u in range(3)]
    rows += [f"O: {a} : {u} : {o} {float(O[a, u, o])!r}" for a in range(2) for u in range(3) for o in range(2)]
    rewards = "R: * : * : * : * 1\nR: 1 : 2 : 0 : * 5\nR: 1 : * : 0 : 1 7\nR: 0 : 0\n1 2\n3 4\n0 0\nR: 1 : 1 : 0 : 1 0"
    text = "\n".join(["discount: 0.9 values: cost states: 3 actions: 2 observations: 2", *rows, rewards]).replace(
        "np.float64", ""
    )
    R = np.ones((3, 2, 3, 2))
    R[2, 1, 0] = 5
    R[:, 1, 0, 1] = 7
    R[0, 0] = [[1, 2], [3, 4], [0, 0]]
    R[1, 1, 0, 1] = 0
    got = parse(text)
    problem = to_pomdp(got, 4)
    np.testing.assert_array_equal(problem.paid.R, -R[None])
    assert float(problem.paid.discount) == float(problem.discount) == 0.9
    mean = -np.einsum("asu,auo,sauo->sa", T, O, R)
    np.testing.assert_allclose(problem.r, 0.9 ** np.arange(4)[:, None, None] * mean, rtol=1e-12)
    steps = np.indices((3, 2, 3, 2)).reshape(4, -1)
    np.testing.assert_array_equal(problem.pay(3, *steps), -R.reshape(-1))
    again = parse(write(got))
    same(again, got)
    np.testing.assert_array_equal(again.rewards.R(), got.rewards.R())


def test_an_episode_that_has_ended_pays_nothing():
    text = "discount: 1 states: a b end actions: 1\nT: *\nuniform\nE: end\nR: 0 : * : end 5\nR: 0 : * : b -1"
    paid = to_mdp(parse(text), 2).paid
    np.testing.assert_array_equal(paid.R[0, :, 0, :, 0], [[0, -1, 5], [0, -1, 5], [0, 0, 0]])


def test_an_undiscounted_reward_of_state_and_action_alone_needs_no_table():
    text = PREAMBLE + "T: * identity\nO: * uniform\nR: * : a : * : * 2"
    assert to_pomdp(parse(text), 3, 1.0).paid is None
    paid = to_pomdp(parse(text), 3, 0.5).paid
    assert paid.R.shape == (1, 3, 2, 1, 1) and np.array_equal(paid.R[0, :, :, 0, 0], [[2, 2], [0, 0], [0, 0]])
