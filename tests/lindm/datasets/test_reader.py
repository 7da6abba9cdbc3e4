"""What is on disk comes back, to the last bit, and the labels are what the arrays in the row imply."""

import json

import jax
import numpy as np
import pyarrow.parquet
import pytest

from lindm import datasets
from lindm.datasets import Dataset, episodes_of, problem_of
from lindm.datasets.reader import FORMAT
from lindm.errors import DataError, LindmError
from lindm.types import APOMDP, MDP, POMDP
from tests.lindm.datasets.conftest import config


def same(x, y):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), x, y)


def test_a_fixed_problem_is_read_exactly_with_every_task(made):
    for name, kind in (("mdp", MDP), ("apomdp", APOMDP)):
        source = made.sources[name]
        tasks = Dataset(getattr(made, name)).load()
        assert [task.task for task in tasks] == list(range(10))
        for task in tasks:
            problem = task.problem()
            assert isinstance(problem, kind)
            same(problem, source.problem if name == "mdp" else source)


def test_a_row_of_the_parquet_files_serves_too(made):
    row = pyarrow.parquet.read_table(made.suite / "tasks-00000.parquet").to_pylist()[1]
    same(problem_of(row), Dataset(made.suite).load()[1].problem())


def test_a_pomdp_is_a_pomdp():
    row = {"kind": "pomdp", "horizon": 1} | {k: [1.0] for k in ("P", "O", "r", "rho")}
    row |= {"P_shape": [1, 1, 1, 1], "O_shape": [1, 1, 1, 1], "r_shape": [1, 1, 1], "rho_shape": [1]}
    assert isinstance(problem_of(row), POMDP)


def test_labels_of_mdps_are_those_of_backward_induction_on_the_row(made):
    for directory in (made.suite, made.mdp):
        for task in Dataset(directory):
            P, r, rho = (np.array(task.arrays[k]).reshape(task.arrays[f"{k}_shape"]) for k in ("P", "r", "rho"))
            V, U, Q = np.zeros(len(rho)), np.zeros(len(rho)), np.zeros(r.shape)
            for h in reversed(range(task.horizon)):
                Q[h] = r[h] + P[0] @ V
                V, U = Q[h].max(-1), (r[h] + P[0] @ U).mean(-1)
            np.testing.assert_allclose([task.value, task.lower, task.upper], rho @ V, rtol=1e-12)
            np.testing.assert_allclose(task.uniform_value, rho @ U, rtol=1e-12)
            for row in task.episodes:
                for h, s in enumerate(row.state):
                    np.testing.assert_allclose(row.Q[h], Q[h][s], rtol=1e-12)
                    assert Q[h][s, row.label[h]] >= Q[h][s].max() - 1e-12
                    assert row.reward[h] == r[h][s, row.action[h]]


def test_labels_of_an_apomdp_are_those_of_the_recursion_at_the_history(made):
    brute, known = made.brute, {}
    for task in Dataset(made.apomdp):
        assert task.method == "tree" and task.arrays["alpha"] == 0.7
        for row in task.episodes:
            history: tuple = ()
            beliefs = list(brute.rho)
            assert row.model is not None and row.observation is not None
            for t, (a, m, o) in enumerate(zip(row.action, row.model, row.observation, strict=True)):
                if history not in known:
                    known[history] = brute.Q(beliefs, t)
                Q = known[history]
                np.testing.assert_allclose(row.Q[t], Q, rtol=1e-11, atol=1e-12)
                assert Q[row.label[t]] >= Q.max() - 1e-12
                assert row.reward[t] == brute.r[m, t, row.state[t], a]
                p, b = brute.step(beliefs[m], t, a, m, o)
                assert p > 0
                history, beliefs = (*history, (a, m, o)), [b] * brute.M
    assert len(known) > 10
    np.testing.assert_allclose(task.value, known[()].max(), rtol=1e-11)
    np.testing.assert_allclose(task.uniform_value, brute.V(list(brute.rho), 0, policy=lambda t, h: np.full(2, 0.5)), rtol=1e-11)


def test_behaviors_behave_as_they_are_named(made, tmp_path):
    """The label is taken with probability 1 by the oracle, 1 - e + e/A by epsilon, 1/A by uniform."""
    A, how = 3, {"behavior": "uniform", "query_behavior": "epsilon", "query_epsilon": 0.3}
    datasets.make_dataset(tmp_path / "d", made.sources["mdp"], config(tasks=200, shard_size=None, **how))
    agreed = {"demo": [], "query": []}
    for task in Dataset(tmp_path / "d"):
        for row in task.episodes:
            agreed[row.role] += [a == label for a, label in zip(row.action, row.label, strict=True)]
    for role, p in (("demo", 1 / A), ("query", 0.7 + 0.3 / A)):
        x = np.array(agreed[role])
        assert abs(x.mean() - p) < 5 * np.sqrt(p * (1 - p) / len(x)), role
    for task in Dataset(made.mdp):
        assert all(row.action == row.label for row in task.demonstrations)


def test_demonstrations_come_first_and_no_two_episodes_are_one(made):
    for task in Dataset(made.suite):
        assert {row.task for row in task.episodes} == {task.task}
        assert [(row.role, row.episode) for row in task.episodes] == [
            *(("demo", k) for k in range(4)),
            ("query", 0),
            ("query", 1),
        ]
    plays = [json.dumps([row.state, row.action]) for task in Dataset(made.mdp) for row in task.episodes]
    assert len(set(plays)) > len(plays) / 2  # each with a key of its own


def test_fewer_demonstrations_leave_the_others_as_they_are(made, tmp_path):
    datasets.make_dataset(tmp_path / "d", made.sources["mdp"], config(tasks=2, demos=3, query_epsilon=0.5))
    for few, many in zip(Dataset(tmp_path / "d"), Dataset(made.mdp), strict=False):
        assert list(few.episodes) == [row for row in many.episodes if (row.role, row.episode) != ("demo", 3)]


def test_rows_stack_to_episodes_and_labels(made):
    rows = next(iter(Dataset(made.apomdp))).episodes
    episodes, labels = episodes_of(rows)
    assert episodes.m is not None and episodes.o is not None
    assert episodes.s.shape == episodes.m.shape == (6, 3) and labels.Q.shape == (6, 3, 2)
    assert episodes.a.dtype == np.int32 and labels.certificate.dtype == np.int8 and labels.Q.dtype == np.float64
    assert episodes.o.tolist() == [row.observation for row in rows]
    episodes, _ = episodes_of(next(iter(Dataset(made.mdp))).episodes)
    assert episodes.m is None and episodes.o is None


@pytest.mark.fault("F28")
@pytest.mark.parametrize("name", ["tasks-00001.jsonl", "episodes-00002.jsonl", "manifest.json"])
def test_damage_is_named_by_its_file(made, tmp_path, name):
    for path in made.suite.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / name).read_bytes())
    data[-20] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(LindmError, match=name) as e:
        list(Dataset(tmp_path))
    assert isinstance(e.value, DataError)
    (tmp_path / name).unlink()
    with pytest.raises(LindmError, match=f"cannot read .*{name}|not finished"):
        list(Dataset(tmp_path))


def test_other_files_raise_errors(tmp_path):
    for text in ("[1]", "{", '{"config": {"format": "another"}}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(LindmError, match=r"manifest\.json: not") as e:
            list(Dataset(tmp_path))
        assert isinstance(e.value, DataError)


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
def test_a_dataset_of_another_version_raises_an_error_that_names_both_versions(tmp_path, name):
    content = '{"config": {"format": "lindm-dataset-1", "recipe": {}}}'
    (tmp_path / name).write_text(content)
    message = rf"{name}: must have the format '{FORMAT}'; got 'lindm-dataset-1': another version of lindm wrote it; make it again"
    with pytest.raises(DataError, match=message):
        Dataset(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": 0}, "tasks must be a whole number of at least 1; got 0"),
        ({"demos": 0}, "demos must be"),
        ({"queries": 1.5}, "queries must be"),
        ({"epsilon": 1.1}, "epsilon must be a number in"),
        ({"query_epsilon": -0.1}, "query_epsilon must be a number in"),
        ({"behavior": "expert"}, "behavior must be one of oracle, epsilon, uniform; got 'expert'"),
        ({"query_behavior": "greedy"}, "query_behavior must be one of"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**32}, "seed must be below"),
        ({"shard_size": 0}, "shard_size must be"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
