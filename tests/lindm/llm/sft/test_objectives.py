"""Losses that use the oracle's action values, against plain numpy, and what a model learns from them."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm import datasets
from lindm.datasets import DatasetConfig
from lindm.errors import DataError
from lindm.llm.sft import loss, trainer
from lindm.llm.sft.loss import ComputeConfig, Objective, lm_loss
from lindm.llm.sft.metrics import read_metrics
from lindm.llm.sft.options import SFTConfig
from lindm.llm.sft.packing import batch_shape, make_batch
from lindm.llm.sft.setup import setup_training
from lindm.llm.tokens import Example, action_tokens, document_example
from lindm.text import COMPACT, Document, Step, render
from tests.lindm.datasets.conftest import fixed_mdp
from tests.lindm.llm import tiny
from tests.lindm.llm.reading import logits_of
from tests.lindm.llm.small import byte_level

ACTIONS, TAU = (7, 20, 3), 0.25


def rows(seed: int = 0) -> list[list[Example]]:
    """Two documents a row, with labels and action values at random places; one action is not legal at one of them."""
    rng = np.random.default_rng(seed)

    def example(n: int, labels: int) -> Example:
        target = np.full(n, -1, np.int32)
        target[np.sort(rng.permutation(n - 1)[:labels])] = rng.choice(ACTIONS, labels)
        values = rng.normal(size=(labels, len(ACTIONS))).astype(np.float32)
        return Example(rng.integers(0, 64, n).astype(np.int32), target, "here", action_values=values)

    made = [[example(9, 3), example(6, 2)], [example(12, 1), example(5, 4)]]
    values = made[1][0].action_values
    assert values is not None
    values[0, 1] = -np.inf
    return made


def expected(kind: str, model, rows) -> float:
    total = 0.0
    logits = logits_of(model)
    for example in (example for row in rows for example in row):
        assert example.action_values is not None
        table = np.asarray(logits(example.ids.tolist()), float)
        for place, values in zip(np.flatnonzero(example.target >= 0), example.action_values.astype(float), strict=True):
            at = table[place]
            p = np.exp(at - at.max()) / np.exp(at - at.max()).sum()
            legal = [a for a in range(len(ACTIONS)) if np.isfinite(values[a])]
            if kind == "soft":
                weights = np.array([np.exp((values[a] - values.max()) / TAU) for a in legal])
                total -= sum(w * np.log(p[ACTIONS[a]]) for w, a in zip(weights / weights.sum(), legal, strict=True))
            else:
                share = np.array([p[ACTIONS[a]] for a in legal])
                total += sum(q * (values.max() - values[a]) for q, a in zip(share / share.sum(), legal, strict=True))
    return total


@pytest.mark.parametrize("kind", ["soft", "regret"])
@pytest.mark.parametrize("chunk", [256, 2])
def test_a_loss_of_action_values_equals_plain_numpy(kind, chunk, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_CHUNK", chunk)
    model, data = tiny.decoder(), rows()
    batch = make_batch(data, *batch_shape(data))
    assert batch.action_values is not None
    assert batch.action_values.shape == (2, 8, 3) and (batch.action_values[0, 5:] == 0).all()
    value, correct = lm_loss(model, batch, ComputeConfig(), objective=Objective(loss=kind, actions=ACTIONS, temperature=TAU))
    assert float(value) == pytest.approx(expected(kind, model, data), rel=1e-5)
    assert float(correct) == float(lm_loss(model, batch, ComputeConfig())[1])


@pytest.mark.parametrize("kind", ["soft", "regret"])
@pytest.mark.parametrize("legal", [[0, 1, 2], [0, 2]], ids=["all-legal", "one-illegal"])
def test_the_gradient_of_the_logits_is_the_difference_to_what_is_wanted(kind, legal):
    """soft: p - w; regret: p_a (regret of a - expected regret), among the legal actions alone."""
    rng = np.random.default_rng(2)
    logits, values = rng.normal(size=30), np.where(np.isin([0, 1, 2], legal), rng.normal(size=3), -np.inf)
    objective = Objective(loss=kind, actions=ACTIONS, temperature=TAU)
    compute = loss._position_loss(objective)
    gradient = jax.grad(lambda x: compute(x, jnp.int32(0), jnp.asarray(values, jnp.float32)))(jnp.asarray(logits, jnp.float32))
    wanted = np.zeros(30)
    if kind == "soft":
        weights = np.exp(values / TAU) / np.exp(values / TAU).sum()
        wanted = np.exp(logits) / np.exp(logits).sum()
        wanted[list(ACTIONS)] -= weights
    else:
        tokens = [ACTIONS[a] for a in legal]
        share = np.exp(logits[tokens]) / np.exp(logits[tokens]).sum()
        regrets = (values.max() - values)[legal]
        wanted[tokens] = share * (regrets - share @ regrets)
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)


def test_an_action_that_is_not_legal_has_the_value_minus_infinity():
    tokenizer, state = byte_level(), Step(action=0, state=1)
    pieces = render(Document((), (state,)), COMPACT)
    actions = action_tokens(tokenizer, COMPACT, 3)
    example = document_example(tokenizer, pieces, [[0]], actions, "all", "here", 0, [[[0.5, None, 0.25]]])
    assert example.action_values is not None and example.action_values.tolist() == [[0.5, -np.inf, 0.25]]


def options(micro, out, **changes) -> SFTConfig:
    settings = {
        "model": micro.model,
        "data": micro.mdp,
        "out": out,
        "steps": 40,
        "batch": 8,
        "learning_rate": 3e-3,
        "eval_every": 40,
    }
    return SFTConfig(**settings | changes)


def test_examples_have_the_values_of_their_steps(micro, tmp_path):
    setup = setup_training(options(micro, tmp_path / "out", loss="soft"))
    assert setup.objective.loss == "soft" and len(setup.objective.actions) == 2
    for example in (example for row in setup.train_rows for example in row):
        assert example.action_values is not None
        targets = example.target[example.target >= 0]
        best = [setup.objective.actions[values.argmax()] for values in example.action_values]
        assert targets.tolist() == best  # here each label is exact


@pytest.fixture(scope="module")
def one_problem(tmp_path_factory):
    """Tasks of one MDP: the right action is a function of the stage and the state, which a small model learns in a minute."""
    out = tmp_path_factory.mktemp("one") / "data"
    datasets.make_dataset(out, fixed_mdp(), DatasetConfig(tasks=40, demos=2, queries=1, query_epsilon=0.5))
    return out


def test_behavior_cloning_is_the_cross_entropy_of_another_label():
    logits, target = np.random.default_rng(0).normal(size=(4, 9)), np.array([3, 0, 8, 1])
    wanted = np.log(np.exp(logits).sum(-1)) - logits[np.arange(4), target]
    np.testing.assert_allclose(loss._position_loss(Objective(loss="behavior"))(logits, target, None), wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["action", "soft", "regret"])
def test_a_model_learns_to_decide_from_each_loss(one_problem, tmp_path, kind):
    options = SFTConfig(preset="tiny", data=one_problem, out=tmp_path / "out", loss=kind, steps=60, batch=8, eval_every=60)
    trainer.train(options)
    evaluations = [r for r in read_metrics(tmp_path / "out") if r["kind"] == "eval"]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] and evaluations[-1]["gap"] < 0.05 < evaluations[0]["gap"]


def test_options_that_do_not_fit_raise_errors(micro, tmp_path):
    with pytest.raises(ValueError, match="loss_temperature must be above 0; got 0"):
        options(micro, tmp_path, loss_temperature=0.0)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "x", "completion": " A"}\n')
    with pytest.raises(ValueError, match=r"loss must be left out for rows"):
        setup_training(options(micro, tmp_path / "out", data=data, loss="regret"))
    several = {"name": "long", "step": ["|", "{state}", "{action}"], "closing": "\n", "states": "{}", "actions": ["AB", "BA"]}
    template = tmp_path / "long.json"
    template.write_text(json.dumps(several))
    with pytest.raises(DataError, match=r"needs actions of one token each; .* one has 2: use --template"):
        setup_training(replace(options(micro, tmp_path / "out", loss="soft"), template=str(template)))
