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
    "wide": {  # sizes are multiples of the block size of quantized formats
        **{"model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5},
        **{"rope_theta": 500.0, "tie_word_embeddings": False, "hidden_act": "silu"},
    },
}
FAMILIES = tuple(name for name in CONFIGS if name != "wide")
# keys that transformers does not read for a family, though it reads them for another, or that change no logits anywhere
IGNORED = [
    ("llama", {"sliding_window": 4}),
    ("llama", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 4, "use_sliding_window": True}),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}),
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
    family, inner_size = config["model_type"], config["intermediate_size"]
    hidden_size, heads, kv_heads, head_dim = sizes(config)
    drawn = {}

    def draw(key, *shape, mean=0.0, std=0.1):
        drawn[key] = (mean + std * rng.normal(size=shape)).astype(np.float32)

    draw("model.embed_tokens.weight", config["vocab_size"], hidden_size, std=1.0)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        draw(f"{layer}.input_layernorm.weight", hidden_size, mean=1.0)
        draw(f"{layer}.post_attention_layernorm.weight", hidden_size, mean=1.0)
        for part, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            draw(f"{layer}.self_attn.{part}_proj.weight", n * head_dim, hidden_size, std=0.4)
            if family == "qwen2" or config.get("attention_bias"):
                draw(f"{layer}.self_attn.{part}_proj.bias", n * head_dim, std=0.5)
        draw(f"{layer}.self_attn.o_proj.weight", hidden_size, heads * head_dim, std=0.3)
        if config.get("attention_bias"):
            draw(f"{layer}.self_attn.o_proj.bias", hidden_size)
        if family == "qwen3":
            draw(f"{layer}.self_attn.q_norm.weight", head_dim, mean=1.0, std=0.3)
            draw(f"{layer}.self_attn.k_norm.weight", head_dim, mean=1.0, std=0.3)
        for part, (n_out, n_in) in {
            "gate": (inner_size, hidden_size),
            "up": (inner_size, hidden_size),
            "down": (hidden_size, inner_size),
        }.items():
            draw(f"{layer}.mlp.{part}_proj.weight", n_out, n_in, std=0.3)
            if config.get("mlp_bias"):
                draw(f"{layer}.mlp.{part}_proj.bias", n_out)
    draw("model.norm.weight", hidden_size, mean=1.0)
    if not config["tie_word_embeddings"]:
        draw("lm_head.weight", config["vocab_size"], hidden_size, std=0.5)
    return drawn


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


def frequencies(config, head_dim):
    rope = config.get("rope_parameters", {"rope_theta": config.get("rope_theta")})
    scaled = []
    for i in range(head_dim // 2):
        frequency = 1.0 / rope["rope_theta"] ** (2 * i / head_dim)
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
    return np.array(scaled)


def apply_rope(x, position, frequency):
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequency)
    return np.concatenate([z.real, z.imag])


def window(config, layer):
    """Number of keys that a query of a layer attends to; None: all."""
    size = config.get("sliding_window")
    if config["model_type"].startswith("qwen"):
        sliding = config.get("layer_types", [""] * config["num_hidden_layers"])[layer] == "sliding_attention"
        return size if config.get("use_sliding_window") and sliding else None
    return size


def logits(name, tensors, ids):
    """[T] tokens of one document -> [T, V]."""
    config = CONFIGS[name]
    w = {k: v.astype(np.float64) for k, v in tensors.items()}
    _, heads, kv_heads, head_dim = sizes(config)
    epsilon, frequency = config["rms_norm_eps"], frequencies(config, head_dim)

    def linear(key, x):
        return w[f"{key}.weight"] @ x + w.get(f"{key}.bias", 0.0)

    x = [w["model.embed_tokens.weight"][i] for i in ids]
    for i in range(config["num_hidden_layers"]):
        layer, seen = f"model.layers.{i}", window(config, i)
        keys, values, after = [], [], []
        for t, token in enumerate(x):
            h = norm(token, w[f"{layer}.input_layernorm.weight"], epsilon)
            q, k, v = (linear(f"{layer}.self_attn.{p}_proj", h).reshape(-1, head_dim) for p in "qkv")
            if f"{layer}.self_attn.q_norm.weight" in w:
                q = [norm(one, w[f"{layer}.self_attn.q_norm.weight"], epsilon) for one in q]
                k = [norm(one, w[f"{layer}.self_attn.k_norm.weight"], epsilon) for one in k]
            keys.append([apply_rope(one, t, frequency) for one in k])
            values.append(v)
            first = 0 if seen is None else max(0, t - seen + 1)
            mixed = []
            for j in range(heads):
                rotated, g = apply_rope(q[j], t, frequency), j // (heads // kv_heads)
                scores = np.array([rotated @ keys[s][g] / np.sqrt(head_dim) for s in range(first, t + 1)])
                share = np.exp(scores - scores.max())
                mixed.append(sum(a * values[s][g] for a, s in zip(share / share.sum(), range(first, t + 1), strict=True)))
            token = token + linear(f"{layer}.self_attn.o_proj", np.concatenate(mixed))
            h = norm(token, w[f"{layer}.post_attention_layernorm.weight"], epsilon)
            gate = linear(f"{layer}.mlp.gate_proj", h)
            after.append(token + linear(f"{layer}.mlp.down_proj", gate / (1 + np.exp(-gate)) * linear(f"{layer}.mlp.up_proj", h)))
        x = after
    head_weight = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return np.array([head_weight @ norm(token, w["model.norm.weight"], epsilon) for token in x])
