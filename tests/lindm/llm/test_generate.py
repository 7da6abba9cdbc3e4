"""Greedy generation with a cache against the whole text read again for each token."""

import numpy as np
import pytest

from lindm.llm.generate import generate
from tests.lindm.llm.reading import logits_of
from tests.lindm.llm.tiny import decoder

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], list(range(20))]


def read_again(model, prompt, n, stops=()):
    """The likeliest continuation, without a cache."""
    ids, logits = list(prompt), logits_of(model)
    while len(ids) < len(prompt) + n and not (len(ids) > len(prompt) and ids[-1] in stops):
        ids.append(int(np.argmax(logits(ids)[-1])))
    return ids[len(prompt) :]


def test_each_answer_is_that_of_reading_the_whole_text_again():
    model = decoder()
    answers = generate(model, PROMPTS, 7)
    assert answers == [read_again(model, prompt, 7) for prompt in PROMPTS]
    stops = [answers[0][2], answers[1][4]]
    stopped = generate(model, PROMPTS, 7, stops)
    assert stopped == [read_again(model, prompt, 7, stops) for prompt in PROMPTS]
    assert len(stopped[0]) <= 3 and stopped[0][-1] in stops
    assert generate(model, PROMPTS[:1], 0) == [[]]


def test_prompts_must_have_tokens_and_fit_the_model():
    with pytest.raises(ValueError, match="each prompt must have at least one token"):
        generate(decoder(), [[1], []], 3)
    with pytest.raises(ValueError, match="at most the 2048 tokens of the model; got 20 and 2040"):
        generate(decoder(), PROMPTS, 2040)
