"""`lindm model` and `lindm export`, without the process around them."""

import ml_dtypes
import numpy as np
import pytest

from lindm.cli.models import Export, Import, Model, Show, run_export, run_model
from lindm.errors import LindmError
from tests.lindm.llm import reference
from tests.lindm.llm.io import test_peft
from tests.lindm.llm.io.test_weights import everything


@pytest.fixture(autouse=True)
def signals_as_they_were(monkeypatch):
    monkeypatch.setattr("lindm.io.signals.stop_on_signals", lambda: None)


def test_a_model_is_imported_and_shown(tmp_path, capsys):
    source = reference.write(tmp_path / "source", "qwen3", shards=2)
    assert run_model(Model(command=Import(source=str(source), out=tmp_path / "out"))) == 0
    assert capsys.readouterr().out.startswith(f"qwen3 with 12,908 parameters in {tmp_path / 'out'}: config.json, model-00001-of-")
    assert run_model(Model(command=Show(directory=tmp_path / "out"))) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["family"] == "qwen3" and shown["parameters"] == "12,908" and shown["weights"] == "F32 in 2 files"
    assert shown["heads"] == "4 of size 8, keys and values 2" and shown["length"] == "128 tokens, windows of 6"
    assert shown["vocabulary"] == "48, output of its own" and shown["positions"] == "rotary default, theta 10000"


def test_what_is_not_a_model_is_not_shown(tmp_path):
    source = reference.write(tmp_path / "source", "llama")
    (source / "model.safetensors").write_bytes(b"")
    with pytest.raises(LindmError, match="not a safetensors file"):
        run_model(Model(command=Show(directory=source)))


def test_an_adapter_is_merged_into_an_export(tmp_path, capsys):
    source = reference.write(tmp_path / "source", "llama")
    (source / "tokenizer.json").write_text("{}")
    factors = test_peft.by_peft(tmp_path / "adapter", targets=("v",))
    run_export(Export(directory=source, out=tmp_path / "out", adapter=tmp_path / "adapter", dtype="bf16"))
    assert "llama with " in capsys.readouterr().out and (tmp_path / "out" / "tokenizer.json").exists()
    name = "model.layers.2.self_attn.v_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    merged = reference.weights("llama")[f"{name}.weight"] + 4 * b @ a
    found = everything(tmp_path / "out")[f"{name}.weight"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), merged, rtol=2**-8)
    run_export(Export(directory=source, out=tmp_path / "plain"))
    assert np.array_equal(everything(tmp_path / "plain")[f"{name}.weight"], reference.weights("llama")[f"{name}.weight"])
