"""The check of an accelerator in its small form, on the CPU: every part passes, or says why it could not run."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lindm.bench import accelerator, timing
from lindm.cli.exit_codes import exit_code
from lindm.cli.main import main
from lindm.errors import StorageError
from lindm.llm.attention import dense_attention

torch_missing = importlib.util.find_spec("torch") is None


@pytest.fixture(scope="module")
def parts():
    """The parts, in this process."""
    with jax.enable_x64(False):  # as the command runs
        return {part: accelerator.measure(part, "") for part in ("kernels", "logits", "step", "smollm2", "1b", "1b torch")}


def test_parity_and_training_pass_and_have_their_numbers(parts):
    for part in ("kernels", "logits", "step", "1b"):
        assert parts[part]["status"] == "passed", parts[part]["reason"]
        assert parts[part]["device"]["platform"] == "cpu"
    for part in ("kernels", "logits", "step"):
        distances = parts[part]["distances"]
        assert distances and all(0 <= d <= parts[part]["tolerance"] for d in distances.values())
    assert {name.split(",")[0] for name in parts["kernels"]["distances"]} == {"of this platform", "blockwise"}
    trained = parts["1b"]
    assert trained["tokens_per_second"] > 0 and 0 < trained["mfu"] < 1 and trained["peak_bytes"] is None
    assert trained["loss"][1] < trained["loss"][0] == pytest.approx(np.log(accelerator.SMALL.vocab_size), rel=0.1)


def test_what_is_not_there_is_skipped_with_its_reason(parts, tmp_path):
    assert parts["smollm2"]["status"] == "skipped" and "has no model; give its directory" in parts["smollm2"]["reason"]
    if torch_missing:
        assert (parts["1b torch"]["status"], parts["1b torch"]["reason"]) == ("skipped", "torch is not installed")


def test_a_kernel_that_ignores_documents_or_returns_nan_fails(monkeypatch):
    def deaf(q, k, v, segment_ids, window=0, scale=0.0, softcap=0.0):
        return dense_attention(q, k, v, None, window, scale, softcap)

    for wrong in (deaf, lambda *a, **kw: jnp.nan * dense_attention(*a, **kw)):
        monkeypatch.setattr(accelerator, "attention_for", lambda mesh, wrong=wrong: wrong)
        part = accelerator.measure("kernels", "")
        assert part["status"] == "failed"
        assert "above 0.0001: of this platform, window 0, output" in part["reason"] and "blockwise" not in part["reason"]


def test_what_a_library_raises_fails_that_part(monkeypatch):
    def broken(device):
        raise ValueError("no such kernel")

    monkeypatch.setattr(accelerator, "check_logits", broken)
    part = accelerator.measure("logits", "")
    assert (part["status"], part["reason"]) == ("failed", "ValueError: no such kernel")


def test_the_failure_of_a_process_stops_no_other_part_and_the_exit_code_says_so(monkeypatch, tmp_path, capsys):
    def worker(module, part, model, timeout):
        if part == "kernels":
            raise RuntimeError("the bench process `kernels` failed with exit code -11")
        status = "skipped" if part.endswith("torch") else "passed"
        return {"part": part, "status": status, "reason": "", "seconds": 1.0, "device": {"platform": "tpu", "kind": "TPU v5e"}}

    monkeypatch.setattr(accelerator, "in_worker", worker)
    out = tmp_path / "new" / "accelerator.json"
    assert main(["bench", "accelerator", "--out", str(out)]) == 1
    document = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == document
    assert [part["part"] for part in document["parts"]] == list(accelerator.PARTS)
    assert [part["status"] for part in document["parts"]] == ["failed", *["passed"] * 3, "skipped", "passed", "skipped"]
    assert document["parts"][0]["reason"].endswith("exit code -11") and "jax" in document["versions"]
    assert document["device"] == {"platform": "tpu", "kind": "TPU v5e"} and not document["small"]
    rows = accelerator.benchmark()
    assert {row["peer_name"] for row in rows} == {"torch (skipped)"} and len(rows) == 6


def test_an_output_that_cannot_be_written_is_an_error_before_the_parts_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(accelerator, "check", lambda model: pytest.fail("the parts ran"))
    (tmp_path / "file").touch()
    assert main(["bench", "accelerator", "--out", str(tmp_path / "file" / "x.json")]) == exit_code(StorageError("x"))
    assert f"cannot write {tmp_path / 'file'}" in capsys.readouterr().err


def test_parts_that_come_after_the_time_are_skipped(monkeypatch):
    monkeypatch.setattr(accelerator, "SECONDS", 0.0)
    assert {part["status"] for part in accelerator.check()["parts"]} == {"skipped"}


def test_a_process_that_takes_too_long_is_ended():
    with pytest.raises(RuntimeError, match="took longer than 0 seconds"):
        timing.in_worker("lindm.bench.accelerator", "kernels", "", timeout=0.2)


def test_a_part_runs_in_a_process_of_its_own():
    part = timing.in_worker(accelerator.MODULE, "smollm2", "nowhere")
    assert part["status"] == "skipped" and part["reason"].startswith("nowhere has no model")


def test_options_of_the_accelerator_are_refused_elsewhere(capsys, tmp_path):
    assert main(["bench", "sft", "--out", "x.json"]) == 2
    assert "--out is an option of `lindm bench accelerator`; got it with sft" in capsys.readouterr().err
    assert main(["bench", "accelerator", "--model", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err
