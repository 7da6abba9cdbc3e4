"""The bench on documents of mixed lengths: both sides train the same documents."""

import importlib.util

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from lindm.bench import mixed_lengths, sft
from lindm.llm.config import ModelConfig
from lindm.llm.io import weights
from lindm.llm.model import Decoder
from lindm.llm.parallel.sharding import BATCH_SPEC, make_mesh
from lindm.llm.tokens import Example

SMALL = ModelConfig(
    model_type="llama",
    vocab_size=96,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    intermediate_size=48,
    tie_word_embeddings=True,
)


def test_lengths_are_log_normal():
    lengths = np.array([len(e.ids) for step in mixed_lengths.documents() for e in step])
    assert lengths.shape == (32 * 8,)
    assert np.median(lengths) == pytest.approx(200, rel=0.1) and np.percentile(lengths, 95) == pytest.approx(1200, rel=0.15)


def test_our_batches_hold_every_document_of_a_step_and_little_padding():
    steps, held, trained = mixed_lengths.documents(), 0, 0
    rows_of_one_device = NamedSharding(make_mesh({}, jax.devices()[:1]), PartitionSpec(None, *BATCH_SPEC))
    for number, batch in zip(mixed_lengths.TIMED_STEPS, mixed_lengths.our_batches(rows_of_one_device), strict=True):
        documents = steps[number]
        segments, ids = np.asarray(batch.segments), np.asarray(batch.ids)
        rows = [ids[segments == -1].size, sum(len(e.ids) for e in documents)]
        assert sum(rows) == ids.size
        ours = sorted(tuple(r[s == n]) for r, s in zip(ids[0], segments[0], strict=True) for n in range(s.max() + 1))
        assert ours == sorted(tuple(e.ids) for e in documents)
        assert (np.asarray(batch.targets) >= 0).sum() == sum((e.target >= 0).sum() for e in documents)
        held, trained = held + ids.size, trained + rows[1]
    assert trained > 0.6 * held


def test_the_peer_pads_to_the_longest_document_and_trains_the_same_tokens():
    short = Example(np.array([5, 6, 7], np.int32), np.array([-1, 7, -1], np.int32), "")
    long = Example(np.arange(10, 15, dtype=np.int32), np.array([11, -1, 13, 14, -1], np.int32), "")
    ids, mask, labels = mixed_lengths.padded([short, long])
    assert ids.tolist() == [[5, 6, 7, 0, 0], [10, 11, 12, 13, 14]]
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert labels.tolist() == [[-100, -100, 7, -100, -100], [-100, 11, -100, 13, 14]]


def test_rates_count_the_tokens_of_documents_alone():
    tokens = sum(len(e.ids) for number in mixed_lengths.TIMED_STEPS for e in mixed_lengths.documents()[number])
    ours, peer = {"steps": 10.0, "loss": 8.3, "compile": 3.0}, {"steps": 25.0, "loss": 8.30001}
    rate, _ = mixed_lengths.rows(ours, peer, "a peer")
    assert rate["ours"] == tokens / 10 and rate["peer"] == tokens / 25 and rate["ratio"] == pytest.approx(2.5)
    assert mixed_lengths.rows(ours, None, "nobody")[0]["ratio"] is None
    with pytest.raises(RuntimeError, match=r"different losses at the first step: 8\.4 and 8\.3"):
        mixed_lengths.rows(ours, peer | {"loss": 8.4}, "a peer")


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_both_sides_start_from_the_same_loss(monkeypatch, tmp_path):
    monkeypatch.setattr(sft, "MODEL", SMALL)
    weights.save(Decoder(mixed_lengths.model_config(), nnx.Rngs(0)), tmp_path / "model")
    ours, peer = mixed_lengths.run_ours(tmp_path / "model"), mixed_lengths.run_torch(tmp_path / "model")
    assert ours["loss"] == pytest.approx(peer["loss"], abs=sft.LOSS_TOLERANCE)
