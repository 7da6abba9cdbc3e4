"""The policy of a set of alpha vectors, over an infinite horizon."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lindm.evaluation.environments import PolicyTask
from lindm.evaluation.policy import Observation, Policy, one_hot
from lindm.problems.stationary import StationaryPOMDP
from lindm.solvers.alpha_file import read_alpha
from lindm.solvers.belief import normalize


class AlphaVectors(Policy):
    """The action of the alpha vector whose product with the belief is largest; the state is the beliefs at the histories.

    Args:
      problem: of which the vectors are.
      actions: [n] the action of each vector.
      vectors: [n, S] a value for each state.
    """

    def __init__(self, problem: StationaryPOMDP, actions: np.ndarray, vectors: np.ndarray):
        self.problem, self.actions, self.vectors = problem, actions, vectors

    @classmethod
    def read(cls, path: Path, problem: StationaryPOMDP) -> "AlphaVectors":
        """The policy of a file .alpha. DataError where it is none of a problem of these sizes."""
        return cls(problem, *read_alpha(path, problem.num_states, problem.num_actions))

    def init(self, tasks: Sequence[PolicyTask]) -> np.ndarray:
        return self.problem.rho[None]

    def step(self, state: np.ndarray, observation: Observation) -> tuple[np.ndarray, np.ndarray]:
        beliefs = state[observation.parent]
        if observation.stage:
            assert observation.action is not None and observation.observation is not None
            steps = zip(beliefs, observation.action, observation.observation, strict=True)
            beliefs = np.array(
                [normalize((b @ self.problem.P[a]) * self.problem.O[a][:, [o]].toarray()[:, 0])[0] for b, a, o in steps]
            )
        best = (beliefs @ self.vectors.T).argmax(-1)
        return beliefs, one_hot(self.actions[best], self.problem.num_actions)

    def q_bounds(self, state: np.ndarray, observation: Observation) -> tuple[np.ndarray, None]:
        """Lower bounds [n, A]: the largest product of a vector of the action with the belief; NaN where it has no vector."""
        products = state @ self.vectors.T
        lower = np.full((len(state), self.problem.num_actions), np.nan)
        for a in np.unique(self.actions):
            lower[:, a] = products[:, self.actions == a].max(-1)
        return lower, None
