"""A reference policy: encodes every text as a whole, one at a time, without a cache."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lindm.datasets import Dataset, text_format
from lindm.evaluation.losses import world
from lindm.llm.tokens import action_tokens, document_prefix, encode
from lindm.text import Document, render

LENGTH = 192


def told(directory, n):
    """Worlds, demonstrations and the way in which the first n tasks of a dataset are told."""
    dataset = Dataset(directory)
    text = text_format(dataset)
    tasks = dataset.load()[:n]
    worlds = [world(task.problem(), text.shows_rewards) for task in tasks]
    return worlds, [text.demonstrations(task) for task in tasks], text.template


@nnx.jit
def forward(model, ids):
    return model.logits(model.last_hidden_state(ids, jnp.arange(ids.shape[1], dtype=jnp.int32)[None]))[0]


def logits_of(model):
    """ids -> logits; texts are padded at the end to one compiled length, and no token attends to the padding."""
    return lambda ids: forward(model, jnp.asarray([[*ids, *[0] * (LENGTH - len(ids))]], jnp.int32))[: len(ids)]


def read_whole(logits_of, tokenizer, template, A):
    """The policy of `logits_of(ids) -> [n, V]`, the scores of all that it was asked, and whether free text would be an action."""
    actions = action_tokens(tokenizer, template, A)
    asked_for, spelt = [], []

    def of(demos):
        def answer(stage, level):
            found = []
            for episodes, asks in zip(demos, level, strict=True):
                row = []
                for asked in asks:
                    pieces = [p.text for p in render(Document(tuple(map(tuple, episodes)), asked.steps), template)]
                    ids = [*document_prefix(tokenizer), *(i for piece in encode(tokenizer, pieces) for i in piece)]
                    scores, spells = [], []
                    for tokens in actions:
                        logits = np.asarray(logits_of([*ids, *tokens]), np.float64)
                        log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
                        rows = log_p[len(ids) - 1 : len(ids) - 1 + len(tokens)]
                        scores.append(sum(row[token] for row, token in zip(rows, tokens, strict=True)))
                        spells.append(all(row.argmax() == token for row, token in zip(rows, tokens, strict=True)))
                    asked_for.append(scores)
                    spelt.append(any(spells))
                    row.append(int(np.argmax(scores)))
                found.append(row)
            return found

        return answer

    return of, asked_for, spelt
