"""Both sides of the bench must do the same work, and its rows must say what they compare."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
from flax import nnx

from lindm.bench import mixed_lengths, sft
from lindm.cli.main import main
from lindm.io.huge_pages import huge_page_environment
from lindm.llm.io import weights
from lindm.llm.model import Decoder
from lindm.llm.sft import packing

SMALL = dataclasses.replace(
    sft.MODEL,
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=512,
    init_std=0.3,
)
torch_missing = any(importlib.util.find_spec(library) is None for library in ("torch", "transformers"))


def labelled_texts(rows):
    """What is trained: the token, which must be the next one where there is one, and all that stands before it."""
    rows = list(rows)
    assert all(ids[t + 1] == target[t] for ids, target in rows for t in np.flatnonzero(target[:-1] >= 0))
    return sorted((*ids[: t + 1], int(target[t])) for ids, target in rows for t in np.flatnonzero(target >= 0))


def theirs(variant, documents=sft.ROWS):
    """ids and targets of the peer's batches, a label moved to the position that predicts it."""
    for ids, labels in sft.peer_batches(variant):
        for i, y in zip(ids[:documents], labels[:documents], strict=True):
            yield i.tolist(), np.append(np.where(y[1:] == -100, -1, y[1:]), -1)


def test_a_document_has_32_labels_in_251_tokens_and_both_sides_train_the_same():
    ours = [(e.ids.tolist(), e.target) for row in sft.packed_rows("selective") for e in row]
    assert [(len(ids), int((target >= 0).sum())) for ids, target in ours] == [(251, 32)] * 2
    assert labelled_texts(ours) == labelled_texts(theirs("selective"))


def test_one_decision_a_sequence_has_one_label_each_and_neither_side_pads_much():
    rows = sft.packed_rows("single")
    ours = [(e.ids.tolist(), e.target) for row in rows for e in row]
    assert all((target >= 0).sum() == 1 and target[-1] >= 0 for _, target in ours)
    assert len(ours) == len(sft.SAMPLED_DECISIONS) and labelled_texts(ours) == labelled_texts(theirs("single", documents=1))
    assert set(labelled_texts(ours)) <= set(labelled_texts(theirs("selective")))
    T, _ = packing.batch_shape(rows)
    assert len(rows) == 2 and T == 256 and sum(len(ids) for ids, _ in ours) > 0.95 * len(rows) * T


def test_the_four_decisions_stand_for_all_of_a_document():
    lengths = sft.LABEL_POSITIONS + 1
    assert len(set(sft.LABEL_POSITIONS)) == sft.LABELS and sft.LABEL_POSITIONS.max() == sft.TOKENS - 2
    assert np.mean(lengths[list(sft.SAMPLED_DECISIONS)]) == pytest.approx(np.mean(lengths), rel=0.01)


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(sft, "MODEL", SMALL)
    weights.save(Decoder(SMALL, nnx.Rngs(0)), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_adapters_start_from_the_files_weights_as_full_training_does_whatever_is_recomputed(small):
    runs = [sft.run_ours("full", "selective", small), sft.run_ours("lora", "none", small)]
    assert runs[0]["loss"] == pytest.approx(runs[1]["loss"], abs=1e-5) and runs[0]["loss"] > 4
    assert all(one["step"] > 0 and one["compile"] > 0 for one in runs)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # between peft and transformers
@pytest.mark.skipif(torch_missing, reason="torch is not installed")
@pytest.mark.parametrize("plain", [False, True])
def test_the_peer_starts_from_the_same_loss(small, monkeypatch, plain):
    if plain:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(sft.importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    ours = sft.run_ours("full", "selective", small)["loss"]
    for method in sft.METHODS:
        assert sft.run_torch(method, "selective", small)["loss"] == pytest.approx(ours, abs=sft.LOSS_TOLERANCE)


# --- the table ---------------------------------------------------------------------------------------------------------


def measured(cost):
    """Sides that take so many seconds for a step whatever they do."""
    one = {"compile": 2.0, "step": cost, "loss": 10.5, "memory": 100 * cost, "peak": 1e12}
    return {(method, variant): one for method in sft.METHODS for variant in sft.VARIANTS}


NAMES = {"full": "a peer", "lora": "another"}


def test_rows_have_the_ratio_to_the_peer():
    table = sft.rows(measured(2.0), measured(6.0), NAMES)
    assert all(set(row) == {"work", "ours", "peer", "peer_name", "ratio", "unit"} for row in table)
    rates = [row for row in table if row["unit"] == "tokens/CPU-s"]
    assert len(rates) == 6 and all(row["ours"] == 2 * 251 / 2.0 and row["ratio"] == pytest.approx(3) for row in rates)
    memory = [row for row in table if row["unit"] == "MiB"]
    assert len(memory) == 6 and all(row["ratio"] == pytest.approx(3) for row in memory)
    assert all(row["ratio"] is None for row in table if row["unit"] in ("CPU-s", "nats"))


def test_decisions_are_counted_by_their_labels():
    ours = measured(2.0)
    alone, peer = [row for row in sft.rows(ours, measured(6.0), NAMES) if row["unit"] == "decisions/CPU-s"]
    assert alone["ours"] == peer["ours"] == 2 * 32 / 2.0
    assert alone["peer"] == 4 / 2.0 and peer["peer"] == 2 * 4 / 6.0  # four prefixes of one document, and of two
    assert alone["peer_name"].startswith("ours") and peer["peer_name"].startswith("a peer")


def test_sides_that_found_other_losses_are_not_compared():
    peer = measured(6.0)
    peer["lora", "selective"] = peer["lora", "selective"] | {"loss": 10.5002}
    with pytest.raises(RuntimeError, match="another and ours have different losses"):
        sft.rows(measured(2.0), peer, NAMES)
    peer["lora", "selective"] = peer["lora", "selective"] | {"loss": float("nan")}
    with pytest.raises(RuntimeError, match="different losses"):
        sft.rows(measured(2.0), peer, NAMES)


def test_without_torch_the_peer_is_null_and_the_bench_still_runs(monkeypatch, capsys):
    calls = []

    def worker(module, side, method, variant, directory, variables):
        assert variables == huge_page_environment()
        calls.append((side, method, variant))
        return measured(2.0)[method, variant]

    monkeypatch.setattr(sft, "MODEL", SMALL)
    monkeypatch.setattr(sft, "in_worker", worker)
    mixed = {"steps": 4.0, "loss": 10.5, "compile": 3.0}
    monkeypatch.setattr(mixed_lengths, "in_worker", lambda module, side, directory, variables: mixed)
    monkeypatch.setattr(sft, "_version", lambda library: None)
    assert main(["bench", "sft", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert {side for side, *_ in calls} == {"ours"} and len(calls) == 7
    others = [row for row in table if not row["peer_name"].startswith("ours")]
    assert all(row["peer"] is None and row["ratio"] is None and row["peer_name"] == sft.MISSING for row in others)
    assert main(["bench", "sft"]) == 0 and "tokens/CPU-s" in capsys.readouterr().out


def test_the_peer_is_named_with_its_versions():
    core = "transformers 5.1, torch 2.2"
    installed = {"transformers": "5.1", "torch": "2.2", "peft": "0.3"}
    assert sft._peer_names(installed) == {"full": core, "lora": f"peft 0.3, {core}"}
    assert sft._peer_names(installed | {"peft": None})["lora"] == f"plain adapters, {core}"
    assert set(sft._peer_names(installed | {"torch": None}).values()) == {sft.MISSING}
