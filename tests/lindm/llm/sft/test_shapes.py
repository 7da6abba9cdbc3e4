"""Documents of a step share rows: nothing is lost or trained twice, little is padding, and few programs are compiled."""

import json

import numpy as np
import pytest

from lindm.llm.sft import metrics, shapes, trainer
from lindm.llm.sft.flops import train_step_flops, useful_flops
from lindm.llm.sft.shapes import BatchShape, choose_shapes, fill
from lindm.llm.tokens import Example
from tests.lindm.llm.sft.test_trainer import options
from tests.lindm.llm.tiny import TINY


def cost_of_row(seq_len: int) -> float:
    """Tokens, and attention that costs as much as the rest at 2,000 tokens."""
    return seq_len * (1 + seq_len / 2000)


def document(number: int, length: int, labels: int) -> list[Example]:
    """A row of one document, whose tokens are its number."""
    target = np.where(np.arange(length) < labels, number, -1)
    return [Example(np.full(length, number, np.int32), target.astype(np.int32), str(number))]


def steps_of(lengths, per_step: int, num_steps: int, seed: int = 0) -> list[list[list[Example]]]:
    """Steps that draw documents of these lengths at random; half of the tokens are labels."""
    documents = [document(i, int(n), max(int(n) // 2, 1)) for i, n in enumerate(lengths)]
    rng = np.random.default_rng(seed)
    return [[documents[i] for i in rng.choice(len(documents), per_step, replace=False)] for _ in range(num_steps)]


def smallest(step, chosen: list[BatchShape], accumulate: int = 1):
    return next((shape, rows) for shape in chosen if (rows := fill(step, shape, accumulate)) is not None)


def useful(steps, chosen: list[BatchShape]) -> float:
    tokens = sum(len(e.ids) for step in steps for row in step for e in row)
    return tokens / sum(smallest(step, chosen)[0].tokens for step in steps)


def test_one_row_of_1500_tokens_among_twenty_of_13_does_not_make_the_others_as_long():
    steps = steps_of([1500, *[13] * 20], 8, 60)
    full = BatchShape(8, 1536, 768)
    chosen = choose_shapes(steps, full, accumulate=1, shards=1, row_cost=cost_of_row)
    assert useful(steps, [full]) < 0.06 and useful(steps, chosen) > 0.45 and len(chosen) == 3
    short = next(step for step in steps if max(len(row[0].ids) for row in step) == 13)
    assert smallest(short, chosen)[0].tokens <= 192, "8 x 13 tokens"


def test_lengths_of_a_log_normal_law_fill_most_of_what_is_computed():
    lengths = np.clip(np.exp(np.random.default_rng(0).normal(np.log(200), 1.089, 400)), 8, 4000).astype(int)
    full = BatchShape(8, -(-lengths.max() // 64) * 64, -(-lengths.max() // 8) * 8)
    chosen = choose_shapes(steps_of(lengths, 8, 64), full, accumulate=1, shards=1, row_cost=cost_of_row)
    others = steps_of(lengths, 8, 64, seed=1)  # steps that were not sampled
    assert len(chosen) <= shapes.MAX_SHAPES and chosen[-1] == full
    assert useful(others, chosen) > 0.6 > 4 * useful(others, [full])


@pytest.mark.fault("F22")
@pytest.mark.parametrize("accumulate, shards", [(1, 1), (2, 1), (2, 4)])
def test_each_document_of_a_step_is_in_one_row_and_no_limit_is_exceeded(accumulate, shards):
    rng = np.random.default_rng(accumulate + shards)
    lengths = rng.geometric(0.02, 100) + 2
    full = BatchShape(8, -(-lengths.max() // 64) * 64, -(-lengths.max() // 8) * 8)
    sampled, others = (steps_of(lengths, 8 * accumulate, 20, seed) for seed in (0, 1))
    chosen = choose_shapes(sampled, full, accumulate, shards, cost_of_row)
    assert len(chosen) > 1 and all(shape.rows % shards == 0 for shape in chosen)
    for step in others:
        shape, rows = smallest(step, chosen, accumulate)
        assert sorted(e.source for row in rows for e in row) == sorted(e.source for row in step for e in row)
        assert len(rows) <= accumulate * shape.rows
        for row in rows:
            assert sum(len(e.ids) for e in row) <= shape.seq_len and sum((e.target >= 0).sum() for e in row) <= shape.max_labels


def test_documents_of_one_length_keep_their_rows_and_one_shape():
    steps = steps_of([60] * 40, 8, 10)
    chosen = choose_shapes(steps, BatchShape(8, 64, 32), accumulate=1, shards=1, row_cost=cost_of_row)
    assert chosen == [BatchShape(8, 64, 32)] and smallest(steps[0], chosen)[1] == steps[0]


def test_rows_with_more_labels_than_a_shape_has_take_a_larger_one():
    few = [[document(i, 10, 1) for i in range(8)] for _ in range(5)]
    chosen = choose_shapes(few, BatchShape(8, 128, 128), accumulate=1, shards=1, row_cost=cost_of_row)
    many = [document(i, 10, 10) for i in range(8)]
    assert smallest(few[0], chosen)[0].max_labels < 80 and smallest(many, chosen)[0] == chosen[-1]


def test_useful_operations_are_those_of_each_document_alone():
    rows = [document(0, 7, 2), document(1, 12, 3)]
    wanted = train_step_flops(TINY, "lora", 1, 7, 2) + train_step_flops(TINY, "lora", 1, 12, 3)
    assert useful_flops(TINY, "lora", [row[0] for row in rows]) == wanted


@pytest.mark.slow
@pytest.mark.fault("F22")
def test_a_run_has_the_losses_of_one_document_to_a_row(micro, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": "#\n" * (i % 7) * (i % 5), "completion": " AB"[i % 2 :][:2]} for i in range(70)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": row["prompt"] + "#", "completion": row["completion"]}) + "\n" for row in rows))

    def losses(out):
        run = options(micro, tmp_path / out, data=data, batch=16, steps=5, seq=128, learning_rate=1e-2)
        assert trainer.train(run) is not None
        return [(r["kind"], r["loss"], r.get("batch_sha256")) for r in metrics.read_metrics(tmp_path / out)]

    shared = losses("shared")
    assert "batches   of 8 x 64 tokens" in capsys.readouterr().err
    monkeypatch.setattr(shapes, "MAX_SHAPES", 1)
    alone = losses("alone")
    assert "batches   of 16 x 128 tokens" in capsys.readouterr().err
    assert [(kind, digest) for kind, _, digest in shared] == [(kind, digest) for kind, _, digest in alone]
    np.testing.assert_allclose([loss for _, loss, _ in shared], [loss for _, loss, _ in alone], rtol=2e-5)
