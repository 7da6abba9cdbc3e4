"""Small models of every family in the format of Hugging Face, and their logits in plain numpy, in double precision, head by head.

Shares no code with `lindm.llm`: names and shapes are repeated here, the rotary embedding is a product of complex numbers, and one
query at a time attends to its keys.
"""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

CONFIGS = {
    "llama": {
        **{"model_type": "llama", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 256},
        **{"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "hidden_act": "silu"},
        "rope_parameters": {
            **{"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 32,
        },
    },
    "smollm": {  # as written by version 4 of transformers
        **{"model_type": "llama", "vocab_size": 67, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2},
        **{"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 128, "rms_norm_eps": 1e-5},
        **{
            "tie_word_embeddings": True,
            "rope_theta": 100000,
            "rope_scaling": None,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
        },
    },
    "mistral": {
        **{"model_type": "mistral", "vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
        },
        **{"sliding_window": 5, "rope_theta": 1000.0, "tie_word_embeddings": False, "hidden_act": "silu"},
    },
    "qwen2": {
        **{"model_type": "qwen2", "vocab_size": 59, "hidden_size": 16, "intermediate_size": 44, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6},
        **{
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": 4,
            "hidden_act": "silu",
        },
    },
    "qwen3": {
        **{"model_type": "qwen3", "vocab_size": 48, "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 3},
        **{
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
        },
        **{
            "rope_theta": 1e4,
            "tie_word_embeddings": False,
            "use_sliding_window": True,
            "sliding_window": 6,
            "hidden_act": "silu",
        },
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "ministral": {
        **{"model_type": "mistral", "vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
        },
        **{"sliding_window": 5, "rope_theta": 1000.0, "tie_word_embeddings": False, "hidden_act": "silu"},
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "smollm3": {
        **{"model_type": "smollm3", "vocab_size": 45, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6},
        **{"rope_theta": 1e4, "tie_word_embeddings": True, "no_rope_layers": [1, 0, 1, 0], "pad_token_id": 0},
    },
    "granite": {
        **{"model_type": "granite", "vocab_size": 51, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5},
        **{"rope_theta": 1e4, "tie_word_embeddings": True, "attention_multiplier": 0.25, "embedding_multiplier": 3.0},
        **{"residual_multiplier": 0.5, "logits_scaling": 2.0, "hidden_act": "silu"},
    },
    "phi3": {  # as Phi-3-mini-4k: a window in every layer
        **{"model_type": "phi3", "vocab_size": 57, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-5},
        **{"original_max_position_embeddings": 128, "rope_theta": 1e4, "rope_scaling": None, "sliding_window": 7},
        **{"embd_pdrop": 0.0, "resid_pdrop": 0.1, "pad_token_id": 0, "tie_word_embeddings": False, "hidden_act": "silu"},
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    },
    "phi4": {  # as Phi-4-mini; 12 is the most that texts of the short factors have, so those of the tests have long ones
        **{"model_type": "phi3", "vocab_size": 57, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "rms_norm_eps": 1e-5},
        **{"original_max_position_embeddings": 12, "rope_theta": 1e4, "partial_rotary_factor": 0.75, "sliding_window": 262144},
        **{"full_attn_mod": 1, "interpolate_factor": 1, "pad_token_id": 0, "tie_word_embeddings": True, "hidden_act": "silu"},
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 1.5, 2.0, 4.0, 7.0, 12.0],
        },
    },
    "granite4": {
        **{"model_type": "granitemoehybrid", "vocab_size": 51, "hidden_size": 24, "intermediate_size": 99},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
        **{"rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True, "attention_multiplier": 0.25},
        **{"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "hidden_act": "silu"},
        **{"shared_intermediate_size": 40, "position_embedding_type": "rope", "layer_types": ["attention"] * 2},
        **{"num_local_experts": 0, "num_experts_per_tok": 0, "mamba_n_heads": 4, "normalization_function": "rmsnorm"},
    },
    "olmo2": {
        **{"model_type": "olmo2", "vocab_size": 52, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6},
        **{"rope_theta": 1e4, "tie_word_embeddings": False, "hidden_act": "silu"},
    },
    "olmo3": {
        **{"model_type": "olmo3", "vocab_size": 54, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-6},
        **{"tie_word_embeddings": False, "sliding_window": 5, "hidden_act": "silu"},
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {
                **{"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 32},
                **{"beta_fast": 8.0, "beta_slow": 1.0, "attention_factor": 1.2},
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
    "gemma2": {
        **{"model_type": "gemma2", "vocab_size": 55, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2},
        **{
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
        },
        **{"rope_theta": 1e4, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16},
        **{"sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 6.0},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma3": {
        **{"model_type": "gemma3_text", "vocab_size": 56, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3},
        **{
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
        },
        **{
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 12,
            "sliding_window": 4,
        },
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
    "wide": {  # sizes are multiples of the block size of quantized formats
        **{"model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5},
        **{"rope_theta": 500.0, "tie_word_embeddings": False, "hidden_act": "silu"},
    },
}
OTHERS = (  # whose logits alone are compared
    *("ministral", "smollm3", "phi3", "phi4", "granite", "granite4", "olmo2", "olmo3", "gemma2", "gemma3"),
)
FUSED = {  # tensors of a layer that are several one upon another, and other names
    "phi3": {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")},
    "granitemoehybrid": {"shared_mlp.input_linear": ("gate", "up"), "shared_mlp.output_linear": ("down",)},
}
FAMILIES = tuple(name for name in CONFIGS if name != "wide" and name not in OTHERS)
AFTER = ("olmo2", "olmo3")  # norms stand behind attention and MLP
GEMMA = ("gemma2", "gemma3_text")  # norms before and behind, weights of norms are stored minus one
# keys that transformers does not read for a family, though it reads them for another, or that change no logits anywhere
IGNORED = [
    ("llama", {"sliding_window": 4}),
    ("llama", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 4, "use_sliding_window": True}),
    ("mistral", {"attention_bias": True, "mlp_bias": True, "use_sliding_window": False, "max_window_layers": 1}),
    ("qwen2", {"attention_bias": False, "mlp_bias": True}),
    ("qwen2", {"attention_bias": True}),
    ("qwen3", {"mlp_bias": True}),
    ("qwen3", {"max_sequence_length": 64, "attn_implementation": "eager", "_flash_attn_2_enabled": True}),
]


def sizes(config):
    """Hidden size, query heads, key-value heads, head size."""
    hidden_size, heads = config["hidden_size"], config["num_attention_heads"]
    return hidden_size, heads, config["num_key_value_heads"], config.get("head_dim") or hidden_size // heads


def weights(name, seed=0):
    """Random tensors of a configuration, by their names in a file."""
    config, rng = CONFIGS[name], np.random.default_rng(seed)
    family, inner_size = config["model_type"], config.get("shared_intermediate_size", config["intermediate_size"])
    hidden_size, heads, kv_heads, head_dim = sizes(config)
    drawn = {}

    def draw(key, *shape, mean=0.0, std=0.1):
        drawn[key] = (mean + std * rng.normal(size=shape)).astype(np.float32)

    draw("model.embed_tokens.weight", config["vocab_size"], hidden_size, std=1.0)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        offset = 0.0 if family in GEMMA else 1.0
        names = ["input_layernorm", "post_attention_layernorm"] if family not in AFTER else ["post_attention_layernorm"]
        names += ["pre_feedforward_layernorm"] if family in GEMMA else []
        names += ["post_feedforward_layernorm"] if family in GEMMA + AFTER else []
        for part in names:
            draw(f"{layer}.{part}.weight", hidden_size, mean=offset)
        for part, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            draw(f"{layer}.self_attn.{part}_proj.weight", n * head_dim, hidden_size, std=0.4)
            if family == "qwen2" or config.get("attention_bias"):
                draw(f"{layer}.self_attn.{part}_proj.bias", n * head_dim, std=0.5)
        draw(f"{layer}.self_attn.o_proj.weight", hidden_size, heads * head_dim, std=0.3)
        if config.get("attention_bias"):
            draw(f"{layer}.self_attn.o_proj.bias", hidden_size)
        if family in ("qwen3", "gemma3_text", *AFTER):
            for part, n in (("q", heads), ("k", kv_heads)):
                size = n * head_dim if family in AFTER else head_dim
                draw(f"{layer}.self_attn.{part}_norm.weight", size, mean=offset, std=0.3)
        for part, (n_out, n_in) in {
            "gate": (inner_size, hidden_size),
            "up": (inner_size, hidden_size),
            "down": (hidden_size, inner_size),
        }.items():
            draw(f"{layer}.mlp.{part}_proj.weight", n_out, n_in, std=0.3)
            if config.get("mlp_bias"):
                draw(f"{layer}.mlp.{part}_proj.bias", n_out)
    draw("model.norm.weight", hidden_size, mean=0.0 if family in GEMMA else 1.0)
    if not config["tie_word_embeddings"]:
        draw("lm_head.weight", config["vocab_size"], hidden_size, std=0.5)
    for i in range(config["num_hidden_layers"]):
        for tensor, parts in FUSED.get(family, {}).items():
            rows = [drawn.pop(f"model.layers.{i}.{'self_attn' if part in 'qkv' else 'mlp'}.{part}_proj.weight") for part in parts]
            drawn[f"model.layers.{i}.{tensor}.weight"] = np.concatenate(rows)
    return drawn


def separate(config, tensors):
    """The tensors with one for each projection, under the names of Llama."""
    hidden_size, heads, kv_heads, head_dim = sizes(config)
    rows, apart = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim, "down": hidden_size}, {}
    for key, value in tensors.items():
        layer, _, module = key.removesuffix(".weight").removeprefix("model.layers.").partition(".")
        parts = FUSED.get(config["model_type"], {}).get(module)
        at = 0
        for part in parts or ():
            n = rows.get(part, len(value) // 2)
            apart[f"model.layers.{layer}.{'self_attn' if part in 'qkv' else 'mlp'}.{part}_proj.weight"] = value[at : at + n]
            at += n
        apart |= {} if parts else {key: value}
    return apart


def write(directory, name, tensors=None, dtype=np.float32, shards=1, **changes):
    """A Hugging Face directory; `changes` to its config."""
    directory.mkdir(exist_ok=True)
    tensors = {k: v.astype(dtype) for k, v in (weights(name) if tensors is None else tensors).items()}
    (directory / "config.json").write_text(json.dumps(CONFIGS[name] | changes))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    names, places = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[i::shards]
        save_file({n: tensors[n] for n in mine}, directory / file, {"format": "pt"})
        places |= dict.fromkeys(mine, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory


def bfloat16(tensors):
    """The same numbers, rounded to bfloat16."""
    return {k: v.astype(ml_dtypes.bfloat16).astype(np.float32) for k, v in tensors.items()}


# --- the forward pass ------------------------------------------------------------------------------------------------------


def norm(x, weight, epsilon):
    return x / np.sqrt(np.mean(x**2) + epsilon) * weight


def yarn(rope, frequencies):
    """The frequencies of yarn, from the numbers of rotations over the original length (Peng et al., 2023)."""
    n, size = rope["original_max_position_embeddings"], 2 * len(frequencies)
    bounds = [
        size * np.log(n / (2 * np.pi * beta)) / (2 * np.log(rope["rope_theta"]))
        for beta in (rope["beta_fast"], rope["beta_slow"])
    ]
    low, high = max(np.floor(bounds[0]), 0), min(np.ceil(bounds[1]), size - 1)
    ramp = np.clip((np.arange(len(frequencies)) - low) / (high - low), 0, 1)
    return frequencies * (1 - ramp) + frequencies / rope["factor"] * ramp


def frequencies(config, head_dim, kind="full_attention", length=0):
    rope = config.get("rope_parameters", {"rope_theta": config.get("rope_theta")})
    rope, long = rope.get(kind, rope), config.get("rope_scaling")
    scaled, size = [], int(head_dim * config.get("partial_rotary_factor", 1))
    for i in range(size // 2):
        frequency = 1.0 / rope["rope_theta"] ** (2 * i / size)
        if long:
            frequency /= long["short_factor" if length <= config["original_max_position_embeddings"] else "long_factor"][i]
        if rope.get("rope_type") == "linear":
            frequency /= rope["factor"]
        if rope.get("rope_type") == "llama3":  # by wavelengths, as in the code of the paper
            original, factor = rope["original_max_position_embeddings"], rope["factor"]
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            wavelength = 2 * np.pi / frequency
            if wavelength > original / low:
                frequency /= factor
            elif wavelength >= original / high:
                smooth = (original / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / factor + smooth * frequency
        scaled.append(frequency)
    return yarn(rope, np.array(scaled)) if rope.get("rope_type") == "yarn" else np.array(scaled)


def apply_rope(x, position, frequency, factor=1.0):
    half = len(frequency)
    z = (x[:half] + 1j * x[half : 2 * half]) * np.exp(1j * position * frequency) * factor
    return np.concatenate([z.real, z.imag, x[2 * half :]])


def window(config, layer):
    """Number of keys that a query of a layer attends to; None: all."""
    size = config.get("sliding_window")
    if "layer_types" not in config and config["model_type"] in ("mistral", "phi3"):
        return size
    sliding = config.get("layer_types", [""] * config["num_hidden_layers"])[layer] == "sliding_attention"
    switch = config.get("use_sliding_window") if config["model_type"].startswith("qwen") else True
    return size if switch and sliding else None


def capped(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def rotation(config, layer, head_dim, length):
    """The frequencies of a layer, and the factor of its cosines and sines."""
    if not config.get("no_rope_layers", [1] * (layer + 1))[layer]:
        return np.zeros(head_dim // 2), 1.0
    kind = config.get("layer_types", ["full_attention"] * (layer + 1))[layer]
    rope, factor = config.get("rope_parameters", {}), 1.0
    if config.get("rope_scaling"):
        original = config["original_max_position_embeddings"]
        factor = np.sqrt(1 + np.log(config["max_position_embeddings"] / original) / np.log(original))
    return frequencies(config, head_dim, kind, length), rope.get(kind, rope).get("attention_factor", factor)


def logits(name, tensors, ids):
    """[T] tokens of one document -> [T, V]."""
    config = CONFIGS[name]
    w = {k: v.astype(np.float64) for k, v in separate(config, tensors).items()}
    hidden_size, heads, kv_heads, head_dim = sizes(config)
    epsilon, gemma, after = config["rms_norm_eps"], config["model_type"] in GEMMA, config["model_type"] in AFTER
    scale = config.get("attention_multiplier") or config.get("query_pre_attn_scalar", head_dim) ** -0.5
    residual = config.get("residual_multiplier", 1.0)

    def linear(key, x):
        return w[f"{key}.weight"] @ x + w.get(f"{key}.bias", 0.0)

    def normed(key, x, wanted=True):
        return norm(x, w[f"{key}.weight"] + gemma, epsilon) if wanted else x

    x = [w["model.embed_tokens.weight"][i] for i in ids]
    x = [token * (np.sqrt(hidden_size) if gemma else config.get("embedding_multiplier", 1.0)) for token in x]
    for i in range(config["num_hidden_layers"]):
        layer, seen = f"model.layers.{i}", window(config, i)
        frequency, factor = rotation(config, i, head_dim, len(ids))
        keys, values, outputs = [], [], []
        for t, token in enumerate(x):
            h = normed(f"{layer}.input_layernorm", token, not after)
            q, k, v = (linear(f"{layer}.self_attn.{p}_proj", h) for p in "qkv")
            if after:
                q, k = normed(f"{layer}.self_attn.q_norm", q), normed(f"{layer}.self_attn.k_norm", k)
            q, k, v = (y.reshape(-1, head_dim) for y in (q, k, v))
            if not after and f"{layer}.self_attn.q_norm.weight" in w:
                q = [normed(f"{layer}.self_attn.q_norm", one) for one in q]
                k = [normed(f"{layer}.self_attn.k_norm", one) for one in k]
            keys.append([apply_rope(one, t, frequency, factor) for one in k])
            values.append(v)
            first = 0 if seen is None else max(0, t - seen + 1)
            mixed = []
            for j in range(heads):
                rotated, g = apply_rope(q[j], t, frequency, factor), j // (heads // kv_heads)
                scores = np.array([rotated @ keys[s][g] * scale for s in range(first, t + 1)])
                scores = capped(scores, config.get("attn_logit_softcapping"))
                share = np.exp(scores - scores.max())
                mixed.append(sum(a * values[s][g] for a, s in zip(share / share.sum(), range(first, t + 1), strict=True)))
            attended = linear(f"{layer}.self_attn.o_proj", np.concatenate(mixed))
            token = token + residual * normed(f"{layer}.post_attention_layernorm", attended, gemma or after)
            h = normed(f"{layer}.{'pre_feedforward' if gemma else 'post_attention'}_layernorm", token, not after)
            gate = linear(f"{layer}.mlp.gate_proj", h)
            gate = (
                gate / (1 + np.exp(-gate))
                if not gemma
                else gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            )
            h = linear(f"{layer}.mlp.down_proj", gate * linear(f"{layer}.mlp.up_proj", h))
            outputs.append(token + residual * normed(f"{layer}.post_feedforward_layernorm", h, gemma or after))
        x = outputs
    head_weight = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    result = np.array([head_weight @ normed("model.norm", token) for token in x]) / config.get("logits_scaling", 1.0)
    return capped(result, config.get("final_logit_softcapping"))
