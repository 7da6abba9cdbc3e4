"""The ledger's entries are true: functions and tests exist, and experiments call what their entries name."""

import ast
import importlib
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
LEDGER = (ROOT / "theory" / "README.md").read_text()
FIELD = re.compile(r"^  - (Status|Assumptions|Functions?|Proof|Tests?|Experiment): (.*)$")


class Entry(NamedTuple):
    """A statement of the ledger: an item of a list, with its fields as items below it."""

    text: str  # of the item with all its fields, in one line
    statement: str
    fields: dict[str, str]  # by name, without the s of a plural


def entries() -> list[Entry]:
    found = []
    for item in re.findall(r"^- .*(?:\n +\S.*)*", LEDGER, re.MULTILINE):
        statement, *below = re.sub(r"\n +(?! |- )", " ", item).split("\n")
        fields = [FIELD.match(line) for line in below]
        assert fields and all(fields), f"fields of an entry: Status, Assumptions, Function, Proof, Test, Experiment; got\n{item}"
        named = {match[1].removesuffix("s") if match[1] != "Status" else match[1]: match[2] for match in fields if match}
        found.append(Entry(" ".join([statement, *below]), statement.removeprefix("- "), named))
    return found


ENTRIES = entries()


def test_every_entry_has_a_status_that_the_ledger_explains():
    assert len(ENTRIES) > 150
    explained = re.findall(r"^\| \*\*([\w ]+)\*\* \|", LEDGER, re.MULTILINE)
    assert len(explained) == 6
    for entry in ENTRIES:
        assert {"Status", "Experiment"} <= set(entry.fields), entry.statement
        assert any(word in entry.fields["Status"] for word in explained), entry.statement


def test_every_function_and_every_test_that_the_ledger_names_exists():
    modules = {path.stem for path in (ROOT / "theory" / "lindm_theory").glob("*.py")}
    named = [m for m in re.findall(r"`(\w+)\.(\w+)`", LEDGER) if m[0] in modules]
    assert len(named) > 40
    for module, name in named:
        assert callable(getattr(importlib.import_module(f"lindm_theory.{module}"), name)), f"{module}.{name}"
    beside = ROOT / "tests" / "lindm" / "solvers", ROOT / "tests" / "experiments" / "lib"
    places = (*Path(__file__).parent.glob("test_*.py"), *(path for folder in beside for path in folder.glob("test_*.py")))
    tests = "".join(path.read_text() for path in places)
    written = set(re.findall(r"`(test_\w+)`", LEDGER))
    assert len(written) > 40
    assert not {name for name in written if f"def {name}(" not in tests}


def test_the_theory_imports_jax_and_the_standard_library_only():
    for path in (ROOT / "theory" / "lindm_theory").glob("*.py"):
        heads = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
        assert set(heads) <= {"jax", "lindm_theory", "collections", "dataclasses", "math"}, path.name
        assert "jax.random" not in path.read_text(), path.name


# --- which theory functions an experiment calls, from the sources

Function = tuple[str, str]  # module of lindm_theory, name
THEORY, EXPERIMENTS = ROOT / "theory" / "lindm_theory", ROOT / "experiments" / "lindm_experiments"


def imported(path: Path) -> tuple[ast.Module, dict[str, str], dict[str, Function], set[str]]:
    """(tree, names of theory modules, names of theory functions, experiment modules) that a file imports."""
    tree, modules, functions, files = ast.parse(path.read_text()), {}, {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                if node.module == "lindm_theory":
                    modules[name.asname or name.name] = name.name
                elif node.module.startswith("lindm_theory."):
                    functions[name.asname or name.name] = (node.module.split(".")[1], name.name)
                elif node.module.startswith("lindm_experiments"):
                    files |= {node.module, f"{node.module}.{name.name}"}
    return tree, modules, functions, files


def called(node: ast.AST, modules: dict[str, str], functions: dict[str, Function]) -> set[Function]:
    """The theory functions that the code below `node` names."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id in modules:
            found.add((modules[part.value.id], part.attr))
        if isinstance(part, ast.Name) and part.id in functions:
            found.add(functions[part.id])
    return found


def reached(start, graph) -> set:
    seen, left = set(), list(start)
    while left:
        if (one := left.pop()) not in seen:
            seen.add(one)
            left += graph.get(one, ())
    return seen


@cache
def theory() -> dict[Function, set[Function]]:
    """What each theory function calls; a name that a module imports from another one stands for the function there."""
    graph: dict[Function, set[Function]] = {}
    for path in THEORY.glob("*.py"):
        tree, modules, functions, _ = imported(path)
        graph |= {(path.stem, name): {there} for name, there in functions.items()}
        parts = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        own = {n.name: (path.stem, n.name) for n in parts}
        graph |= {(path.stem, n.name): called(n, modules, functions | own) - {(path.stem, n.name)} for n in parts}
    return graph


def public() -> set[Function]:
    trees = {path.stem: ast.parse(path.read_text()) for path in THEORY.glob("*.py")}
    return {(m, n.name) for m, tree in trees.items() for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"}


@cache
def used() -> dict[str, set[Function]]:
    """The theory functions that each file of the experiments calls, and through the files of lib and toolkit that it imports."""
    names, files = {}, {}
    shared = "lindm_experiments.lib.", "lindm_experiments.toolkit."
    for path in EXPERIMENTS.rglob("*.py"):
        module = ".".join(("lindm_experiments", *path.relative_to(EXPERIMENTS).with_suffix("").parts))
        tree, modules, functions, files[module] = imported(path)
        names[module] = called(tree, modules, functions)
    lib = {module: {f for f in there if f.startswith(shared)} for module, there in files.items()}
    out = {}
    for module in names:
        direct = set().union(*(names.get(f, set()) for f in reached([module], lib)))
        out[module.removeprefix("lindm_experiments.")] = reached(direct, theory())
    return out


CLAIMS = {c["id"]: c["experiment"] for c in tomllib.loads((EXPERIMENTS / "claims.toml").read_text())["claim"]}
MODULES = {path.stem for path in THEORY.glob("*.py")}
WITH_FUNCTION = [entry for entry in ENTRIES if "Function" in entry.fields]


def functions_of(text: str) -> set[Function]:
    return {f for f in re.findall(r"`(\w+)\.(\w+)`", text) if f[0] in MODULES}


@pytest.mark.parametrize(
    "entry", WITH_FUNCTION, ids=[" ".join(re.findall(r"\w+", entry.statement)[:6]) for entry in WITH_FUNCTION]
)
def test_the_experiments_of_an_entry_call_its_functions(entry):
    experiment, functions = entry.fields["Experiment"], functions_of(entry.fields["Function"])
    claims = [c for c in re.findall(r"`([\w/-]+)`", experiment) if c in CLAIMS]
    if "test only" in experiment:
        return
    assert claims or not functions, "name a claim, or write: test only"
    together = set().union(*(used()[CLAIMS[c]] for c in claims))
    assert functions <= together


def test_a_function_that_no_experiment_calls_is_marked_test_only():
    (listed,) = re.findall(r"^Further functions that no experiment calls \(test only\):(?:.+\n)+", LEDGER, re.MULTILINE)
    marked = set().union(*(functions_of(entry.text) for entry in ENTRIES if "test only" in entry.text), functions_of(listed))
    by_experiments = set().union(*(used()[experiment] for experiment in set(CLAIMS.values())))
    assert public() - by_experiments - marked == set()
    assert functions_of(listed) & by_experiments == set()


def test_every_proved_entry_has_a_test():
    for entry in ENTRIES:
        if re.match(r"\**(proved|tightened|corrected|refuted)", entry.fields["Status"]):
            assert "`test_" in entry.text, entry.statement


def test_a_theorem_has_a_number_of_its_own_and_every_number_that_is_cited_has_a_theorem():
    """Numbers of other papers stand behind the brackets of their source: [JYW] Theorem 4.2."""
    notes = [path.read_text() for path in sorted((ROOT / "theory" / "notes").glob("*.md"))]
    defined = re.findall(r"^\*\*Theorem (\w+)", "\n".join(notes), re.MULTILINE)
    assert len(defined) > 15 and len(set(defined)) == len(defined), sorted(defined)
    pages = [*(ROOT / "docs").glob("*.md"), *THEORY.glob("*.py"), *EXPERIMENTS.rglob("*.py"), EXPERIMENTS / "claims.toml"]
    text = "\n".join([LEDGER, *notes, *(path.read_text() for path in pages)])
    cited = re.findall(r"(?<!\] )\b[Tt]heorems? ([A-Z]?[0-9]+)\b", text)
    assert set(cited) <= set(defined), set(cited) - set(defined)
