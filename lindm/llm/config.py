"""What a decoder computes, read from the `config.json` of a Hugging Face directory; everything that would change it is refused
by name.

The file is normalised by transformers' `AutoConfig`, which knows both the older keys (`rope_theta`, `rope_scaling`) and those of
version 5 (`rope_parameters`). `AutoConfig` keeps keys that it does not know, so the file itself is read too: a key that is
neither used here nor known to leave the logits alone is refused unless its value is empty, false or zero.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lindm.errors import DataError, LindmError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CONFIG = "config.json"
DEEPEST = 2**12  # layers: the names of all tensors are written down before any is read

USED = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window"),
    *("max_window_layers", "layer_types", "pretraining_tp", "initializer_range"),
}
# what does not enter the logits: identity, tokens, and settings of another library's training and generation
HARMLESS = {
    *("architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
    *("torch_dtype", "dtype", "transformers_version", "transformers.js_config", "use_cache", "attention_dropout"),
    *(
        "_name_or_path",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "unsloth_version",
        "unsloth_fixed",
    ),
    *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix"),
    *("return_dict", "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "is_llama_config"),
    *("model_max_length", "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "rope_interleaved"),
}


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions. `kind` default: theta alone; linear: positions over `factor`; llama3: long wavelengths over `factor`."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0  # llama3: wavelengths above original / low are divided by factor,
    high: float = 4.0  # those below original / high are kept, and between the two it is blended
    original: int = 8192

    def __post_init__(self):
        for field in ("theta", "factor", "low", "high", "original"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{field} of the rotations must be a positive number; got {value!r}")
        if self.low >= self.high:
            raise ValueError(f"low must be below high; got {self.low} and {self.high}")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes and switches of a decoder; hashable, static under `jit`."""

    family: str
    vocabulary: int
    width: int
    depth: int
    K: int  # query heads
    groups: int  # key and value heads, each shared by K / groups query heads
    head: int  # size of one head
    mlp: int
    rope: Rope = Rope()
    epsilon: float = 1e-6  # of the root mean square norms
    tied: bool = False  # the output is read off the embedding's own rows
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()  # keys that each layer sees, itself included; 0: all; () for all layers: all
    length: int = 2048  # of the longest sequence that it was made for
    spread: float = 0.02  # of the weights' initial law

    def __post_init__(self):
        for field in ("vocabulary", "width", "depth", "K", "groups", "head", "mlp", "length"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1; got {getattr(self, field)}")
        if self.K % self.groups:
            raise ValueError(f"K must be a multiple of groups; got {self.K} and {self.groups}")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon must be between 0 and 1; got {self.epsilon}")
        if self.head % 2:
            raise ValueError(f"head must be even, positions turn its halves; got {self.head}")

    @property
    def parameters(self) -> int:
        """Number of weights."""
        q, kv = self.K * self.head, 2 * self.groups * self.head
        block = self.width * (2 * q + kv) + 3 * self.width * self.mlp + 2 * self.width
        block += (q + kv) * self.qkv_bias + self.width * self.o_bias + (2 * self.mlp + self.width) * self.mlp_bias
        block += 2 * self.head * self.qk_norm
        return self.depth * block + self.width + self.vocabulary * self.width * (1 if self.tied else 2)


def read_architecture(directory: Path) -> Architecture:
    """The architecture of a Hugging Face directory, or of a `config.json` itself. DataError, naming file and key, if it is not
    ours.
    """
    path = directory / CONFIG if directory.is_dir() else directory
    return architecture(read_config(path), str(path))


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object of a file; DataError where it is not one."""
    try:
        raw = json.loads(path.read_bytes())
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: not JSON: {e}") from e
    if not isinstance(raw, dict):
        raise DataError(f"{path}: not a JSON object")
    return raw


def architecture(raw: dict[str, Any], source: str) -> Architecture:
    """The architecture of the content of a config.json, which `source` names in errors."""

    def refuse(key: str, rule: str) -> LindmError:
        return DataError(f"{source}: {key} {rule}; got {raw.get(key)!r}")

    family = raw.get("model_type")
    if family not in FAMILIES:
        raise refuse("model_type", f"must be one of {', '.join(FAMILIES)}")
    if "auto_map" in raw:
        raise refuse("auto_map", "asks for code that comes with the model, which is never run")
    for key in sorted(raw.keys() - USED - HARMLESS):
        if raw[key]:
            raise refuse(key, f"is not known for the family {family} and may change what the model computes")
    if isinstance(raw.get("num_hidden_layers"), int) and raw["num_hidden_layers"] > DEEPEST:
        raise refuse("num_hidden_layers", f"must be at most {DEEPEST}")
    config = _normalised(raw, source)
    if config["hidden_act"] != "silu":
        raise refuse("hidden_act", "must be silu")
    if config.get("pretraining_tp", 1) not in (1, None):
        raise refuse("pretraining_tp", "must be 1")
    width, K, depth = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    bias = bool(config.get("attention_bias", False))
    sizes = {
        "vocabulary": config["vocab_size"],
        "width": width,
        "depth": depth,
        "K": K,
        "groups": config.get("num_key_value_heads") or K,
        "head": config.get("head_dim") or (width // K if K else 0),
        "mlp": config["intermediate_size"],
        "length": config["max_position_embeddings"],
    }
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise DataError(f"{source}: {name} must be a positive integer; got {size!r}")
    try:
        return Architecture(
            family=family,
            **sizes,
            rope=_rope(config, source),
            epsilon=float(config["rms_norm_eps"]),
            tied=bool(config["tie_word_embeddings"]),
            qkv_bias=bias or family == "qwen2",
            o_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            windows=_windows(config, family, depth, source),
            spread=float(config.get("initializer_range", 0.02)),
        )
    except (TypeError, ValueError) as e:
        raise DataError(f"{source}: {e}") from e


def _normalised(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """As transformers 5 writes it, defaults filled in."""
    from transformers import AutoConfig

    given = {k: v for k, v in raw.items() if k not in ("model_type", "transformers_version", "architectures")}
    try:
        return AutoConfig.for_model(raw["model_type"], **given).to_dict()
    except Exception as e:  # its validators raise many kinds
        raise DataError(f"{source}: transformers does not accept it: {' '.join(str(e).split())}") from e


def _rope(config: dict[str, Any], source: str) -> Rope:
    given = dict(config.get("rope_parameters") or {})
    if config.get("rope_scaling"):  # a key of version 4 that was not converted
        given |= config["rope_scaling"]
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    theta = given.pop("rope_theta", config.get("rope_theta", 10_000.0))
    keys = {"factor": "factor", "low_freq_factor": "low", "high_freq_factor": "high"}
    keys |= {"original_max_position_embeddings": "original"}
    wanted = {"default": (), "linear": ("factor",), "llama3": tuple(keys)}
    if kind not in wanted:
        raise DataError(f"{source}: rope_type must be one of {', '.join(wanted)}; got {kind!r}")
    if given.get("partial_rotary_factor", 1.0) == 1.0:
        given.pop("partial_rotary_factor", None)
    if missing := set(wanted[kind]) - given.keys():
        raise DataError(f"{source}: rope_type {kind} needs {', '.join(sorted(missing))}")
    if unknown := {k for k in given.keys() - set(wanted[kind]) if given[k] is not None and k not in keys}:
        raise DataError(f"{source}: rope parameters {', '.join(sorted(unknown))} are not known for rope_type {kind}")
    return Rope(theta=float(theta), kind=kind, **{keys[k]: given[k] for k in wanted[kind]})


def _windows(config: dict[str, Any], family: str, depth: int, source: str) -> tuple[int, ...]:
    """How many keys each layer sees: transformers says so by `layer_types`, by `max_window_layers`, or by one window for all."""
    window = config.get("sliding_window")
    if not window or (family.startswith("qwen") and not config.get("use_sliding_window")):
        return ()
    if not isinstance(window, int) or window < 1:
        raise DataError(f"{source}: sliding_window must be a positive integer; got {window!r}")
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention"] * depth
    if len(kinds) != depth or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise DataError(f"{source}: layer_types must name sliding_attention or full_attention for {depth} layers; got {kinds!r}")
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def to_config(architecture: Architecture, **extra: Any) -> dict[str, Any]:
    """The content of a config.json from which `architecture` reads the same again, with the rotations as both transformers 5 and
    its version 4 ask for them: what reads only the older keys would otherwise take its own default."""
    a, rope = architecture, architecture.rope
    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind == "llama3":
        parameters |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
        parameters |= {"original_max_position_embeddings": rope.original}
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[a.family]
    config: dict[str, Any] = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": a.family,
        "vocab_size": a.vocabulary,
        "hidden_size": a.width,
        "intermediate_size": a.mlp,
        "num_hidden_layers": a.depth,
        "num_attention_heads": a.K,
        "num_key_value_heads": a.groups,
        "head_dim": a.head,
        "hidden_act": "silu",
        "max_position_embeddings": a.length,
        "rms_norm_eps": a.epsilon,
        "tie_word_embeddings": a.tied,
        "rope_parameters": parameters,
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else {k: v for k, v in parameters.items() if k != "rope_theta"},
        "initializer_range": a.spread,
    }
    if a.family in ("llama", "qwen3"):
        config["attention_bias"] = a.o_bias
    if a.family == "llama":
        config["mlp_bias"] = a.mlp_bias
    if a.family == "mistral":
        config["sliding_window"] = a.windows[0] if a.windows else None
    elif a.windows:
        config |= {"use_sliding_window": True, "sliding_window": max(a.windows)}
        config["layer_types"] = ["sliding_attention" if w else "full_attention" for w in a.windows]
    return config | extra


def scaled_frequencies(rope: Rope, head: int) -> list[float]:
    """Angle per position of each pair of coordinates [head / 2], in double precision.

    llama3 (Llama 3.1's own scaling): with wavelength 2 pi / f, a frequency f is kept where the wavelength is below
    original / high, divided by factor where it is above original / low, and in between blended linearly in original / wavelength.
    """
    found = []
    for i in range(head // 2):
        f = rope.theta ** (-2 * i / head)
        if rope.kind == "linear":
            f /= rope.factor
        elif rope.kind == "llama3":
            wavelength = 2 * math.pi / f
            blend = (rope.original / wavelength - rope.low) / (rope.high - rope.low)
            blend = min(max(blend, 0.0), 1.0)
            f = (1 - blend) * f / rope.factor + blend * f
        found.append(f)
    return found
