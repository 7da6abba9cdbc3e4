"""A model's decisions: what shared caches and batches answer is what one full reading of each text answers."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import lindm as ld
from lindm.datasets import Dataset, DatasetConfig, make_dataset
from lindm.errors import DataError, LindmError, UsageError
from lindm.evaluation.compare import evaluate, read_tasks
from lindm.evaluation.environments import double_precision, make_tasks
from lindm.evaluation.optimality_gap import evaluate_policy
from lindm.evaluation.policy import Observation
from lindm.llm import named_policies
from lindm.llm.io import weights
from lindm.llm.named_policies import PoliciesByName, check_not_trained_on
from lindm.llm.policy import LanguageModelPolicy, TextOptions, load_policy, model_directory
from lindm.llm.sft import trainer
from lindm.llm.sft.options import SFTConfig
from lindm.llm.tokens import action_tokens, load_tokenizer
from lindm.text import COMPACT, Step
from tests.lindm.llm.conftest import SUITE
from tests.lindm.llm.reading import logits_of, read_whole, tasks_of


class Recorded(LanguageModelPolicy):
    """Keeps the scores of all histories, in their order."""

    def init(self, tasks):
        self.scores = []
        return super().init(tasks)

    def _scores(self, *arguments):
        self.last = super()._scores(*arguments)
        return self.last

    def step(self, state, observation):
        state, probabilities = super().step(state, observation)
        self.scores += np.asarray(self.last[0])[state.row].tolist()
        return state, probabilities


def agree(model, tokenizer, tasks, text):
    """Both ways of reading give the same scores at the same histories, and so the same decisions."""
    whole, wanted, spelled = read_whole(logits_of(model), tokenizer, text, 2)
    policy = Recorded(model, tokenizer, text)
    losses = evaluate_policy(tasks, policy)
    assert [dataclasses.replace(loss, invalid=None) for loss in losses] == evaluate_policy(tasks, whole)
    assert len(policy.scores) == len(wanted) > 3 and np.ptp([a - b for a, b in wanted]) > 0.01, "histories must matter"
    np.testing.assert_allclose(policy.scores, wanted, atol=2e-4)
    decisions, invalid = sum(loss.decisions for loss in losses), sum(loss.invalid for loss in losses)
    assert (decisions, invalid) == (len(spelled), spelled.count(False))
    return spelled


@pytest.mark.parametrize("kind, n", [("mdp", 2), ("hidden", 3), ("ambiguous", 2)])
def test_answers_are_those_of_reading_every_text_from_its_beginning(micro, kind, n):
    tasks, text = tasks_of(getattr(micro, kind), n)
    agree(weights.load(micro.model), load_tokenizer(micro.model), tasks, text)


def test_actions_of_several_tokens_are_scored_to_their_end(micro):
    tasks, text = tasks_of(micro.mdp, 1)
    model, tokenizer = weights.load(micro.model), load_tokenizer(micro.model)
    long = dataclasses.replace(text.template, name="long", actions=(" Axy", " Axzw"))
    tokens = action_tokens(tokenizer, long, 2)
    assert min(map(len, tokens)) > 1 and len({len(t) for t in tokens}) == 2 and tokens[0][0] == tokens[1][0]
    agree(model, tokenizer, tasks, dataclasses.replace(text, template=long))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_legal_actions_are_in_the_text_and_no_other_is_chosen(micro, temperature):
    P = np.full((1, 2, 2, 2), 0.5)
    legal = np.array([[True, False], [False, True]])
    problem = ld.mdp(P, np.arange(8.0).reshape(2, 2, 2), [0.5, 0.5], legal=legal)
    demonstration = [Step(0, state=0, reward=1.0, legal=(0,)), Step(1, state=1, reward=2.0, legal=(1,))]
    tasks = make_tasks([problem], [[demonstration]])
    tokenizer = load_tokenizer(micro.model)
    policy = LanguageModelPolicy(weights.load(micro.model), tokenizer, TextOptions(), temperature=temperature)
    state = policy.init(tasks)
    assert "\n0[ A] A" in tokenizer.decode(policy.prompt(tasks[0], state.text))
    two = np.arange(2)
    observation = Observation(stage=0, task=two * 0, parent=two * 0, state=two, legal=legal)
    assert [tokenizer.decode(policy.new_tokens(observation, row, state.text)) for row in two] == ["\n0[ A]", "\n1[ B]"]
    after, probabilities = policy.step(state, observation)
    assert probabilities.tolist() == np.eye(2).tolist() and np.isneginf(after.log_p).tolist() == (~legal).tolist()
    (loss,) = evaluate_policy(tasks, policy)
    assert loss.masked == 0 and loss.suboptimality == 0
    with double_precision():
        decision = policy.act([demonstration], "0 0 1", problem)
    assert decision.action == 1 and decision.masked == 0


def test_a_state_can_be_continued_in_several_ways(micro):
    """No step changes the state that it was given."""
    (task, *_), _ = tasks_of(micro.mdp, 1)
    policy = load_policy(micro.model, temperature=1.0)
    one, zero = np.ones(1, int), np.zeros(1, int)
    first = Observation(stage=0, task=zero, parent=zero, state=zero)
    state, _ = policy.step(policy.init([task]), first)

    def following(action, reward):
        seen = {"state": one, "action": np.array([action]), "reward": np.array([reward])}
        return policy.step(state, Observation(stage=1, task=zero, parent=zero, **seen))[1]

    before = following(0, 0.5)
    other = following(1, 0.25)
    np.testing.assert_array_equal(following(0, 0.5), before)
    assert np.abs(other - before).max() > 1e-6
    history = [Step(0, state=0, reward=0.5), Step(None, state=1)]
    np.testing.assert_allclose(policy.act(task.demonstrations, history, task.known.problem).probabilities, before[0], atol=1e-6)


# --- models by directory and by name ---------------------------------------------------------------------------------------


DATASET = DatasetConfig(tasks=5, demos=2, seed=11)


@pytest.fixture(scope="module")
def run(micro, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert trainer.train(SFTConfig(model=micro.model, data=micro.mdp, out=out, steps=2, eval_tasks=0, rewards="hidden")).is_dir()
    return out


@pytest.fixture(scope="module")
def results(micro, run, tmp_path_factory):
    names = ["oracle", "random", "bc", f"base:{micro.model}", f"sft:{run}"]
    heard = []
    policies = PoliciesByName(names, SUITE, DATASET)
    actual = evaluate(SUITE, policies, dataset=DATASET, data=tmp_path_factory.mktemp("data"), on_result=heard.append)
    assert heard == actual and [result.policy for result in actual] == names
    return actual


def test_every_policy_has_a_result_of_the_same_tasks(results):
    for result in results:
        assert (result.suite, result.horizon, result.split, result.n, result.method) == ("small", 3, "id", 5, "exact")
        assert len(result.gaps) == 5 and (result.ci is None or result.ci[0] <= result.gap <= result.ci[1])
        assert result.gap == pytest.approx(sum(result.gaps) / 5) and result.decisions_per_s > 0
        assert 0 <= result.action_agreement <= 1 + 1e-9
    assert abs(results[0].gap) < 1e-12 and results[1].gap == pytest.approx(1)


def test_only_language_models_can_answer_what_is_no_action(results):
    assert [result.invalid is None for result in results] == [True, True, True, False, False]
    assert all(0 <= result.invalid <= 1 for result in results[3:])


def test_a_run_and_its_functions_give_the_same_results_by_name_and_by_directory(run, results, tmp_path):
    policy = load_policy(run)

    def function(demonstrations, history):
        return policy.act(demonstrations, history).probabilities

    actual = evaluate(SUITE, {"sft": policy, "function": function}, dataset=DATASET, data=tmp_path / "data")
    assert [result.gaps for result in actual] == [results[4].gaps] * 2
    assert actual[0].invalid == results[4].invalid and actual[1].invalid is None


def test_a_model_that_decides_greedily_is_scored_by_its_own_probabilities(micro, results, run):
    (task, *_), _ = tasks_of(micro.mdp, 1)
    (loss,) = evaluate_policy([task], load_policy(run))
    scored, warm = np.exp(loss.scored.log_p), load_policy(run, temperature=1.0)
    for state in np.flatnonzero(task.known.rho):
        p = warm.act(task.demonstrations, [Step(None, state=int(state))]).probabilities
        assert np.abs(scored - p).max(-1).min() < 1e-6, "the first decision is among the scored ones"
    greedy, deterministic = results[4].calibration, results[2].calibration
    assert not greedy.deterministic and deterministic.deterministic and greedy.temperature is not None
    assert results[3].difference.baseline == "oracle"


def test_a_model_reads_texts_as_it_was_trained(micro, run, tmp_path):
    """The run was not shown rewards, and is not shown them here."""
    make_dataset(tmp_path, SUITE, DATASET)
    (task, *_) = read_tasks(Dataset(tmp_path))
    parts = ["\n", "{state}", "{action}", ":{reward}"]
    turned = {"name": "turned", "episode": "#", "step": parts, "closing": "\n", "actions": [" B", " C", " A"], "states": "{}"}
    (tmp_path / "turned.json").write_text(json.dumps(turned))
    for directory, shown in ((micro.model, True), (run, False)):
        text = load_policy(directory).init([task]).text
        assert ("reward" in text.fields) is shown and text.template == COMPACT
        other = {"template": str(tmp_path / "turned.json"), "rewards": "hidden" if shown else "shown"}
        text = load_policy(directory, **other).init([task]).text
        assert ("reward" in text.fields) is not shown and text.template.name == "turned"


def test_a_temperature_gives_the_models_own_probabilities(micro, run):
    (task, *_), _ = tasks_of(micro.mdp, 1)
    history = [Step(None, state=0)]
    warm, cold = (load_policy(run, temperature=t).act(task.demonstrations, history).probabilities for t in (1.0, 0.0))
    assert cold.tolist() in ([1.0, 0.0], [0.0, 1.0]) and cold.argmax() == warm.argmax() and 0 < warm.min() < 0.5
    assert warm.sum() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"problem must be given: the dataset that .* was trained on is not known, or is gone"):
        load_policy(micro.model).act(task.demonstrations, history)


def test_the_error_of_a_run_that_is_not_finished_says_how_to_finish_it(run, tmp_path):
    shutil.copy(run / "config.json", tmp_path)
    with pytest.raises(DataError, match=r"the run is not finished; repeat its `lindm sft` command to finish it$"):
        model_directory(tmp_path)


def test_a_language_model_is_read_when_its_turn_comes(micro):
    policies = PoliciesByName([f"base:{micro.model}", "bc"], SUITE, DATASET)
    assert list(policies) == [f"base:{micro.model}", "bc"] and len(policies) == 2
    assert policies[f"base:{micro.model}"] is not policies[f"base:{micro.model}"]
    with pytest.raises(KeyError):
        policies["oracle"]


def test_options_of_texts_raise_an_error_without_a_language_model():
    for option, value in (("template", "readable"), ("rewards", "shown")):
        with pytest.raises(ValueError, match=f"{option} must be left out without a language model; got '{value}'"):
            PoliciesByName(["oracle", "bc"], SUITE, DATASET, **{option: value})


def test_an_invalid_value_of_rewards_raises_an_error(micro):
    with pytest.raises(ValueError, match="rewards must be one of auto, shown, hidden; got 'some'"):
        PoliciesByName(["oracle", f"base:{micro.model}"], SUITE, DATASET, rewards="some")


def test_a_task_with_too_many_histories_is_sampled(micro):
    policies = {"icl": load_policy(micro.model)}
    (result,) = evaluate(SUITE, policies, dataset=DATASET, max_histories=1, episodes=2)
    assert result.method == "rollout"


def test_texts_that_are_too_long_for_the_model_are_refused(micro):
    dataset = DatasetConfig(tasks=1, demos=30, seed=4)
    with pytest.raises(
        LindmError, match=r"policy base:.*: texts must have at most the 256 tokens of the model; the longest has about \d+"
    ) as e:
        evaluate(SUITE, PoliciesByName([f"base:{micro.model}"], SUITE, dataset), dataset=dataset)
    assert isinstance(e.value, DataError)


def test_a_history_that_outgrows_the_context_is_refused_where_it_does(micro):
    (task, *_), _ = tasks_of(micro.mdp, 1)
    policy, zero = load_policy(micro.model, name="small"), np.zeros(1, int)
    state = policy.init([task])
    policy.max_length = int(state.shared[1][0])  # the demonstrations fit, and not one token more
    with pytest.raises(
        DataError, match=r"small: demonstrations and history must have at most the \d+ tokens of the model's context; got"
    ):
        policy.step(state, Observation(stage=0, task=zero, parent=zero, state=zero))


def test_tasks_that_a_run_was_trained_on_are_refused(run):
    with pytest.raises(LindmError, match=r"seed must not be 0: .* was trained on these tasks") as e:
        PoliciesByName([f"sft:{run}"], SUITE, DatasetConfig(tasks=5, demos=2))
    assert isinstance(e.value, UsageError)


def test_the_demonstrations_of_one_problem_that_a_run_was_trained_on_are_refused(micro):
    """Of one problem the seed draws the demonstrations alone: the same problem and seed give those of the training."""
    trained = Dataset(micro.hidden)
    with double_precision():
        problem = trained.problems()[0]
        changed = jax.tree.map(lambda x: x * 2, problem)
    with patched_run(trained):
        with pytest.raises(UsageError, match="seed must not be 0: run was trained on these tasks"):
            check_not_trained_on(Path("run"), problem, DatasetConfig(tasks=5, demos=2))
        check_not_trained_on(Path("run"), problem, DatasetConfig(tasks=5, demos=2, seed=1))
        check_not_trained_on(Path("run"), changed, DatasetConfig(tasks=5, demos=2))


@contextlib.contextmanager
def patched_run(trained):
    """A run that was trained on this data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(named_policies, "run_options", lambda run: {"data": str(trained.directory)})
        yield
