"""Layers on twin tasks: the blocks of a full layer, and shares of wrong actions from every context, pair by pair."""

from itertools import product

import jax.numpy as jnp
import numpy as np

from lindm.icl.attention import FullAttention
from lindm.types import Prompt
from lindm_experiments.lib import twin_layers


def test_the_blocks_of_a_full_layer_are_where_its_formula_has_them():
    rng = np.random.default_rng(2)
    v, U, u, z, x, y = (
        rng.normal(size=2),
        rng.normal(size=(2, 2)),
        rng.normal(),
        rng.normal(size=2),
        *(rng.normal(size=s) for s in ((5, 2), 5)),
    )
    layer = FullAttention(2, dtype=np.float64)
    W_PV, W_KQ = twin_layers.embedded(v, U, u, z)
    layer.W_PV[...], layer.W_KQ[...] = W_PV[None], W_KQ[None]
    G, S, c = x.T @ x / 5, x.T @ y / 5, y @ y / 5
    got = layer(Prompt(x=jnp.asarray(x), y=jnp.asarray(y), query=jnp.eye(2)))
    np.testing.assert_allclose(got, v @ G @ U + u * S @ U + (v @ S) * z + u * c * z, rtol=1e-9)


def test_the_shares_of_wrong_actions_are_those_of_all_sequences_of_pairs_in_numpy():
    """Scores of each layer from the pairs themselves: v'G U + u S'U + (v'S) z' + u c z' of a full one, A S of a reduced one."""
    rng, M, visit, depth = np.random.default_rng(5), 3, 0.4, 2
    x, w = rng.uniform(0.5, 2.0, size=(2, 2, 1)) * np.eye(2), rng.normal(size=(2, 2))
    reduced, step = rng.normal(size=(4, 2, 2)), np.diag([0.3, 0.2])
    blocks = [(rng.normal(size=2), rng.normal(size=(2, 2)), rng.normal(), rng.normal(size=2)) for _ in range(3)]
    full = tuple(jnp.asarray(np.stack(part)) for part in zip(*(twin_layers.embedded(*b) for b in blocks), strict=True))

    def scores(pairs, y):
        G, S, c = pairs.T @ pairs / M, pairs.T @ y / M, y @ y / M
        deep = np.zeros(2)
        for _ in range(depth):
            deep = deep + step @ (S - G @ deep)
        return [A @ S for A in reduced], [v @ G @ U + u * S @ U + (v @ S) * z + u * c * z for v, U, u, z in blocks], [deep]

    wrong = [np.zeros(4), np.zeros(3), np.zeros(1)]
    for task, sign, actions in product(range(2), (1, -1), product(range(2), repeat=M)):
        chance = np.prod([visit if a == 0 else 1 - visit for a in actions]) / 4
        pairs = x[task][list(actions)]
        for total, found in zip(wrong, scores(pairs, sign * pairs @ w[task]), strict=True):
            total += chance * (np.argmax(found, axis=-1) != np.argmax(sign * w[task]))
    n = np.arange(M + 1)
    law = np.array([1, 3, 3, 1]) * visit**n * (1 - visit) ** (M - n)
    arrays = [jnp.asarray(v) for v in (step, x, w, np.stack([n, M - n], axis=1) / M, law)]
    for got, expected in zip(twin_layers.wrong_shares(jnp.asarray(reduced), full, *arrays, depth=depth), wrong, strict=True):
        np.testing.assert_allclose(np.ravel(got), expected, atol=1e-12)
