"""Commands on directories of lindm with one damaged file: exit code 3 with its name, or the result of intact files."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lindm.cli.main import main
from tests.faults.conftest import content
from tests.faults.test_commands import same
from tests.promises import Trials

pytestmark = [pytest.mark.slow, pytest.mark.fault("F28")]
DATE = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+\d:]*")


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


HARMS: dict[str, Callable[[bytes], bytes | None]] = {
    "first bit flipped": lambda data: flipped(data, 0),
    "a bit flipped": lambda data: flipped(data, len(data) // 2),
    "last bit flipped": lambda data: flipped(data, len(data) - 1),
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "missing": lambda data: None,
}


def alike(path: Path) -> str:
    """What of a result must be the same: of a page, all but its dates."""
    return DATE.sub(b"", path.read_bytes()).hex() if path.suffix == ".html" else same(path)


def check(words: list[str], inputs: Path, result: Path, capsys, trials: Trials, unfinished: str = "") -> set[str]:
    """Run a command with each file of `inputs` damaged in each way; returns the files that were refused in one of them.

    Args:
      result: what the command writes; it is removed before each run where it is not `inputs`.
      unfinished: a file that a directory does not have before it is finished, and that may be missing.
    """
    intact, refused = inputs.with_name("intact"), set()
    shutil.copytree(inputs, intact)

    def run() -> tuple[int, str]:
        if result != inputs:
            shutil.rmtree(result, ignore_errors=True)
        return main(words), capsys.readouterr().err

    assert run()[0] == 0
    expected = content(result, alike)
    for file in sorted(p for p in intact.rglob("*") if p.is_file() and p.stat().st_size):
        name = file.relative_to(intact).as_posix()
        for harm, change in HARMS.items():
            if (name, harm) == (unfinished, "missing"):
                continue
            shutil.rmtree(inputs)
            shutil.copytree(intact, inputs)
            (inputs / name).unlink() if (damaged := change(file.read_bytes())) is None else (inputs / name).write_bytes(damaged)
            code, error = run()
            what = f"{name}, {harm}: exit code {code}\n{error}"
            trials.add()
            if code == 3:
                assert str(inputs) in error.splitlines()[-1] and "Traceback" not in error, what
                refused.add(name)
            else:
                assert code == 0 and content(result, alike) == expected, what
    return refused


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_an_export_of_a_damaged_dataset_is_refused_or_the_same(micro, tmp_path, capsys, trials):
    data, out = Path(shutil.copytree(micro.mdp, tmp_path / "data")), tmp_path / "out"
    refused = check(["data", "export", str(data), "--to", "trl", "--out", str(out)], data, out, capsys, trials)
    assert {"manifest.json", "episodes-00000.jsonl"} <= refused, refused


def test_a_damaged_dataset_is_made_again(tmp_path, capsys, trials):
    data = tmp_path / "data"
    words = ["data", "make", "mdp", "--horizon", "4", "--tasks", "4", "--demos", "1", "--out", str(data)]
    assert main(words) == 0
    assert not check(words, data, data, capsys, trials)


def test_figures_of_a_damaged_run_are_refused_or_the_same(run, toy, capsys, trials):
    refused = check(["plot", str(run), "--experiments", toy], run, run, capsys, trials, unfinished="manifest.json")
    assert {"records.jsonl", "verdicts.json", "config.json"} <= refused, refused


def test_a_report_of_a_damaged_run_is_refused_or_the_same(run, tmp_path, capsys, trials):
    words = ["report", str(run), "--out", str(tmp_path / "page")]
    refused = check(words, run, tmp_path / "page", capsys, trials, unfinished="manifest.json")
    assert {"verdicts.json", "records.jsonl", "toy.png"} <= refused, refused
