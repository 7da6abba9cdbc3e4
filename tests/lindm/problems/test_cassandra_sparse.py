"""The sparse reader against the dense one: the same problems, the same errors, on every form of the format."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lindm.errors import LindmError
from lindm.families.rocksample import rocksample
from lindm.problems import cassandra_sparse, stationary
from lindm.problems.cassandra import parse
from lindm.problems.cassandra_sparse import parse_sparse
from tests.lindm.problems.cassandra_cases import BROKEN, FILES, FINE, PREAMBLE, RICH, reward_entries, reward_text

CHANCE = "T: x .5 .25 .25 0 1 0 .1 .2 .7\nT: y identity\nO: x .85 .15 0 1 .25 .75\nO: y uniform\n"


def same(text: str, name: str = "f.pomdp") -> None:
    """Both readers give the same numbers and the same warnings."""
    with warnings.catch_warnings(record=True) as of_dense:
        warnings.simplefilter("always")
        dense = parse(text, name)
    with warnings.catch_warnings(record=True) as of_sparse:
        warnings.simplefilter("always")
        got = parse_sparse(text, name)
    assert (got.states, got.actions, got.observations) == (dense.states, dense.actions, dense.observations)
    assert got.discount == dense.discount
    np.testing.assert_array_equal(got.start, dense.start)
    np.testing.assert_allclose([P.toarray() for P in got.P], dense.P.swapaxes(0, 1), rtol=1e-15)
    if dense.observations:
        np.testing.assert_allclose([O.toarray() for O in got.O], dense.O, rtol=1e-15)
    else:
        assert got.O == ()
    np.testing.assert_allclose(got.r, dense.r, rtol=1e-12, atol=1e-12)
    assert (got.rewards is None) == (dense.rewards is None)
    if dense.rewards is not None:  # what is paid, at all transitions that are possible
        assert got.rewards is not None
        S, A, O = *dense.r.shape, max(len(dense.observations), 1)
        seen = dense.O if dense.observations else np.ones((A, S, 1))
        possible = (dense.P[..., None] > 0) & (seen[None] > 0)  # [S, A, S, O]
        table = np.stack([R.toarray().reshape(S, S, -1) for R in got.rewards], axis=1)
        paid, expected = (np.broadcast_to(R, (S, A, S, O))[possible] for R in (table, dense.rewards.R()))
        np.testing.assert_array_equal(paid, expected)
    scaled = [str(w.message) for w in of_dense if "scaled" in str(w.message)]
    assert [str(w.message) for w in of_sparse] == scaled


@pytest.mark.parametrize("path", sorted(FILES.glob("*.pomdp")), ids=lambda path: path.stem)
def test_every_file_is_the_same_problem(path):
    same(path.read_text())


def test_every_form_of_an_entry_is_read():
    same(RICH)
    same(FINE.replace("start: a", "start: b a"))
    mdp = "discount: 0.9\nstates: a b\nactions: x y\nT: x identity\nT: y uniform\n"
    for rewards in ("R: * : a : a 1 R: * : b : b 4", "R: * : a 1 2\nR: y : b 3 4", "R: *\n1 2\n3 4", "E: b\nR: * : a : b 3"):
        same(mdp + rewards)


@settings(max_examples=60, deadline=None)
@given(entries=reward_entries(), costs=st.booleans())
def test_any_rewards_are_the_same(entries, costs):
    same((PREAMBLE.replace("reward", "cost") if costs else PREAMBLE) + CHANCE + reward_text(entries))


@st.composite
def rewritten(draw):
    """Entries that write over each other, and at the end whole rows, so that every row is a distribution."""
    lines = []
    for _ in range(draw(st.integers(0, 8))):
        a, s, to = (draw(st.sampled_from(names)) for names in ("xy*", "abc*", "abc*"))
        forms = [f": {s} : {to} 0.3", f": {s} uniform", "identity", f": {s} .5 0 .5", "reset"]
        lines.append(f"T: {a} {draw(st.sampled_from(forms))}")
    lines += [f"T: {a} : {s} {draw(st.sampled_from(['uniform', 'reset', '0 1 0', '.25 .25 .5']))}" for a in "xy" for s in "abc"]
    lines += draw(
        st.sampled_from([[], ["T: x : a : a 0", "T: x : a : b 1", "T: x : a : c 0"], ["T: * : b : * 0", "T: * : b : c 1"]])
    )
    return "\n".join(lines)


@settings(max_examples=60, deadline=None)
@given(rewritten())
def test_the_last_entry_counts_number_by_number(entries):
    same(PREAMBLE + "start: c\n" + entries + "\nO: * uniform\n")


SAME = [
    case for case in BROKEN if "numbers; at most" not in case[3]
]  # of what makes too many numbers the sparse reader keeps fewer


@pytest.mark.parametrize("old, new, line, rule", SAME, ids=range(len(SAME)))
def test_a_broken_file_has_the_error_of_the_dense_reader(old, new, line, rule):
    with pytest.raises(LindmError) as of_dense:
        parse(FINE.replace(old, new), "f.pomdp")
    with pytest.raises(LindmError) as of_sparse:
        parse_sparse(FINE.replace(old, new), "f.pomdp")
    assert str(of_sparse.value) == str(of_dense.value)


def test_a_large_file_is_read_sparse_and_its_problem_is_the_same(tmp_path, monkeypatch):
    problem = rocksample(3, 2)
    names = problem.states
    lines = ["discount: 0.95", "values: reward", f"states: {' '.join(names)}", f"actions: {' '.join(problem.actions)}"]
    lines += ["observations: none good bad", "start: " + " ".join(map(str, problem.rho))]
    for a, action in enumerate(problem.actions):
        for word, table, to in (("T", problem.P[a].tocoo(), names), ("O", problem.O[a].tocoo(), problem.observations)):
            for s, t, v in zip(table.row, table.col, table.data, strict=True):
                lines.append(f"{word}: {action} : {names[s]} : {to[t]} {v!r}".replace("np.float64(", "").replace(")", ""))
        lines += [f"R: {action} : {names[s]} : * : * {float(v)}" for s, v in enumerate(problem.r[:, a]) if v]
    (tmp_path / "rocks.pomdp").write_text("\n".join(lines))
    monkeypatch.setattr(stationary, "DENSE", 0)
    monkeypatch.setattr(stationary.cassandra, "parse", None)  # the dense reader is not called
    read = stationary.read(tmp_path / "rocks.pomdp")
    assert (read.states, read.actions, read.discount) == (problem.states, problem.actions, 0.95)
    for got, want in zip(read.P + read.O, problem.P + problem.O, strict=True):
        assert got.nnz == want.nnz and abs(got - want).max() <= 1e-15
    np.testing.assert_array_equal(read.r, problem.r)
    assert (read.reward_table()[0, :, :, 0, 0] == problem.r).all()
    after = int(problem.P[0][[0]].indices[0])
    with (tmp_path / "rocks.pomdp").open("a") as f:  # a reward by the next state
        f.write(f"\nR: {problem.actions[0]} : {names[0]} : {names[after]} : * 5\n")
    read = stationary.read(tmp_path / "rocks.pomdp")
    table = read.reward_table()
    assert table.shape == (1, *read.r.shape, read.num_states, 1) and table[0, 0, 0, after] == 5
    monkeypatch.setattr(stationary, "POMDP_TABLE", table.size - 1)
    with pytest.raises(LindmError, match=f"rewards of all actions make a table of {table.size:,} numbers; at most"):
        read.reward_table()
    monkeypatch.setattr(cassandra_sparse, "CELLS", 100)
    with pytest.raises(LindmError, match=r"rocks.pomdp:[0-9]+: the entries up to this one write more than 100 numbers"):
        stationary.read(tmp_path / "rocks.pomdp")
