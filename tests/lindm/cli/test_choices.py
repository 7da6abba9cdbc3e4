"""The choices of the command line are those of the functions behind it; they are listed there, because those import jax."""

import importlib.util
from typing import get_args, get_type_hints

import pytest

from lindm.api.solutions import StationaryMethod
from lindm.cli import bench, plan, run, solve, verify
from lindm.datasets import DatasetConfig
from lindm.solvers.solve import METHODS


def choices(kind: type, field: str) -> tuple[str, ...]:
    return get_args(get_type_hints(kind)[field])


def test_methods_are_those_of_the_solver_and_of_datasets():
    stationary = tuple(method for method in get_args(StationaryMethod) if method != "auto")
    assert choices(solve.Solve, "method") == (*METHODS, *stationary) and choices(DatasetConfig, "method") == METHODS
    assert stationary == solve.STATIONARY


def test_presets_are_the_same_for_every_command():
    assert choices(verify.Verify, "preset") == get_args(run.PRESETS)


@pytest.mark.parametrize("name", choices(bench.Bench, "name"))
def test_every_bench_has_a_module(name):
    assert importlib.util.find_spec(f"lindm.bench.{name}")


def test_a_plan_has_the_methods_and_formats_of_fine_tuning():
    from lindm.llm.sft.options import SFTConfig

    assert choices(plan.Plan, "method") == choices(SFTConfig, "method")
