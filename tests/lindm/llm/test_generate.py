"""Generation with a cache against the whole text read again for each token, and sampling against numpy."""

import jax
import numpy as np
import pytest

from lindm.llm.generate import Sampling, choose, generate, stream
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


def test_a_stream_gives_the_same_tokens_one_by_one():
    model, sampling = decoder(), Sampling(temperature=1.5, top_k=20, top_p=0.95)
    keys = [jax.random.key(i) for i in range(3)]
    together = generate(model, PROMPTS, 6, sampling=sampling, keys=keys)
    for prompt, key, expected in zip(PROMPTS, keys, together, strict=True):
        assert list(stream(model, prompt, 6, sampling=sampling, key=key)) == expected
    stop = together[1][3]
    assert (
        list(stream(model, PROMPTS[1], 6, [stop], sampling=sampling, key=keys[1])) == together[1][: together[1].index(stop) + 1]
    )
    greedy = read_again(model, PROMPTS[0], 5)
    assert list(stream(model, PROMPTS[0], 5)) == greedy


def test_each_prompt_has_its_own_limit_and_key():
    """A text is the same alone, in another place, and beside longer ones."""
    model, sampling = decoder(), Sampling(temperature=1.0)
    keys = [jax.random.key(i) for i in range(3)]
    all_of_them = generate(model, PROMPTS, [5, 0, 2], sampling=sampling, keys=keys)
    assert [len(tokens) for tokens in all_of_them] == [5, 0, 2]
    backwards = generate(model, PROMPTS[::-1], [2, 0, 5], sampling=sampling, keys=keys[::-1])
    assert backwards == all_of_them[::-1]
    assert generate(model, PROMPTS[:1], 5, sampling=sampling, keys=keys[1:2]) != all_of_them[:1]
    with pytest.raises(ValueError, match="keys must be given"):
        generate(model, PROMPTS, 5, sampling=sampling)


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(2.0, 5), Sampling(1.0, 0, 0.8), Sampling(1.3, 6, 0.5)])
def test_tokens_are_drawn_with_the_probabilities_of_the_temperature_among_the_likeliest(sampling):
    rng, n = np.random.default_rng(0), 40_000
    logits = rng.normal(size=12).astype(np.float32) * 2
    p = np.exp(logits.astype(float) / sampling.temperature)
    order = np.argsort(-p)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= sampling.top_p]] = 0
    p /= p.sum()
    keys = jax.random.split(jax.random.key(3), n)
    drawn = np.asarray(choose(jax.numpy.tile(logits, (n, 1)), keys, sampling))
    counts = np.bincount(drawn, minlength=12)
    assert (counts[p == 0] == 0).all()
    assert (np.abs(counts / n - p) <= 5 * np.sqrt(p * (1 - p) / n)).all()
