"""The pages in headless Chromium, on a telephone and on a screen: widths, filters, links, figures, print, accessibility.

Playwright and axe-core come with `make parity`. The browser is that of the system (`apt-get install chromium` on Debian).
"""

import importlib.util
import shutil
from pathlib import Path

import pytest

from lindm.evaluation import EVAL_FORMAT
from lindm.io import files
from lindm_experiments.harness.report import write_report
from lindm_experiments.harness.summary import write_summary
from tests.experiments.harness.test_page import UNEXPECTED, write_verification
from tests.experiments.harness.test_summary import MODEL, ROW

pytestmark = pytest.mark.parity
NAMES = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell", "chrome")
WIDTHS = (400, 1400)
SERIOUS = ("serious", "critical")
CLAIMS = "article.claim:visible"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (make parity)")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])  # root has no sandbox; own pages alone
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A report of `lindm verify` with claims of every kind, and a page of `lindm report` with it and with an evaluation."""
    work = tmp_path_factory.mktemp("pages")
    write_verification(work / "verified", ["risk", "llm_law"])
    (work / "eval").mkdir()
    files.write_json(work / "eval" / "eval.json", {"rows": [ROW, MODEL]}, format=EVAL_FORMAT)
    write_summary([work / "verified", work / "eval"], work / "report")
    return {"verify": write_report(work / "verified"), "report": work / "report" / "index.html"}


@pytest.fixture
def show(browser):
    """Opens a page at a width and a fragment; nothing but the file itself may be requested, and no script may fail."""
    contexts, wrong = [], []

    def open_page(path: Path, width: int = WIDTHS[1], fragment: str = "", **options):
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        address = path.as_uri()
        page.on("request", lambda r: None if r.url.startswith((address, "data:image/")) else wrong.append(r.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.goto(address + fragment)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


@pytest.mark.fault("F20")
@pytest.mark.parametrize("name", ["verify", "report"])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_element_is_wider_than_the_page(show, pages, name, width):
    page = show(pages[name], width)
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    wide = page.evaluate(
        """() => [...document.querySelectorAll("main *, header *")].filter(element => {
          const box = element.getBoundingClientRect();
          return box.width && (box.right > innerWidth + 1 || box.left < -1) && !(innerWidth > 768 && element.closest(".wide"));
        }).map(element => element.outerHTML.slice(0, 100))"""
    )
    assert wide == [] and page.evaluate("document.documentElement.scrollWidth") <= width
    cells = page.locator("td")  # no column is lost: on a narrow page each cell says which column it is of
    assert all(cell.is_visible() for cell in cells.all())
    labels = page.evaluate("[...document.querySelectorAll('td')].map(cell => getComputedStyle(cell, '::before').content)")
    assert all((label not in ("none", "normal")) == (width == WIDTHS[0]) for label in labels)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["verify", "report"])
def test_axe_finds_no_serious_fault(show, pages, name, scheme):
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("axe-playwright-python, which carries axe-core, is not installed (make parity)")
    page = show(pages[name], WIDTHS[0 if scheme == "dark" else 1], color_scheme=scheme)
    page.evaluate((Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8"))
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    result = page.evaluate("axe.run()")
    faults = [(v["impact"], v["id"], v["nodes"][0]["html"]) for v in result["violations"]]
    assert [fault for fault in faults if fault[0] in SERIOUS] == []
    assert len(result["passes"]) > 20, "axe looked at the page"


@pytest.mark.parametrize("name", ["verify", "report"])
def test_filters_and_search_show_the_claims_that_fit_and_count_them(show, pages, name):
    page = show(pages[name])
    total = page.locator("article.claim").count()
    assert page.locator(CLAIMS).count() == total > 8
    page.select_option("#verdict", "kind:unexpected")
    assert page.locator(CLAIMS).evaluate_all("claims => claims.map(claim => claim.id)") == [UNEXPECTED]
    assert page.locator("#count").inner_text() == f"1 of {total} claims"
    assert page.locator("#experiment-llm_law").is_hidden()
    page.select_option("#group", "experiment-llm_law")
    assert page.locator(CLAIMS).count() == 0 and page.locator("#nothing").is_visible()
    page.click("#reset")
    assert page.locator(CLAIMS).count() == total and page.locator("#nothing").is_hidden()
    page.fill("#search", "heavy  PAPER-bound")
    assert page.locator(CLAIMS).evaluate_all("claims => claims.map(claim => claim.id)") == ["paper-bound/heavy-tails"]
    page.fill("#search", "")
    page.click("[data-show='kind:open']")
    assert page.locator(CLAIMS).count() == page.locator("#experiment-llm_law article").count() > 0
    assert page.locator("[data-show='kind:open']").get_attribute("aria-pressed") == "true"


def test_a_link_to_a_claim_opens_it_although_it_is_filtered_away(show, pages):
    page = show(pages["verify"], WIDTHS[0], "#paper-bound/attained")
    claim = page.locator("[id='paper-bound/attained']")
    assert claim.locator("details").evaluate("details => details.open") and claim.locator("dl").is_visible()
    top = claim.evaluate("claim => claim.getBoundingClientRect().top")
    assert page.locator("header.bar").evaluate("bar => bar.getBoundingClientRect().bottom") <= top < 400, "not below the bar"
    page.select_option("#group", "experiment-llm_law")
    assert claim.is_hidden()
    page.evaluate("location.hash = '#figure-risk-error'")
    page.wait_for_selector("#figure-risk-error", state="visible")
    assert page.locator("#search").input_value() == "" and page.locator("#group").input_value() == ""


def test_a_figure_opens_at_a_click_and_closes_with_escape(show, pages):
    page = show(pages["verify"], WIDTHS[0])
    button = page.locator("button.zoom").first
    button.press("Enter")
    assert page.locator("#zoom").is_visible() and page.locator("#zoom-image img").is_visible()
    page.click("#zoom-size")
    shown = page.locator("#zoom-image img").evaluate("image => [image.width, image.naturalWidth]")
    assert shown[0] == shown[1] == 90
    page.keyboard.press("Escape")
    assert page.locator("#zoom").is_hidden()
    assert button.evaluate("button => button === document.activeElement")


def test_the_theme_follows_the_system_until_it_is_chosen(show, pages):
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = show(pages["verify"], color_scheme="light"), show(pages["verify"], color_scheme="dark")
    colors = light.evaluate(background), dark.evaluate(background)
    assert colors[0] == "rgb(255, 255, 255)" != colors[1]
    dark.click("#theme")
    assert dark.evaluate(background) == colors[0] and dark.locator("#theme").get_attribute("aria-pressed") == "false"
    light.click("#theme")
    assert light.evaluate(background) == colors[1]


def test_print_unfolds_all_details_on_white(show, pages):
    page = show(pages["verify"], color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert all(text.is_visible() for text in page.locator("article dl").all())
    assert page.locator("#search").is_hidden()


def test_without_scripts_everything_is_readable(show, pages):
    page = show(pages["verify"], java_script_enabled=False)
    assert page.locator(CLAIMS).count() == page.locator("article.claim").count() > 8
    assert page.locator("#search").is_hidden() and page.locator("#theme").is_hidden()
