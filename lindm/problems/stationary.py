"""POMDPs whose rewards and kernels are the same at every stage, with a discount: for long and for infinite horizons."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from lindm import validate
from lindm.problems.cassandra import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class StationaryPOMDP:
    """POMDP without a horizon of its own; the first action is chosen at the belief rho, before anything is observed.

    The value is the expected sum of discount^h times the reward of stage h. Arrays are on the host, kernels are sparse.

    >>> tiger = ld.read_stationary_pomdp("tiger.pomdp")
    >>> tiger.num_states, tiger.num_observations, tiger.discount
    (2, 2, 0.95)
    """

    P: tuple[sparse.csr_array, ...]  # for each action [S, S]: probability of the next state
    O: tuple[sparse.csr_array, ...]  # for each action [S, O]: probability of the observation, given the state that it led to
    r: np.ndarray  # [S, A] mean reward, not discounted
    rho: np.ndarray  # [S] law of the first state
    discount: float  # in [0, 1]
    states: tuple[str, ...] = ()  # names, in the order of the indices
    actions: tuple[str, ...] = ()
    observations: tuple[str, ...] = ()

    @property
    def num_states(self) -> int:
        return self.r.shape[0]

    @property
    def num_actions(self) -> int:
        return self.r.shape[1]

    @property
    def num_observations(self) -> int:
        return self.O[0].shape[1]


def stationary(model: Model, discount: float | None = None) -> StationaryPOMDP:
    """The POMDP of a file.

    Args:
      discount: in place of the file's.

    Raises:
      ValueError: the discount is not in [0, 1].
    """
    gamma = model.discount if discount is None else discount
    validate.discount(gamma)
    return StationaryPOMDP(
        P=tuple(sparse.csr_array(P) for P in model.P.swapaxes(0, 1)),
        O=tuple(sparse.csr_array(O) for O in model.O),
        r=model.r,
        rho=model.start,
        discount=float(gamma),
        states=model.states,
        actions=model.actions,
        observations=model.observations,
    )
