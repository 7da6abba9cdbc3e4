"""Training examples from labeled datasets and files of rows, read to the end and checked before training.

    a directory of `lindm data make`   one document per query of each task: the demonstrations of the task, then the query, every
                                       step with its action; the labels are the oracle's actions, or with the loss behavior
                                       those that the demonstrator took
    files of rows                      conversations, prompts with completions, texts: the formats of `lindm.llm.sft.rows`, in the
                                       files of `lindm.llm.sft.row_files`

Examples are held out by group: whole tasks of a dataset, whose queries share demonstrations, or equal rows of a file, or its rows
with the same value in a column.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lindm.choices import Loss, Overlong, Rewards
from lindm.datasets import Dataset, Task, documents, is_dataset
from lindm.datasets.text import TextFormat
from lindm.errors import DataError
from lindm.llm.sft.options import Supervise
from lindm.llm.sft.packing import philox_permutation
from lindm.llm.sft.row_files import Part, RowPlace, find_files
from lindm.llm.sft.rows import COLUMNS, row_examples
from lindm.llm.tokens import Example, Tokenizer, action_tokens, document_example
from lindm.text import Piece, Template

VALUE_LOSSES: tuple[Loss, ...] = ("soft", "regret")  # of the oracle's action values
HELD_OUT = 2**64 - 1  # number of the permutation that selects held-out groups; no epoch has it

Progress = Callable[[int, int], None]
TaskDocument = tuple[Task, int, tuple[Piece, ...]]
"""A task, the number of one of its queries, and the text of that query with the demonstrations."""


def open_data(path: Path, option: str = "data") -> Dataset | list[Path]:
    """The dataset in a directory, or the files of rows.

    Args:
      option: where the path was given, for errors.

    Raises:
      ValueError: neither of them.
      DataError: the dataset is not finished or damaged; errors of `find_files`.
    """
    return Dataset(path) if is_dataset(path) else find_files(path, option)


def held_out_mask(groups: np.ndarray, fraction: float, seed: int, hashed: bool) -> np.ndarray:
    """[n] Whether each example is held out: round(fraction x groups) whole groups, at least one if the fraction is not 0.

    Args:
      groups: [n] uint64. hashed: they are hashes of rows, and those are held out whose hash with the seed is smallest, which
        depends neither on the order of the rows nor, but for the last ones, on the other rows. Otherwise they are the numbers of
        tasks, and `split_indices` chooses.

    Raises:
      ValueError: the fraction is not in [0, 1), or nothing would be left to train on.
    """
    distinct, number = np.unique(groups, return_inverse=True)
    _, held_out = split_indices(len(distinct), fraction, seed)
    if hashed:
        held_out = np.argsort(_mixed(distinct, seed), kind="stable")[: len(held_out)]
    mask = np.zeros(len(distinct), bool)
    mask[held_out] = True
    return mask[number]


def _mixed(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Hashes [n] with a seed, as one-to-one functions of the hashes: the finalizer of SplitMix64 (Steele, Lea, Flood, 2014)."""
    x = hashes.astype(np.uint64) + np.random.Philox(key=np.array([seed, HELD_OUT], np.uint64)).random_raw(1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def row_group(row: dict[str, Any], key: str | None, place: object) -> int:
    """The group of a row, a hash of 64 bits: of its value in the column `key`, or of what is trained on, wherever it is stored.

    Raises: DataError for a row without the column.
    """
    value = {name: row[name] for name in COLUMNS if name in row} if key is None else row.get(key)
    if value is None:
        raise DataError(f"{place}: must have a value in the column {key!r}, by which rows are held out")
    text = json.dumps(value, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


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
        rule = "equal rows, and rows with one value of held_out_key, count as one"
        raise ValueError(f"held_out must leave something to train; {fraction} of {n} leaves nothing ({rule})")
    order = philox_permutation(n, seed, HELD_OUT)
    return sorted(order[k:].tolist()), sorted(order[:k].tolist())


@dataclass
class LengthLimit:
    """Fits examples to a number of tokens, and counts those that were too long.

    A truncated example keeps its first tokens, with the label of the last one; one without a label is left out.
    """

    max_length: int | None = None
    overlong: Overlong = "refuse"
    truncated: int = 0
    dropped: int = 0
    unlabeled: int = 0  # of the dropped ones: those that truncation left without a label
    endless: int = 0  # of the truncated ones: those whose last answer goes on beyond what is kept

    def fit(self, example: Example) -> list[Example]:
        """The example as it is trained, or none. Raises: DataError where it has no label or is refused."""
        if not (example.target >= 0).any():
            raise DataError(f"{example.source}: no label to train on")
        if self.max_length is None or (n := len(example.ids)) <= self.max_length:
            return [example]
        if self.overlong == "refuse":
            rule = f"must have at most {self.max_length} tokens, or --overlong must be truncate or drop"
            raise DataError(f"{example.source}: {rule}; got {n}")
        target = example.target[: self.max_length]
        labels = int((target >= 0).sum())
        if self.overlong == "drop" or not labels:
            self.dropped += 1
            self.unlabeled += self.overlong == "truncate"
            return []
        self.truncated += 1
        self.endless += bool(target[-1] >= 0 and example.target[self.max_length] >= 0)
        parts = {name: x[:labels] for name in ("weights", "action_values") if (x := getattr(example, name)) is not None}
        return [replace(example, ids=example.ids[: self.max_length], target=target, **parts)]

    @property
    def nothing_left(self) -> str:
        """Why no example is left, to follow the name of the data."""
        if self.unlabeled:
            return f"nothing is left to train: after truncation to {self.max_length} tokens no document has a trained token"
        return f"nothing is left to train: all {self.dropped} documents have more than {self.max_length} tokens"

    @property
    def counts(self) -> dict[str, int]:
        """{"truncated", "dropped"}, those that are not 0."""
        return {name: n for name in ("truncated", "dropped") if (n := getattr(self, name))}


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
    limit: LengthLimit,
    loss: Loss = "action",
) -> list[Example]:
    """The examples of the documents of a dataset; each document is tokenized once.

    With the loss behavior, a label is the action that was taken. It is trained where the demonstrator acted: in demonstrations,
    and in queries if their behavior policy is the same. With soft and regret the examples have the oracle's action values.

    Raises:
      ValueError: no episode that is trained has actions of the demonstrator.
      DataError: an action has several tokens, and the loss is one of action values.
    """
    with_values = loss in VALUE_LOSSES
    demonstrators, queries = dataset.config.exploration  # probabilities of a random action
    if loss == "behavior" and supervise == "query" and demonstrators != queries:
        rule = "supervise must be all with loss behavior, unless queries have the behavior policy of the demonstrations"
        got = f"random actions with probability {queries} in queries and {demonstrators} in demonstrations"
        raise ValueError(f"{rule}; {dataset.directory} has {got}")
    actions = action_tokens(tokenizer, template, dataset.num_actions)
    if with_values and (several := [tokens for tokens in actions if len(tokens) > 1]):
        rule = "a loss of action values needs actions of one token each"
        raise DataError(
            f"{dataset.directory}: {rule}; with this tokenizer and template one has {len(several[0])}: use --template"
        )
    examples = []
    for task, query, pieces in task_documents:
        episodes = (*task.demonstrations, task.queries[query])
        labels: list[list[int] | None] = [episode.action if loss == "behavior" else episode.label for episode in episodes]
        if loss == "behavior" and demonstrators != queries:
            labels[-1] = None
        values = [episode.Q for episode in episodes] if with_values else None
        source = f"{dataset.directory}: task {task.task}, query {query}"
        example = document_example(tokenizer, pieces, labels, actions, supervise, source, task.task, values)
        examples += limit.fit(example)
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
            got = "" if got is True else f"; got {got!r}"
            raise ValueError(f"{option} must be left out for rows, which have their own texts and answers{got}")


def check_dataset_options(chat_template: Path | None, chat_template_kwargs: str | None, held_out_key: str | None) -> None:
    """Raise ValueError for options that do not apply to a dataset."""
    options = {"chat_template": chat_template, "chat_template_kwargs": chat_template_kwargs, "held_out_key": held_out_key}
    for option, got in options.items():
        if got is not None:
            raise ValueError(f"{option} must be left out for a dataset, which has tasks and no conversations; got {str(got)!r}")


def part_examples(
    part: Part,
    tokenizer: Tokenizer,
    limit: LengthLimit,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    held_out_key: str | None = None,
) -> Iterator[tuple[RowPlace, list[Example]]]:
    """The examples of each row of a part, by `lindm.llm.sft.rows`; none of a row that is left out because it is too long."""
    columns = COLUMNS if held_out_key is None else (*COLUMNS, held_out_key)
    for place, row in part.rows(columns):
        group = row_group(row, held_out_key, place) if isinstance(row, dict) else 0
        made = row_examples(tokenizer, row, place, group, chat_template_kwargs)
        if not any((example.target >= 0).any() for example in made):
            is_chat = "messages" in row or "conversations" in row or isinstance(row.get("prompt"), list)
            raise DataError(f"{place}: {'no message of the assistant is trained' if is_chat else 'no label to train on'}")
        yield place, [fitted for example in made for fitted in limit.fit(example)]
