"""The bench of decisions: our answers are those of reading every prompt whole, the peer's are the same, and rows say so."""

import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest

from lindm.bench import decisions as bench
from lindm.cli.main import main
from lindm.llm.config import ModelConfig
from lindm.llm.io import weights

SMALL = ModelConfig(
    model_type="llama",
    vocab_size=320,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    tie_word_embeddings=True,
    max_position_embeddings=512,
    init_std=0.3,
)
torch_missing = importlib.util.find_spec("torch") is None


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    for name, value in (("MODEL", SMALL), ("TASKS", 2), ("DEMOS", 2), ("EPISODES", 3), ("HORIZON", 4)):
        patch.setattr(bench, name, value)
    directory = tmp_path_factory.mktemp("bench")
    bench.prepare(directory)
    outcome = bench.run_ours(directory)
    yield directory, outcome
    patch.undo()


@pytest.mark.slow
def test_our_answers_are_those_of_reading_every_prompt_whole(measured):
    directory, outcome = measured
    given = json.loads((directory / bench.QUESTIONS).read_text())
    assert outcome["decisions"] == 2 * 3 * 4 and len(given["questions"]) == -(-24 // bench.STRIDE)
    assert len({len(ids) for ids in given["questions"]}) > 1 and outcome["cost"] > 0
    model = weights.load(directory / "model")
    for ids, answer in zip(given["questions"], given["answers"], strict=True):
        positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
        logits = np.asarray(model.logits(model.last_hidden_state(jnp.asarray([ids], jnp.int32), positions)))[0, -1]
        assert logits[given["actions"]].argmax() == answer


@pytest.mark.parity
@pytest.mark.skipif(torch_missing, reason="torch is not installed")
def test_the_peer_answers_the_same(measured):
    outcome = bench.run_torch(measured[0])
    assert outcome["same"] == outcome["answers"] == 4 and outcome["cost"] > 0


OURS = {"cost": 0.05, "decisions": 256, "tokens": 344.0, "memory": 200.0, "compile": 4.0}


def test_rows_have_the_ratio_to_the_peer():
    peer = {"cost": 1.0, "memory": 100.0, "same": 37, "answers": 37}
    rate, memory, compiling, compared = bench.rows(OURS, peer, "a peer")
    assert (rate["ours"], rate["peer"], rate["ratio"], rate["unit"]) == (20.0, 1.0, 20.0, "decisions/CPU-s")
    assert memory["ratio"] == 0.5 and compiling["peer"] is None and compared["peer"] == 37
    with pytest.raises(RuntimeError, match="a peer and ours differ in 1 of 37 decisions"):
        bench.rows(OURS, peer | {"same": 36}, "a peer")


def test_without_torch_the_peer_is_null(monkeypatch, capsys):
    sides = []

    def worker(module, side, directory):
        sides.append(side)
        return OURS

    monkeypatch.setattr(bench, "prepare", lambda directory: None)
    monkeypatch.setattr(bench, "in_worker", worker)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "decisions", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert sides == ["ours"] and all(row["peer"] is None and row["ratio"] is None for row in table)
