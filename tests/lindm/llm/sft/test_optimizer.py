"""The optimizer and its schedule, by a loop over numbers."""

import dataclasses
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lindm.llm.parallel.sharding import make_mesh
from lindm.llm.sft import checkpoints
from lindm.llm.sft.optimizer import OptimizerConfig, default_learning_rate, learning_rate_schedule, make_optimizer
from lindm.llm.sft.step import init_train_state, train_state_sharding
from tests.lindm.llm import tiny

WIDE = dataclasses.replace(tiny.TINY, hidden_size=128, intermediate_size=128, vocab_size=128)  # Adafactor factors sides of 128


def rate(s: int, steps: int, peak: float, warmup: float, floor: float) -> float:
    """Learning rate of step s, counted from 0."""
    warm = min(max(1, round(warmup * steps)), steps)
    if s < warm:
        return peak * (s + 1) / warm
    along = (s - warm) / (steps - warm)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * along)) / 2)


@pytest.mark.parametrize(
    "steps, warmup, floor", [(10, 0.1, 0.1), (10, 0.0, 0.0), (10, 0.35, 0.5), (1, 0.1, 0.1), (2, 0.9, 1.0), (7, 0.99, 0)]
)
def test_the_rate_rises_in_a_line_and_falls_as_a_cosine(steps, warmup, floor):
    schedule = learning_rate_schedule(OptimizerConfig(steps=steps, learning_rate=0.3, warmup=warmup, floor=floor))
    rates = [float(schedule(s)) for s in range(steps)]
    assert rates == pytest.approx([rate(s, steps, 0.3, warmup, floor) for s in range(steps)], rel=1e-6)
    assert max(rates) == pytest.approx(0.3) and all(x > 0 for x in rates)


def test_the_optimizer_is_adamw_with_clipping_and_decays_matrices_alone():
    rng = np.random.default_rng(0)
    shapes = {"embedding": (4, 3), "lm_head": (3, 4), "norm": {"weight": (3,)}}
    shapes["blocks"] = {
        "q": {"kernel": (2, 3, 3), "bias": (2, 3), "lora_a": (2, 3, 1), "lora_b": (2, 1, 3)},
        "norm_q": {"weight": (2, 3)},
    }
    decayed = {"embedding", "lm_head", "blocks.q.kernel", "blocks.q.lora_a", "blocks.q.lora_b"}
    settings = {"steps": 5, "learning_rate": 0.1, "weight_decay": 0.3, "clip": 2.0, "beta1": 0.8, "beta2": 0.9, "warmup": 0.4}
    optimizer_config = OptimizerConfig(**settings)
    params = jax.tree.map(lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))
    paths = [".".join(k.key for k in keys) for keys, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    mine = dict(zip(paths, (x.astype(float) for x in jax.tree.leaves(params)), strict=True))
    first, second = ({path: np.zeros_like(w) for path, w in mine.items()} for _ in range(2))
    optimizer, params = make_optimizer(optimizer_config), jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)
    for s in range(5):
        size = (0.05, 1.0, 3.0, 0.2, 10.0)[s]  # the norm is below the clip in two of the steps
        grads = jax.tree.map(lambda w, size=size: (size * rng.normal(size=w.shape)).astype(np.float32), params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        flat = dict(zip(paths, (g.astype(float) for g in jax.tree.leaves(grads)), strict=True))
        norm = math.sqrt(sum((g**2).sum() for g in flat.values()))
        assert (norm > 2.0) == (s in (1, 2, 4))
        for path, g in flat.items():
            g = g * min(1.0, 2.0 / norm)
            first[path] = 0.8 * first[path] + 0.2 * g
            second[path] = 0.9 * second[path] + 0.1 * g**2
            moved = first[path] / (1 - 0.8 ** (s + 1)) / (np.sqrt(second[path] / (1 - 0.9 ** (s + 1))) + 1e-8)
            mine[path] -= rate(s, 5, 0.1, 0.4, 0.1) * (moved + 0.3 * mine[path] * (path in decayed))
    for path, w in zip(paths, jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(w, mine[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_adafactor_keeps_rows_and_columns_of_each_layer_and_clips_each_layer():
    """Numpy, layer by layer: v = r c / mean(r); the update has a root mean square of at most 1."""
    rng, settings = np.random.default_rng(1), {"steps": 3, "learning_rate": 0.1, "weight_decay": 0.2, "clip": 1e9, "warmup": 0.0}
    params = {"blocks": {"q": {"kernel": (2, 128, 130), "bias": (2, 130)}}, "embedding": (5, 3)}
    params = jax.tree.map(lambda n: jnp.asarray(rng.normal(size=n), jnp.float32), params, is_leaf=lambda x: isinstance(x, tuple))
    optimizer = make_optimizer(OptimizerConfig(optimizer="adafactor", **settings))
    state = optimizer.init(params)
    sizes = sorted(x.size for x in jax.tree.leaves(state))
    assert sizes[-4:] == [15, 2 * 128, 2 * 130, 2 * 130]  # embedding; rows, columns and the bias
    mine = {
        path: np.asarray(x, float)
        for path, x in (("kernel", params["blocks"]["q"]["kernel"]), ("embedding", params["embedding"]))
    }
    rows, columns, v = np.zeros((2, 128)), np.zeros((2, 130)), np.zeros((5, 3))
    for s in range(3):
        grads = jax.tree.map(lambda w, s=s: jnp.asarray(10.0**s * rng.normal(size=w.shape), jnp.float32), params)
        layers = jnp.array([1.0, 0.01**s], jnp.float32)[:, None, None]  # the gradients of one grow, those of the other shrink
        grads["blocks"]["q"]["kernel"] = layers * grads["blocks"]["q"]["kernel"]
        updates, state = optimizer.update(grads, state, params)
        params = cast(dict[str, Any], optax.apply_updates(params, updates))
        kept, lr = 1 - (s + 1) ** -0.8, rate(s, 3, 0.1, 0.0, 0.1)
        g, e = np.asarray(grads["blocks"]["q"]["kernel"], float), np.asarray(grads["embedding"], float)
        rows, columns = kept * rows + (1 - kept) * (g**2).mean(2), kept * columns + (1 - kept) * (g**2).mean(1)
        v = kept * v + (1 - kept) * e**2
        for layer in range(2):
            second = np.outer(rows[layer], columns[layer]) / rows[layer].mean()
            u = g[layer] / np.sqrt(second)
            u /= max(1, np.sqrt((u**2).mean()))
            mine["kernel"][layer] -= lr * (u + 0.2 * mine["kernel"][layer])
        u = e / np.sqrt(v)
        mine["embedding"] -= lr * (u / max(1, np.sqrt((u**2).mean())) + 0.2 * mine["embedding"])
    np.testing.assert_allclose(params["blocks"]["q"]["kernel"], mine["kernel"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(params["embedding"], mine["embedding"], rtol=1e-4, atol=1e-4)


def test_first_moments_in_bf16_take_two_bytes_and_hardly_change_the_steps():
    batches = [tiny.batch(i) for i in range(4)]
    f32, bf16 = (tiny.train(batches, moments=moments) for moments in ("f32", "bf16"))
    moments = [x for x in jax.tree.leaves(bf16.states[1].opt_state) if x.ndim]
    counts = {dtype: sum(x.size for x in moments if x.dtype == dtype) for dtype in (jnp.bfloat16, jnp.float32)}
    size = sum(w.size for w in bf16.after.values())
    assert counts == {jnp.bfloat16: size, jnp.float32: size}
    for path, w in f32.after.items():
        moved = np.abs(w - f32.before[path]).max()
        assert moved > 0 and np.abs(bf16.after[path] - w).max() < 0.05 * moved


@pytest.mark.parametrize("settings", [{"moments": "bf16"}, {"optimizer": "adafactor"}])
def test_a_checkpoint_has_every_bit_of_the_state_and_is_restored_on_a_mesh(tmp_path, settings):
    params = nnx.split(tiny.decoder(model_config=WIDE), nnx.Param, ...)[1]
    optimizer = make_optimizer(OptimizerConfig(steps=3, **settings))
    state = init_train_state(params, optimizer)
    grads = jax.tree.map(lambda w: 0.1 * jnp.cos(jnp.arange(w.size, dtype=jnp.float32)).reshape(w.shape), state.params)
    state = dataclasses.replace(state, opt_state=jax.jit(optimizer.update)(grads, state.opt_state, state.params)[1])
    checkpoints.save(tmp_path, 1, state, {}, keep=1)
    shardings = train_state_sharding(state, make_mesh({"fsdp": 4, "tensor": 2}, jax.devices()[:8]))
    template = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    restored = checkpoints.restore(tmp_path, template).state
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_adafactor_on_a_mesh_takes_the_steps_of_one_device():
    """A model whose matrices are wide enough to be factored: their rows and columns are on every device."""
    batches = [tiny.batch(i) for i in range(2)]
    mesh = make_mesh({"fsdp": 4, "tensor": 2}, jax.devices()[:8])
    one, many = (tiny.train(batches, m, tiny.decoder(model_config=WIDE), optimizer_name="adafactor") for m in (None, mesh))
    kept = sum(x.size for x in jax.tree.leaves(one.states[1].opt_state))
    assert kept < 0.2 * sum(w.size for w in one.after.values())
    for path, w in one.after.items():
        np.testing.assert_allclose(many.after[path], w, rtol=0, atol=1e-4, err_msg=path)


@pytest.mark.parametrize(
    "method, model_type, hidden_size, wanted",
    [
        ("full", "llama", 2000, 5e-5),
        ("lora", "llama", 2000, 5e-4),
        ("full", "llama", 4096, 2.9e-5),
        ("lora", "llama", 576, 1.3e-3),
        ("qlora", "qwen3", 1024, 5.3e-4),
        ("full", "llama", 32, 1.4e-4),
    ],
)
def test_the_default_learning_rate_depends_on_method_family_and_size(method, model_type, hidden_size, wanted):
    config = dataclasses.replace(tiny.TINY, model_type=model_type, hidden_size=hidden_size)
    assert default_learning_rate(method, config) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer": "adafactor", "moments": "bf16"}, "moments must be f32 with optimizer adafactor"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adafactor; got 'sgd'"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"learning_rate": -0.1}, "learning_rate must be at least 0"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\); got 1.0"),
        ({"floor": 1.5}, "floor must be in"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"beta1": 1.0}, "beta1 must be in"),
        ({"beta2": -0.1}, "beta2 must be in"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**({"steps": 3} | changes))
