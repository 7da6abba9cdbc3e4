"""What a run writes: a resumed run's records are those of one that was never stopped."""

import json

import pytest

from lindm.llm.sft import metrics


def lines(directory):
    return (directory / "metrics.jsonl").read_text().splitlines()


@pytest.mark.fault("F30")
def test_records_after_the_step_of_resumption_are_cut_off(tmp_path):
    logger = metrics.MetricsLogger(tmp_path, 0, -1, tensorboard=False, enabled=True)
    for step in range(1, 6):
        logger.log("train", step, loss=1 / step)
        if step == 2:
            logger.log("eval", step, loss=0.5)
    whole = lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6, "ki')  # torn by a kill
    metrics.MetricsLogger(tmp_path, 2, 2, tensorboard=False, enabled=True)
    assert lines(tmp_path) == whole[:3]
    logger = metrics.MetricsLogger(tmp_path, 2, 0, tensorboard=False, enabled=True)  # saved before it was evaluated
    assert lines(tmp_path) == whole[:2]
    logger.log("eval", 2, loss=0.5)
    for step in range(3, 6):
        logger.log("train", step, loss=1 / step)
    assert lines(tmp_path) == whole


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path):
    metrics.MetricsLogger(tmp_path, 0, -1, tensorboard=True, enabled=False).log("train", 1, loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    logger = metrics.MetricsLogger(tmp_path, 0, -1, tensorboard=True, enabled=True)
    logger.log("train", 1, loss=0.25, batch="abc")
    logger.close()
    (events,) = (tmp_path / "events").iterdir()
    assert b"train/loss" in events.read_bytes() and json.loads(lines(tmp_path)[0])["loss"] == 0.25


def test_rates_are_of_steps_after_the_first_and_mfu_is_of_the_peak():
    throughput = metrics.Throughput(flops_per_step=2e9, peak_flops=1e10)
    throughput.update(100.0, 50, 5)  # the first step waits for other work
    assert throughput.rates == {} and str(throughput) == ""
    for _ in range(4):
        throughput.update(0.5, 50, 5)
    assert str(throughput) == "100 tokens/s, 10.0 labels/s, mfu 40%"
    assert throughput.rates == pytest.approx({"tokens_per_s": 100, "labels_per_s": 10, "mfu": 0.4})


def test_the_curves_are_drawn_from_the_records_alone(tmp_path):
    train = [{"step": s, "kind": "train", "loss": 1 / s} for s in range(1, 5)]
    evals = [{"step": s, "kind": "eval", "loss": 0.5, "gap": 0.2, "gap_ci": [0.1, 0.3], "bc_gap": 0.1} for s in (0, 4)]
    for records in (train, [*train, *evals]):
        paths = metrics.plot_curves(tmp_path, records)
        assert [p.name for p in paths] == ["curves.png", "curves.pdf"]
        assert paths[0].read_bytes()[:4] == b"\x89PNG" and paths[1].read_bytes()[:4] == b"%PDF"


def test_a_drawing_is_the_same_for_the_same_records(tmp_path):
    records = [{"step": s, "kind": "train", "loss": 1 / s} for s in range(1, 5)]
    first = [p.read_bytes() for p in metrics.plot_curves(tmp_path, records)]
    assert [p.read_bytes() for p in metrics.plot_curves(tmp_path, records)] == first
