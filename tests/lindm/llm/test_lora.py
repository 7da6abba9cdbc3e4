"""Low-rank adapters: targets, scaling, dropout, and devices in another order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lindm.llm import lora
from lindm.llm.model_families import FAMILIES, parse_lora_targets
from lindm.llm.parallel.sharding import make_mesh
from tests.lindm.llm import tiny


@pytest.mark.parametrize(
    "text, modules",
    [
        ("all", ("q", "k", "v", "o", "gate", "up", "down")),
        ("attention", ("q", "k", "v", "o")),
        ("mlp", ("gate", "up", "down")),
        ("v_proj, q_proj", ("q", "v")),
        ("down_proj,attention", ("q", "k", "v", "o", "down")),
        ("qkv_proj", ("q", "k", "v")),
    ],
)
def test_target_modules_are_groups_or_names_as_in_peft(text, modules):
    assert parse_lora_targets(text) == modules


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match=r"lora_targets .*'q_prj'.* did you mean q_proj"):
        parse_lora_targets("q_prj")
    with pytest.raises(ValueError, match=r"lora_targets .*'qkv_proj'"):
        parse_lora_targets("qkv_proj", (FAMILIES["llama"],))
    with pytest.raises(ValueError, match="lora_targets must name a module"):
        parse_lora_targets(" , ")


def test_rslora_divides_alpha_by_the_root_of_the_rank():
    model = lora.add_lora(tiny.decoder(), 9, 6.0, jax.random.key(0), ("q",), "rslora")
    assert model.blocks.q.lora_scale == 2 and model.blocks.k.lora_a is None


# --- dropout ---------------------------------------------------------------------------------------------------------------

RATE = 0.25


def dropped(model, key, names=("q", "o")):
    """What the adapters of these square modules do to ones [modules, layers, tokens, features]; A, B and scale are 1."""
    lora.draw_dropout(model, key)
    x = jnp.ones((50, 32), jnp.float32)

    def layer(linear, i):
        graphdef, state = nnx.split(linear)
        return np.asarray(nnx.merge(graphdef, jax.tree.map(lambda w: w[i], state))(x))

    return np.array([[layer(getattr(model.blocks, name), i) for i in range(2)] for name in names])


@pytest.fixture
def identities():
    model = lora.add_lora(tiny.decoder(model_config=dataclasses.replace(tiny.TINY, qkv_bias=False)), 32, 32.0, jax.random.key(0))
    lora.set_dropout(model, RATE)
    for name in ("q", "o"):
        linear, eye = getattr(model.blocks, name), jnp.tile(jnp.eye(32), (2, 1, 1))
        linear.kernel, linear.lora_a, linear.lora_b = (nnx.data(nnx.Param(x)) for x in (0 * eye, eye, eye))
    return model


def test_each_module_layer_and_key_has_a_mask_of_its_own_that_keeps_the_mean(identities):
    first, second = dropped(identities, jax.random.key(1)), dropped(identities, jax.random.key(2))
    assert set(np.unique(first)) == {0, np.float32(1 / (1 - RATE))}
    masks = [*first.reshape(4, -1), *second.reshape(4, -1)]
    for i, mask in enumerate(masks):
        deviation = np.sqrt(RATE * (1 - RATE) / mask.size)
        assert abs((mask == 0).mean() - RATE) < 5 * deviation
        for other in masks[:i]:  # independent: both are zero in a share RATE^2 of the places
            assert abs(((mask == 0) & (other == 0)).mean() - RATE**2) < 5 * deviation
    assert np.array_equal(dropped(identities, jax.random.key(1)), first)


def test_there_is_no_dropout_until_a_step_draws_it(identities):
    x = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    graphdef, state = nnx.split(identities.blocks.q)
    y = nnx.merge(graphdef, jax.tree.map(lambda w: w[0], state))(jnp.asarray(x))
    np.testing.assert_allclose(y, x, atol=1e-6)


def test_dropout_changes_steps_by_seed_and_step_alone():
    batches = [tiny.batch(0), tiny.batch(0)]
    plain, a, b = (tiny.train(batches, lora=3, dropout=rate, learning_rate=0.0) for rate in (0.0, 0.5, 0.5))
    losses = [[m["loss"] for m in trained.metrics] for trained in (plain, a, b)]
    assert losses[1] == losses[2] and losses[0][0] == losses[0][1]
    assert a.metrics[0]["grad_norm"] != a.metrics[1]["grad_norm"] != plain.metrics[1]["grad_norm"]


def test_the_order_of_the_devices_does_not_change_the_result():
    """Weights and batches are sharded over eight devices; masks are drawn in shards."""
    devices, sizes = jax.devices()[:8], {"fsdp": 4, "tensor": 2}
    batches = [tiny.batch(i, accumulate=2, rows=4) for i in range(3)]

    def run(order):
        return tiny.train(batches, make_mesh(sizes, [devices[i] for i in order]), lora=4, dropout=0.2)

    one = tiny.train(batches, lora=4, dropout=0.2)
    runs = [run(range(8)), run((3, 6, 0, 5, 7, 1, 4, 2))]
    for other in runs:
        for a, b in zip(one.metrics, other.metrics, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        for path, value in one.after.items():
            np.testing.assert_allclose(other.after[path], value, rtol=0, atol=1e-4)
    assert runs[0].metrics == runs[1].metrics
    assert all(np.array_equal(runs[0].after[path], runs[1].after[path]) for path in one.after)
