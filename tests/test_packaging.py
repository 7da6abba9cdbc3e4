"""What is installed: the names in the wheel, and that they do not collide with folders of a user."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.clock import HANGS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """The names of the files in the wheel, built without network."""
    out = tmp_path_factory.mktemp("wheel")
    code = f"import sys, hatchling.build as b; print(b.build_wheel({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        return archive.namelist()


def test_the_wheel_claims_no_generic_name(wheel):
    assert {name.split("/")[0] for name in wheel} == {"lindm", "lindm_theory", "lindm_experiments", "lindm-0.1.0.dist-info"}


def test_the_wheel_holds_what_the_packages_read(wheel):
    files = set(wheel)
    assert "lindm/py.typed" in files and "lindm/templates/compact.json" in files
    for top in (ROOT, ROOT / "theory", ROOT / "experiments"):
        for package in top.glob("lindm*"):
            read = [p for p in package.rglob("*") if p.suffix in (".py", ".json", ".jinja", ".toml", ".typed")]
            assert {p.relative_to(top).as_posix() for p in read} <= files


def test_folders_beside_a_script_break_nothing(tmp_path):
    for name in ("experiments", "theory", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"OWNER = 'the user, {name}'\n")
    script = tmp_path / "notebook.py"
    script.write_text(
        "import experiments, theory, lindm\n"
        "from lindm_experiments.harness.experiments import experiment_names\n"
        "import lindm_theory.policy_bounds\n"
        "assert experiments.OWNER == 'the user, experiments' and theory.OWNER == 'the user, theory'\n"
        "assert 'risk' in experiment_names()\n"
        "import lindm.cli.main\n"
        "assert lindm.cli.main.main(['run', 'risk', '--preset', 'nonsense']) == 2\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
