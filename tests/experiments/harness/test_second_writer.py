"""A second command on a directory in use is refused and changes no byte: real processes."""

import hashlib
import time

import pytest


def contents(directory):
    """SHA-256 of the files that the first command does not write meanwhile."""
    paths = [p for p in directory.rglob("*") if p.is_file() and p.name not in ("records.jsonl", "metrics.jsonl")]
    return {p.relative_to(directory).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def wait_for_a_part(path, process):
    """Wait until two of six points are measured."""
    end = time.monotonic() + 110
    while not (path.exists() and 2 <= path.read_bytes().count(b"\n") < 6):
        assert process.poll() is None and time.monotonic() < end, "the first command measured nothing"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.fault("F29", "F15")
def test_a_second_verify_run_or_plot_is_refused_and_the_first_ends_as_alone(lab):
    verify = ["verify", "--out", "v", "--seeds", "6", "--workers", "1"]
    assert lab.lindm(*verify)[0] == 0  # verdicts.json and report.html are there already
    source = lab.directory / "lab" / "toy.py"
    source.write_text(source.read_text().replace("pause: float = 0.0", "pause: float = 20.0"))
    first = lab.start(*verify, "--fresh")
    try:
        wait_for_a_part(lab.directory / "v" / "toy" / "records.jsonl", first)
        before = contents(lab.directory / "v")
        assert {"verdicts.json", "report.html", "manifest.json", "toy/config.json"} <= before.keys()
        for words in (
            verify,
            [*verify, "--fresh"],
            ["run", "toy", "--out", "v/toy", "--seeds", "6"],
            ["plot", "v", "--experiments", "toy"],
        ):
            code, _, err = lab.lindm(*words)
            assert code == 2 and "is being written by another process" in err, (words, code, err)
            assert contents(lab.directory / "v") == before and first.poll() is None, words
        first.kill()  # the lock ends with its process
    finally:
        first.kill()
        first.communicate()
    source.write_text(source.read_text().replace("pause: float = 20.0", "pause: float = 0.0"))
    assert lab.lindm(*verify, "--fresh")[0] == 0 and lab.lindm("check", "v")[0] == 0
