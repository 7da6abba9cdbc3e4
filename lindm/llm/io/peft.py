"""Low-rank adapters in the format of PEFT: adapter_config.json, and adapter_model.safetensors with A and B of each layer.

PEFT's A is [rank, in] and its B [out, rank], the transposes of those in `lindm.llm.lora`. What PEFT can do beyond
y = x W + scale (x A) B on the seven linear layers of a decoder layer (magnitudes, biases, different ranks, further trained
modules) raises an error that names it.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from lindm.errors import DataError
from lindm.io.directories import atomic_directory
from lindm.io.files import read_json, write_json
from lindm.io.verification import verify_file_list, write_file_list
from lindm.llm.io import safetensors_files
from lindm.llm.io.safetensors_files import READABLE_DTYPES, StoredTensor
from lindm.llm.io.tensor_names import MODULES
from lindm.llm.io.weights import gather_to_host, write_on_first_process
from lindm.llm.lora import TARGET_MODULES, add_lora, linear_layers
from lindm.llm.model import Decoder
from lindm.llm.parallel.sharding import shard_array, weight_spec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SUPPORTED_KEYS = {"peft_type", "r", "lora_alpha", "use_rslora", "bias", "fan_in_fan_out", "target_modules"}
# keys that do not affect a trained adapter: its origin, initialization, training and storage
IGNORED_KEYS = {
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "init_lora_weights", "auto_mapping"),
    *("peft_version", "layers_pattern", "loftq_config", "eva_config", "corda_config", "runtime_config", "qalora_group_size"),
    *("megatron_core", "ensure_weight_tying", "lora_ga_config"),
}


def save_adapter(model: Decoder, directory: Path, base_name: str) -> None:
    """Write the adapters of a model to a directory that `PeftModel.from_pretrained` loads.

    Args:
      base_name: base model of the adapters, a directory or an id on the Hugging Face hub.

    Raises:
      ValueError: the model has no adapters.
      UsageError: the directory exists and is not empty. StorageError: the disk is full or not writable.
    """
    adapted = {name: linear for name, linear in linear_layers(model) if linear.lora_a is not None}
    if not adapted:
        raise ValueError("model must have adapters (lindm.llm.lora.add_lora); got one without")
    first = next(iter(adapted.values()))
    rank = first.lora_a[...].shape[-1]
    alpha = first.lora_scale * rank
    config = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True},
        **{"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": 0.0, "bias": "none"},
        "target_modules": [_target_module(name) for name in adapted],
        **{"fan_in_fan_out": False, "use_rslora": False},
    }
    shapes = {}
    for layer in range(model.config.num_layers):
        for name, linear in adapted.items():
            _, n_in, n_out = linear.shape
            shapes |= {_tensor_name(layer, name, "A"): (rank, n_in), _tensor_name(layer, name, "B"): (n_out, rank)}

    def values() -> Iterator[np.ndarray]:
        for layer in range(model.config.num_layers):
            for linear in adapted.values():
                yield gather_to_host(linear.lora_a[...][layer]).T
                yield gather_to_host(linear.lora_b[...][layer]).T

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
    verify_file_list(directory)
    rank, scale = _read_config(directory / CONFIG)
    file = directory / WEIGHTS
    if not file.exists() and (pickles := sorted(directory.glob("adapter_model.bin"))):
        raise DataError(f"{pickles[0]} is a pickle, which is never read: convert it to {WEIGHTS}")
    stored = safetensors_files.read_header(file)
    targets = _targets(model, stored, file, rank)
    f = safetensors_files.open_file(file)
    add_lora(model, rank, scale * rank, jax.random.key(0), targets)
    for name, linear in linear_layers(model):
        if name not in targets:
            continue
        linear.lora_scale = scale
        for leaf in ("A", "B"):
            layers = [f.get_tensor(_tensor_name(i, name, leaf)).astype(np.float32).T for i in range(model.config.num_layers)]
            stacked = np.stack(layers)
            for i in range(len(layers)):
                safetensors_files.require_finite(stacked[i], _tensor_name(i, name, leaf), file)
            spec = (
                None
                if mesh is None
                else NamedSharding(mesh, weight_spec(f"blocks.{name}.lora_{leaf.lower()}", stacked.shape, mesh))
            )
            array = jnp.asarray(stacked) if spec is None else shard_array(stacked, spec)
            setattr(linear, f"lora_{leaf.lower()}", nnx.data(nnx.Param(array)))
    return model


def _read_config(path: Path) -> tuple[int, float]:
    """Rank, and the factor of A B."""
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
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise error("r", "must be a positive integer")
    if not isinstance(alpha, int | float):
        raise error("lora_alpha", "must be a number")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _targets(model: Decoder, stored: dict[str, StoredTensor], file: Path, rank: int) -> tuple[str, ...]:
    """The target modules of the file: each has tensors in every layer of the model."""
    shapes: dict[str, tuple[int, ...]] = {}
    targets = []
    for name, linear in linear_layers(model):
        _, n_in, n_out = linear.shape
        keys = {}
        for layer in range(model.config.num_layers):
            keys |= {_tensor_name(layer, name, "A"): (rank, n_in), _tensor_name(layer, name, "B"): (n_out, rank)}
        if keys.keys() & stored.keys():
            targets.append(name)
            shapes |= keys
    if unknown := sorted(stored.keys() - shapes.keys()):
        raise DataError(
            f"{file}: {unknown[0]} is not a low-rank update of {', '.join(map(_target_module, TARGET_MODULES))} of this model"
        )
    if not targets:
        raise DataError(f"{file}: has no tensors")
    for key, shape in shapes.items():
        if key not in stored:
            raise DataError(f"{file}: lacks {key}; an adapter must be on every layer")
        if stored[key].shape != shape or stored[key].dtype not in READABLE_DTYPES:
            got = f"{stored[key].dtype} {list(stored[key].shape)}"
            raise DataError(f"{file}: {key} must be {list(shape)} in one of {', '.join(READABLE_DTYPES)}; got {got}")
    return tuple(targets)


def _target_module(name: str) -> str:
    """q_proj of q."""
    return MODULES[name].rpartition(".")[2]


def _tensor_name(layer: int, name: str, leaf: str) -> str:
    return f"base_model.model.model.layers.{layer}.{MODULES[name]}.lora_{leaf}.weight"
