"""GGUF files, as llama.cpp's converter writes them: Llama, Mistral without a window, Qwen2 and Qwen3.

Matrices have the type of the file; norms and biases are float32. A matrix whose rows cannot be divided into the blocks of a
quantized type is float16, as in llama.cpp. The rows of q and k of the llama family are interleaved. The tokenizer's metadata
are only written after the tokenizer that `lindm.llm.io.gguf_tokenizer` builds from them has encoded a set of texts as the model's
own does: GGUF names the rule that splits a text, and a program that reads the file takes its own version of it.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from lindm.errors import DataError, UsageError
from lindm.io.files import make_parent, read_json, storage_errors
from lindm.io.progress import Progress
from lindm.io.temporaries import temporary_file, temporary_path
from lindm.llm.chat_template import chat_template
from lindm.llm.config import CONFIG, FAMILIES, GENERATION_CONFIG, ModelConfig
from lindm.llm.io.gguf import METADATA_KEYS, ROPE_FACTORS, gguf_name, interleaved_heads
from lindm.llm.io.gguf_tokenizer import CONTROL, UNKNOWN, USER_DEFINED, build_tokenizer
from lindm.llm.io.safetensors_files import require_finite
from lindm.llm.io.tensor_names import TensorSpec, tensor_specs
from lindm.llm.io.weights import tensor_values, write_on_first_process
from lindm.llm.model import Decoder
from lindm.llm.rope import RopeParameters, rope_frequencies
from lindm.llm.tokens import Tokenizer

GGUFDtype = Literal["f32", "f16", "bf16", "q8_0"]
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # of GGUF, by family
TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
SPLITS = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken")  # rules of `PRE_TOKENIZERS`, under the names that llama.cpp writes
NORMAL, UNUSED, BYTE = 1, 5, 6  # values of tokenizer.ggml.token_type beside those of the reader
# texts that tell pre-tokenizers and normalizers apart: numbers, spaces, contractions, letters beyond ASCII, marks, emoji
PROBES = (
    *(
        "Hello world",
        "  two  spaces ",
        "x  12 345 67890 1,234.5",
        "it's we'll I'M DON'T",
        "\n\n\t end \r\n \n",
        "a_b+c=={}[];//...",
    ),
    *(
        "caf\u00e9 cafe\u0301 na\u00efve \u2014 \u201cquotes\u201d",
        "\u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0e44\u0e17\u0e22",
    ),
    *(
        "MixedCASEWord HTTPServer x1y2",
        "\u00a0\u3000space",
        "\U0001f642\U0001f44d\U0001f3fd !!!???",
        "\u0663\u0664 \u00bd \u2167",
        "''' \"\"\" ``",
        "",
    ),
)


def save(model: Decoder, path: Path, tokenizer: Tokenizer, like: Path, dtype: GGUFDtype = "f16") -> None:
    """Write a model with its tokenizer as one GGUF file; adapters are merged, quantized kernels dequantized.

    Args:
      path: appears at the end, complete.
      like: directory of the model, for the token on which it ends.
      dtype: of the matrices.

    Raises:
      ValueError: an unknown dtype.
      UsageError: the file exists.
      DataError: a family, a setting or a tokenizer that a GGUF file cannot have.
      NonFiniteError: a weight is NaN or infinite, or does not fit the dtype; names the tensor.
      StorageError: the disk is full or not writable. Nothing is left behind.
    """
    if dtype not in get_args(GGUFDtype):
        raise ValueError(f"dtype must be one of {', '.join(get_args(GGUFDtype))}; got {dtype!r}")
    if path.exists():
        raise UsageError(f"{path} exists; choose another --out")
    config, specs = model.config, list(tensor_specs(model.config))
    metadata = model_metadata(config, str(like)) | tokenizer_metadata(tokenizer, config.vocab_size, like)
    kind, file_type = TYPES[dtype]
    metadata |= {"general.file_type": int(file_type), "general.quantization_version": 2}
    types = {spec.name: _type(spec, kind) for spec in specs}

    def write(values: Iterator[np.ndarray]) -> None:
        make_parent(path)
        with storage_errors(path), temporary_file(path) as fd:
            writer = GGUFWriter(temporary_path(path), metadata["general.architecture"])
            try:
                _write(writer, config, metadata, specs, types, values)
            finally:
                writer.close()
            os.fsync(fd)
            os.replace(temporary_path(path), path)

    write_on_first_process(path, tensor_values(model, specs), write)


def _type(spec: TensorSpec, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type of a tensor in a file whose matrices are of a `kind`."""
    if len(spec.shape) < 2:
        return GGMLQuantizationType.F32
    return kind if spec.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _write(
    writer: GGUFWriter,
    config: ModelConfig,
    metadata: dict[str, Any],
    specs: list[TensorSpec],
    types: dict[str, GGMLQuantizationType],
    values: Iterator[np.ndarray],
) -> None:
    """Write the header, then one tensor after another."""
    for key, value in metadata.items():
        if key != "general.architecture":  # the writer has put it there
            _add(writer, key, value)
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for spec in specs:
        per, size = GGML_QUANT_SIZES[types[spec.name]]
        nbytes = math.prod(spec.shape) // per * size
        writer.add_tensor_info(gguf_name(spec.name), spec.shape, np.dtype(np.float32), nbytes, raw_dtype=types[spec.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    heads = interleaved_heads(config)
    with Progress() as progress:
        task = progress.add("write tensors", total=len(specs))
        for done, (spec, value) in enumerate(zip(specs, values, strict=True), start=1):
            value, kind = np.asarray(value, np.float32), types[spec.name]
            owner, _, leaf = spec.path.rpartition(".")
            if owner in heads and leaf in ("kernel", "bias"):
                n = heads[owner]
                value = value.reshape(n, 2, len(value) // n // 2, -1).swapaxes(1, 2).reshape(value.shape)
            with np.errstate(over="ignore"):  # infinity of a value that does not fit
                fitted = value.astype(np.float16) if kind == GGMLQuantizationType.F16 else value
            require_finite(fitted, spec.name, writer.path or Path())
            writer.write_tensor_data(quantize(np.ascontiguousarray(value), kind))
            task.update(done)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


# --- the model ---------------------------------------------------------------------------------------------------------------


def model_metadata(config: ModelConfig, source: str) -> dict[str, Any]:
    """The sizes of a model under the keys of GGUF. DataError, naming the source, where a GGUF file would mean another model.

    There is no general.name: for transformers, a name with mistral in it means a model with a sliding window.
    """
    family = config.model_type
    if family not in ARCHITECTURES:
        raise DataError(f"{source}: a GGUF file must have a model of {', '.join(ARCHITECTURES)}; got {family}")
    if any(config.sliding_windows):
        raise DataError(f"{source}: a GGUF file of the family {family} must have no sliding window; got {config.sliding_windows}")
    if config.o_bias or config.mlp_bias or config.qkv_bias != FAMILIES[family].qkv_bias:
        raise DataError(f"{source}: a GGUF file of the family {family} must not have biases, which readers leave out")
    rope, architecture = config.rope_parameters, ARCHITECTURES[family]
    if rope.rope_type not in ("default", "linear", "llama3") or rope.partial_rotary_factor != 1:
        raise DataError(f"{source}: the rotary embedding of a GGUF file must be default, linear or llama3; got {rope.to_json()}")
    sizes = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": float(config.rms_norm_eps),
    }
    metadata = {METADATA_KEYS[name]: size for name, size in sizes.items()}
    metadata |= {"attention.head_count_kv": config.num_kv_heads, "vocab_size": config.vocab_size}
    metadata |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    metadata |= {"rope.dimension_count": config.head_dim, "rope.freq_base": float(rope.rope_theta)}
    if rope.rope_type == "linear":
        metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in metadata.items()}


def _rope_factors(config: ModelConfig) -> np.ndarray | None:
    """The divisor of each rotary frequency where the scaling is that of Llama 3.1."""
    rope = config.rope_parameters
    if rope.rope_type != "llama3":
        return None
    plain = RopeParameters(rope_theta=rope.rope_theta)
    frequencies, scaled = (np.array(rope_frequencies(r, config.head_dim)) for r in (plain, rope))
    return (frequencies / scaled).astype(np.float32)


# --- the tokenizer -----------------------------------------------------------------------------------------------------------


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int, like: Path) -> dict[str, Any]:
    """The tokenizer of a model under the keys of GGUF.

    Raises: DataError, naming the directory, for a tokenizer that is no BPE, or that no known rule of GGUF splits texts for.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = content["model"]
    if bpe["type"] != "BPE":
        raise DataError(f"{like}: the tokenizer of a GGUF file must be BPE; got {bpe['type']}")
    if len(tokenizer) > vocab_size:
        raise DataError(f"{like}: the tokenizer must have at most the {vocab_size} tokens of the model; got {len(tokenizer)}")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in bpe["merges"]]
    tokens, kinds = _tokens(tokenizer, bpe, vocab_size)
    common: dict[str, Any] = {"tokens": tokens, "token_type": kinds}
    ids = {"bos": tokenizer.bos_token_id, "eos": _end_token(tokenizer, like), "unknown": tokenizer.unk_token_id}
    common |= {f"{name}_token_id": i for name, i in (ids | {"padding": tokenizer.pad_token_id}).items() if i is not None}
    candidates: list[dict[str, Any]]
    if not _byte_level(tokenizer.backend_tokenizer):
        common |= {"model": "llama", "pre": "default", "scores": _scores(tokens, merges)}
        candidates = [{"add_space_prefix": prefix} for prefix in (True, False)]
    else:
        common |= {"model": "gpt2", "merges": [" ".join(merge) for merge in merges]}
        candidates = [{"pre": pre} for pre in SPLITS]
    template = {} if tokenizer.chat_template is None else {"tokenizer.chat_template": chat_template(tokenizer)}
    common["add_bos_token"] = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    for candidate in candidates:
        metadata = {f"tokenizer.ggml.{key}": value for key, value in (common | candidate).items()} | template
        if _agrees(build_tokenizer(metadata, str(like), vocab_size), tokenizer):
            return metadata
    raise DataError(f"{like}: none of the rules by which a GGUF file splits texts gives the tokens of this tokenizer")


def _tokens(tokenizer: Tokenizer, bpe: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Every token by its number, and its kind; numbers without a token get a name of their own, as in llama.cpp."""
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for token, i in tokenizer.get_vocab().items():
        is_byte = bpe.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[i], kinds[i] = token, BYTE if is_byte else NORMAL
    for i, added in tokenizer.added_tokens_decoder.items():
        kinds[i] = CONTROL if added.special else USER_DEFINED
    if bpe.get("unk_token") is not None and bpe.get("byte_fallback"):
        kinds[bpe["vocab"][bpe["unk_token"]]] = UNKNOWN
    return tokens, kinds


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores with which SentencePiece merges in this order: the earlier a token is made, the higher."""
    rank: dict[str, int] = {}
    for merge in merges:
        rank.setdefault("".join(merge), len(rank))
    return [-float(rank.get(token, len(rank) + i)) for i, token in enumerate(tokens)]


def _end_token(tokenizer: Tokenizer, like: Path) -> int | None:
    """The first token on which generation ends: GGUF names one."""
    for name in (GENERATION_CONFIG, CONFIG):
        given = read_json(like / name).get("eos_token_id") if (like / name).exists() else None
        if given is not None:
            return given[0] if isinstance(given, list) else given
    own: Any = tokenizer.eos_token_id
    return own


def _agrees(built: Tokenizer, tokenizer: Tokenizer) -> bool:
    """Whether two tokenizers split the probes alike, and give the same tokens for them, alone and around each control token."""
    ours, theirs = built.backend_tokenizer, tokenizer.backend_tokenizer
    if _byte_level(theirs) and (_splits(ours) != _splits(theirs) or _ignores_merges(ours) != _ignores_merges(theirs)):
        return False  # the tokens of some probes may be equal nevertheless: few of their parts are in a small vocabulary
    controls = [token.content for token in tokenizer.added_tokens_decoder.values()][:64]
    texts = [*PROBES, *(f"a {control} b\n{control}" for control in controls)]
    return built(texts)["input_ids"] == tokenizer(texts)["input_ids"]


def _byte_level(backend: Any) -> bool:
    return backend.model.byte_fallback is False


def _ignores_merges(backend: Any) -> bool:
    return bool(backend.model.ignore_merges)


def _splits(backend: Any) -> list[list[str]]:
    """The parts of each probe, within which merges apply."""
    normalized = [text if backend.normalizer is None else backend.normalizer.normalize_str(text) for text in PROBES]
    split = backend.pre_tokenizer
    return [[text] if split is None else [part for part, _ in split.pre_tokenize_str(text)] for text in normalized]
