"""Dependencies and Pythons: what is imported is declared, what is declared is used, and locks, Makefile, pages and CI agree."""

import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOW = ROOT / ".github/workflows/ci.yml"
OWN = {"lindm", "lindm_theory", "lindm_experiments", "tests"}
IMPORTED_AS = {  # where it is not the name of the distribution
    "huggingface-hub": "huggingface_hub",
    "orbax-checkpoint": "orbax",
    "pymdptoolbox": "mdptoolbox",
    "pyyaml": "yaml",
    "pillow": "PIL",
}
TOOLS = {  # declared, and not imported
    "hatchling": "builds the package, and the wheel in tests",
    "pytest-xdist": "make test -n",
    "pyright": "make lint",
    "ruff": "make lint",
    "furo": "make docs",
    "jupytext": "make docs",
    "myst-nb": "make docs",
    "sphinx": "make docs",
    "sphinx-mathjax-offline": "make docs",
}
REFERENCES = {  # imported, and not declared: `make parity` installs them, and benches compare with them where they are installed
    "torch": "reference of parity tests",
    "peft": "reference of parity tests",
    "d3rlpy": "reference of parity tests, in an environment of its own",
}


def declared(*extras: str) -> set[str]:
    """Distributions that lindm, or lindm with these extras, installs."""
    optional = PROJECT["optional-dependencies"]
    found = {Requirement(r).name.lower() for r in [*PROJECT["dependencies"], *(r for extra in extras for r in optional[extra])]}
    return found - {"lindm"}


def modules(distributions: set[str]) -> set[str]:
    """Their top-level modules, in lower case."""
    return {IMPORTED_AS.get(d, d.replace("-", "_")).lower() for d in distributions}


@functools.cache
def imports(*directories: str) -> list[tuple[str, bool, Path]]:
    """(third-party module in lower case, whether it is imported when the file is, file)."""
    found = []
    for file in sorted(p for directory in directories for p in (ROOT / directory).rglob("*.py")):
        places: list[tuple[ast.AST, bool]] = [(ast.parse(file.read_text(encoding="utf-8")), True)]
        while places:
            node, at_once = places.pop()
            at_once &= not isinstance(node, ast.FunctionDef)
            at_once &= not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            tops = {name.split(".")[0] for name in names} - OWN - set(sys.stdlib_module_names)
            found += [(top.lower(), at_once, file) for top in tops]
            if isinstance(node, ast.stmt | ast.Module | ast.ExceptHandler | ast.match_case):
                places += [(child, at_once) for child in ast.iter_child_nodes(node)]
    return found


PACKAGES = ("lindm", "theory/lindm_theory", "experiments/lindm_experiments")


def test_what_the_packages_import_is_declared_and_an_extra_is_imported_only_where_it_is_used():
    core, every = modules(declared()), modules(declared(*PROJECT["optional-dependencies"]) | REFERENCES.keys())
    for module, at_once, file in imports(*PACKAGES):
        assert module in (core if at_once else every), f"{file} imports {module}, which pyproject.toml does not declare"


def test_what_the_tests_import_is_declared():
    known = modules(declared(*PROJECT["optional-dependencies"]) | REFERENCES.keys())
    assert {module for module, _, _ in imports("tests")} <= known


def test_what_is_declared_is_imported_or_is_a_tool():
    everywhere = {module for module, _, _ in imports(*PACKAGES, "tests")}
    for name in declared(*PROJECT["optional-dependencies"]) - TOOLS.keys():
        assert modules({name}) <= everywhere, f"{name} is declared and imported nowhere"
    assert not modules(set(TOOLS)) & {module for module, _, _ in imports(*PACKAGES)}
    assert modules(declared()) <= {module for module, _, _ in imports(*PACKAGES)}, "tests alone need it: it belongs into dev"


# --- locks -------------------------------------------------------------------------------------------------------------------


def pins(lock: str) -> dict[str, set[str]]:
    """Distribution -> the versions that a lock has of it; different Pythons may have different ones."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "requirements" / lock).read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            name, version = line.split(" ")[0].split("==")
            found.setdefault(name, set()).add(version)
    return found


IN_DEV = ("data", "gym", "minari", "track", "dev")  # dev includes the others


@pytest.mark.parametrize(
    "lock, packages",
    [
        ("lock.txt", declared(*IN_DEV)),
        ("lowest.txt", declared(*IN_DEV)),
        ("docs.txt", declared("docs", "data", "gym")),
        ("cuda.txt", {"jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13"}),
        ("release.txt", {"build", "hatchling", "twine"}),
    ],
)
def test_a_lock_has_every_dependency_with_hashes_and_no_address(lock, packages):
    assert packages <= pins(lock).keys()
    text = (ROOT / "requirements" / lock).read_text(encoding="utf-8")
    assert "://" not in text and "--index" not in text
    blocks = re.split(r"\n(?=\S)", text)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)


@pytest.mark.parametrize("lock", ["docs.txt", "cuda.txt", "release.txt"])
def test_a_lock_beside_the_lock_has_its_versions(lock):
    both, main = pins(lock), pins("lock.txt")
    assert all(both[name] <= main[name] for name in both.keys() & main.keys())
    assert both.keys() & main.keys()


def test_the_cuda_wheels_are_those_of_the_jax_of_the_lock():
    cuda = pins("cuda.txt")
    assert cuda["jax-cuda13-plugin"] == cuda["jax-cuda13-pjrt"] == cuda["jax"] == {max(pins("lock.txt")["jax"], key=Version)}
    assert any(r.startswith("jax[cuda13]") for r in PROJECT["optional-dependencies"]["cuda"])


def requirements() -> list[Requirement]:
    """The dependencies of lindm and of the extras that the locks have."""
    extras = (r for extra in IN_DEV for r in PROJECT["optional-dependencies"][extra] if not r.startswith("lindm["))
    return [Requirement(r) for r in (*PROJECT["dependencies"], *extras)]


@pytest.mark.fault("F25")
def test_every_version_in_the_lock_is_in_the_range_of_its_dependency(trials):
    locked = pins("lock.txt")
    for requirement in requirements():
        for version in locked[requirement.name.lower()]:
            assert requirement.specifier.contains(version), f"{requirement}; the lock has {version}"
            trials.add()


@pytest.mark.fault("F25")
def test_the_lowest_versions_are_those_of_pyproject():
    lowest = pins("lowest.txt")
    for requirement in requirements():
        (version,) = lowest[requirement.name.lower()]
        bounds = [Version(s.version) for s in requirement.specifier if s.operator in (">=", "==")]
        # a bound such as 1.4 is the release 1.4.0 or, where that was withdrawn or has no wheels, the first one after it
        assert bounds and requirement.specifier.contains(version), requirement
        assert Version(version).release[: len(bounds[0].release)] == bounds[0].release, f"{requirement} is tested with {version}"


# --- Pythons -----------------------------------------------------------------------------------------------------------------

(VERSIONS,) = (line.split(" := ")[1].split() for line in MAKEFILE.splitlines() if line.startswith("VERSIONS := "))


@pytest.mark.fault("F25")
def test_every_place_names_the_same_pythons():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert PROJECT["requires-python"] == f">={VERSIONS[0]}"
    prefix = "Programming Language :: Python :: "
    assert [c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(prefix)] == VERSIONS
    assert tools["pyright"]["pythonVersion"] == VERSIONS[0]
    assert tools["ruff"]["target-version"] == f"py{VERSIONS[0].replace('.', '')}"
    assert {f"python{v}" for v in VERSIONS} <= set(re.findall(r"CANDIDATES := (.*)", MAKEFILE)[0].split())
    for page in ("README.md", "requirements/README.md"):
        assert f"Python {VERSIONS[0]} to {VERSIONS[-1]}" in (ROOT / page).read_text(encoding="utf-8")
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    machines = [(row["machine"], row["python"]) for row in jobs["machines"]["strategy"]["matrix"]["include"]]
    assert [python for machine, python in machines if machine == "ubuntu-24.04"] == VERSIONS
    assert {machine.split("-")[0] for machine, _ in machines} == {"ubuntu", "macos"}
    assert any(machine.endswith("-arm") for machine, _ in machines)
    assert {row["python"] for job in jobs.values() for row in job["strategy"]["matrix"]["include"]} <= set(VERSIONS)


def make_targets(text: str) -> list[str]:
    """The targets of the commands `make TARGET`."""
    return re.findall(r"\bmake ([\w.-]+)", text)


def test_the_workflow_calls_the_targets_of_ci_and_no_other_ones():
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    called: list[str] = []
    for job in jobs.values():
        rows = job["strategy"]["matrix"]["include"]
        for step in job["steps"]:
            assert step.keys() <= {"uses", "with", "run"} and ("uses" in step) != ("run" in step)
            command = step.get("run", "")
            assert not command or re.fullmatch(r"make (\w+|\$\{\{ matrix\.target \}\}) PYTHON=python", command), command
            called += [
                target for row in rows for target in make_targets(command.replace("${{ matrix.target }}", str(row.get("target"))))
            ]
    phony = set(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split())
    assert set(called) <= phony
    assert set(make_targets((ROOT / ".ci/run").read_text(encoding="utf-8"))) <= set(called)
