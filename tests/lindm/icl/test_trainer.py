"""Training must find the closed form A_N, which is computed here in numpy: by formula for Gaussian features, and by enumeration
of the finite design for one-hot and simplex features."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lindm.icl import FullAttention, ReducedAttention, SoftmaxAttention, pad, predict_many, query_columns, train, train_many
from lindm.icl import trainer as trainer_module
from lindm.types import Prompt

B, N = 256, 32
F32 = jnp.float32


def draw_gaussian(key, root, n=N):
    """Lambda = root root', w ~ N(0, I), the first n of N pairs."""
    features, task = jax.random.split(key)
    d = root.shape[0]
    x = jax.random.normal(features, (B, N, d), root.dtype) @ root.T
    w = jax.random.normal(task, (B, d), root.dtype)
    return finish(x, w, root @ root.T, n)


def draw_design(key, phi, mean, root):
    """Rows of phi[K,d] with equal chances, w ~ N(mean, root root')."""
    rows, task = jax.random.split(key)
    x = phi[jax.random.randint(rows, (B, N), 0, phi.shape[0])]
    w = mean[None] + jax.random.normal(task, (B, mean.shape[0]), phi.dtype) @ root.T
    return finish(x, w, phi.T @ phi / phi.shape[0], N)


def finish(x, w, Lambda, n):
    query = query_columns(Lambda)
    prompt = Prompt(x=x, y=jnp.einsum("bnd,bd->bn", x, w), query=jnp.broadcast_to(query, (len(w), *query.shape)))
    return pad(prompt, n), w @ query.T


def closed_form(Lambda, Psi, K, n):
    return Psi @ Lambda @ np.linalg.inv((1 - 1 / n) * Lambda @ Psi @ Lambda + K / n)


def closed_form_of_design(phi, mean, root, n=N):
    Psi = np.outer(mean, mean) + root @ root.T
    K = np.einsum("ki,kj,jl,kl,km->im", phi, phi, Psi, phi, phi) / len(phi)
    return closed_form(phi.T @ phi / len(phi), Psi, K, n)


def closed_form_of_gaussian(Lambda, n):
    return closed_form(Lambda, np.eye(len(Lambda)), 2 * Lambda @ Lambda + np.trace(Lambda) * Lambda, n)


def relative_error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def f32(*arrays):
    return tuple(jnp.asarray(a, F32) for a in arrays)


@pytest.mark.parametrize("n", [8, N])
def test_gaussian_training_finds_the_inverse_of_gamma(n):
    Lambda = np.diag([2.0, 1.0, 1.0, 0.5, 0.5])
    gamma = (1 + 1 / n) * Lambda + np.trace(Lambda) / n * np.eye(5)
    np.testing.assert_allclose(closed_form_of_gaussian(Lambda, n), np.linalg.inv(gamma), rtol=1e-12)
    layer, _ = train(ReducedAttention(5), draw_gaussian, jax.random.key(0), steps=1000, data=(*f32(np.sqrt(Lambda)), n))
    assert relative_error(layer.A[0], np.linalg.inv(gamma)) < 0.02


def test_onehot_training_finds_its_own_closed_form_and_not_the_gaussian_one():
    phi, mean, root = np.eye(6), np.zeros(6), np.eye(6)
    want = closed_form_of_design(phi, mean, root)
    np.testing.assert_allclose(want, np.linalg.inv((1 - 1 / N) * np.eye(6) / 6 + np.eye(6) / N), rtol=1e-12)
    layer, _ = train(ReducedAttention(6), draw_design, jax.random.key(0), steps=500, data=f32(phi, mean, root))
    assert relative_error(layer.A[0], want) < 0.02
    assert relative_error(layer.A[0], closed_form_of_gaussian(np.eye(6) / 6, N)) > 0.04


@pytest.mark.parametrize("d", [4, 6])
def test_simplex_training_finds_the_closed_form_with_a_nonzero_mean_task(d):
    rng = np.random.default_rng(d)
    rows = rng.exponential(size=(60, d))
    phi, mean, root = rows / rows.sum(axis=1, keepdims=True), np.full(d, 1.5), 0.3 * np.eye(d) + 0.3 * rng.random((d, d))
    layer, _ = train(
        ReducedAttention(d), draw_design, jax.random.key(0), steps=3000, learning_rate=0.3, data=f32(phi, mean, root)
    )
    assert relative_error(layer.A[0], closed_form_of_design(phi, mean, root)) < 0.03


def test_the_full_layer_finds_the_same_product_and_does_not_leak_when_odd_moments_vanish():
    layer, losses = train(
        FullAttention(3, scale=0.3), draw_gaussian, jax.random.key(0), steps=1000, learning_rate=0.05, data=f32(np.eye(3))
    )
    assert relative_error(layer.A[0], closed_form_of_gaussian(np.eye(3), N)) < 0.02
    assert layer.leak()[0] < 0.02
    assert losses[-50:].mean() < 0.5 * losses[0]


def test_a_second_block_lowers_the_loss_below_the_best_single_block():
    start = ReducedAttention(3, 2, A=jnp.stack([0.3 * jnp.eye(3, dtype=F32), 0.9 * jnp.eye(3, dtype=F32)]))
    root = f32(np.diag([1.5, 1.0, 0.5]))
    _, shallow = train(ReducedAttention(3), draw_gaussian, jax.random.key(0), steps=300, data=root)
    _, deep = train(start, draw_gaussian, jax.random.key(0), steps=300, data=root)
    assert deep[-50:].mean() < 0.5 * shallow[-50:].mean()


def test_softmax_attention_trains_through_the_same_interface():
    _, losses = train(
        SoftmaxAttention(3, scale=0.3), draw_gaussian, jax.random.key(0), steps=200, learning_rate=0.02, data=f32(np.eye(3))
    )
    assert losses[-20:].mean() < 0.7 * losses[0]


def test_query_columns_have_the_given_second_moment():
    a = np.random.default_rng(0).normal(size=(4, 4))
    Lambda = a @ a.T + np.eye(4)
    columns = np.asarray(query_columns(jnp.asarray(Lambda)))
    np.testing.assert_allclose(columns.T @ columns / 4, Lambda, rtol=1e-12)


def test_parallel_runs_equal_single_runs():
    keys, ns = jax.random.split(jax.random.key(5), 3), jnp.array([4, 9, N])
    roots = jnp.stack([F32(s) * jnp.eye(2, dtype=F32) for s in (0.5, 1.0, 1.5)])
    many, losses = train_many(ReducedAttention(2), draw_gaussian, keys, steps=20, data=(roots, ns))
    assert many.A.shape == (3, 1, 2, 2) and losses.shape == (3, 20)
    prompts = jax.tree.map(lambda *a: jnp.stack(a), *[draw_gaussian(k, r)[0] for k, r in zip(keys, roots, strict=True)])
    yhat = predict_many(many, prompts)
    for i in range(3):
        one, loss = train(ReducedAttention(2), draw_gaussian, keys[i], steps=20, data=(roots[i], ns[i]))
        np.testing.assert_allclose(many.A[i], one.A[...], rtol=1e-4)
        np.testing.assert_allclose(losses[i], loss, rtol=1e-4)
        prompt = jax.tree.map(lambda a, i=i: a[i], prompts)
        np.testing.assert_allclose(yhat[i], jax.vmap(one)(prompt), rtol=1e-3, atol=1e-5)


def test_plain_sgd_takes_the_steps_that_numpy_takes():
    optimizer, rate, key, root = optax.sgd(0.1), 0.1, jax.random.key(3), jnp.eye(2)
    layer, losses = train(
        ReducedAttention(2, dtype=jnp.float64), draw_gaussian, key, steps=4, data=(root,), optimizer=optimizer, average=0.0
    )
    A, want = np.zeros((2, 2)), []
    for t in range(4):
        prompt, target = draw_gaussian(jax.random.fold_in(key, t), root)
        x, y, query, target = (np.asarray(a) for a in (prompt.x, prompt.y, prompt.query, target))
        S = np.einsum("bnd,bn->bd", x, y) / N
        error = np.einsum("bqi,ij,bj->bq", query, A, S) - target
        want.append((error**2).mean())
        A = A - rate * 2 * np.einsum("bq,bqi,bj->ij", error, query, S) / error.size
    np.testing.assert_allclose(losses, want, rtol=1e-12)
    np.testing.assert_allclose(layer.A[0], A, rtol=1e-12)


def test_averaging_returns_the_mean_of_the_last_iterates():
    optimizer, key, data = optax.sgd(0.1), jax.random.key(3), (jnp.eye(2),)

    def run(steps, average):
        start = ReducedAttention(2, dtype=jnp.float64)
        return train(start, draw_gaussian, key, steps=steps, data=data, optimizer=optimizer, average=average)[0].A[0]

    np.testing.assert_allclose(run(4, 0.5), np.mean([run(s, 0.0) for s in (3, 4)], axis=0), rtol=1e-12)
    np.testing.assert_array_equal(run(1, 0.9), run(1, 0.0))


def test_the_learning_rate_is_positive_at_the_first_step():
    layer, _ = train(ReducedAttention(2), draw_gaussian, jax.random.key(0), steps=1, data=f32(np.eye(2)))
    assert np.all(np.diag(layer.A[0]) > 0)


def test_the_layer_given_is_not_modified_and_the_same_key_gives_the_same_run():
    start = ReducedAttention(2)
    first, losses = train(start, draw_gaussian, jax.random.key(0), steps=5, data=f32(np.eye(2)))
    again, same = train(start, draw_gaussian, jax.random.key(0), steps=5, data=f32(np.eye(2)))
    assert not np.any(start.A[...])
    np.testing.assert_array_equal(first.A[...], again.A[...])
    np.testing.assert_array_equal(losses, same)
    assert first.A.dtype == F32


def test_new_seeds_and_new_data_do_not_compile_again():
    before = None
    for seed in range(3):
        data = (*f32((1 + seed) * np.eye(2)), 5 + seed)
        train(ReducedAttention(2), draw_gaussian, jax.random.key(seed), steps=7, learning_rate=0.1 + seed, data=data)
        size = trainer_module._fit._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
        before = size if before is None else before
        assert size == before


def draw_poisoned(key, root):
    prompt, target = draw_gaussian(key, root)
    poisoned = jax.random.key_data(key)[..., -1] == jax.random.key_data(jax.random.fold_in(jax.random.key(0), 6))[..., -1]
    return prompt, jnp.where(poisoned, jnp.nan, target)


@pytest.mark.fault("F9")
def test_a_loss_that_is_not_finite_names_its_step():
    with pytest.raises(FloatingPointError, match="got nan at step 6 of 10"):
        train(ReducedAttention(2), draw_poisoned, jax.random.key(0), steps=10, data=f32(np.eye(2)))
    with pytest.raises(FloatingPointError, match="run 1, step 6 of 10"):
        keys = jnp.stack([jax.random.key(1), jax.random.key(0)])
        train_many(ReducedAttention(2), draw_poisoned, keys, steps=10, data=f32(np.stack([np.eye(2)] * 2)))


def test_clipping_bounds_the_first_step_of_plain_descent():
    # Adam's first step has the length of the rate whatever the clip; a run must still go through with it
    _, losses = train(ReducedAttention(2), draw_gaussian, jax.random.key(0), steps=50, clip=0.1, data=f32(np.eye(2)))
    assert losses[-1] < losses[0]


def draw_badly(key):
    prompt, target = draw_gaussian(key, jnp.eye(2))
    return prompt, target[:, :1]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"steps": 0}, "steps must be an integer >= 1; got 0"),
        ({"steps": 2.5}, "steps must be an integer >= 1; got 2.5"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite; got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\); got 1.0"),
        ({"average": -0.1}, r"average must be in \[0, 1\); got -0.1"),
        ({"clip": 0.0}, "clip must be positive; got 0.0"),
    ],
)
def test_a_wrong_option_is_named_with_its_rule(options, rule):
    with pytest.raises(ValueError, match=rule):
        train(ReducedAttention(2), draw_gaussian, jax.random.key(0), **{"steps": 3, "data": f32(np.eye(2))} | options)


def test_a_draw_and_data_that_do_not_fit_raise_an_error():
    with pytest.raises(ValueError, match=r"draw must return target\[B,Q\]"):
        train(ReducedAttention(2), draw_badly, jax.random.key(0), steps=3)
    with pytest.raises(ValueError, match="data must have the leading axis R = 2"):
        keys = jax.random.split(jax.random.key(0))
        train_many(ReducedAttention(2), draw_gaussian, keys, steps=3, data=f32(np.ones((3, 2, 2))))


def test_an_optimizer_that_is_given_is_used_with_other_layers_state_untouched():
    table = 0.1 * jnp.ones((N + 1, 3))
    layer = SoftmaxAttention(2, positions=table, train_positions=False)
    trained, _ = train(layer, draw_gaussian, jax.random.key(0), steps=3, optimizer=optax.adam(1e-2), data=f32(np.eye(2)))
    assert trained.positions is not None
    np.testing.assert_array_equal(trained.positions[...], table.astype(F32))
    assert isinstance(nnx.state(trained, nnx.Param), nnx.State)
