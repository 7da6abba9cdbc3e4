"""`lindm model`, without the process around it."""

import pytest

from lindm.cli.model import Import, Show, run_import, run_show
from lindm.errors import LindmError
from tests.lindm.llm import reference


def test_a_model_is_imported_and_shown(tmp_path, capsys):
    source = reference.write(tmp_path / "source", "qwen3", shards=2)
    assert run_import(Import(source=str(source), out=tmp_path / "out")) == 0
    assert capsys.readouterr().out.startswith(f"qwen3 with 12,908 parameters in {tmp_path / 'out'}: config.json, manifest.json, ")
    assert run_show(Show(directory=tmp_path / "out")) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["family"] == "qwen3" and shown["parameters"] == "12,908" and shown["weights"] == "F32 in 2 files"
    assert shown["heads"] == "4 of size 8, 2 key-value heads" and shown["context"] == "128 tokens, sliding window 6"
    assert shown["vocabulary"] == "48, output layer not tied" and shown["rope"] == "default, theta 10000"


def test_other_directories_raise_errors(tmp_path):
    source = reference.write(tmp_path / "source", "llama")
    (source / "model.safetensors").write_bytes(b"")
    with pytest.raises(LindmError, match="not a safetensors file"):
        run_show(Show(directory=source))
