"""The callbacks of a run: what they are told, and that nothing is sent unless it is asked for."""

import os
import socket
import sys
import types

import pytest

import lindm as ld
from lindm.errors import UsageError
from lindm.io.files import read_json_lines
from lindm.llm.sft import callbacks
from lindm.llm.sft.options import SFTConfig

RUN = {"steps": 3, "eval_every": 2, "eval_tasks": 0, "held_out": 0.2}


class Recorder:
    """A callback that keeps its calls."""

    def __init__(self):
        self.config, self.logged, self.finished = {}, [], False

    def start(self, config):
        self.config = config

    def log(self, step, metrics):
        assert not self.finished
        self.logged.append((step, metrics))

    def finish(self):
        self.finished = True


@pytest.fixture
def no_sockets(monkeypatch):
    """Sockets to other machines raise an error; those within this machine (asyncio has them) do not."""

    class Socket(socket.socket):
        def __init__(self, family=socket.AF_INET, *arguments, **options):
            assert family == socket.AF_UNIX, f"a socket of the family {family} was opened"
            super().__init__(family, *arguments, **options)

    monkeypatch.setattr(socket, "socket", Socket)


def test_callbacks_get_the_records_of_a_run_and_no_socket_is_opened(micro, tmp_path, no_sockets):
    with pytest.raises(AssertionError, match="a socket of the family"):
        socket.socket()
    first, second = Recorder(), Recorder()
    run = ld.finetune(micro.mdp, tmp_path / "run", model=micro.model, callbacks=[first, second], tensorboard=True, **RUN)
    records = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [step for step, _ in first.logged] == [record["step"] for record in records]
    for (_, metrics), record in zip(first.logged, records, strict=True):
        assert metrics[f"{record['kind']}/loss"] == record["loss"]
    assert first.finished and second.finished and second.logged == first.logged
    assert (first.config["step"], first.config["seed"], first.config["out"]) == (0, 0, str(run.directory))
    assert (run.directory / "events").is_dir()
    longer = Recorder()
    ld.finetune(micro.mdp, tmp_path / "run", model=micro.model, callbacks=[longer], **RUN | {"steps": 4})
    assert longer.config["step"] == 3 and [step for step, _ in longer.logged] == [4, 4]


@pytest.fixture
def wandb(monkeypatch):
    """A module in place of wandb, which records its calls."""
    calls = []
    run = types.SimpleNamespace(log=lambda metrics, step: calls.append((step, metrics)), finish=lambda: calls.append("finish"))
    settings, init = (lambda **given: given), (lambda **given: calls.append(given) or run)
    module = types.SimpleNamespace(Settings=settings, init=init)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    return calls


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_weights_and_biases_is_offline_unless_it_is_asked_for(tmp_path, wandb, mode):
    callback = callbacks.WeightsAndBiases(tmp_path / "run", mode)
    callback.start({"seed": 0, "step": 2})
    callback.log(3, {"train/loss": 0.5})
    callback.finish()
    options, *rest = wandb
    assert (options["mode"], options["dir"], options["group"]) == (mode, str(tmp_path / "run"), "run")
    assert options["config"] == {"seed": 0, "step": 2} and options["settings"]["disable_git"]
    assert rest == [(3, {"train/loss": 0.5}), "finish"]
    assert os.environ.get("WANDB_ERROR_REPORTING") == ("false" if mode == "offline" else None)


def test_a_package_that_is_missing_is_named_before_the_run_begins(micro, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    with pytest.raises(UsageError, match=r"--wandb needs wandb: pip install -e '.\[wandb\]'"):
        ld.finetune(micro.mdp, tmp_path / "run", model=micro.model, wandb="offline", **RUN)
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(UsageError, match=r"TensorBoard events need tensorboardX: pip install -e '.\[track\]'"):
        callbacks.TensorBoard(tmp_path)
    with pytest.raises(ValueError, match="wandb must be one of offline, online; got 'on'"):
        SFTConfig(data=micro.mdp, out=tmp_path, model=micro.model, wandb="on")  # pyright: ignore[reportArgumentType]
