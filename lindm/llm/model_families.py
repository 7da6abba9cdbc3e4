"""The model families, in one table, `FAMILIES`: what each has beyond Llama, under the names of `config.json` and of its tensors.

A new family is one entry (docs/where-to-change-what.md has an example). Where it computes something new, it needs a switch of
`ModelConfig` as well, which `lindm.llm.model` reads.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lindm.errors import unknown

NormOrder = Literal["before", "after", "both"]
"""Where the norms of a layer stand: before attention and MLP (Llama), behind them (OLMo 2), or both (Gemma)."""
QKNorm = Literal["none", "heads", "all"]
"""RMSNorm of queries and keys: of each head (Qwen3), or of all heads together (OLMo 2)."""
Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What distinguishes one model family (`model_type` of config.json) from the others."""

    architecture: str  # class in transformers
    keys: tuple[str, ...] = ()  # keys of config.json, of `FAMILY_KEYS`, that the family reads; transformers ignores the others
    unused_keys: tuple[str, ...] = ()  # further keys of its files, which change nothing here
    required: Mapping[str, tuple[Any, ...]] = field(
        default_factory=dict
    )  # the values of keys (in every layer) that are supported
    written: Mapping[str, Any] = field(default_factory=dict)  # keys that transformers checks and does not use
    activation_key: str = "hidden_act"
    intermediate_key: str = "intermediate_size"
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # tensors of its files that have the rows of these
    # modules of a layer one after another, in place of a tensor for each
    qkv_bias: bool = False  # q, k and v have biases whatever config.json says
    qk_norm: QKNorm = "none"
    norm_order: NormOrder = "before"
    norm_offset: float = 0.0  # added to the weights of norms
    scaled_embedding: bool = False  # embedded tokens are multiplied by sqrt(hidden_size)
    nested_rope: bool = False  # rope_parameters are given apart for layers with a sliding window
    gguf_heads: Literal["interleaved", "halves"] | None = None  # row order of q and k in GGUF; None: no such family there


_WINDOWS_OF_LAYERS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
_GRANITE = ("attention_bias", "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_GEMMA = {
    "keys": (
        *("attention_bias", "hidden_activation", "query_pre_attn_scalar", "sliding_window", "layer_types"),
        *("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"),
    ),
    **{"activation_key": "hidden_activation", "norm_order": "both", "norm_offset": 1.0, "scaled_embedding": True},
}
_GEMMA_3 = ("rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern")
FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM", keys=("attention_bias", "mlp_bias"), gguf_heads="interleaved"),
    "mistral": Family(architecture="MistralForCausalLM", keys=("sliding_window",)),  # llama.cpp calls it llama
    "ministral": Family(architecture="MinistralForCausalLM", keys=("sliding_window", "layer_types")),
    "qwen2": Family(architecture="Qwen2ForCausalLM", qkv_bias=True, keys=_WINDOWS_OF_LAYERS, gguf_heads="halves"),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM", qk_norm="heads", keys=("attention_bias", *_WINDOWS_OF_LAYERS), gguf_heads="halves"
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        keys=(
            *("attention_bias", "mlp_bias", "use_sliding_window", "sliding_window", "layer_types"),
            *("no_rope_layers", "no_rope_layer_interval"),
        ),
    ),
    "phi3": Family(  # and Phi-4
        architecture="Phi3ForCausalLM",
        keys=("sliding_window", "partial_rotary_factor", "original_max_position_embeddings"),
        unused_keys=("embd_pdrop", "resid_pdrop", "full_attn_mod", "interpolate_factor"),
        tensors={"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")},
    ),
    "granite": Family(architecture="GraniteForCausalLM", keys=("mlp_bias", *_GRANITE)),
    "granitemoehybrid": Family(  # Granite 4 without mamba layers and without experts
        architecture="GraniteMoeHybridForCausalLM",
        keys=(*_GRANITE, "shared_intermediate_size", "position_embedding_type", "layer_types", "num_local_experts"),
        unused_keys=(
            *("mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head", "mamba_d_conv", "mamba_expand"),
            *("mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias", "time_step_limit", "num_experts_per_tok"),
            *("output_router_logits", "router_aux_loss_coef", "init_method", "normalization_function"),
        ),
        required={"num_local_experts": (0,), "layer_types": ("full_attention", "attention")},
        written={"mamba_n_heads": 1},  # which transformers checks against the hidden size even where no layer is of that kind
        intermediate_key="shared_intermediate_size",
        tensors={"shared_mlp.input_linear": ("gate", "up"), "shared_mlp.output_linear": ("down",)},
    ),
    "olmo2": Family(architecture="Olmo2ForCausalLM", keys=("attention_bias",), qk_norm="all", norm_order="after"),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        keys=("attention_bias", "sliding_window", "layer_types"),
        **{"qk_norm": "all", "norm_order": "after", "nested_rope": True},
    ),
    "gemma2": Family(architecture="Gemma2ForCausalLM", **_GEMMA),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        **_GEMMA | {"keys": (*_GEMMA["keys"], *_GEMMA_3), "qk_norm": "heads", "nested_rope": True},
    ),
}
COMMON_KEYS = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "pretraining_tp", "initializer_range"),
}
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # names in config.json
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


TARGET_MODULES = ("q", "k", "v", "o", "gate", "up", "down")  # linear layers that can have low-rank adapters
TARGET_GROUPS = {"all": TARGET_MODULES, "attention": TARGET_MODULES[:4], "mlp": TARGET_MODULES[4:]}


def parse_lora_targets(text: str, families: Iterable[Family] = ()) -> tuple[str, ...]:
    """The modules that "all", "attention", "mlp" or a list such as "q_proj,v_proj" names, in the order of `TARGET_MODULES`.

    Args:
      families: [default: all]; names of tensors that have several modules, such as qkv_proj, are those of these families.

    Raises:
      ValueError: an unknown name, or none.
    """
    known = TARGET_GROUPS | {f"{module}_proj": (module,) for module in TARGET_MODULES}
    for family in families or FAMILIES.values():
        known |= {name.rpartition(".")[2]: parts for name, parts in family.tensors.items()}
    names = [name.strip() for name in text.split(",") if name.strip()]
    if wrong := [name for name in names if name not in known]:
        raise ValueError(unknown("lora_targets", wrong[0], tuple(known)))
    if not names:
        raise ValueError("lora_targets must name a module, such as q_proj, or be all, attention or mlp; got none")
    chosen = {module for name in names for module in known[name]}
    return tuple(module for module in TARGET_MODULES if module in chosen)


def family_keys() -> set[str]:
    """The keys of config.json that some family reads and others do not."""
    return {key for family in FAMILIES.values() for key in family.keys}
