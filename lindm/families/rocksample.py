"""RockSample: a rover among rocks of unknown worth.

Source: Smith and Simmons, *Heuristic search value iteration for POMDPs*, UAI 2004.

A rover knows its cell of a square grid and where the rocks are, but not which of them are good: each is with probability 1/2. It
moves north, south, east or west, samples the rock in its cell (+10 if the rock is good, which makes it bad, -10 if it is bad), or
checks a rock from afar. A check at the distance d is right with probability (1 + 2^(-d / 20)) / 2. Leaving the grid in the east
earns 10 and ends the episode; a move against another border and a sample without a rock change nothing and cost nothing.

The layout of 7 x 7 cells with 8 rocks is that of the literature (12,545 states; SARSOP reaches 21.27); other rocks are drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from lindm import validate
from lindm.families.suites import Sizes, Tables, TabularSuite
from lindm.problems.stationary import StationaryPOMDP

OPTIONS = {
    "horizon": "Number of stages, with dense tables. [default: without an end, sparse; 8 with split]",
    "split": "Rocks, their odds and the sensor are drawn for each task, in or out of distribution. [default: one problem]",
    "discount": "Discount factor. [default: 0.95; 1 with split]",
    "size": "Cells of a side of the grid. [default: 7; 3 with split]",
    "rocks": "Number of rocks; there are size^2 2^rocks + 1 states. [default: 8; 2 with split]",
    "layout": "Seed of the cells of the rocks, where the literature has none for this size. [default: 0]",
}
OBSERVATIONS = ("none", "good", "bad")
MOVES = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
HALF_DISTANCE = 20.0  # cells at which the advantage of a check over a guess has halved
LITERATURE = {(7, 8): ((2, 0), (0, 1), (3, 1), (6, 3), (2, 4), (3, 4), (5, 5), (1, 6))}  # cells (x, y) of the rocks
MAX_STATES = 1_000_000


def rocksample(
    size: int = 7,
    rocks: int = 8,
    *,
    layout: int = 0,
    discount: float = 0.95,
    half_distance: float = HALF_DISTANCE,
    good: float = 0.5,
) -> StationaryPOMDP:
    """The problem of the module's docstring; the rover starts in the middle of the west border.

    Args:
      size: cells of a side of the grid.
      rocks: number of rocks; there are size^2 2^rocks + 1 states.
      layout: seed of the cells of the rocks, where the literature has none for this size.
      discount: in [0, 1].
      half_distance: cells at which the advantage of a check over a guess has halved.
      good: probability that a rock is good.

    Raises:
      ValueError: a number is out of its range, or there would be more than a million states.
    """
    validate.count(size, "size")
    validate.count(rocks, "rocks")
    validate.count(layout, "layout", 0)
    validate.discount(discount)
    validate.positive(half_distance, "half_distance")
    validate.fraction(good, "good")
    if rocks > size**2 or size**2 * 2**rocks >= MAX_STATES:
        rule = f"a cell for each rock, and fewer than {MAX_STATES:,} states"
        raise ValueError(f"size and rocks must leave {rule}; got {size} and {rocks}")
    cells = LITERATURE.get((size, rocks)) if layout == 0 else None
    if cells is None:
        drawn = np.random.default_rng([layout, size, rocks]).choice(size**2, rocks, replace=False)
        cells = tuple((int(cell) % size, int(cell) // size) for cell in sorted(drawn))
    y, x, worth = (part.ravel() for part in np.indices((size, size, 2**rocks)))
    S, end = len(x) + 1, len(x)

    def state(x: np.ndarray, y: np.ndarray, worth: np.ndarray) -> np.ndarray:
        return (y * size + x) * 2**rocks + worth

    nexts, rewards = [], np.zeros((S, len(MOVES) + 1 + rocks))
    for a, (dx, dy) in enumerate(MOVES.values()):
        out = x + dx == size
        after = state(np.clip(x + dx, 0, size - 1), np.clip(y + dy, 0, size - 1), worth)
        nexts.append(np.where(out, end, after))
        rewards[:end, a] = 10.0 * out
    good_here, here = np.zeros(end, int), np.zeros(end, bool)  # the bit of a good rock in the cell; whether there is a rock
    for i, cell in enumerate(cells):
        there = (x == cell[0]) & (y == cell[1])
        here |= there
        good_here[there] = worth[there] & (1 << i)
    nexts.append(state(x, y, worth - good_here))
    rewards[:end, len(MOVES)] = np.where(here, np.where(good_here > 0, 10.0, -10.0), 0.0)
    nothing = sparse.csr_array(np.tile([1.0, 0.0, 0.0], (S, 1)))
    O = [nothing] * len(nexts)
    for i, cell in enumerate(cells):
        nexts.append(np.arange(end))
        right = (1 + 2 ** (-np.hypot(x - cell[0], y - cell[1]) / half_distance)) / 2
        says_good = np.where(worth & (1 << i), right, 1 - right)
        O.append(sparse.csr_array(np.append(np.stack([0 * right, says_good, 1 - says_good], axis=1), [[1.0, 0.0, 0.0]], axis=0)))
    rho = np.zeros(S)
    start = state(np.array(0), np.array(size // 2), np.arange(2**rocks))
    number_good = np.array([int(w).bit_count() for w in range(2**rocks)])
    rho[start] = good**number_good * (1 - good) ** (rocks - number_good)
    one, row = np.ones(S), np.arange(S)
    letters = ["".join("g" if w & (1 << i) else "b" for i in range(rocks)) for w in range(2**rocks)]
    return StationaryPOMDP(
        P=tuple(sparse.csr_array((one, (row, np.append(to, end))), shape=(S, S)) for to in nexts),
        O=tuple(O),
        r=rewards,
        rho=rho,
        discount=float(discount),
        states=(*(f"x{i}-y{j}-{w}" for j in range(size) for i in range(size) for w in letters), "end"),
        actions=(*MOVES, "sample", *(f"check-{i}" for i in range(rocks))),
        observations=OBSERVATIONS,
    )


# split -> ranges of the half distance of a check, and of the probability that a rock is good
LAWS = {"id": ((1.0, 4.0), (0.3, 0.7)), "ood": ((0.5, 1.0), (0.1, 0.4))}


@dataclass(frozen=True, kw_only=True)
class RockSample(TabularSuite):
    """A rover collects rocks of unknown worth, which it can check from afar, and leaves in the east.

    Source: T. Smith and R. Simmons, Heuristic search value iteration for POMDPs, UAI 2004.

    The cells of the rocks are drawn for each task, and with them the distance at which the advantage of a check over a guess has
    halved and the probability that a rock is good (`rocksample`). A good rock pays 10 and is then bad, a bad one costs 10, the
    exit pays 10; checks and moves are free, so it is the horizon, or the discount, that limits them. A move against another
    border than the east and a sample without a rock change nothing.
    """

    name: str = "rocksample"
    horizon: int = 8
    """Number of actions."""
    size: int = 3
    """Length of a side of the grid, in cells."""
    rocks: int = 2
    """Number of rocks."""

    def check(self) -> None:
        rocksample(validate.count(self.size, "size"), validate.count(self.rocks, "rocks"))

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.size**2 * 2**self.rocks + 1, len(MOVES) + 1 + self.rocks, len(OBSERVATIONS))

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        problem = rocksample(self.size, self.rocks)
        return {part: getattr(problem, part) for part in ("states", "actions", "observations")}

    def tables(self, rng: np.random.Generator) -> Sequence[Tables]:
        half_distance, good = (float(rng.uniform(*ranges)) for ranges in LAWS[self.split])
        layout = int(rng.integers(1, 2**31))
        problem = rocksample(self.size, self.rocks, layout=layout, half_distance=half_distance, good=good)
        P, O = np.stack([P.toarray() for P in problem.P], axis=1), np.stack([O.toarray() for O in problem.O])
        return [Tables(P=P, r=problem.r, rho=problem.rho, O=O)]
