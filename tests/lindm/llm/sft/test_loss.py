"""The LM loss and its gradient against plain numpy, and the same labels in other arrangements."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lindm.llm.io import weights
from lindm.llm.sft import loss
from lindm.llm.sft.loss import ComputeConfig
from lindm.llm.sft.packing import Batch
from tests.lindm.llm import reference, tiny

SGD = optax.sgd(1.0)  # a step's change is then the gradient itself, with the sign turned


def gradient(trained: tiny.Trained) -> dict[str, np.ndarray]:
    return {path: trained.before[path].astype(float) - trained.after[path] for path in trained.before}


def close(one: dict, other: dict, share: float) -> bool:
    """Two gradients, up to a share of the norm."""
    norm = math.sqrt(sum((g**2).sum() for g in one.values()))
    return all(np.abs(one[path] - other[path]).max() <= share * norm for path in one)


# --- the loss, by the whole table of logits in double precision ------------------------------------------------------------


def documents(batch: Batch):
    """(ids, labels) of every document of a batch [accumulate, rows, ...]; labels: (place, token)."""
    arrays = [x.reshape(-1, x.shape[-1]) for x in (batch.ids, batch.segments, batch.label_positions, batch.targets)]
    for ids, segments, at, target in zip(*arrays, strict=True):
        for segment in np.unique(segments):
            (places,) = np.nonzero(segments == segment)
            own = [(a - places[0], t) for a, t in zip(at, target, strict=True) if t >= 0 and segments[a] == segment]
            yield ids[places], own


def weighted_mean(name: str, tensors: dict, batch: Batch) -> float:
    """sum of weight x loss / sum of weights, label by label."""
    assert batch.weights is not None
    total, weight = 0.0, 0.0
    for a, r, i in np.argwhere(batch.targets >= 0):
        own = batch.segments[a, r] == batch.segments[a, r, batch.label_positions[a, r, i]]
        place = batch.label_positions[a, r, i] - np.argmax(own)
        logits = reference.logits(name, tensors, batch.ids[a, r, own])[place]
        total += batch.weights[a, r, i] * (np.log(np.exp(logits).sum()) - logits[batch.targets[a, r, i]])
        weight += batch.weights[a, r, i]
    return float(total / weight)


def expected(name: str, tensors: dict, batch: Batch) -> tuple[float, float, int]:
    """Loss, accuracy and number of labels."""
    total, right, count = 0.0, 0, 0
    for ids, labels in documents(batch):
        if labels:
            logits = reference.logits(name, tensors, ids)
            for place, token in labels:
                total -= logits[place][token] - np.log(np.exp(logits[place]).sum())
                right += np.argmax(logits[place]) == token
                count += 1
    return total / count, right / count, count


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request, directory):
    """name, tensors and what a step of gradient descent does: `llama` has biases, `qwen3` norms of heads, windows, no biases."""
    name = request.param
    tensors = reference.weights(name)
    where = reference.write(directory / name, name)
    batch = tiny.batch(3, rows=3, T=9, L=4, labels=(4, 2, 0), vocabulary=reference.CONFIGS[name]["vocab_size"])
    likely = [
        int(np.argmax(reference.logits(name, tensors, ids)[place])) for ids, labels in documents(batch) for place, _ in labels
    ]
    batch.targets[0, 0, 0] = likely[0]  # so that something is right
    trained = tiny.train([batch], model=weights.load(where), optimizer=SGD)
    return name, tensors, batch, trained


def test_the_loss_is_that_of_the_full_logits(model):
    name, tensors, batch, trained = model
    loss, accuracy, count = expected(name, tensors, batch)
    (metrics,) = trained.metrics
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["num_labels"] == count == 6 and metrics["finite"] and metrics["stop"] == 0
    assert metrics["accuracy"] == pytest.approx(accuracy) and accuracy > 0
    norm = math.sqrt(sum((g**2).sum() for g in gradient(trained).values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert int(trained.states[1].step) == 1


def test_with_weights_the_loss_is_the_weighted_mean_and_the_other_metrics_stay(model, directory, monkeypatch):
    name, tensors, batch, trained = model
    monkeypatch.setattr(loss, "LOGITS_CHUNK", 3)
    drawn = np.random.default_rng(5).choice([0.25, 0.5, 1.0, 3.0], batch.targets.shape)
    weighted = replace(batch, weights=np.where(batch.targets >= 0, drawn, 0).astype(np.float32))
    (metrics,) = tiny.train([weighted], model=weights.load(directory / name), optimizer=SGD).metrics
    assert metrics["loss"] == pytest.approx(weighted_mean(name, tensors, weighted), rel=1e-5)
    assert abs(metrics["loss"] - trained.metrics[0]["loss"]) > 1e-3
    assert (metrics["accuracy"], metrics["num_labels"]) == (trained.metrics[0]["accuracy"], 6)


PLACES = {  # of ours: tensors of a file, a layer each, and whether they are turned
    "embedding": (["model.embed_tokens.weight"], False),
    "lm_head": (["lm_head.weight"], True),
    "norm.weight": (["model.norm.weight"], False),
    "blocks.q.kernel": ([f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)], True),
    "blocks.v.kernel": ([f"model.layers.{i}.self_attn.v_proj.weight" for i in range(3)], True),
    "blocks.down.kernel": ([f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)], True),
    "blocks.norm_mlp.weight": ([f"model.layers.{i}.post_attention_layernorm.weight" for i in range(3)], False),
    "blocks.k.bias": ([f"model.layers.{i}.self_attn.k_proj.bias" for i in range(3)], False),
    "blocks.norm_q.weight": ([f"model.layers.{i}.self_attn.q_norm.weight" for i in range(3)], False),
}


@pytest.mark.parametrize("path", PLACES)
def test_the_gradient_is_the_slope_of_the_loss(model, path):
    """Along a random direction in one weight, by central differences in double precision."""
    name, tensors, batch, trained = model
    names, turned = PLACES[path]
    if names[0] not in tensors:  # biases of one family, norms of heads of the other
        assert path not in trained.after
        return
    rng, h = np.random.default_rng(1), 1e-5
    along = {n: rng.normal(size=tensors[n].shape) for n in names}
    moved = [{n: w.astype(float) + s * h * along.get(n, 0.0) for n, w in tensors.items()} for s in (1, -1)]
    slope = (expected(name, moved[0], batch)[0] - expected(name, moved[1], batch)[0]) / (2 * h)
    directions = [along[n].T if turned else along[n] for n in names]
    mine = gradient(trained)[path]
    assert (mine * (np.stack(directions) if len(names) > 1 else directions[0])).sum() == pytest.approx(slope, rel=1e-4)


# --- the same labels in other arrangements -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole():
    """A step of gradient descent on 8 rows at once, of which some, and the whole third pair, have no labels."""
    batch = tiny.batch(5, rows=8, labels=(5, 1, 0, 3, 0, 0, 2, 4))
    return batch, tiny.train([batch], optimizer=SGD)


def same(trained: tiny.Trained, whole: tiny.Trained) -> None:
    one, other = trained.metrics[0], whole.metrics[0]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)
    assert (one["num_labels"], one["accuracy"]) == (other["num_labels"], pytest.approx(other["accuracy"], rel=1e-6))
    assert close(gradient(trained), gradient(whole), 1e-6)


@pytest.mark.fault("F22")
def test_accumulation_is_the_big_batch_though_the_parts_have_different_shares_of_the_labels(whole):
    batch, trained = whole
    parts = jax.tree.map(lambda x: x.reshape(4, 2, x.shape[-1]), batch)
    same(tiny.train([parts], optimizer=SGD), trained)


@pytest.mark.fault("F22")
def test_packed_documents_train_as_they_do_alone(whole):
    batch, trained = whole
    T, L = batch.ids.shape[-1], batch.label_positions.shape[-1]
    rows = list(documents(batch))
    alone = {name: np.zeros((1, len(rows), n), np.int32) for name, n in (("ids", T), ("label_positions", L), ("targets", L))}
    alone["targets"] -= 1
    segments = np.full_like(alone["ids"], -1)
    for r, (ids, labels) in enumerate(rows):
        alone["ids"][0, r, : len(ids)], segments[0, r, : len(ids)] = ids, 0
        for i, (place, token) in enumerate(labels):
            alone["label_positions"][0, r, i], alone["targets"][0, r, i] = place, token
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), segments.shape)
    same(tiny.train([Batch(**alone, positions=positions, segments=segments)], optimizer=SGD), trained)


@pytest.mark.parametrize("chunk", [2, 5])
def test_labels_in_chunks_give_the_same_loss(whole, chunk, monkeypatch):
    batch, trained = whole
    monkeypatch.setattr(loss, "LOGITS_CHUNK", chunk)
    same(tiny.train([batch], optimizer=SGD), trained)


def test_a_weight_of_0_is_no_label_and_one_weight_for_all_is_none(whole):
    batch, trained = whole
    labeled = batch.targets >= 0
    same(tiny.train([replace(batch, weights=np.where(labeled, 0.5, 0).astype(np.float32))], optimizer=SGD), trained)
    kept = labeled & (np.arange(labeled.shape[-1]) % 2 == 0)
    fewer = tiny.train([replace(batch, targets=np.where(kept, batch.targets, -1))], optimizer=SGD)
    left_out = tiny.train([replace(batch, weights=kept.astype(np.float32))], optimizer=SGD)
    assert left_out.metrics[0]["loss"] == pytest.approx(fewer.metrics[0]["loss"], rel=1e-6)
    assert close(gradient(left_out), gradient(fewer), 1e-6)


def test_activations_that_are_kept_give_the_same_gradient(whole):
    batch, trained = whole
    same(tiny.train([batch], optimizer=SGD, compute=ComputeConfig(remat="none")), trained)


def test_activations_in_bf16_leave_weights_and_gradients_in_f32_and_nearly_where_they_were(whole):
    batch, trained = whole
    half = tiny.train([batch], optimizer=SGD, compute=ComputeConfig(dtype=jnp.bfloat16))
    assert half.metrics[0]["loss"] == pytest.approx(trained.metrics[0]["loss"], rel=0.02)
    assert half.metrics[0]["loss"] != trained.metrics[0]["loss"] and close(gradient(half), gradient(trained), 0.1)
    assert {w.dtype for w in half.after.values()} == {np.dtype("float32")}


def test_a_model_that_knows_nothing_pays_the_logarithm_of_the_vocabulary_and_what_is_no_label_is_never_right():
    """All logits are the same, so the first token is the most likely one: in slots without a label too."""
    model, batch = tiny.decoder(), tiny.batch(2, labels=(5, 4, 0, 0, 1, 0, 0, 0))
    assert model.lm_head is not None
    model.lm_head[...] = jnp.zeros_like(model.lm_head[...])
    batch.targets[0, 0, :3] = 0
    (trained,) = tiny.train([batch], model=model).metrics
    assert trained["loss"] == pytest.approx(math.log(64), rel=1e-6) and trained["num_labels"] == 10
    assert trained["accuracy"] == pytest.approx((batch.targets == 0).sum() / 10)


def test_a_batch_without_labels_changes_nothing_but_the_count_of_steps():
    trained = tiny.train([tiny.batch(0, labels=(0,) * 8)])
    assert trained.metrics[0] == {"loss": 0.0, "accuracy": 0.0, "num_labels": 0, "grad_norm": 0.0, "finite": True, "stop": 0}
    assert (
        all((trained.after[path] == trained.before[path]).all() for path in trained.before) and int(trained.states[1].step) == 1
    )
