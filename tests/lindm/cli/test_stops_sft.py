"""SIGTERM and Ctrl-C in every phase of `lindm sft`."""

import json
import signal

import jax.numpy as jnp
import pytest
from flax import nnx

from lindm.llm.config import ModelConfig
from lindm.llm.io import weights
from lindm.llm.model import Decoder
from tests.lindm.cli.stops.phases import run, stop_in_every_phase
from tests.lindm.llm import small
from tests.lindm.llm.conftest import SIZES as SMALL

pytestmark = [pytest.mark.slow, pytest.mark.fault("F2", "F27")]

SIZES = ["--steps", "6", "--batch", "4", "--save-every", "2", "--eval-every", "3", "--eval-tasks", "1", "--held-out", "0.2"]
PHASES = {
    "import": "jax:",
    "reading": "lindm.llm.sft.examples:dataset_examples",
    "compiling": "!lindm.llm.sft.compilation:compile_train_step",
    "training": "lindm.llm.sft.batches:BatchLoader.load:3",
    "evaluating": "lindm.llm.sft.evaluator:Evaluator._losses",
    "saving": "lindm.llm.sft.checkpoints:CheckpointWriter.save",
    "exporting": "lindm.llm.io.weights:save",
    "drawing": "lindm.llm.sft.metrics:plot_curves",
}


def words(micro, out: str) -> list[str]:
    return ["sft", "--model", str(micro.model), "--data", str(micro.mdp), "--out", out, *SIZES]


@pytest.fixture(scope="module")
def uninterrupted(micro, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    done = run(words(micro, "out"), directory)
    assert done.returncode == 0, done.stderr
    return directory / "out"


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "sigint"])
def test_a_training_run_that_is_stopped_in_every_phase_ends_with_the_same_bits(micro, uninterrupted, tmp_path, first):
    stop_in_every_phase("sft", words(micro, "out"), PHASES, tmp_path, first)
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_a_stop_while_conversations_are_read_is_not_bad_data(tmp_path):
    model, tokenizer = tmp_path / "model", small.byte_level()
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    config = ModelConfig(model_type="llama", vocab_size=len(tokenizer), **SMALL)
    weights.save(Decoder(config, nnx.Rngs(0), jnp.float32), model, like=tmp_path / "tokenizer")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "A"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(8)))
    command = ["sft", "--model", str(model), "--data", "rows.jsonl", "--out", "out", "--steps", "2", "--batch", "2"]
    place = {"STOP_AT": "lindm.llm.chats:apply_chat_template", "STOP_MARK": str(tmp_path / "mark")}
    for number in (signal.SIGTERM, signal.SIGINT):
        (tmp_path / "mark").unlink(missing_ok=True)
        done = run(command, tmp_path, STOP_SIGNAL=str(int(number)), **place)
        assert (tmp_path / "mark").exists(), done.stderr
        assert done.returncode == 75, done.stderr
        assert done.stderr.splitlines()[-1] == f"lindm: stopped by {number.name}; the same command resumes"


def test_native_code_within_training_ends_with_the_last_checkpoint(micro, tmp_path):
    place = {"STOP_AT": "lindm.llm.sft.batches:BatchLoader.load:5", "STOP_NATIVE": "1", "STOP_MARK": str(tmp_path / "mark")}
    done = run(words(micro, "out"), tmp_path, STOP_SIGNAL=str(int(signal.SIGTERM)), **place)
    assert done.returncode == 75, done.stderr
    message = "lindm: stopped by SIGTERM: the last checkpoint is step 2; the same command resumes"
    assert done.stderr.splitlines()[-1] == message
