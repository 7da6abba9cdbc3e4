"""The directive `command-help`: the help of every command, as the commands print it, in a section for each."""

import contextlib
import io
import os

from docutils import nodes
from docutils.parsers.rst import Directive

from lindm.cli.main import GROUPS, main, module_of
from lindm_experiments.harness.experiments import experiment_names

COLUMNS = "88"


def help_of(*words: str) -> str:
    """What `lindm WORDS --help` prints."""
    out, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    try:
        with contextlib.redirect_stdout(out):
            code = main([*words, "--help"])
    except SystemExit as e:  # argparse ends the process after a help page
        code = e.code
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    if code:
        raise RuntimeError(f"lindm {' '.join(words)} --help ends with exit code {code}")
    return out.getvalue().rstrip()


def command_words(name: str) -> list[tuple[str, ...]]:
    """A command, with its subcommands or the experiments that it runs; (name,) alone where it has neither."""
    seconds = experiment_names() if name == "run" else getattr(module_of(name), "COMMANDS", ())
    return [(name,), *((name, second) for second in seconds)]


def section(title: str, *children: nodes.Node) -> nodes.section:
    made = nodes.section(ids=[nodes.make_id(title)], names=[nodes.fully_normalize_name(title)])
    return made.extend((nodes.title(title, title), *children)) or made


def literal(text: str) -> nodes.literal_block:
    return nodes.literal_block(text, text, language="text")


class CommandHelp(Directive):
    """Sections `lindm NAME` in the order of `lindm --help`."""

    def run(self) -> list[nodes.Node]:
        found: list[nodes.Node] = [literal(help_of())]
        for name in (name for names in GROUPS.values() for name in names):
            found += [section(f"lindm {' '.join(words)}", literal(help_of(*words))) for words in command_words(name)]
        return found


def setup(app):
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
