import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEDGER = (ROOT / "theory" / "README.md").read_text()


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
