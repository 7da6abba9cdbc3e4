"""What a training step changes, what it leaves alone, and what it reports."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.llm.parallel.sharding import make_mesh
from tests.lindm.llm import tiny


def test_with_adapters_nothing_else_changes():
    trained = tiny.train([tiny.batch(i) for i in range(3)], lora=3, weight_decay=0.1)
    names = [f"blocks.{name}.lora_{half}" for name in ("q", "k", "v", "o", "gate", "up", "down") for half in "ab"]
    assert sorted(trained.after) == sorted(names)
    assert all(np.abs(trained.after[name] - trained.before[name]).max() > 1e-4 for name in names)
    still, after = trained.frozen
    assert still.keys() == after.keys() and "embedding" in still and "blocks.q.kernel" in still
    assert all((still[name] == after[name]).all() for name in still)


def test_the_first_step_of_adapters_changes_b_alone():
    """B is 0 at first, so the loss does not depend on A yet."""
    trained = tiny.train([tiny.batch(0)], lora=3)
    for name in trained.after:
        changed = (trained.after[name] != trained.before[name]).any()
        assert changed == name.endswith(".lora_b"), name


@pytest.mark.fault("F9")
def test_a_step_whose_loss_is_not_finite_is_reported_and_changes_nothing():
    batch, model = tiny.batch(0), tiny.decoder()
    model.norm.weight[...] = model.norm.weight[...].at[3].set(jnp.inf)
    trained = tiny.train([batch], model=model)
    assert not trained.metrics[0]["finite"] and not math.isfinite(trained.metrics[0]["loss"])
    before, after = (jax.tree.leaves(state) for state in trained.states)
    assert len(before) > 30 and all((a == b).all() for a, b in zip(before, after, strict=True))


@pytest.mark.fault("F9")
def test_a_step_whose_gradient_alone_overflows_changes_neither_weights_nor_moments_nor_counts():
    """The last norm has small weights and the head large ones: their product is usual, and the gradient of the norm is huge."""
    model = tiny.decoder()
    model.norm.weight[...] = 1e-25 * model.norm.weight[...]
    assert model.lm_head is not None
    model.lm_head[...] = 1e25 * model.lm_head[...]
    trained = tiny.train([tiny.batch(0)], model=model)
    assert math.isfinite(trained.metrics[0]["loss"]) and not math.isfinite(trained.metrics[0]["grad_norm"])
    before, after = (jax.tree.leaves(state) for state in trained.states)
    assert not trained.metrics[0]["finite"] and all((a == b).all() for a, b in zip(before, after, strict=True))


@pytest.mark.fault("F9")
def test_weights_that_are_not_finite_after_a_finite_gradient_are_reported():
    trained = tiny.train([tiny.batch(0)], learning_rate=3e38, warmup=0.0, weight_decay=3.0)
    assert math.isfinite(trained.metrics[0]["loss"]) and not trained.metrics[0]["finite"]


@pytest.mark.fault("F3")
def test_any_process_can_ask_all_to_stop():
    flags = [0, np.array([0, 0, 0, 0, 0, 1, 0, 0], np.int32)]
    trained = tiny.train([tiny.batch(0), tiny.batch(1)], make_mesh({"fsdp": 8}), stops=flags)
    assert [m["stop"] for m in trained.metrics] == [0, 1]
