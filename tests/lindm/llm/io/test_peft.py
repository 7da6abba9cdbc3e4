"""Adapters in the format of PEFT, against merged weights in plain numpy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

from lindm.errors import DataError, LindmError, UsageError
from lindm.llm import lora
from lindm.llm.io import peft, weights
from lindm.llm.model import FrozenParam
from lindm.llm.parallel.sharding import make_mesh
from tests.lindm.llm import reference
from tests.lindm.llm.io.tensors import equal

HIDDEN = {"q": "self_attn.q_proj", "v": "self_attn.v_proj", "up": "mlp.up_proj"}


def adapted(directory, targets=("q", "v", "up"), rank=3, alpha=6.0):
    """A model whose adapters change something."""
    model = lora.add_lora(weights.load(directory), rank, alpha, jax.random.key(0), targets)
    rng = np.random.default_rng(3)
    for name, linear in lora.linear_layers(model):
        if name in targets:
            linear.lora_b = nnx.data(nnx.Param(jnp.asarray(rng.normal(size=linear.lora_b[...].shape), jnp.float32)))
    return model


def by_peft(directory, targets=("q", "v", "up"), rank=2, **config):
    """An adapter as PEFT writes it, for the model `llama`; its factors."""
    directory.mkdir(exist_ok=True)
    rng, tensors, shapes = np.random.default_rng(4), {}, {"q": (24, 24), "v": (24, 12), "up": (24, 40)}
    for i in range(3):
        for name in targets:
            n_in, n_out = shapes[name]
            key = f"base_model.model.model.layers.{i}.{HIDDEN[name]}"
            tensors[f"{key}.lora_A.weight"] = rng.normal(size=(rank, n_in)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = rng.normal(size=(n_out, rank)).astype(np.float32)
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    known = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "lora_dropout": 0.05, "bias": "none"}
    known |= {"target_modules": [f"{n}_proj" for n in targets], "modules_to_save": None, "rank_pattern": {}, "use_dora": False}
    known |= {"base_model_name_or_path": "somewhere", "init_lora_weights": True, "use_rslora": False, "fan_in_fan_out": False}
    (directory / "adapter_config.json").write_text(json.dumps(known | config))
    return tensors


@pytest.fixture
def llama(tmp_path):
    return reference.write(tmp_path / "model", "llama")


def logits(model, ids):
    ids = jnp.asarray(ids[None], jnp.int32)
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    return np.asarray(jax.jit(lambda i, p: model.logits(model.last_hidden_state(i, p)))(ids, positions))[0]


@pytest.mark.parametrize("rs", [False, True])
def test_an_adapter_adds_b_a_to_the_weights(tmp_path, llama, rs):
    factors = by_peft(tmp_path / "adapter", use_rslora=rs)
    model = peft.load_adapter(weights.load(llama), tmp_path / "adapter")
    scale, merged = 8 / np.sqrt(2) if rs else 8 / 2, reference.weights("llama")
    for key in factors:
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            merged[name] = merged[name] + scale * factors[key.replace("lora_A", "lora_B")] @ factors[key]
    ids = np.random.default_rng(0).integers(0, 61, 8)
    true = reference.logits("llama", merged, ids)
    assert np.abs(true - reference.logits("llama", reference.weights("llama"), ids)).max() > 1
    np.testing.assert_allclose(logits(model, ids), true, rtol=0, atol=1e-5 * np.abs(true).max())
    kinds = {".".join(map(str, keys)): type(leaf) for keys, leaf in nnx.to_flat_state(nnx.state(model))}
    assert all((kind is nnx.Param) == path.endswith((".lora_a", ".lora_b")) for path, kind in kinds.items())
    assert kinds["blocks.q.kernel"] is FrozenParam


def test_a_saved_adapter_has_the_format_of_peft(tmp_path, llama):
    model = adapted(llama)
    peft.save_adapter(model, tmp_path / "out", "org/base")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 3 * 3 * 2
    for i in range(3):
        for name, module in HIDDEN.items():
            linear, key = getattr(model.blocks, name), f"base_model.model.model.layers.{i}.{module}"
            assert np.array_equal(tensors[f"{key}.lora_A.weight"], np.asarray(linear.lora_a[...])[i].T)
            assert np.array_equal(tensors[f"{key}.lora_B.weight"], np.asarray(linear.lora_b[...])[i].T)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6, "org/base")
    assert config["target_modules"] == ["q_proj", "v_proj", "up_proj"] and config["peft_type"] == "LORA"


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 2}])
def test_a_saved_adapter_is_loaded_unchanged(tmp_path, mesh):
    directory = reference.write(tmp_path / "model", "wide")
    model = adapted(directory, targets=lora.TARGET_MODULES, alpha=4.5)
    peft.save_adapter(model, tmp_path / "out", "base")
    mesh = mesh and make_mesh(mesh, jax.devices()[:4])
    again = peft.load_adapter(weights.load(directory, mesh=mesh, base="int8"), tmp_path / "out", mesh=mesh)
    for name, linear in lora.linear_layers(again):
        there = getattr(model.blocks, name)
        assert np.array_equal(linear.lora_a[...], there.lora_a[...]) and np.array_equal(linear.lora_b[...], there.lora_b[...])
        assert linear.lora_scale == there.lora_scale == 1.5
    if mesh:
        assert getattr(again.blocks.down.lora_a[...].sharding, "spec", None) == PartitionSpec(None, "tensor", None)
        peft.save_adapter(again, tmp_path / "again", "base")
        file = "adapter_model.safetensors"
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


@pytest.mark.parametrize(
    "name, targets", [("phi4", ("q", "k", "v", "up")), ("phi3", ("q", "v", "o", "gate")), ("granite4", ("down",))]
)
def test_adapters_of_modules_that_share_a_tensor_are_one_adapter_of_it(tmp_path, name, targets):
    """The file's own update, scale B A, has the rows of each module's update, and zeros in between."""
    directory = reference.write(tmp_path / "model", name)
    model = adapted(directory, targets)
    peft.save_adapter(model, tmp_path / "out", "base")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    fused = reference.FUSED[model.config.model_type]
    stored = {module: parts for module, parts in fused.items() if set(parts) & set(targets)}
    assert {m.split(".")[1] for m in stored} <= set(config["target_modules"])
    linears = dict(lora.linear_layers(model))
    for module, parts in stored.items():
        key, short = f"base_model.model.model.layers.1.{module}", module.split(".")[1]
        a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
        scale = config["alpha_pattern"].get(short, config["lora_alpha"]) / config["rank_pattern"].get(short, config["r"])
        rows = [
            np.zeros((linears[p].shape[2], linears[p].shape[1]))
            if p not in targets
            else 2 * np.asarray(linears[p].lora_b[...])[1].T.astype(float) @ np.asarray(linears[p].lora_a[...])[1].T
            for p in parts
        ]
        np.testing.assert_allclose(scale * b.astype(float) @ a, np.concatenate(rows), atol=1e-6)
    settings = peft.read_adapter_settings(tmp_path / "out", model.config)
    assert settings == (3, 6, "standard", tuple(n for n in lora.TARGET_MODULES if n in targets))  # as the options were
    again = peft.load_adapter(weights.load(directory), tmp_path / "out")
    assert equal(again, model)
    assert {n for n, linear in lora.linear_layers(again) if linear.lora_a is not None} == set(targets)
    assert all(linear.lora_scale == 2 for n, linear in lora.linear_layers(again) if n in targets)


def test_one_adapter_of_a_tensor_of_three_modules_is_the_same_a_for_each(tmp_path):
    directory = reference.write(tmp_path / "model", "phi3")
    rng, key = np.random.default_rng(0), "base_model.model.model.layers"
    a, b = (rng.normal(size=(2, *shape)).astype(np.float32) for shape in ((6, 24), (72, 6)))
    tensors = {f"{key}.{i}.self_attn.qkv_proj.lora_{n}.weight": x[i] for i in range(2) for n, x in (("A", a), ("B", b))}
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 6, "lora_alpha": 3, "target_modules": ["qkv_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    model = peft.load_adapter(weights.load(directory), tmp_path / "adapter")
    for i, part in enumerate("qkv"):
        linear = getattr(model.blocks, part)
        assert np.array_equal(linear.lora_a[...], a.swapaxes(1, 2)) and linear.lora_scale == 0.5
        assert np.array_equal(linear.lora_b[...], b[:, 24 * i : 24 * (i + 1)].swapaxes(1, 2))


def test_an_adapter_in_sixteen_bits_is_read(tmp_path, llama):
    tensors = {k: v.astype(np.float16) for k, v in by_peft(tmp_path / "a").items()}
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    model = peft.load_adapter(weights.load(llama), tmp_path / "a")
    key = "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"
    assert model.blocks.up.lora_b[...].dtype == jnp.float32 and np.array_equal(model.blocks.up.lora_b[...][2].T, tensors[key])


@pytest.mark.parametrize(
    "config, message",
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA; got 'IA3'"),
        ({"bias": "all"}, "bias must be none; got 'all'"),
        ({"use_dora": True}, "use_dora is not known and may change what the adapter computes; got True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not known"),
        ({"rank_pattern": {"q_proj": 4}}, r"q_proj.lora_A.weight must be \[4, 24\] in one of F32, BF16, F16; got F32 \[2, 24\]"),
        ({"rank_pattern": {"layers.1.*": 2}}, "rank_pattern must be a positive integer for each of some target modules; got"),
        ({"alpha_pattern": {"q_proj": "2"}}, "alpha_pattern must be a number for each of some target modules; got"),
        ({"layers_to_transform": [1]}, "layers_to_transform is not known"),
        ({"something_new": 1}, "something_new is not known"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out must be false"),
        ({"r": 0}, "r must be a positive integer; got 0"),
        ({"r": 3}, r"lora_A.weight must be \[3, 24\] in one of F32, BF16, F16; got F32 \[2, 24\]"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number; got '8'"),
    ],
)
def test_anything_but_a_low_rank_update_raises_an_error_that_names_the_key(tmp_path, llama, config, message):
    by_peft(tmp_path / "adapter", **config)
    with pytest.raises(LindmError, match=message) as e:
        peft.load_adapter(weights.load(llama), tmp_path / "adapter")
    assert isinstance(e.value, DataError)


LAYER = "base_model.model.model.layers"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda f: f.pop(f"{LAYER}.1.mlp.up_proj.lora_B.weight"),
            r"lacks .*layers.1.mlp.up_proj.lora_B.weight; an adapter must be on",
        ),
        (
            lambda f: f.update({f"{LAYER}.3.mlp.up_proj.lora_B.weight": np.zeros((40, 2), np.float32)}),
            "layers.3.* is not a low-rank",
        ),
        (
            lambda f: f.update({"base_model.model.lm_head.lora_A.weight": np.zeros((2, 24), np.float32)}),
            "lm_head.lora_A.weight is not",
        ),
        (
            lambda f: f.update({f"{LAYER}.0.mlp.up_proj.lora_B.bias": np.zeros(40, np.float32)}),
            "up_proj.lora_B.bias is not a low-rank",
        ),
        (
            lambda f: f.update({f"{LAYER}.0.mlp.up_proj.lora_A.weight": np.zeros((2, 24), np.int8)}),
            r"in one of .*; got I8 \[2, 24\]",
        ),
        (lambda f: f.clear(), "has no tensors"),
    ],
)
def test_tensors_of_another_model_raise_an_error_that_names_them(tmp_path, llama, change, message):
    tensors = by_peft(tmp_path / "adapter")
    change(tensors)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(LindmError, match=message) as e:
        peft.load_adapter(weights.load(llama), tmp_path / "adapter")
    assert isinstance(e.value, DataError)


@pytest.mark.fault("F19")
def test_a_pickled_or_missing_adapter_is_a_data_error(tmp_path, llama):
    model = weights.load(llama)
    with pytest.raises(LindmError, match=r"cannot read .*adapter_config.json"):
        peft.load_adapter(model, tmp_path / "nowhere")
    by_peft(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(LindmError, match=r"adapter_model.bin is a pickle, which is never read"):
        peft.load_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.bin").unlink()
    with pytest.raises(LindmError, match=r"cannot read .*adapter_model.safetensors: No such file"):
        peft.load_adapter(model, tmp_path / "adapter")
    assert model.blocks.q.lora_a is None and isinstance(
        model.embedding, nnx.Param
    )  # a model is changed only by an adapter that is sound


@pytest.mark.fault("F18")
def test_saving_needs_adapters_and_an_empty_directory(tmp_path, llama):
    with pytest.raises(ValueError, match="model must have adapters"):
        peft.save_adapter(weights.load(llama), tmp_path / "out", "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(LindmError, match="out already exists and is not replaced") as e:
        peft.save_adapter(adapted(llama), tmp_path / "out", "base")
    assert isinstance(e.value, UsageError)


def test_nf4_codes_are_the_nearest_levels_of_their_block():
    """Level by level in float64, from the packed bytes: even inputs in the low half of a byte."""
    kernel = np.random.default_rng(3).normal(size=(2, 128, 6)).astype(np.float32)
    packed = lora.NF4Kernel(jnp.asarray(kernel))
    q, scale = np.asarray(packed.codes[...]), np.asarray(packed.scale[...], np.float64)
    dense = np.asarray(packed.dequantize(jnp.float32))
    levels = np.asarray(lora.NF4_LEVELS, np.float64)
    for layer, i, o in np.ndindex(*kernel.shape):
        byte = int(q[layer, i // 2, o])
        largest = np.abs(kernel[layer, i // 64 * 64 : (i // 64 + 1) * 64, o]).max()
        chosen = levels[byte >> 4 if i % 2 else byte & 15]
        assert scale[layer, i // 64, o] == largest
        assert abs(dense[layer, i, o] - chosen * largest) < 1e-6 * largest
        assert abs(kernel[layer, i, o] / largest - chosen) <= np.abs(kernel[layer, i, o] / largest - levels).min() + 1e-6
