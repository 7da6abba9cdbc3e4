r"""Large files in Cassandra's `.pomdp` format (`lindm.problems.cassandra`), in memory that grows with what they write.

The entries of a table are cells (row, column, number) in their order, and the last one counts; an entry that writes whole rows
makes the cells before it void. Rewards are taken at the transitions and observations that are possible, and nowhere else.
"""

import warnings
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse

from lindm.errors import DataError
from lindm.problems import cassandra
from lindm.problems.cassandra import SUM_TOLERANCE
from lindm.problems.cassandra_rewards import count_writes
from lindm.problems.cassandra_sections import PLACES, ROUNDING, Section, find, quote, read_numbers, read_sections, read_states

CELLS = 50_000_000  # of a table that are kept, of 24 bytes each


class SparseModel(NamedTuple):
    """The POMDP or MDP of a file, as `cassandra.Model`, with a sparse matrix for each action."""

    states: tuple[str, ...]
    actions: tuple[str, ...]
    observations: tuple[str, ...]
    discount: float
    P: tuple[sparse.csr_array, ...]  # [S, S] for each action
    O: tuple[sparse.csr_array, ...]  # [S, O] for each action; none of an MDP
    r: np.ndarray  # [S, A]
    start: np.ndarray  # [S]
    legal: np.ndarray | None = None  # [S, A] bool; None: every action is legal
    # what is paid, of each action: [S, S] by the next state, or [S, S O] with the column next state * O + observation, at the
    # transitions that are possible; None where that is r
    rewards: tuple[sparse.csr_array, ...] | None = None


class _Cell(NamedTuple):
    """The part of a table that an entry names: None for all, also of places that it leaves out."""

    places: tuple[int | None, ...]
    given: int  # places that it names
    word: str  # uniform, identity, reset, or empty where there are numbers
    first: int  # token of the first number


class _Table:
    """The cells of a table [A, n, m]."""

    def __init__(self, actions: int, rows: int, columns: int):
        self.shape = (rows, columns)
        self.cells = [(array("q"), array("q"), array("d")) for _ in range(actions)]
        self.void = np.zeros((actions, rows), int)  # cells before this number count no more
        self.lines = np.zeros((actions, rows), int)  # where the row was written last
        self.count = 0

    def write(self, entry: Section, cell: _Cell, start: np.ndarray) -> None:
        """The cells of an entry; one that writes whole rows leaves zeros out."""
        (n, m), (action, row, column) = self.shape, cell.places
        rows = np.arange(n) if row is None else np.array([row])
        whole = column is None
        if cell.word == "identity":
            part = (rows, rows, np.ones(n))
        elif cell.given == 1 and not cell.word:
            table = read_numbers(entry, cell.first, (n, m))
            part = (*np.nonzero(table), table[np.nonzero(table)])
        else:
            if cell.word:
                numbers = np.full(m, 1 / m) if cell.word == "uniform" else start
            else:
                numbers = read_numbers(entry, cell.first, (m if cell.given == 2 else 1,))
            if whole:
                numbers = np.broadcast_to(numbers, (m,))
            columns = np.flatnonzero(numbers) if whole else np.array([column])
            values = numbers[columns] if whole else numbers
            self._reserve(len(rows) * len(columns), entry)
            part = (np.repeat(rows, len(columns)), np.tile(columns, len(rows)), np.tile(values, len(rows)))
        lines = entry.row_lines(n if cell.given == 1 else 1, m if cell.given < 3 else 1)
        for a in range(len(self.cells)) if action is None else (action,):
            self.lines[a, rows] = lines
            if whole:
                self.void[a, rows] = len(self.cells[a][0])
            self._reserve(len(part[0]), entry)
            self.count += len(part[0])
            for stored, new in zip(self.cells[a], part, strict=True):
                stored.frombytes(np.ascontiguousarray(new, stored.typecode).tobytes())

    def _reserve(self, cells: int, entry: Section) -> None:
        if self.count + cells > CELLS:
            raise entry.stop(f"the entries up to this one write more than {CELLS:,} numbers of a sparse table")

    def matrix(self, a: int) -> sparse.csr_array:
        """The table of an action."""
        rows, columns, values = (np.frombuffer(part, part.typecode) for part in self.cells[a])
        valid = np.flatnonzero(np.arange(len(rows)) >= self.void[a][rows])
        place = rows[valid] * self.shape[1] + columns[valid]
        kept = valid[len(valid) - 1 - np.unique(place[::-1], return_index=True)[1]]
        kept = kept[values[kept] != 0]
        return sparse.csr_array((values[kept], (rows[kept], columns[kept])), shape=self.shape)


def parse_sparse(text: str, name: str = "<text>") -> SparseModel:
    """The model in a text, as `cassandra.parse`, with the same rules and errors.

    Raises:
      DataError: as `cassandra.parse`; and for more than `CELLS` numbers in a table.
    """
    preamble, entries, last = read_sections(text, name)
    off: list[tuple[int, str]] = []
    head = cassandra.read_head(preamble, entries, last, off, lambda S, A, O: 10 * S * A)  # what is kept of each row
    S, A, O = (len(head.names[word]) for word in ("states", "actions", "observations"))
    tables = {"T": _Table(A, S, S), "O": _Table(A, S, O)}
    ends, illegal, rewards = np.zeros(S, bool), np.zeros((A, S), bool), []
    for entry in entries:
        if entry.word == "E":
            ends[read_states(entry, head.index["states"])] = True
            tables["T"].lines[:, ends] = entry.line
        elif entry.word == "illegal":
            where = cassandra.illegal_part(entry, head.index)
            illegal[where] = True
            tables["T"].lines[where] = entry.line
        elif entry.word == "R":
            rewards.append((entry, _cell(entry, head.index)))
        else:
            tables[entry.word].write(entry, _cell(entry, head.index), head.start)
    cassandra.check_legal(illegal, ends, head.names["states"], last)

    def rows(word: str, a: int) -> sparse.csr_array:
        table = tables[word].matrix(a)
        if word == "T":
            kept = (ends | illegal[a]).astype(float)
            table = sparse.csr_array(sparse.diags_array(1 - kept) @ table + sparse.diags_array(kept))
        title = f"{word} of action {head.names['actions'][a]!r}, state {{!r}}".format
        return _normalized(table, tables[word].lines[a], lambda s: title(head.names["states"][s]), last, off)

    P = tuple(rows("T", a) for a in range(A))
    seen = tuple(rows("O", a) for a in range(A)) if O else ()
    if off:
        line, row = min(off)
        more = f" (and {len(off) - 1} more that miss it)" if len(off) > 1 else ""
        warnings.warn(f"{name}:{line}: {row}, not to one{more}: scaled", UserWarning, stacklevel=2)
    sign, unpaid = -1.0 if head.costs else 1.0, ends | illegal  # [A, S]
    expected, paid = _rewards(rewards, P, seen, (S, O))
    r = np.where(unpaid.T, 0.0, sign * expected + 0.0)  # + 0.0: no cost is 0.0, not -0.0
    if paid is not None:
        paid = tuple(sparse.csr_array(sparse.diags_array(sign * ~none) @ R) for none, R in zip(unpaid, paid, strict=True))
    legal = ~illegal.T if illegal.any() else None
    kept = {"r": r, "start": head.start, "legal": legal, "rewards": paid}
    return SparseModel(**head.names, discount=head.discount, P=P, O=seen, **kept)


def _cell(entry: Section, index: dict[str, dict[str, int]]) -> _Cell:
    """The places of an entry, and where its numbers begin."""
    kinds, words, given = PLACES[entry.word], entry.words, 1
    while words[2 * given - 1 : 2 * given] == [":"]:
        given += 1
    least, at = (2 if entry.word == "R" and index["observations"] else 1), 2 * given - 1
    if not least <= given <= len(kinds) or len(words) < at:
        form, got = " : ".join(kind[:-1] for kind in kinds), " ".join(words[:at]) or "nothing"
        raise entry.stop(f"{entry.word!r} takes {least} to {len(kinds)} of {form}; got {quote(got)}", at - 1)
    named = [None if words[2 * i] == "*" else find(entry, 2 * i, kinds[i], index[kinds[i]]) for i in range(given)]
    free, word = len(kinds) - given, words[at] if len(words) == at + 1 else ""
    allowed = {"T": ("uniform", "reset", *["identity"] * (free == 2)), "O": ("uniform",), "R": ()}[entry.word] if free else ()
    return _Cell((*named, *[None] * free), given, word if word in allowed else "", at)


def _normalized(table: sparse.csr_array, lines: np.ndarray, title, last: Section, off: list) -> sparse.csr_array:
    """Rows that are nearly distributions become so; others are refused, with the line that wrote them."""
    sums = np.asarray(table.sum(1)).ravel()
    error = np.abs(sums - 1)
    for s in np.flatnonzero(error > ROUNDING):
        line, row = int(lines[s]), title(int(s))
        if not line:
            raise last.stop(f"{row} is missing: expected {table.shape[1]} probabilities that sum to one")  # pyright: ignore[reportOptionalSubscript]
        if error[s] > SUM_TOLERANCE + ROUNDING:
            raise DataError(f"{last.source}:{line}: {row} sums to {sums[s]:.9g}; expected one (within {SUM_TOLERANCE:g})")
        off.append((line, f"{row} sums to {sums[s]:.9g}"))
    return sparse.csr_array(sparse.diags_array(1 / np.where(error > ROUNDING, sums, 1.0)) @ table)


def _rewards(
    rewards: Sequence[tuple[Section, _Cell]],
    P: tuple[sparse.csr_array, ...],
    O: tuple[sparse.csr_array, ...],
    sizes: tuple[int, int],
) -> tuple[np.ndarray, tuple[sparse.csr_array, ...] | None]:
    """r [S, A], the expectation of R over the possible transitions and observations; and R as in `SparseModel`."""
    S, n = sizes
    lengths = (S, S, max(n, 1))  # of the places state, next state, observation
    by_o = any(cell.places[3] is not None or (cell.given < 4 and n > 1) for _, cell in rewards)
    by_next = by_o or any(cell.places[2] is not None or cell.given < 3 for _, cell in rewards)
    r, writes, tables = np.zeros((S, len(P))), 0, []
    for a, kernel in enumerate(P):
        at, weights = [np.arange(S)] * 3, np.ones(S)  # state, next state and observation of each possibility
        if by_next:
            entries = kernel.tocoo()
            at, weights = [entries.row, entries.col, np.zeros(entries.nnz, int)], entries.data
        if by_o:
            seen = O[a][at[1]].tocoo()
            at, weights = [at[0][seen.row], at[1][seen.row], seen.col], weights[seen.row] * seen.data
        order = np.argsort(at[0], kind="stable")
        at, weights = [part[order] for part in at], weights[order]
        first = np.searchsorted(at[0], np.arange(S + 1))
        paid = np.zeros(len(weights))
        for entry, cell in rewards:
            if cell.places[0] not in (None, a):
                continue
            state = cell.places[1]
            part = slice(0, len(paid)) if state is None else slice(int(first[state]), int(first[state + 1]))
            writes = count_writes(writes, part.stop - part.start, entry)
            values = read_numbers(entry, cell.first, lengths[cell.given - 1 :])
            chosen = values[tuple(place[part] for place in at[cell.given - 1 :])] if values.ndim else values
            for place, wanted in zip(at[1:], cell.places[2:], strict=True):
                if wanted is not None:
                    chosen = np.where(place[part] == wanted, chosen, paid[part])
            paid[part] = chosen
        least, most = np.minimum.reduceat(paid, first[:-1]), np.maximum.reduceat(paid, first[:-1])
        # a reward that is the same everywhere is exact
        r[:, a] = np.where(least == most, least, np.bincount(at[0], weights * paid, S))
        if by_next:
            columns = at[1] * n + at[2] if by_o else at[1]
            tables.append(sparse.csr_array((paid, (at[0], columns)), shape=(S, S * n if by_o else S)))
    return r, tuple(tables) if by_next else None
