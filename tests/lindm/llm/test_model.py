"""The decoder against the forward pass in plain numpy (`reference`): whole, packed, cached, behind a prefix, in bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lindm.llm.config import ModelConfig
from lindm.llm.io.weights import load
from lindm.llm.model import Decoder, abstract_decoder, trained_matmul
from lindm.llm.rope import RopeParameters, rope_frequencies
from tests.lindm.llm import reference

NAMES = reference.FAMILIES
T = 14  # two rows of so many tokens nearly everywhere: programs are shared


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return functools.cache(lambda name: load(reference.write(tmp_path_factory.mktemp(name), name)))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("dtype", "remat", "unroll"))
def _logits(graphdef, state, ids, positions, segments, **options):
    model = nnx.merge(graphdef, state)
    return model.logits(model.last_hidden_state(ids, positions, segments, **options))


def logits(model, ids, positions=None, segments=None, **options):
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape) if positions is None else positions
    ids, positions = jnp.asarray(ids, jnp.int32), jnp.asarray(positions, jnp.int32)
    return np.asarray(_logits(*nnx.split(model), ids, positions, segments, **options))


@functools.partial(jax.jit, static_argnums=0, static_argnames="unroll")
def _extend(graphdef, state, ids, start, cache, shared, unroll):
    model = nnx.merge(graphdef, state)
    hidden, cache = model.forward_with_cache(ids, start, cache, shared, unroll=unroll)
    return model.logits(hidden), cache


def extend(model, ids, start, cache, shared=None, unroll=False):
    output, cache = _extend(
        *nnx.split(model), jnp.asarray(ids, jnp.int32), jnp.asarray(start, jnp.int32), cache, shared, unroll=unroll
    )
    return np.asarray(output), cache


def tokens(name, *shape, seed=1):
    return np.random.default_rng(seed).integers(0, reference.CONFIGS[name]["vocab_size"], shape)


def true(name, ids):
    return reference.logits(name, reference.weights(name), ids)


def close(actual, true, tolerance=3e-6):
    """Relative to the largest logit."""
    np.testing.assert_allclose(actual, true, rtol=0, atol=tolerance * np.abs(true).max())


def changed_at(name, ids, at):
    other = ids.copy()
    other[0, at] = (ids[0, at] + 1) % reference.CONFIGS[name]["vocab_size"]
    return other


@pytest.mark.parametrize("name", NAMES + reference.OTHERS)
def test_logits_equal_those_of_plain_numpy(model, name):
    ids = tokens(name, 2, T)
    wanted = np.stack([true(name, row) for row in ids])
    actual = logits(model(name), ids)
    assert actual.dtype == np.float32 and np.ptp(wanted) > 5  # nothing is checked by logits that are all alike
    close(actual, wanted)


@pytest.mark.parametrize("kind", ["default", "linear"])
def test_default_and_linear_rope_equal_plain_numpy(tmp_path, monkeypatch, kind):
    rope = {"rope_type": kind, "rope_theta": 50.0} | ({"factor": 3.0} if kind == "linear" else {})
    monkeypatch.setitem(reference.CONFIGS, "qwen2", reference.CONFIGS["qwen2"] | {"rope_parameters": rope})
    ids = tokens("qwen2", 2, T)
    close(logits(load(reference.write(tmp_path, "qwen2")), ids)[1], true("qwen2", ids[1]))


def test_rope_frequencies_of_llama_3_1():
    """Theta 500000, head 128: short wavelengths are kept, long ones divided by eight, and it goes over from one to the other."""
    rope = RopeParameters(
        rope_theta=500_000.0,
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    actual, plain = np.array(rope_frequencies(rope, 128)), 500_000.0 ** -(np.arange(64) / 64)
    config = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = {"rope_parameters": config | {"original_max_position_embeddings": 8192}}
    np.testing.assert_allclose(actual, reference.frequencies(config, 128), rtol=1e-12)
    ratio = plain / actual
    # 2 pi theta^(i/64) < 2048 for i < 28.2, and > 8192 for i > 34.99
    assert np.allclose(ratio[:29], 1) and np.allclose(ratio[35:], 8) and np.all(np.diff(ratio[28:36]) > 0)
    np.testing.assert_allclose(rope_frequencies(RopeParameters(rope_theta=500_000.0), 128), plain, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_attends_to_no_later_token(model, name):
    ids = tokens(name, 2, T)
    before, after = logits(model(name), ids), logits(model(name), changed_at(name, ids, 7))
    assert np.array_equal(before[0, :7], after[0, :7]) and np.array_equal(before[1], after[1])
    assert np.any(before[0, 7:12] != after[0, 7:12], axis=-1).all()


def test_a_sliding_window_hides_earlier_tokens(model):
    """Two layers of 5 keys see 8 tokens back and no further."""
    ids = tokens("mistral", 2, T)
    before, after = logits(model("mistral"), ids), logits(model("mistral"), changed_at("mistral", ids, 3))
    assert np.any(before != after, axis=-1)[0].tolist() == [False] * 3 + [True] * 9 + [False] * 2


@pytest.mark.fault("F22")
@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_do_not_attend_to_each_other(model, name):
    ends = (6, 9, T)
    ids, segments = tokens(name, 2, T), np.repeat(np.arange(3), np.diff((0, *ends)))
    positions = np.arange(T) - np.array((0, *ends))[segments]
    placed = np.tile(positions, (2, 1)), jnp.asarray(np.tile(segments, (2, 1)), jnp.int32)
    packed = logits(model(name), ids, *placed)
    for start, end in zip((0, *ends[:-1]), ends, strict=True):
        close(packed[1, start:end], true(name, ids[1, start:end]))
    other = logits(model(name), changed_at(name, ids, 2), *placed)
    assert np.array_equal(other[0, 6:], packed[0, 6:]) and not np.array_equal(other[0, 2:6], packed[0, 2:6])


def test_a_document_has_the_factors_of_longrope_for_its_own_length(model):
    """13 tokens are more than the original length of 12, whatever shares the row."""
    ids, positions = tokens("phi4", 1, 20), np.concatenate([np.arange(13), np.arange(7)])[None]
    segments = jnp.asarray(np.repeat([0, 1], [13, 7])[None], jnp.int32)
    packed = logits(model("phi4"), ids, positions, segments)[0]
    close(packed[:13], true("phi4", ids[0, :13]))
    close(packed[13:], true("phi4", ids[0, 13:]))
    whole = logits(model("phi4"), ids[:, :13], positions[:, :13])[0]
    close(whole, true("phi4", ids[0, :13]))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_scan_unroll_and_remat_give_the_same_logits(model, name):
    ids = tokens(name, 2, T)
    plain = logits(model(name), ids)
    for options in ({"unroll": True}, {"remat": "full"}, {"remat": "selective"}):
        close(logits(model(name), ids, **options), plain, 1e-6)


def test_the_gradient_does_not_depend_on_remat(model):
    graphdef, state = nnx.split(model("smollm"))
    ids = jnp.asarray(tokens("smollm", 2, 8), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 8))

    def loss(state, remat):
        model = nnx.merge(graphdef, state)
        return jax.nn.logsumexp(model.logits(model.last_hidden_state(ids, positions, remat=remat)), axis=-1).sum()

    none, *others = (jax.jit(jax.grad(loss), static_argnums=1)(state, remat) for remat in ("none", "selective", "full"))
    for other in others:
        for a, b in zip(jax.tree.leaves(none), jax.tree.leaves(other), strict=True):
            close(np.asarray(b), np.asarray(a), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_with_a_cache_equals_the_full_forward_pass(model, name):
    """Rows of different lengths: what a shorter row was padded with is overwritten, and never attended to."""
    m, ids, at = model(name), tokens(name, 2, T), np.array([8, 5])
    wanted = [true(name, row) for row in ids]
    actual, cache = extend(m, ids[:, :8], np.zeros(2), m.init_cache(2, 16))
    for r in range(2):
        close(actual[r, : at[r]], wanted[r][: at[r]])
    for step in range(6):
        actual, cache = extend(m, ids[np.arange(2), at][:, None], at, cache, unroll=name == "qwen3" and step > 2)
        for r in range(2):
            close(actual[r, 0], wanted[r][at[r]])
        at = at + 1


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_rows_share_the_cache_of_their_prefix(model, name):
    """Two prefixes of different lengths, two rows behind each; windows reach back into the prefix."""
    m, prefixes, rows = model(name), tokens(name, 2, 7), tokens(name, 4, 6, seed=2)
    lengths = (7, 4)
    _, shared = extend(m, prefixes, np.zeros(2), m.init_cache(2, 7))
    shared = (shared, jnp.asarray(lengths, jnp.int32))
    first, cache = extend(m, rows[:, :4], np.zeros(4), m.init_cache(4, 6), shared)
    second, _ = extend(m, rows[:, 4:], np.full(4, 4), cache, shared)
    for r, actual in enumerate(np.concatenate([first, second], axis=1)):
        n = lengths[r // 2]
        close(actual, true(name, np.concatenate([prefixes[r // 2, :n], rows[r]]))[n:])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16_activations_give_close_logits(model, name):
    ids = tokens(name, 2, T)
    actual = logits(model(name), ids, dtype=jnp.bfloat16)
    assert actual.dtype == np.float32 and not np.array_equal(actual, logits(model(name), ids))
    close(actual[0], true(name, ids[0]), 0.05)


@pytest.mark.parametrize("name", NAMES + reference.OTHERS)
def test_num_parameters_equals_the_number_of_weights(model, name):
    count = sum(x.size for x in reference.weights(name).values())
    assert model(name).config.num_parameters == count
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model(name)))) == count


def test_the_abstract_decoder_has_the_structure_and_shapes_of_a_decoder():
    a = ModelConfig(
        model_type="qwen3",
        vocab_size=11,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        intermediate_size=12,
        qk_norm="heads",
    )
    graphdef, state = nnx.split(Decoder(a, nnx.Rngs(0)))
    graphdef_, state_ = nnx.split(abstract_decoder(a))
    assert graphdef == graphdef_
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), state_)


@pytest.mark.parametrize("lead", [(7,), (2, 5)])
def test_trained_matmul_and_its_gradients_are_sums_over_all_rows(lead):
    rng, n_in, n_out = np.random.default_rng(0), 3, 4
    x, kernel, g = (rng.normal(size=s).astype(np.float32) for s in ((*lead, n_in), (n_in, n_out), (*lead, n_out)))
    y, back = jax.vjp(trained_matmul, jnp.asarray(x), jnp.asarray(kernel))
    of_x, of_kernel = back(jnp.asarray(g))
    expected_x, expected_kernel = np.zeros(x.shape), np.zeros(kernel.shape)
    for row in np.ndindex(*lead):
        np.testing.assert_allclose(y[row], x[row].astype(float) @ kernel, atol=1e-5)
        expected_x[row] = kernel.astype(float) @ g[row]
        expected_kernel += np.outer(x[row].astype(float), g[row])
    np.testing.assert_allclose(of_x, expected_x, atol=1e-5)
    np.testing.assert_allclose(of_kernel, expected_kernel, atol=1e-5)
