"""How the episodes of a dataset become text: the template, and the fields that a text shows.

A text shows the state of an MDP; otherwise the observations, and the models that nature took. Rewards are an option: shown,
hidden, or auto, which shows them where the state is seen. Where the state is hidden, a reward may reveal of it what the oracle's
labels do not use, so that only demonstrations show rewards, never the query.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from lindm.choices import Rewards
from lindm.datasets.columns import STEP_FIELDS, Episode, Task
from lindm.datasets.reader import Dataset
from lindm.errors import unknown
from lindm.text import COMPACT, FAMILY_TEMPLATES, READABLE, Document, Piece, Step, Template, find_template, render
from lindm.text.grammar import SYMBOL_ARGUMENTS, Ambiguous

REWARDS: tuple[Rewards, ...] = get_args(Rewards)
NEEDED = {"mdp": ("state",), "pomdp": ("observation",), "apomdp": ("model", "observation")}


@dataclass(frozen=True)
class TextFormat:
    """How the texts of a dataset are written."""

    template: Template
    fields: frozenset[str]  # of a step, that demonstrations show

    @property
    def query_fields(self) -> frozenset[str]:
        """Fields of a step that the query shows: no rewards where the state is hidden."""
        return self.fields if "state" in self.fields else self.fields - {"reward"}

    def demonstrations(self, task: Task) -> tuple[tuple[Step, ...], ...]:
        """The demonstrations of a task as a text shows them."""
        return tuple(episode.steps(self.fields) for episode in task.demonstrations)

    def document(self, task: Task, query: Episode) -> Document:
        """The demonstrations of a task and one query, with every action."""
        return Document(self.demonstrations(task), query.steps(self.query_fields))

    def pieces(self, task: Task, query: Episode) -> tuple[Piece, ...]:
        """The text of `document`, in pieces."""
        return render(self.document(task, query), self.template)

    def demonstration_steps(self, steps: Sequence[Step]) -> tuple[Step, ...]:
        """Steps of a demonstration as a text shows them: fields that it does not show become None."""
        return _select(steps, self.fields)

    def query_steps(self, steps: Sequence[Step]) -> tuple[Step, ...]:
        """Steps of an episode in progress as a text shows them."""
        return _select(steps, self.query_fields)


def _select(steps: Sequence[Step], fields: frozenset[str]) -> tuple[Step, ...]:
    hidden: dict[str, Any] = dict.fromkeys(STEP_FIELDS - fields)
    return tuple(dataclasses.replace(step, **hidden) for step in steps)


def text_format(
    dataset: Dataset, template: str | Template | None = None, rewards: Rewards = "auto", names: bool = False
) -> TextFormat:
    """How to write the texts of a dataset.

    Args:
      template: compact, readable, a family's, such as maintenance, the path of a JSON or TOML file, or a template [default:
        compact, readable with names]. A family's implies names.
      rewards: shown, hidden, or auto (shown where the state is seen).
      names: use the problem's names in place of the template's symbols.

    Raises:
      ValueError: names of a dataset that has none, or that texts cannot be read back with; a template without a field that the
        problem needs, or with too few symbols; unknown rewards.
      DataError: the file holds no template.
    """
    check_rewards(rewards)
    template = find_template(template) or (READABLE if names else COMPACT)
    if dataset.illegal_actions:
        template = template.with_legal_actions()
    if names or (template.name in FAMILY_TEMPLATES and dataset.names):
        if not dataset.names:
            raise ValueError(f"names must be left out: the dataset {dataset.directory} has no names; got {names!r}")
        template = with_names(template, dataset.names)
    shown = set(template.grammar.fields)
    if missing := [field for field in NEEDED[dataset.kind] if field not in shown]:
        raise ValueError(f"template must have {{{missing[0]}}} in its step for this dataset; {template.name!r} does not have it")
    if dataset.kind != "mdp":
        shown -= {"state"}
    if rewards == "hidden" or (rewards == "auto" and dataset.kind != "mdp"):
        shown -= {"reward"}
    for field, part in SYMBOL_ARGUMENTS.items():
        table, n = getattr(template, part), getattr(dataset, f"num_{part}")
        if field in shown and isinstance(table, tuple) and len(table) < n:  # a pattern has a symbol for every index
            use = "names or a template of your own" if part in dataset.names else "a template of your own"
            raise ValueError(f"template {template.name!r} has {len(table)} {field} symbols and the dataset {n} {part}; use {use}")
    return TextFormat(template, frozenset(shown))


def check_rewards(rewards: str) -> None:
    """ValueError for a value that is not one of `Rewards`."""
    if rewards not in REWARDS:
        raise ValueError(unknown("rewards", rewards, REWARDS))


def with_names(template: Template, names: Mapping[str, Sequence[str]]) -> Template:
    """The template with the names of a problem as its symbols, where it has such symbols and the problem has names.

    Raises:
      ValueError: texts with these names could be read in two ways.
    """
    given = {part: tuple(words) for part, words in names.items() if words and getattr(template, part) is not None}
    if "actions" in given and template.action_symbol(0).startswith(" "):
        given["actions"] = tuple(f" {name}" for name in given["actions"])  # a symbol brings its own leading space
    changes: dict[str, Any] = {**given}
    try:
        return dataclasses.replace(template, **changes)
    except Ambiguous as e:
        another = "a template of your own" if template.name == READABLE.name else "another template, such as readable"
        raise ValueError(f"with names {e}; try {another}") from e


def documents(dataset: Dataset, text: TextFormat) -> Iterator[tuple[Task, int, tuple[Piece, ...]]]:
    """Every text of a dataset: the task, the number of its query, and the pieces of the text."""
    for task in dataset:
        for number, query in enumerate(task.queries):
            yield task, number, text.pieces(task, query)
