"""Loading of weights: every tensor, format and sharding; damaged directories raise errors."""

import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from lindm.errors import DataError, LindmError
from lindm.llm import lora
from lindm.llm.config import read_model_config
from lindm.llm.io import safetensors_files, weights
from lindm.llm.model import Decoder
from lindm.llm.parallel.sharding import make_mesh
from tests.lindm.llm import reference
from tests.lindm.llm.io.tensors import arrays, equal

NAMES = reference.FAMILIES


# --- in --------------------------------------------------------------------------------------------------------------------


def test_every_tensor_is_loaded_into_its_weight(tmp_path):
    w, m = reference.weights("qwen3"), weights.load(reference.write(tmp_path, "qwen3"))
    places = {
        **{f"self_attn.{p}_proj.weight": (f"{p}.kernel", True) for p in "qkvo"},
        **{f"mlp.{p}_proj.weight": (f"{p}.kernel", True) for p in ("gate", "up", "down")},
        **{"self_attn.q_norm.weight": ("norm_q.weight", False), "self_attn.k_norm.weight": ("norm_k.weight", False)},
        **{"input_layernorm.weight": ("norm_attention.weight", False)},
        **{"post_attention_layernorm.weight": ("norm_mlp.weight", False)},
    }
    loaded = arrays(m)
    assert np.array_equal(loaded["embedding"], w["model.embed_tokens.weight"])
    assert np.array_equal(loaded["lm_head"], w["lm_head.weight"].T) and np.array_equal(
        loaded["norm.weight"], w["model.norm.weight"]
    )
    for theirs, (ours, transposed) in places.items():
        for i in range(3):
            value = w[f"model.layers.{i}.{theirs}"]
            assert np.array_equal(loaded[f"blocks.{ours}"][i], value.T if transposed else value)
    assert len(loaded) == 3 + len(places)


def test_biases_are_loaded_into_their_weights(tmp_path):
    w, loaded = reference.weights("llama"), arrays(weights.load(reference.write(tmp_path, "llama")))
    for theirs, ours in {"self_attn.o_proj": "o", "self_attn.k_proj": "k", "mlp.down_proj": "down"}.items():
        assert np.array_equal(loaded[f"blocks.{ours}.bias"], np.stack([w[f"model.layers.{i}.{theirs}.bias"] for i in range(3)]))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_loaded_decoder_has_the_structure_of_a_new_one(tmp_path, name):
    loaded = weights.load(reference.write(tmp_path, name))
    new = Decoder(read_model_config(tmp_path), nnx.Rngs(0))
    assert nnx.graphdef(loaded) == nnx.graphdef(new)
    assert all(isinstance(leaf, nnx.Param) for _, leaf in nnx.to_flat_state(nnx.state(loaded)))


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16])
def test_files_in_sixteen_bits_are_read(tmp_path, kind):
    rounded = {k: v.astype(kind).astype(np.float32) for k, v in reference.weights("smollm").items()}
    half = weights.load(reference.write(tmp_path / "a", "smollm", dtype=kind))
    assert equal(half, weights.load(reference.write(tmp_path / "b", "smollm", rounded)))
    if kind is ml_dtypes.bfloat16:
        narrow = arrays(weights.load(tmp_path / "a", dtype=jnp.bfloat16))
        assert all(
            x.dtype == ml_dtypes.bfloat16 and np.array_equal(x.astype(np.float32), arrays(half)[k]) for k, x in narrow.items()
        )


def test_a_model_in_several_files_is_the_same(tmp_path):
    one = weights.load(reference.write(tmp_path / "a", "mistral"))
    assert equal(one, weights.load(reference.write(tmp_path / "b", "mistral", shards=3)))


def test_each_device_reads_its_own_part_and_no_more(tmp_path, monkeypatch):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    read, open_file = [], safetensors_files.open_file

    class Slice:
        def __init__(self, inner):
            self.inner = inner

        def __getitem__(self, index):
            read.append(self.inner[index].size)
            return self.inner[index]

    class File:
        def __init__(self, inner):
            self.inner = inner

        def get_slice(self, name):
            return Slice(self.inner.get_slice(name))

    whole = weights.load(reference.write(tmp_path, "qwen3"))
    known = weights.check_tensors(tmp_path, whole.config)
    monkeypatch.setattr(weights, "check_tensors", lambda *_: known)
    monkeypatch.setattr(safetensors_files, "open_file", lambda file: File(open_file(file)))
    cut = weights.load(tmp_path, mesh=mesh)
    assert equal(cut, whole)
    assert sum(read) == whole.config.num_parameters  # `data` holds the same twice, and it is read once
    assert max(read) == 48 * 20 // 4  # a quarter of the embedding
    assert cut.blocks.q.kernel[...].sharding == NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    assert cut.blocks.down.kernel[...].sharding == NamedSharding(mesh, PartitionSpec(None, "tensor", "fsdp"))
    assert cut.embedding[...].addressable_shards[0].data.shape == (24, 10)


@pytest.mark.parametrize(
    "base, kind", [("bf16", np.float32), ("int8", np.float32), ("int8", ml_dtypes.bfloat16), ("nf4", np.float32)]
)
def test_kernels_quantized_while_loading_equal_those_quantized_afterwards(tmp_path, base, kind):
    directory = reference.write(tmp_path, "wide", dtype=kind)
    wanted = lora.quantize(weights.load(directory), base)
    for mesh in (None, make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])):
        model = weights.load(directory, mesh=mesh, base=base)
        assert equal(model, wanted) and nnx.graphdef(model) == nnx.graphdef(wanted)
        assert isinstance(model.embedding, nnx.Param) and isinstance(model.blocks.norm_mlp.weight, nnx.Param)
    if base != "bf16":
        assert model.blocks.o.kernel.codes[...].sharding.spec == PartitionSpec(None, "tensor", "fsdp")


def test_invalid_arguments_raise_an_error_before_any_weight_is_read(tmp_path, monkeypatch):
    directory = reference.write(tmp_path, "llama")
    monkeypatch.setattr(weights, "_read_slice", None)
    with pytest.raises(ValueError, match="base must be one of f32, bf16, int8, nf4; got 'fp8'"):
        weights.load(directory, base="fp8")
    with pytest.raises(ValueError, match="nf4 needs kernels whose inputs are a multiple of 64; got 24"):
        weights.load(directory, base="nf4")
    with pytest.raises(ValueError, match=r"mesh must divide embedding \[61, 24\]: tensor=2 does not divide 61"):
        weights.load(directory, mesh=make_mesh({"tensor": 2, "fsdp": 4}))


# --- what is not sound -----------------------------------------------------------------------------------------------------

Q = "model.layers.1.self_attn.q_proj.weight"


def changed(directory, name="llama", remove=None, **put):
    tensors = reference.weights(name) | {k.replace("__", "."): v for k, v in put.items()}
    tensors.pop(remove, None)
    return reference.write(directory, name, tensors)


def refused(directory, message):
    with pytest.raises(LindmError, match=message) as e:
        weights.load(directory)
    assert isinstance(e.value, DataError)


def test_a_missing_tensor_is_named(tmp_path):
    refused(changed(tmp_path, remove=Q), f"lacks the tensor {Q}")
    refused(changed(tmp_path, remove="lm_head.weight"), "lacks the tensor lm_head.weight")


def test_a_tensor_of_another_shape_is_named(tmp_path):
    tensors = reference.weights("llama")
    tensors[Q] = np.ascontiguousarray(tensors[Q][:, :-1])
    refused(reference.write(tmp_path, "llama", tensors), rf"model.safetensors: {Q} must be \[24, 24\]; got \[24, 23\]")


def test_an_unexpected_tensor_is_named(tmp_path):
    tensors = reference.weights("smollm") | {"model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)}
    refused(
        reference.write(tmp_path, "smollm", tensors), "has the tensor model.layers.0.self_attn.q_proj.bias, which this model does"
    )


def test_rotary_frequencies_and_an_equal_tied_head_are_accepted(tmp_path):
    tensors = reference.weights("smollm")
    plain = weights.load(reference.write(tmp_path / "a", "smollm"))
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    assert equal(weights.load(reference.write(tmp_path / "b", "smollm", tensors)), plain)
    tensors["lm_head.weight"][66, 23] += 1
    refused(
        reference.write(tmp_path / "b", "smollm", tensors), "lm_head.weight differs from the embedding, although config.json says"
    )
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:60]
    refused(reference.write(tmp_path / "b", "smollm", tensors), "lm_head.weight differs from the embedding")


@pytest.mark.parametrize("kind, spelled", [(np.float64, "F64"), (np.int8, "I8"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")])
def test_another_dtype_is_named(tmp_path, kind, spelled):
    tensors = reference.weights("llama")
    tensors[Q] = tensors[Q].astype(kind)
    reference.write(tmp_path, "llama")
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, f"model.safetensors: {Q} must be of dtype F32, BF16, F16; got {spelled}")


@pytest.mark.fault("F19")
def test_a_pickled_model_is_a_data_error(tmp_path):
    reference.write(tmp_path, "llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused(tmp_path, "has neither model.safetensors nor .*; pytorch_model.bin is a pickle, which is never read")
    (tmp_path / "pytorch_model.bin").unlink()
    refused(tmp_path, "has neither model.safetensors nor model.safetensors.index.json$")


def index_of(directory, change):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return directory


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.fault("F19")
@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda m: m.update({Q: FIRST if m[Q] == SECOND else SECOND}),
            rf"has {Q}, which is in model-0000.-of-00002.safetensors",
        ),
        (lambda m: m.pop(Q), f"has {Q}, which is nowhere according to model.safetensors.index.json"),
        (lambda m: m.update({"another": FIRST}), "model-00001-of-00002.safetensors lacks another, which .* says is there"),
        (lambda m: m.update({Q: "model-00003-of-00002.safetensors"}), "model-00003-of-00002.safetensors is missing; .* names it"),
        (lambda m: m.update({Q: "../x.safetensors"}), "weight_map must name .safetensors files of its own directory; got '../x"),
        (
            lambda m: m.update({Q: "/etc/passwd"}),
            "weight_map must name .safetensors files of its own directory; got '/etc/passwd'",
        ),
        (lambda m: m.update({Q: "pytorch_model.bin"}), "weight_map must name .safetensors files .* got 'pytorch_model.bin'"),
        (lambda m: m.update({Q: "..\0.safetensors"}), "weight_map must name .safetensors files of its own directory"),
        (lambda m: m.update({Q: 3}), f"weight_map must name .safetensors files of its own directory; got 3 for {Q}"),
        (lambda m: m.clear(), "weight_map must be an object with an entry for each tensor"),
    ],
)
def test_an_index_that_does_not_match_its_files_is_a_data_error(tmp_path, change, message):
    refused(index_of(reference.write(tmp_path, "llama", shards=2), change), message)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 10**6])
def test_an_invalid_index_is_a_data_error(tmp_path, content):
    reference.write(tmp_path, "llama", shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    refused(tmp_path, "model.safetensors.index.json: ")


def header(entries, n=None, data=b"\0" * 64):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if n is None else n) + text + data


def entry(begin, end, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.fault("F19", "F32")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        b"PK\x03\x04 a zip",
        header({}, n=2**63),
        header({}, n=90_000_000),
        header({"a": entry(0, 16), "b": entry(8, 24)}),  # one over the other
        header({"a": entry(0, 2**62)}),
        header({"a": entry(0, 16, shape=(2**62, 2**62))}),
        header({"a": entry(0, -16)}),
        header({"a": entry(0, 16, dtype="PICKLE")}),
        header({"a": entry(0, 64, shape=(3,))}),
        header([1]),
        header({"a": entry(0, 16)}),  # and then bytes that belong to nothing
    ],
)
def test_a_hostile_file_is_a_data_error_and_not_a_crash(tmp_path, content):
    reference.write(tmp_path, "llama")
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, "model.safetensors: not a safetensors file that can be read: ")


def test_a_truncated_file_is_a_data_error(tmp_path):
    reference.write(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for n in (7, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:n])
        refused(tmp_path, "model.safetensors: not a safetensors file that can be read: ")
