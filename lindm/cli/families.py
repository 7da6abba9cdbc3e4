"""`lindm families`: the families of problems, with their sizes and options."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from lindm.cli.option_parser import Command, Positional, options_of, wrap
from lindm.cli.problems import FAMILY_OPTIONS
from lindm.errors import unknown
from lindm.io.files import strict_json


@dataclass(frozen=True, kw_only=True)
class Families:
    """List the families of problems, or describe one: kind, sizes, options and source."""

    name: Annotated[str | None, Positional("FAMILY")] = None
    """Family to describe. [default: list all families]"""
    json: bool = False
    """Print JSON."""


def list_families(name: str | None = None) -> list[dict[str, Any]]:
    """The families of problems that `make` and `suite` know: name, kind, sizes, options and source.

    Args:
      name: of one family. [default: all]

    Returns:
      A dict for each, with the default sizes and the options by name: help, default, and flag of the command line (None: it is an
      option of `make` and `suite` alone).

    Raises:
      ValueError: an unknown name.

    >>> [facts["kind"] for facts in ld.list_families("maintenance")]
    ['mdp']
    """
    from lindm.evaluation.policies.registry import kind_of
    from lindm.families.registry import FAMILIES
    from lindm.families.suites import Suite
    from lindm.text import FAMILY_TEMPLATES

    if name is not None and name not in FAMILIES:
        raise ValueError(unknown("family", name, tuple(FAMILIES)))
    described, flags = [], {"horizon", "discount", "alpha", *FAMILY_OPTIONS}
    for family in FAMILIES.values() if name is None else (FAMILIES[name],):
        built: Any = family.build()
        problem = built.example if isinstance(built, Suite) else getattr(built, "problem", built)  # or a StationaryPOMDP itself
        parts = ("states", "actions", "observations", "models")
        sizes = {part: size for part in parts if (size := getattr(problem, f"num_{part}", None)) is not None}
        defaults = {option: getattr(built, option, None) for option in family.options}
        help = {o.name: o.help for o in options_of(family.help)} if isinstance(family.help, type) else family.help
        described.append(
            {
                "name": family.name,
                "kind": kind_of(built),
                "summary": family.summary,
                "sizes": sizes | {"horizon": getattr(problem, "horizon", None)},
                "options": {
                    name: {
                        "help": help[name],
                        "default": defaults[name],
                        "flag": f"--{name.replace('_', '-')}" if name in flags else None,
                    }
                    for name in family.options
                },
                "template": family.name if family.name in FAMILY_TEMPLATES else None,
                "source": _source(family.description),
                "description": family.description,
            }
        )
    return described


def _source(description: str) -> str | None:
    """The paragraph that names the source, in one line."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in description.split("\n\n"))
    return next((paragraph.removeprefix("Source: ") for paragraph in paragraphs if paragraph.startswith("Source: ")), None)


def run(options: Families) -> int:
    described = list_families(options.name)
    if options.json:
        print(strict_json(described if options.name is None else described[0]))
    elif options.name is None:
        rows = [(facts["name"], facts["kind"], _sizes(facts), facts["summary"]) for facts in described]
        rows.insert(0, ("family", "kind", "sizes", "what"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
        for *cells, summary in rows:
            print("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), summary]))
        print("\nS states, A actions, O observations, M models, H stages. `lindm families FAMILY` describes one.")
    else:
        _print_one(described[0])
    return 0


def _sizes(facts: Mapping[str, Any]) -> str:
    return " ".join(f"{part[0].upper()}={'inf' if size is None else size}" for part, size in facts["sizes"].items())


def _print_one(facts: Mapping[str, Any]) -> None:
    print(f"{facts['name']}: {facts['summary']}\n")
    for key, value in (("kind", facts["kind"]), ("sizes", _sizes(facts)), ("template", facts["template"])):
        if value is not None:
            print(f"{key:<9} {value}")
    for title, of_commands in (("Options", True), ("Options in Python alone (ld.make)", False)):
        chosen = {name: option for name, option in facts["options"].items() if bool(option["flag"]) == of_commands}
        if options := {option["flag"] or name: option for name, option in chosen.items()}:
            print(f"\n{title}:")
            _print_options(options)
    print()
    for paragraph in facts["description"].split("\n\n"):
        print("\n".join([*wrap(paragraph), ""]))


def _print_options(options: Mapping[str, Any]) -> None:
    width = max(map(len, options)) + 2
    for name, option in options.items():
        default = "" if option["default"] is None or "[default" in option["help"] else f" [default: {option['default']}]"
        first, *rest = wrap(f"{option['help']}{default}", width + 4) or [""]
        print(f"  {name:<{width}}{first}")
        for line in rest:
            print(" " * (width + 2) + line)


COMMAND = Command(
    name="families",
    options=Families,
    run=run,
    examples=("lindm families", "lindm families maintenance", "lindm families --json"),
)
