"""The policy of a set of alpha vectors, over an infinite horizon."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from lindm.evaluation.environments import PolicyTask
from lindm.evaluation.policy import Observation, Policy, one_hot
from lindm.problems.stationary import StationaryPOMDP
from lindm.solvers.alpha_file import read_alpha
from lindm.solvers.alpha_values import MAX_BELIEFS, action_bounds, beliefs_after, best_vectors, policy_value_bounds
from lindm.solvers.policy_graph import PolicyGraph, earned_graph

MISSED = 0.01  # share of the promise at the start that vectors of this problem may miss: those of a solver that stopped early do
DOUBT_BELIEFS = 2000  # that are followed for an upper bound of what the vectors earn


class AlphaVectors(Policy):
    """The action of the alpha vector whose product with the belief is largest, among those whose action is legal there.

    The state is the beliefs at the histories.

    What a vector says of its value is a promise that a file makes: it holds in the problem of the vectors alone, which no such
    file names. Bounds of action values are therefore computed anew, in the problem that is given (`earned`).

    Args:
      problem: in which they are followed.
      actions: [n] the action of each vector.
      vectors: [n, S] a value for each state.
    """

    def __init__(self, problem: StationaryPOMDP, actions: np.ndarray, vectors: np.ndarray):
        self.problem, self.actions, self.vectors = problem, actions, vectors

    @classmethod
    def read(cls, path: Path, problem: StationaryPOMDP) -> "AlphaVectors":
        """The policy of a file .alpha or .policy. ValueError for an MDP; DataError for a file of no problem of these sizes."""
        if not problem.O:
            raise ValueError("problem must be a POMDP: alpha vectors are values over beliefs; got an MDP, without observations")
        return cls(problem, *read_alpha(path, problem.num_states, problem.num_actions))

    @property
    def promised(self) -> float:
        """What the vectors say of the value at the start, without an end."""
        return float((self.vectors @ self.problem.rho).max())

    @cached_property
    def earned(self) -> PolicyGraph | None:
        """The graph that follows the vectors from the start, with its exact value in this problem; None where it is too large.

        >>> tiger = ld.read_stationary_pomdp("tiger.pomdp")
        >>> ld.solve_stationary(tiger, tolerance=1e-6).save("tiger.alpha")
        >>> round(ld.load_alpha_vectors("tiger.alpha", tiger).earned.value, 5)
        19.37137
        """
        return earned_graph(self.problem, self.actions, self.vectors) if self.problem.discount < 1 else None

    @cached_property
    def doubt(self) -> str | None:
        """Why the vectors cannot be those of the problem that is given, or why there are no bounds; None: neither is so."""
        if self.earned is None:
            return "what the vectors earn is not computed: they are too many, or nothing is discounted; so there are no bounds"
        try:
            _, earned = self.value_bounds(tolerance=0.0, max_beliefs=DOUBT_BELIEFS)
        except ValueError:
            return "the vectors lead to a belief at which none of them has a legal action: they are of another problem"
        if self.promised - earned <= MISSED * max(abs(self.promised), abs(earned)):
            return None
        said = f"the vectors say that they earn {self.promised:.6g} from the start, and in this problem they earn"
        other = "they are of another problem or discount; the bounds are those of this one"
        return f"{said} at most {earned:.6g}: {other}"

    def value_bounds(self, *, tolerance: float = 1e-6, max_beliefs: int = MAX_BELIEFS) -> tuple[float, float]:
        """Certified bounds of what the policy earns without an end; exact where it reaches few beliefs.

        >>> tiger = ld.read_stationary_pomdp("tiger.pomdp")
        >>> ld.solve_stationary(tiger, tolerance=1e-6).save("tiger.alpha")
        >>> [round(bound, 5) for bound in ld.load_alpha_vectors("tiger.alpha", tiger).value_bounds()]
        [19.37137, 19.37137]
        """
        return policy_value_bounds(self.problem, self.actions, self.vectors, tolerance=tolerance, max_beliefs=max_beliefs)

    def init(self, tasks: Sequence[PolicyTask]) -> np.ndarray:
        return self.problem.rho[None]

    def step(self, state: np.ndarray, observation: Observation) -> tuple[np.ndarray, np.ndarray]:
        beliefs = state[observation.parent]
        if observation.stage:
            assert observation.action is not None and observation.observation is not None
            beliefs = beliefs_after(self.problem, beliefs, observation.action, observation.observation)
        best, _ = best_vectors(self.problem, self.actions, self.vectors, beliefs)
        return beliefs, one_hot(self.actions[best], self.problem.num_actions)

    def q_bounds(self, state: np.ndarray, observation: Observation) -> tuple[np.ndarray, None] | None:
        """Lower bounds [n, A] of the optimal action values: one step of lookahead, then the nodes of `earned`."""
        return None if self.earned is None else (action_bounds(self.problem, state, self.earned.values), None)
