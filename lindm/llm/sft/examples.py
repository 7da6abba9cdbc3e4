"""Training examples from labeled datasets and files of rows, read to the end and checked before training.

    a directory of `lindm data make`   one document per query of each task: the demonstrations of the task, then the query, every
                                       step with its action; the labels are the oracle's actions
    files of rows                      conversations, prompts with completions, texts: the formats of `lindm.llm.sft.rows`, in the
                                       files of `lindm.llm.sft.row_files`

Examples are held out by group: whole tasks of a dataset, whose queries share demonstrations, or single rows of a file.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lindm.choices import Loss, Rewards
from lindm.datasets import Dataset, Task, documents, is_dataset
from lindm.datasets.text import TextFormat
from lindm.errors import DataError
from lindm.llm.sft.options import Supervise
from lindm.llm.sft.packing import philox_permutation
from lindm.llm.sft.row_files import find_files, find_parts
from lindm.llm.sft.rows import COLUMNS, row_examples
from lindm.llm.tokens import Example, Tokenizer, action_tokens, document_example
from lindm.text import Piece, Template

HELD_OUT = 2**64 - 1  # number of the permutation that selects held-out groups; no epoch has it

Progress = Callable[[int, int], None]
TaskDocument = tuple[Task, int, tuple[Piece, ...]]
"""A task, the number of one of its queries, and the text of that query with the demonstrations."""


def open_data(path: Path) -> Dataset | list[Path]:
    """The dataset in a directory, or the files of rows.

    Raises:
      ValueError: neither of them.
      DataError: the dataset is not finished or damaged; errors of `find_files`.
    """
    return Dataset(path) if is_dataset(path) else find_files(path)


def hold_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples: whole groups, by `split_indices`."""
    groups = list(dict.fromkeys(example.group for example in examples))
    _, held_out = split_indices(len(groups), fraction, seed)
    held_out_groups = {groups[i] for i in held_out}
    train, evaluation = [], []
    for example in examples:
        (evaluation if example.group in held_out_groups else train).append(example)
    return train, evaluation


def split_indices(n: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split 0 .. n-1 at random into (training, held-out) indices, each sorted; round(fraction * n) are held out, at least one if
    the fraction is not 0.

    Raises:
      ValueError: the fraction is not in [0, 1), or nothing would be left to train on.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be at least 0 and below 1; got {fraction}")
    k = max(round(fraction * n), 1) if fraction else 0
    if n - k < 1:
        raise ValueError(f"fraction must leave something to train; {fraction} of {n} leaves nothing")
    order = philox_permutation(n, seed, HELD_OUT)
    return sorted(order[k:].tolist()), sorted(order[:k].tolist())


def _checked(example: Example, max_tokens: int | None) -> Example:
    if not (example.target >= 0).any():
        raise DataError(f"{example.source}: no label to train on")
    if max_tokens is not None and (n := len(example.ids)) > max_tokens:
        raise DataError(f"{example.source}: must have at most {max_tokens} tokens, the length of a row; got {n}")
    return example


# --- datasets -----------------------------------------------------------------------------------------------------------------


def read_documents(dataset: Dataset, text: TextFormat, progress: Progress) -> Iterator[TaskDocument]:
    """`lindm.datasets.documents` with progress: (done, total) tasks."""
    for task, query, pieces in documents(dataset, text):
        if query == 0:
            progress(task.task, len(dataset))
        yield task, query, pieces
    progress(len(dataset), len(dataset))


def dataset_examples(
    dataset: Dataset,
    task_documents: Iterable[TaskDocument],
    tokenizer: Tokenizer,
    template: Template,
    supervise: Supervise,
    max_tokens: int | None,
    with_values: bool = False,
) -> list[Example]:
    """The examples of the documents of a dataset; each document is tokenized once.

    with_values: the examples have the oracle's action values. Raises: DataError where an action has several tokens.
    """
    actions = action_tokens(tokenizer, template, dataset.num_actions)
    if with_values and (several := [tokens for tokens in actions if len(tokens) > 1]):
        rule = "a loss of action values needs actions of one token each"
        raise DataError(
            f"{dataset.directory}: {rule}; with this tokenizer and template one has {len(several[0])}: use --template"
        )
    examples = []
    for task, query, pieces in task_documents:
        episodes = (*task.demonstrations, task.queries[query])
        labels, values = [episode.label for episode in episodes], [episode.Q for episode in episodes] if with_values else None
        source = f"{dataset.directory}: task {task.task}, query {query}"
        example = document_example(tokenizer, pieces, labels, actions, supervise, source, task.task, values)
        examples.append(_checked(example, max_tokens))
    return examples


# --- files --------------------------------------------------------------------------------------------------------------------


def check_file_options(
    template: str | Template | None, rewards: Rewards, names: bool, supervise: Supervise, loss: Loss = "action"
) -> None:
    """Raise ValueError for options that do not apply to files of rows."""
    options = {"template": template, "rewards": rewards if rewards == "hidden" else None, "names": names or None}
    options |= {"supervise": None if supervise == "all" else supervise, "loss": None if loss == "action" else loss}
    for option, got in options.items():
        if got is not None:
            raise ValueError(f"{option} must be left out for rows, which have their own texts and answers; got {got!r}")


def check_dataset_options(chat_template: Path | None, chat_template_kwargs: str | None) -> None:
    """Raise ValueError for options that do not apply to a dataset."""
    for option, got in {"chat_template": chat_template, "chat_template_kwargs": chat_template_kwargs}.items():
        if got is not None:
            raise ValueError(f"{option} must be left out for a dataset, whose texts are no conversations; got {str(got)!r}")


def file_examples(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    max_tokens: int | None,
    progress: Progress = lambda done, total: None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Example]:
    """The examples of files of rows, by `lindm.llm.sft.rows`."""
    examples: list[Example] = []
    parts, group = find_parts(paths), 0
    for done, part in enumerate(parts):
        progress(done, len(parts))
        for place, row in part.rows(COLUMNS):
            made = row_examples(tokenizer, row, place, group, chat_template_kwargs)
            if not made:
                raise DataError(f"{place}: no label to train on")
            examples += [_checked(example, max_tokens) for example in made]
            group += 1
    if not group:
        raise DataError(f"{paths[0]} has no rows")
    progress(len(parts), len(parts))
    return _with_weights(examples)


def _with_weights(examples: list[Example]) -> list[Example]:
    """All examples with weights, where one has them."""
    if all(example.weights is None for example in examples):
        return examples
    ones = (np.ones((example.target >= 0).sum(), np.float32) for example in examples)
    return [replace(e, weights=w) if e.weights is None else e for e, w in zip(examples, ones, strict=True)]
