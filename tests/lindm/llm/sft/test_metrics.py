"""What a run writes: a resumed run's records are those of one that was never stopped."""

import json
import threading

import pytest

from lindm.figures.style import alternative_text
from lindm.llm.sft import callbacks, evaluator, metrics
from tests.clock import HANGS


def lines(directory):
    return (directory / "metrics.jsonl").read_text().splitlines()


@pytest.mark.fault("F30")
def test_records_after_the_step_of_resumption_are_cut_off(tmp_path):
    logger = metrics.MetricsLogger(tmp_path, 0, -1, enabled=True)
    for step in range(1, 6):
        logger.log("train", step, loss=1 / step)
        if step == 2:
            logger.log("eval", step, loss=0.5)
    whole = lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6, "ki')  # torn by a kill
    metrics.MetricsLogger(tmp_path, 2, 2, enabled=True)
    assert lines(tmp_path) == whole[:3]
    logger = metrics.MetricsLogger(tmp_path, 2, 0, enabled=True)  # saved before it was evaluated
    assert lines(tmp_path) == whole[:2]
    logger.log("eval", 2, loss=0.5)
    for step in range(3, 6):
        logger.log("train", step, loss=1 / step)
    assert lines(tmp_path) == whole


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path):
    metrics.MetricsLogger(tmp_path, 0, -1, enabled=False, callbacks=[Broken("start", False)]).log("train", 1, loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    callback = callbacks.TensorBoard(tmp_path / "events")
    logger = metrics.MetricsLogger(tmp_path, 0, -1, enabled=True, callbacks=[callback])
    logger.log("train", 1, loss=0.25, batch="abc")
    logger.close()
    (events,) = (tmp_path / "events").iterdir()
    assert b"train/loss" in events.read_bytes() and json.loads(lines(tmp_path)[0])["loss"] == 0.25


def test_rates_are_of_steps_after_the_first_and_mfu_is_of_the_peak():
    throughput = metrics.Throughput(peak_flops=1e10)
    throughput.update(100.0, 50, 5, 2e9)  # the first step waits for other work
    assert throughput.rates == {} and str(throughput) == ""
    for _ in range(4):
        throughput.update(0.5, 50, 5, 2e9)
    assert str(throughput) == "100 tokens/s, 10.0 labels/s, mfu 40%"
    assert throughput.rates == pytest.approx({"tokens_per_s": 100, "labels_per_s": 10, "mfu": 0.4})


def test_the_curves_are_drawn_from_the_records_alone(tmp_path):
    train = [{"step": s, "kind": "train", "loss": 1 / s} for s in range(1, 5)]
    evals = [{"step": s, "kind": "eval", "loss": 0.5, "gap": 0.2, "gap_ci": [0.1, 0.3], "bc_gap": 0.1} for s in (0, 4)]
    alone = [evals[0] | {"gap_ci": None}, evals[1] | {"gap": None, "gap_ci": None, "bc_gap": None}]  # no interval; no gap
    for records in (train, [*train, *evals], [*train, *alone]):
        paths = metrics.plot_curves(tmp_path, records)
        assert [p.name for p in paths] == ["curves.png", "curves.pdf", "curves.svg"]
        contents = [path.read_bytes() for path in paths]
        assert contents[0][:4] == b"\x89PNG" and contents[1][:4] == b"%PDF" and b"<svg" in contents[2]
        about = alternative_text(contents[0])
        assert about.startswith("Loss on training batches") and "cross-entropy per label token (log scale) over step" in about


def test_an_evaluation_without_a_gap_is_one_line_with_its_reason():
    note = "V* = V^random in every task: there the normalized gap is undefined"
    common = {"loss": 0.5, "accuracy": 1.0, "method": "exact", "n": 2}
    undefined = common | {"gap": None, "gap_ci": None, "bc_gap": None, "note": note}
    assert evaluator.summarize(undefined) == f"held-out loss 0.5, accuracy 100.0%; {note}"
    known = common | {"gap": 0.25, "gap_ci": None, "bc_gap": 0.5, "note": None}
    assert evaluator.summarize(known).endswith("; normalized optimality gap 0.2500 (exact, 2 tasks; bc 0.5000)")


def test_a_drawing_is_the_same_for_the_same_records(tmp_path):
    records = [{"step": s, "kind": "train", "loss": 1 / s} for s in range(1, 5)]
    first = [p.read_bytes() for p in metrics.plot_curves(tmp_path, records)]
    assert [p.read_bytes() for p in metrics.plot_curves(tmp_path, records)] == first


# --- a callback that fails or hangs ----------------------------------------------------------------------------------------


class Broken:
    """A callback that raises, or waits for ever, at one of its calls."""

    def __init__(self, call: str, hang: bool):
        self.call, self.hang, self.never = call, hang, threading.Event()

    def _at(self, call: str) -> None:
        if call == self.call:
            if self.hang:
                self.never.wait()
            raise OSError("the server is gone")

    def start(self, config):
        self._at("start")

    def log(self, step, metrics):
        self._at("log")

    def finish(self):
        self._at("finish")


@pytest.mark.fault("F21")
@pytest.mark.parametrize("hang", [False, True], ids=["raises", "hangs"])
@pytest.mark.parametrize("call", ["start", "log", "finish"])
def test_a_callback_that_raises_or_hangs_costs_no_record_and_no_wait(tmp_path, monkeypatch, trials, call, hang):
    """A call of `log` that waited for the hung callback would never return."""
    monkeypatch.setattr(callbacks, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(callbacks, "MAX_WAITING", 20)
    warnings, steps = [], 60
    broken = [Broken(call, hang)]
    logger = metrics.MetricsLogger(tmp_path, 0, -1, enabled=True, callbacks=broken, warn=warnings.append)
    for step in range(1, steps + 1):
        logger.log("train", step, loss=1 / step, batch="abc")
        trials.add()
    logger.close()
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == list(range(1, steps + 1))
    assert len(warnings) == 1 and "metrics.jsonl has all" in warnings[0]
    assert ("did not take all records" if hang else "OSError: the server is gone") in warnings[0]


@pytest.mark.fault("F21")
def test_a_slow_callback_runs_beside_the_steps_and_gets_every_record_in_the_end(tmp_path):
    """The steps go on while the callback is in its first call: none of them runs in its thread or waits for it."""
    first, steps_done, written = threading.Event(), threading.Event(), []

    class Slow:
        def start(self, config):
            written.append(config)

        def log(self, step, metrics):
            first.set()
            assert steps_done.wait(HANGS) and threading.current_thread() is not threading.main_thread()
            written.append((step, metrics))

        def finish(self):
            written.append("finished")

    options = {"out": "here"}
    logger = metrics.MetricsLogger(tmp_path, 0, -1, enabled=True, callbacks=[Slow()], config=options, warn=pytest.fail)
    for step in range(1, 101):
        logger.log("train", step, loss=0.5, batch="abc", gap=None)
        assert first.wait(HANGS)
    assert written == [{"out": "here", "step": 0}] and len(lines(tmp_path)) == 100
    steps_done.set()
    logger.close()
    assert written[1:] == [*((step, {"train/loss": 0.5}) for step in range(1, 101)), "finished"]
