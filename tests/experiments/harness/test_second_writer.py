"""A second command on a directory in use is refused and changes no byte: real processes."""

import hashlib
import time

import pytest


def contents(directory):
    paths = [p for p in directory.rglob("*") if p.is_file()]
    return {p.relative_to(directory).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def wait_for_records(path, process):
    end = time.monotonic() + 110
    while not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < end, "the first command measured nothing"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.fault("F29", "F15")
def test_a_second_verify_or_run_is_refused_and_the_first_ends_as_alone(lab):
    assert (
        lab.lindm("verify", "--out", "v", "--seeds", "6", "--workers", "1")[0] == 1
    )  # its verdicts and report are there already
    first = lab.start("run", "toy", "--out", "v/toy", "--fresh", "--seeds", "6", "--pause", "3")
    try:
        wait_for_records(lab.directory / "v" / "toy" / "records.jsonl", first)
        records = ("toy/records.jsonl", "toy/metrics.jsonl")  # the first command writes these
        before = {k: v for k, v in contents(lab.directory / "v").items() if k not in records}
        for words in (
            ["verify", "--out", "v", "--seeds", "6", "--workers", "1"],
            ["verify", "--out", "v", "--seeds", "6", "--workers", "1", "--fresh"],
            ["run", "toy", "--out", "v/toy", "--seeds", "6"],
            ["plot", "v/toy"],
        ):
            code, _, err = lab.lindm(*words)
            assert code == 2 and "is being written by another process" in err, (words, code, err)
            now = {k: v for k, v in contents(lab.directory / "v").items() if k not in records}
            assert now == before or first.poll() is not None, words
    finally:
        assert first.wait(timeout=110) == 0
    assert lab.lindm("check", "v/toy")[0] == 0
