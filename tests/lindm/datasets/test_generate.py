"""What is drawn where the oracle only has bounds, and when a suite cannot be drawn at all."""

import jax
import numpy as np
import pytest

from lindm import datasets
from lindm.datasets import generate
from lindm.families.random_suites import RandomSuite
from lindm.types import APOMDP
from tests.lindm.datasets.conftest import SUITE, config

APOMDPS = RandomSuite(
    name="apomdps", horizon=2, states=2, actions=2, observations=2, models=2, quality=0.8, distance=0.5, alpha=0.7
)


def test_labels_with_bounds_have_their_certificate(tmp_path):
    datasets.make_dataset(tmp_path / "d", APOMDPS, config(tasks=2, demos=1, queries=1, method="net"))
    tasks = datasets.Dataset(tmp_path / "d").load()
    assert len(tasks) == 2 and tasks[0].arrays["P"] != tasks[1].arrays["P"]
    for task in tasks:
        assert task.method == "net" and task.uniform_value is None
        assert task.lower <= task.value <= task.upper
        assert {c for episode in task.episodes for c in episode.certificate} <= {1, 2}
        problem = task.problem()
        assert isinstance(problem, APOMDP)
        # a problem of two stages by hand: every history of the first step
        P, O, r, rho = (np.asarray(x) for x in (problem.models.P, problem.models.O, problem.models.r, problem.models.rho))

        def mix(G, alpha=float(problem.alpha)):
            return alpha * G.min(0) + (1 - alpha) * G.max(0)

        child = np.einsum("s,msax,maxo->maox", rho[0], P[:, 0], O[:, 0])
        last = mix(np.einsum("maox,kxb->kmaob", child, r[:, 1])).max(-1).sum(-1)
        value = mix(np.einsum("s,msa->ma", rho[0], r[:, 0]) + last).max()
        assert task.lower - 1e-9 <= value <= task.upper + 1e-9
    card = (tmp_path / "d" / "README.md").read_text()
    assert "uniform_value" not in card and "lower bound of the optimal value, mean over tasks" in card


def test_a_suite_without_tasks_is_an_error_and_not_a_file_of_nan(tmp_path, monkeypatch):
    real = generate._task_block

    def nothing_found(*args):
        return jax.tree.map(lambda x: x * np.nan, real(*args))

    monkeypatch.setattr(generate, "_task_block", nothing_found)
    with pytest.raises(ValueError, match=r"no task 0 to 3 of the source RandomSuite\(name='small'.*its gap is too large"):
        datasets.make_dataset(tmp_path / "d", SUITE, config())
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["config.json", "provenance.json"]
