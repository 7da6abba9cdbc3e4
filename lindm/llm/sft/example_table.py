"""Examples and the rows that they share, by number. What a run knows of all examples at once is a few numbers of each."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lindm.llm.sft import packing
from lindm.llm.tokens import Example


class ExampleTable(Protocol):
    """Examples that are read one at a time."""

    lengths: np.ndarray  # [n] int32, tokens
    num_labels: np.ndarray  # [n] int32
    groups: np.ndarray  # [n] uint64: examples of one group are held out together
    empty: Example  # without tokens; has weights and action values where the examples have them

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def digest(self, index: int) -> int:
        """`example_digest` of an example, which need not be read for it."""
        ...

    def end_tokens(self) -> tuple[int, ...]:
        """The last tokens of the trained answers, the most frequent first."""
        ...


class ListedExamples(ExampleTable):
    """Examples in memory."""

    def __init__(self, examples: Sequence[Example]):
        self.examples = examples
        self.lengths = np.array([len(e.ids) for e in examples], np.int32)
        self.num_labels = np.array([(e.target >= 0).sum() for e in examples], np.int32)
        self.groups = np.array([e.group for e in examples], np.uint64)
        first = examples[0]
        weights, values = (None if x is None else x[:0] for x in (first.weights, first.action_values))
        self.empty = empty_example(weights, values)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def digest(self, index: int) -> int:
        return example_digest(self.examples[index])

    def end_tokens(self) -> tuple[int, ...]:
        return by_frequency(last_trained(self.examples))


class Rows(Sequence[list[Example]]):
    """Rows of batches: the examples that share each of them.

    Attributes:
      tokens, labels: [R] of each row.
    """

    def __init__(self, table: ExampleTable, chosen: np.ndarray, max_tokens: int, pack: bool):
        """Rows of the examples with the numbers `chosen`: one each, or packed into rows of at most `max_tokens` tokens."""
        self.table, self.members = table, chosen
        self.starts = np.arange(len(chosen) + 1)
        if pack:
            packed, self.starts = packing.pack_rows(table.lengths[chosen], max_tokens)
            self.members = chosen[packed]
        self.tokens, self.labels = (
            np.add.reduceat(x[self.members], self.starts[:-1], dtype=np.int64) if len(chosen) else np.zeros(0, np.int64)
            for x in (table.lengths, table.num_labels)
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: Any) -> Any:  # a row, or those of a slice
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        return [self.table[i] for i in self.numbers(index)]

    def numbers(self, index: int) -> list[int]:
        """The numbers of the examples of a row, which are not read for it."""
        row = range(len(self))[index]
        return self.members[self.starts[row] : self.starts[row + 1]].tolist()


def empty_example(weights: np.ndarray | None = None, action_values: np.ndarray | None = None) -> Example:
    """An example without tokens, which fills no place of a row."""
    nothing = np.zeros(0, np.int32)
    return Example(nothing, nothing, "", action_values=action_values, weights=weights)


def example_digest(example: Example) -> int:
    """64 bits of the tokens and targets of an example, of weights other than 1 and of action values."""
    content = hashlib.blake2b(example.ids.tobytes() + example.target.tobytes(), digest_size=8)
    if example.weights is not None and (example.weights != 1).any():
        content.update(example.weights.tobytes())
    if example.action_values is not None:
        content.update(example.action_values.tobytes())
    return int.from_bytes(content.digest(), "little")


def last_trained(examples: Sequence[Example]) -> np.ndarray:
    """The last token of each trained answer. An answer that goes on to the last token of its example was truncated."""
    ends = ((e.target[:-1] >= 0) & (e.target[1:] < 0) for e in examples)
    return np.concatenate([np.zeros(0, np.int32), *(e.target[:-1][end] for e, end in zip(examples, ends, strict=True))])


def by_frequency(tokens: np.ndarray) -> tuple[int, ...]:
    """The distinct tokens, the most frequent first."""
    distinct, counts = np.unique(tokens, return_counts=True)
    return tuple(distinct[np.argsort(-counts, kind="stable")].tolist())
