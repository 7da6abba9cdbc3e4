"""A model's decisions: what shared caches and batches answer is what one full reading of each text answers."""

import dataclasses

import numpy as np
import pytest

from lindm.evaluation.losses import play
from lindm.llm.io import weights
from lindm.llm.policy import Reader
from lindm.llm.tokens import action_tokens, load_tokenizer
from tests.lindm.llm.reading import logits_of, read_whole, told


def recorded(reader, demos, horizon):
    """The reader's policy, and the scores of all that it is asked, in the order of the histories."""
    last, scores, work, policy = [], [], reader._scores, reader.policy(demos, horizon)

    def noted(*arguments):
        last[:] = [work(*arguments)]
        return last[0]

    def answer(stage, level):
        found = policy(stage, level)
        rows = np.asarray(last[0][0]).reshape(len(level), -1, last[0][0].shape[-1])
        scores.extend(row.tolist() for asks, row in zip(level, rows, strict=True) for row in row[: len(asks)])
        return found

    reader._scores = noted
    return answer, scores


def agree(model, tokenizer, worlds, demos, template):
    """Both ways of asking give the same scores at the same histories, and so the same answers."""
    whole, wanted, spelt = read_whole(logits_of(model), tokenizer, template, 2)
    reader = Reader(model, tokenizer, template, 2)
    policy, found = recorded(reader, demos, 3)
    assert play(worlds, policy) == play(worlds, whole(demos))
    assert len(found) == len(wanted) > 3 and np.ptp([a - b for a, b in wanted]) > 0.01, "histories must matter"
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    assert (reader.answered, reader.invalid) == (len(spelt), spelt.count(False))
    return spelt


@pytest.mark.parametrize("kind, n", [("mdp", 2), ("hidden", 3), ("cloud", 2)])
def test_answers_are_those_of_reading_every_text_from_its_beginning(micro, kind, n):
    worlds, demos, template = told(getattr(micro, kind), n)
    agree(weights.load(micro.model), load_tokenizer(micro.model), worlds, demos, template)


def test_actions_of_several_tokens_are_scored_to_their_end(micro):
    worlds, demos, template = told(micro.mdp, 1)
    model, tokenizer = weights.load(micro.model), load_tokenizer(micro.model)
    long = dataclasses.replace(template, name="long", actions=(" Axy", " Axzw"))
    tokens = action_tokens(tokenizer, long, 2)
    assert min(map(len, tokens)) > 1 and len({len(t) for t in tokens}) == 2 and tokens[0][0] == tokens[1][0]
    agree(model, tokenizer, worlds, demos, long)
