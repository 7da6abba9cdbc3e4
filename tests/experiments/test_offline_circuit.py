"""The circuit: what is probed against another route, the models of a run, and verdicts on records whose answer is known."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from lindm.datasets import Dataset
from lindm.evaluation.compare import read_tasks
from lindm.evaluation.policies.bayes_policies import Bayes, BayesDemo
from lindm.llm.io import weights
from lindm.llm.sft import setup, trainer
from lindm_experiments import offline_circuit
from lindm_experiments.harness.claims import FAIL, INCONCLUSIVE, PASS, claim_ids
from lindm_experiments.lib import language_models
from lindm_experiments.lib.offline_cells import CELLS
from lindm_experiments.lib.probes import read_queries
from lindm_experiments.offline_circuit import Config
from tests.experiments.conftest import smoke_records

BASE, BANDIT = CELLS["base"], CELLS["bandit"]
SHOWN = frozenset({"state", "reward"})

# --- what is probed ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    """A few tasks of the base cell, their queries, and the quantities at these."""
    data = language_models.make_data(tmp_path_factory.mktemp("data") / "d", BASE.source, BASE.dataset(4, 7))
    queries = read_queries(data, SHOWN)
    return read_tasks(Dataset(data)), queries, offline_circuit.posterior_targets(BASE, data, queries, seed=5)


def counted(task, row, stage):
    """Posterior means of the current state's rewards [A] and transitions [A, S] from counts in demonstrations and query."""
    S, A, now = 5, 3, row.state[stage]
    rewards, counts = np.full(A, 0.5), np.full((A, S), 0.5)  # the mean of 0, .05, ..., 1; the law of the rows
    episodes = [[(s.state, s.action, s.reward) for s in steps] for steps in task.demonstrations]
    episodes.append([(row.state[t], row.action[t], row.reward[t]) for t in range(stage)] + [(now, None, None)])
    for steps in episodes:
        for t, (s, a, r) in enumerate(steps):
            if s == now and a is not None:
                rewards[a] = r
                if t + 1 < len(steps):
                    counts[a, steps[t + 1][0]] += 1
    return rewards, counts / counts.sum(-1, keepdims=True)


def test_posterior_means_are_those_of_counts(queries):
    tasks, found, targets = queries
    assert {name: x.shape for name, x in targets.items()} == {
        "rewards": (4, 4, 3),
        "transitions": (4, 3, 15),
        "q": (4, 4, 3),
        "future": (4, 3, 3),
    }
    for i, (task, row) in enumerate(zip(tasks, found.rows, strict=True)):
        for stage in range(4):
            rewards, transitions = counted(task, row, stage)
            np.testing.assert_allclose(targets["rewards"][i, stage], rewards, atol=1e-12)
            if stage < 3:
                np.testing.assert_allclose(targets["transitions"][i, stage], transitions.ravel(), atol=1e-12)


def test_action_values_are_those_of_a_policy_that_is_asked_for_one_decision(queries):
    tasks, found, targets = queries
    for i, stage in ((0, 0), (1, 2), (3, 3)):
        history = found.rows[i].steps(SHOWN)[: stage + 1]
        words = [{"state": s.state, "action": s.action, "reward": s.reward} for s in history[:-1]] + [
            {"state": history[-1].state}
        ]
        known = tasks[i].known.problem
        Q, mean = (
            policy.act(tasks[i].demonstrations, words, known).Q
            for policy in (BayesDemo(BASE.source, BASE.epsilon, seed=5), Bayes(BASE.source))
        )
        np.testing.assert_allclose(targets["q"][i, stage], Q - Q.mean(), atol=1e-9)
        if stage < 3:
            future = mean - targets["rewards"][i, stage]
            np.testing.assert_allclose(targets["future"][i, stage], future - future.mean(), atol=1e-9)


def test_a_bandit_has_nothing_to_plan(tmp_path):
    data = language_models.make_data(tmp_path / "d", BANDIT.source, BANDIT.dataset(3, 1))
    targets = offline_circuit.posterior_targets(BANDIT, data, read_queries(data, SHOWN), seed=0)
    assert targets.keys() == {"rewards", "q"}


def test_probes_read_what_is_there_and_not_what_is_of_another_task():
    rng = np.random.default_rng(0)
    X, X_new = rng.normal(size=(120, 4, 3, 8)), rng.normal(size=(60, 4, 3, 8))
    W = rng.normal(size=(8, 2))
    known, new = ({"q": x[:, :, 1] @ W, "future": x[:, :3, 2] @ W} for x in (X, X_new))
    found = offline_circuit.probes(X, X_new, known, new, seed=1)
    for name, layer in (("q", 1), ("future", 2)):
        assert found[name]["layer"] == layer and found[name]["r2"][layer] > 0.99
        assert max(found[name]["r2"][k] for k in range(3) if k != layer) < 0.2
        assert max(map(abs, found[name]["shuffled"])) < 0.1


# --- one training --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_models_of_a_run_go_from_its_random_weights_to_its_result(tmp_path):
    cfg = Config(cell="bandit", steps=5, checkpoints=3, batch=8, gap_tasks=2)
    with language_models.quiet_single_precision():
        data = {
            k: language_models.make_data(tmp_path / k, BANDIT.source, BANDIT.dataset(40, i))
            for i, k in enumerate(("train", "new"))
        }
        config = offline_circuit.training_config(cfg, BANDIT, data, tmp_path / "run", 3)
        trainer.train(config, save_on_stop=False)
        models = {step: nnx.state(model) for step, model in language_models.models_of_run(config)}
        assert list(models) == [0, 2, 4, 5] == list(offline_circuit.read_evaluations(config.out))
        ends = {0: setup.build_model(setup.setup_training(config)), 5: weights.load(config.out / trainer.MODEL, mesh=_mesh())}
        for step, model in ends.items():
            jax.tree.map(np.testing.assert_array_equal, models[step], nnx.state(model))
        for a, b in ((0, 2), (2, 4), (4, 5)):
            assert not np.array_equal(*(jax.tree.leaves(models[k])[0] for k in (a, b)))


def _mesh():
    return language_models.make_mesh({"fsdp": 1}, jax.devices()[:1])


@pytest.mark.slow
def test_a_record_of_a_small_run_has_every_quantity_at_every_step():
    (record,) = smoke_records(offline_circuit)
    assert [step["sequences"] for step in record["steps"]] == [0, 8, 16]
    for step in record["steps"]:
        assert step["probes"].keys() == set(offline_circuit.QUANTITIES)
        assert all(len(p["r2"]) == len(p["shuffled"]) == 5 and p["layer"] in range(5) for p in step["probes"].values())
    assert {v.id for v in offline_circuit.check([record])} == set(claim_ids("offline_circuit"))


# --- what follows --------------------------------------------------------------------------------------------------------------

GAPS = (1.0, 1.0, 0.6, 0.35, 0.1, 0.05)  # of six evaluations; the majority has .3
CURVES = {
    "rewards": (0.05, 0.3, 0.5, 0.6, 0.7, 0.7),
    "transitions": (0.0, 0.1, 0.2, 0.3, 0.4, 0.4),
    "q": (0.02, 0.1, 0.2, 0.3, 0.7, 0.8),
    "future": (0.0, 0.0, 0.05, 0.1, 0.4, 0.5),
}


def synthetic(seeds=3, gaps=GAPS, **other):
    """Records in which all claims hold: R² of each quantity in layer 1, nothing in layer 0, and targets of other tasks are not
    read."""
    made = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        steps = []
        for i, gap in enumerate(gaps):
            probes = {
                name: {
                    "layer": 1,
                    "r2": [0.0, float(curve[i] + 0.01 * rng.normal())],
                    "shuffled": [0.0, float(-0.01 + 0.01 * rng.normal())],
                }
                for name, curve in (CURVES | other).items()
            }
            steps.append({"sequences": 1000 * i, "loss": 1.0, "gap": gap, "probes": probes})
        made.append({"point": {"seed": seed}, "majority": 0.3, "steps": steps})
    return json.loads(json.dumps(made))


def verdicts(records):
    return {v.id: v.verdict for v in offline_circuit.check(records)}


def test_records_in_which_every_claim_holds_pass():
    found = {v.id: v for v in offline_circuit.check(synthetic())}
    assert {id: v.verdict for id, v in found.items()} == dict.fromkeys(claim_ids("offline_circuit"), PASS)
    assert found["offline/circuit"].measured == pytest.approx(0.5, abs=0.02)  # .8 at the end, .3 at the last gap above .3
    assert found["offline/circuit-rewards"].measured == pytest.approx(0.6 - 0.35, abs=0.02)
    assert "3,000 / 3,000 / 3,000 sequences" in found["offline/circuit"].note


@pytest.mark.parametrize(
    "name, curve, refuted",
    [
        ("q", (0.02, 0.1, 0.5, 0.75, 0.8, 0.8), {"offline/circuit"}),
        ("q", (0.4, 0.4, 0.4, 0.4, 0.7, 0.8), {"offline/circuit-untrained"}),
        ("future", (0.0, 0.1, 0.3, 0.45, 0.5, 0.5), {"offline/circuit-future"}),
        ("rewards", (0.0, 0.0, 0.1, 0.2, 0.6, 0.7), {"offline/circuit-rewards"}),
        ("transitions", (0.0, 0.0, 0.0, 0.1, 0.4, 0.4), {"offline/circuit-transitions"}),
        ("transitions", (0.03,) * 6, {"offline/circuit-transitions"}),  # nothing is read, neither before nor after
    ],
)
def test_curves_against_a_claim_refute_it_and_no_other(name, curve, refuted):
    found = verdicts(synthetic(**{name: curve}))
    assert found == {id: FAIL if id in refuted else PASS for id in claim_ids("offline_circuit")}


def test_a_rise_that_targets_of_other_tasks_share_does_not_count():
    records = synthetic()
    for step in (s for r in records for s in r["steps"]):
        step["probes"]["q"]["shuffled"] = step["probes"]["q"]["r2"]
    assert verdicts(records)["offline/circuit"] == FAIL


def test_a_training_that_does_not_jump_is_left_out_and_said_to_be():
    records = synthetic(seeds=4)
    records[0]["steps"][-1]["gap"] = 0.4
    found = {v.id: v for v in offline_circuit.check(records)}
    assert found["offline/circuit"].verdict == PASS and "3 of 4 trainings jumped" in found["offline/circuit"].note
    assert verdicts(synthetic(gaps=(1.0,) * 6))["offline/circuit"] == INCONCLUSIVE


def test_a_gap_that_rises_once_more_is_before_the_jump():
    (record,) = synthetic(1, gaps=(1.0, 0.2, 0.5, 0.1, 0.1, 0.1))
    assert offline_circuit.before_jump(record) == 2
    assert offline_circuit.before_jump(record | {"majority": 2.0}) == 0


def test_a_bandit_decides_the_claims_that_it_can():
    records = synthetic()
    for step in (s for r in records for s in r["steps"]):
        del step["probes"]["future"], step["probes"]["transitions"]
    undecided = {id for id, verdict in verdicts(records).items() if verdict == INCONCLUSIVE}
    assert undecided == {"offline/circuit-future", "offline/circuit-transitions"}


def test_the_table_has_the_mean_of_every_layer_and_its_interval():
    records = synthetic()
    rows = offline_circuit.table(records)
    assert len(rows) == 6 * 4 * 2
    row = next(r for r in rows if (r["sequences"], r["quantity"], r["layer"]) == (5000, "q", 1))
    r2 = [r["steps"][5]["probes"]["q"]["r2"][1] for r in records]
    half = 4.302653 * np.std(r2, ddof=1) / np.sqrt(3)  # Student t with two degrees of freedom
    assert (row["r2"], row["r2_low"], row["r2_high"]) == pytest.approx((np.mean(r2), np.mean(r2) - half, np.mean(r2) + half))
    assert row["chosen"] == 3 and row["gap"] == pytest.approx(0.05)
    assert offline_circuit.table(synthetic(1))[0]["r2_low"] is None


def test_figures_are_drawn_from_trainings_with_and_without_a_jump():
    for records in (synthetic(), synthetic(gaps=(1.0,) * 6), synthetic(1)):
        assert offline_circuit.plot(records).keys() == {"circuit", "layers"}


@pytest.mark.parametrize(
    "options, error",
    [
        ({"cell": "names"}, "cell must be base or bandit; got 'names'"),
        ({"checkpoints": 17, "steps": 16}, "checkpoints must be at most the 16 steps; got 17"),
        ({"probe": 4}, "probe"),
        ({"rate": -1.0}, "rate must be positive"),
    ],
)
def test_a_bad_option_is_refused_by_name(options, error):
    with pytest.raises(ValueError, match=error):
        Config(**options)
