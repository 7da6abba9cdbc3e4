"""The solution of a stationary POMDP: bounds of its value, and a policy of alpha vectors."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from lindm.io.files import write_atomic
from lindm.problems.stationary import StationaryPOMDP


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
    vectors: np.ndarray  # [n, S] alpha vectors, with `least` stages to go
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
        stages = math.inf if self.is_stationary else self.horizon if stages is None else stages
        promised = self.vectors @ np.asarray(belief, float)
        if stages < math.inf:  # vectors with different `least` compare after the shift to non-negative rewards
            promised = promised - float(self.problem.r.min()) * total_discount(self.problem.discount, self.least)
        return int(self.actions[np.where(self.least <= stages, promised, -np.inf).argmax()])

    def save(self, path: str | Path) -> None:
        """Write the policy as alpha vectors in the format of pomdp-solve: for each, the number of its action, then S values.

        Raises:
          ValueError: the name does not end in .alpha, or the horizon is finite.
          StorageError: the file cannot be written.

        >>> ld.solve_stationary(ld.read_stationary_pomdp("tiger.pomdp")).save("tiger.alpha")
        """
        if Path(path).suffix != ".alpha":
            raise ValueError(f"the path of a saved policy must end in .alpha; got {str(path)!r}")
        if not self.is_stationary:
            raise ValueError(
                "an .alpha file holds one set of vectors, of an infinite horizon; this policy changes with the stage"
            )
        rows = zip(self.actions.tolist(), self.vectors.tolist(), strict=True)
        write_atomic(Path(path), "\n".join(f"{a}\n{' '.join(map(repr, v))}\n" for a, v in rows))


def total_discount(discount: float, stages: np.ndarray | float) -> np.ndarray | float:
    """The value of a reward of one at each of so many stages."""
    if discount == 1:
        return stages
    return (1 - discount**stages) / (1 - discount)
