"""Documents that are too long, and how a split counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lindm.llm.sft.example_table import ListedExamples
from lindm.llm.sft.examples import (
    LengthLimit,
    split_indices,
)
from lindm.llm.sft.row_files import find_files
from tests.lindm.llm.sft.test_examples import TOKENIZER, file_examples, written


@pytest.fixture(scope="module")
def overlong(tmp_path_factory):
    turns = [{"role": "user", "content": "x" * 5}, {"role": "assistant", "content": "AB", "weight": 0.5}]
    rows = [{"text": "xyz"}, {"text": "ABCDEFGH" * 3}, {"prompt": "y" * 60, "completion": "A"}, {"messages": turns * 3}]
    return find_files(written(tmp_path_factory.mktemp("overlong") / "rows.jsonl", *rows))


@pytest.mark.parametrize("n", range(4, 90, 9))
def test_a_truncated_document_has_its_first_tokens_with_their_labels_and_weights(overlong, n):
    whole = file_examples(overlong, TOKENIZER, LengthLimit())
    assert [str(e.source)[-1] for e in whole] == ["1", "2", "3", "4"]
    limit = LengthLimit(n, "truncate")
    kept = {str(e.source): e for e in file_examples(overlong, TOKENIZER, limit)}
    for e in whole:
        labels = (e.target[:n] >= 0).sum()
        if len(e.ids) > n and not labels:
            assert str(e.source) not in kept
            continue
        cut = kept[str(e.source)]
        assert cut.ids.tolist() == e.ids[:n].tolist() and cut.target.tolist() == e.target[:n].tolist()
        assert (cut.weights is None) == (e.weights is None) and (e.weights is None or (cut.weights == e.weights[:labels]).all())
    assert limit.truncated == sum(len(e.ids) > n and str(e.source) in kept for e in whole)
    assert limit.dropped == limit.unlabeled == 4 - len(kept)
    ends = {str(e.source): set(np.flatnonzero(e.target >= 0) + 1) for e in whole}  # of an answer: where its last token stands
    assert limit.endless == sum(len(e.ids) > n and {n, n - 1} <= {i - 1 for i in ends[str(e.source)]} for e in whole)


def test_what_is_too_long_is_left_out_and_counted(overlong):
    kept = file_examples(overlong, TOKENIZER, limit := LengthLimit(26, "drop"))
    assert [str(e.source)[-1] for e in kept] == ["1", "2"] and limit.counts == {"dropped": 2}


def test_the_end_of_a_truncated_answer_is_no_end_token(overlong):
    examples = ListedExamples(file_examples(overlong, TOKENIZER, LengthLimit(20, "truncate")))
    assert len(examples) == 2 and examples.end_tokens() == (TOKENIZER.eos_token_id,)


@given(n=st.integers(1, 60), fraction=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 2**64 - 1))
def test_a_split_has_every_number_once_and_the_given_fraction(n, fraction, seed):
    if fraction and n - max(round(fraction * n), 1) < 1:
        with pytest.raises(ValueError, match="held_out must leave something to train"):
            split_indices(n, fraction, seed)
        return
    rest, evaluated = split_indices(n, fraction, seed)
    assert sorted(rest + evaluated) == list(range(n)) and (rest, evaluated) == (sorted(rest), sorted(evaluated))
    assert abs(len(evaluated) - fraction * n) <= 0.5 or len(evaluated) == 1
    assert bool(evaluated) == bool(fraction) and split_indices(n, fraction, seed) == (rest, evaluated)


def test_every_number_is_held_out_about_equally_often():
    counts = np.bincount([i for seed in range(2000) for i in split_indices(10, 0.3, seed)[1]], minlength=10)
    np.testing.assert_allclose(counts, 600, atol=5 * np.sqrt(2000 * 0.3 * 0.7))


def test_a_fraction_must_be_one():
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="fraction must be at least 0 and below 1"):
            split_indices(10, fraction, 0)
