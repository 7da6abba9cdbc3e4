"""One step of training against plain numpy: the loss, its gradient, the optimizer, and what a step leaves alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lindm.llm.io import weights
from lindm.llm.parallel.sharding import make_mesh
from lindm.llm.sft import loss
from lindm.llm.sft.loss import ComputeConfig
from lindm.llm.sft.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from lindm.llm.sft.packing import Batch
from tests.lindm.llm import reference, tiny

SGD = optax.sgd(1.0)  # a step's change is then the gradient itself, with the sign turned


def gradient(found: tiny.Trained) -> dict[str, np.ndarray]:
    return {path: found.before[path].astype(float) - found.after[path] for path in found.before}


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
    found = tiny.train([batch], model=weights.load(where), optimizer=SGD)
    return name, tensors, batch, found


def test_the_loss_is_that_of_the_full_logits(model):
    name, tensors, batch, found = model
    loss, accuracy, count = expected(name, tensors, batch)
    (metrics,) = found.metrics
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["num_labels"] == count == 6 and metrics["finite"] and metrics["stop"] == 0
    assert metrics["accuracy"] == pytest.approx(accuracy) and accuracy > 0
    norm = math.sqrt(sum((g**2).sum() for g in gradient(found).values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert int(found.states[1].step) == 1


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
    name, tensors, batch, found = model
    names, turned = PLACES[path]
    if names[0] not in tensors:  # biases of one family, norms of heads of the other
        assert path not in found.after
        return
    rng, h = np.random.default_rng(1), 1e-5
    along = {n: rng.normal(size=tensors[n].shape) for n in names}
    moved = [{n: w.astype(float) + s * h * along.get(n, 0.0) for n, w in tensors.items()} for s in (1, -1)]
    slope = (expected(name, moved[0], batch)[0] - expected(name, moved[1], batch)[0]) / (2 * h)
    directions = [along[n].T if turned else along[n] for n in names]
    mine = gradient(found)[path]
    assert (mine * (np.stack(directions) if len(names) > 1 else directions[0])).sum() == pytest.approx(slope, rel=1e-4)


# --- the same labels in other arrangements -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole():
    """A step of gradient descent on 8 rows at once, of which some, and the whole third pair, have no labels."""
    batch = tiny.batch(5, rows=8, labels=(5, 1, 0, 3, 0, 0, 2, 4))
    return batch, tiny.train([batch], optimizer=SGD)


def same(found: tiny.Trained, whole: tiny.Trained) -> None:
    one, other = found.metrics[0], whole.metrics[0]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)
    assert (one["num_labels"], one["accuracy"]) == (other["num_labels"], pytest.approx(other["accuracy"], rel=1e-6))
    assert close(gradient(found), gradient(whole), 1e-6)


def test_accumulation_is_the_big_batch_though_the_parts_have_different_shares_of_the_labels(whole):
    batch, found = whole
    parts = jax.tree.map(lambda x: x.reshape(4, 2, x.shape[-1]), batch)
    same(tiny.train([parts], optimizer=SGD), found)


def test_packed_documents_train_as_they_do_alone(whole):
    batch, found = whole
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
    same(tiny.train([Batch(**alone, positions=positions, segments=segments)], optimizer=SGD), found)


@pytest.mark.parametrize("chunk", [2, 5])
def test_labels_in_chunks_give_the_same_loss(whole, chunk, monkeypatch):
    batch, found = whole
    monkeypatch.setattr(loss, "LOGITS_CHUNK", chunk)
    same(tiny.train([batch], optimizer=SGD), found)


def test_activations_that_are_kept_give_the_same_gradient(whole):
    batch, found = whole
    same(tiny.train([batch], optimizer=SGD, compute=ComputeConfig(remat="none")), found)


def test_activations_in_bf16_leave_weights_and_gradients_in_f32_and_nearly_where_they_were(whole):
    batch, found = whole
    half = tiny.train([batch], optimizer=SGD, compute=ComputeConfig(dtype=jnp.bfloat16))
    assert half.metrics[0]["loss"] == pytest.approx(found.metrics[0]["loss"], rel=0.02)
    assert half.metrics[0]["loss"] != found.metrics[0]["loss"] and close(gradient(half), gradient(found), 0.1)
    assert {w.dtype for w in half.after.values()} == {np.dtype("float32")}


def test_a_model_that_knows_nothing_pays_the_logarithm_of_the_vocabulary_and_what_is_no_label_is_never_right():
    """All logits are the same, so the first token is the most likely one: in slots without a label too."""
    model, batch = tiny.decoder(), tiny.batch(2, labels=(5, 4, 0, 0, 1, 0, 0, 0))
    assert model.lm_head is not None
    model.lm_head[...] = jnp.zeros_like(model.lm_head[...])
    batch.targets[0, 0, :3] = 0
    (found,) = tiny.train([batch], model=model).metrics
    assert found["loss"] == pytest.approx(math.log(64), rel=1e-6) and found["num_labels"] == 10
    assert found["accuracy"] == pytest.approx((batch.targets == 0).sum() / 10)


def test_a_batch_without_labels_changes_nothing_but_the_count_of_steps():
    found = tiny.train([tiny.batch(0, labels=(0,) * 8)])
    assert found.metrics[0] == {"loss": 0.0, "accuracy": 0.0, "num_labels": 0, "grad_norm": 0.0, "finite": True, "stop": 0}
    assert all((found.after[path] == found.before[path]).all() for path in found.before) and int(found.states[1].step) == 1


# --- the optimizer, by a loop over numbers -------------------------------------------------------------------------------------


def rate(s: int, steps: int, peak: float, warmup: float, floor: float) -> float:
    """Learning rate of step s, counted from 0."""
    warm = min(max(1, round(warmup * steps)), steps)
    if s < warm:
        return peak * (s + 1) / warm
    along = (s - warm) / (steps - warm)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * along)) / 2)


@pytest.mark.parametrize(
    "steps, warmup, floor", [(10, 0.1, 0.1), (10, 0.0, 0.0), (10, 0.35, 0.5), (1, 0.1, 0.1), (2, 0.9, 1.0), (7, 0.99, 0)]
)
def test_the_rate_rises_in_a_line_and_falls_as_a_cosine(steps, warmup, floor):
    schedule = learning_rate_schedule(OptimizerConfig(steps=steps, learning_rate=0.3, warmup=warmup, floor=floor))
    found = [float(schedule(s)) for s in range(steps)]
    assert found == pytest.approx([rate(s, steps, 0.3, warmup, floor) for s in range(steps)], rel=1e-6)
    assert max(found) == pytest.approx(0.3) and all(x > 0 for x in found)


def test_the_optimizer_is_adamw_with_clipping_and_decays_matrices_alone():
    rng = np.random.default_rng(0)
    shapes = {"embedding": (4, 3), "lm_head": (3, 4), "norm": {"weight": (3,)}}
    shapes["blocks"] = {
        "q": {"kernel": (2, 3, 3), "bias": (2, 3), "lora_a": (2, 3, 1), "lora_b": (2, 1, 3)},
        "norm_q": {"weight": (2, 3)},
    }
    decayed = {"embedding", "lm_head", "blocks.q.kernel", "blocks.q.lora_a", "blocks.q.lora_b"}
    settings = {"steps": 5, "learning_rate": 0.1, "weight_decay": 0.3, "clip": 2.0, "beta1": 0.8, "beta2": 0.9, "warmup": 0.4}
    optimizer_config = OptimizerConfig(**settings)
    params = jax.tree.map(lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))
    paths = [".".join(k.key for k in keys) for keys, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    mine = dict(zip(paths, (x.astype(float) for x in jax.tree.leaves(params)), strict=True))
    first, second = ({path: np.zeros_like(w) for path, w in mine.items()} for _ in range(2))
    optimizer, params = make_optimizer(optimizer_config), jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)
    for s in range(5):
        size = (0.05, 1.0, 3.0, 0.2, 10.0)[s]  # the norm is below the clip in two of the steps
        grads = jax.tree.map(lambda w, size=size: (size * rng.normal(size=w.shape)).astype(np.float32), params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        flat = dict(zip(paths, (g.astype(float) for g in jax.tree.leaves(grads)), strict=True))
        norm = math.sqrt(sum((g**2).sum() for g in flat.values()))
        assert (norm > 2.0) == (s in (1, 2, 4))
        for path, g in flat.items():
            g = g * min(1.0, 2.0 / norm)
            first[path] = 0.8 * first[path] + 0.2 * g
            second[path] = 0.9 * second[path] + 0.1 * g**2
            moved = first[path] / (1 - 0.8 ** (s + 1)) / (np.sqrt(second[path] / (1 - 0.9 ** (s + 1))) + 1e-8)
            mine[path] -= rate(s, 5, 0.1, 0.4, 0.1) * (moved + 0.3 * mine[path] * (path in decayed))
    for path, w in zip(paths, jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(w, mine[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\); got 1.0"),
        ({"floor": 1.5}, "floor must be in"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"beta1": 1.0}, "beta1 must be in"),
        ({"beta2": -0.1}, "beta2 must be in"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        OptimizerConfig(**({"steps": 3} | changes))


# --- what a step leaves alone --------------------------------------------------------------------------------------------------


def test_with_adapters_nothing_else_changes():
    found = tiny.train([tiny.batch(i) for i in range(3)], lora=3, weight_decay=0.1)
    names = [f"blocks.{name}.lora_{half}" for name in ("q", "k", "v", "o", "gate", "up", "down") for half in "ab"]
    assert sorted(found.after) == sorted(names)
    assert all(np.abs(found.after[name] - found.before[name]).max() > 1e-4 for name in names)
    still, after = found.frozen
    assert still.keys() == after.keys() and "embedding" in still and "blocks.q.kernel" in still
    assert all((still[name] == after[name]).all() for name in still)


def test_the_first_step_of_adapters_changes_b_alone():
    """B is 0 at first, so the loss does not depend on A yet."""
    found = tiny.train([tiny.batch(0)], lora=3)
    for name in found.after:
        changed = (found.after[name] != found.before[name]).any()
        assert changed == name.endswith(".lora_b"), name


def test_a_loss_that_is_not_finite_is_told():
    batch, model = tiny.batch(0), tiny.decoder()
    model.norm.weight[...] = model.norm.weight[...].at[3].set(jnp.inf)
    found = tiny.train([batch], model=model)
    assert not found.metrics[0]["finite"] and not math.isfinite(found.metrics[0]["loss"])


def test_weights_that_are_not_finite_after_a_finite_gradient_are_told():
    found = tiny.train([tiny.batch(0)], learning_rate=3e38, warmup=0.0, weight_decay=3.0)
    assert math.isfinite(found.metrics[0]["loss"]) and not found.metrics[0]["finite"]


def test_any_process_can_ask_all_to_stop():
    flags = [0, np.array([0, 0, 0, 0, 0, 1, 0, 0], np.int32)]
    found = tiny.train([tiny.batch(0), tiny.batch(1)], make_mesh({"fsdp": 8}), stops=flags)
    assert [m["stop"] for m in found.metrics] == [0, 1]
