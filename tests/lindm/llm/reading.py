"""A reference policy: encodes every text as a whole, one at a time, without a cache."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lindm.datasets import Dataset, text_format
from lindm.evaluation.compare import read_tasks
from lindm.evaluation.policy import FunctionPolicy
from lindm.llm.tokens import action_tokens, document_prefix, encode
from lindm.text import Document, Step, render

LENGTH = 192


def tasks_of(directory, n):
    """The first n tasks of a dataset, and how it is written."""
    dataset = Dataset(directory)
    return read_tasks(dataset)[:n], text_format(dataset)


@nnx.jit
def forward(model, ids):
    return model.logits(model.last_hidden_state(ids, jnp.arange(ids.shape[1], dtype=jnp.int32)[None]))[0]


def logits_of(model):
    """ids -> logits; texts are padded at the end to one compiled length, and no token attends to the padding."""
    return lambda ids: forward(model, jnp.asarray([[*ids, *[0] * (LENGTH - len(ids))]], jnp.int32))[: len(ids)]


def read_whole(logits_of, tokenizer, text, A):
    """The policy of `logits_of(ids) -> [n, V]`, the scores of all histories, and whether free text would be an action."""
    actions = action_tokens(tokenizer, text.template, A)
    all_scores, spelled = [], []

    def shown(steps, names):
        return tuple(Step(step.action, **{name: getattr(step, name) for name in names - {"action"}}) for step in steps)

    def act(demonstrations, history):
        episodes = tuple(shown(steps, text.fields) for steps in demonstrations)
        document = Document(episodes, shown(history, text.query_fields))
        pieces = [piece.text for piece in render(document, text.template)]
        ids = [*document_prefix(tokenizer), *(i for piece in encode(tokenizer, pieces) for i in piece)]
        scores, spells = [], []
        for tokens in actions:
            logits = np.asarray(logits_of([*ids, *tokens]), np.float64)
            log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
            rows = log_p[len(ids) - 1 : len(ids) - 1 + len(tokens)]
            scores.append(sum(row[token] for row, token in zip(rows, tokens, strict=True)))
            spells.append(all(row.argmax() == token for row, token in zip(rows, tokens, strict=True)))
        all_scores.append(scores)
        spelled.append(any(spells))
        return int(np.argmax(scores))

    return FunctionPolicy(act), all_scores, spelled
