"""Where weights lie, and that it changes nothing: every mesh of eight devices trains as one device does."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from lindm.llm.lora import add_lora, quantize
from lindm.llm.model import Decoder
from lindm.llm.parallel import sharding
from lindm.llm.parallel.sharding import check_mesh_size, make_mesh, parse_mesh, weight_spec
from lindm.llm.sft import step
from lindm.llm.sft.optimizer import OptimizerConfig, make_optimizer
from tests.lindm.llm import tiny


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"fsdp": 4, "tensor": 2})


@pytest.fixture(scope="module")
def alone():
    return tiny.train([tiny.batch(i) for i in range(2)])


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=lambda sizes: ",".join(f"{k}={v}" for k, v in sizes.items()),
)
def test_a_mesh_trains_as_one_device_does(sizes, alone):
    trained = tiny.train([tiny.batch(i) for i in range(2)], make_mesh(sizes))
    for there, here in zip(trained.metrics, alone.metrics, strict=True):
        assert there["loss"] == pytest.approx(here["loss"], rel=1e-5) and there["grad_norm"] == pytest.approx(
            here["grad_norm"], rel=1e-5
        )
        assert (there["num_labels"], there["accuracy"]) == (here["num_labels"], here["accuracy"])
    for path, weight in alone.after.items():  # AdamW's first steps are of size one whatever the gradient: rounding grows
        np.testing.assert_allclose(trained.after[path], weight, atol=2e-4)


def test_adapters_over_a_base_in_few_bits_train_on_a_mesh_as_on_one_device():
    model_config = tiny.TINY.__class__(
        **(vars(tiny.TINY) | {"hidden_size": 64, "num_heads": 8, "intermediate_size": 128})
    )  # nf4 needs blocks of 64

    def model() -> Decoder:
        return quantize(tiny.decoder(model_config=model_config), "nf4")

    batches = [tiny.batch(i) for i in range(2)]
    here = tiny.train(batches, model=model(), lora=4)
    there = tiny.train(batches, make_mesh({"fsdp": 4, "tensor": 2}), model=model(), lora=4)
    for one, other in zip(here.metrics, there.metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


# --- the table -----------------------------------------------------------------------------------------------------------

# what the layout is to be, written out: (path, shape, axes), for a model of the largest variety
WANTED = [
    ("embedding", (64, 32), ("tensor", "fsdp")),
    ("lm_head", (32, 64), ("fsdp", "tensor")),
    ("norm.weight", (32,), ()),
    ("blocks.norm_attention.weight", (2, 32), ()),
    ("blocks.norm_q.weight", (2, 8), ()),
    ("blocks.q.kernel", (2, 32, 32), (None, "fsdp", "tensor")),
    ("blocks.k.kernel", (2, 32, 16), (None, "fsdp", "tensor")),
    ("blocks.gate.kernel", (2, 32, 64), (None, "fsdp", "tensor")),
    ("blocks.o.kernel", (2, 32, 32), (None, "tensor", "fsdp")),
    ("blocks.down.kernel", (2, 64, 32), (None, "tensor", "fsdp")),
    ("blocks.v.bias", (2, 16), (None, "tensor")),
    ("blocks.up.bias", (2, 64), (None, "tensor")),
    ("blocks.o.bias", (2, 32), ()),  # added to the residual stream, which every device has whole
    ("blocks.down.bias", (2, 32), ()),
    ("blocks.q.lora_a", (2, 32, 3), (None, "fsdp", None)),
    ("blocks.q.lora_b", (2, 3, 32), (None, None, "tensor")),
    ("blocks.down.lora_a", (2, 64, 3), (None, "tensor", None)),
    ("blocks.down.lora_b", (2, 3, 32), (None, None, "fsdp")),
    ("blocks.q.kernel.q", (2, 16, 32), (None, "fsdp", "tensor")),  # nf4: two inputs to a byte
    ("blocks.q.kernel.scale", (2, 1, 32), (None, None, "tensor")),  # one block of inputs, which fsdp does not divide
    ("blocks.o.kernel.scale", (2, 8, 32), (None, "tensor", "fsdp")),
]


@pytest.mark.parametrize("path, shape, axes", WANTED, ids=[path for path, _, _ in WANTED])
def test_every_weight_has_the_sharding_of_the_table(path, shape, axes, mesh):
    assert weight_spec(path, shape, mesh) == PartitionSpec(*axes)


def test_the_table_knows_every_matrix_of_a_model_with_everything_in_it(mesh):
    varied = tiny.TINY.__class__(**(vars(tiny.TINY) | {"o_bias": True, "mlp_bias": True, "qk_norm": "heads"}))
    model = add_lora(tiny.decoder(model_config=varied), 4, 8.0, jax.random.key(0))
    state = nnx.state(model)
    placed = jax.tree_util.tree_flatten_with_path(sharding.weight_shardings(state, mesh))[0]
    whole = {sharding.weight_path(keys) for keys, where in placed if where.is_fully_replicated}
    norms = {f"blocks.norm_{name}.weight" for name in ("attention", "mlp", "q", "k")} | {"norm.weight"}
    assert whole == norms | {"blocks.o.bias", "blocks.down.bias"}
    assert len(placed) == len(jax.tree.leaves(state)) == 6 + 7 * 4 + 2 - 1


def test_moments_have_the_shardings_of_their_weights(mesh):
    model = add_lora(tiny.decoder(), 4, 8.0, jax.random.key(0))
    _, params, frozen = nnx.split(model, nnx.Param, ...)
    optimizer = make_optimizer(OptimizerConfig(steps=3))
    state = jax.eval_shape(lambda p: step.init_train_state(p, optimizer), params)
    shardings, still, batch, stop = step.step_shardings(state, frozen, mesh)
    by_path = {sharding.weight_path(keys): where for keys, where in jax.tree_util.tree_flatten_with_path(shardings.params)[0]}
    adam = next(
        x
        for x in jax.tree.leaves(shardings.opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
        if hasattr(x, "mu")
    )
    for moment in (adam.mu, adam.nu):
        by_weight = {sharding.weight_path(keys): where for keys, where in jax.tree_util.tree_flatten_with_path(moment)[0]}
        assert by_weight == by_path
    assert adam.count.is_fully_replicated and shardings.step.is_fully_replicated
    assert batch.spec == PartitionSpec(None, ("data", "fsdp")) and math.prod(stop.shard_shape((8,))) == 1
    assert any(not where.is_fully_replicated for where in jax.tree.leaves(still))


def test_a_weight_is_cut_into_equal_parts_that_make_up_the_whole(mesh):
    array = np.arange(2 * 32 * 16, dtype=np.float32).reshape(2, 32, 16)
    where = jax.sharding.NamedSharding(mesh, weight_spec("blocks.q.kernel", array.shape, mesh))
    placed = sharding.shard_array(array, where)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 8, 8)}
    np.testing.assert_array_equal(np.asarray(placed), array)


# --- meshes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, sizes",
    [
        ("fsdp=8,tensor=2", {"data": 1, "fsdp": 8, "tensor": 2}),
        ("data=2", {"data": 2, "fsdp": 1, "tensor": 1}),
        (" fsdp = 4 ", {"data": 1, "fsdp": 4, "tensor": 1}),
        ("", {"data": 1, "fsdp": 1, "tensor": 1}),
    ],
)
def test_a_mesh_is_read(text, sizes):
    assert parse_mesh(text) == sizes


@pytest.mark.parametrize("text", ["rows=2", "fsdp", "fsdp=0", "fsdp=-1", "fsdp=2.5", "fsdp=2;tensor=2", "=2"])
def test_an_invalid_mesh_raises_an_error(text):
    with pytest.raises(ValueError, match="mesh must be of the form fsdp=8,tensor=2 with axes data, fsdp, tensor; got"):
        parse_mesh(text)


def test_a_mesh_uses_all_devices():
    mesh = make_mesh({"data": 2, "tensor": 4})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 4} and mesh.size == 8
    with pytest.raises(ValueError, match="mesh must use all 8 devices; data=1,fsdp=2,tensor=2 uses 4"):
        make_mesh({"fsdp": 2, "tensor": 2})
    with pytest.raises(ValueError, match="mesh must use the one device; data=1,fsdp=2,tensor=1 uses 2"):
        check_mesh_size({"fsdp": 2}, 1)


def test_a_mesh_that_does_not_divide_a_weight_raises_an_error_that_names_it(mesh):
    with pytest.raises(ValueError, match=r"mesh must divide blocks\.q\.kernel \[2, 30, 32\]: fsdp=4 does not divide 30"):
        weight_spec("blocks.q.kernel", (2, 30, 32), mesh)
    with pytest.raises(ValueError, match=r"mesh must divide embedding \[63, 32\]: tensor=2 does not divide 63"):
        weight_spec("embedding", (63, 32), mesh)
    with pytest.raises(ValueError, match=r"blocks\.q\.kernel\.q"):
        weight_spec("blocks.q.kernel.q", (2, 6, 32), mesh)


def test_a_batch_that_the_mesh_does_not_divide_raises_an_error():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sharding.check_batch_size(8, mesh)
    with pytest.raises(ValueError, match="batch must be a multiple of data x fsdp = 4; got 6"):
        sharding.check_batch_size(6, mesh)


def test_the_path_of_a_leaf_is_the_same_in_a_state_and_in_what_mirrors_it():
    state = nnx.state(tiny.decoder())
    paths = [sharding.weight_path(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    assert "blocks.q.kernel" in paths and "embedding" in paths and "norm.weight" in paths
    mirror = jax.tree.map(jnp.zeros_like, {"mu": state})
    mirrored = jax.tree_util.tree_flatten_with_path(mirror)[0]
    assert {sharding.weight_path(keys) for keys, _ in mirrored} == {f"mu.{p}" for p in paths}
