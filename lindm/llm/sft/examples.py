"""What trains: labelled datasets and JSON-lines files, read to the end and checked before anything is trained.

    a directory of `lindm data make`   a document for each query of each task: the task's demonstrations, then that query, every
                                       step with its action; the labels are the oracle's
    a .jsonl file, a row a line        {"prompt", "completion"}, texts or lists of messages; or {"messages"}, a conversation:
                                       {"role", "content"} each, whose assistant's turns are trained

Some examples may be held out: of a dataset whole tasks, whose demonstrations are shared by their queries, of a file single rows.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lindm.choices import Rewards
from lindm.datasets import Dataset, TextFormat, is_dataset, text_format
from lindm.errors import DataError
from lindm.llm.chats import chat_example
from lindm.llm.sft.packing import philox_permutation
from lindm.llm.tokens import Example, Tokenizer, action_tokens, completion_example, document_example
from lindm.text import Template

ACCEPTED = 'a directory of `lindm data make`, or a .jsonl file with rows {"prompt", "completion"} or {"messages"}'
# keys of a row by which other trainers change what a chat template writes
UNUSED = ("tools", "documents", "chat_template_kwargs", "images")
HOLDING_OUT = 2**64 - 1  # the number of a permutation that is no epoch's

Progress = Callable[[int, int], None]


def examples(
    data: Path | Dataset,
    tokenizer: Tokenizer,
    *,
    template: str | Template | None = None,
    rewards: Rewards = "auto",
    names: bool = False,
    supervise: str = "all",
    first: int | None = None,
    last: int | None = None,
    length: int | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Example]:
    """All examples of `data`, in order; each has its task, or its row, as its group.

    Args:
      template, rewards, names: of a dataset, as in `lindm.datasets.text_format`.
      supervise: of a dataset, as in `document_example`.
      first, last: tasks, or rows, from `first` on and before `last`, counted from 0 [default: all].
      length: tokens that an example may have [default: any number].
      progress: hears (done, total) of tasks or rows.

    Raises:
      ValueError: data of another kind, an option that they have no use for, no example between first and last, and the errors
        of `lindm.datasets.text_format`.
      LindmError: bad data (3), naming the file and the line, or the task and the query: not JSON, a missing key, a wrong type,
        nothing to train on, too long, or what the tokenizer cannot write.
    """
    for name, n, least in (("first", first, 0), ("last", last, 1), ("length", length, 1)):
        if n is not None and n < least:
            raise ValueError(f"{name} must be at least {least}; got {n}")
    if not isinstance(data, Dataset) and is_dataset(data):
        data = Dataset(data)
    if isinstance(data, Dataset):
        text = text_format(data, template, rewards, names)
        found = _dataset_examples(data, tokenizer, text, supervise, (first, last), progress)
    elif data.is_file() and data.suffix == ".jsonl":
        of_datasets = {"template": template, "rewards": rewards if rewards == "hidden" else None, "names": names or None}
        of_datasets["supervise"] = None if supervise == "all" else supervise
        for option, got in of_datasets.items():
            if got is not None:
                raise ValueError(f"{option} must be left out for a .jsonl file, which has its own texts and answers; got {got!r}")
        found = _rows(data, tokenizer, (first, last), progress)
    else:
        raise ValueError(f"data must be {ACCEPTED}; got {data}")
    return [_fit(example, length) for example in found]


def held_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(what trains, what is held out): whole groups, `split` by the seed."""
    groups = list(dict.fromkeys(example.group for example in examples))
    _, held = split(len(groups), fraction, seed)
    out = {groups[i] for i in held}
    return [e for e in examples if e.group not in out], [e for e in examples if e.group in out]


def split(n: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """0 .. n-1 in two, each in order: the rest, and the nearest number to `fraction` n that was drawn, at least one if any.

    Raises:
      ValueError: a fraction that is not at least 0 and below 1, or of which nothing would be left to train.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be at least 0 and below 1; got {fraction}")
    k = max(round(fraction * n), 1) if fraction else 0
    if n - k < 1:
        raise ValueError(f"fraction must leave something to train; {fraction} of {n} leaves nothing")
    drawn = philox_permutation(n, seed, HOLDING_OUT)
    return sorted(drawn[k:].tolist()), sorted(drawn[:k].tolist())


def _fit(example: Example, length: int | None) -> Example:
    if not (example.target >= 0).any():
        raise DataError(f"{example.source}: there is nothing to train in it")
    if length is not None and (n := len(example.ids)) > length:
        raise DataError(f"{example.source}: must have at most {length} tokens, the length of a sequence; got {n}")
    return example


def _between(bounds: tuple[int | None, int | None], n: int, what: str) -> range:
    first, last = bounds[0] or 0, n if bounds[1] is None else bounds[1]
    if not first < last <= n:
        raise ValueError(f"first and last must be of the {n} {what}, the first before the last; got {first} and {last}")
    return range(first, last)


# --- datasets -----------------------------------------------------------------------------------------------------------------


def _dataset_examples(
    dataset: Dataset,
    tokenizer: Tokenizer,
    text: TextFormat,
    supervise: str,
    bounds: tuple[int | None, int | None],
    progress: Progress,
) -> Iterator[Example]:
    actions = action_tokens(tokenizer, text.template, dataset.num_actions)
    numbers = _between(bounds, len(dataset), "tasks")
    for i, task in enumerate(dataset):
        if i not in numbers:
            continue
        progress(i - numbers.start, len(numbers))
        for q, query in enumerate(task.queries):
            labels = [episode.label for episode in (*task.demonstrations, query)]
            source = f"{dataset.directory}: task {i}, query {q}"
            yield document_example(tokenizer, text.pieces(task, query), labels, actions, supervise, source, i)
    progress(len(numbers), len(numbers))


# --- files --------------------------------------------------------------------------------------------------------------------


def _rows(path: Path, tokenizer: Tokenizer, bounds: tuple[int | None, int | None], progress: Progress) -> Iterator[Example]:
    try:
        lines = [(number, line) for number, line in enumerate(path.read_bytes().splitlines(), start=1) if line.strip()]
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from e
    if not lines:
        raise DataError(f"{path} has no rows")
    rows = _between(bounds, len(lines), "rows")
    for i in rows:
        progress(i - rows.start, len(rows))
        number, line = lines[i]
        yield _of_row(tokenizer, line, f"{path}:{number}", i)
    progress(len(rows), len(rows))


def _of_row(tokenizer: Tokenizer, line: bytes, source: str, group: int) -> Example:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{source}: not JSON: {e}") from e
    if not isinstance(row, dict):
        raise DataError(f"{source}: a row must be an object; got {type(row).__name__}")
    if unused := [key for key in UNUSED if row.get(key)]:
        raise DataError(f"{source}: {unused[0]} must be left out: it has no effect here")
    keys = {key for key in ("messages", "prompt", "completion") if key in row}
    if keys == {"messages"}:
        return chat_example(tokenizer, row["messages"], source, group)
    if keys != {"prompt", "completion"}:
        had = ", ".join(map(repr, row)) or "none"
        raise DataError(f'{source}: a row must have the keys "prompt" and "completion", or the key "messages"; got {had}')
    prompt, completion = row["prompt"], row["completion"]
    if not prompt and not completion:
        raise DataError(f"{source}: prompt and completion must not both be empty")
    if isinstance(prompt, list) and isinstance(completion, list):
        return chat_example(tokenizer, [*prompt, *completion], source, group, first_trained=len(prompt))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise DataError(f"{source}: prompt and completion must both be texts or both be lists of messages")
    return completion_example(tokenizer, prompt, completion, source, group)
