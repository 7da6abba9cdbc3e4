"""Conversion of GGUF files (llama.cpp: Llama, Mistral, Qwen2, Qwen3) to Hugging Face directories.

The header is parsed here; every length is checked against the size of the file before it is used. The `gguf` package dequantizes
the tensors. llama.cpp stores the rows of q and k of the llama family with the two halves of every head interleaved; the order is
restored. Unknown metadata that could change what the model computes raises an error that names the key.
"""

import itertools
import json
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from lindm.errors import DataError
from lindm.io import inputs, limits
from lindm.io.files import storage_errors, write_json
from lindm.llm.config import CONFIG, ModelConfig, parse_model_config, to_config_json
from lindm.llm.io import safetensors_files
from lindm.llm.io.gguf_tokenizer import build_tokenizer
from lindm.llm.io.tensor_names import TensorSpec, tensor_specs
from lindm.llm.model_families import FAMILIES
from lindm.llm.rope import RopeParameters, rope_frequencies

GGUF_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.gguf_heads)
# module names in GGUF of those in Hugging Face files
MODULES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
MODULES |= {"self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
MODULES |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
MODULES |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
TOP_LEVEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ROPE_FACTORS = "rope_freqs.weight"  # divisor of each rotary frequency: how llama.cpp stores the scaling of Llama 3.1
METADATA_KEYS = {  # of config.json; in GGUF they follow the name of the family
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
OTHER_KEYS = {"attention.head_count_kv", "rope.freq_base", "vocab_size", "rope.dimension_count", "attention.key_length"}
OTHER_KEYS |= {"attention.value_length", "rope.scaling.type", "rope.scaling.factor", "expert_count", "expert_used_count"}
NUMBER_TYPES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor of the file, from its header."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]  # in the order of a Hugging Face file
    offset: int  # from the start of the file, in bytes
    size: int  # bytes


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """The header of a file, and its memory map."""

    source: str
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: mmap.mmap

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32."""
        info = self.tensors[name]
        raw = np.frombuffer(self.data, np.uint8, info.size, info.offset)
        return dequantize(raw.reshape(*info.shape[:-1], -1), info.type).reshape(info.shape)


def convert(path: Path, directory: Path) -> ModelConfig:
    """Write the model of a .gguf file to a directory, in float32, with tokenizer and chat template, one tensor after another.

    Raises:
      DataError: the file is damaged, or a key or tensor is unknown; names it. StorageError: the disk is full or not writable.
    """
    file = read_header(path)
    _check_types(file)
    try:
        config = _model_config(file)
    except (TypeError, ValueError) as e:  # such as a number in place of a text
        raise DataError(f"{file.source}: invalid metadata: {e}") from e
    specs = {spec.name: spec for spec in tensor_specs(config)}
    _check_tensors(file, specs)
    tokenizer = build_tokenizer(file.metadata, file.source, config.vocab_size)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    write_json(directory / CONFIG, to_config_json(config, dtype="float32", **ids))
    with storage_errors(directory):
        tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    content = json.loads(path.read_bytes())
    write_json(path, content | {"tokenizer_class": "PreTrainedTokenizerFast"})  # a class that version 4 knows too
    shapes = {name: spec.shape for name, spec in specs.items()}
    values = _tensor_values(file, config, specs)
    safetensors_files.write_shards(directory, shapes, values, "f32", safetensors_files.MAX_SHARD_BYTES)
    return config


def _tensor_values(file: GGUFFile, config: ModelConfig, specs: dict[str, TensorSpec]) -> Iterator[np.ndarray]:
    heads = interleaved_heads(config)
    for name, spec in specs.items():
        value = file.read(gguf_name(name))
        owner, _, leaf = spec.path.rpartition(".")
        if owner in heads and leaf in ("kernel", "bias"):
            n = heads[owner]
            value = value.reshape(n, len(value) // n // 2, 2, -1).swapaxes(1, 2).reshape(value.shape)
        yield value


def interleaved_heads(config: ModelConfig) -> dict[str, int]:
    """The weights of the decoder whose rows are interleaved in GGUF, and their numbers of heads."""
    if FAMILIES[config.model_type].gguf_heads == "halves":
        return {}
    return {"blocks.q": config.num_heads, "blocks.k": config.num_kv_heads}


def gguf_name(name: str) -> str:
    """blk.0.attn_q.weight of model.layers.0.self_attn.q_proj.weight."""
    owner, _, leaf = name.rpartition(".")
    if owner in TOP_LEVEL:
        return f"{TOP_LEVEL[owner]}.{leaf}"
    _, _, layer, module = owner.split(".", 3)
    return f"blk.{layer}.{MODULES[module]}.{leaf}"


def _check_tensors(file: GGUFFile, specs: dict[str, TensorSpec]) -> None:
    named = {gguf_name(name): spec for name, spec in specs.items()}
    for name, spec in named.items():
        if name not in file.tensors:
            raise DataError(f"{file.source}: lacks the tensor {name}")
        if (shape := file.tensors[name].shape) != spec.shape:
            raise DataError(f"{file.source}: {name} must be {list(spec.shape)}; got {list(shape)}")
    if unknown := sorted(file.tensors.keys() - named.keys() - {ROPE_FACTORS}):
        raise DataError(f"{file.source}: has the tensor {unknown[0]}, which this model does not have")


def _check_types(file: GGUFFile) -> None:
    for name, info in file.tensors.items():
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[info.type][1]), np.uint8), info.type)
        except NotImplementedError as e:
            raise DataError(f"{file.source}: {name} is of type {info.type.name}, which cannot be dequantized") from e


# --- metadata --------------------------------------------------------------------------------------------------------------


def _model_config(file: GGUFFile) -> ModelConfig:
    """The configuration of the metadata. Raises: DataError, naming the key, if it is unknown."""
    metadata, source = file.metadata, file.source
    family = metadata.get("general.architecture")
    if family not in GGUF_FAMILIES:
        raise DataError(f"{source}: general.architecture must be one of {', '.join(GGUF_FAMILIES)}; got {family!r}")
    given = {k.removeprefix(f"{family}."): v for k, v in metadata.items() if k.startswith(f"{family}.")}
    if unknown := sorted(given.keys() - set(METADATA_KEYS.values()) - OTHER_KEYS):
        raise DataError(f"{source}: {family}.{unknown[0]} is not known and may change what the model computes")
    if missing := [key for key in METADATA_KEYS.values() if key not in given]:
        raise DataError(f"{source}: lacks {family}.{missing[0]}")
    if given.get("expert_count"):
        raise DataError(f"{source}: {family}.expert_count must be 0; got {given['expert_count']}")
    if "token_embd.weight" not in file.tensors:
        raise DataError(f"{source}: lacks the tensor token_embd.weight")
    raw: dict[str, Any] = {key: given[gguf_key] for key, gguf_key in METADATA_KEYS.items()}
    for key, value in raw.items():
        if not isinstance(value, float if key == "rms_norm_eps" else int) or value <= 0:
            raise DataError(
                f"{source}: {family}.{METADATA_KEYS[key]} must be a positive number, one for all layers; got {value!r}"
            )
    head_dim = given.get("attention.key_length", raw["hidden_size"] // raw["num_attention_heads"])
    for key in ("attention.value_length", "rope.dimension_count"):
        if given.get(key, head_dim) != head_dim:
            raise DataError(f"{source}: {family}.{key} must be the head size, {head_dim}; got {given[key]}")
    raw |= {
        "model_type": family,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "num_key_value_heads": given.get("attention.head_count_kv", raw["num_attention_heads"]),
        "head_dim": head_dim,
        "rms_norm_eps": _shortest(raw["rms_norm_eps"]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope_parameters(file, given, head_dim),
    }
    modules = {"attention_bias": "attn_q", "mlp_bias": "ffn_gate"}
    raw |= {key: f"blk.0.{modules[key]}.bias" in file.tensors for key in FAMILIES[family].keys if key in modules}
    return parse_model_config(raw, source)


def _rope_parameters(file: GGUFFile, given: dict[str, Any], head_dim: int) -> dict[str, Any]:
    theta = _shortest(given.get("rope.freq_base", 10_000.0))
    kind = given.get("rope.scaling.type", "none")
    if ROPE_FACTORS in file.tensors:
        return _llama3(file, theta, head_dim)
    if kind not in ("none", "linear"):
        raise DataError(f"{file.source}: rope.scaling.type must be none or linear; got {kind!r}")
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": given.get("rope.scaling.factor", 1.0)}
    return {"rope_type": "default", "rope_theta": theta}


def _llama3(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling of Llama 3.1 with the factors of the file, whose largest is the only free parameter."""
    factors = file.read(ROPE_FACTORS)
    rope = RopeParameters(rope_theta=theta, rope_type="llama3", factor=_shortest(factors.max()))
    plain, scaled = (np.array(rope_frequencies(r, head_dim)) for r in (RopeParameters(rope_theta=theta), rope))
    if factors.shape != plain.shape or not np.allclose(factors, plain / scaled, rtol=1e-5):
        raise DataError(f"{file.source}: {ROPE_FACTORS} has factors that are not those of the scaling of Llama 3.1")
    sizes = {
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
    }
    return {"rope_type": "llama3", "rope_theta": theta, "factor": rope.factor} | sizes


def _shortest(x: float) -> float:
    """A single-precision number in its shortest decimal form: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(x)))


# --- header ----------------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> GGUFFile:
    """The header of a file. Raises: DataError if it is damaged or describes more than the file contains."""
    try:
        with inputs.open_file(path) as f:
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as e:
        raise DataError(f"cannot read {path}: {e}") from e
    header = _Header(data, str(path))
    if header.read_bytes(4) != b"GGUF" or header.read_number("I") not in (2, 3):
        raise header.error("it does not start as a little-endian GGUF file of version 2 or 3")
    n_tensors, n_keys = header.read_number("Q"), header.read_number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = header.read_string()
        if key in metadata:
            raise header.error(f"it has {key} twice")
        metadata[key] = header.read_value(header.read_number("I"))
    infos = [header.read_tensor_info() for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise header.error(f"general.alignment must be a power of two; got {alignment!r}")
    start = -(-header.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in infos:
        per, size = GGML_QUANT_SIZES[kind]
        if name in tensors or not shape or min(shape) < 1 or shape[-1] % per:
            raise header.error(
                f"the tensor {name} is there twice, or its shape {list(shape)} is invalid for the type {kind.name}"
            )
        n = math.prod(shape) // per * size
        if start + offset + n > len(data):
            raise header.error(f"the tensor {name} is beyond the end of the file")
        tensors[name] = TensorInfo(type=kind, shape=shape, offset=start + offset, size=n)
    places = sorted((info.offset, info.size, name) for name, info in tensors.items())
    for (offset, size, name), (start, _, other) in itertools.pairwise(places):
        if start < offset + size:  # a small file could describe a huge model
            raise header.error(f"the tensors {name} and {other} overlap")
    return GGUFFile(source=str(path), metadata=metadata, tensors=tensors, data=data)


class _Header:
    """Parses one value after another, and never reads beyond the end of the file."""

    def __init__(self, data: mmap.mmap, source: str):
        self.data, self.source, self.position = data, source, 0

    def error(self, what: str) -> DataError:
        return DataError(f"{self.source}: not a valid GGUF file: {what}")

    def read_bytes(self, n: int) -> bytes:
        if n > len(self.data) - self.position:
            raise self.error("it ends within its header")
        if self.position + n > limits.GGUF_HEADER:
            raise self.error(f"its header has more than {limits.GGUF_HEADER:,} bytes")
        self.position += n
        return self.data[self.position - n : self.position]

    def read_number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.read_bytes(struct.calcsize(f"<{kind}")))[0]

    def read_string(self) -> str:
        return self.read_bytes(self.read_number("Q")).decode("utf-8", "replace")

    def read_value(self, kind: int) -> Any:
        if kind == STRING:
            return self.read_string()
        if kind == ARRAY:
            inner, n = self.read_number("I"), self.read_number("Q")
            if inner == STRING:
                return [self.read_string() for _ in range(n)]
            if inner not in NUMBER_TYPES:
                raise self.error(f"it has an array of the unknown type {inner}")
            return list(
                struct.unpack(f"<{n}{NUMBER_TYPES[inner]}", self.read_bytes(n * struct.calcsize(f"<{NUMBER_TYPES[inner]}")))
            )
        if kind not in NUMBER_TYPES:
            raise self.error(f"it has a value of the unknown type {kind}")
        return self.read_number(NUMBER_TYPES[kind])

    def read_tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, n = self.read_string(), self.read_number("I")
        if n > 4:
            raise self.error(f"the tensor {name} has {n} axes")
        shape = tuple(self.read_number("Q") for _ in range(n))[::-1]
        kind, offset = self.read_number("I"), self.read_number("Q")
        try:
            return name, shape, GGMLQuantizationType(kind), offset
        except ValueError:
            raise self.error(f"the tensor {name} is of the unknown type {kind}") from None
