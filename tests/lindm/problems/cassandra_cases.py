"""Texts in the format of Cassandra that several test files use, and what is read from them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from lindm.errors import DataError, LindmError
from lindm.problems.cassandra import Model, parse

FILES = Path(__file__).parent / "files"
PREAMBLE = "discount: 0.9\nvalues: reward\nstates: a b c\nactions: x y\nobservations: u v\n"
S, A, O = 3, 2, 2
HALF = np.full((3, 2), 0.5)
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
    ("states: a b c", "states: a\nb a c", 4, "'a' cannot be a name in 'states': it is given twice"),
    ("states: a b c", "states: a b\n3", 4, "'3' cannot be a name in 'states': a number is an index"),
    ("states: a b c", "states: a b * c", 3, "'*' cannot be a name"),
    ("states: a b c\nactions: x y", "states: a b c\nactions x y", 4, "'actions' cannot be a name in 'states'"),
    ("states: a b c", "states: a b : c", 3, "':' cannot be a name"),
    ("actions: x y", "actoins: x y", 4, "before a colon; got 'actoins'; did you mean actions?"),
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
    ("0 1 0\n", "0 .99 0\n", 10, "T of action 'y', state 'b' sums to 0.99; expected one (within 1e-05)"),
    ("0 1 0\n", "0 .999 0.00102\n", 10, "T of action 'y', state 'b' sums to 1.00002; expected one"),
    (".1 .2 .7\n", "# the last\n.1\n.2 + .8\n", 12, "T of action 'y', state 'c' sums to 1.1; expected one"),
    ("T: y\n.5 .25", "T: y .5\n.5", 8, "T of action 'y', state 'a' sums to 1.25; expected one"),
    ("O: * uniform", "O: * uniform\nT: y : b\n\n.5 .4\n0", 15, "T of action 'y', state 'b' sums to 0.9; expected one"),
    ("O: * uniform", "O: *\nuniform\nT: * : c\nuniform\nT: x : c : c\n.5", 17, "T of action 'x', state 'c' sums to 1.16666667"),
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

RICH = (
    "# all forms\ndiscount: 0.9 # gamma\nvalues: cost\nstates: a b c\nactions: x y\nobservations: u v\nstart include: a 2\n"
    "T: x identity\nT: y\n0.5 0.25 0.25\n0 1 0\n1e-1 0.2 0.7\nT: x : b reset\nT: * : 2 uniform\nT: x : a : a 0\nT: 0 : a : c 1\n"
    "O: * uniform\nO: y\n0.85 0.15\n0 1\n0.25 0.75\nO: x : a 0.5 0.5\nO: x : b : u 1\nO: x : b : 1 0\n"
    "R: * : * : * : * - 1\nR: x : a : c 1 2\nR: y : 1\n1 2\n3 4\n5 6\nR: x : * : b : v 10\n"
)
