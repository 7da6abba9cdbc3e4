"""Low-rank adapters as PEFT holds them: adapter_config.json, and adapter_model.safetensors with an A and a B for each layer.

PEFT's A is [rank, in] and its B [out, rank], the transposes of ours. What it can do beyond y = x W + scale (x A) B on the seven
linear layers of a block (magnitudes, biases, ranks that differ, further trained modules) is refused by name.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from lindm.errors import DataError, LindmError
from lindm.io.directories import atomic_directory
from lindm.io.files import write_json
from lindm.llm.config import read_config_json
from lindm.llm.io import safetensors_files
from lindm.llm.io.safetensors_files import READABLE, Stored
from lindm.llm.io.tensor_names import MODULES
from lindm.llm.io.weights import by_the_first, gathered
from lindm.llm.lora import TARGETS, add_lora, linears
from lindm.llm.model import Decoder
from lindm.llm.parallel.sharding import shard_array, weight_spec

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
USED = {"peft_type", "r", "lora_alpha", "use_rslora", "bias", "fan_in_fan_out", "target_modules"}
# what a trained adapter does not depend on: where it comes from, how it was begun and trained, where it is held
HARMLESS = {
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "init_lora_weights", "auto_mapping"),
    *("peft_version", "layers_pattern", "loftq_config", "eva_config", "corda_config", "runtime_config", "qalora_group_size"),
    *("megatron_core", "ensure_weight_tying", "lora_ga_config"),
}


def save_adapter(model: Decoder, directory: Path, base_name: str) -> None:
    """Write the adapters of a model as PEFT does; it loads them with `PeftModel.from_pretrained`.

    Args:
      base_name: the model they belong to, a directory or a hub's name.

    Raises:
      ValueError: there are none.
      LindmError: 2 where something is there already, 7 where the disk refuses.
    """
    found = {name: linear for name, linear in linears(model) if linear.lora_a is not None}
    if not found:
        raise ValueError("model must have adapters (lindm.llm.lora.add_lora); got one without")
    first = next(iter(found.values()))
    rank = first.lora_a[...].shape[-1]
    alpha = first.lora_scale * rank
    config = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True},
        **{"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": 0.0, "bias": "none"},
        "target_modules": [_short(name) for name in found],
        **{"fan_in_fan_out": False, "use_rslora": False},
    }
    shapes = {}
    for layer in range(model.config.num_layers):
        for name, linear in found.items():
            _, n_in, n_out = linear.shape
            shapes |= {_key(layer, name, "A"): (rank, n_in), _key(layer, name, "B"): (n_out, rank)}

    def values() -> Iterator[np.ndarray]:
        for layer in range(model.config.num_layers):
            for linear in found.values():
                yield gathered(linear.lora_a[...][layer]).T
                yield gathered(linear.lora_b[...][layer]).T

    def write(stream: Iterator[np.ndarray]) -> None:
        with atomic_directory(directory) as temporary:
            write_json(temporary / CONFIG, config)
            safetensors_files.write_one(temporary / FILE, shapes, stream, "f32")

    by_the_first(directory, values(), write)


def load_adapter(model: Decoder, directory: Path, *, mesh: Mesh | None = None) -> Decoder:
    """Freeze the model in place and give it the adapters of a directory that PEFT or `save_adapter` wrote, in f32.

    Raises:
      LindmError: 3, naming file and key, for what is damaged, made for another model, or not a plain low-rank update.
    """
    rank, scale = _read_config(directory / CONFIG)
    file = directory / FILE
    if not file.exists() and (pickles := sorted(directory.glob("adapter_model.bin"))):
        raise DataError(f"{pickles[0]} is a pickle, which is never read: convert it to {FILE}")
    stored = safetensors_files.held_in(file)
    targets = _targets(model, stored, file, rank)
    f = safetensors_files.opened(file)
    add_lora(model, rank, scale * rank, jax.random.key(0), targets)
    for name, linear in linears(model):
        if name not in targets:
            continue
        linear.lora_scale = scale
        for leaf in ("A", "B"):
            layers = [f.get_tensor(_key(i, name, leaf)).astype(np.float32).T for i in range(model.config.num_layers)]
            stacked = np.stack(layers)
            spec = (
                None
                if mesh is None
                else NamedSharding(mesh, weight_spec(f"blocks.{name}.lora_{leaf.lower()}", stacked.shape, mesh))
            )
            array = jnp.asarray(stacked) if spec is None else shard_array(stacked, spec)
            setattr(linear, f"lora_{leaf.lower()}", nnx.data(nnx.Param(array)))
    return model


def _read_config(path: Path) -> tuple[int, float]:
    """Rank, and what A B is multiplied by."""
    config = read_config_json(path)

    def refuse(key: str, rule: str) -> LindmError:
        return DataError(f"{path}: {key} {rule}; got {config.get(key)!r}")

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "must be LORA")
    if config.get("bias", "none") != "none":
        raise refuse("bias", "must be none")
    if config.get("fan_in_fan_out"):
        raise refuse("fan_in_fan_out", "must be false")
    for key in sorted(config.keys() - USED - HARMLESS):
        if config[key]:
            raise refuse(key, "is not known and may change what the adapter computes")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise refuse("r", "must be a positive integer")
    if not isinstance(alpha, int | float):
        raise refuse("lora_alpha", "must be a number")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _targets(model: Decoder, stored: dict[str, Stored], file: Path, rank: int) -> tuple[str, ...]:
    """Which linear layers the tensors of the file are for: each of them in every layer of the model, or in none."""
    wanted: dict[str, tuple[int, ...]] = {}
    targets = []
    for name, linear in linears(model):
        _, n_in, n_out = linear.shape
        keys = {}
        for layer in range(model.config.num_layers):
            keys |= {_key(layer, name, "A"): (rank, n_in), _key(layer, name, "B"): (n_out, rank)}
        if keys.keys() & stored.keys():
            targets.append(name)
            wanted |= keys
    if unknown := sorted(stored.keys() - wanted.keys()):
        raise DataError(f"{file}: {unknown[0]} is not a low-rank update of {', '.join(map(_short, TARGETS))} of this model")
    if not targets:
        raise DataError(f"{file}: holds no tensors")
    for key, shape in wanted.items():
        if key not in stored:
            raise DataError(f"{file}: lacks {key}; an adapter must be on every layer")
        if stored[key].shape != shape or stored[key].dtype not in READABLE:
            is_ = f"{stored[key].dtype} {list(stored[key].shape)}"
            raise DataError(f"{file}: {key} must be {list(shape)} in one of {', '.join(READABLE)}; got {is_}")
    return tuple(targets)


def _short(name: str) -> str:
    """q_proj of q."""
    return MODULES[name].rpartition(".")[2]


def _key(layer: int, name: str, leaf: str) -> str:
    return f"base_model.model.model.layers.{layer}.{MODULES[name]}.lora_{leaf}.weight"
