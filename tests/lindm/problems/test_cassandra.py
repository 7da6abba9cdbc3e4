"""Every form of the format against arrays made by hand, round trips of random models, broken files, and known values."""

import itertools
import re
import tracemalloc
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lindm.errors import DataError, LindmError
from lindm.problems import cassandra
from lindm.problems.cassandra import Model, parse, read
from lindm.problems.cassandra_problems import to_mdp, to_pomdp, to_pomdps
from lindm.problems.cassandra_sparse import parse_sparse
from lindm.problems.cassandra_writer import write
from lindm.types import MDP

FILES = Path(__file__).parent / "files"
PREAMBLE = "discount: 0.9\nvalues: reward\nstates: a b c\nactions: x y\nobservations: u v\n"
S, A, O = 3, 2, 2
FIELDS = ("P", "O", "r", "start")


def model(entries: str, preamble: str = PREAMBLE) -> Model:
    return parse(preamble + entries, "f.pomdp")


def refusal(text: str) -> str:
    with pytest.raises(LindmError) as caught:
        parse(text, "f.pomdp")
    assert isinstance(caught.value, DataError)
    return str(caught.value)


def same(one: Model, two: Model) -> None:
    for field in ("states", "actions", "observations", "discount"):
        assert getattr(one, field) == getattr(two, field)
    for field in FIELDS:
        got, want = getattr(one, field), getattr(two, field)
        assert got.dtype == want.dtype == np.float64 and got.shape == want.shape and got.tobytes() == want.tobytes(), field


def stacked(*rows) -> np.ndarray:
    return np.array(rows, float)


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


HALF = np.full((3, 2), 0.5)
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


def dense_reward(entries: list, P: np.ndarray, Z: np.ndarray) -> np.ndarray:
    R = np.zeros((A, S, S, O))
    for places, numbers in entries:
        left = itertools.product(*(range(n) if p is None else [p] for p, n in zip(places, (A, S, S, O), strict=False)))
        for place in left:
            R[place] = np.reshape(numbers, R[place].shape)
    r = np.zeros((S, A))
    for s, a, s2, o in itertools.product(range(S), range(A), range(S), range(O)):
        r[s, a] += P[s, a, s2] * Z[a, s2, o] * R[a, s, s2, o]
    return r


def reward_text(entries: list) -> str:
    names = ("xy", "abc", "abc", "uv")
    return "\n".join(
        "R: " + " : ".join("*" if p is None else names[i][p] for i, p in enumerate(places)) + " " + " ".join(map(repr, numbers))
        for places, numbers in entries
    )


@st.composite
def reward_entries(draw):
    entries = []
    for _ in range(draw(st.integers(0, 8))):
        given_places = draw(st.sampled_from([2, 3, 4]))
        places = tuple(draw(st.none() | st.integers(0, n - 1)) for n in (A, S, S, O)[:given_places])
        size = int(np.prod((S, O)[given_places - 2 :]))
        entries.append((places, draw(st.lists(st.floats(-100, 100), min_size=size, max_size=size))))
    return entries


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


# --------------------------------------------------------------------------------------------------------------- broken files

FINE = PREAMBLE + "start: a\nT: x identity\nT: y\n.5 .25 .25\n0 1 0\n.1 .2 .7\nO: * uniform\nR: x : a : * : * 1\n"
# line:  1-5          6       7           8    9         10    11      12             13
BROKEN = [
    ("discount: 0.9\n", "", 12, "'discount' is missing"),
    ("states: a b c\n", "", 12, "'states' is missing"),
    ("actions: x y\n", "", 12, "'actions' is missing"),
    ("observations: u v\n", "", 12, "'observations' is missing"),
    ("observations: u v\n", "E: d\nobservations: u v\n", 6, "'observations' must come before"),
    ("O: * uniform", "E:\nO: * uniform", 12, "'E' takes a list of states; got nothing"),
    ("O: * uniform", "E: a d\nO: * uniform", 12, "'d' is none of the states"),
    ("T: x identity\nT: y\n.5 .25 .25\n0 1 0\n.1 .2 .7\n", "", 8, "T of action 'x', state 'a' is missing: expected 3"),
    ("O: * uniform\n", "", 12, "O of action 'x', state 'a' is missing: expected 2"),
    ("T: x identity\n", "", 12, "T of action 'x', state 'a' is missing"),
    ("O: * uniform", "O: x uniform\nO: y : * .5 .5\nO: y : b 1 1", 14, "O of action 'y', state 'b' sums to 2; expected one"),
    ("discount: 0.9", "discount: 0.9\ndiscount: 0.8", 2, "'discount' is given twice, first on line 1"),
    ("start: a", "start: a\nstart include: b", 7, "'start' is given twice, first on line 6"),
    ("O: * uniform", "O: * uniform\nvalues: cost", 13, "'values' must come before the first T, O, R or E, which is on line 7"),
    ("O: * uniform", "O: * uniform\nstart: b", 13, "'start' must come before"),
    ("discount: 0.9", "discount: 1.01", 1, "a number from 0 to 1; got '1.01'"),
    ("discount: 0.9", "discount: -0.9", 1, "a number from 0 to 1; got '-0.9'"),
    ("discount: 0.9", "discount: nan", 1, "a number from 0 to 1; got 'nan'"),
    ("discount: 0.9", "discount: often", 1, "a number from 0 to 1; got 'often'"),
    ("discount: 0.9", "discount:", 1, "a number from 0 to 1; got ''"),
    ("discount: 0.9", "discount: 0.9\n0.8", 2, "a number from 0 to 1; got '0.9 0.8'"),
    ("discount: 0.9", "discount 0.9", 1, "expected one of discount, values, states"),
    ("reward", "rewards", 2, "`reward` or `cost`, in the singular; got 'rewards'"),
    ("states: a b c", "states:", 3, "'states' must be a count from 1 to 1000000 or a list of names; got ''"),
    ("states: a b c", "states: 0", 3, "a count from 1 to 1000000"),
    ("states: a b c", "states: -3", 3, "a count from 1 to 1000000"),
    ("states: a b c", "states: 2.5", 3, "a count from 1 to 1000000"),
    ("states: a b c", "states: " + "9" * 5000, 3, "a count from 1 to 1000000"),
    ("states: a b c", "states: 100000000", 3, "a count from 1 to 1000000"),
    ("states: a b c", "states: 10000", 3, "10000 states, 2 actions and 2 observations make 200040000 numbers; at most 50000000"),
    ("observations: u v", "observations: 9000000", 5, "a count from 1 to 1000000"),
    ("states: a b c", "states: a\nb a c", 4, "'a' cannot be a name in 'states': it is there already"),
    ("states: a b c", "states: a b\n3", 4, "'3' cannot be a name in 'states': a number is an index"),
    ("states: a b c", "states: a b * c", 3, "'*' cannot be a name"),
    ("states: a b c\nactions: x y", "states: a b c\nactions x y", 4, "'actions' cannot be a name in 'states'"),
    ("states: a b c", "states: a b : c", 3, "':' cannot be a name"),
    ("T: y\n", "T: z\n", 8, "'z' is none of the actions: expected 'x', 'y', or an index from 0 to 1"),
    ("T: y\n", "T: 2\n", 8, "'2' is none of the actions"),
    ("T: y\n", "T: 1.0\n", 8, "'1.0' is none of the actions"),
    ("T: y\n", "T:\n", 9, "'.5' is none of the actions"),
    ("R: x : a", "R: x : d", 13, "'d' is none of the states: expected 'a', 'b', 'c', or an index from 0 to 2"),
    ("R: x : a", "R: x : u", 13, "'u' is none of the states"),
    ("* : * 1", "* : 5 1", 13, "'5' is none of the observations"),
    ("* : * 1", "* : * : 1 1", 13, "'R' takes 2 to 4 of action : state : state : observation; got 'x : a : * : * : 1'"),
    ("R: x : a : * : * 1", "R: x 1 2 3", 13, "'R' takes 2 to 4 of"),
    ("R: x : a : * : * 1", "R: x :", 13, "'R' takes 2 to 4 of"),
    ("R: x : a : * : * 1", "R:", 13, "'R' takes 2 to 4 of action : state : state : observation; got 'nothing'"),
    ("R: x : a : * : * 1", "R: x : a : * : *", 13, "'R' needs one number; got 0"),
    ("R: x : a : * : * 1", "R: x : a : * : * -", 13, "'R' needs one number; got 0"),
    ("R: x : a : * : * 1", "R: x : a : * 1", 13, "'R' needs 2 numbers; got 1"),
    ("R: x : a : * : * 1", "R: x : a 1 2 3 4 5", 13, "'R' needs 6 numbers (3 x 2); got 5"),
    ("R: x : a : * : * 1", "R: x : a 1 2 3 4 5 6\n7", 14, "expected 6 numbers (3 x 2); got 6 and then '7', one too many"),
    ("R: x : a : * : * 1", "R: x : a : * : * uniform", 13, "got 0 and then 'uniform', which is not a number"),
    ("R: x : a : * : * 1", "R: x : a : * : * 1e400", 13, "expected a finite number; got '1e400'"),
    ("R: x : a : * : * 1", "R: x : a : * : * inf", 13, "'inf', which is not a number"),
    ("R: x : a : * : * 1", "R: x : a : * : * 1_0", 13, "'1_0', which is not a number"),
    (".1 .2 .7\n", ".1 .2\n", 8, "'T' needs 9 numbers (3 x 3); got 8 up to the next entry or the end"),
    ("0 1 0\n", "0 1 0\n0\n", 12, "expected 9 numbers (3 x 3); got 9 and then '.7', one too many"),
    ("0 1 0\n", "0 l 0\n", 10, "got 4 and then 'l', which is not a number"),
    ("0 1 0\n", "1 1 -1\n", 10, "expected a probability, from 0 to 1; got '-1'"),
    ("0 1 0\n", "0 1.1 0\n", 10, "expected a probability, from 0 to 1; got '1.1'"),
    ("0 1 0\n", "0 .99 0\n", 8, "T of action 'y', state 'b' sums to 0.99; expected one (within 1e-05)"),
    ("0 1 0\n", "0 .999 0.00102\n", 8, "T of action 'y', state 'b' sums to 1.00002; expected one"),
    ("O: * uniform", "T: y : b : a .5\nO: * uniform", 12, "T of action 'y', state 'b' sums to 1.5"),
    ("O: * uniform", "O: * identity", 12, "'identity', which is not a number"),
    ("O: * uniform", "O: * reset", 12, "'reset', which is not a number"),
    ("O: * uniform", "T: x : a identity\nO: * uniform", 12, "'identity', which is not a number"),
    ("O: * uniform", "T: x : a : a uniform\nO: * uniform", 12, "'uniform', which is not a number"),
    ("O: * uniform", "O: * uniform uniform", 12, "got 0 and then 'uniform', which is not a number"),
    ("O: * uniform", "O * uniform", 12, "got 9 and then 'O', which is not a number"),
    ("start: a", "start: d", 6, "'d' is none of the states"),
    ("start: a", "start: 3", 6, "'3' is none of the states"),
    ("start: a", "start:", 6, "'start' needs 3 numbers; got 0"),
    ("start: a", "start: .5 .5", 6, "'start' needs 3 numbers; got 2"),
    ("start: a", "start: .5 .5 0 0", 6, "got 3 and then '0', one too many"),
    ("start: a", "start: .5 .25 .2", 6, "the start sums to 0.95"),
    ("start: a", "start:\na\nd", 8, "'d' is none of the states"),
    ("start: a", "start include:", 6, "'start include' takes a list of states; got nothing"),
    ("start: a", "start include: a *", 6, "'*' is none of the states"),
    ("start: a", "start exclude: a b c", 6, "'start exclude' leaves no state"),
    ("start: a", "start include a", 6, "'start' cannot be a name in 'observations': it is a word of the format"),
    (FINE, "", 1, "the file is empty"),
    (FINE, "\n# a comment\n\n", 1, "the file is empty"),
]


@pytest.mark.fault("F13")
@pytest.mark.parametrize("old, new, line, rule", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_raises_an_error_with_its_line_and_what_was_expected(old, new, line, rule):
    assert FINE.count(old) == 1
    message = refusal(FINE.replace(old, new))
    assert message.startswith(f"f.pomdp:{line}: ") and rule in message, message


RICH = (
    "# all forms\ndiscount: 0.9 # gamma\nvalues: cost\nstates: a b c\nactions: x y\nobservations: u v\nstart include: a 2\n"
    "T: x identity\nT: y\n0.5 0.25 0.25\n0 1 0\n1e-1 0.2 0.7\nT: x : b reset\nT: * : 2 uniform\nT: x : a : a 0\nT: 0 : a : c 1\n"
    "O: * uniform\nO: y\n0.85 0.15\n0 1\n0.25 0.75\nO: x : a 0.5 0.5\nO: x : b : u 1\nO: x : b : 1 0\n"
    "R: * : * : * : * - 1\nR: x : a : c 1 2\nR: y : 1\n1 2\n3 4\n5 6\nR: x : * : b : v 10\n"
)
WORDS = (
    "",
    "*",
    ":",
    "uniform",
    "reset",
    "identity",
    "T",
    "O:",
    "R :",
    "start",
    "states",
    "discount:",
    "q",
    "7",
    "-1",
    "1e999",
    "#",
    "\n",
)


def survives(text: str) -> None:
    """Read, or refused with a line of the file: nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            parse(text, "f.pomdp")
        except LindmError as stop:
            match = re.match(r"f\.pomdp:(\d+): \S", stop.message)
            assert isinstance(stop, DataError) and match and 1 <= int(match[1]) <= text.count("\n") + 1, stop.message


def test_the_text_to_break_is_whole():
    got = parse(RICH)
    assert np.array_equal(got.P[:, 0], [[0, 0, 1], [0.5, 0, 0.5], [1 / 3, 1 / 3, 1 / 3]])


@pytest.mark.fault("F13")
def test_a_truncated_text_is_read_or_raises_an_error():
    tokens, lines = re.split(r"(\s+)", RICH), RICH.splitlines(keepends=True)
    for end in range(0, len(RICH), 2):
        survives(RICH[:end])
    for parts in (tokens, lines):
        for i in range(len(parts)):
            survives("".join(parts[:i] + parts[i + 1 :]))


@pytest.mark.fault("F13")
@settings(max_examples=150)
@given(data=st.data())
def test_a_changed_text_is_read_or_raises_an_error(data):
    tokens = re.split(r"(\s+|:)", RICH)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(tokens) - 1))
        other = data.draw(st.sampled_from(tokens) | st.sampled_from(WORDS) | st.text(max_size=3))
        tokens[at : at + data.draw(st.integers(0, 2))] = [other]
    survives("".join(tokens))


@pytest.mark.fault("F13")
def test_a_file_that_is_not_text_raises_an_error(tmp_path):
    (tmp_path / "latin.pomdp").write_bytes("discount: 1\n# größe\n".encode("latin-1"))
    (tmp_path / "empty.pomdp").write_bytes(b"")
    for path, rule in (
        (tmp_path / "none.pomdp", r"cannot read .*none\.pomdp: No such file"),
        (tmp_path, f"{tmp_path} must be a regular file; it is a directory"),
        ("a\0b", "cannot read a\0b: "),
        (tmp_path / "latin.pomdp", r"latin\.pomdp:2: expected text in UTF-8; got the byte 0xf6"),
        (tmp_path / "empty.pomdp", r"empty\.pomdp:1: the file is empty"),
    ):
        with pytest.raises(LindmError, match=rule) as caught:
            read(path)
        assert isinstance(caught.value, DataError)


@pytest.mark.fault("F32")
@pytest.mark.parametrize(
    "counts", ["states: 100000000\nactions: 1", "states: 7000\nactions: 2", "states: 1000000\nactions: 1000000"]
)
def test_an_absurd_size_raises_an_error_before_memory_is_allocated(counts):
    tracemalloc.start()
    message = refusal(f"discount: 1\n{counts}\nobservations: 1000000\nT: * identity O: * uniform")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message.startswith("f.pomdp:2: ") and peak < 2e6


def test_rewards_by_observation_take_one_action_at_a_time_and_have_a_limit():
    def text(S, A, O):
        return f"discount: 1 states: {S} actions: {A} observations: {O}\nT: * identity\nO: * uniform\n{rewards}"

    rewards = "R: * : * : * : * -1\nR: 0 : 7 : 7 : 3 9"
    tracemalloc.start()
    got = parse(text(150, 8, 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert got.r[7, 0] == pytest.approx((19 * -1 + 9) / 20, rel=1e-12) and (np.delete(got.r.ravel(), 7 * 8) == -1).all()
    assert peak < 8 * 150 * 150 * 20 * 8 / 2  # half of a table of all actions
    assert "f.pomdp:5: rewards that depend on the observation make 64000000 numbers" in refusal(text(800, 1, 100))


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


# --------------------------------------------------------------------------------------------------- rows that miss one a little


def test_rows_that_miss_one_a_little_are_scaled_with_one_warning():
    text = PREAMBLE + "start: .333333 .333333 .333333\nT: * identity\nT: y : *\n.999999 0 0\nO: * : *\n.5 .500009\n"
    with pytest.warns(UserWarning) as caught:
        got = parse(text, "f.pomdp")
    assert [str(w.message) for w in caught] == [
        "f.pomdp:6: the start sums to 0.999999, not to one (and 9 more that miss it): scaled"
    ]
    assert np.array_equal(got.P[:, 1, 0], [1, 1, 1]) and np.array_equal(got.P[:, 0], np.eye(3))
    np.testing.assert_allclose(got.O, np.broadcast_to([0.5 / 1.000009, 0.500009 / 1.000009], (2, 3, 2)), rtol=1e-15)
    np.testing.assert_allclose(got.start, 1 / 3, rtol=1e-15)
    same(parse(write(got)), got)


@pytest.mark.parametrize("row, off", [(".9 .09999", True), (".9 .09998", None), (".9 .1000000000001", False), ("1 .00001", True)])
def test_the_tolerance_is_that_of_pomdp_solve(row, off):
    text = f"discount: 1 states: 2 actions: 1 observations: 1 O: * : * : * 1 T: 0 identity\nT: 0 : 1 {row}"
    if off is None:
        assert "sums to 0.99998; expected one" in refusal(text)
    elif off:
        with pytest.warns(UserWarning, match="<text>:2: T of action '0', state '1' sums to"):
            assert parse(text).P[1, 0].sum() == pytest.approx(1, abs=1e-15)
    else:
        assert np.array_equal(parse(text).P[1, 0], [float(p) for p in row.split()])  # as it was written, no warning


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
    for word in cassandra.RESERVED:
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
