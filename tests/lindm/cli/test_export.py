"""`lindm export`, without the process around it."""

import ml_dtypes
import numpy as np

from lindm.cli.export import Export, run
from lindm.io import files, provenance
from lindm.io.verification import PROVENANCE
from tests.lindm.llm import reference
from tests.lindm.llm.io import test_peft
from tests.lindm.llm.io.tensors import everything


def test_an_adapter_is_merged_into_an_export(tmp_path, capsys):
    source = reference.write(tmp_path / "source", "llama")
    (source / "tokenizer.json").write_text("{}")
    factors = test_peft.by_peft(tmp_path / "adapter", targets=("v",))
    run(Export(directory=source, out=tmp_path / "out", adapter=tmp_path / "adapter", dtype="bf16"))
    assert "llama with " in capsys.readouterr().out and (tmp_path / "out" / "tokenizer.json").exists()
    assert files.read_json(tmp_path / "out" / PROVENANCE, format=provenance.FORMAT)["date"]
    name = "model.layers.2.self_attn.v_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    merged = reference.weights("llama")[f"{name}.weight"] + 4 * b @ a
    weight = everything(tmp_path / "out")[f"{name}.weight"]
    assert weight.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(weight.astype(np.float32), merged, rtol=2**-8)
    run(Export(directory=source, out=tmp_path / "plain"))
    assert np.array_equal(everything(tmp_path / "plain")[f"{name}.weight"], reference.weights("llama")[f"{name}.weight"])
