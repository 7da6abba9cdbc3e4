"""Losses that are kept beside the tasks: the same as those that are computed, and computed again where something differs."""
# what may be None is there in these tests
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

import importlib.metadata
import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import lindm as ld
from lindm.cli.main import main
from lindm.datasets import DatasetConfig
from lindm.errors import UsageError
from lindm.evaluation import compare, kept_losses
from lindm.evaluation.policies.bayes_policies import Bayes, BayesDemo, Thompson
from lindm.evaluation.policies.offline_rl import LSVI
from lindm.families.random_suites import RandomSuite

SEEN = RandomSuite(name="mdp", horizon=2, states=2, actions=2, concentration=0.5, step=0.25)
HIDDEN = replace(SEEN, name="pomdp", observations=2, quality=0.8)
AMBIGUOUS = replace(HIDDEN, name="apomdp", models=2, distance=0.3, alpha=0.7)
DATASET = DatasetConfig(tasks=4, demos=2, behavior="epsilon", epsilon=0.5, seed=1_000_000)


@pytest.fixture
def computed(monkeypatch):
    """The policies whose losses are computed."""
    policies, compute = [], compare.evaluate_policy

    def counting(tasks, policy, **limits):
        policies.append(policy)
        return compute(tasks, policy, **limits)

    monkeypatch.setattr(compare, "evaluate_policy", counting)
    return policies


def without_speed(results):
    return [replace(result, decisions_per_s=0.0) for result in results]


@pytest.mark.parametrize(
    "suite, names",
    [
        (SEEN, ("bc", "random", "lsvi", "thompson", "bayes-demo")),
        (HIDDEN, ("qmdp", "random", "bayes")),
        (AMBIGUOUS, ("random", "qmdp")),
    ],
    ids=["mdp", "pomdp", "apomdp"],
)
def test_kept_results_are_those_that_are_computed(tmp_path, computed, suite, names):
    alone = compare.evaluate(suite, names, dataset=DATASET)
    first = compare.evaluate(suite, names, dataset=DATASET, data=tmp_path / "data")
    assert len(computed) == 2 * len(names)
    again = compare.evaluate(suite, names, dataset=DATASET, data=tmp_path / "data")
    assert len(computed) == 2 * len(names), "nothing is computed again"
    assert without_speed(first) == without_speed(again) == without_speed(alone)
    assert [one.decisions_per_s for one in again] == [one.decisions_per_s for one in first]
    assert len(list((tmp_path / "data" / "losses").iterdir())) == len(names)
    (checked,) = ld.check(tmp_path / "data")
    assert checked.problems == []


def test_other_limits_other_settings_and_other_code_are_computed(tmp_path, computed, monkeypatch):
    def run(**limits):
        policies = {"bayes-demo": BayesDemo(SEEN, 0.5, samples=50, seed=limits.pop("seed", 0))}
        before = len(computed)
        compare.evaluate(SEEN, policies, dataset=DATASET, data=tmp_path / "data", **limits)
        return len(computed) - before

    assert (run(), run(), run(seed=1), run(seed=1), run(max_histories=7), run(max_histories=7)) == (1, 0, 1, 0, 1, 0)
    monkeypatch.setattr(kept_losses, "code_hash", lambda: "other code")
    assert (run(), run()) == (1, 0)
    assert len(list((tmp_path / "data" / "losses").iterdir())) == 3, "the file of other code is replaced"


def test_only_policies_of_the_registry_are_kept(tmp_path, computed):
    class Mine(LSVI):
        pass

    policies = {"lsvi": Mine(), "bc": lambda demonstrations, history: 0}
    for _ in range(2):
        compare.evaluate(SEEN, policies, dataset=DATASET, data=tmp_path / "data")
    assert len(computed) == 4 and not (tmp_path / "data" / "losses").exists()


def test_a_damaged_file_is_reported_and_computed_again(tmp_path, computed):
    def run():
        (result,) = compare.evaluate(SEEN, ["lsvi"], dataset=DATASET, data=tmp_path / "data")
        return result

    first = run()
    (path,) = (tmp_path / "data" / "losses").iterdir()
    whole = path.read_bytes()
    changed = json.loads(whole)
    changed["losses"][0]["suboptimality"] += 1
    for damaged in (json.dumps(changed).encode(), whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        (checked,) = ld.check(tmp_path / "data")
        assert [problem.what.startswith(str(path)) for problem in checked.problems] == [True]
        assert "computes it again" in checked.problems[0].repair
        assert without_speed([run()]) == without_speed([first])
        (checked,) = ld.check(tmp_path / "data")
        assert checked.problems == []
    assert len(computed) == 4


def test_the_hash_of_the_code_changes_with_a_source(tmp_path, monkeypatch):
    sources = tmp_path / "lindm" / "evaluation"
    sources.mkdir(parents=True)
    (sources / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(kept_losses, "__file__", str(sources / "kept_losses.py"))
    monkeypatch.setattr(kept_losses, "CODE", ("evaluation",))
    hashes = [kept_losses.code_hash.__wrapped__()]
    for name, text in (("a.py", "x = 2\n"), ("b.py", ""), ("notes.txt", "x")):
        (sources / name).write_text(text)
        hashes.append(kept_losses.code_hash.__wrapped__())
    assert len(set(hashes)) == 3 and hashes[2] == hashes[3]
    version = importlib.metadata.version
    for library in ("flax", "optax"):  # `layer` is trained with both
        monkeypatch.setattr(importlib.metadata, "version", lambda name, new=library: "9" if name == new else version(name))
        hashes.append(kept_losses.code_hash.__wrapped__())
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="another")])
    assert len({*hashes, kept_losses.code_hash.__wrapped__()}) == 6


def test_the_error_by_the_sample_is_that_of_independent_samples(tmp_path):
    policies = {"yard": BayesDemo(SEEN, 0.5, samples=5), "exact": ld.policies.bayes(SEEN)}
    yard, exact = compare.evaluate(SEEN, policies, dataset=DATASET, data=tmp_path / "data", posterior_seeds=4)
    seeds = {str(seed): BayesDemo(SEEN, 0.5, samples=5, seed=seed) for seed in range(4)}
    gaps = [result.gap for result in compare.evaluate(SEEN, seeds, dataset=DATASET)]
    assert len(set(gaps)) > 1 and yard.gap == gaps[0]
    assert (yard.posterior_error, yard.posterior_seeds) == (pytest.approx(np.std(gaps, ddof=1)), 4)
    assert exact.posterior_error is None and exact.posterior_seeds is None  # it has no sample


def test_the_command_keeps_losses_beside_the_tasks_of_data(tmp_path, capsys, computed):
    arguments = ["eval", "mdp", "--horizon", "2", "--tasks", "2", "--demos", "1", "--data", str(tmp_path / "tasks")]
    names = ["--policy", "lsvi", "--policy", "bayes-demo"]
    assert main([*arguments, *names, "--posterior-seeds", "2", "--out", str(tmp_path / "one")]) == 0
    assert (
        "in the median over tasks" in (out := capsys.readouterr().out) and "by the sample 0." in out and "from 2 samples" in out
    )
    before = len(computed)
    assert main([*arguments, "--policy", "bc", *names, "--posterior-seeds", "2", "--out", str(tmp_path / "two")]) == 0
    assert len(computed) == before + 1  # bc alone
    rows = [json.loads((tmp_path / name / "eval.json").read_text())["rows"] for name in ("one", "two")]
    assert [row["gaps"] for row in rows[1][1:]] == [row["gaps"] for row in rows[0]]
    assert not (tmp_path / "one" / "data").exists()
    assert [one.problems for path in ("one", "two", "tasks") for one in ld.check(tmp_path / path)] == [[], [], []]
    assert main([*arguments, "--policy", "bc", "--epsilon", "0.1", "--behavior", "epsilon"]) == 2
    assert "holds another dataset" in capsys.readouterr().err
    with pytest.raises(UsageError, match="data must be another directory than out"):
        ld.evaluate(SEEN, ["bc"], tasks=1, data=tmp_path / "new", out=tmp_path / "new")
    with pytest.raises(UsageError, match="is not empty and holds no dataset"):
        ld.evaluate(SEEN, ["bc"], tasks=1, data=tmp_path)
    with pytest.raises(UsageError, match=r"out must not be inside of data, which holds a dataset alone; got .*new/out in "):
        ld.evaluate(SEEN, ["bc"], tasks=1, data=tmp_path / "new", out=tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file must be a directory, and is a file; choose another directory"):
        ld.evaluate(SEEN, ["bc"], tasks=1, data=tmp_path / "file")


@pytest.mark.parametrize("policies", [["bc"], ["bc", "bayes"], {"exact": ld.policies.bayes(SEEN)}])
def test_posterior_seeds_are_refused_without_a_sample(policies, tmp_path):
    with pytest.raises(ValueError, match=r"posterior_seeds must be left out without a Bayes policy whose posterior .*; got 2"):
        ld.evaluate(SEEN, policies, tasks=1, posterior_seeds=2, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_property_says_which_policies_draw_a_sample():
    assert [kind(SEEN).has_sample for kind in (Bayes, BayesDemo, Thompson)] == [False, True, True]
    assert Bayes(HIDDEN).has_sample
    found = compare.evaluate(HIDDEN, {"b": Bayes(HIDDEN, samples=5)}, dataset=replace(DATASET, tasks=1))
    assert found[0].effective_samples is not None
