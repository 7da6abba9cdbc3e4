"""Solutions on disk: they are read as they were written, to the last bit; other files raise an error."""

import json

import jax
import numpy as np
import pytest

import lindm as ld
from lindm.errors import DataError

PROBLEMS = {
    "backward induction": lambda: ld.make("mdp", horizon=4),
    "tree": lambda: ld.make("apomdp", horizon=3),
    "hsvi": lambda: ld.make("pomdp", horizon=4),
    "net": lambda: ld.make("apomdp", horizon=3),
}


@pytest.mark.parametrize("method", PROBLEMS)
def test_a_solution_is_read_as_it_was_written(method, tmp_path):
    chosen, effort = ("auto", None) if method in ("backward induction", "tree") else (method, 20)
    solution = ld.solve(PROBLEMS[method](), chosen, effort=effort)
    assert solution.method == method
    solution.save(tmp_path / "solution.npz")
    read = ld.load_solution(tmp_path / "solution.npz")
    before, after = (jax.tree.flatten((s.problem, s.solution)) for s in (solution, read))
    assert before[1] == after[1] and all(x.dtype == y.dtype for x, y in zip(before[0], after[0], strict=True))
    assert all(np.array_equal(x, y) for x, y in zip(before[0], after[0], strict=True))
    assert (read.value, read.lower, read.upper, read.exact) == (solution.value, solution.lower, solution.upper, solution.exact)


def test_the_names_of_actions_are_kept(tmp_path):
    solution = ld.solve(ld.make("prostate", horizon=2))
    solution.save(tmp_path / "solution.npz")
    assert ld.load_solution(tmp_path / "solution.npz").first_action == solution.first_action == "defer"
    with np.load(tmp_path / "solution.npz") as stored:
        assert json.loads(str(stored["header"]))["provenance"]["date"]


def test_another_file_raises_an_error(tmp_path):
    path = tmp_path / "solution.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match="not a solution"):
        ld.load_solution(path)
    with pytest.raises(DataError, match=r"cannot read .*nothing\.npz: No such file"):
        ld.load_solution(tmp_path / "nothing.npz")
    np.savez(path, header=np.array(json.dumps({"format": 99})))
    with pytest.raises(DataError, match="must have the format 'lindm-solution-2'; got 99"):
        ld.load_solution(path)
