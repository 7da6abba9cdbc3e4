"""The site of docs/: every page is in its contents, its reference has every public name, its bibliography every work.

These tests read the sources. `make docs` builds the site and takes every warning for an error: a link or a heading that does not
exist, a resource on another host.
"""

import importlib.util
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import lindm as ld
from lindm.cli.main import NAMES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SOURCES = sorted(p for p in DOCS.rglob("*.md") if not p.is_relative_to(DOCS / "_build"))
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
AUTO = re.compile(r"^\.\. auto(\w+):: ([\w.]+)$", re.MULTILINE)
MODULES = {"errors", "icl", "policies", "theory"}  # public names that are modules


def entries(page: Path) -> list[Path]:
    """The pages that the contents of a page name, as files."""
    found = []
    for block in TOCTREE.findall(page.read_text(encoding="utf-8") if page.suffix == ".md" else ""):
        for line in filter(None, block.splitlines()):
            if not line.startswith(":"):
                target = (page.parent / line.rpartition("<")[2].removesuffix(">")).resolve()
                files = [target.with_name(target.name + suffix) for suffix in (".md", ".py")]
                found += [next((file for file in files if file.exists()), target)]
    return found


def test_every_page_is_in_the_contents_of_the_site_once():
    reached, open_pages = [DOCS / "index.md"], [DOCS / "index.md"]
    while open_pages:
        found = entries(open_pages.pop())
        reached, open_pages = reached + found, open_pages + found
    beside = [
        *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")),
        *(ROOT / "theory").rglob("*.md"),
    ]
    assert sorted(reached) == sorted({*SOURCES, *(DOCS / "tutorials").glob("*.py"), *beside})


def documented() -> dict[str, str]:
    """Object -> kind of the directive that documents it, over all pages of the reference."""
    found = [match for page in SOURCES for match in AUTO.findall(page.read_text(encoding="utf-8"))]
    assert len(found) == len({target for _, target in found}), "a name is documented twice"
    return {target: kind for kind, target in found}


def test_the_reference_has_every_public_name():
    modules = {ld.PUBLIC[name] for name in MODULES}
    names = {name: ld.PUBLIC[name] for name in ld.PUBLIC if name not in MODULES}
    kinds = documented()
    assert modules <= {target for target, kind in kinds.items() if kind == "module"}
    assert {target for target, kind in kinds.items() if kind not in ("module", "method")} == {f"lindm.{name}" for name in names}
    for name in names:
        assert kinds[f"lindm.{name}"] == ("class" if inspect.isclass(getattr(ld, name)) else "function"), name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_name_of_a_public_module_has_a_docstring(name):
    module = getattr(ld, name)
    classes = [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module.__name__]
    names = getattr(module, "__all__", classes)
    assert names
    for each in names:
        value = getattr(module, each)
        assert not callable(value) or (inspect.getdoc(value) or "").strip(), f"{name}.{each} has no docstring"


def test_the_reference_has_every_error():
    page = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    errors = {n for n, v in vars(ld.errors).items() if inspect.isclass(v) and issubclass(v, BaseException) and n[0] != "_"}
    (members,) = re.findall(r":members: (.*)", page)
    assert set(members.split(", ")) == errors


def test_every_command_has_its_help_on_the_site():
    assert "```{command-help}" in (DOCS / "reference" / "command-help.md").read_text(encoding="utf-8")
    table = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"`lindm {name}" not in table] == []


@pytest.fixture(scope="module")
def claim_list():
    """The extension docs/_site/claim_list.py."""
    spec = importlib.util.spec_from_file_location("claim_list", DOCS / "_site" / "claim_list.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_claim_is_on_the_site_with_its_numbers(claim_list):
    source = [(DOCS / "reference" / "claim-list.md").read_text(encoding="utf-8")]
    claim_list.insert(None, "docs/reference/claim-list", source)
    assert "{claim-list}" not in source[0]
    page = re.sub(r"\\([^a-zA-Z0-9\s])", r"\1", source[0])  # without the escapes of Markdown
    sections = dict(re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    table = tomllib.loads((ROOT / "experiments/lindm_experiments/claims.toml").read_text(encoding="utf-8"))
    claims = {claim["id"]: claim for claim in table["claim"]}
    assert set(sections) == set(claims)
    assert len({id.replace("/", "-") for id in claims}) == len(claims), "two claims have the same anchor"
    for id, claim in claims.items():
        shown = " ".join(sections[id].split())
        band = {end: format(claim.get(end, float("nan")), "g") for end in ("lo", "hi")}
        texts = (claim["statement"], claim["predicted"], claim["criterion"].format(**band), claim["source"])
        assert [text for text in texts if " ".join(text.split()) not in shown] == [], id
        assert f"**Expected verdict:** {claim.get('expected', 'PASS')}" in shown, id
        assert ("min_seeds" in claim and claim["min_seeds"] != 5) == ("**Seeds or tasks:**" in shown), id
    headings = re.findall(r"^## Experiment (\w+)$", page, re.MULTILINE)
    assert headings == list(table["minutes"])
    for id, claim in claims.items():  # under the heading of its experiment
        above = page[: page.index(f"\n### {id}\n")]
        assert re.findall(r"^## Experiment (\w+)$", above, re.MULTILINE)[-1] == claim["experiment"], id


@pytest.mark.parametrize("page, entries", [("docs/claims", "reference/"), ("theory/README", "../docs/reference/")])
def test_the_ids_of_claims_are_links_to_their_entries(page, entries, claim_list):
    source = [(ROOT / f"{page}.md").read_text(encoding="utf-8")]
    claim_list.insert(None, page, source)
    links = re.findall(r"\[`([\w/-]+)`\]\(([^)#]+)#([^)]+)\)", source[0])
    assert all(file == f"{entries}claim-list.md" and anchor == id.replace("/", "") for id, file, anchor in links)
    table = tomllib.loads((ROOT / "experiments/lindm_experiments/claims.toml").read_text(encoding="utf-8"))
    claims = {claim["id"] for claim in table["claim"]}
    assert len({id.replace("/", "") for id in claims}) == len(claims), "two claims have the same anchor"
    linked = {id for id, _, _ in links}
    assert linked == claims if page == "docs/claims" else linked < claims and len(linked) > 100
    assert "and `weights` is the law" in source[0] or page == "docs/claims"  # an argument of a function


def test_the_bibliography_has_every_work_that_is_cited_by_a_key():
    claims = tomllib.loads((ROOT / "experiments/lindm_experiments/claims.toml").read_text(encoding="utf-8"))["claim"]
    theory = (p for p in (ROOT / "theory").rglob("*.*") if p.suffix in (".md", ".py"))
    pages = [
        *(claim["source"] for claim in claims),
        *(p.read_text(encoding="utf-8") for p in (*theory, *DOCS.rglob("theory.md"))),
    ]
    bibliography = (DOCS / "bibliography.md").read_text(encoding="utf-8")
    known = set(re.findall(r"^- \[([A-Z]{2,6})\]", bibliography, re.MULTILINE))
    cited = {key for page in pages for key in re.findall(r"\[([A-Z]{2,6})(?:\]|,| Lemma| Thm| Cor| eq)", page)}
    assert {"ZAS", "ZFB", "KL"} <= cited
    assert cited - known == set()
