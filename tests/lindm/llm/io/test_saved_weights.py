"""Saving of weights: every tensor, shards and adapters; a directory appears whole or not at all."""

import contextlib
import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from transformers import AutoConfig

from lindm.errors import LindmError, StorageError, UsageError
from lindm.io import temporaries
from lindm.io.temporaries import temporary_path
from lindm.llm import lora
from lindm.llm.io import safetensors_files, weights
from lindm.llm.parallel.sharding import make_mesh
from tests.clock import HANGS
from tests.lindm.llm import reference
from tests.lindm.llm.io.tensors import equal, everything, same

NAMES = reference.FAMILIES


def test_without_an_original_model_the_special_token_ids_are_null(tmp_path):
    """Left out of a config.json, the special tokens would be those of the first Llama."""
    weights.save(weights.load(reference.write(tmp_path / "a", "llama")), tmp_path / "b")
    config = AutoConfig.from_pretrained(tmp_path / "b")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


@pytest.mark.fault("F18")
@pytest.mark.parametrize("name", NAMES)
def test_saved_tensors_equal_the_loaded_ones(tmp_path, name):
    original = reference.write(tmp_path / "a", name, eos_token_id=[1, 2], pad_token_id=0)
    m = weights.load(original)
    weights.save(m, tmp_path / "b", like=original)
    assert same(everything(tmp_path / "b"), reference.weights(name))
    assert equal(weights.load(tmp_path / "b"), m) and nnx.graphdef(weights.load(tmp_path / "b")) == nnx.graphdef(m)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["dtype"], config["eos_token_id"], config["pad_token_id"]) == ("float32", [1, 2], 0)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_model_over_the_shard_size_is_written_in_several_files(tmp_path):
    m = weights.load(reference.write(tmp_path / "a", "qwen3"))
    weights.save(m, tmp_path / "b", max_shard_bytes=9_000)
    names = sorted(p.name for p in (tmp_path / "b").glob("*.safetensors"))
    n = len(names)
    assert n > 2 and names == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    sizes = [sum(x.nbytes for x in load_file(tmp_path / "b" / name).values()) for name in names]
    assert max(sizes) <= 9_000 and all(a + b > 9_000 for a, b in itertools.pairwise(sizes))
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * m.config.num_parameters
    assert {k: v for k, v in index["weight_map"].items()} == {k: f for f in names for k in load_file(tmp_path / "b" / f)}
    assert same(everything(tmp_path / "b"), reference.weights("qwen3"))


def test_a_tensor_over_the_shard_size_has_a_file_of_its_own(tmp_path):
    m = weights.load(reference.write(tmp_path / "a", "smollm"))
    weights.save(m, tmp_path / "b", max_shard_bytes=1)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == len(reference.weights("smollm"))
    assert equal(weights.load(tmp_path / "b"), m)


def test_bfloat16_is_rounded_to_the_nearest(tmp_path):
    m = weights.load(reference.write(tmp_path / "a", "llama"))
    weights.save(m, tmp_path / "b", dtype="bf16")
    saved = everything(tmp_path / "b")
    assert {x.dtype for x in saved.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert same({k: v.astype(np.float32) for k, v in saved.items()}, reference.bfloat16(reference.weights("llama")))
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="dtype must be one of f32, f16, bf16; got 'f64'"):
        weights.save(m, tmp_path / "c", dtype="f64")


@pytest.mark.parametrize("base", ["f32", "int8"])
def test_adapters_are_merged_when_a_model_is_saved(tmp_path, base):
    """W + (alpha / rank) B A, in the orientation of the file."""
    directory = reference.write(tmp_path / "a", "wide")
    m = lora.add_lora(weights.load(directory, base=base), 2, 6.0, jax.random.key(0), ("q", "down"))
    rng, factors = np.random.default_rng(5), {}
    for name in ("q", "down"):
        linear = getattr(m.blocks, name)
        linear.lora_b = nnx.data(nnx.Param(jnp.asarray(rng.normal(size=linear.lora_b[...].shape), jnp.float32)))
        factors[name] = np.asarray(linear.lora_a[...], np.float64), np.asarray(linear.lora_b[...], np.float64)
    weights.save(m, tmp_path / "b")
    saved, true = everything(tmp_path / "b"), reference.weights("wide")
    for key, value in true.items():
        module = key.split(".")[-2].removesuffix("_proj")
        if base == "int8" and key.endswith("_proj.weight"):
            scale = np.abs(value).max(axis=1, keepdims=True) / np.float32(127)
            value = np.round(value / scale) * scale
        if module in factors:
            a, b = (x[int(key.split(".")[2])] for x in factors[module])
            value = value + 3 * (a @ b).T
        np.testing.assert_allclose(saved[key], value, rtol=0, atol=2e-6 * max(np.abs(value).max(), 1))
    assert m.blocks.q.lora_a is not None  # the model itself is left as it was


def test_a_sharded_model_is_saved_as_the_whole_one(tmp_path):
    directory = reference.write(tmp_path / "a", "qwen3")
    weights.save(weights.load(directory, mesh=make_mesh({"fsdp": 4, "tensor": 2})), tmp_path / "b")
    assert same(everything(tmp_path / "b"), reference.weights("qwen3"))


@pytest.mark.fault("F18", "F19")
def test_tokenizer_files_are_copied_and_nothing_else(tmp_path):
    original = reference.write(tmp_path / "a", "llama")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "modeling.py", "optimizer.bin"):
        (original / name).write_text(name)
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    weights.save(weights.load(original), tmp_path / "b", like=original)
    names = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == names
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "tokenizer.json"
    assert json.loads((tmp_path / "b" / "config.json").read_text())["eos_token_id"] == 7


# --- a directory appears whole or not at all -------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    return weights.load(reference.write(tmp_path / "model", "qwen2"))


@pytest.mark.fault("F18")
def test_an_existing_directory_is_not_changed(tmp_path, model):
    (tmp_path / "out").mkdir()
    weights.save(model, tmp_path / "out")  # an empty directory is nothing
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").resolve().mkdir()
    (tmp_path / "nowhere" / "thesis.tex").write_text("mine")
    for name in ("out", "file", "link"):
        with pytest.raises(LindmError, match=f"{name} already exists and is not replaced; choose another --out") as e:
            weights.save(model, tmp_path / name)
        assert isinstance(e.value, UsageError)
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "model", "nowhere", "out"]


@pytest.mark.fault("F7", "F18")
def test_a_full_disk_is_a_storage_error_and_nothing_is_left_behind(tmp_path, model):
    """The write fails in the middle of the weights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(LindmError, match=r"cannot write .*model.safetensors: File too large") as e:
            weights.save(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(e.value, StorageError) and [p.name for p in tmp_path.iterdir()] == ["model"]
    weights.save(model, tmp_path / "out")


@pytest.mark.fault("F8")
def test_a_parent_that_is_a_file_is_a_storage_error(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(LindmError, match="cannot write") as e:
        weights.save(model, tmp_path / "file" / "out")
    assert isinstance(e.value, StorageError)


@pytest.mark.fault("F26")
def test_leftovers_of_a_killed_writer_are_removed(tmp_path, model, monkeypatch):
    left = temporary_path(tmp_path / "out")
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    temporary_path(tmp_path / "out2").mkdir()  # of another directory
    seen, write = [], safetensors_files.write_shards

    def watching(directory, *rest):
        seen.extend(p.name for p in directory.iterdir())
        with pytest.raises(UsageError, match="is being written by another process"):
            weights.save(model, tmp_path / "out")
        return write(directory, *rest)

    monkeypatch.setattr(temporaries, "LOCK_PATIENCE", 0)
    monkeypatch.setattr(safetensors_files, "write_shards", watching)
    weights.save(model, tmp_path / "out")
    assert seen == ["config.json"] and equal(weights.load(tmp_path / "out"), model)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out2.lindm-tmp", "model", "out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from lindm.llm.io import weights
model = weights.load(Path(sys.argv[1]))
os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
weights.save(model, Path(sys.argv[2]))
"""
ROOT = str(Path(__file__).parents[4])


@pytest.mark.slow
@pytest.mark.fault("F18", "F26")
def test_a_killed_writer_leaves_no_partial_model(tmp_path, model):
    """At the last moment: everything is written, and it is not there yet."""
    child = [sys.executable, "-c", KILLED, str(tmp_path / "model"), str(tmp_path / "out")]
    done = subprocess.run(child, env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True, timeout=HANGS)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "out").exists() and temporary_path(tmp_path / "out").is_dir()
    weights.save(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"] and equal(weights.load(tmp_path / "out"), model)


TWO = """
import sys
import jax
rank, port, source, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from pathlib import Path
from lindm.cli.exit_codes import exit_code
from lindm.errors import LindmError
from lindm.llm.io import weights
from lindm.llm.parallel.sharding import make_mesh
model = weights.load(Path(source), mesh=make_mesh({"fsdp": 2, "tensor": 2}))
assert not model.blocks.q.kernel[...].is_fully_addressable
weights.save(model, Path(out))
try:
    weights.save(model, Path(out))
except LindmError as e:
    sys.exit(40 + exit_code(e))
"""


@pytest.mark.slow
def test_two_processes_read_their_shards_and_one_writes(tmp_path):
    """And where the one cannot write, both stop with its code."""
    directory = reference.write(tmp_path / "a", "qwen3")
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=2"
    env = os.environ | {"PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", TWO]
    rest = [str(port), str(directory), str(tmp_path / "b")]
    both = [subprocess.Popen([*command, str(r), *rest], env=env, stderr=subprocess.PIPE, text=True) for r in range(2)]
    said = [p.communicate(timeout=HANGS)[1] for p in both]
    assert [p.returncode for p in both] == [40 + 2] * 2, said
    assert same(everything(tmp_path / "b"), reference.weights("qwen3"))
