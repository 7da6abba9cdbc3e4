"""Provenance: the commit is that of lindm's own checkout or none; the date, the command line and the versions are there."""

import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lindm.io import provenance
from tests.clock import HANGS

ROOT = Path(__file__).parents[3]
NO_COMMIT = {"commit": None, "dirty": None}


def git(directory: Path, *arguments: str) -> str:
    person = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(["git", *person, *arguments], cwd=directory, env=clean, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def repository(directory: Path, project: str | None) -> str:
    """A repository with one commit, and a pyproject.toml if `project` is given; the commit."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "a.txt").write_text("a")
    if project is not None:
        (directory / "pyproject.toml").write_text(f'[project]\nname = "{project}"\n')
    git(directory, "init", "-q")
    git(directory, "add", "-A")
    git(directory, "commit", "-q", "-m", "one")
    return git(directory, "rev-parse", "HEAD")


@pytest.mark.fault("F33")
def test_the_commit_is_that_of_a_checkout_of_lindm_and_says_whether_it_has_changes(tmp_path):
    commit = repository(tmp_path, "lindm")
    assert provenance.checkout_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "untracked.txt").write_text("b")
    assert provenance.checkout_state(tmp_path)["dirty"] is False
    (tmp_path / "a.txt").write_text("changed")
    assert provenance.checkout_state(tmp_path) == {"commit": commit, "dirty": True}


@pytest.mark.fault("F33")
def test_the_repository_around_an_environment_or_a_copy_is_not_lindms_own(tmp_path):
    repository(tmp_path, "lindm")
    packages = tmp_path / "env/lib/site-packages"
    packages.mkdir(parents=True)
    assert provenance.checkout_state(packages) == NO_COMMIT  # an environment inside a checkout
    (packages / "pyproject.toml").write_text('[project]\nname = "lindm"\n')
    assert provenance.checkout_state(packages) == NO_COMMIT  # a copy of the project in a directory of another repository


@pytest.mark.fault("F33")
@pytest.mark.parametrize("project", [None, "another"])
def test_packages_at_the_top_of_another_repository_have_no_commit(tmp_path, project):
    repository(tmp_path, project)
    assert provenance.checkout_state(tmp_path) == NO_COMMIT


@pytest.mark.fault("F33")
def test_variables_of_git_do_not_name_another_repository(tmp_path, monkeypatch):
    repository(other := tmp_path / "other", "lindm")
    (mine := tmp_path / "mine").mkdir()
    shutil.copy(other / "pyproject.toml", mine)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(mine))
    assert provenance.checkout_state(mine) == NO_COMMIT
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    assert provenance.checkout_state(other)["commit"] is not None


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    repository(tmp_path, "lindm")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.checkout_state(tmp_path) == NO_COMMIT


def test_this_checkout_is_the_root_that_is_asked():
    assert provenance.ROOT == ROOT and (ROOT / "pyproject.toml").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/env/bin/lindm", "verify", "--out", "my results"], "lindm verify --out 'my results'"),
        (["/packages/lindm/__main__.py", "sft", "--steps", "3"], "python -m lindm sft --steps 3"),
        (["/home/notes/my study.py", "a"], "'my study.py' a"),
        (["-c", "a"], "python -c a"),
        ([""], "python"),
    ],
)
def test_the_command_line_is_as_it_was_typed(monkeypatch, arguments, expected):
    monkeypatch.setattr(sys, "argv", arguments)
    assert provenance.command_line() == expected


def test_the_date_is_of_now_and_in_utc():
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    date = datetime.datetime.fromisoformat(provenance.provenance()["date"])
    assert date.utcoffset() == datetime.timedelta(0)
    assert before <= date <= datetime.datetime.now(datetime.UTC)


@pytest.mark.slow
@pytest.mark.fault("F33")
def test_a_wheel_in_an_environment_inside_another_repository_names_its_version_and_no_commit(tmp_path):
    foreign = repository(tmp_path / "project", "another")
    environment = tmp_path / "project/env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=HANGS)
    python = environment / "bin/python"
    build = f"import hatchling.build as b; print(b.build_wheel({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, timeout=HANGS, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    (packages,) = environment.glob("lib/python*/site-packages")
    shutil.unpack_archive(wheel, packages, "zip")  # a pure wheel is installed by unpacking it
    others = [p for p in sys.path if p.endswith("site-packages")]  # the dependencies of this environment
    (packages / "others.pth").write_text("\n".join(others) + "\n")

    code = "import lindm, sys; from lindm.cli.main import main; print(lindm.__file__); sys.exit(main())"
    words = ["verify", "--preset", "smoke", "--only", "controls/swap", "--out", "out", "--workers", "1"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") and k != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-P", "-c", code, *words], cwd=tmp_path / "project", env=clean, capture_output=True, text=True, timeout=HANGS
    )
    assert done.stdout.startswith(str(packages)), done.stderr
    out = tmp_path / "project/out"
    for manifest in (out / "manifest.json", out / "controls/manifest.json"):
        content = json.loads(manifest.read_text())
        assert content["git"] == NO_COMMIT and content["versions"]["lindm"] == "0.1.0"
        assert content["command"].endswith(" ".join(words)) and datetime.datetime.fromisoformat(content["date"]).tzinfo
    assert not [p for p in out.rglob("*") if p.is_file() and foreign[:12].encode() in p.read_bytes()]
