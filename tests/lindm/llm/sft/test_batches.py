"""Batches of several processes: each reads the documents of its own rows, and all together have the batch of a single one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lindm.llm.config import ModelConfig
from lindm.llm.io import weights
from lindm.llm.model import Decoder
from lindm.llm.parallel import sharding
from lindm.llm.sft.batches import BatchLoader
from lindm.llm.sft.evaluator import Evaluator
from lindm.llm.sft.options import SFTConfig
from lindm.llm.sft.packing import make_batch
from lindm.llm.sft.setup import TrainingSetup, setup_training
from lindm.llm.sft.token_cache import CachedExamples
from tests.clock import HANGS
from tests.lindm.llm.conftest import SIZES
from tests.lindm.llm.parallel.test_processes import ROOT, free_port
from tests.lindm.llm.small import byte_level

STEPS = 3
CHILD = """
import json, sys
from lindm.llm.parallel import processes
processes.initialize(sys.argv[1], 2, int(sys.argv[2]))
from tests.lindm.llm.sft.test_batches import batches
print(json.dumps(batches(*sys.argv[3:])))
"""


def config(data: Path, **changes) -> SFTConfig:
    """Eight devices in pairs of `tensor`; of two processes, each has one half of `data`."""
    settings = {"mesh": "data=2,fsdp=2,tensor=2", "batch": 8, "accumulate": 2, "steps": STEPS, "held_out": 0.3}
    return SFTConfig(model=data.parent / "model", data=data, out=data.parent / "out", **settings | changes)


def batches(data: str, pack: str) -> list[dict]:
    """What this process has of each batch, the held-out ones last: the examples that it reads, its rows, the SHA-256."""
    setup = setup_training(config(Path(data), **{"pack": True, "max_length": 64} if pack == "pack" else {}))
    read, get = [], CachedExamples.__getitem__
    CachedExamples.__getitem__ = lambda self, index: read.append(index) or get(self, index)
    try:
        loader, said = loader_of(setup), []
        for step in range(STEPS):
            batch = loader.load(step)
            said.append({"sha256": batch.sha256, "documents": batch.documents.tolist(), "rows": rows_of(batch.arrays)})
            said[-1]["read"], read[:] = read[:], []
        for arrays in Evaluator(setup, None).batches():
            said.append({"rows": rows_of(arrays), "read": read[:]})
            read.clear()
    finally:
        CachedExamples.__getitem__ = get
    return said


def loader_of(setup: TrainingSetup) -> BatchLoader:
    return BatchLoader(setup, *(jax.NamedSharding(setup.mesh, spec) for spec in (jax.P(None, ("data", "fsdp")), jax.P())))


def rows_of(batch) -> dict[str, list]:
    """The arrays of each row on the devices of this process, by the numbers of the row."""
    rows: dict[str, list] = {}
    for array in jax.tree.leaves(batch):
        own: dict[str, list] = {}
        for shard in array.addressable_shards:
            leading = np.indices(shard.data.shape[: array.ndim - 1]).reshape(array.ndim - 1, -1).T
            for place in leading.tolist():
                number = [i + (where.start or 0) for i, where in zip(place, shard.index, strict=False)]
                own[str(number)] = np.asarray(shard.data)[tuple(place)].tolist()
        for number, row in own.items():
            rows.setdefault(number, []).append(row)
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows of which some have weights, beside a model that reads them."""
    root, tokenizer = tmp_path_factory.mktemp("batches"), byte_level()
    tokenizer.save_pretrained(str(root / "tokenizer"))
    model = Decoder(ModelConfig(model_type="llama", vocab_size=len(tokenizer), **SIZES), nnx.Rngs(0), jnp.float32)
    weights.save(model, root / "model", like=root / "tokenizer")
    chats = ([{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "B", "weight": 0.5}] for i in range(25))
    rows = [*({"prompt": "x" * (1 + i % 40), "completion": f"A{i}"} for i in range(120)), *({"messages": chat} for chat in chats)]
    path = root / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_document_of_a_step_is_in_its_batch_once_and_the_sha256_follows_the_documents(data):
    setup = setup_training(config(data))
    said = batches(str(data), "")
    assert len(said) > STEPS + 1, "several held-out batches"
    for step in said[:STEPS]:
        assert sorted(step["read"]) == sorted(step["documents"]) and len(step["read"]) == 16
        rows = [zip(row[0], row[2], strict=True) for row in step["rows"].values()]  # tokens, segments
        ids = sorted(token for row in rows for token, segment in row if segment >= 0)
        assert ids == sorted(token for i in step["documents"] for token in setup.train_rows.table[i].ids.tolist())
    assert len({step["sha256"] for step in said[:STEPS]}) == STEPS
    assert sorted(i for batch in said[STEPS:] for i in batch["read"]) == sorted(setup.eval_rows.members.tolist())


@pytest.mark.parametrize("pack", [False, True])
def test_a_batch_of_documents_in_memory_has_their_digests(micro, tmp_path, pack):
    changes = {"pack": True, "max_length": 192} if pack else {}
    setups = [
        setup_training(SFTConfig(model=micro.model, data=micro.mdp, out=tmp_path, batch=8, steps=2, loss=loss, **changes))
        for loss in ("action", "soft", "regret")
    ]
    loaders = [loader_of(setup) for setup in setups]
    loaded = [loader.load(1) for loader in loaders]
    assert loaded[0].sha256 != loaded[1].sha256 == loaded[2].sha256, "action values are of the document"
    assert loaded[0].arrays.action_values is None and loaded[1].arrays.action_values is not None
    changed = setups[0].train_rows.table[int(loaded[0].documents[-1])].target
    changed[np.flatnonzero(changed >= 0)[0]] += 1
    assert loaders[0].load(1).sha256 != loaded[0].sha256


@pytest.mark.parametrize("shape", [(8,), (3, 4)])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6, 7], [6, 1, 4, 3, 0, 7, 2, 5]])
def test_rows_that_a_process_makes_are_placed_as_those_of_a_whole_array(shape, order):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, [jax.devices()[i] for i in order])
    where = jax.NamedSharding(mesh, jax.P(*[None] * (len(shape) - 1), ("data", "fsdp")))
    whole = np.random.default_rng(0).integers(0, 99, (*shape, 5))
    made = []

    def make_rows(own):
        made.append(own.tolist())
        return {"x": whole.reshape(-1, 5)[own]}

    placed = sharding.shard_rows(shape, where, make_rows)["x"]
    assert made == [list(range(np.prod(shape)))]
    np.testing.assert_array_equal(np.asarray(placed), whole)
    for shard, other in zip(placed.addressable_shards, sharding.shard_array(whole, where).addressable_shards, strict=True):
        assert shard.device == other.device
        np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(other.data))


def test_an_empty_row_has_the_columns_of_the_others(data):
    table = setup_training(config(data)).train_rows.table
    with_empty, alone = make_batch([[table.empty], [table[0]]], 64, 32), make_batch([[], [table[0]]], 64, 32)
    jax.tree.map(np.testing.assert_array_equal, with_empty, alone)
    only = make_batch([[table.empty]], 64, 32)
    assert only.weights is not None and only.weights.tolist() == [[0] * 32] and only.action_values is None


@pytest.mark.slow
@pytest.mark.parametrize("pack", ["", "pack"])
def test_each_of_two_processes_reads_the_documents_of_its_own_rows_and_no_others(data, pack):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    alone = batches(str(data), pack)
    address = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, address, str(rank), str(data), pack],
            **{"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "text": True},
        )
        for rank in (0, 1)
    ]
    try:
        one, two = (json.loads(process.communicate(timeout=HANGS)[0].splitlines()[-1]) for process in started)
    finally:
        for process in started:
            process.kill()
    for batch, first, second in zip(alone, one, two, strict=True):
        assert batch.get("sha256") == first.get("sha256") == second.get("sha256")
        assert sorted(first["read"] + second["read"]) == sorted(batch["read"])  # a step may have one twice, in two epochs
        assert len(first["rows"]) == len(second["rows"]) == len(batch["rows"]) / 2
        assert first["rows"] | second["rows"] == batch["rows"]
    train = [len(said["read"]) / len(batch["read"]) for said, batch in zip(one[:STEPS], alone, strict=False)]
    assert all(0.25 <= share <= 0.75 for share in train)
