"""Hidden states of a language model at the token before each decision, and linear probes of them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from lindm.datasets import Dataset, Episode, TextFormat
from lindm.llm.config import read_model_config
from lindm.llm.io import weights
from lindm.llm.model import Decoder
from lindm.llm.parallel.sharding import make_mesh
from lindm.llm.tokens import Example, Tokenizer, action_tokens, document_example, load_tokenizer
from lindm.text import COMPACT, Document, render

ROWS = 8  # texts of one forward pass
PENALTIES = 10.0 ** np.arange(0, 7)  # of the ridge regressions, whose features are standardized
VALIDATION_SHARE = 0.25  # of the probe's tasks; they choose its penalty and its layer


class Queries(NamedTuple):
    """The last query episode of each task; every stage of it is a decision."""

    documents: list[Document]
    labels: list[list[list[int]]]  # of each document, episode by episode, the query last
    Q: np.ndarray  # [n, H, A]
    rows: list[Episode]  # the queries


def read_queries(data: Path, shown: frozenset[str]) -> Queries:
    """The queries of a dataset, as texts that show the fields `shown` of each step."""
    documents, labels, queries = [], [], []
    text = TextFormat(COMPACT, shown)
    for task in Dataset(data):
        query = task.queries[-1]
        documents.append(text.document(task, query))
        labels.append([episode.label for episode in (*task.demonstrations, query)])
        queries.append(query)
    return Queries(documents, labels, np.array([episode.Q for episode in queries]), queries)


class ProbedModel:
    """A language model with access to its residual stream before the actions of a query."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.graphdef, self.weights = nnx.split(model)

    @classmethod
    def load(cls, directory: Path, untrained: int | None = None) -> "ProbedModel":
        """The model of a directory. `untrained`: seed of random weights in place of its own."""
        if untrained is None:
            model = weights.load(directory, mesh=make_mesh({"fsdp": 1}, jax.devices()[:1]))
        else:
            model = Decoder(read_model_config(directory), nnx.Rngs(untrained))
        return cls(model, load_tokenizer(directory))

    def stream(self, queries: Queries) -> np.ndarray:
        """Residual stream [n, H, num_layers + 1, hidden_size] at the last token before each action of the query."""
        A = queries.Q.shape[-1]
        action_ids = action_tokens(self.tokenizer, COMPACT, A)
        if max(map(len, action_ids)) > 1:
            raise ValueError("model must have a token for each action")
        self.actions = np.array([tokens[0] for tokens in action_ids])
        examples = [
            document_example(self.tokenizer, render(one, COMPACT), labels, action_ids, "query", "query")
            for one, labels in zip(queries.documents, queries.labels, strict=True)
        ]
        T = -(-max(len(e.ids) for e in examples) // 8) * 8
        return np.concatenate([self._rows(examples[i : i + ROWS], T) for i in range(0, len(examples), ROWS)])

    def _rows(self, examples: Sequence[Example], T: int) -> np.ndarray:
        ids = np.zeros((ROWS, T), np.int32)
        at = np.zeros((ROWS, int((examples[0].target >= 0).sum())), np.int32)
        for i, e in enumerate(examples):
            ids[i, : len(e.ids)], at[i] = e.ids, np.flatnonzero(e.target >= 0)
        return np.asarray(_stream(self.graphdef, self.weights, ids, at))[: len(examples)]

    def logits(self, stream: np.ndarray) -> np.ndarray:
        """Logits of the actions [n, H, A], from the last layer of `stream`."""
        return np.asarray(_logits(self.graphdef, self.weights, stream[:, :, -1]))[..., self.actions]


@partial(jax.jit, static_argnames="graphdef")
def _stream(graphdef, weights, ids: Array, at: Array) -> Array:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    states = nnx.merge(graphdef, weights).hidden_states(ids, positions)  # [depth + 1, B, T, D]
    return jnp.take_along_axis(states, at[None, :, :, None], axis=2).transpose(1, 2, 0, 3)


@partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef, weights, last: Array) -> Array:
    model = nnx.merge(graphdef, weights)
    return model.logits(model.norm(last))


def centered(values: np.ndarray) -> np.ndarray:
    """Values [..., A] of actions less their mean, which decides nothing."""
    return values - values.mean(-1, keepdims=True)


# --- a probe ---------------------------------------------------------------------------------------------------------------


Targets = dict[str, tuple[np.ndarray, np.ndarray]]
"""Regression targets by name: those of the probe's tasks [n, H, k] and of new tasks."""


def probe(X: np.ndarray, X_new: np.ndarray, targets: Targets) -> dict[str, dict[str, Any]]:
    """For each target: the errors of every layer, the layer chosen on validation tasks, and its errors on each new task.

    X [n, H, layers, D]. The unit of errors is the average error of predicting the mean of the stage; `of_mean` has those errors.
    """
    cut = len(X) - max(1, round(VALIDATION_SHARE * len(X)))
    of_mean = {name: ((Y_new - Y.mean(0)) ** 2).sum((1, 2)) for name, (Y, Y_new) in targets.items()}
    # for each layer: error on validation tasks, errors on new tasks
    profile: dict[str, list[tuple[float, np.ndarray]]] = {name: [] for name in targets}
    for layer in range(X.shape[2]):
        x, x_new = X[:, :, layer], X_new[:, :, layer]
        chosen, final = Ridge(x[:cut], x[cut:]), Ridge(x, x_new)
        for name, (Y, Y_new) in targets.items():
            validation = [chosen.errors(Y[:cut], Y[cut:], penalty).mean() for penalty in PENALTIES]
            best = int(np.argmin(validation))
            profile[name].append((float(validation[best]), final.errors(Y, Y_new, PENALTIES[best]) / of_mean[name].mean()))
    results = {}
    for name, layers in profile.items():
        layer = int(np.argmin([error for error, _ in layers]))
        results[name] = {
            "profile": [round(float(errors.mean()), 5) for _, errors in layers],
            "layer": layer,
            "errors": [round(float(e), 5) for e in layers[layer][1]],
            "of_mean": [round(float(e), 5) for e in of_mean[name] / of_mean[name].mean()],
        }
    return results


class Ridge:
    """Ridge regressions on standardized features, with a mean for each stage; one decomposition serves every target."""

    def __init__(self, X: np.ndarray, X_new: np.ndarray):
        X, X_new = X.astype(float), X_new.astype(float)
        x = (X - X.mean(0)).reshape(-1, X.shape[-1])
        scale = x.std(0)
        scale[scale <= 1e-6 * scale.max()] = np.inf  # a constant feature, or one that depends on the stage alone
        self.U, self.s, V = np.linalg.svd(x / scale, full_matrices=False)
        self.projected_new = ((X_new - X.mean(0)) / scale) @ V.T

    def errors(self, Y: np.ndarray, Y_new: np.ndarray, penalty: float) -> np.ndarray:
        """Squared errors [n] on the new tasks."""
        mean = Y.mean(0)
        shrunk = self.s / (self.s**2 + penalty)
        fitted = mean + self.projected_new @ (shrunk[:, None] * (self.U.T @ (Y - mean).reshape(-1, Y.shape[-1])))
        return ((fitted - Y_new) ** 2).sum((1, 2))
