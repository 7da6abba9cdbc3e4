"""The layers against the paper's formulas, written out in numpy with the N x N matrices that the code never builds."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lindm.icl.attention import FullAttention, ReducedAttention, SoftmaxAttention, embed, moments, pad, sinusoidal
from lindm.types import Prompt

d, N, Q = 3, 7, 4


def a_prompt(seed=0, n=N, queries=Q):
    rng = np.random.default_rng(seed)
    return Prompt(
        x=jnp.asarray(rng.normal(size=(n, d))),
        y=jnp.asarray(rng.normal(size=n)),
        query=jnp.asarray(rng.normal(size=(queries, d))),
    )


def randomised(layer, seed=1, scale=0.3):
    """Every parameter replaced by a dense one, so that no block hides behind a zero."""
    rng = np.random.default_rng(seed)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * scale), params)
    return nnx.merge(graphdef, params, rest)


def brute_force(prompt, W_PV, W_KQ, attend, table=None):
    """E <- E - F(E), one query at a time, with the whole score matrix and a mask; minus what is written below the query."""
    x, y, queries = (np.asarray(a, float) for a in (prompt.x, prompt.y, prompt.query))
    n, out = len(y), []
    for query in queries:
        E = np.vstack([np.column_stack([x.T, query]), np.append(y, 0.0)])
        if table is not None:
            E = E + np.asarray(table)[: n + 1].T
        start = E[-1, -1]
        mask = np.diag(np.append(np.ones(n), 0.0))
        for P, K in zip(np.asarray(W_PV), np.asarray(W_KQ), strict=True):
            E = E - P @ E @ mask @ attend(E.T @ K @ E, n)
        out.append(start - E[-1, -1])
    return np.array(out)


def linear(scores, n):
    return scores / n


def softmax(scores, n):
    e = np.exp(scores - scores[:n].max(axis=0))
    return e / e[:n].sum(axis=0)


def test_the_embedding_has_the_labels_and_a_zero_in_its_last_row():
    prompt = a_prompt()
    context, query = embed(prompt)
    np.testing.assert_array_equal(context, np.vstack([np.asarray(prompt.x).T, np.asarray(prompt.y)]))
    np.testing.assert_array_equal(query, np.vstack([np.asarray(prompt.query).T, np.zeros(Q)]))


def test_full_attention_at_depth_one_is_the_formula_of_the_paper_in_blocks():
    layer, prompt = randomised(FullAttention(d)), a_prompt()
    x, y, query = (np.asarray(a) for a in (prompt.x, prompt.y, prompt.query))
    G, S, c = x.T @ x / N, x.T @ y / N, y @ y / N
    U, z, v, u = (np.asarray(a)[0] for a in (layer.U, layer.z, layer.v, layer.u))
    row = v @ G @ U + u * S @ U + (v @ S) * z + u * c * z
    np.testing.assert_allclose(layer(prompt), query @ row, rtol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_full_attention_through_the_moment_matrix_equals_the_masked_score_matrix(depth):
    layer, prompt = randomised(FullAttention(d, depth)), a_prompt()
    want = brute_force(prompt, layer.W_PV[...], layer.W_KQ[...], linear)
    np.testing.assert_allclose(layer(prompt), want, rtol=1e-11)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("positions", [False, True])
def test_softmax_attention_equals_brute_force_with_the_query_masked_out_of_the_keys(depth, positions):
    table = jnp.asarray(np.random.default_rng(5).normal(size=(N + 3, d + 1))) if positions else None
    layer = randomised(SoftmaxAttention(d, depth, positions=table, train_positions=False))
    prompt = a_prompt()
    want = brute_force(prompt, layer.W_PV[...], layer.W_KQ[...], softmax, None if table is None else table.astype(jnp.float32))
    np.testing.assert_allclose(layer(prompt), want, rtol=1e-11)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_reduced_attention_takes_preconditioned_gradient_steps(depth):
    layer, prompt = randomised(ReducedAttention(d, depth)), a_prompt()
    x, y = np.asarray(prompt.x), np.asarray(prompt.y)
    w = np.zeros(d)
    for A in np.asarray(layer.A[...]):
        w = w + A @ x.T @ (y - x @ w) / N
    np.testing.assert_allclose(layer(prompt), np.asarray(prompt.query) @ w, rtol=1e-12)


@pytest.mark.parametrize("depth", [1, 3])
def test_full_attention_as_initialized_is_the_reduced_layer_with_its_matrix_a(depth):
    full = FullAttention(d, depth, rngs=nnx.Rngs(0), scale=0.7, dtype=jnp.float64)
    reduced = ReducedAttention(d, depth, A=full.A)
    np.testing.assert_allclose(full(a_prompt()), reduced(a_prompt()), rtol=1e-12)
    np.testing.assert_array_equal(full.leak(), np.zeros(depth))


@pytest.mark.parametrize("rngs", [None, nnx.Rngs(3)])
@pytest.mark.parametrize("layer", [FullAttention, SoftmaxAttention])
def test_the_initialization_is_that_of_zhang_frei_bartlett(layer, rngs):
    layer = layer(d, 2, rngs=rngs, scale=0.5, dtype=jnp.float64)
    for U, u, z, v in zip(layer.U, layer.u, layer.z, layer.v, strict=True):
        assert np.linalg.norm(U) == pytest.approx(0.5, rel=1e-12)
        assert np.linalg.eigvalsh(np.asarray(U)).min() > -1e-12
        assert float(u) == 0.5 and not np.any(z) and not np.any(v)
    assert np.count_nonzero(layer.W_PV[...]) == 2


def every_layer():
    table = jnp.asarray(np.random.default_rng(5).normal(size=(2 * N + 2, d + 1)))
    kinds = (FullAttention, ReducedAttention, SoftmaxAttention)
    layers = [randomised(kind(d, depth)) for kind in kinds for depth in (1, 2)]
    return [*layers, randomised(SoftmaxAttention(d, 2, positions=table))]


@pytest.mark.parametrize("layer", every_layer())
def test_a_query_column_never_influences_another_one(layer):
    prompt = a_prompt()
    alone = [layer(Prompt(x=prompt.x, y=prompt.y, query=prompt.query[i : i + 1]))[0] for i in range(Q)]
    np.testing.assert_allclose(layer(prompt), np.array(alone), rtol=1e-10)


@pytest.mark.parametrize("layer", every_layer())
def test_vmap_over_prompts_is_a_loop_over_prompts(layer):
    prompts = [a_prompt(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *prompts)
    np.testing.assert_allclose(jax.vmap(layer)(stacked), np.stack([layer(p) for p in prompts]), rtol=1e-10)


@pytest.mark.parametrize("kind", [FullAttention, ReducedAttention])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("n", [1, 3, N])
def test_padding_a_prompt_is_exact_for_the_linear_layers(kind, depth, n):
    layer, prompt = randomised(kind(d, depth)), a_prompt()
    short = Prompt(x=prompt.x[:n], y=prompt.y[:n], query=prompt.query)
    np.testing.assert_allclose(layer(jax.jit(pad)(prompt, jnp.asarray(n))), layer(short), rtol=1e-11)
    np.testing.assert_allclose(moments(pad(prompt, n)), moments(short), rtol=1e-12)


def test_padding_reaches_prompts_behind_leading_axes():
    stacked = jax.tree.map(lambda *a: jnp.stack(a), a_prompt(0), a_prompt(1))
    one = pad(a_prompt(1), 3)
    np.testing.assert_array_equal(pad(stacked, 3).x[1], one.x)
    np.testing.assert_array_equal(pad(stacked, 3).y[1], one.y)


def test_linear_layers_do_not_see_the_order_of_the_pairs_and_positions_do():
    prompt = a_prompt()
    turned = Prompt(x=prompt.x[::-1], y=prompt.y[::-1], query=prompt.query)
    for layer in (randomised(FullAttention(d, 2)), randomised(SoftmaxAttention(d, 2))):
        np.testing.assert_allclose(layer(prompt), layer(turned), rtol=1e-9)
    placed = randomised(SoftmaxAttention(d, 2, positions=sinusoidal(N + 1, d + 1)))
    assert np.abs(placed(prompt) - placed(turned)).max() > 1e-3


def test_small_softmax_attention_is_linear_attention_on_centered_pairs():
    # softmax(s)_i = (1 + s_i - mean s) / N + O(s^2), so F = u (mean y + cov(y, x) U x_q)
    layer, prompt = SoftmaxAttention(d, scale=1e-4, dtype=jnp.float64), a_prompt()
    x, y, query = (np.asarray(a) for a in (prompt.x, prompt.y, prompt.query))
    U, u = np.asarray(layer.U[0]), float(layer.u[0])
    want = u * (y.mean() + query @ U @ ((x - x.mean(0)).T @ y / N))
    np.testing.assert_allclose(layer(prompt), want, rtol=1e-6)


def test_fixed_positions_are_not_parameters_and_learned_ones_are():
    table = sinusoidal(N + 1, d + 1)
    names = lambda layer: set(nnx.to_flat_state(nnx.state(layer, nnx.Param)).paths)  # noqa: E731
    assert ("positions",) in names(SoftmaxAttention(d, positions=table))
    assert ("positions",) not in names(SoftmaxAttention(d, positions=table, train_positions=False))


def test_sinusoidal_positions_are_the_textbook_ones():
    table = np.asarray(sinusoidal(5, 4, scale=2.0))
    for p in range(5):
        want = [np.sin(p), np.cos(p), np.sin(p / 100), np.cos(p / 100)]
        np.testing.assert_allclose(table[p], 2 * np.array(want), rtol=1e-12)


def test_float32_parameters_are_measured_in_the_precision_of_the_prompt():
    layer = ReducedAttention(d, A=jnp.eye(d, dtype=jnp.float32))
    assert layer(a_prompt()).dtype == jnp.float64
    assert layer(jax.tree.map(lambda a: a.astype(jnp.float32), a_prompt())).dtype == jnp.float32


def test_the_cost_is_linear_in_the_number_of_pairs_and_queries():
    def flops(n):
        shapes = jax.eval_shape(lambda: a_prompt(0, 1, 1))
        shapes = Prompt(
            x=jax.ShapeDtypeStruct((n, d), shapes.x.dtype),
            y=jax.ShapeDtypeStruct((n,), shapes.x.dtype),
            query=jax.ShapeDtypeStruct((1, d), shapes.x.dtype),
        )
        return jax.jit(randomised(FullAttention(d, 3))).lower(shapes).compile().cost_analysis()["flops"]  # pyright: ignore[reportOptionalSubscript]

    assert flops(4000) / flops(1000) < 4.2


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: ReducedAttention(0), "d must be at least 1; got 0"),
        (lambda: FullAttention(3, 0), "depth must be at least 1; got 0"),
        (lambda: FullAttention(3, scale=0.0), "scale must be positive"),
        (lambda: ReducedAttention(3, A=jnp.eye(2)), r"A must have shape \(3, 3\)"),
        (lambda: SoftmaxAttention(3, positions=jnp.zeros((9, 3))), r"positions must have shape \[P, d\+1\]"),
        (lambda: SoftmaxAttention(3, positions=jnp.zeros((N, 4)))(a_prompt()), "positions must have a row for each of the N = 7"),
        (lambda: SoftmaxAttention(3, heads=0), "heads must be at least 1; got 0"),
        (lambda: ReducedAttention(4)(a_prompt()), "prompt must have d = 4 features"),
        (lambda: FullAttention(3)(jax.tree.map(lambda a: a[None], a_prompt())), "vmap for more"),
        (lambda: pad(a_prompt(), N + 1), "n must be between 1 and the number of pairs N = 7; got 8"),
        (lambda: ReducedAttention(3)(a_prompt(n=0)), "at least one pair"),
    ],
)
def test_a_wrong_argument_is_named_with_its_rule(make, rule):
    with pytest.raises(ValueError, match=rule):
        make()


def a_batch(prompts):
    return jax.tree.map(lambda *a: jnp.stack(a), *prompts)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", [ReducedAttention, FullAttention])
@pytest.mark.parametrize("n", [1, 32, 33, 71])
def test_a_batch_has_the_predictions_and_derivatives_of_its_prompts(kind, depth, n):
    """The lengths are below, at and beyond the number of products that are added in one expression."""
    layer = randomised(kind(d, depth, dtype=jnp.float64))
    prompts = a_batch([a_prompt(seed, n) for seed in range(5)])
    graphdef, params = nnx.split(layer)

    def loss(predict, params, prompts):
        return jnp.sum(jnp.sin(predict(nnx.merge(graphdef, params))(prompts)))

    batched, mapped = (
        jax.value_and_grad(lambda *a, predict=predict: loss(predict, *a), (0, 1))(params, prompts)
        for predict in (lambda layer: layer.predict_batch, jax.vmap)
    )
    chex.assert_trees_all_close(layer.predict_batch(prompts), jax.vmap(layer)(prompts), rtol=1e-12, atol=1e-12)
    chex.assert_trees_all_close(batched, mapped, rtol=1e-11, atol=1e-12)


def test_a_batch_of_other_features_raises_the_error_of_one_prompt():
    prompts = a_batch([a_prompt(seed) for seed in range(2)])
    for layer in (ReducedAttention(d + 1), FullAttention(d + 1)):
        with pytest.raises(ValueError, match=f"prompt must have d = {d + 1} features"):
            layer.predict_batch(prompts)
