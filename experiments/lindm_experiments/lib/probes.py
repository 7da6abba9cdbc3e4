"""What is in a language model in front of a decision, and what can be read from it by a linear map."""

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
from lindm.llm.tokens import Example, action_tokens, document_example, load_tokenizer
from lindm.text import COMPACT, Document, render

ROWS = 8  # texts of one forward pass
PENALTIES = 10.0 ** np.arange(0, 7)  # of the ridge regressions, whose features are standardized
HELD = 0.25  # share of the tasks behind a probe that choose its penalty and its layer


class Asked(NamedTuple):
    """Query episodes of new tasks, each asked about at every stage."""

    documents: list[Document]
    labels: list[list[list[int]]]  # of each document, episode by episode, the query last
    Q: np.ndarray  # [n, H, A]
    rows: list[Episode]  # the queries


def read(data: Path, shown: frozenset[str]) -> Asked:
    documents, labels, queries = [], [], []
    text = TextFormat(COMPACT, shown)
    for task in Dataset(data):
        query = task.queries[-1]
        documents.append(text.document(task, query))
        labels.append([episode.label for episode in (*task.demonstrations, query)])
        queries.append(query)
    return Asked(documents, labels, np.array([episode.Q for episode in queries]), queries)


class Reader:
    """A model, and what is in its stream in front of the actions of a query."""

    def __init__(self, directory: Path, untrained: int | None = None):
        self.tokenizer = load_tokenizer(directory)
        if untrained is None:
            model = weights.load(directory, mesh=make_mesh({"fsdp": 1}, jax.devices()[:1]))
        else:
            model = Decoder(read_model_config(directory), nnx.Rngs(untrained))
        self.graphdef, self.weights = nnx.split(model)

    def stream(self, asked: Asked) -> np.ndarray:
        """[n, H, depth + 1, D]: the stream at the last token before each action of the query."""
        A = asked.Q.shape[-1]
        spelt = action_tokens(self.tokenizer, COMPACT, A)
        if max(map(len, spelt)) > 1:
            raise ValueError("model must have a token for each action")
        self.actions = np.array([tokens[0] for tokens in spelt])
        examples = [
            document_example(self.tokenizer, render(one, COMPACT), labels, spelt, "query", "query")
            for one, labels in zip(asked.documents, asked.labels, strict=True)
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
        """Of the actions [n, H, A], from `stream`."""
        return np.asarray(_logits(self.graphdef, self.weights, stream[:, :, -1]))[..., self.actions]


@partial(jax.jit, static_argnames="graphdef")
def _stream(graphdef, weights, ids: Array, at: Array) -> Array:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    found = nnx.merge(graphdef, weights).hidden_states(ids, positions)  # [depth + 1, B, T, D]
    return jnp.take_along_axis(found, at[None, :, :, None], axis=2).transpose(1, 2, 0, 3)


@partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef, weights, last: Array) -> Array:
    model = nnx.merge(graphdef, weights)
    return model.logits(model.norm(last))


# --- a probe ---------------------------------------------------------------------------------------------------------------


Targets = dict[str, tuple[np.ndarray, np.ndarray]]
"""What is to be read: of the tasks behind the probes [n, H, k], and of new ones."""


def probe(X: np.ndarray, X_new: np.ndarray, targets: Targets) -> dict[str, dict[str, Any]]:
    """Of each target: the errors of every layer, the layer chosen on tasks held out, and its errors on each new task.

    X [n, H, layers, D]. Beside them are those of the mean of each stage, whose average is the unit.
    """
    cut = len(X) - max(1, round(HELD * len(X)))
    of_mean = {name: ((Y_new - Y.mean(0)) ** 2).sum((1, 2)) for name, (Y, Y_new) in targets.items()}
    # of each layer: when held out, and on new
    profile: dict[str, list[tuple[float, np.ndarray]]] = {name: [] for name in targets}
    for layer in range(X.shape[2]):
        x, x_new = X[:, :, layer], X_new[:, :, layer]
        chosen, final = Ridge(x[:cut], x[cut:]), Ridge(x, x_new)
        for name, (Y, Y_new) in targets.items():
            held = [chosen.errors(Y[:cut], Y[cut:], penalty).mean() for penalty in PENALTIES]
            best = int(np.argmin(held))
            profile[name].append((float(held[best]), final.errors(Y, Y_new, PENALTIES[best]) / of_mean[name].mean()))
    found = {}
    for name, layers in profile.items():
        layer = int(np.argmin([held for held, _ in layers]))
        found[name] = {
            "profile": [round(float(errors.mean()), 5) for _, errors in layers],
            "layer": layer,
            "errors": [round(float(e), 5) for e in layers[layer][1]],
            "of_mean": [round(float(e), 5) for e in of_mean[name] / of_mean[name].mean()],
        }
    return found


class Ridge:
    """Ridge regressions on standardized features, beside a mean for each stage; one decomposition serves every target."""

    def __init__(self, X: np.ndarray, X_new: np.ndarray):
        X, X_new = X.astype(float), X_new.astype(float)
        x = (X - X.mean(0)).reshape(-1, X.shape[-1])
        scale = x.std(0)
        scale[scale <= 1e-6 * scale.max()] = np.inf  # tells the stage at most
        self.U, self.s, V = np.linalg.svd(x / scale, full_matrices=False)
        self.told = ((X_new - X.mean(0)) / scale) @ V.T

    def errors(self, Y: np.ndarray, Y_new: np.ndarray, penalty: float) -> np.ndarray:
        """Squared errors [n] on the new tasks."""
        mean = Y.mean(0)
        shrunk = self.s / (self.s**2 + penalty)
        fitted = mean + self.told @ (shrunk[:, None] * (self.U.T @ (Y - mean).reshape(-1, Y.shape[-1])))
        return ((fitted - Y_new) ** 2).sum((1, 2))
