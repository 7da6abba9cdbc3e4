"""Configuration of the site: `make docs` builds it into docs/_build/html.

The source directory of Sphinx is the root of the repository, so that links between docs/, theory/ and the files of the sources
are the same on the site and on a page that renders Markdown in place.
"""

import importlib.util
import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "_site"))

project = "lindm"
copyright = "2026, the lindm authors"
author = "The lindm authors"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "claim_list",
    "command_help",
    "docstrings",
    "checks",
]

# --- pages -------------------------------------------------------------------------------------------------------------------

root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "theory/README.md",
    "theory/notes/*.md",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
]
exclude_patterns = [
    "docs/_build",
    "docs/_site",
    "docs/conf.py",
    ".*",
    "results",
    "runs",
    "models",
    "data",
    "dist",
    "tests",
    "lindm",
]
source_suffix = {".md": "myst-nb", ".py": "myst-nb"}  # a tutorial in docs/tutorials is a script of jupytext
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "cache"  # a notebook is executed again only if its code has changed
nb_execution_cache_path = str(DOCS / "_build" / "notebooks")
nb_execution_in_temp = True  # what a tutorial writes is not left in its directory
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
# The kernels of the tutorials inherit this. tqdm warns that ipywidgets are missing, with a path of this machine.
os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), "ignore:IProgress not found")))
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 4
highlight_language = "none"  # indented blocks of the proofs are no program

# --- the reference -----------------------------------------------------------------------------------------------------------

default_role = "code"  # docstrings write code between single backticks
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

# --- HTML: everything is a file of the site, nothing comes from another host ----------------------------------------------------

html_theme = "furo"
html_title = "lindm"
html_baseurl = ""
html_copy_source = False
html_show_sphinx = False
html_additional_pages = {"index": "redirect.html"}
templates_path = ["_site"]
html_static_path = ["_site/site.css"]
html_css_files = ["site.css"]
mathjax_path = "mathjax/tex-chtml-full.js"
mathjax3_config = {
    "options": {"enableMenu": False},  # the menu loads parts that the site does not have
    "chtml": {"displayOverflow": "linebreak"},
}
mathjax_directory = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
mathjax_files = ["tex-chtml-full.js", "output/chtml/fonts/woff-v2/*.woff"]  # of the package, which has 24 MB of other parts
