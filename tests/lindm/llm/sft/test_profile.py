"""`--profile`: the trace of some steps and the table of their operations."""

import json

import pytest

from lindm.errors import UsageError
from lindm.llm.sft import trainer
from lindm.llm.sft.profile import StepProfiler, operations_table, self_times
from tests.lindm.llm.sft.test_trainer import options


def test_the_time_of_an_operation_is_without_that_of_the_operations_within_it():
    events = [("while", 0.0, 10.0), ("dot", 1.0, 3.0), ("add", 5.0, 4.0), ("copy", 6.0, 1.0), ("dot", 12.0, 2.0)]
    assert self_times(reversed(events)) == [("while", 3.0), ("dot", 3.0), ("add", 3.0), ("copy", 1.0), ("dot", 2.0)]


@pytest.mark.parametrize("text", ["3", "3:", "0:2", "4:3", "a:b", "-1:2", "1:2:3"])
def test_a_range_of_steps_has_another_form(micro, tmp_path, text):
    with pytest.raises(ValueError, match=f"profile must be FROM:TO with 1 <= FROM <= TO; got '{text}'"):
        options(micro, tmp_path / "out", profile=text)


def test_a_range_behind_the_last_step_is_refused(micro, tmp_path):
    with pytest.raises(UsageError, match="profile must end at step 4 at the latest; got '3:5'"):
        trainer.train(options(micro, tmp_path / "out", steps=4, profile="3:5"))


@pytest.mark.fault("F3")
def test_all_processes_wait_for_the_same_steps_and_the_first_one_alone_traces(tmp_path):
    first, other = (StepProfiler(tmp_path, (2, 3), list, is_main) for is_main in (True, False))
    for step in range(5):
        assert first.changes_after(step) == other.changes_after(step) == (step in (1, 3))
        assert other.after(step) is None
    assert not other.running and not list(tmp_path.iterdir())


def test_a_run_traces_the_steps_and_prints_and_writes_the_slowest_operations(micro, tmp_path, capsys):
    out = tmp_path / "out"
    run = options(micro, out, steps=4, profile="2:3", eval_tasks=0)
    assert trainer.train(run) is not None
    table = (out / "profile" / "operations.txt").read_text()
    said = capsys.readouterr().err
    title, _, header, *rows = table.splitlines()
    assert title.startswith("steps 2 to 3: ") and title.endswith("ms a step on all threads") and title in said
    assert header.split() == ["operation", "ms", "a", "step", "share", "calls", "a", "step", "place"]
    times = [float(row.split()[1].replace(",", "")) for row in rows]
    shares = [float(row.split()[2].rstrip("%")) for row in rows]
    assert len(rows) > 5 and times == sorted(times, reverse=True) and times[0] > 0 and 0 < sum(shares) <= 101
    assert any("transpose(jvp" in row for row in rows), "the backward pass"
    (trace,) = (out / "profile").glob("plugins/profile/*/*.xplane.pb")
    assert (trace.parent / trace.name.replace("xplane.pb", "trace.json.gz")).exists()
    assert operations_table(out / "profile", (2, 3), []).splitlines()[0] == title
    before = trace.read_bytes()
    assert trainer.train(run) is not None, "a finished run keeps it"
    assert "already finished" in capsys.readouterr().err
    assert trace.read_bytes() == before
    assert json.loads((out / "config.json").read_text())["options"]["profile"] == "2:3"
