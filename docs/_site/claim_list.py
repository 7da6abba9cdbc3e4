"""Claims on the site: the block `claim-list`, every claim under its experiment, and links of other pages to these entries."""

import posixpath
import re

from lindm_experiments.harness.claims import CLAIMS, Claim, claim_ids, get_claim
from lindm_experiments.harness.experiments import Experiment, experiment_names, find_experiment

BLOCK = "```{claim-list}\n```\n"
PAGE = "docs/reference/claim-list.md"  # the page with the block
LINKED = ("docs/claims", "docs/results", "theory/README")  # pages that name claims in the rows and fields below
ROW = re.compile(r"^(?:\||  ).*$", re.MULTILINE)  # of a table, or a field of the ledger: in prose an id can be an experiment
CODE = re.compile(r"`([\w/-]+)`")
MARKUP = re.compile(r"([\\`*_{}\[\]<>$|#~&^])")


def plain(text: str) -> str:
    """A text of claims.toml or a docstring; none of its characters is markup."""
    return MARKUP.sub(r"\\\1", " ".join(text.split()))


def claim_section(claim: Claim) -> str:
    """A section of the claim. Sphinx makes the anchor with a hyphen in place of each slash of the id; links in Markdown (MyST)
    must leave the slash out."""
    rows = {
        "Statement": claim.statement,
        "Prediction": claim.predicted,
        "Criterion": claim.criterion,
        "Source": claim.source,
        "Expected verdict": claim.expected,
    }
    if claim.min_seeds != Claim.min_seeds:
        rows["Seeds or tasks"] = f"at least {claim.min_seeds}"
    listed = "\n".join(f"- **{name}:** {plain(text)}" for name, text in rows.items())
    return f"### {plain(claim.id)}\n\n{listed}\n"


def experiment_section(experiment: Experiment) -> str:
    """A section with the question of the experiment, a link to its help, and its claims."""
    command = f"lindm run {experiment.name}"
    link = f'<a href="command-help.html#{command.replace(" ", "-").replace("_", "-")}">Help of <code>{command}</code></a>'
    question = plain(experiment.docstring.split("\n\n")[0])
    claims = "\n".join(claim_section(get_claim(id)) for id in claim_ids(experiment.name))
    return f"## Experiment {plain(experiment.name)}\n\n{question} {link}.\n\n{claims}"


def markdown() -> str:
    """Every experiment of the package with its claims."""
    return "\n".join(experiment_section(find_experiment(name)) for name in experiment_names())


def with_links(docname: str, text: str) -> str:
    """A page whose rows name claims, with each id as a link to its entry."""
    page = posixpath.relpath(PAGE, posixpath.dirname(docname))

    def link(code: re.Match) -> str:
        return f"[{code[0]}]({page}#{code[1].replace('/', '')})" if code[1] in CLAIMS else code[0]

    return ROW.sub(lambda row: CODE.sub(link, row[0]), text)


def insert(app, docname: str, content: list[str]) -> None:
    if BLOCK in content[0]:
        content[0] = content[0].replace(BLOCK, markdown())
    if docname in LINKED:
        content[0] = with_links(docname, content[0])


def setup(app):
    app.connect("source-read", insert)
    return {"parallel_read_safe": True}
