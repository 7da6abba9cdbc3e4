"""Documents of a step share rows: nothing is lost or trained twice, little is padding, and few programs are compiled."""

import json

import numpy as np
import pytest

from lindm.llm.sft import metrics, shapes, trainer
from lindm.llm.sft.flops import train_step_flops, useful_flops
from lindm.llm.sft.shapes import BatchShape, Sizes, choose_shapes, evaluation_shape, group
from tests.lindm.llm.sft.test_trainer import options
from tests.lindm.llm.tiny import TINY


def cost_of_row(seq_len: int) -> float:
    """Tokens, and attention that costs as much as the rest at 2,000 tokens."""
    return seq_len * (1 + seq_len / 2000)


def steps_of(lengths, per_step: int, num_steps: int, seed: int = 0) -> list[Sizes]:
    """Steps that draw documents of these lengths at random; half of the tokens are labels."""
    lengths, rng = np.array(lengths), np.random.default_rng(seed)
    drawn = [lengths[rng.choice(len(lengths), per_step, replace=False)] for _ in range(num_steps)]
    return [Sizes(tokens, np.maximum(tokens // 2, 1)) for tokens in drawn]


def cheapest(step: Sizes, chosen: list[BatchShape], accumulate: int = 1):
    return next((shape, rows) for shape in chosen if (rows := group(step, shape, accumulate)) is not None)


def tokens_of(shape: BatchShape) -> int:
    return shape.rows * shape.seq_len


def useful(steps: list[Sizes], chosen: list[BatchShape]) -> float:
    return sum(step.tokens.sum() for step in steps) / sum(tokens_of(cheapest(step, chosen)[0]) for step in steps)


def test_one_row_of_1500_tokens_among_twenty_of_13_does_not_make_the_others_as_long():
    steps = steps_of([1500, *[13] * 20], 8, 60)
    full = BatchShape(8, 1536, 768)
    chosen = choose_shapes(steps, full, accumulate=1, shards=1, row_cost=cost_of_row)
    assert useful(steps, [full]) < 0.06 and useful(steps, chosen) > 0.45 and len(chosen) == 3
    short = next(step for step in steps if step.tokens.max() == 13)
    assert tokens_of(cheapest(short, chosen)[0]) == 128, "8 x 13 tokens"


def test_lengths_of_a_log_normal_law_fill_most_of_what_is_computed():
    lengths = np.clip(np.exp(np.random.default_rng(0).normal(np.log(200), 1.089, 400)), 8, 4000).astype(int)
    full = BatchShape(8, int(-(-lengths.max() // 64)) * 64, int(-(-lengths.max() // 8)) * 8)
    chosen = choose_shapes(steps_of(lengths, 8, 64), full, accumulate=1, shards=1, row_cost=cost_of_row)
    others = steps_of(lengths, 8, 64, seed=1)  # steps that were not sampled
    assert len(chosen) <= shapes.MAX_SHAPES and chosen[-1] == full
    assert useful(others, chosen) > 0.6 > 4 * useful(others, [full])


@pytest.mark.fault("F22")
@pytest.mark.parametrize("accumulate, shards", [(1, 1), (2, 1), (2, 4)])
def test_each_document_of_a_step_is_in_one_row_and_no_limit_is_exceeded(accumulate, shards):
    rng = np.random.default_rng(accumulate + shards)
    lengths = rng.geometric(0.02, 100) + 2
    full = BatchShape(8, int(-(-lengths.max() // 64)) * 64, int(-(-lengths.max() // 8)) * 8)
    sampled, others = (steps_of(lengths, 8 * accumulate, 20, seed) for seed in (0, 1))
    chosen = choose_shapes(sampled, full, accumulate, shards, cost_of_row)
    assert len(chosen) > 1 and all(shape.rows % shards == 0 for shape in chosen)
    for step in others:
        shape, rows = cheapest(step, chosen, accumulate)
        assert sorted(i for row in rows for i in row) == list(range(8 * accumulate))
        assert len(rows) <= accumulate * shape.rows
        for row in rows:
            assert sum(step.tokens[i] for i in row) <= shape.seq_len and sum(step.labels[i] for i in row) <= shape.max_labels


def test_documents_of_one_length_keep_their_rows_and_one_shape():
    steps = steps_of([60] * 40, 8, 10)
    chosen = choose_shapes(steps, BatchShape(8, 64, 32), accumulate=1, shards=1, row_cost=cost_of_row)
    assert chosen == [BatchShape(8, 64, 32)] and cheapest(steps[0], chosen)[1] == [[i] for i in range(8)]


def test_documents_that_leave_much_of_the_longest_row_empty_share_longer_ones():
    steps, full = steps_of([78] * 40, 32, 10), BatchShape(32, 128, 40)
    chosen = choose_shapes(steps, full, accumulate=1, shards=1, row_cost=cost_of_row)
    assert chosen == [BatchShape(8, 320, 160), full], "four documents of 78 tokens and 39 labels to a row, the full shape last"
    assert sorted(i for row in cheapest(steps[0], chosen)[1] for i in row) == list(range(32))
    assert useful(steps, chosen) > 0.97 > 0.62 > useful(steps, [full])
    assert choose_shapes(steps, full, 1, 1, cost_of_row, max_shared=128) == [full], "rows that must not be longer"
    assert choose_shapes(steps, full, 1, shards=16, row_cost=cost_of_row)[0].rows == 16
    costly = choose_shapes(steps, full, 1, 1, row_cost=lambda seq_len: float(seq_len) ** 2)
    assert costly == [full], "attention that costs more than the padding"


@pytest.mark.parametrize("shards", [1, 8])
def test_documents_that_are_evaluated_fill_rows_of_the_cheapest_length_in_batches_of_the_same_size(shards):
    sizes = Sizes(np.full(101, 78), np.full(101, 24))
    shape, groups = evaluation_shape(sizes, BatchShape(32, 128, 24), shards, cost_of_row)
    assert shape == BatchShape(9 if shards == 1 else 8, 320, 96) and len(groups) == 26
    assert sorted(i for row in groups for i in row) == list(range(101))
    assert evaluation_shape(sizes, BatchShape(8, 128, 24), 8, cost_of_row, 128)[0] == BatchShape(8, 128, 24)


def test_rows_with_more_labels_than_a_shape_has_take_a_larger_one():
    few, many = (Sizes(np.full(8, 10), np.full(8, labels)) for labels in (1, 10))
    chosen = choose_shapes([few] * 5, BatchShape(8, 128, 128), accumulate=1, shards=1, row_cost=cost_of_row)
    assert cheapest(few, chosen)[0].max_labels < 80 and cheapest(many, chosen)[0] == chosen[-1]


def test_useful_operations_are_those_of_each_document_alone():
    wanted = train_step_flops(TINY, "lora", 1, 7, 2) + train_step_flops(TINY, "lora", 1, 12, 3)
    assert useful_flops(TINY, "lora", np.array([7, 12]), np.array([2, 3])) == wanted


@pytest.mark.slow
@pytest.mark.fault("F22")
def test_a_run_has_the_losses_of_one_document_to_a_row(micro, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": "#\n" * (i % 7) * (i % 5), "completion": " AB"[i % 2 :][:2]} for i in range(70)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": row["prompt"] + "#", "completion": row["completion"]}) + "\n" for row in rows))

    def losses(out):
        run = options(micro, tmp_path / out, data=data, batch=16, steps=5, learning_rate=1e-2)
        assert trainer.train(run) is not None
        return [(r["kind"], r["loss"], r.get("batch_sha256")) for r in metrics.read_metrics(tmp_path / out)]

    shared = losses("shared")
    assert "batches   of 8 x 64 tokens" in capsys.readouterr().err
    monkeypatch.setattr(shapes, "MAX_SHAPES", 1)
    alone = losses("alone")
    assert "batches   of 16 x 64 tokens" in capsys.readouterr().err
    assert [(kind, digest) for kind, _, digest in shared] == [(kind, digest) for kind, _, digest in alone]
    np.testing.assert_allclose([loss for _, loss, _ in shared], [loss for _, loss, _ in alone], rtol=2e-5)
