"""Broken, truncated and absurd files, and rows that miss one a little."""

import re
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lindm.errors import DataError, LindmError
from lindm.problems.cassandra import parse, read
from lindm.problems.cassandra_writer import write
from tests.lindm.problems.cassandra_cases import BROKEN, FINE, PREAMBLE, RICH, refusal, same


@pytest.mark.fault("F13")
@pytest.mark.parametrize("old, new, line, rule", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_raises_an_error_with_its_line_and_what_was_expected(old, new, line, rule):
    assert FINE.count(old) == 1
    message = refusal(FINE.replace(old, new))
    assert message.startswith(f"f.pomdp:{line}: ") and rule in message, message


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
