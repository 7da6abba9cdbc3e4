"""A model's decisions: what shared caches and batches answer is what one full reading of each text answers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lindm import datasets
from lindm.llm import weights
from lindm.llm.deciding import Reader
from lindm.llm.tokens import action_tokens, encode, load_tokenizer, prefix
from lindm.play import play
from lindm.text import Document, render

LENGTH = 192


def told(directory, n):
    """Problems, demonstrations and the way in which the first n tasks of a dataset are told."""
    how = datasets.telling(directory, datasets.read_manifest(directory), None, "mdp" in directory.name, False)
    problems, demonstrations = [], []
    for task, episodes in list(datasets.load(directory))[:n]:
        demos = [row for row in episodes if row["role"] == "demo"]
        problems.append(datasets.problem_of(task))
        demonstrations.append(datasets.document(demos, episodes[-1], how.shown).demonstrations)
    return problems, demonstrations, how.template


@nnx.jit
def forward(model, ids):
    return model.logits(model.hidden(ids, jnp.arange(ids.shape[1], dtype=jnp.int32)[None]))[0]


def logits_of(model, ids):
    """Of one text; what fills it up to the one compiled length comes after it, where it is not seen."""
    return forward(model, jnp.asarray([[*ids, *[0] * (LENGTH - len(ids))]], jnp.int32))


def read_whole(model, tokenizer, template, A):
    """The policy that reads every text from its beginning, one at a time, with no cache."""
    actions = action_tokens(tokenizer, template, A)
    asked_for = []

    def of(demos):
        def answer(stage, level):
            found = []
            for episodes, asks in zip(demos, level, strict=True):
                row = []
                for asked in asks:
                    pieces = [p.text for p in render(Document(tuple(map(tuple, episodes)), asked.steps), template)]
                    ids = [*prefix(tokenizer), *(i for piece in encode(tokenizer, pieces) for i in piece)]
                    scores = []
                    for tokens in actions:
                        logits = np.asarray(logits_of(model, [*ids, *tokens]), np.float64)
                        log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
                        scores.append(sum(log_p[len(ids) - 1 + j, token] for j, token in enumerate(tokens)))
                    asked_for.append(scores)
                    row.append(int(np.argmax(scores)))
                found.append(row)
            return found

        return answer

    return of, asked_for


@pytest.mark.parametrize("kind, n", [("mdp", 2), ("hidden", 8), ("cloud", 2)])
def test_answers_are_those_of_reading_every_text_from_its_beginning(micro, kind, n):
    problems, demos, template = told(getattr(micro, kind), n)
    model, tokenizer = weights.load(micro.model), load_tokenizer(micro.model)
    whole, scores = read_whole(model, tokenizer, template, 2)
    rewards = kind == "mdp"
    wanted = play(problems, whole(demos), rewards=rewards)
    assert min(abs(a - b) for a, b in scores) > 1e-5, "a tie would make the comparison a matter of rounding"
    assert len({int(np.argmax(s)) for s in scores}) == 2, "a model that always answers the same would hide a wrong history"
    found = play(problems, Reader(model, tokenizer, template, 2).policy(demos, 3), rewards=rewards)
    assert found == wanted


def test_actions_of_several_tokens_are_scored_to_their_end(micro):
    problems, demos, template = told(micro.mdp, 1)
    model, tokenizer = weights.load(micro.model), load_tokenizer(micro.model)
    long = dataclasses.replace(template, name="long", actions=(" Axy", " Axzw"))
    tokens = action_tokens(tokenizer, long, 2)
    assert min(map(len, tokens)) > 1 and len({len(t) for t in tokens}) == 2 and tokens[0][0] == tokens[1][0]
    whole, scores = read_whole(model, tokenizer, long, 2)
    wanted = play(problems, whole(demos), rewards=True)
    assert min(abs(a - b) for a, b in scores) > 1e-5
    assert play(problems, Reader(model, tokenizer, long, 2).policy(demos, 3), rewards=True) == wanted
