"""Conversion of GGUF files, which the `gguf` package writes with interleaved rows as llama.cpp does."""

import json
import struct

import gguf as package
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from lindm.errors import DataError, LindmError
from lindm.llm.io import gguf, weights
from tests.lindm.llm import reference
from tests.lindm.llm.io.tensors import everything

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def alphabet():
    """The characters that byte-level BPE uses for the 256 bytes: printable ones are themselves."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in seen]
    return {**{b: chr(b) for b in seen}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ Ġ"]
BYTES = [*SPECIAL, *alphabet().values(), *(m.replace(" ", "") for m in MERGES)]


def byte_level(writer, pre="smollm", begins=None):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(BYTES)
    writer.add_token_types([3] * 3 + [1] * (len(BYTES) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    if begins is not None:
        writer.add_add_bos_token(begins)


def interleaved(rows, heads):
    """llama.cpp's order: of each head the first rows of both halves, then the second ones, and so on."""
    each = np.split(rows, heads)
    return np.concatenate([one[[j * len(one) // 2 + i for i in range(len(one) // 2) for j in (0, 1)]] for one in each])


NAMES = {
    **{
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
    },
    **{"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm"},
    **{"post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
}


def their_name(name):
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    owner, leaf = name.rsplit(".", 1)
    if owner in top:
        return f"{top[owner]}.{leaf}"
    _, _, i, module = owner.split(".", 3)
    return f"blk.{i}.{NAMES[module]}.{leaf}"


def write(path, name, tensors=None, kind=None, tokens=byte_level, vocabulary=None, change=lambda w: None, skip=()):
    """A .gguf file of a model of `reference`; kernels quantized as `kind`."""
    config = reference.CONFIGS[name]
    family, (width, heads, groups, head) = config["model_type"], reference.sizes(config)
    tensors = reference.weights(name) if tensors is None else tensors
    writer = package.GGUFWriter(path, family)
    keys = {
        **{"block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"]},
        **{"embedding_length": width, "feed_forward_length": config["intermediate_size"], "attention.head_count": heads},
        **{"attention.head_count_kv": groups, "rope.dimension_count": head, "vocab_size": config["vocab_size"]},
        **({"attention.key_length": head, "attention.value_length": head} if head != width // heads else {}),
    }
    for key, value in keys.items():
        if key not in skip:
            writer.add_uint32(f"{family}.{key}", value)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    tokens(writer)
    change(writer)
    for key, value in tensors.items():
        if family == "llama" and "q_proj" in key:
            value = interleaved(value, heads)
        if family == "llama" and "k_proj" in key:
            value = interleaved(value, groups)
        if kind is not None and key.endswith("proj.weight"):
            writer.add_tensor(their_name(key), package.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(their_name(key), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def room_for_bytes(monkeypatch):
    """Vocabularies that hold every byte."""
    for name, config in reference.CONFIGS.items():
        monkeypatch.setitem(reference.CONFIGS, name, config | {"vocab_size": 300})


def converted(tmp_path, *args, **options):
    out = tmp_path / "out"
    out.mkdir()
    return gguf.convert(write(tmp_path / "m.gguf", *args, **options), out), out


def refused(tmp_path, message, *args, **options):
    with pytest.raises(LindmError, match=message) as e:
        converted(tmp_path, *args, **options)
    assert isinstance(e.value, DataError)


# --- weights ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm", "wide", "qwen2", "qwen3"])
def test_every_tensor_is_converted_unchanged(tmp_path, monkeypatch, name):
    if name == "qwen3":  # llama.cpp knows no windows of it
        monkeypatch.setitem(reference.CONFIGS, name, reference.CONFIGS[name] | {"use_sliding_window": False})
    model_config, out = converted(tmp_path, name)
    converted_tensors, wanted = everything(out), reference.weights(name)
    assert converted_tensors.keys() == wanted.keys() and all(np.array_equal(converted_tensors[k], wanted[k]) for k in wanted)
    hugging = reference.write(tmp_path / "hf", name)
    assert model_config == weights.read_model_config(hugging) == weights.read_model_config(out)
    assert weights.load(out).config == model_config


def test_biases_of_a_llama_are_converted_in_order(tmp_path, monkeypatch):
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    monkeypatch.setitem(reference.CONFIGS, "llama", reference.CONFIGS["llama"] | plain)
    model_config, out = converted(tmp_path, "llama")
    assert model_config.qkv_bias and model_config.mlp_bias and not model_config.tie_word_embeddings
    converted_tensors, wanted = everything(out), reference.weights("llama")
    assert converted_tensors.keys() == wanted.keys() and all(np.array_equal(converted_tensors[k], wanted[k]) for k in wanted)


def test_q8_tensors_are_dequantized(tmp_path):
    """Q8_0: of each 32 numbers of a row, a scale in half precision and 32 integers."""
    _, out = converted(tmp_path, "wide", kind=Kind.Q8_0)
    key = "model.layers.1.mlp.down_proj.weight"
    values, true = everything(out)[key], reference.weights("wide")[key].reshape(64, 4, 32)
    scale = np.abs(true).max(axis=-1, keepdims=True) / 127
    np.testing.assert_allclose(
        values.reshape(true.shape),
        np.round(true / scale) * scale.astype(np.float16).astype(np.float32),
        rtol=0,
        atol=1.01 * scale.max(),
    )
    assert np.mean(values.reshape(true.shape) == np.round(true / scale) * scale.astype(np.float16)) > 0.99
    assert values.dtype == np.float32 and np.array_equal(
        everything(out)["model.norm.weight"], reference.weights("wide")["model.norm.weight"]
    )


def test_the_rope_scaling_of_llama_3_1_is_recognized_by_its_factors(tmp_path):
    head = 24
    config = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config |= {"original_max_position_embeddings": 8192}
    factors = 500_000.0 ** (-np.arange(head // 2) / (head // 2)) / reference.frequencies({"rope_parameters": config}, head)

    def change(writer, factors=factors):
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))

    name = "smollm"
    changed = reference.CONFIGS[name] | {"num_attention_heads": 1, "num_key_value_heads": 1, "rope_theta": 500_000.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reference.CONFIGS, name, changed)
        _, out = converted(tmp_path, name, change=change)
        assert json.loads((out / "config.json").read_text())["rope_parameters"] == config
        refused(tmp_path / "x", "rope_freqs.weight has factors that are not", name, change=lambda w: change(w, factors * 1.01))


def test_linear_rope_scaling_is_read(tmp_path):
    def change(writer):
        writer.add_rope_scaling_type(package.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    model_config, _ = converted(tmp_path, "smollm", change=change)
    assert (
        model_config.rope_parameters.rope_type,
        model_config.rope_parameters.factor,
        model_config.rope_parameters.rope_theta,
    ) == ("linear", 4.0, 100_000.0)


@pytest.fixture(autouse=True)
def directories(tmp_path):
    (tmp_path / "x").mkdir()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.add_rope_scaling_type(package.RopeScalingType.YARN), "rope.scaling.type must be none or linear; got 'yarn'"),
        (lambda w: w.add_sliding_window(8), "llama.attention.sliding_window is not known and may change what the model computes"),
        (lambda w: w.add_expert_count(4), "llama.expert_count must be 0; got 4"),
        (lambda w: w.add_float32("llama.logit_scale", 2.0), "llama.logit_scale is not known"),
        (
            lambda w: w.add_string("llama.attention.key_length", "8"),
            "llama.attention.value_length|invalid metadata|head size",
        ),
        (lambda w: w.add_tensor("rope_freqs.weight", np.full(4, np.nan, np.float32)), "factor must .* got nan"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.int32)), "rope_freqs.weight is of type I32"),
        (lambda w: w.add_tensor("blk.0.attn_sinks.weight", np.zeros(3, np.float32)), "has the tensor blk.0.attn_sinks.weight"),
        (lambda w: w.add_tensor("blk.1.attn_q.bias", np.zeros(24, np.float32)), "has the tensor blk.1.attn_q.bias"),
    ],
)
def test_metadata_that_would_change_the_model_raise_an_error(tmp_path, change, message):
    refused(tmp_path, f"m.gguf: .*{message}", "smollm", change=change)


def test_a_missing_key_or_tensor_is_named(tmp_path):
    refused(tmp_path, "lacks llama.block_count", "smollm", skip=("block_count",))
    tensors = reference.weights("smollm")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    refused(tmp_path / "x", "lacks the tensor blk.1.ffn_up.weight", "smollm", tensors)


def test_an_unknown_architecture_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(reference.CONFIGS, "smollm", reference.CONFIGS["smollm"] | {"model_type": "gemma"})
    refused(tmp_path, "general.architecture must be one of llama, qwen2, qwen3; got 'gemma'", "smollm")


def test_a_tensor_of_another_shape_is_named(tmp_path):
    tensors = reference.weights("smollm") | {"model.layers.1.mlp.up_proj.weight": np.zeros((35, 24), np.float32)}
    refused(tmp_path, r"blk.1.ffn_up.weight must be \[36, 24\]; got \[35, 24\]", "smollm", tensors)


def test_a_type_that_cannot_be_dequantized_is_named(tmp_path):
    tensors = reference.weights("smollm") | {"model.norm.weight": np.ones(24, np.int32)}
    refused(tmp_path, "output_norm.weight is of type I32, which cannot be dequantized", "smollm", tensors)


@pytest.mark.fault("F19")
def test_a_damaged_file_is_a_data_error_and_never_a_crash(tmp_path):
    """Truncated at every length of the header and beyond, and with counts and lengths that no file can hold."""
    path = write(tmp_path / "m.gguf", "smollm")
    content = path.read_bytes()
    end = len(content)
    for n in [*range(0, 200), *range(200, end, end // 100), end - 64]:
        path.write_bytes(content[:n])
        with pytest.raises(LindmError, match=r"m\.gguf") as e:
            gguf.read_header(path)
        assert isinstance(e.value, DataError)
    rng, out = np.random.default_rng(0), tmp_path / "out"
    out.mkdir()
    for at in [8, 16, *rng.integers(24, 2_000, 60)]:
        value = [2**64 - 1, 2**40, int(rng.integers(2**63))][at % 3]
        path.write_bytes(content[:at] + struct.pack("<Q", value) + content[at + 8 :])
        try:
            gguf.convert(path, out)
        except LindmError as e:
            assert isinstance(e, DataError) and "m.gguf" in e.message


def test_another_file_is_a_data_error(tmp_path):
    for content in (
        b"",
        b"GGUF",
        b"PK\x03\x04" * 9,
        b"GGUF" + struct.pack(">I", 3) + bytes(64),
        b"GGUF" + struct.pack("<I", 1) + bytes(64),
    ):
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(LindmError, match=r"m.gguf") as e:
            gguf.read_header(tmp_path / "m.gguf")
        assert isinstance(e.value, DataError)
    with pytest.raises(LindmError, match="cannot read"):
        gguf.read_header(tmp_path / "nowhere.gguf")
