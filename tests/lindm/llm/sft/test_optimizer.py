"""The optimizer and its schedule, by a loop over numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lindm.llm.sft.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer


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


@pytest.mark.parametrize(
    "changes, message",
    [
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
