"""Reading and writing of config.json, and errors that name the key."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from lindm.errors import DataError, LindmError
from lindm.llm.config import ModelConfig, parse_model_config, read_model_config, to_config_json
from lindm.llm.rope import RopeParameters
from tests.lindm.llm.reference import CONFIGS, FAMILIES, IGNORED, OTHERS


def read(name, **changes):
    return parse_model_config(CONFIGS[name] | changes, "config.json")


def test_every_key_of_config_json_is_read_into_its_field():
    assert read("llama") == ModelConfig(
        **{
            "model_type": "llama",
            "vocab_size": 61,
            "hidden_size": 24,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 6,
            "intermediate_size": 40,
        },
        rope_parameters=RopeParameters(
            rope_theta=100.0,
            rope_type="llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        **{
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "qkv_bias": True,
            "o_bias": True,
            "mlp_bias": True,
            "max_position_embeddings": 256,
        },
    )
    qwen3 = read("qwen3", initializer_range=0.5)
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.sliding_windows, qwen3.init_std, qwen3.head_dim) == (
        "heads",
        False,
        (6, 0, 6),
        0.5,
        8,
    )


def test_head_dim_defaults_to_hidden_size_over_num_heads():
    assert (read("smollm").head_dim, read("mistral").head_dim) == (8, 8) and read("mistral").hidden_size // read(
        "mistral"
    ).num_heads == 8
    assert read("qwen3").head_dim == 8 and read("qwen3").hidden_size // read("qwen3").num_heads == 5


def test_the_keys_of_both_versions_of_transformers_are_read():
    assert read("smollm").rope_parameters == RopeParameters(rope_theta=100_000.0)
    scaling = {"type": "linear", "factor": 2.0}
    assert read("smollm", rope_scaling=scaling).rope_parameters == RopeParameters(
        rope_theta=100_000.0, rope_type="linear", factor=2.0
    )
    old = {k: v for k, v in CONFIGS["llama"].items() if k != "rope_parameters"}
    scaling = {k: v for k, v in CONFIGS["llama"]["rope_parameters"].items() if k != "rope_theta"}
    assert parse_model_config(old | {"rope_theta": 100.0, "rope_scaling": scaling}, "config.json") == read("llama")


@pytest.mark.parametrize("name, changes", IGNORED)
def test_keys_that_a_family_does_not_read_are_ignored_as_transformers_ignores_them(name, changes):
    assert read(name, **changes) == read(name)


def test_a_family_has_the_windows_that_its_config_can_say():
    fields = {f.name: getattr(read("mistral"), f.name) for f in dataclasses.fields(ModelConfig)}
    with pytest.raises(ValueError, match=r"the family mistral has one window for all layers; got \(0, 5\)"):
        ModelConfig(**fields | {"sliding_windows": (0, 5)})
    with pytest.raises(ValueError, match=r"the family llama has no sliding window; got \(5, 5\)"):
        ModelConfig(**fields | {"model_type": "llama"})


def test_sliding_windows_apply_to_sliding_layers_only():
    assert read("mistral").sliding_windows == (5, 5) and read("mistral", sliding_window=None).sliding_windows == ()
    assert read("qwen2").sliding_windows == ()  # the size is there, the switch is off
    assert read("qwen2", use_sliding_window=True, max_window_layers=1).sliding_windows == (0, 4)
    assert read("qwen3", layer_types=["full_attention"] * 3).sliding_windows == ()


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
def test_a_written_config_is_read_back(tmp_path, name):
    a = read(name)
    (tmp_path / "config.json").write_text(json.dumps(to_config_json(a, dtype="float32", eos_token_id=2)))
    assert read_model_config(tmp_path) == a == read_model_config(tmp_path / "config.json")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == 2
    if a.sliding_rope_parameters is None:
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == a.rope_parameters.rope_theta
        del config["rope_parameters"]  # as version 4 reads it
        assert parse_model_config(config, "config.json") == a


def test_reading_a_config_prints_no_advice_of_transformers(capfd):
    assert read("phi4", original_max_position_embeddings=13).rope_parameters.original_max_position_embeddings == 13
    assert capfd.readouterr() == ("", "")


def test_the_attention_factor_of_yarn_is_given_or_follows_from_the_factor():
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}

    def factor(**more):
        return read("qwen3", rope_parameters=yarn | more).rope_parameters.attention_factor

    assert factor() == pytest.approx(0.1 * np.log(8) + 1) and factor(attention_factor=1.5) == 1.5
    assert factor(mscale=2.0, mscale_all_dim=1.0) == pytest.approx((0.2 * np.log(8) + 1) / (0.1 * np.log(8) + 1))


def test_num_parameters_of_published_models():
    smol = read("smollm", vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    smol = to_config_json(smol) | {"intermediate_size": 1536, "head_dim": 64}
    assert parse_model_config(smol, "config.json").num_parameters == 134_515_008
    llama = read_model_config(Path(__file__).parent / "files" / "llama-3-8b")  # the sizes that Meta published
    assert llama.num_parameters == 8_030_261_248


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("llama", {"model_type": "gpt2"}, "config.json: model_type must be one of llama, mistral, .*; got 'gpt2'"),
        ("llama", {"quantization_config": {"bits": 4}}, "config.json: quantization_config is not known for the family llama"),
        ("llama", {"logit_scale": 0.5}, "config.json: logit_scale is not known"),
        ("llama", {"auto_map": {"AutoModel": "evil.Model"}}, "config.json: auto_map asks for code"),
        ("llama", {"hidden_act": "gelu"}, "config.json: hidden_act must be one of silu, gelu_pytorch_tanh; got 'gelu'"),
        ("llama", {"pretraining_tp": 2}, "config.json: pretraining_tp must be 1; got 2"),
        ("llama", {"num_key_value_heads": 3}, "config.json: num_heads must be a multiple of num_kv_heads; got 4 and 3"),
        ("llama", {"head_dim": 7}, "config.json: .* even"),
        ("qwen2", {"num_hidden_layers": 10**12}, "config.json: num_hidden_layers must be at most 4096; got 1000000000000"),
        ("qwen2", {"rms_norm_eps": None}, "config.json: "),
        ("qwen2", {"rms_norm_eps": -1.0}, "config.json: rms_norm_eps must be between 0 and 1; got -1.0"),
        ("qwen2", {"rms_norm_eps": float("inf")}, "config.json: rms_norm_eps must be between 0 and 1; got inf"),
        ("qwen2", {"num_attention_heads": 0}, "config.json: num_attention_heads must be a positive integer below 2.31; got 0"),
        (
            "llama",
            {"rope_parameters": CONFIGS["llama"]["rope_parameters"] | {"factor": [1]}},
            r"factor must .* got \[1\]",
        ),
        (
            "llama",
            {"rope_parameters": CONFIGS["llama"]["rope_parameters"] | {"high_freq_factor": 1.0}},
            "low_freq_factor must be below high_freq_factor",
        ),
        ("qwen2", {"rope_theta": -10.0}, "config.json: rope_theta must be a positive number; got -10.0"),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": "much"}}, "config.json: "),
        ("qwen2", {"rope_parameters": [3]}, "config.json: "),
        (
            "llama",
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor must be 3 numbers; got 1",
        ),
        ("smollm", {"rope_scaling": {"type": "dynamic"}}, "config.json: "),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "chunked", "rope_theta": 1.0}},
            "config.json: rope_type must be one of default, ",
        ),
        ("phi4", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "config.json: "),
        ("phi3", {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Mine"}}, "config.json: auto_map asks for code"),
        (
            "smollm",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "config.json: partial_rotary_factor must be 1 for the family llama; got 0.5",
        ),
        (
            "granite4",
            {"layer_types": ["attention", "mamba"]},
            "config.json: layer_types must be full_attention: only the dense form of the family granitemoehybrid is supported; "
            "got (linear_attention|mamba)",
        ),
        ("granite4", {"num_local_experts": 8}, "config.json: num_local_experts must be 0: only the dense form .*; got 8"),
        ("llama", {"num_local_experts": 8, "full_attn_mod": 1}, "config.json: full_attn_mod is not known for the family llama"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be false"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "config.json: "),
        ("smollm", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 3}}, "rope parameters mscale are not known"),
        ("mistral", {"sliding_window": -1}, "config.json: sliding_window must be a positive integer; got -1"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "config.json: "),
        ("qwen3", {"layer_types": ["full_attention"]}, "config.json: "),
        ("qwen2", {"hidden_size": "16"}, "config.json: "),
        ("qwen2", {"intermediate_size": 0}, "config.json: intermediate_size must be a positive integer below 2.31; got 0"),
    ],
)
def test_an_unknown_key_or_value_raises_an_error_that_names_it(name, changes, message):
    with pytest.raises(LindmError, match=message) as e:
        read(name, **changes)
    assert isinstance(e.value, DataError)


def test_empty_values_and_keys_without_effect_are_accepted():
    assert read("llama", quantization_config=None, use_cache=True, eos_token_id=[1, 2], torch_dtype="float16") == read("llama")


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff", '{"model_type": ["llama"]}', "[" * 10**6])
def test_a_damaged_config_is_a_data_error(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(LindmError, match=r"config.json: ") as e:
        read_model_config(tmp_path)
    assert isinstance(e.value, DataError)


def test_a_directory_without_a_config_is_a_data_error(tmp_path):
    with pytest.raises(LindmError, match=r"is not a model: it has no config.json") as e:
        read_model_config(tmp_path)
    assert isinstance(e.value, DataError)


def test_invalid_sizes_raise_an_error():
    sizes = {
        "model_type": "llama",
        "vocab_size": 1,
        "hidden_size": 2,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 2,
        "intermediate_size": 1,
    }
    for change, message in (
        ({"num_layers": 0}, "num_layers must be at least 1; got 0"),
        ({"num_kv_heads": 3}, "num_heads must be"),
        ({"head_dim": 3}, "even"),
        ({"model_type": "lama"}, "model_type 'lama' is not known; did you mean llama"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig(**sizes | change)
