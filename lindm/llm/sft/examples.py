"""Training examples from labeled datasets and JSON-lines files, read to the end and checked before training.

    a directory of `lindm data make`   one document per query of each task: the demonstrations of the task, then the query, every
                                       step with its action; the labels are the oracle's actions
    a .jsonl file, one row per line    {"prompt", "completion"}, texts or lists of messages; or {"messages"}, a conversation of
                                       {"role", "content"}, whose assistant turns are trained

Examples are held out by group: whole tasks of a dataset, whose queries share demonstrations, or single rows of a file.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from lindm.choices import Rewards
from lindm.datasets import Dataset, Task, documents, is_dataset
from lindm.datasets.text import TextFormat
from lindm.errors import DataError
from lindm.io import inputs, limits
from lindm.llm.chats import chat_example
from lindm.llm.sft.options import Supervise
from lindm.llm.sft.packing import philox_permutation
from lindm.llm.tokens import Example, Tokenizer, action_tokens, completion_example, document_example
from lindm.text import Piece, Template

ACCEPTED = 'a directory of `lindm data make`, or a .jsonl file with rows {"prompt", "completion"} or {"messages"}'
# keys with which other trainers change what a chat template writes
UNSUPPORTED = ("tools", "documents", "chat_template_kwargs", "images")
HELD_OUT = 2**64 - 1  # number of the permutation that selects held-out groups; no epoch has it

Progress = Callable[[int, int], None]
TaskDocument = tuple[Task, int, tuple[Piece, ...]]
"""A task, the number of one of its queries, and the text of that query with the demonstrations."""


def open_data(path: Path) -> Dataset | Path:
    """The dataset in a directory, or the path of a .jsonl file.

    Raises:
      ValueError: neither of them.
      DataError: the dataset is not finished or damaged.
    """
    if is_dataset(path):
        return Dataset(path)
    if path.is_file() and path.suffix == ".jsonl":
        return path
    raise ValueError(f"data must be {ACCEPTED}; got {path}")


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
) -> list[Example]:
    """The examples of the documents of a dataset; each document is tokenized once."""
    actions = action_tokens(tokenizer, template, dataset.num_actions)
    examples = []
    for task, query, pieces in task_documents:
        labels = [episode.label for episode in (*task.demonstrations, task.queries[query])]
        source = f"{dataset.directory}: task {task.task}, query {query}"
        example = document_example(tokenizer, pieces, labels, actions, supervise, source, task.task)
        examples.append(_checked(example, max_tokens))
    return examples


# --- files --------------------------------------------------------------------------------------------------------------------


def check_file_options(template: str | Template | None, rewards: Rewards, names: bool, supervise: Supervise) -> None:
    """Raise ValueError for options that do not apply to a .jsonl file."""
    options = {"template": template, "rewards": rewards if rewards == "hidden" else None, "names": names or None}
    options["supervise"] = None if supervise == "all" else supervise
    for option, got in options.items():
        if got is not None:
            raise ValueError(f"{option} must be left out for a .jsonl file, which has its own texts and answers; got {got!r}")


def read_file(path: Path) -> bytes:
    """The content of a file; DataError where it cannot be read."""
    return inputs.read_bytes(path, limits.LINES_FILE)


def file_examples(
    path: Path, content: bytes, tokenizer: Tokenizer, max_tokens: int | None, progress: Progress = lambda done, total: None
) -> list[Example]:
    """The examples of a .jsonl file with this content."""
    lines = [(number, line) for number, line in enumerate(content.splitlines(), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{path} has no rows")
    examples = []
    for i, (number, line) in enumerate(lines):
        progress(i, len(lines))
        examples.append(_checked(_row_example(tokenizer, line, f"{path}:{number}", i), max_tokens))
    progress(len(lines), len(lines))
    return examples


def _row_example(tokenizer: Tokenizer, line: bytes, source: str, group: int) -> Example:
    row = inputs.parse_json_line(line, source)
    if not isinstance(row, dict):
        raise DataError(f"{source}: a row must be an object; got {type(row).__name__}")
    if unsupported := [key for key in UNSUPPORTED if row.get(key)]:
        raise DataError(f"{source}: {unsupported[0]} must be left out: it has no effect here")
    keys = {key for key in ("messages", "prompt", "completion") if key in row}
    if keys == {"messages"}:
        return chat_example(tokenizer, row["messages"], source, group)
    if keys != {"prompt", "completion"}:
        got = ", ".join(map(repr, row)) or "none"
        raise DataError(f'{source}: a row must have the keys "prompt" and "completion", or the key "messages"; got {got}')
    prompt, completion = row["prompt"], row["completion"]
    if not prompt and not completion:
        raise DataError(f"{source}: prompt and completion must not both be empty")
    if isinstance(prompt, list) and isinstance(completion, list):
        return chat_example(tokenizer, [*prompt, *completion], source, group, first_trained=len(prompt))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise DataError(f"{source}: prompt and completion must both be texts or both be lists of messages")
    return completion_example(tokenizer, prompt, completion, source, group)
