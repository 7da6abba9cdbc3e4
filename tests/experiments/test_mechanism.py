"""Probes, implied Q and names: each part against another route, and what follows from the records."""

import copy
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lindm.datasets import DatasetConfig
from lindm.evaluation.environments import make_tasks
from lindm.evaluation.policy import Observation
from lindm.families.random_suites import draw_task
from lindm.llm.policy import LanguageModelPolicy, TextOptions
from lindm.problems import cassandra, cassandra_problems
from lindm.text import COMPACT, Document, Step
from lindm_experiments import mechanism
from lindm_experiments.harness.claims import FAIL, PASS, claim_ids
from lindm_experiments.lib import language_models, probes
from lindm_experiments.lib.probes import Queries
from lindm_experiments.mechanism import SMOKE
from tests.experiments.conftest import smoke_records

TIGER = Path(__file__).parents[1] / "lindm/problems/files/tiger.pomdp"


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return smoke_records(mechanism)


@pytest.mark.slow
def test_a_record_holds_every_part(records):
    mdp, tiger = records
    assert mdp["probes"].keys() == {"q", "advantage"} and tiger["probes"].keys() == {"q", "advantage", "belief"}
    for record in records:
        for result in record["probes"].values():
            assert result.keys() == {"before", "after", "shuffled"}
            for one in result.values():
                assert len(one["profile"]) == 5  # four layers, and the embeddings
                assert len(one["errors"]) == SMOKE.tasks
                assert one["profile"][one["layer"]] == pytest.approx(np.mean(one["errors"]), abs=1e-4)
    assert mdp["implied"]["with_q"].keys() == {"ridge", "layer", "before", "after"}
    assert mdp["implied"]["decisions"] == SMOKE.tasks * SMOKE.mdp
    assert "implied" not in tiger
    assert all(0 <= share <= 1 for shares in mdp["same"].values() for share in shares)


def test_the_tiger_is_the_tiger_of_the_file():
    ours, file = mechanism.tiger(4), cassandra_problems.to_pomdp(cassandra.read(TIGER), 4, 1.0)
    for name in ("P", "O", "rho"):
        np.testing.assert_allclose(getattr(ours, name), getattr(file, name))
    np.testing.assert_allclose(ours.r, file.r)


def test_a_belief_is_the_conditional_law_over_all_paths():
    problem = mechanism.tiger(4)
    P, O, rho = problem.P[0], problem.O[0], problem.rho
    row = SimpleNamespace(action=[0, 0, 1, 0], observation=[1, 1, 0, 1])
    for t, belief in enumerate(mechanism.beliefs(problem, [row])[0]):
        mass = np.zeros(2)
        for path in product(range(2), repeat=t + 1):
            p = rho[path[0]]
            for i in range(t):
                a, o = row.action[i], row.observation[i]
                p *= P[path[i], a, path[i + 1]] * O[a, path[i + 1], o]
            mass[path[-1]] += p
        np.testing.assert_allclose(belief, mass / mass.sum(), rtol=1e-12)


# --- probes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 400])
def test_a_ridge_regression_is_the_minimiser_of_its_own_cost(width):
    """More episodes than features, and fewer: least squares with the penalty as rows of its own."""
    rng = np.random.default_rng(width)
    X, Y = rng.normal(size=(20, 4, width)), rng.normal(size=(20, 4, 2))
    x, y = X - X.mean(0), Y - Y.mean(0)
    flat = x.reshape(-1, width) / x.reshape(-1, width).std(0)
    W = np.linalg.lstsq(np.concatenate([flat, np.sqrt(7.0) * np.eye(width)]), np.pad(y.reshape(-1, 2), ((0, width), (0, 0))))[0]
    fitted = Y.mean(0) + (flat @ W).reshape(Y.shape)
    np.testing.assert_allclose(probes.Ridge(X, X).errors(Y, Y, 7.0), ((fitted - Y) ** 2).sum((1, 2)), rtol=1e-6)


def test_a_probe_finds_what_is_there_in_the_layer_where_it_is():
    rng = np.random.default_rng(0)
    X, X_new = rng.normal(size=(80, 3, 4, 10)), rng.normal(size=(40, 3, 4, 10))
    W, stage = rng.normal(size=(10, 2)), np.array([5.0, 50.0, 500.0])[:, None]
    Y, Y_new = (x[:, :, 2] @ W + stage for x in (X, X_new))
    result = probes.probe(X, X_new, {"it": (Y, Y_new), "none": (rng.normal(size=Y.shape), Y_new - stage)})
    assert min(result["none"]["profile"]) > 0.9
    result = result["it"]
    assert result["layer"] == 2
    assert result["profile"][2] < 0.01 and min(result["profile"][i] for i in (0, 1, 3)) > 0.7
    assert len(result["errors"]) == 40
    of_mean = ((Y_new - Y.mean(0)) ** 2).sum((1, 2))
    np.testing.assert_allclose(result["of_mean"], of_mean / of_mean.mean(), atol=1e-5)


def test_differences_between_stages_do_not_count():
    rng = np.random.default_rng(1)
    X, X_new = np.ones((60, 3, 1, 4)), np.ones((30, 3, 1, 4))
    X, X_new = X + np.arange(3)[:, None, None], X_new + np.arange(3)[:, None, None]  # reveals the stage only
    Y, Y_new = (10.0 * np.arange(3)[:, None] + rng.normal(size=(n, 3, 2)) for n in (60, 30))
    assert probes.probe(X, X_new, {"it": (Y, Y_new)})["it"]["profile"][0] == pytest.approx(1, abs=1e-6)


def test_a_probe_with_more_features_than_tasks_is_shrunk_until_it_does_no_harm():
    rng = np.random.default_rng(2)
    X, X_new = rng.normal(size=(40, 1, 1, 60)), rng.normal(size=(400, 1, 1, 60))
    Y, Y_new = rng.normal(size=(40, 1, 1)), rng.normal(size=(400, 1, 1))
    assert probes.Ridge(X[:, :, 0], X_new[:, :, 0]).errors(Y, Y_new, 1.0).mean() > 2  # the least penalty
    assert probes.probe(X, X_new, {"it": (Y, Y_new)})["it"]["profile"][0] < 1.1


# --- reading ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model after a few steps, and query episodes of the suite mdp."""
    room = tmp_path_factory.mktemp("mechanism")
    with language_models.quiet_single_precision():
        data = language_models.make_data(
            room / "data", language_models.suite_at_horizon("mdp", 3), DatasetConfig(tasks=12, demos=2, seed=4)
        )
        run = language_models.fine_tune(
            language_models.sft_config(language_models.TINY, data, room / "run", steps=4, batch=8, learning_rate=3e-3)
        )
    return probes.ProbedModel.load(run / "model"), probes.read_queries(data, frozenset({"state", "reward"}))


@pytest.mark.slow
def test_the_last_stream_gives_the_logits_of_the_model(trained):
    reader, _ = trained
    model = nnx.merge(reader.graphdef, reader.weights)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 9)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    stream = model.hidden_states(ids, positions)
    assert stream.shape == (5, 2, 9, 160)
    np.testing.assert_allclose(model.norm(stream[-1]), model.last_hidden_state(ids, positions), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stream[0], model.embedding[...][ids], rtol=1e-6)


@pytest.mark.slow
def test_the_logits_decide_as_the_policy_that_is_evaluated(trained):
    """`lindm eval` reads with a cache, history by history; here whole documents are read at once."""
    reader, queries = trained
    logits = reader.logits(reader.stream(queries))
    policy = LanguageModelPolicy(nnx.merge(reader.graphdef, reader.weights), reader.tokenizer, TextOptions(COMPACT))
    problem = draw_task(jax.random.key(0), language_models.suite_at_horizon("mdp", 3))  # of the same sizes
    tasks = make_tasks([problem] * len(queries.documents), [one.demonstrations for one in queries.documents])
    state, rows = policy.init(tasks), np.arange(len(tasks))
    for stage in range(3):
        seen = {"state": np.array([one.query[stage].state for one in queries.documents])}
        if stage:
            seen |= {k: np.array([getattr(one.query[stage - 1], k) for one in queries.documents]) for k in ("action", "reward")}
        state, probabilities = policy.step(state, Observation(stage=stage, task=rows, parent=rows, **seen))
        assert (probabilities.argmax(-1) == logits[:, stage].argmax(-1)).all()


@pytest.mark.slow
def test_the_same_names_give_the_same_decisions_and_others_are_undone(trained):
    reader, queries = trained
    logits = reader.logits(reader.stream(queries))

    class Same:
        def permutation(self, n):
            return np.arange(n)

    class Reversed:
        def permutation(self, n):
            return np.arange(n)[::-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: Same())
        assert mechanism.same_decisions(reader, logits, queries, 1, 0) == [1.0] * 12

    class Blind:
        """Decides by the index of the action alone: what it does under other names is another action."""

        def stream(self, queries):
            return queries

        def logits(self, queries):
            return np.broadcast_to([0.0, 0.0, 1.0], queries.Q.shape)

    blind: probes.ProbedModel = Blind()  # pyright: ignore
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: Reversed())
        assert mechanism.same_decisions(blind, np.asarray(Blind().logits(queries)), queries, 1, 0) == [0.0] * 12

    class Turned:
        def permutation(self, n):
            return np.roll(np.arange(n), 1)

    class Copying:
        """Takes the first action that was demonstrated, by whatever name."""

        def stream(self, queries):
            return np.array([one.demonstrations[0][0].action for one in queries.documents])

        def logits(self, stream):
            return np.broadcast_to(np.eye(3)[stream][:, None], queries.Q.shape)

    copying: probes.ProbedModel = Copying()  # pyright: ignore
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: Turned())
        assert mechanism.same_decisions(copying, copying.logits(copying.stream(queries)), queries, 1, 0) == [1.0] * 12


def test_renaming_changes_every_name_in_demonstrations_and_query():
    steps = (Step(0, state=1, reward=0.5), Step(2, state=0, reward=0.25))
    result = mechanism._rename(Document((steps,), steps[:1]), np.array([2, 0, 1]), np.array([1, 2, 0]))
    assert result == Document(((Step(1, state=0, reward=0.5), Step(0, state=2, reward=0.25)),), (Step(1, state=0, reward=0.5),))


@pytest.mark.slow
def test_logits_that_are_q_have_no_mistakes(trained, tmp_path):
    with language_models.quiet_single_precision():
        data_config = DatasetConfig(tasks=10, demos=2, seed=9)
        source = language_models.suite_at_horizon("mdp", 3)
        data = language_models.make_data(tmp_path / "data", source, data_config)
        queries = probes.read_queries(data, frozenset({"state", "reward"}))
        logits = {"before": -queries.Q, "after": 3 * queries.Q + 7}
        result = mechanism.implied(logits, queries, data, source, data_config)
    assert result["with_q"]["after"] == pytest.approx([1] * 10) and result["with_q"]["before"] == pytest.approx([-1] * 10)
    assert result["mistakes"]["after"] == 0 and result["mistakes"]["before"] == 30
    assert all(-1 <= v <= 1 for v in result["with_q"]["layer"]) and np.mean(result["with_q"]["ridge"]) > 0.3
    assert result["shared"]["before"]["ridge"][0] == result["mistakes"]["ridge"]


# --- what follows ---------------------------------------------------------------------------------------------------------


def made(records: list[dict], **values: float) -> list[dict]:
    """The records with 60 tasks and the given means; `world_target_who` of errors, or the name of another value."""
    rng, result = np.random.default_rng(0), copy.deepcopy(records)
    mdp, tiger = result
    for record in result:
        for target, readers in record["probes"].items():
            for model, one in readers.items():
                mean = {"before": 0.8, "after": 0.4, "shuffled": 1.1}[model]
                mean = values.get(f"{record['point']['problem']}_{target}_{model}", mean)
                # tasks differ, by far more than what is read of exchanged targets
                of_mean = rng.uniform(0, 2, 60) if model == "shuffled" else np.ones(60)
                one["errors"], one["of_mean"] = list(of_mean + mean - 1 + rng.normal(0, 0.02, 60)), list(of_mean)
    for name, mean in {"ridge": 0.5, "layer": 0.5, "before": 0.1, "after": values.get("with_q", 0.8)}.items():
        mdp["implied"]["with_q"][name] = list(mean + rng.normal(0, 0.02, 60))
    for name, mean in {"ridge": 0.2, "layer": values.get("layer", 0.5)}.items():
        mdp["implied"]["mistakes_with"]["after"][name] = list(mean + rng.normal(0, 0.02, 60))
    for name, mean in {"before": 0.5, "after": values.get("same", 0.95)}.items():
        mdp["same"][name] = list(mean + rng.normal(0, 0.01, 60))
    return [mdp, tiger]


def verdicts(records: list[dict]) -> dict[str, str]:
    return {v.id: v.verdict for v in mechanism.check(records)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "values, fails",
    [
        ({}, set()),
        ({"mdp_advantage_after": 0.9}, {"probe"}),
        ({"mdp_q_after": 0.9}, {"probe/q"}),
        ({"tiger_belief_after": 0.7}, {"probe/belief"}),
        ({"tiger_belief_shuffled": 0.7}, {"probe/control"}),
        ({"with_q": 0.3}, {"implied-q"}),
        ({"layer": 0.1}, {"implied-q/mistakes"}),
        ({"same": 0.8}, {"invariance"}),
        ({"same": 0.4}, {"invariance", "invariance/gain"}),
    ],
)
def test_the_verdicts_follow_the_numbers(records, values, fails):
    result = verdicts(made(records, **values))
    assert result == {id: FAIL if id in fails else PASS for id in claim_ids("mechanism")}


@pytest.mark.slow
def test_figures_are_drawn(records):
    assert mechanism.plot(records).keys() == {"probe", "implied-q"}


@pytest.mark.slow
def test_a_model_that_writes_an_action_in_several_tokens_is_refused(trained, monkeypatch):
    reader, queries = trained
    monkeypatch.setattr(probes, "action_tokens", lambda *a: ((1, 2), (3,), (4,)))
    with pytest.raises(ValueError, match="model must have a token for each action"):
        reader.stream(Queries(queries.documents[:1], queries.labels[:1], queries.Q[:1], queries.rows[:1]))
