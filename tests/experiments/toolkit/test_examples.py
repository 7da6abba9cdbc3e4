"""The examples in the docstrings of the toolkit run."""

import doctest
import importlib

import pytest

import lindm as ld


@pytest.mark.parametrize(
    "name",
    [
        "lindm.icl.feature_laws",
        *(f"lindm_experiments.toolkit.{module}" for module in ("theory", "risks", "rungs")),
        pytest.param("lindm_experiments.toolkit.layers", marks=pytest.mark.slow),
    ],
)
def test_the_examples_of_a_module_run(name):
    result = doctest.testmod(importlib.import_module(name), extraglobs={"ld": ld})
    assert result.attempted and not result.failed
