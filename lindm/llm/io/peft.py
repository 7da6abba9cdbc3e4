"""Low-rank adapters in the format of PEFT: adapter_config.json, and adapter_model.safetensors with A and B of each layer.

PEFT's A is [rank, in] and its B [out, rank], the transposes of those in `lindm.llm.lora`. What PEFT can do beyond
y = x W + scale (x A) B on the linear layers of a decoder layer (magnitudes, biases, further trained modules) raises an error that
names it.

Where a family has one tensor for several of our modules (qkv_proj of Phi-3), their n adapters of rank r are one of rank n r: the
rows of its A are those of all, and its B is block-diagonal. Any other adapter of such a tensor is the same A for each module.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from lindm.errors import DataError
from lindm.io.directories import atomic_directory
from lindm.io.files import read_json, write_json
from lindm.io.verification import verify_file_list, write_file_list
from lindm.llm.config import LoraScaling, ModelConfig
from lindm.llm.io import safetensors_files
from lindm.llm.io.safetensors_files import READABLE_DTYPES, StoredTensor
from lindm.llm.io.tensor_names import stored_modules
from lindm.llm.io.weights import gather_to_host, write_on_first_process
from lindm.llm.lora import add_lora, linear_layers
from lindm.llm.model import Decoder, Linear, abstract_decoder
from lindm.llm.model_families import TARGET_MODULES
from lindm.llm.parallel.sharding import shard_array, weight_spec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SUPPORTED_KEYS = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "bias", "fan_in_fan_out", "target_modules", "rank_pattern", "alpha_pattern"),
}
# keys that do not affect a trained adapter: its origin, initialization, training and storage
IGNORED_KEYS = {
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "init_lora_weights", "auto_mapping"),
    *("peft_version", "layers_pattern", "loftq_config", "eva_config", "corda_config", "runtime_config", "qalora_group_size"),
    *("megatron_core", "ensure_weight_tying", "lora_ga_config"),
}


def save_adapter(model: Decoder, directory: Path, base_name: str, scaling: LoraScaling = "standard") -> None:
    """Write the adapters of a model to a directory that `PeftModel.from_pretrained` loads.

    Args:
      base_name: base model of the adapters, a directory or an id on the Hugging Face hub.
      scaling: how the configuration says the factor of A B; it is the same factor.

    Raises:
      ValueError: the model has no adapters.
      UsageError: the directory exists and is not empty. StorageError: the disk is full or not writable.
    """
    layers = model.config.num_layers
    adapted = {name: linear for name, linear in linear_layers(model) if linear.lora_a is not None}
    if not adapted:
        raise ValueError("model must have adapters (lindm.llm.lora.add_lora); got one without")
    stored = {name: parts for name, parts in _stored_linears(model).items() if parts.keys() & adapted.keys()}
    ranks = {name: _stored_rank(parts) for name, parts in stored.items()}

    def alpha_of(rank: int, linear: Linear) -> float | int:
        return _number(linear.lora_scale * (math.sqrt(rank) if scaling == "rslora" else rank))

    scaled = {name: max((p for p in parts.values() if p.lora_a is not None), key=_scale) for name, parts in stored.items()}
    alphas = {name: alpha_of(ranks[name], linear) for name, linear in scaled.items()}
    first = next(iter(adapted.values()))
    rank = first.lora_a[...].shape[-1]  # of one of our modules, also where all have a share of a tensor
    alpha = alpha_of(rank, first)
    config = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True},
        **{"r": rank, "lora_alpha": alpha, "bias": "none"},
        "lora_dropout": max(linear.lora_dropout for linear in adapted.values()),
        "target_modules": [_target_module(name) for name in stored],
        **{"fan_in_fan_out": False, "use_rslora": scaling == "rslora"},
        "rank_pattern": {_target_module(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {_target_module(name): a for name, a in alphas.items() if a != alpha},
    }
    shapes = {}
    for layer in range(layers):
        for name, parts in stored.items():
            shapes |= _shapes(layer, name, parts, ranks[name])

    def values() -> Iterator[np.ndarray]:
        for layer in range(layers):
            for name, parts in stored.items():
                yield from _stored_adapter(parts, ranks[name] // len(parts), layer)

    def write(stream: Iterator[np.ndarray]) -> None:
        with atomic_directory(directory) as temporary:
            write_json(temporary / CONFIG, config)
            safetensors_files.write_file(temporary / WEIGHTS, shapes, stream, "f32")
            write_file_list(temporary)

    write_on_first_process(directory, values(), write)


def load_adapter(model: Decoder, directory: Path, *, mesh: Mesh | None = None) -> Decoder:
    """Freeze the model in place and add the adapters of a directory that PEFT or `save_adapter` wrote, in float32.

    Raises:
      DataError: the adapter is damaged, of another model, or not a plain low-rank update; names file and key.
      NonFiniteError: a weight is NaN or infinite; names file and tensor.
    """
    _, adapters = _read_adapters(directory, model)
    add_lora(model, 1, 1.0, jax.random.key(0), tuple(adapters))
    for name, linear in linear_layers(model):
        if name in adapters:
            *factors, linear.lora_scale = adapters[name]
            for leaf, value in zip(("lora_a", "lora_b"), factors, strict=True):
                array = jnp.asarray(value)
                if mesh is not None:
                    array = shard_array(value, NamedSharding(mesh, weight_spec(f"blocks.{name}.{leaf}", value.shape, mesh)))
                setattr(linear, leaf, nnx.data(nnx.Param(array)))
    return model


class AdapterSettings(NamedTuple):
    """What an adapter of PEFT is, as the options of `lindm sft` say it."""

    rank: int
    alpha: float
    scaling: LoraScaling
    targets: tuple[str, ...]


def read_adapter_settings(directory: Path, config: ModelConfig) -> AdapterSettings:
    """The settings of a directory for `load_adapter`. Raises: DataError, as `load_adapter` for a model of this configuration."""
    adapter, adapters = _read_adapters(directory, abstract_decoder(config))
    scaling = "rslora" if adapter.rslora else "standard"
    return AdapterSettings(adapter.rank, adapter.alpha, scaling, tuple(name for name in TARGET_MODULES if name in adapters))


def _read_adapters(directory: Path, model: Decoder) -> tuple["_AdapterConfig", dict[str, tuple[np.ndarray, np.ndarray, float]]]:
    """The configuration of a directory, and A and B [layers, ...] and the factor of A B of each adapted module."""
    verify_file_list(directory)
    config = _read_config(directory / CONFIG)
    file = _weights_file(directory)
    found = _find_adapters(model, safetensors_files.read_header(file), file, config)
    adapters: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
    with safetensors_files.open_file(file) as f:
        for name, (parts, scale) in found.items():
            a, b = (_read_layers(f, file, model.config.num_layers, name, leaf) for leaf in ("A", "B"))
            adapters |= {part: (*ab, scale) for part, ab in _split(a, b, parts).items()}
    return config, adapters


def _weights_file(directory: Path) -> Path:
    file = directory / WEIGHTS
    if not file.exists() and (pickles := sorted(directory.glob("adapter_model.bin"))):
        raise DataError(f"{pickles[0]} is a pickle, which is never read: convert it to {WEIGHTS}")
    return file


class _AdapterConfig(NamedTuple):
    """What adapter_config.json says of one file."""

    rank: int
    alpha: float
    ranks: dict[str, int]  # of target modules whose rank differs
    alphas: dict[str, float]
    rslora: bool

    def rank_and_scale(self, target: str) -> tuple[int, float]:
        """Rank of a target module, and the factor of its A B."""
        rank, alpha = self.ranks.get(target, self.rank), self.alphas.get(target, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def _read_config(path: Path) -> _AdapterConfig:
    config = read_json(path)

    def error(key: str, rule: str) -> DataError:
        return DataError(f"{path}: {key} {rule}; got {config.get(key)!r}")

    if config.get("peft_type") != "LORA":
        raise error("peft_type", "must be LORA")
    if config.get("bias", "none") != "none":
        raise error("bias", "must be none")
    if config.get("fan_in_fan_out"):
        raise error("fan_in_fan_out", "must be false")
    for key in sorted(config.keys() - SUPPORTED_KEYS - IGNORED_KEYS):
        if config[key]:
            raise error(key, "is not known and may change what the adapter computes")
    patterns = {}
    for key, default, rule, kind in (("rank", "r", "a positive integer", int), ("alpha", "lora_alpha", "a number", int | float)):
        if not isinstance(config.get(default), kind) or (kind is int and config[default] < 1):
            raise error(default, f"must be {rule}")
        patterns[key] = pattern = config.get(f"{key}_pattern") or {}
        good = isinstance(pattern, dict) and all(isinstance(x, kind) and (kind is not int or x > 0) for x in pattern.values())
        if not good or not all(re.fullmatch(r"\w+", name) for name in pattern):
            raise error(f"{key}_pattern", f"must be {rule} for each of some target modules")
    return _AdapterConfig(config["r"], config["lora_alpha"], patterns["rank"], patterns["alpha"], bool(config.get("use_rslora")))


def _find_adapters(
    model: Decoder, stored: dict[str, StoredTensor], file: Path, config: _AdapterConfig
) -> dict[str, tuple[dict[str, Linear], float]]:
    """The adapted linear layers of the file, each with the modules whose rows it has, and the factor of A B."""
    shapes: dict[str, tuple[int, ...]] = {}
    found, linears = {}, _stored_linears(model)
    for name, parts in linears.items():
        rank, scale = config.rank_and_scale(_target_module(name))
        layers = [_shapes(layer, name, parts, rank) for layer in range(model.config.num_layers)]
        if any(of_layer.keys() & stored.keys() for of_layer in layers):
            found[name] = parts, scale
            shapes |= dict(item for of_layer in layers for item in of_layer.items())
    if unknown := sorted(stored.keys() - shapes.keys()):
        raise DataError(
            f"{file}: {unknown[0]} is not a low-rank update of {', '.join(map(_target_module, linears))} of this model"
        )
    if not found:
        raise DataError(f"{file}: has no tensors")
    for key, shape in shapes.items():
        if key not in stored:
            raise DataError(f"{file}: lacks {key}; an adapter must be on every layer")
        if stored[key].shape != shape or stored[key].dtype not in READABLE_DTYPES:
            got = f"{stored[key].dtype} {list(stored[key].shape)}"
            raise DataError(f"{file}: {key} must be {list(shape)} in one of {', '.join(READABLE_DTYPES)}; got {got}")
    return found


def _read_layers(f: Any, file: Path, layers: int, name: str, leaf: str) -> np.ndarray:
    """A [layers, in, rank] or B [layers, rank, out] of a linear layer of the file, in float32."""
    values = []
    for key in (_tensor_name(layer, name, leaf) for layer in range(layers)):
        values.append(f.get_tensor(key).astype(np.float32).T)
        safetensors_files.require_finite(values[-1], key, file)
    return np.stack(values)


# --- linear layers of a file, which may be several modules -------------------------------------------------------------------


def _stored_linears(model: Decoder) -> dict[str, dict[str, Linear]]:
    """The linear layers of a file, by name, and the modules whose rows each has."""
    linears = dict(linear_layers(model))
    modules = stored_modules(model.config)
    return {name: {part: linears[part] for part in parts} for name, parts in modules.items() if parts[0] in linears}


def _stored_rank(parts: dict[str, Linear]) -> int:
    """Rank of one adapter for all parts."""
    return len(parts) * max(linear.lora_a[...].shape[-1] for linear in parts.values() if linear.lora_a is not None)


def _shapes(layer: int, name: str, parts: dict[str, Linear], rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of A and B of a linear layer of the file."""
    n_in, n_out = next(iter(parts.values())).shape[1], sum(linear.shape[2] for linear in parts.values())
    return {_tensor_name(layer, name, "A"): (rank, n_in), _tensor_name(layer, name, "B"): (n_out, rank)}


def _stored_adapter(parts: dict[str, Linear], rank: int, layer: int) -> Iterator[np.ndarray]:
    """A and B of one layer for all parts: zeros where a part has no adapter, or a smaller rank."""
    n_in, scale = next(iter(parts.values())).shape[1], max(p.lora_scale for p in parts.values() if p.lora_a is not None)
    rows = [np.zeros((rank, n_in), np.float32) for _ in parts]
    blocks = [np.zeros((linear.shape[2], len(parts) * rank), np.float32) for linear in parts.values()]
    for i, linear in enumerate(parts.values()):
        if linear.lora_a is not None:
            a, b = (gather_to_host(x[...][layer]).T for x in (linear.lora_a, linear.lora_b))
            rows[i][: len(a)] = a
            blocks[i][:, i * rank : i * rank + len(a)] = b if linear.lora_scale == scale else b * (linear.lora_scale / scale)
    yield np.concatenate(rows)
    yield np.concatenate(blocks)


def _split(a: np.ndarray, b: np.ndarray, parts: dict[str, Linear]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B [layers, ...] of each part that has an adapter."""
    if len(parts) == 1:
        return {next(iter(parts)): (a, b)}
    ends = np.cumsum([linear.shape[2] for linear in parts.values()])
    blocks = dict(zip(parts, np.split(b, ends[:-1], axis=2), strict=True))
    rank, remainder = divmod(a.shape[2], len(parts))
    columns = {part: slice(i * rank, (i + 1) * rank) for i, part in enumerate(parts)}
    if remainder or any(np.delete(blocks[part], columns[part], axis=1).any() for part in parts):
        return {part: (a, blocks[part]) for part in parts}
    split = {part: (a[:, :, columns[part]], blocks[part][:, columns[part]]) for part in parts}
    return {part: adapter for part, adapter in split.items() if adapter[0].any()}


def _scale(linear: Linear) -> float:
    return linear.lora_scale


def _number(value: float) -> float | int:
    """Alpha: an integer where it is one but for rounding."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def _target_module(name: str) -> str:
    """q_proj of self_attn.q_proj."""
    return name.rpartition(".")[2]


def _tensor_name(layer: int, name: str, leaf: str) -> str:
    return f"base_model.model.model.layers.{layer}.{name}.lora_{leaf}.weight"
