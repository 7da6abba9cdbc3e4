"""Tasks that are drawn as a run reads them: the same tasks, batches and weights as from the directory that has them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lindm as ld
from lindm import datasets
from lindm.cli.data import COMMANDS, words_of_tasks
from lindm.cli.option_parser import parse
from lindm.errors import DataError, UsageError
from lindm.evaluation.environments import double_precision
from lindm.io import files
from lindm.llm.named_policies import PoliciesByName, training_notes
from lindm.llm.sft import metrics, trainer
from lindm.llm.sft.drawn_tasks import DrawnTasks
from lindm.llm.sft.options import SFTConfig
from lindm.llm.sft.setup import setup_training
from tests.lindm.datasets.conftest import SUITE, config, fixed_mdp

WORDS = "mdp --horizon 2 --states 3 --actions 2 --tasks 12 --demos 2 --behavior epsilon --epsilon 0.5 --seed 7"


def test_the_words_are_those_of_data_make():
    made = parse(COMMANDS["make"], [*WORDS.split(), "--out", "d"])
    assert made.config["tasks"] == 12 and made.config["query_epsilon"] == 0.5 and made.config["seed"] == 7
    drawn = words_of_tasks(WORDS)()
    assert drawn.config == datasets.DatasetConfig(**made.config) and drawn.horizon == 2 and str(drawn.directory) == WORDS


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "mdp --tasks 3",
            "draw must be a problem and options of `lindm data make`: the following arguments are required: --demos",
        ),
        ("mdp --tasks 3 --demos 2 --out d", "--out"),
        ("mdp --tasks '3", "draw must be a problem and options of `lindm data make`: No closing quotation"),
        ("mdp --tasks three --demos 2", "three"),
    ],
)
def test_wrong_words_are_an_error_that_names_them(words, message):
    with pytest.raises(UsageError, match=message.replace("`", ".")):
        words_of_tasks(words)


@pytest.mark.parametrize("source", [SUITE, fixed_mdp()], ids=["suite", "one problem"])
def test_drawn_tasks_are_those_that_a_directory_has_to_the_last_bit(source, tmp_path):
    described = config(query_epsilon=0.5, tasks=7)  # two shards
    with double_precision():
        datasets.make_dataset(tmp_path, source, described)
    written, drawn = datasets.Dataset(tmp_path), DrawnTasks(source, described, "drawn")
    assert len(drawn) == 7 and list(drawn) == list(written) == list(drawn)
    facts = ("config", "suite", "names", "discount", "kind", "horizon", "num_states", "num_actions", "illegal_actions")
    assert [getattr(drawn, name) for name in facts] == [getattr(written, name) for name in facts]
    another = DrawnTasks(source, dataclasses.replace(described, seed=1), "drawn")
    assert drawn.checksum == DrawnTasks(source, described, "other words").checksum != another.checksum


@pytest.mark.fault("F11")
def test_a_run_has_the_batches_and_the_weights_of_a_run_from_the_directory(micro, tmp_path):
    draw = words_of_tasks(WORDS)
    drawn = draw()
    with double_precision():
        datasets.make_dataset(tmp_path / "data", drawn.generator.source, drawn.config)
    options = {"model": micro.model, "steps": 3, "batch": 8, "held_out": 0.25, "eval_tasks": 2}
    trainer.train(SFTConfig(data=tmp_path / "data", out=tmp_path / "written", **options))
    config = SFTConfig(draw=WORDS, out=tmp_path / "drawn", **options)
    trainer.train(config, draw=draw)
    records = [metrics.read_metrics(tmp_path / name) for name in ("written", "drawn")]
    assert records[0] == records[1] and any("gap" in record for record in records[0])
    weights = [files.sha256(tmp_path / name / "model" / "model.safetensors") for name in ("written", "drawn")]
    assert weights[0] == weights[1]
    assert trainer.train(config, draw=draw) is not None, "finished, and the same run"
    with pytest.raises(UsageError, match=r"holds another run: draw was"):
        other = WORDS.replace("--seed 7", "--seed 8")
        trainer.train(dataclasses.replace(config, draw=other), draw=words_of_tasks(other))


@pytest.fixture(scope="module")
def run(micro, tmp_path_factory):
    """A run on drawn tasks, begun from Python under a name that is no words."""
    out = tmp_path_factory.mktemp("run") / "run"
    drawn = ld.draw_tasks(words_of_tasks(WORDS)().generator.source, tasks=12, demos=2, seed=7, name="mine")
    return ld.finetune(drawn, out, model=micro.model, steps=1, batch=8, eval_tasks=0).directory


def test_a_run_is_not_evaluated_on_the_tasks_that_were_drawn_for_it(run):
    suite = words_of_tasks(WORDS)().generator.source
    again = datasets.DatasetConfig(tasks=4, demos=2, seed=7)
    with pytest.raises(UsageError, match=r"seed must not be 7: .* was trained on these tasks \(mine\)"):
        PoliciesByName([f"sft:{run}"], suite, again)
    PoliciesByName([f"sft:{run}"], suite, dataclasses.replace(again, seed=8))
    PoliciesByName([f"sft:{run}"], dataclasses.replace(suite, horizon=3), again)


def test_a_run_on_drawn_tasks_knows_its_problem(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("manifest.json").write_text("{}")  # of something else
    policy = ld.load_policy(run)
    problem: Any = policy.problem
    assert (problem.horizon, problem.num_states, problem.num_actions) == (2, 3, 2)
    assert policy.act((), "0").probabilities.shape == (2,)
    suite = words_of_tasks(WORDS)().generator.source
    for trained in (policy.training, words_of_tasks(WORDS)()):
        assert training_notes("sft:x", trained, suite) == []
        (note,) = training_notes("sft:x", trained, dataclasses.replace(suite, horizon=3))
        assert note.endswith("horizon 2, here 3")
    with pytest.raises(DataError, match="mine: these tasks were drawn and not kept"):
        list(policy.training)


def test_a_drawn_run_of_one_problem_knows_its_sizes_and_names(micro, tmp_path):
    drawn = ld.draw_tasks(fixed_mdp(), tasks=4, demos=1, seed=1)
    out = ld.finetune(drawn, tmp_path / "one", model=micro.model, steps=1, batch=8, eval_tasks=0).directory
    policy = ld.load_policy(out)
    problem: Any = policy.problem
    assert problem.num_states == drawn.num_states and problem.suite is None
    assert training_notes("sft:x", policy.training, fixed_mdp()) == []


def test_a_model_without_training_is_read_beside_the_manifest_of_something_else(micro, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("manifest.json").write_text("{}")
    assert ld.load_policy(micro.model).training is None


def test_data_and_draw_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="one of data and draw must be given"):
        SFTConfig(data=tmp_path, draw=WORDS, out=tmp_path, preset="tiny")
    with pytest.raises(ValueError, match="one of data and draw must be given"):
        SFTConfig(out=tmp_path, preset="tiny")
    with pytest.raises(ValueError, match="draw must be given with the tasks that it names"):
        setup_training(SFTConfig(draw=WORDS, out=Path("out"), preset="tiny"))


def test_tasks_are_drawn_once_and_not_kept(tmp_path, monkeypatch):
    drawn, firsts = words_of_tasks(WORDS)(), []
    generate = drawn.generator.generate

    def counting(first, *arguments):
        firsts.append(first)
        return generate(first, *arguments)

    monkeypatch.setattr(drawn.generator, "generate", counting)
    config = SFTConfig(draw=WORDS, out=tmp_path / "out", preset="tiny", eval_tasks=1, held_out=0.25, batch=8)
    setup = setup_training(config, lambda: drawn)
    assert firsts == [0] and drawn._tasks is None
    assert len(setup.train_rows) == 9 and np.unique(setup.train_rows.table.groups).tolist() == list(range(12))
    with double_precision():
        datasets.make_dataset(tmp_path / "data", drawn.generator.source, drawn.config)
    written = setup_training(dataclasses.replace(config, draw=None, data=tmp_path / "data"))
    assert setup.tokenizer.get_vocab() == written.tokenizer.get_vocab()
    digests = [[s.train_rows.table.digest(i) for i in range(12)] for s in (setup, written)]
    assert digests[0] == digests[1] and len(set(digests[0])) > 1
