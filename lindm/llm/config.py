"""Sizes and switches of a decoder, read from the `config.json` of a Hugging Face model directory and written back.

What differs between model families is in one table, `FAMILIES`: a new family is one entry there (and, if it computes something
new, a switch of `ModelConfig` that `lindm.llm.model` reads).

transformers' `AutoConfig` fills in defaults and converts the keys of version 4 (`rope_theta`, `rope_scaling`) to those of
version 5 (`rope_parameters`). It accepts unknown keys, so the file itself is checked too: a key that is neither supported here
nor known to leave the logits unchanged raises an error unless its value is empty, false or zero.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lindm.choices import check_choices
from lindm.errors import DataError, unknown
from lindm.io.files import read_json
from lindm.io.limits import MAX_LAYERS, MODEL_SIZE
from lindm.io.verification import verify_file_list

CONFIG = "config.json"
RopeType = Literal["default", "linear", "llama3"]
Remat = Literal["full", "selective", "none"]
"""What the backward pass recomputes: everything but one activation per layer (full); attention, norms and nonlinearities, but no
product with weights (selective); nothing (none)."""
BaseFormat = Literal["f32", "bf16", "int8", "nf4"]
"""Storage of the frozen kernels under low-rank adapters (`lindm.llm.lora`)."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What distinguishes one model family (`model_type` of config.json) from the others."""

    architecture: str  # class in transformers
    qkv_bias: bool = False  # q, k and v have biases whatever config.json says
    qk_norm: bool = False  # RMSNorm of every query and key head
    keys: tuple[str, ...] = ()  # keys of config.json, of `FAMILY_KEYS`, that the family reads; transformers ignores the others
    gguf_heads: Literal["interleaved", "halves"] | None = "halves"  # row order of q and k in GGUF; None: no such family there


_WINDOWS_OF_LAYERS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM", keys=("attention_bias", "mlp_bias"), gguf_heads="interleaved"),
    "mistral": Family(architecture="MistralForCausalLM", keys=("sliding_window",), gguf_heads=None),  # llama.cpp calls it llama
    "qwen2": Family(architecture="Qwen2ForCausalLM", qkv_bias=True, keys=_WINDOWS_OF_LAYERS),
    "qwen3": Family(architecture="Qwen3ForCausalLM", qk_norm=True, keys=("attention_bias", *_WINDOWS_OF_LAYERS)),
}
FAMILY_KEYS = {key for family in FAMILIES.values() for key in family.keys}

SUPPORTED_KEYS = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "pretraining_tp", "initializer_range"),
    *FAMILY_KEYS,
}
# keys that do not affect the logits: identity, special tokens, settings of other libraries' training and generation
IGNORED_KEYS = {
    *("architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
    *("torch_dtype", "dtype", "transformers_version", "transformers.js_config", "use_cache", "attention_dropout"),
    *("_name_or_path", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled"),
    *("_commit_hash", "unsloth_version", "unsloth_fixed", "max_sequence_length"),
    *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix"),
    *("return_dict", "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "is_llama_config"),
    *("model_max_length", "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "rope_interleaved"),
}


# keys of rope_parameters beside rope_type and rope_theta
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """Rotary position embedding; the fields are the keys of `rope_parameters` in config.json.

    rope_type default: rope_theta alone; linear: positions divided by `factor`; llama3: long wavelengths divided by `factor`.
    """

    rope_theta: float = 10_000.0
    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_max_position_embeddings / low_freq_factor are scaled,
    high_freq_factor: float = 4.0  # those below original_max_position_embeddings / high_freq_factor are not; blended in between
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        check_choices(self)
        for name in ("rope_theta", *_ROPE_KEYS["llama3"]):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number; got {value!r}")
        if self.low_freq_factor >= self.high_freq_factor:
            got = f"{self.low_freq_factor} and {self.high_freq_factor}"
            raise ValueError(f"low_freq_factor must be below high_freq_factor; got {got}")

    def to_json(self) -> dict[str, Any]:
        """The object `rope_parameters` of config.json: the keys that this rope_type uses."""
        keys = ("rope_type", "rope_theta", *_ROPE_KEYS[self.rope_type])
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of a decoder, named as in config.json; hashable, static under `jit`."""

    model_type: str  # a key of FAMILIES
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int  # query heads
    num_kv_heads: int  # key and value heads, each shared by num_heads / num_kv_heads query heads
    head_dim: int
    intermediate_size: int
    rope_parameters: RopeParameters = RopeParameters()
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False  # the output layer is the transposed embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int, ...] = ()  # of each layer, number of keys that a query sees, its own included; 0, (): all
    max_position_embeddings: int = 2048
    init_std: float = 0.02  # standard deviation of the initial weights

    def __post_init__(self):
        if self.model_type not in FAMILIES:
            raise ValueError(unknown("model_type", self.model_type, tuple(FAMILIES)))
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
        for field in (*sizes, "max_position_embeddings"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1; got {getattr(self, field)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads; got {self.num_heads} and {self.num_kv_heads}")
        if not 0 < self.rms_norm_eps < 1:
            raise ValueError(f"rms_norm_eps must be between 0 and 1; got {self.rms_norm_eps}")
        keys = FAMILIES[self.model_type].keys
        if (
            self.sliding_windows
            and "layer_types" not in keys
            and ("sliding_window" not in keys or len(set(self.sliding_windows)) > 1)
        ):
            rule = "one window for all layers" if "sliding_window" in keys else "no sliding window"
            raise ValueError(f"sliding_windows: the family {self.model_type} has {rule}; got {self.sliding_windows}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, because the rotary embedding pairs its halves; got {self.head_dim}")

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        q, kv = self.num_heads * self.head_dim, 2 * self.num_kv_heads * self.head_dim
        layer = self.hidden_size * (2 * q + kv) + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        layer += (q + kv) * self.qkv_bias + self.hidden_size * self.o_bias
        layer += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias + 2 * self.head_dim * self.qk_norm
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + self.hidden_size + embeddings


def read_model_config(path: Path) -> ModelConfig:
    """The configuration in a Hugging Face model directory, or in a config.json itself.

    Raises: DataError, naming file and key, if the file is damaged or the model is not of a supported family.
    """
    if path.is_dir():
        verify_file_list(path, lambda name: name == CONFIG)
        path = path / CONFIG
    return parse_model_config(read_json(path), str(path))


def parse_model_config(raw: dict[str, Any], source: str) -> ModelConfig:
    """The configuration from the content of a config.json; errors (DataError) name its `source`."""

    def error(key: str, rule: str) -> DataError:
        return DataError(f"{source}: {key} {rule}; got {raw.get(key)!r}")

    model_type = raw.get("model_type")
    if model_type not in tuple(FAMILIES):  # a tuple: the value may be unhashable
        raise error("model_type", f"must be one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    if "auto_map" in raw:
        raise error("auto_map", "asks for code that comes with the model, which is never run")
    for key in sorted(raw.keys() - SUPPORTED_KEYS - IGNORED_KEYS):
        if raw[key]:
            raise error(key, f"is not known for the family {model_type} and may change what the model computes")
    if isinstance(raw.get("num_hidden_layers"), int) and raw["num_hidden_layers"] > MAX_LAYERS:
        raise error("num_hidden_layers", f"must be at most {MAX_LAYERS}")
    config = _with_defaults(raw, source)
    if config["hidden_act"] != "silu":
        raise error("hidden_act", "must be silu")
    if config.get("pretraining_tp", 1) not in (1, None):
        raise error("pretraining_tp", "must be 1")
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    config["head_dim"] = config.get("head_dim") or (config["hidden_size"] // heads if heads else 0)
    sizes = {name: config[key] for name, key in _RENAMED.items()}
    same = ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_position_embeddings")
    sizes |= {key: config[key] for key in same}
    for name, size in sizes.items():
        if not isinstance(size, int) or not 1 <= size <= MODEL_SIZE:
            raise DataError(f"{source}: {_RENAMED.get(name, name)} must be a positive integer below 2^31; got {size!r}")
    attention_bias = bool(config.get("attention_bias"))
    try:
        return ModelConfig(
            model_type=model_type,
            **sizes,
            rope_parameters=_rope_parameters(config, source),
            rms_norm_eps=float(config["rms_norm_eps"]),
            tie_word_embeddings=bool(config["tie_word_embeddings"]),
            qkv_bias=attention_bias or family.qkv_bias,
            o_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias")),
            qk_norm=family.qk_norm,
            sliding_windows=_sliding_windows(config, source),
            init_std=float(config.get("initializer_range", 0.02)),
        )
    except (TypeError, ValueError) as e:
        raise DataError(f"{source}: {e}") from e


_RENAMED = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}


def _with_defaults(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """The configuration as transformers 5 writes it, defaults filled in, without the keys that the family ignores."""
    from transformers import AutoConfig

    ignored = {"model_type", "transformers_version", "architectures"} | FAMILY_KEYS - set(FAMILIES[raw["model_type"]].keys)
    given = {k: v for k, v in raw.items() if k not in ignored}
    try:
        return AutoConfig.for_model(raw["model_type"], **given).to_dict()
    except Exception as e:  # its validators raise many kinds
        raise DataError(f"{source}: transformers does not accept it: {' '.join(str(e).split())}") from e


def _rope_parameters(config: dict[str, Any], source: str) -> RopeParameters:
    given = dict(config.get("rope_parameters") or {})
    if config.get("rope_scaling"):  # a key of version 4 that was not converted
        given |= config["rope_scaling"]
    rope_type = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    theta = given.pop("rope_theta", config.get("rope_theta", 10_000.0))
    if rope_type not in tuple(_ROPE_KEYS):
        raise DataError(f"{source}: rope_type must be one of {', '.join(_ROPE_KEYS)}; got {rope_type!r}")
    if given.get("partial_rotary_factor", 1.0) == 1.0:
        given.pop("partial_rotary_factor", None)
    keys = _ROPE_KEYS[rope_type]
    if missing := set(keys) - given.keys():
        raise DataError(f"{source}: rope_type {rope_type} needs {', '.join(sorted(missing))}")
    unused = _ROPE_KEYS["llama3"]  # harmless with another rope_type
    if unknown := {k for k in given.keys() - set(keys) if given[k] is not None and k not in unused}:
        raise DataError(f"{source}: rope parameters {', '.join(sorted(unknown))} are not known for rope_type {rope_type}")
    return RopeParameters(rope_theta=float(theta), rope_type=rope_type, **{key: given[key] for key in keys})


def _sliding_windows(config: dict[str, Any], source: str) -> tuple[int, ...]:
    """The window of each layer: transformers gives it by `layer_types`, by `max_window_layers`, or one window for all layers."""
    window, num_layers = config.get("sliding_window"), config["num_hidden_layers"]
    if not window or not config.get("use_sliding_window", True):
        return ()
    if not isinstance(window, int) or window < 1:
        raise DataError(f"{source}: sliding_window must be a positive integer; got {window!r}")
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention"] * num_layers
    if len(kinds) != num_layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        rule = f"must name sliding_attention or full_attention for {num_layers} layers"
        raise DataError(f"{source}: layer_types {rule}; got {kinds!r}")
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def to_config_json(config: ModelConfig, **extra: Any) -> dict[str, Any]:
    """The content of a config.json from which `parse_model_config` reads `config` again; `extra` keys are added.

    The rotary parameters are written under the keys of transformers 5 and under those of version 4, because a reader that knows
    only the older keys would otherwise use its defaults.
    """
    family, rope = FAMILIES[config.model_type], config.rope_parameters.to_json()
    content: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else {k: v for k, v in rope.items() if k != "rope_theta"},
        "initializer_range": config.init_std,
    }
    windows = config.sliding_windows
    own: dict[str, Any] = {
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": max(windows, default=None),
    }
    if windows:
        own["use_sliding_window"] = True
        own["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    return content | {key: own[key] for key in family.keys if key in own} | extra


def rope_frequencies(rope: RopeParameters, head_dim: int) -> list[float]:
    """Angle per position of each pair of coordinates [head_dim / 2], in double precision.

    llama3 (the scaling of Llama 3.1), with n = original_max_position_embeddings: a frequency f of wavelength 2 pi / f is kept
    where the wavelength is below n / high_freq_factor, divided by `factor` where it is above n / low_freq_factor, and in between
    blended linearly in n / wavelength.
    """
    frequencies = []
    for i in range(head_dim // 2):
        f = rope.rope_theta ** (-2 * i / head_dim)
        if rope.rope_type == "linear":
            f /= rope.factor
        elif rope.rope_type == "llama3":
            wavelength = 2 * math.pi / f
            blend = rope.original_max_position_embeddings / wavelength - rope.low_freq_factor
            blend = min(max(blend / (rope.high_freq_factor - rope.low_freq_factor), 0.0), 1.0)
            f = (1 - blend) * f / rope.factor + blend * f
        frequencies.append(f)
    return frequencies
