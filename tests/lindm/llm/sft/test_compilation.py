"""The memory of a compiled step: what is on the device already is not counted again. Compiled steps are kept for later runs."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lindm.llm.parallel.sharding import make_mesh
from lindm.llm.sft import compilation, packing
from lindm.llm.sft.batches import BatchLoader
from lindm.llm.sft.options import SFTConfig
from lindm.llm.sft.setup import setup_training
from lindm.llm.sft.shapes import SAMPLED_STEPS


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


@pytest.mark.fault("F16")
@pytest.mark.parametrize("steps", [SAMPLED_STEPS, 2 * SAMPLED_STEPS])
def test_every_shape_that_a_step_takes_is_compiled_and_checked_at_the_start(micro, tmp_path, monkeypatch, steps):
    """Also that of a long document which the sampled steps do not have."""
    num_rows, batch = 8 * SAMPLED_STEPS, 4
    long = packing.batch_order(num_rows, batch, 0)(3 * SAMPLED_STEPS // 2)[0]
    rows = [{"prompt": "x " * (60 if i == long else 1 + i % 3), "completion": " A"} for i in range(num_rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": micro.model, "data": tmp_path / "rows.jsonl", "held_out": 0.0, "batch": batch, "mesh": "fsdp=4,tensor=2"}
    setup = setup_training(SFTConfig(out=tmp_path, steps=steps, **options))
    shardings = NamedSharding(setup.mesh, PartitionSpec(None, ("data", "fsdp"))), NamedSharding(setup.mesh, PartitionSpec())
    loader = BatchLoader(setup, *shardings)
    compiled = []
    monkeypatch.setattr(compilation, "compile_train_step", lambda *arguments: compiled.append(arguments[3].ids.shape))
    programs = compilation.TrainPrograms(None, None, None, loader).programs
    taken = {loader.load(step).shape for step in range(steps)}
    assert taken <= set(programs) and compiled == [(1, shape.rows, shape.seq_len) for shape in programs]
    full = loader.shapes[-1]
    assert (full in taken) == (full in programs) == (steps > SAMPLED_STEPS) and len(loader.shapes) > 1


@pytest.mark.slow
def test_a_second_run_takes_the_compiled_step_from_the_cache_and_both_have_the_same_result(micro, tmp_path):
    """By the words in which jax reports it."""
    words = f"sft --model {micro.model} --data {micro.mdp} --steps 1 --eval-tasks 0 --held-out 0.2 --batch 4".split()
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    said = []
    for name in ("first", "second"):
        command = [sys.executable, "-m", "lindm", *words, "--out", str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / name / "manifest.json").read_text())["compile_seconds"] > 0
        said.append(done.stderr.lower())
    assert "cache miss for 'jit_train_step'" in said[0] and "cache hit for 'jit_train_step'" not in said[0]
    assert "cache hit for 'jit_train_step'" in said[1] and "cache miss for 'jit_train_step'" not in said[1]
    results = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("first", "second")]
    assert results[0] == results[1]
