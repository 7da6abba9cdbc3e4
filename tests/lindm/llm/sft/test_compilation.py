"""The memory of a compiled step: what is on the device already is not counted again."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lindm.llm.parallel.sharding import make_mesh
from lindm.llm.sft import compilation


def test_frozen_weights_on_the_device_are_not_counted_again():
    """A step of 1 MiB of state and 8 MiB of frozen weights needs its state and what it computes, by either analysis."""
    device = jax.local_devices()[:1]
    here = NamedSharding(make_mesh({}, device), PartitionSpec())
    frozen = jax.device_put(np.ones((1024, 2048), np.float32), here)
    state = jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=here)
    step = jax.jit(lambda state, frozen: state + jnp.sum(frozen), donate_argnums=0)
    memory = step.lower(state, frozen).compile().memory_analysis()
    held = compilation.bytes_on(frozen, device[0])
    assert held == 8 * 2**20
    needed = compilation.bytes_needed(memory, state, held, "gpu")
    assert 2**20 <= needed < 2**20 + memory.temp_size_in_bytes + 4096


def test_the_bytes_on_a_device_are_those_of_its_shards():
    mesh = make_mesh({"fsdp": 4}, jax.local_devices()[:4])
    x = jax.device_put(np.ones((8, 100), np.float32), NamedSharding(mesh, PartitionSpec("fsdp")))
    assert [compilation.bytes_on({"x": x}, d) for d in jax.local_devices()[:5]] == [800, 800, 800, 800, 0]
