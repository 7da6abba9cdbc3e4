"""The solution of a stationary POMDP: bounds of its value, and a policy of alpha vectors."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from lindm.io.files import make_parent, write_atomic, write_json
from lindm.problems.stationary import StationaryPOMDP
from lindm.solvers.policy_graph import PolicyGraph, policy_graph

FORMAT = "lindm-policy-1"


@dataclass(frozen=True, kw_only=True, eq=False)
class StationarySolution:
    """A solved `StationaryPOMDP`: bounds of its value, and a policy that earns the lower one.

    The policy is a set of alpha vectors: it takes the action of the one whose product with the belief is largest. Over a finite
    horizon a vector serves with `least` stages to go and more, except in a stationary policy (`is_stationary`), also of
    a finite horizon whose end is too far away to matter.

    >>> solution = ld.solve_stationary(ld.read_stationary_pomdp("tiger.pomdp"), tolerance=1e-6)
    >>> round(solution.lower, 5), solution.first_action
    (19.37137, 'listen')
    """

    problem: StationaryPOMDP
    horizon: float  # stages, or inf
    lower: float  # certified lower bound of the value: the policy earns it
    upper: float  # certified upper bound of the value
    trials: int
    q_lower: np.ndarray  # [A] bounds of the action values at the start
    q_upper: np.ndarray  # [A]
    # [n, S] alpha vectors, with `least` stages to go; -1e300 in states from which the policy takes an action that is not legal
    vectors: np.ndarray
    actions: np.ndarray  # [n] the action of each
    successors: np.ndarray  # [n, O] the vector that earns what is promised, after each observation
    least: np.ndarray  # [n] fewest stages to go; inf in a stationary policy

    @property
    def is_stationary(self) -> bool:
        """Whether the policy is the same at every stage."""
        return bool(np.isinf(self.least).all())

    @property
    def first_action(self) -> int | str:
        """The first action of the policy, by name where actions have names."""
        action = int(self.q_lower.argmax())
        return self.problem.actions[action] if self.problem.actions else action

    @property
    def regret(self) -> float:
        """Upper bound of what the first action loses against the best one; 0 where it is certified to be best."""
        others = np.delete(self.q_upper, self.q_lower.argmax())
        return max(0.0, float(others.max(initial=-math.inf) - self.q_lower.max()))

    def act(self, belief: ArrayLike, stages: float | None = None) -> int:
        """The policy's action at a belief.

        Args:
          belief: [S].
          stages: to go. [default: all]

        >>> solution = ld.solve_stationary(ld.read_stationary_pomdp("tiger.pomdp"), tolerance=1e-6)
        >>> [solution.act(belief) for belief in ([0.5, 0.5], [0.001, 0.999])]
        [0, 1]
        """
        return int(self.actions[self.promises(belief, self.horizon if stages is None else stages).argmax()])

    def promises(self, belief: ArrayLike, stages: float) -> np.ndarray:
        """What each vector [n] is worth at a belief [S] with these stages to go; -inf where it needs more."""
        promised = self.vectors @ np.asarray(belief, float)
        if self.is_stationary:
            return promised
        # a vector with fewer stages is followed by anything, which earns at least the lowest reward
        left = total_discount(self.problem.discount, stages) - total_discount(self.problem.discount, self.least)
        return np.where(self.least <= stages, promised + self.problem.lowest_reward * left, -np.inf)

    def graph(self) -> PolicyGraph:
        """The policy as a graph, with its exact value; it may lose a tenth of the width of the bounds to be small.

        Raises:
          ValueError: it has too many nodes.
        """
        return policy_graph(self)

    def save(self, path: str | Path) -> None:
        """Write the policy to a file.

        .alpha: its alpha vectors as pomdp-solve writes them, for each the number of its action, then S values.
        .json: its graph, with the alpha vector of each node, which is the node's exact value, and the graph in words.

        Raises:
          ValueError: the name ends in something else; a file .alpha of a policy that changes with the stage; a graph that is too
            large.
          StorageError: the file cannot be written.

        >>> ld.solve_stationary(ld.read_stationary_pomdp("tiger.pomdp")).save("tiger.alpha")
        """
        path = Path(path)
        if path.suffix == ".json":
            make_parent(path)
            write_json(path, self.graph().describe() | {"lower": self.lower, "upper": self.upper}, FORMAT)
            return
        if path.suffix != ".alpha":
            raise ValueError(f"the path of a saved policy must end in .alpha or .json; got {str(path)!r}")
        if not self.is_stationary:
            rule = "an .alpha file holds one set of vectors, of an infinite horizon; this policy changes with the stage"
            raise ValueError(f"{rule}: save it as .json, with the vectors of each stage")
        rows = zip(self.actions.tolist(), self.vectors.tolist(), strict=True)
        make_parent(path)
        write_atomic(path, "\n".join(f"{a}\n{' '.join(map(repr, v))}\n" for a, v in rows))


def total_discount(discount: float, stages: np.ndarray | float) -> np.ndarray | float:
    """The value of a reward of one at each of so many stages."""
    if discount == 1:
        return stages
    return (1 - discount**stages) / (1 - discount)
