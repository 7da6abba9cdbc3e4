"""Faults that users of other trainers reported in public, each as a test here; others are beside what they concern.

Double BOS, the tokens of a prompt: test_text_generation.py. Accumulation with unequal numbers of labels, packing:
sft/test_loss.py. Tool calls, reasoning, weights of turns, a merge across the seam of an answer: test_chats.py. Windows and
segments: test_attention.py.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lindm.llm.chats import Conversation, chat_examples
from lindm.llm.io import weights
from lindm.llm.lora import add_lora
from lindm.llm.sft.packing import make_batch
from lindm.llm.tokens import completion_example, text_example
from tests.lindm.llm.io.tensors import everything
from tests.lindm.llm.reading import logits_of
from tests.lindm.llm.small import TURNS, byte_level
from tests.lindm.llm.tiny import TINY, decoder


@pytest.mark.parametrize("pad", [None, "<|im_end|>", "<|endoftext|>"])
def test_the_end_of_an_answer_is_trained_although_it_is_the_padding_token(pad):
    """Trainers that leave out every padding token leave out the ends with it, and the model never stops."""
    tokenizer = byte_level()
    tokenizer.pad_token = pad
    end = tokenizer.eos_token_id
    examples = [
        *chat_examples(tokenizer, Conversation(TURNS), "chat"),
        completion_example(tokenizer, "x", "A", "prompt"),
        text_example(tokenizer, "The state is 3.", "text"),
    ]
    ends = [2, 1, 1]  # two answers, one completion, one document
    assert [int((example.target == end).sum()) for example in examples] == ends
    batch = make_batch([[example] for example in examples], 96, 32)
    assert (np.asarray(batch.targets) == end).sum(axis=1).tolist() == ends
    for row, example in enumerate(examples):
        positions = np.asarray(batch.label_positions)[row][np.asarray(batch.targets)[row] >= 0]
        assert len(positions) == (example.target >= 0).sum() and positions.max() < len(example.ids) - 1, "no label on padding"


def test_adapters_merge_into_a_tied_model_without_a_second_output_layer(tmp_path):
    """The embedding stays as it is and stays the output layer; the merged model computes what the adapted one does."""
    config = replace(TINY, qkv_bias=False, tie_word_embeddings=True)
    model = decoder(3, config)
    before = np.asarray(model.embedding[...])
    add_lora(model, 4, 8.0, jax.random.key(0))
    for i, (_, leaf) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.Param))):
        leaf.set_value(0.3 * jax.random.normal(jax.random.key(i), leaf.get_value().shape)) if leaf is not None else None
    adapted = decoder(3, config)
    add_lora(adapted, 4, 8.0, jax.random.key(0))
    nnx.update(adapted, nnx.state(model))
    weights.save(adapted, tmp_path / "merged")
    files = everything(tmp_path / "merged")
    assert "lm_head.weight" not in files
    np.testing.assert_array_equal(files["model.embed_tokens.weight"], before)
    merged = weights.load(tmp_path / "merged")
    assert merged.config.tie_word_embeddings and merged.lm_head is None
    ids = list(range(3, 40))
    ours, plain = logits_of(merged)(ids), logits_of(decoder(3, config))(ids)
    np.testing.assert_allclose(ours, logits_of(adapted)(ids), rtol=0, atol=2e-4)
    assert np.abs(ours - plain).max() > 0.1


def test_decisions_behind_a_cache_are_those_of_the_training_forward_in_bfloat16():
    """A shared prefix, then tokens one by one, against the whole text at once: they differ by rounding, which must not grow."""
    model, dtype = decoder(1), jnp.bfloat16
    rng = np.random.default_rng(0)
    prefix, own = rng.integers(0, 64, (1, 24)), rng.integers(0, 64, (6, 16))
    whole = np.concatenate([np.repeat(prefix, 6, 0), own], 1)
    positions = jnp.broadcast_to(jnp.arange(whole.shape[1], dtype=jnp.int32), whole.shape)

    def trained(dtype):
        return np.asarray(model.logits(model.last_hidden_state(jnp.asarray(whole, jnp.int32), positions, dtype=dtype)))[:, 24:]

    _, shared = model.forward_with_cache(
        jnp.asarray(prefix, jnp.int32), jnp.zeros(1, jnp.int32), model.init_cache(1, 24, dtype), dtype=dtype, unroll=False
    )
    cache, cached = model.init_cache(6, 16, dtype), []
    for t in range(16):
        hidden, cache = model.forward_with_cache(
            jnp.asarray(own[:, t : t + 1], jnp.int32),
            jnp.full(6, t, jnp.int32),
            cache,
            (shared, jnp.array([24], jnp.int32)),
            dtype=dtype,
            unroll=False,
        )
        cached.append(np.asarray(model.logits(hidden))[:, 0])
    cached, training, true = np.stack(cached, 1), trained(dtype), trained(jnp.float32)
    rounding = np.abs(training - true).max()
    assert 0 < rounding < 0.05 * np.ptp(true)
    assert np.abs(cached - true).max() <= 2 * rounding, "the cache rounds no more than the training forward does"
    actions = slice(0, 4)  # a decision is between the tokens of a few actions
    ordered = np.sort(training[..., actions], -1)
    margin, same = ordered[..., -1] - ordered[..., -2], (cached[..., actions].argmax(-1) == training[..., actions].argmax(-1))
    assert (margin > 2 * rounding).mean() > 0.5, "most decisions are clear"
    assert same[margin > 2 * rounding].all() and same.mean() > 0.9
