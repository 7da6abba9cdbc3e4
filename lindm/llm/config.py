"""Sizes and switches of a decoder, read from the `config.json` of a Hugging Face model directory and written back.

What differs between model families is in one table, `lindm.llm.model_families.FAMILIES`.

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
from lindm.llm.model_families import (
    ACTIVATIONS,
    COMMON_KEYS,
    FAMILIES,
    IGNORED_KEYS,
    Activation,
    Family,
    NormOrder,
    QKNorm,
    family_keys,
)
from lindm.llm.rope import RopeParameters, parse_rope_parameters

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
DEFAULT_ROPE = RopeParameters()
Remat = Literal["full", "selective", "none"]
"""What the backward pass recomputes: everything but one activation per layer (full); attention, norms and nonlinearities, but no
product with weights (selective); nothing (none)."""
BaseFormat = Literal["f32", "bf16", "int8", "nf4"]
"""Storage of the frozen kernels under low-rank adapters (`lindm.llm.lora`)."""
LoraScaling = Literal["standard", "rslora"]
"""Factor of a low-rank update: alpha / rank, or alpha / sqrt(rank)."""


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
    rope_parameters: RopeParameters = DEFAULT_ROPE
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False  # the output layer is the transposed embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"  # of the MLP's gate
    norm_order: NormOrder = "before"
    norm_offset: float = 0.0  # added to the weights of norms
    qk_norm: QKNorm = "none"
    embedding_scale: float = 1.0  # factor of the embedded tokens
    residual_scale: float = 1.0  # factor of what attention and MLP add
    logits_scale: float = 1.0  # factor of the logits
    attention_scale: float = 0.0  # factor of q k; 0: 1 / sqrt(head_dim)
    attention_softcap: float = 0.0  # c tanh(score / c) in place of the attention score; 0: none
    logits_softcap: float = 0.0  # the same of the logits
    no_rope_layers: tuple[int, ...] = ()  # numbers of layers without rotary embedding
    sliding_rope_parameters: RopeParameters | None = None  # of layers with a sliding window; None: as of the others
    sliding_windows: tuple[int, ...] = ()  # of each layer, number of keys that a query sees, its own included; 0, (): all
    max_position_embeddings: int = 2048
    init_std: float = 0.02  # standard deviation of the initial weights

    def __post_init__(self):
        check_choices(self)
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
        self.rope_parameters.check_factors(self.head_dim)

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        q, kv = self.num_heads * self.head_dim, 2 * self.num_kv_heads * self.head_dim
        norms = 4 if self.norm_order == "both" else 2
        layer = self.hidden_size * (2 * q + kv) + 3 * self.hidden_size * self.intermediate_size + norms * self.hidden_size
        layer += (q + kv) * self.qkv_bias + self.hidden_size * self.o_bias
        layer += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        layer += {"none": 0, "heads": 2 * self.head_dim, "all": q + kv // 2}[self.qk_norm]
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + self.hidden_size + embeddings


def read_model_config(path: Path) -> ModelConfig:
    """The configuration in a Hugging Face model directory, or in a config.json itself.

    Raises: DataError, naming file and key, if the file is damaged or the model is not of a supported family.
    """
    if path.is_dir():
        verify_file_list(path, lambda name: name == CONFIG)
        if not (path / CONFIG).exists():
            raise DataError(f"{path} is not a model: it has no {CONFIG}")
        path = path / CONFIG
    return parse_model_config(read_json(path), str(path))


def parse_model_config(raw: dict[str, Any], source: str) -> ModelConfig:
    """The configuration from the content of a config.json; errors (DataError) name its `source`."""

    def error(key: str, rule: str) -> DataError:
        return DataError(f"{source}: {key} {rule}; got {raw.get(key)!r}")

    model_type = raw.get("model_type")
    if model_type not in tuple(FAMILIES):  # a tuple: the value may be unhashable
        raise error("model_type", f"must be one of {', '.join(FAMILIES)}")
    if model_type == "mistral" and "layer_types" in raw:
        raw, model_type = raw | {"model_type": "ministral"}, "ministral"  # as AutoConfig takes it
    family = FAMILIES[model_type]
    if "auto_map" in raw and not _is_of_transformers(raw["auto_map"], family):
        raise error("auto_map", "asks for code that comes with the model, which is never run")
    for key in sorted(raw.keys() - COMMON_KEYS - family_keys() - IGNORED_KEYS - {*family.unused_keys}):
        if raw[key]:
            raise error(key, f"is not known for the family {model_type} and may change what the model computes")
    if isinstance(raw.get("num_hidden_layers"), int) and raw["num_hidden_layers"] > MAX_LAYERS:
        raise error("num_hidden_layers", f"must be at most {MAX_LAYERS}")
    config = _with_defaults(raw, source)
    if (activation := config.get(family.activation_key)) not in tuple(ACTIVATIONS):
        raise DataError(f"{source}: {family.activation_key} must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if config.get("use_bidirectional_attention"):
        raise error("use_bidirectional_attention", "must be false: attention is causal")
    if config.get("pretraining_tp", 1) not in (1, None):
        raise error("pretraining_tp", "must be 1")
    for key, allowed in family.required.items():
        given = config.get(key)
        if wrong := {str(x) for x in (given if isinstance(given, list | tuple) else [given]) if x not in allowed}:
            rule = f"must be {allowed[0]}: only the dense form of the family {model_type} is supported"
            raise DataError(f"{source}: {key} {rule}; got {', '.join(sorted(wrong))}")
    config["intermediate_size"] = config[family.intermediate_key]
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
    rope, sliding_rope = _rope_parameters(config, family, source)
    try:
        return ModelConfig(
            model_type=model_type,
            **sizes,
            rope_parameters=rope,
            sliding_rope_parameters=sliding_rope,
            no_rope_layers=_no_rope_layers(config, source),
            **{"activation": ACTIVATIONS[activation], "norm_order": family.norm_order, "norm_offset": family.norm_offset},
            **_scales(config, family),
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


def _is_of_transformers(auto_map: Any, family: Family) -> bool:
    """Whether a model names the classes of its family as its code: transformers has them since, and takes its own."""
    name = family.architecture.removesuffix("ForCausalLM")
    values = auto_map.values() if isinstance(auto_map, dict) else [None]
    return all(isinstance(value, str) and value.rpartition(".")[2].startswith(name) for value in values)


def _scales(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """The factors and soft caps of a decoder: of Granite, and of Gemma."""
    scales = {
        "embedding_scale": math.sqrt(config["hidden_size"]) if family.scaled_embedding else config.get("embedding_multiplier"),
        "residual_scale": config.get("residual_multiplier"),
        "logits_scale": 1 / config["logits_scaling"] if config.get("logits_scaling") else None,
        "attention_scale": config.get("attention_multiplier"),
        "attention_softcap": config.get("attn_logit_softcapping"),
        "logits_softcap": config.get("final_logit_softcapping"),
    }
    if config.get("query_pre_attn_scalar"):
        scales["attention_scale"] = config["query_pre_attn_scalar"] ** -0.5
    return {name: float(value) for name, value in scales.items() if value is not None}


def _no_rope_layers(config: dict[str, Any], source: str) -> tuple[int, ...]:
    """The layers without rotary embedding: zeros in a list of ones, or all (Granite 4)."""
    if config.get("position_embedding_type", "rope") is None:
        return tuple(range(config["num_hidden_layers"]))
    marks, layers = config.get("no_rope_layers") or [], config["num_hidden_layers"]
    if marks and (len(marks) < layers or not set(marks) <= {0, 1}):
        raise DataError(
            f"{source}: no_rope_layers must be {layers} numbers, 1 for each layer with rotary embedding; got {marks!r}"
        )
    return tuple(layer for layer in range(layers) if marks and not marks[layer])


_RENAMED = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}


def _with_defaults(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """The configuration as transformers 5 writes it, defaults filled in, without the keys that the family ignores."""
    from transformers import AutoConfig
    from transformers.utils import logging

    ignored = {"model_type", "transformers_version", "architectures"} | family_keys() - set(FAMILIES[raw["model_type"]].keys)
    family = FAMILIES[raw["model_type"]]
    given = dict(family.written) | {k: v for k, v in raw.items() if k not in {*ignored, *family.unused_keys}}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it advises other keys for the same rotary embedding, which is checked here
    try:
        return AutoConfig.for_model(raw["model_type"], **given).to_dict()
    except Exception as e:  # its validators raise many kinds
        raise DataError(f"{source}: transformers does not accept it: {' '.join(str(e).split())}") from e
    finally:
        logging.set_verbosity(verbosity)


def _rope_parameters(config: dict[str, Any], family: Family, source: str) -> tuple[RopeParameters, RopeParameters | None]:
    """The rotary parameters of all layers, or of layers without and with a sliding window."""
    given = config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise DataError(f"{source}: rope_parameters must be an object; got {given!r}")
    own = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") else {}
    kinds = [own | given | (config.get("rope_scaling") or {})]
    if family.nested_rope:
        kinds = [given.get(kind) or {} for kind in ("full_attention", "sliding_attention")]
    full, *sliding = (parse_rope_parameters(kind, source, config["max_position_embeddings"]) for kind in kinds)
    if full.partial_rotary_factor != 1 and "partial_rotary_factor" not in family.keys:
        rule = f"must be 1 for the family {config['model_type']}"
        raise DataError(f"{source}: partial_rotary_factor {rule}; got {full.partial_rotary_factor}")
    return full, sliding[0] if sliding else None


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
        family.activation_key: next(name for name, activation in ACTIVATIONS.items() if activation == config.activation),
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.init_std,
    }
    if family.nested_rope:
        sliding = config.sliding_rope_parameters or config.rope_parameters
        content["rope_parameters"] = {"full_attention": rope, "sliding_attention": sliding.to_json()}
    else:
        scaling = config.rope_parameters.version_4_scaling(config.max_position_embeddings)
        scaling = scaling and {key: value for key, value in scaling.items() if key not in family.keys}
        content |= {"rope_parameters": rope, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    return content | _family_content(config, family) | dict(family.written) | extra


def _family_content(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys of config.json that the family has and others have not."""
    windows = config.sliding_windows
    own: dict[str, Any] = {
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": max(windows, default=None),
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": 1 / config.logits_scale,
        "attention_multiplier": config.attention_scale or config.head_dim**-0.5,
        "query_pre_attn_scalar": _whole(config.attention_scale**-2 if config.attention_scale else config.head_dim),
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logits_softcap or None,
        "shared_intermediate_size": config.intermediate_size,
        "num_local_experts": 0,
        "position_embedding_type": None if len(config.no_rope_layers) == config.num_layers else "rope",
        "partial_rotary_factor": config.rope_parameters.partial_rotary_factor,
        "no_rope_layers": [int(layer not in config.no_rope_layers) for layer in range(config.num_layers)],
    }
    if config.rope_parameters.rope_type == "longrope":
        own["original_max_position_embeddings"] = config.rope_parameters.original_max_position_embeddings
    if windows:
        own["use_sliding_window"] = True
    if windows or "use_sliding_window" not in family.keys:  # there full attention is the default
        own["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows or [0] * config.num_layers]
    return {key: own[key] for key in family.keys if key in own}


def _whole(value: float) -> float | int:
    """The value, an integer where it is one but for rounding: transformers takes no other."""
    return round(value) if abs(value - round(value)) < 1e-9 * value else value
