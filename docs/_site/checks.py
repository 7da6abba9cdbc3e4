"""What must hold of the built site: it has the files that its pages name, and loads nothing from another host."""

import html
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

from pygments.lexers.special import TextLexer
from sphinx.util import logging

logger = logging.getLogger(__name__)
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)\)")
LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "object": "data", "video": "src"}
PLAIN = ("pomdp", "csv", "jsonl")  # languages of blocks that no lexer knows


class Resources(HTMLParser):
    """The addresses that a browser loads when it shows a page, and those that a reader can follow."""

    def __init__(self):
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids |= {value for key in ("id", "name") if (value := values.get(key))}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag in LOADS and values.get(LOADS[tag]) and values.get("rel") != "canonical":
            self.loaded.append(values[LOADS[tag]])


def read(page: Path) -> Resources:
    parser = Resources()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def faults(out: Path) -> list[str]:
    """Every address of the site that is on another host, or that does not exist."""
    pages = {page.resolve(): read(page) for page in out.rglob("*.html")}
    found = []
    for page, parser in pages.items():
        name = page.relative_to(out.resolve())
        found += [f"{name} loads {address}" for address in parser.loaded if urlparse(address).netloc]
        for address in (*parser.loaded, *parser.links):
            parts = urlparse(address)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not target.exists():
                found.append(f"{name} names {address}, which does not exist")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                found.append(f"{name} names {address}, which has no such place")
    for sheet in out.rglob("*.css"):
        if "url(http" in sheet.read_text(encoding="utf-8").replace('"', "").replace("'", ""):
            found.append(f"{sheet.relative_to(out)} loads from another host")
    return found


def missing_figures(sources: Path, out: Path) -> list[str]:
    """Figures that the cells of a tutorial announce by an alternative text, and that its page does not have."""
    found = []
    for tutorial in sorted((sources / "docs" / "tutorials").glob("*.py")):
        page = (out / tutorial.relative_to(sources).with_suffix(".html")).read_text(encoding="utf-8")
        shown = set(re.findall(r'<img alt="([^"]*)"', page))
        texts = re.findall(r'"alt": "([^"]*)"', tutorial.read_text(encoding="utf-8"))
        found += [f"{tutorial.name} shows no figure: {text}" for text in texts if html.escape(text) not in shown]
    return found


def resolve_sources(app, docname, content):
    """Links to files of the sources that look like pages become downloads, and the text alone stays of a link to a directory."""
    place = Path(app.env.doc2path(docname)).parent

    def shown(link: re.Match) -> str:
        target = (place / link[2]).resolve()
        if target.is_dir():
            return link[1]
        if target.suffix in app.config.source_suffix and target.exists() and app.env.path2doc(target) not in app.env.found_docs:
            return f"[{link[1]}](path:{link[2]})"
        return link[0]

    content[0] = LINK.sub(shown, content[0])


def finish(app, error):
    """After the build: the files of MathJax, and the faults of the site as warnings, which `make docs` takes for errors."""
    if error is not None or app.builder.name != "html":
        return
    out = Path(app.outdir)
    for source in app.config.mathjax_files:
        target = out / "_static" / "mathjax" / source
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in (app.config.mathjax_directory / source).parent.glob(Path(source).name):
            shutil.copyfile(file, target.parent / file.name)
    for fault in (*faults(out), *missing_figures(Path(app.srcdir), out)):
        logger.warning(fault)


def setup(app):
    for language in PLAIN:
        app.add_lexer(language, TextLexer)
    app.add_config_value("mathjax_directory", Path(), "html")
    app.add_config_value("mathjax_files", [], "html")
    app.connect("source-read", resolve_sources)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True}
