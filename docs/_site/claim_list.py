"""The block `claim-list` of a page: every claim of claims.toml under the heading of its experiment, as Markdown."""

import re

from lindm_experiments.harness.claims import Claim, claim_ids, get_claim
from lindm_experiments.harness.experiments import Experiment, experiment_names, find_experiment

BLOCK = "```{claim-list}\n```\n"
MARKUP = re.compile(r"([\\`*_{}\[\]<>$|#~&^])")


def plain(text: str) -> str:
    """A text of claims.toml or a docstring; none of its characters is markup."""
    return MARKUP.sub(r"\\\1", " ".join(text.split()))


def claim_section(claim: Claim) -> str:
    """A section whose anchor is the id of the claim, with a hyphen in place of each slash."""
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


def insert(app, docname: str, content: list[str]) -> None:
    if BLOCK in content[0]:
        content[0] = content[0].replace(BLOCK, markdown())


def setup(app):
    app.connect("source-read", insert)
    return {"parallel_read_safe": True}
