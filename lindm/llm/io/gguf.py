"""GGUF files, as llama.cpp writes them for Llama, Mistral, Qwen2 and Qwen3, turned into Hugging Face directories.

The header is read here, every length checked against the file before anything is taken from it; the blocks of numbers are put
together by the `gguf` package. llama.cpp stores the rows of q and k of the llama family with the two halves of every head
interleaved; they are put back. Metadata that would change what the model computes and is not known is refused by name.
"""

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

from lindm.errors import DataError, LindmError
from lindm.io.files import storage_errors, write_json
from lindm.llm.config import CONFIG, ModelConfig, RopeParameters, parse_model_config, rope_frequencies, to_config_json
from lindm.llm.io import safetensors_files as tensors
from lindm.llm.io.gguf_tokenizer import tokenizer
from lindm.llm.io.tensor_names import Tensor
from lindm.llm.io.tensor_names import tensors as expected

FAMILIES = ("llama", "qwen2", "qwen3")
INTERLEAVED = ("llama",)  # families whose q and k rows llama.cpp reorders
MODULES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
MODULES |= {"self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
MODULES |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
MODULES |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
FACTORS = "rope_freqs.weight"  # by which llama.cpp divides each frequency: how it holds the scaling of Llama 3.1
KEYS = {  # of the metadata, behind the family's name
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
SIDE = {"attention.head_count_kv", "rope.freq_base", "vocab_size", "rope.dimension_count", "attention.key_length"}
SIDE |= {"attention.value_length", "rope.scaling.type", "rope.scaling.factor", "expert_count", "expert_used_count"}
KINDS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A tensor of the file, not read."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # as in a Hugging Face file
    start: int
    size: int  # bytes


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """A file's header, and its bytes."""

    source: str
    metadata: dict[str, Any]
    tensors: dict[str, Blocks]
    data: mmap.mmap

    def read(self, name: str) -> np.ndarray:
        """A tensor in f32."""
        blocks = self.tensors[name]
        raw = np.frombuffer(self.data, np.uint8, blocks.size, blocks.start)
        return dequantize(raw.reshape(*blocks.shape[:-1], -1), blocks.kind).reshape(blocks.shape)


def convert(path: Path, directory: Path) -> ModelConfig:
    """Write the model of a .gguf file to a directory, in f32, with its tokenizer and chat template, one tensor after another.

    Raises:
      LindmError: 3, naming the file and the key or tensor, for what is damaged or not known; 7 where the disk refuses.
    """
    file = read(path)
    _check_kinds(file)
    try:
        found = model_config_of(file)
    except (TypeError, ValueError) as e:  # a number where a text should be, and the like
        raise DataError(f"{file.source}: its metadata are not sound: {e}") from e
    wanted = {t.name: t for t in expected(found)}
    _check(file, wanted)
    text = tokenizer(file.metadata, file.source, found.vocab_size)
    ids = {f"{name}_token_id": getattr(text, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    write_json(directory / CONFIG, to_config_json(found, dtype="float32", **ids))
    with storage_errors(directory):
        text.save_pretrained(directory)
    said = directory / "tokenizer_config.json"
    write_json(said, json.loads(said.read_bytes()) | {"tokenizer_class": "PreTrainedTokenizerFast"})  # version 4 knows it too
    shapes = {name: t.shape for name, t in wanted.items()}
    tensors.write(directory, shapes, _values(file, found, wanted), "f32", tensors.LIMIT)
    return found


def _values(file: Gguf, found: ModelConfig, wanted: dict[str, Tensor]) -> Iterator[np.ndarray]:
    heads = {"blocks.q": found.num_heads, "blocks.k": found.num_kv_heads} if found.model_type in INTERLEAVED else {}
    for name, tensor in wanted.items():
        value = file.read(_their_name(name))
        owner, _, leaf = tensor.path.rpartition(".")
        if owner in heads and leaf in ("kernel", "bias"):
            n = heads[owner]
            value = value.reshape(n, len(value) // n // 2, 2, -1).swapaxes(1, 2).reshape(value.shape)
        yield value


def _their_name(name: str) -> str:
    """blk.0.attn_q.weight of model.layers.0.self_attn.q_proj.weight."""
    owner, _, leaf = name.rpartition(".")
    if owner in TOP:
        return f"{TOP[owner]}.{leaf}"
    _, _, layer, module = owner.split(".", 3)
    return f"blk.{layer}.{MODULES[module]}.{leaf}"


def _check(file: Gguf, wanted: dict[str, Tensor]) -> None:
    theirs = {_their_name(name): tensor for name, tensor in wanted.items()}
    for name, tensor in theirs.items():
        if name not in file.tensors:
            raise DataError(f"{file.source}: lacks the tensor {name}")
        if (shape := file.tensors[name].shape) != tensor.shape:
            raise DataError(f"{file.source}: {name} must be {list(tensor.shape)}; got {list(shape)}")
    if unknown := sorted(file.tensors.keys() - theirs.keys() - {FACTORS}):
        raise DataError(f"{file.source}: holds the tensor {unknown[0]}, which this architecture does not have")


def _check_kinds(file: Gguf) -> None:
    for name, blocks in file.tensors.items():
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[blocks.kind][1]), np.uint8), blocks.kind)
        except NotImplementedError as e:
            raise DataError(f"{file.source}: {name} is held as {blocks.kind.name}, which cannot be turned into numbers") from e


# --- what the metadata say -------------------------------------------------------------------------------------------------


def model_config_of(file: Gguf) -> ModelConfig:
    """The configuration, with everything that is not known refused by name."""
    metadata, source = file.metadata, file.source
    family = metadata.get("general.architecture")
    if family not in FAMILIES:
        raise DataError(f"{source}: general.architecture must be one of {', '.join(FAMILIES)}; got {family!r}")
    given = {k.removeprefix(f"{family}."): v for k, v in metadata.items() if k.startswith(f"{family}.")}
    if unknown := sorted(given.keys() - set(KEYS.values()) - SIDE):
        raise DataError(f"{source}: {family}.{unknown[0]} is not known and may change what the model computes")
    if missing := [key for key in KEYS.values() if key not in given]:
        raise DataError(f"{source}: lacks {family}.{missing[0]}")
    if given.get("expert_count"):
        raise DataError(f"{source}: {family}.expert_count must be 0; got {given['expert_count']}")
    if "token_embd.weight" not in file.tensors:
        raise DataError(f"{source}: lacks the tensor token_embd.weight")
    raw: dict[str, Any] = {ours: given[theirs] for ours, theirs in KEYS.items()}
    for key, value in raw.items():
        if not isinstance(value, float if key == "rms_norm_eps" else int) or value <= 0:
            raise DataError(f"{source}: {family}.{KEYS[key]} must be a positive number, one for all layers; got {value!r}")
    head = given.get("attention.key_length", raw["hidden_size"] // raw["num_attention_heads"])
    for key in ("attention.value_length", "rope.dimension_count"):
        if given.get(key, head) != head:
            raise DataError(f"{source}: {family}.{key} must be the size of a head, {head}; got {given[key]}")
    biases = {part for part in ("attn_q", "attn_output", "ffn_gate") if f"blk.0.{part}.bias" in file.tensors}
    raw |= {
        "model_type": family,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "num_key_value_heads": given.get("attention.head_count_kv", raw["num_attention_heads"]),
        "head_dim": head,
        "rms_norm_eps": _shortest(raw["rms_norm_eps"]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope(file, given, head),
    }
    if family == "llama":
        raw |= {"attention_bias": "attn_q" in biases, "mlp_bias": "ffn_gate" in biases}
    elif family == "qwen3":
        raw["attention_bias"] = "attn_q" in biases
    return parse_model_config(raw, source)


def _rope(file: Gguf, given: dict[str, Any], head: int) -> dict[str, Any]:
    theta = _shortest(given.get("rope.freq_base", 10_000.0))
    kind = given.get("rope.scaling.type", "none")
    if FACTORS in file.tensors:
        return _llama3(file, theta, head)
    if kind not in ("none", "linear"):
        raise DataError(f"{file.source}: rope.scaling.type must be none or linear; got {kind!r}")
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": given.get("rope.scaling.factor", 1.0)}
    return {"rope_type": "default", "rope_theta": theta}


def _llama3(file: Gguf, theta: float, head: int) -> dict[str, Any]:
    """The scaling whose factors the file holds: Llama 3.1's, for which the largest of them is the only free number."""
    held = file.read(FACTORS)
    rope = RopeParameters(rope_theta=theta, rope_type="llama3", factor=_shortest(held.max()))
    plain, scaled = (np.array(rope_frequencies(r, head)) for r in (RopeParameters(rope_theta=theta), rope))
    if held.shape != plain.shape or not np.allclose(held, plain / scaled, rtol=1e-5):
        raise DataError(f"{file.source}: {FACTORS} holds factors that are not those of Llama 3.1's scaling")
    sizes = {
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
    }
    return {"rope_type": "llama3", "rope_theta": theta, "factor": rope.factor} | sizes


def _shortest(x: float) -> float:
    """A single-precision number as it was written down: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(x)))


# --- the header ------------------------------------------------------------------------------------------------------------


def read(path: Path) -> Gguf:
    """The header of a file; DataError where it is not one, or says more than the file holds."""
    try:
        with path.open("rb") as f:
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as e:
        raise DataError(f"cannot read {path}: {e}") from e
    header = _Header(data, str(path))
    if header.take(4) != b"GGUF" or header.number("I") not in (2, 3):
        raise header.wrong("it does not begin as a GGUF file of version 2 or 3, little end first")
    n_tensors, n_keys = header.number("Q"), header.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = header.text()
        if key in metadata:
            raise header.wrong(f"it says {key} twice")
        metadata[key] = header.value(header.number("I"))
    infos = [header.info() for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise header.wrong(f"general.alignment must be a power of two; got {alignment!r}")
    start = -(-header.at // alignment) * alignment
    found: dict[str, Blocks] = {}
    for name, shape, kind, offset in infos:
        per, size = GGML_QUANT_SIZES[kind]
        if name in found or not shape or min(shape) < 1 or shape[-1] % per:
            raise header.wrong(f"the tensor {name} is there twice, or its shape {list(shape)} is not one for {kind.name}")
        n = math.prod(shape) // per * size
        if start + offset + n > len(data):
            raise header.wrong(f"the tensor {name} would lie beyond its end")
        found[name] = Blocks(kind=kind, shape=shape, start=start + offset, size=n)
    return Gguf(source=str(path), metadata=metadata, tensors=found, data=data)


class _Header:
    """Takes one thing after another from the file, and never more than is there."""

    def __init__(self, data: mmap.mmap, source: str):
        self.data, self.source, self.at = data, source, 0

    def wrong(self, what: str) -> LindmError:
        return DataError(f"{self.source}: not a sound GGUF file: {what}")

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise self.wrong("it ends within its header")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind == LIST:
            inner, n = self.number("I"), self.number("Q")
            if inner == TEXT:
                return [self.text() for _ in range(n)]
            if inner not in KINDS:
                raise self.wrong(f"it has a list of values of the unknown type {inner}")
            return list(struct.unpack(f"<{n}{KINDS[inner]}", self.take(n * struct.calcsize(f"<{KINDS[inner]}"))))
        if kind not in KINDS:
            raise self.wrong(f"it has a value of the unknown type {kind}")
        return self.number(KINDS[kind])

    def info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, n = self.text(), self.number("I")
        if n > 4:
            raise self.wrong(f"the tensor {name} has {n} axes")
        shape = tuple(self.number("Q") for _ in range(n))[::-1]
        kind, offset = self.number("I"), self.number("Q")
        try:
            return name, shape, GGMLQuantizationType(kind), offset
        except ValueError:
            raise self.wrong(f"the tensor {name} is held as the unknown type {kind}") from None
