"""Gridworlds: the way to a goal that is known, or that has to be found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lindm import validate
from lindm.families.suites import Sizes, Tables, TabularSuite

MOVES = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}  # in the order of a turn
# split -> share of cells that are walls, range of the probability to slip
LAWS = {"id": (0.15, (0.0, 0.2)), "ood": (0.25, (0.2, 0.4))}
LARGEST_DARK = 5  # a room of this size has 600 states


@dataclass(frozen=True, kw_only=True)
class Gridworld(TabularSuite):
    """An agent walks in a room with walls to a goal; with `dark`, it does not know where the goal is.

    Source: R. Sutton and A. Barto, Reinforcement Learning, 2018, chapters 3 and 4 (gridworlds); S. Russell and P. Norvig,
    Artificial Intelligence, chapter on sequential decisions (slips to the sides); M. Laskin and others, In-context
    reinforcement learning with algorithm distillation, ICLR 2023 (dark room).

    A move leads to the next cell, or with half of the probability `slip` to either side of that direction; a move against
    a wall or the edge leaves the agent where it is. The goal keeps whoever reaches it and pays 1 for every stage that
    begins there, so without slips the value of a cell is the number of stages minus its distance, or 0. Goal, walls and
    slip are drawn for each task; every free cell can be reached. Episodes begin in any other free cell.

    In the dark room the agent sees its own cell and whether that is the goal, and knows the walls and how likely each
    cell is to be the goal, a law that is drawn for each task (exponential weights). A state is the cell of the agent and
    that of the goal, and episodes begin in the middle of the room.
    """

    name: str = "gridworld"
    horizon: int = 8
    """Number of moves."""
    size: int | None = None
    """Length of a side of the room, in cells, at least 2. [default: 4, or 3 in the dark]"""
    dark: bool = False
    """Hide the goal: it is found where the agent walks into it."""
    slip: float | None = None
    """Probability that a move goes to a side. [default: drawn for each task]"""

    def check(self) -> None:
        if validate.count(self.side, "size", 2) > LARGEST_DARK and self.dark:
            raise ValueError(f"size must be at most {LARGEST_DARK} in the dark, where it makes size^4 states; got {self.size}")
        if self.slip is not None:
            validate.fraction(self.slip, "slip")

    @property
    def side(self) -> int:
        """The size of the room."""
        return (3 if self.dark else 4) if self.size is None else self.size

    @property
    def start(self) -> int:
        """The cell in the middle."""
        return (self.side // 2) * self.side + self.side // 2

    @property
    def sizes(self) -> Sizes:
        cells = self.side**2
        return Sizes(cells * (cells - 1), 4, cells + 1) if self.dark else Sizes(cells, 4)

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        cells = tuple(f"r{row}c{column}" for row in range(1, self.side + 1) for column in range(1, self.side + 1))
        if not self.dark:
            return {"states": cells, "actions": tuple(MOVES)}
        states = tuple(f"{cell}-goal-{goal}" for goal in self._hidden_goals() for cell in cells)
        return {"states": states, "actions": tuple(MOVES), "observations": (*cells, "goal")}

    def _hidden_goals(self) -> list[str]:
        n = self.side
        return [f"r{cell // n + 1}c{cell % n + 1}" for cell in range(n * n) if cell != self.start]

    def tables(self, rng: np.random.Generator) -> Sequence[Tables]:
        n = self.side**2
        share, slips = LAWS[self.split]
        slip = rng.uniform(*slips) if self.slip is None else self.slip
        free = _free_cells(rng, self.side, int(share * n), self.start)
        walk = _walk(free, slip)
        goals = [cell for cell in range(n) if free[cell] and cell != self.start]
        if not self.dark:
            goal = int(rng.choice(goals))
            P, r = _until(walk, goal)
            rho = free.astype(float)
            rho[goal] = 0
            return [Tables(P=P, r=r, rho=rho / rho.sum())]
        weights = rng.exponential(size=n) * free
        weights[self.start] = 0
        S, others = n * (n - 1), [cell for cell in range(n) if cell != self.start]
        P, r, rho, O = np.zeros((S, 4, S)), np.zeros((S, 4)), np.zeros(S), np.zeros((S, n + 1))
        for i, goal in enumerate(others):
            at = slice(i * n, (i + 1) * n)
            P[at, :, at], r[at] = _until(walk, goal)
            rho[at.start + self.start] = weights[goal] / weights.sum()
            O[at, :n] = np.eye(n)
            O[at.start + goal] = np.eye(n + 1)[n]
        return [Tables(P=P, r=r, rho=rho, O=np.broadcast_to(O, (4, S, n + 1)))]


def _free_cells(rng: np.random.Generator, size: int, walls: int, start: int) -> np.ndarray:
    """A room [size * size]: False where there is a wall. All free cells are connected, and the start is free."""
    others = [cell for cell in range(size * size) if cell != start]
    while True:
        free = np.ones(size * size, bool)
        free[rng.choice(others, walls, replace=False)] = False
        reached = np.zeros_like(free)
        reached[start] = True
        links = _walk(free, 0.0).sum(1) > 0
        for _ in range(size * size):
            reached |= links[reached].any(0)
        if (reached >= free).all():
            return free


def _walk(free: np.ndarray, slip: float) -> np.ndarray:
    """The law of the next cell, [cell, move, next cell]."""
    size, moves = int(np.sqrt(len(free))), list(MOVES.values())
    to = np.zeros((len(free), 4), int)
    for cell in range(len(free)):
        for move, (down, right) in enumerate(moves):
            row, column = cell // size + down, cell % size + right
            inside = 0 <= row < size and 0 <= column < size
            to[cell, move] = row * size + column if inside and free[row * size + column] else cell
    one = np.eye(len(free))
    turned = [one[np.roll(to, -turn, axis=1)] for turn in (0, 1, -1)]
    return (1 - slip) * turned[0] + slip / 2 * (turned[1] + turned[2])


def _until(walk: np.ndarray, goal: int) -> tuple[np.ndarray, np.ndarray]:
    """Moves and rewards with a goal that keeps the agent and pays 1 a stage."""
    P, r = walk.copy(), np.zeros(walk.shape[:2])
    P[goal], r[goal] = np.eye(len(walk))[goal], 1
    return P, r
