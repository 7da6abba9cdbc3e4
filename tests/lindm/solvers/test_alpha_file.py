"""Files of alpha vectors: what is read, and what is refused with file and line."""

import numpy as np
import pytest

from lindm.errors import DataError
from lindm.solvers import alpha_file
from lindm.solvers.alpha_file import read_alpha


def test_a_file_of_pomdp_solve_is_read(tmp_path):
    path = tmp_path / "a.alpha"
    path.write_text("0\n19.5 -1e-3 \n\n2\n-3 4\n\n")
    actions, vectors = read_alpha(path, 2, 3)
    assert actions.tolist() == [0, 2]
    np.testing.assert_array_equal(vectors, [[19.5, -0.001], [-3, 4]])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", ":1: expected an alpha vector with 2 numbers, one for each state; got an empty file"),
        ("0\n1 2\n1\n3\n", ":4: expected an alpha vector with 2 numbers, one for each state; got 1 at the end"),
        ("3\n1 2\n", ":1: expected the number of an action, from 0 to 2, before each vector of 2 numbers; got '3'"),
        ("0\n1 2 3\n", ":2: expected the number of an action, from 0 to 2, before each vector of 2 numbers; got '3'"),
        ("0\n1 two\n", ":2: expected a number of an alpha vector; got 'two'"),
        ("0\n1 nan\n", ": alpha vectors must be finite; vector 1 is not"),
        ("0\n1 1e999\n", ": alpha vectors must be finite; vector 1 is not"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text, message):
    path = tmp_path / "a.alpha"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        read_alpha(path, 2, 3)
    assert str(error.value) == f"{path}{message}"


SARSOP = """<?xml version="1.0" encoding="ISO-8859-1"?>
<Policy version="0.1" type="value" model="tiger.pomdp" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">
<AlphaVector vectorLength="2" numObsValue="1" numVectors="2">
<Vector action="0" obsValue="0">19.5 -1e-3 </Vector>
<Vector action="2" obsValue="0">-3 4 </Vector>
</AlphaVector> </Policy>
"""


def test_a_policy_of_sarsop_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.policy"
    path.write_text(SARSOP)
    monkeypatch.delattr(alpha_file, "_line")  # counting lines for every vector would take quadratic time
    actions, vectors = read_alpha(path, 2, 3)
    assert actions.tolist() == [0, 2]
    np.testing.assert_array_equal(vectors, [[19.5, -0.001], [-3, 4]])


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('action="2"', 'action="3"', ":5: expected an action from 0 to 2 and obsValue 0, of a problem whose state is all hidden"),
        ('action="2" obsValue="0"', 'action="2" obsValue="1"', "got action 2, obsValue 1"),
        ("-3 4", "-3", ":5: expected an alpha vector with 2 numbers, one for each state; got 1"),
        ("-3 4", "-3 four", ":5: expected the numbers of an alpha vector"),
        ("-3 4", "-3 inf", ": alpha vectors must be finite; vector 2 is not"),
        ("<Vector", "<Vektor", ": expected <Vector action="),
        ("<Vector", "<SparseVector", ":4: expected elements <Vector> alone; got 'SparseVector'"),
        ("<Policy", '<!ENTITY a "b"><Policy', ":2: expected elements <Vector> alone; got '<!ENTITY'"),
    ],
)
def test_a_policy_of_sarsop_that_is_wrong_is_refused(tmp_path, old, new, message):
    path = tmp_path / "a.policy"
    path.write_text(SARSOP.replace(old, new))
    with pytest.raises(DataError) as error:
        read_alpha(path, 2, 3)
    assert message in str(error.value) and str(error.value).startswith(str(path))
