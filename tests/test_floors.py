"""Imports point down, theory and lindm never meet, and some calls are not made at all. Read from the sources alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p.relative_to(ROOT) for top in ("lindm", "theory", "experiments") for p in (ROOT / top).rglob("*.py"))

# the floors of lindm, from the ground up; packages of one floor do not import each other
FLOORS = (
    ("lindm.errors",),
    ("lindm.choices",),
    ("lindm.types", "lindm.random", "lindm.io"),
    ("lindm.validate", "lindm.text"),
    ("lindm.problems",),
    ("lindm.solvers",),
    ("lindm.families", "lindm.icl", "lindm.figures"),
    ("lindm.datasets",),
    ("lindm.estimation", "lindm.evaluation"),
    ("lindm.llm",),
    ("lindm.bench",),
    ("lindm.api",),
    ("lindm.cli", "lindm.__main__"),
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
BENCHES = (
    "lindm.bench.attention",
    "lindm.bench.mixed_lengths",
    "lindm.bench.sft",
    "lindm.bench.decisions",
    "lindm.bench.accelerator",
)  # the modules that may see torch

# rejection loops on a CPU: powers of exponentials and inverse distribution functions do the same, many times faster
SLOW_SAMPLERS = {
    "gamma",
    "loggamma",
    "dirichlet",
    "beta",
    "chisquare",
    "t",
    "categorical",
    "gumbel",
    "poisson",
    "binomial",
    "choice",
}
NEVER_IMPORTED = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "socket", "requests", "urllib", "http"}
NEVER_CALLED = {"eval", "exec", "compile", "__import__"}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    parts = parts[1:] if parts[0] in ("theory", "experiments") else parts  # those directories hold a package each
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Every module or member that is imported, anywhere in the file, as a dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(module.split(".")[: -node.level]) if node.level else ""
            base = ".".join(filter(None, [package, node.module]))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def floor(name: str) -> str | None:
    """The unit of a floor that a dotted name of lindm belongs to."""
    unit = ".".join(name.split(".")[:2])
    return unit if unit in LEVEL else None


def complaints(source: str, module: str) -> list[str]:
    """What this source may not do."""
    tree = ast.parse(source)
    top = module.split(".")[0]
    violations = []
    for name in imports(tree, module):
        head = name.split(".")[0]
        if head in NEVER_IMPORTED or name.startswith("jax._src"):
            violations.append(f"imports {name}")
        if head == "tests" or (head in ("torch", "peft") and module not in BENCHES):
            violations.append(f"imports {name}")
        if top == "lindm_theory" and head not in (
            "jax",
            "lindm_theory",
            "math",
            "functools",
            "dataclasses",
            "collections",
            "typing",
            "fractions",
        ):
            violations.append(f"theory imports {name}")
        if (
            top == "lindm_theory"
            and name.startswith("jax.")
            and name.split(".")[1] not in ("numpy", "Array", "lax", "tree_util", "scipy")
        ):
            violations.append(f"theory imports {name}")
        if top == "lindm" and head == "lindm_theory":
            violations.append(f"lindm imports {name}")
        if top == "lindm" and head == "lindm_experiments" and module != "lindm" and not module.startswith("lindm.cli"):
            violations.append(f"lindm imports {name}")
        if top == "lindm" and head == "lindm" and (mine := floor(module)) and (theirs := floor(name)) and mine != theirs:
            same = LEVEL[mine] == LEVEL[theirs] and mine not in FLOORS[-1]
            if module not in BENCHES and (same or LEVEL[theirs] > LEVEL[mine]):
                violations.append(f"{mine} imports {theirs}, which is not below it")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted.startswith(("jax.random.", "jr.", "random.")) and node.attr in SLOW_SAMPLERS:
                violations.append(f"calls {dotted}")
            if top == "lindm_theory" and dotted.startswith("jax.random"):
                violations.append(f"theory samples: {dotted}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NEVER_CALLED:
            violations.append(f"calls {node.func.id}")
        if (
            isinstance(node, ast.keyword)
            and node.arg in ("trust_remote_code", "allow_pickle")
            and ast.unparse(node.value) != "False"
        ):
            violations.append(f"passes {node.arg}")
    return violations


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_module_stays_on_its_floor(path):
    assert complaints((ROOT / path).read_text(encoding="utf-8"), module_name(path)) == []


def test_every_module_of_lindm_has_a_floor():
    modules = [module_name(p) for p in SOURCES if p.parts[0] == "lindm"]
    assert [m for m in modules if m != "lindm" and floor(m) is None] == []


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_module_says_what_it_is_and_stays_under_400_lines(path):
    source = (ROOT / path).read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source))
    assert source.count("\n") <= 400


@pytest.mark.parametrize(
    "source, module",
    [
        ("import lindm_theory.policy_bounds", "lindm.evaluation.optimality_gap"),
        ("from lindm_theory import policy", "lindm.problems.mdp"),
        ("from lindm.types import MDP", "lindm_theory.policy_bounds"),
        ("def f():\n    from lindm import evaluation", "lindm.solvers.dp"),
        ("from lindm.icl.attention import FullAttention", "lindm.families.suites"),
        ("from ..evaluation import losses", "lindm.problems.mdp"),
        ("import numpy as np", "lindm_theory.in_context"),
        ("from jax import random", "lindm_theory.in_context"),
        ("import jax\nx = jax.random.normal(jax.random.key(0))", "lindm_theory.in_context"),
        ("import jax\nx = jax.random.dirichlet(key, a)", "lindm.problems.mdp"),
        ("import torch", "lindm.icl.attention"),
        ("import pickle", "lindm_experiments.harness.runner"),
        ("eval('1')", "lindm_experiments.harness.runner"),
        ("from lindm_experiments import harness", "lindm.evaluation.optimality_gap"),
        ("from jax._src import core", "lindm.types"),
    ],
)
def test_forbidden_imports_and_calls_are_found(source, module):
    assert complaints(source, module)


def test_allowed_imports_and_calls_pass():
    assert complaints("import jax\nfrom lindm.types import MDP\nfrom lindm.validate import f", "lindm.problems.mdp") == []
    assert (
        complaints(
            "import jax.numpy as jnp\nfrom jax import Array\nfrom lindm_theory.policy_bounds import f", "lindm_theory.margin"
        )
        == []
    )
    assert complaints("from lindm_theory import policy\nfrom lindm import evaluation", "lindm_experiments.ladder") == []
