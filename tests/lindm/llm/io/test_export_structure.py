"""What transformers and vLLM look for in a model directory, in the exports of every family.

vLLM takes the class from `architectures`, the type from `dtype` (or `torch_dtype`), the context from `max_position_embeddings`.
It reads the files *.safetensors that the index names, where there is one. Its tokenizer and chat template are those of
`AutoTokenizer`, its default sampling and the ends of an answer those of generation_config.json.
"""

import json
from dataclasses import replace

import jax.numpy as jnp
import pytest
import transformers
from flax import nnx
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import lindm as ld
from lindm.llm.config import FAMILIES
from lindm.llm.io import weights
from lindm.llm.model import Decoder
from tests.lindm.llm import reference
from tests.lindm.llm.small import TURNS, byte_level

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".py")


def exported(tmp_path, family, **options):
    """The export of a random model of a family with a tokenizer."""
    tokenizer = byte_level()
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    source = reference.write(tmp_path / "source", family)
    model = Decoder(replace(weights.read_model_config(source), vocab_size=len(tokenizer)), nnx.Rngs(0), jnp.float32)
    ends = {"eos_token_id": [tokenizer.eos_token_id, 0], "do_sample": True, "temperature": 0.6}
    (tmp_path / "tokenizer" / "generation_config.json").write_text(json.dumps(ends))
    weights.save(model, tmp_path / "model", like=tmp_path / "tokenizer", **options)
    return tmp_path / "model"


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in reference.CONFIGS])
def test_an_export_has_what_loaders_look_for(tmp_path, family):
    directory = exported(tmp_path, family, max_shard_bytes=15_000, dtype="f16")
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == [FAMILIES[family].architecture] and hasattr(transformers, config["architectures"][0])
    assert config["model_type"] == weights.read_model_config(directory).model_type
    assert config.get("dtype", config.get("torch_dtype")) == "float16"
    assert all(isinstance(config[key], int) and config[key] > 0 for key in (*SIZES, "max_position_embeddings"))
    assert type(AutoConfig.from_pretrained(directory)).model_type == config["model_type"]

    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(shards) > 1 and set(index["weight_map"].values()) == set(shards)
    total = 0
    for shard in shards:
        with safe_open(directory / shard, "numpy") as f:
            assert f.metadata() == {"format": "pt"}
            assert sorted(f.keys()) == sorted(name for name, file in index["weight_map"].items() if file == shard)
            total += sum(f.get_tensor(name).nbytes for name in f.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == total
    assert ("lm_head.weight" in index["weight_map"]) != config["tie_word_embeddings"]
    assert not [path.name for path in directory.iterdir() if path.suffix in PICKLES]


def test_tokenizer_template_and_generation_settings_are_those_of_the_model(tmp_path):
    directory, original = exported(tmp_path, "llama"), byte_level()
    assert {"model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {path.name for path in directory.iterdir()}
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.is_fast and len(tokenizer) == len(original)
    chat = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert chat == original.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    generation = GenerationConfig.from_pretrained(directory)
    assert (generation.eos_token_id, generation.temperature) == ([original.eos_token_id, 0], 0.6)
    ld.export(directory, tmp_path / "again", dtype="bf16")
    kept = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    for name in kept:
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()
