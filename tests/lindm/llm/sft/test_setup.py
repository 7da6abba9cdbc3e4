"""The setup of a run: every file is read once, every document is tokenized once, and the evaluated tasks are held out."""

import builtins
import io
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from lindm.llm.sft import examples
from lindm.llm.sft.options import SFTConfig
from lindm.llm.sft.setup import setup_training


@pytest.fixture
def opened(monkeypatch) -> Counter:
    """How often each file is opened."""
    counts: Counter = Counter()
    open_file = io.open

    def counting_open(file, *arguments, **options):
        if isinstance(file, str | os.PathLike):
            counts[Path(file)] += 1
        return open_file(file, *arguments, **options)

    monkeypatch.setattr(io, "open", counting_open)
    monkeypatch.setattr(builtins, "open", counting_open)
    return counts


@pytest.fixture
def tokenized(monkeypatch) -> Counter:
    """How often each document is tokenized, by its source."""
    counts: Counter = Counter()
    document_example = examples.document_example

    def counting(tokenizer, pieces, labels, actions, supervise, source, *rest):
        counts[source] += 1
        return document_example(tokenizer, pieces, labels, actions, supervise, source, *rest)

    monkeypatch.setattr(examples, "document_example", counting)
    return counts


def below(counts: Counter, directory: Path) -> dict[str, int]:
    return {path.name: n for path, n in counts.items() if path.parent == directory}


ONCE = {"manifest.json": 1, "tasks-00000.jsonl": 1, "episodes-00000.jsonl": 1}


@pytest.mark.parametrize("start", ["model", "preset"])
def test_a_dataset_is_read_once_and_each_document_is_tokenized_once(micro, tmp_path, opened, tokenized, start):
    base = {"model": micro.model} if start == "model" else {"preset": "tiny"}
    setup = setup_training(SFTConfig(data=micro.mdp, out=tmp_path, eval_tasks=3, held_out=0.25, **base))
    assert below(opened, micro.mdp) == ONCE
    assert len(tokenized) == 24 * 2 and set(tokenized.values()) == {1}
    assert setup.decision_tasks is not None and len(setup.decision_tasks.tasks) == 3
    held_out = {e.group for row in setup.eval_rows for e in row}
    assert {task.task for task in setup.decision_tasks.tasks} == set(sorted(held_out)[:3])


def test_a_preset_does_not_train_on_rows_and_the_error_says_why_and_what_to_do(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1 = ", "completion": "2"}\n')
    with pytest.raises(ValueError) as e:
        setup_training(SFTConfig(data=tmp_path / "rows.jsonl", out=tmp_path / "run", preset="tiny"))
    assert str(e.value) == (
        "data must be a directory of `lindm data make` with a preset, whose vocabulary is trained on its texts; files of rows "
        f"need --model DIR in place of --preset; got {tmp_path / 'rows.jsonl'}"
    )


@pytest.mark.parametrize("preset, weights, rate", [("tiny", 1.4e6, 1e-3), ("small", 10.8e6, 5e-4)])
def test_a_preset_has_its_size_and_learning_rate_and_a_vocabulary_of_the_symbols(micro, tmp_path, preset, weights, rate):
    setup = setup_training(SFTConfig(data=micro.mdp, out=tmp_path, preset=preset))
    assert (setup.optimizer.learning_rate, setup.optimizer.steps) == (rate, 500)
    model = replace(setup.model_config, vocab_size=512)
    assert abs(model.num_parameters / weights - 1) < 0.03
    assert abs(model.init_std * model.hidden_size**0.5 - 1) < 0.02 and model.num_heads * model.head_dim == model.hidden_size
    assert 256 < setup.model_config.vocab_size == len(setup.tokenizer) <= 512


def test_evaluation_data_are_read_once_too_and_give_the_evaluated_tasks(micro, tmp_path, opened, tokenized):
    config = SFTConfig(data=micro.mdp, eval_data=micro.hidden, out=tmp_path, eval_tasks=2, model=micro.model)
    setup = setup_training(config)
    assert below(opened, micro.mdp) == ONCE and below(opened, micro.hidden) == ONCE | {"problem.jsonl": 1}
    assert len(tokenized) == 2 * 24 * 2 and set(tokenized.values()) == {1}
    assert [task.task for task in setup.decision_tasks.tasks] == [0, 1]
    assert "reward" not in setup.decision_tasks.text.fields
    assert len(setup.train_rows) == len(setup.eval_rows) == 24 * 2


def test_of_a_file_of_rows_a_fraction_is_held_out(micro, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}", "completion": " A"}) + "\n" for i in range(20)))
    setup = setup_training(SFTConfig(data=data, out=tmp_path / "out", model=micro.model, held_out=0.2))
    assert setup.decision_tasks is None
    assert (len(setup.train_rows), len(setup.eval_rows)) == (16, 4)


@pytest.mark.parametrize("changes", [{"eval_tasks": 0}, {"held_out": 0.0}])
def test_decisions_are_not_evaluated_without_tasks(micro, tmp_path, changes):
    setup = setup_training(SFTConfig(data=micro.mdp, out=tmp_path, model=micro.model, **changes))
    assert setup.decision_tasks is None
