"""Experiments by name or by file; the claims of a file, in a TOML file beside it, are checked."""

import os
import re
import shutil

import pytest

from lindm.errors import DataError, UsageError
from lindm_experiments.harness import claims
from lindm_experiments.harness.experiments import (
    PACKAGE,
    experiment_names,
    find_experiment,
    load,
    matching_claims,
    points_of,
)
from lindm_experiments.harness.tasks import conclude
from tests.lindm.hostile.mutations import not_blocked


@pytest.fixture
def own_claims(monkeypatch):
    monkeypatch.setattr(claims, "CLAIMS", dict(claims.CLAIMS))


def test_a_name_and_the_file_of_an_experiment_of_the_package_are_the_same():
    assert find_experiment("risk") == find_experiment(str(PACKAGE / "risk.py"))
    assert "risk" in experiment_names() and find_experiment("risk").minutes < 5


@pytest.mark.parametrize(
    "reference, message",
    [
        ("riks", r"EXPERIMENT 'riks' is not known; did you mean risk\? \(a file outside the package: "),
        (
            "qqq",
            r"EXPERIMENT must be one of against_statistics, .* \(\d+ in all\); got 'qqq' \(.*; `lindm run --list` lists all\)",
        ),
        ("nowhere/mine.py", "must be a Python file that exists, or one of"),
    ],
)
def test_an_unknown_experiment_is_answered_with_the_known_ones(reference, message):
    with pytest.raises(UsageError, match=message):
        find_experiment(reference)


def test_a_file_outside_brings_its_claims(lab, own_claims):
    experiment = find_experiment(str(lab.directory / "lab" / "toy.py"))
    assert experiment.outside and experiment.claims == ("toy-ratio", "toy-control/swap")
    assert claims.get_claim("toy-ratio").criterion == "mean ratio over seeds within [0.97, 1.03]"
    module = load(experiment.reference)
    assert load(experiment.reference) is module and module.__name__ == "lindm_experiments.toy"


def test_points_are_one_for_each_seed_by_default(lab, own_claims):
    source = (lab.directory / "lab" / "toy.py").read_text()
    start, end = source.index("def points"), source.index("def measure")
    (lab.directory / "lab" / "plain.py").write_text(source[:start] + source[end:])
    shutil.copy(lab.directory / "lab" / "toy.toml", lab.directory / "lab" / "plain.toml")
    module = load(str(lab.directory / "lab" / "plain.py"))
    assert points_of(module, module.SMOKE) == [{"seed": 0}, {"seed": 1}]


def test_a_file_with_a_name_or_a_claim_of_the_package_is_refused(lab, own_claims):
    shutil.copy(lab.directory / "lab" / "toy.py", lab.directory / "risk.py")
    with pytest.raises(UsageError, match="a name of its own"):
        find_experiment(str(lab.directory / "risk.py"))
    toml = lab.directory / "lab" / "toy.toml"
    toml.write_text(toml.read_text().replace('"toy-ratio"', '"q-risk"'))
    with pytest.raises(UsageError, match="claim 'q-risk' belongs to the experiment risk"):
        find_experiment(str(lab.directory / "lab" / "toy.py"))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("lo = 0.97\n", 'lo = "low"\n', r"toy-ratio: wrong or unknown: \['lo'\]"),
        ("lo = 0.97\n", "low = 0.97\n", r"toy-ratio: wrong or unknown: \['low'\]"),
        ('source = "toy"\n', "", r"toy-ratio: .*missing: \['source'\]"),
        ("lo = 0.97\nhi = 1.03\n", "", "toy-ratio: lo and hi must be a band"),
        ('expected = "FAIL"', 'expected = "fail"', "toy-control/swap: expected must be PASS, FAIL or OPEN"),
        ('"toy-control/swap"', '"toy-ratio"', "toy-ratio is given twice"),
        ("[[claim]]", "[[claim", "not a TOML file"),
        ("[{lo}, {hi}]", "[{low}]", "toy-ratio"),
    ],
)
def test_a_wrong_claim_is_named_with_its_file(lab, old, new, message):
    toml = lab.directory / "lab" / "toy.toml"
    toml.write_text(toml.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=f"toy.toml: .*{message}|toy.toml: {message}"):
        find_experiment(str(lab.directory / "lab" / "toy.py"))


def test_an_id_that_check_decides_and_the_file_of_claims_lacks_is_named_once_with_the_ids_of_the_file(lab):
    toml = lab.directory / "lab" / "toy.toml"
    toml.write_text(toml.read_text().replace('"toy-ratio"', '"toy-ration"'))
    code, _, err = lab.lindm("run", "toy", "--out", "r")
    said = "toy.toml has no claim 'toy-ratio', which check decides; it has: toy-control/swap, toy-ration"
    assert code == 3 and err.count("toy-ratio'") == err.count(said) == 1, err
    assert err.strip().splitlines()[-1] == f"lindm: error: toy: {said}" and "q-risk" not in err
    code, out, err = lab.lindm("verify", "--experiments", "toy", "--out", "v")
    assert code == 3 and err.count(said) == 1 and f"error: toy: {said}" in out


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('figure="toy"', 'figure="nope"', "claim 'toy-ratio' the figure 'nope', which plot does not return; it returns: toy$"),
        (
            'return {"toy": figure}',
            "return {}",
            "claim 'toy-ratio' the figure 'toy', which plot does not return; it returns none$",
        ),
        (
            "        mean_verdict(",
            "        # mean_verdict(",
            "each claim of toy.toml once, toy-control/swap, toy-ratio; got toy-ratio$",
        ),
    ],
)
def test_verdicts_that_do_not_match_the_claims_or_the_figures_are_refused(lab, own_claims, old, new, message):
    path = lab.directory / "lab" / "toy.py"
    before, found, after = path.read_text().rpartition(old)
    assert found
    path.write_text(before + new + after)
    reference = find_experiment(str(path)).reference
    records = [{"ratio": 1 + i / 1000, "swapped": 2 + i / 1000, "curve": [0, i]} for i in range(6)]
    with pytest.raises(DataError, match=message):
        conclude((reference, records))


def test_a_figure_that_plot_does_not_return_is_exit_3(lab):
    path = lab.directory / "lab" / "toy.py"
    path.write_text(path.read_text().replace('figure="toy"', 'figure="nope"'))
    code, _, err = lab.lindm("run", "toy", "--out", "r")
    said = "toy: check gives claim 'toy-ratio' the figure 'nope', which plot does not return; it returns: toy"
    assert code == 3 and err.strip().splitlines()[-1] == f"lindm: error: {said}" and "Traceback" not in err, err


@pytest.mark.parametrize(
    "id, message",
    [
        ("bias", r"^only 'bias' is not known; did you mean llm-law/bias\? \(`lindm verify --exp"),
        ("bound", r"^only 'bound' is not known; did you mean belief-bounds, .*, \.\.\. \(\d+ in all\)\? \(`lindm"),
        ("q-rsik", r"^only 'q-rsik' is not known; did you mean q-risk"),
    ],
)
def test_a_part_of_an_id_is_answered_with_the_ids_that_contain_it(id, message):
    known = {name: claims.claim_ids(name) for name in experiment_names()}
    with pytest.raises(UsageError, match=message):
        matching_claims(known, id)


def test_an_experiment_without_claims_raises_an_error_that_names_their_file(lab):
    (lab.directory / "lab" / "toy.toml").unlink()
    code, _, err = lab.lindm("run", "toy")
    assert code == 3 and "toy.toml: no such file" in err


def test_the_list_of_experiments_has_a_line_and_minutes_for_each(lab):
    for words in (("run",), ("run", "--list")):
        code, out, err = lab.lindm(*words)
        assert code == 0, err
        assert all(re.search(rf"^ *{name} +\d+\.\d ", out, re.MULTILINE) for name in experiment_names()) and "question" in out


@pytest.mark.fault("F19")
@pytest.mark.parametrize(
    "source, claim, message",
    [
        ("def (\n", None, r"mine\.py:1: not Python: invalid syntax"),
        ("x = 1\0\n", None, r"mine\.py.*: not Python: "),
        ("(" * 100_000, None, r"mine\.py.*: not Python: "),
        (b"\xff\xfe", None, r"mine\.py:1: expected text in UTF-8; got the byte 0xff"),
        ("x = 1\n", "", r"mine\.toml must have a \[\[claim\]\] at least; it has none"),
        ("x = 1\n", "claim = 3", r"mine\.toml: claim must be a list of tables, \[\[claim\]\]; got 3"),
    ],
)
def test_a_file_that_is_no_experiment_is_a_data_error_before_it_runs(lab, own_claims, source, claim, message):
    path = lab.directory / "mine.py"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    own = (lab.directory / "lab" / "toy.toml").read_text().replace('"toy-', '"mine-')
    path.with_suffix(".toml").write_text(own if claim is None else claim)
    with pytest.raises(DataError, match=message):
        find_experiment(str(path))


@pytest.mark.fault("F32")
def test_a_fifo_in_place_of_the_claims_blocks_nobody(lab, own_claims):
    path = lab.directory / "lab" / "toy.toml"
    path.unlink()
    os.mkfifo(path)
    with not_blocked(), pytest.raises(DataError, match=r"toy\.toml must be a regular file; it is a FIFO"):
        find_experiment(str(path.with_suffix(".py")))
