"""The policy of a set of alpha vectors, over an infinite horizon."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lindm.evaluation.environments import PolicyTask
from lindm.evaluation.policy import Observation, Policy, one_hot
from lindm.problems.stationary import StationaryPOMDP
from lindm.solvers.alpha_file import read_alpha
from lindm.solvers.alpha_values import MAX_BELIEFS, best_vectors, policy_value_bounds
from lindm.solvers.belief import normalize
from lindm.solvers.legal_supports import without_bound


class AlphaVectors(Policy):
    """The action of the alpha vector whose product with the belief is largest, among those whose action is legal there.

    The state is the beliefs at the histories.

    Args:
      problem: of which the vectors are.
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
            steps = zip(beliefs, observation.action, observation.observation, strict=True)
            beliefs = np.array([normalize(self._joint(belief, a)[:, o])[0] for belief, a, o in steps])
        best, _ = best_vectors(self.problem, self.actions, self.vectors, beliefs)
        return beliefs, one_hot(self.actions[best], self.problem.num_actions)

    def q_bounds(self, state: np.ndarray, observation: Observation) -> tuple[np.ndarray, None]:
        """Lower bounds [n, A]: what an action earns if the vectors are followed afterwards, by one step of lookahead."""
        problem = self.problem
        lower = state @ problem.r
        for row, belief in enumerate(state):
            for a in range(problem.num_actions):
                lower[row, a] += problem.discount * (self.vectors @ self._joint(belief, a)).max(0).sum()
        return without_bound(np.where(problem.legal_at(state), lower, -np.inf)), None

    def _joint(self, belief: np.ndarray, a: int) -> np.ndarray:
        """The joint measure [S, O] of the next state and the observation after an action."""
        return (belief @ self.problem.P[a])[:, None] * self.problem.O[a].toarray()
