"""GGUF files that are written: read back by the reader, and by the `gguf` package itself."""

from dataclasses import replace

import gguf as package
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from gguf.quants import dequantize, quantize
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer

import lindm as ld
from lindm.errors import DataError, NonFiniteError, UsageError
from lindm.llm.config import ModelConfig
from lindm.llm.io import gguf, gguf_writer, weights
from lindm.llm.io.gguf_tokenizer import LLAMA3, QWEN2
from lindm.llm.model import Decoder
from lindm.llm.rope import RopeParameters
from tests.lindm.llm.io.tensors import everything
from tests.lindm.llm.small import byte_level, dummy_space

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=400,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    rms_norm_eps=1e-5,
    init_std=0.3,
)
CONFIGS = {
    "llama": CONFIG,
    "llama 3": replace(
        CONFIG,
        tie_word_embeddings=True,
        rope_parameters=RopeParameters(rope_theta=5e5, rope_type="llama3", factor=8.0, low_freq_factor=1.0),
    ),
    "linear": replace(CONFIG, rope_parameters=RopeParameters(rope_theta=1e4, rope_type="linear", factor=4.0)),
    "mistral": replace(CONFIG, model_type="mistral", head_dim=8),
    "qwen2": replace(CONFIG, model_type="qwen2", qkv_bias=True, tie_word_embeddings=True),
    "qwen3": replace(CONFIG, model_type="qwen3", qk_norm="heads", head_dim=32),
}


def split_by(pattern, nfc=False):
    """A byte-level tokenizer with the pattern of another model."""
    tokenizer = byte_level(normalizer=normalizers.NFC() if nfc else None)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


TOKENIZERS = {
    "smollm": lambda: byte_level(bos="<|begin|>"),
    "qwen2": lambda: split_by(QWEN2, nfc=True),
    "llama": lambda: dummy_space("metaspace"),
}


def directory(root, config=CONFIG, tokenizer=None, scale=1.0):
    """A Hugging Face directory of a random model whose weights are all different, norms and biases, too."""
    (tokenizer or byte_level()).save_pretrained(str(root / "tokenizer"))
    model = Decoder(config, nnx.Rngs(0), jnp.float32)
    rng = np.random.default_rng(0)
    for _, leaf in nnx.iter_graph(model):
        if isinstance(leaf, nnx.Param):
            leaf.set_value(jnp.asarray(scale * rng.normal(size=leaf.get_value().shape), jnp.float32))
    weights.save(model, root / "model", like=root / "tokenizer")
    return root / "model"


def fitted(name, tensor, dtype):
    """What the file must hold, in float32."""
    if tensor.ndim == 1 or dtype == "f32":
        return tensor
    if dtype == "q8_0" and tensor.shape[-1] % 32 == 0:
        kind = package.GGMLQuantizationType.Q8_0
        return dequantize(quantize(tensor, kind), kind)
    return tensor.astype(ml_dtypes.bfloat16 if dtype == "bf16" else np.float16).astype(np.float32)


@pytest.mark.parametrize("name, dtype", [(name, "f32") for name in CONFIGS] + [("llama", d) for d in ("f16", "bf16", "q8_0")])
def test_a_file_is_read_back_as_the_same_model(tmp_path, name, dtype):
    source, config = directory(tmp_path, CONFIGS[name]), CONFIGS[name]
    ld.export(source, tmp_path / "m.gguf", dtype=dtype)
    (tmp_path / "out").mkdir()
    back = gguf.convert(tmp_path / "m.gguf", tmp_path / "out")
    family = "llama" if name == "mistral" else config.model_type
    assert back == replace(config, model_type=family, init_std=back.init_std)
    tensors, wanted = everything(tmp_path / "out"), everything(source)
    assert tensors.keys() == wanted.keys()
    for key, tensor in wanted.items():
        np.testing.assert_array_equal(tensors[key], fitted(key, tensor, dtype), err_msg=key)


def test_rows_are_interleaved_and_small_matrices_are_float16(tmp_path):
    """By the reader of the package: first rows of both halves of a head, then second ones. 48 columns are no blocks of 32."""
    source = directory(tmp_path, replace(CONFIG, hidden_size=48))
    ld.export(source, tmp_path / "new" / "m.gguf", dtype="q8_0")
    read = {tensor.name: tensor for tensor in package.GGUFReader(tmp_path / "new" / "m.gguf").tensors}
    q = everything(source)["model.layers.1.self_attn.q_proj.weight"]
    stored = read["blk.1.attn_q.weight"]
    assert stored.tensor_type == package.GGMLQuantizationType.F16
    order = [head * 16 + j + half * 8 for head in range(4) for j in range(8) for half in (0, 1)]
    np.testing.assert_array_equal(stored.data, q[order].astype(np.float16))
    assert read["blk.0.ffn_down.weight"].tensor_type == package.GGMLQuantizationType.Q8_0
    assert read["blk.0.attn_norm.weight"].tensor_type == package.GGMLQuantizationType.F32


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_is_read_back_with_its_chat_template_and_special_tokens(tmp_path, name):
    tokenizer = TOKENIZERS[name]()
    source = directory(tmp_path, replace(CONFIG, vocab_size=400 if name != "llama" else 512), tokenizer)
    ld.export(source, tmp_path / "m.gguf")
    (tmp_path / "out").mkdir()
    gguf.convert(tmp_path / "m.gguf", tmp_path / "out")
    back = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert back.chat_template == tokenizer.chat_template
    for key in ("bos_token", "eos_token", "unk_token"):
        assert getattr(back, key) == getattr(tokenizer, key)
    texts = ["The state is 3.", " The  reward is 0.25\n", "x 12345 é", f"a {tokenizer.eos_token} b"]
    assert back(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    fields = package.GGUFReader(tmp_path / "m.gguf").fields
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert len(kinds) == len(fields["tokenizer.ggml.tokens"].contents()) == weights.read_model_config(source).vocab_size
    assert kinds[tokenizer.eos_token_id] == 3 and kinds[-1] == 5 and 1 in kinds
    assert fields["tokenizer.ggml.model"].contents() == ("llama" if name == "llama" else "gpt2")
    assert name == "llama" or fields["tokenizer.ggml.pre"].contents() == name


def test_the_token_that_ends_an_answer_is_that_of_the_generation_config(tmp_path):
    source = directory(tmp_path)
    (source / "manifest.json").unlink()
    (source / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    ld.export(source, tmp_path / "m.gguf")
    assert package.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.eos_token_id"].contents() == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "smollm3"}, "must have a model of llama, mistral, qwen2, qwen3; got smollm3"),
        ({"model_type": "mistral", "sliding_windows": (5, 5)}, "mistral must have no sliding window"),
        ({"qkv_bias": True, "o_bias": True}, "llama must not have biases"),
        ({"rope_parameters": RopeParameters(rope_type="yarn", factor=2.0)}, "must be default, linear or llama3; got .*yarn"),
    ],
)
def test_a_model_that_a_file_cannot_have_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        gguf_writer.model_metadata(replace(CONFIG, **changes), "here")


def test_a_tokenizer_whose_rule_has_no_name_is_refused(tmp_path):
    tokenizer = split_by(LLAMA3)  # its merges are applied to whole words, too: not the tokenizer of Llama 3
    with pytest.raises(DataError, match="none of the rules by which a GGUF file splits texts"):
        gguf_writer.tokenizer_metadata(tokenizer, 400, tmp_path)
    with pytest.raises(DataError, match="at most the 100 tokens of the model; got"):
        gguf_writer.tokenizer_metadata(byte_level(), 100, tmp_path)


def test_what_cannot_be_written_leaves_no_file(tmp_path):
    source = directory(tmp_path, scale=1e5)
    with pytest.raises(NonFiniteError, match=r"model.embed_tokens.weight is not finite"):
        ld.export(source, tmp_path / "m.gguf", dtype="f16")
    with pytest.raises(NonFiniteError, match=r"model.embed_tokens.weight is not finite"):
        ld.export(source, tmp_path / "out", dtype="f16")
    with pytest.raises(ValueError, match=r"out must end in .gguf with the dtype q8_0; got .*out"):
        ld.export(source, tmp_path / "out", dtype="q8_0")
    with pytest.raises(ValueError, match="dtype must be one of f32, f16, bf16, q8_0; got 'f8'"):
        ld.export(source, tmp_path / "m.gguf", dtype="f8")
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(UsageError, match=r"there.gguf exists"):
        ld.export(source, tmp_path / "there.gguf")
    assert (tmp_path / "there.gguf").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "there.gguf", "tokenizer"]
