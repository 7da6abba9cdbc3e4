"""Every experiment is the same few names, says how to run it, and owns claims that exist."""

import dataclasses
from collections import Counter

import pytest

from lindm.cli.option_parser import options_of_source
from lindm.io import files
from lindm_experiments.harness.claims import CLAIMS
from lindm_experiments.harness.experiments import PACKAGE, experiment_names, find_experiment, load, points_of

EXPERIMENTS = experiment_names()
# few language models are trained; tasks are units, too
OF_ONE_MODEL = ("decisions", "mechanism", "offline_circuit", "offline_data")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_its_names(name):
    module = load(name)
    assert all(callable(getattr(module, f)) for f in ("measure", "check", "plot"))
    for cfg in (module.QUICK, module.FULL, module.SMOKE):
        assert isinstance(cfg, module.Config)
        with pytest.raises(dataclasses.FrozenInstanceError):
            cfg.seeds = 3  # pyright: ignore
    if name in OF_ONE_MODEL:
        assert module.QUICK.tasks >= 50 and module.FULL.tasks >= 50
    else:
        assert module.QUICK.seeds >= 5 and module.FULL.seeds >= 10
    assert isinstance(module.QUICK.base_seed, int)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_opens_with_its_question_and_its_command(name):
    doc = find_experiment(name).docstring
    assert "?" in doc.split("\n\n")[0]
    assert f"lindm run {name}" in doc


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_points_are_different_json_objects_and_grow_with_the_seeds(name):
    module = load(name)
    points = [files.canonical_json(p) for p in points_of(module, module.SMOKE)]
    more = points_of(module, dataclasses.replace(module.SMOKE, seeds=module.SMOKE.seeds + 1))
    assert len(set(points)) == len(points) > 0
    assert len(more) > len(points)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_field_of_the_configuration_is_an_option_of_lindm_run(name):
    options = options_of_source(find_experiment(name).path.read_text(encoding="utf-8"), "smoke")
    assert [o.name for o in options] == [f.name for f in dataclasses.fields(load(name).Config)]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_number_of_seeds_below_one_is_refused_by_name(name):
    module = load(name)
    with pytest.raises(ValueError, match="seeds"):
        dataclasses.replace(module.SMOKE, seeds=0)


def test_the_experiments_are_the_modules_with_a_measurement():
    assert sorted(EXPERIMENTS) == sorted(p.stem for p in PACKAGE.glob("*.py") if "\ndef measure(" in p.read_text())


def test_every_claim_is_decided_by_exactly_one_experiment():
    owned = Counter(claim for name in EXPERIMENTS for claim in find_experiment(name).claims)
    assert owned == Counter(CLAIMS.keys())
