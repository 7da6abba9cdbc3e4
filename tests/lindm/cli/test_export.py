"""`lindm export`, without the process around it."""

import ml_dtypes
import numpy as np
import pytest

from lindm.cli.export import Export, run
from lindm.cli.main import main
from lindm.errors import DataError
from lindm.io import files, provenance
from lindm.io.verification import PROVENANCE
from lindm.llm.sft.options import RUN_FORMAT
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
    trained = tmp_path / "run"
    trained.mkdir()
    files.write_json(trained / "config.json", {"options": {}}, format=RUN_FORMAT)
    with pytest.raises(DataError, match="run has no adapter: the run is not finished, or it trained all weights"):
        run(Export(directory=source, out=tmp_path / "of_run", adapter=trained, dtype="bf16"))
    (tmp_path / "adapter").rename(trained / "adapter")
    run(Export(directory=source, out=tmp_path / "of_run", adapter=trained, dtype="bf16"))
    assert np.array_equal(everything(tmp_path / "of_run")[f"{name}.weight"], weight)
    run(Export(directory=source, out=tmp_path / "plain"))
    assert np.array_equal(everything(tmp_path / "plain")[f"{name}.weight"], reference.weights("llama")[f"{name}.weight"])


def test_what_is_no_model_is_named(tmp_path):
    assert main(["data", "make", "mdp", "--tasks", "1", "--demos", "1", "--horizon", "2", "--out", str(tmp_path / "data")]) == 0
    (tmp_path / "result").mkdir()
    files.write_json(tmp_path / "result" / "manifest.json", {"outputs": {}}, format="lindm-manifest-2")
    for name, kind in (("data", "a dataset of `lindm data make`"), ("result", "a run or another result")):
        with pytest.raises(DataError, match=f"{name} is {kind}.*, and neither a model nor an adapter"):
            run(Export(directory=tmp_path / name, out=tmp_path / "out"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(DataError, match=r"model\.gguf is not a directory; `lindm model import` makes one of it"):
        run(Export(directory=tmp_path / "model.gguf", out=tmp_path / "out"))
