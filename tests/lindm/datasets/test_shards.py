"""Shards made by worker processes: the same bytes, and a killed worker costs its own shard."""

import os
import signal

import jax
import numpy as np
import pytest

from lindm.datasets import make_dataset, shards
from lindm.datasets.generate import TaskGenerator
from lindm.errors import LindmError, UsageError
from lindm.families.random_suites import RandomSuite
from tests.lindm.datasets.conftest import SUITE, config, fixed_mdp
from tests.lindm.datasets.test_writer import contents

CONFIG = config(query_epsilon=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mdp", "suite"])
def test_two_workers_write_the_bytes_of_one_process(made, tmp_path, name):
    source, done = {"mdp": fixed_mdp(), "suite": SUITE}[name], []
    result = make_dataset(
        tmp_path / "d", source, CONFIG, executor="local", workers=2, progress=lambda n, total: done.append((n, total))
    )
    assert contents(tmp_path / "d") == contents(getattr(made, name)) and result.made == 3
    assert done[0] == (0, 10) and done[-1] == (10, 10)


def _die_once(task):
    """In a worker: killed at one shard unless its tombstone exists."""
    name = task[0]
    tombstone = os.environ["DATASETS_TEST_TOMBSTONE"]
    if name == "00001" and not os.path.exists(tombstone):
        with open(tombstone, "w"):
            os.kill(os.getpid(), signal.SIGKILL)
    return shards._make_in_worker(task)


@pytest.mark.slow
@pytest.mark.fault("F17")
def test_a_killed_worker_costs_its_shard_and_the_same_command_makes_it(made, tmp_path, monkeypatch):
    monkeypatch.setenv("DATASETS_TEST_TOMBSTONE", str(tmp_path / "tombstone"))
    real = shards.TaskPool.run

    def run(self, function, tasks, **options):
        return real(self, _die_once, tasks, **options)

    monkeypatch.setattr(shards.TaskPool, "run", run)
    with pytest.raises(LindmError, match=r"shard 00001: worker died \(signal 9\); the same command makes what is missing"):
        make_dataset(tmp_path / "d", SUITE, CONFIG, executor="local", workers=1)
    monkeypatch.undo()
    result = make_dataset(tmp_path / "d", SUITE, CONFIG)
    assert (result.kept, result.made) == (2, 1) and contents(tmp_path / "d") == contents(made.suite)


def test_a_small_dataset_needs_no_workers(made, tmp_path, monkeypatch):
    monkeypatch.setattr(shards.TaskPool, "__enter__", lambda self: pytest.fail("a worker was started"))
    make_dataset(tmp_path / "d", SUITE, CONFIG, executor="local")
    assert contents(tmp_path / "d") == contents(made.suite)


def test_a_large_dataset_is_handed_to_workers_after_its_first_shard(tmp_path, monkeypatch):
    handed = []

    class Pool:
        def __init__(self, *arguments):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def run(self, function, tasks, on_event):
            handed.extend(tasks)

    monkeypatch.setattr(shards, "TaskPool", Pool)
    monkeypatch.setattr(shards, "available_cores", lambda: 2)
    monkeypatch.setattr(shards, "HELP_AFTER", 0.0)
    monkeypatch.setattr(shards, "make_shard", lambda generator, name, first, last, progress: ({"shard": name}, {}))
    generator = TaskGenerator(SUITE, CONFIG)
    written = []
    plan = {"00000": (0, 4), "00001": (4, 8), "00002": (8, 10)}
    shards.make_shards(generator, plan, lambda record, contents: written.append(record), executor="local")
    assert written == [{"shard": "00000"}] and handed == [("00001", 4, 8), ("00002", 8, 10)]


def test_workers_have_the_source_the_precision_and_the_errors_of_the_caller(monkeypatch):
    monkeypatch.setattr(shards, "_generator", None)
    source = jax.tree.map(np.asarray, fixed_mdp().problem)
    shards._start_worker(source, CONFIG, True, None)
    record, _ = shards._make_in_worker(("00000", 0, 4))
    here, _ = shards.make_shard(TaskGenerator(fixed_mdp().problem, CONFIG), "00000", 0, 4)
    assert record == here
    shards._start_worker(RandomSuite(name="none", horizon=2, states=2, actions=2, gap=100.0), CONFIG, True, None)
    with pytest.raises(UsageError, match="could be drawn: its gap is too large"):
        shards._make_in_worker(("00000", 0, 4))


def test_wrong_executors_and_numbers_of_workers_are_refused(tmp_path):
    for options, message in (
        ({"executor": "cloud"}, "executor must be one of serial, local, ray; got 'cloud'"),
        ({"workers": 0}, "workers must be >= 1; got 0"),
    ):
        with pytest.raises(UsageError, match=message):
            make_dataset(tmp_path / "d", SUITE, CONFIG, **options)
