"""A run depends on the sources that it imports, transitively, and on nothing else."""

from pathlib import Path

import pytest

import lindm
from lindm_experiments.harness import fingerprint
from lindm_experiments.harness.experiments import Experiment, experiment_names, find_experiment

ROOT = Path(lindm.__file__).parents[1]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Packages of our names in another place: `write` adds a source, `code` is the fingerprint of the experiment `mine`."""

    def write(name: str, text: str = "") -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    for package in fingerprint.PACKAGES:
        write(f"{package}/__init__.py")
    monkeypatch.setattr(fingerprint, "_root", lambda package: tmp_path / package)
    experiment = Experiment(name="mine", path=tmp_path / "lindm_experiments" / "mine.py")

    def sources() -> set[str]:
        fingerprint._tree.cache_clear()
        fingerprint._lazy_names.cache_clear()
        return set(fingerprint.sources(experiment)) - {"lindm_experiments.mine"}

    def code() -> str:
        sources()
        return fingerprint.code_fingerprint(experiment)

    write.code, write.sources = code, sources
    yield write
    fingerprint._tree.cache_clear()
    fingerprint._lazy_names.cache_clear()


@pytest.mark.parametrize(
    "statement, modules",
    [
        ("import lindm_theory.policy_bounds", {"lindm_theory", "lindm_theory.policy_bounds"}),
        ("from lindm_theory import policy_bounds", {"lindm_theory", "lindm_theory.policy_bounds"}),
        ("from lindm_theory.policy_bounds import bound", {"lindm_theory", "lindm_theory.policy_bounds"}),
        ("from .helper import f", {"lindm_experiments", "lindm_experiments.helper"}),
        ("def f():\n    from lindm_theory import policy_bounds", {"lindm_theory", "lindm_theory.policy_bounds"}),
        (
            "import importlib\nimportlib.import_module('lindm_theory.policy_bounds')",
            {"lindm_theory", "lindm_theory.policy_bounds"},
        ),
        ("from lindm import solve", {"lindm", "lindm.solvers", "lindm.solvers.dp"}),
        ("import lindm as ld\nx = ld.solve(1)", {"lindm", "lindm.solvers", "lindm.solvers.dp"}),
        ("import lindm\nx = lindm.fit(1)", {"lindm", "lindm.icl"}),
        ("import numpy, os.path", set()),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lindm_theory.policy_bounds", set()),
    ],
)
def test_imports_of_a_statement(tree, statement, modules):
    tree("lindm_theory/policy_bounds.py")
    tree("lindm_experiments/helper.py")
    tree("lindm/solvers/__init__.py")
    tree("lindm/solvers/dp.py")
    tree("lindm/icl.py")
    checked = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lindm.solvers.dp import solve\n"
    tree("lindm/__init__.py", checked + "_LAZY = {'fit': 'lindm.icl'}\n")
    tree("lindm_experiments/mine.py", statement)
    assert tree.sources() == modules


def test_a_change_counts_only_where_it_is_imported(tree):
    tree("lindm_theory/policy_bounds.py", "from lindm_theory import deep")
    tree("lindm_theory/deep.py", "from lindm_theory import policy_bounds")  # a circle ends
    tree("lindm_theory/other.py")
    tree("lindm_experiments/mine.py", "from lindm_theory.policy_bounds import bound")
    before = tree.code()
    tree("lindm_theory/new.py", "x = 1")
    tree("lindm_theory/other.py", "x = 2")
    assert tree.code() == before
    tree("lindm_theory/deep.py", "from lindm_theory import policy_bounds\nx = 1")
    assert tree.code() != before


@pytest.mark.parametrize("name", experiment_names())
def test_no_measurement_depends_on_commands_jobs_or_other_experiments(name):
    sources = fingerprint.sources(find_experiment(name))
    assert f"lindm_experiments.{name}" in sources
    assert not [m for m in sources if m.startswith(("lindm.cli", "lindm.llm.cluster", "lindm.bench"))]
    others = {f"lindm_experiments.{other}" for other in experiment_names()} - {f"lindm_experiments.{name}"}
    assert not others & sources.keys()


def test_data_that_is_read_at_import_counts():
    sources = fingerprint.sources(find_experiment("decisions"))
    assert {"lindm.text:compact.json", "lindm.text:readable.json"} <= sources.keys()


def test_a_file_from_outside_includes_what_is_beside_it(tmp_path):
    (tmp_path / "mine.py").write_text("import helper\nfrom lindm_theory import policy_bounds\n")
    (tmp_path / "helper.py").write_text("x = 1\n")
    experiment = Experiment(name="mine", path=tmp_path / "mine.py", outside=True)
    sources = fingerprint.sources(experiment)
    assert sources["helper"] == tmp_path / "helper.py" and "lindm_theory.policy_bounds" in sources
