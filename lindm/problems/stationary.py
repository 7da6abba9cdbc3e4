"""POMDPs and MDPs whose rewards and kernels are the same at every stage, with a discount: for long and for infinite horizons."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO
from jax.typing import ArrayLike
from scipy import sparse

from lindm import validate
from lindm.errors import DataError
from lindm.io import inputs, limits
from lindm.io.limits import POMDP_TABLE
from lindm.problems import cassandra
from lindm.problems.cassandra import Model
from lindm.problems.cassandra_rewards import RewardEntries
from lindm.problems.cassandra_sparse import SparseModel, parse_sparse
from lindm.types import POMDP

DENSE = 2_000_000  # numbers of the tables of a file up to which they are read as dense ones


@dataclass(frozen=True, kw_only=True, eq=False)
class StationaryPOMDP:
    """POMDP without a horizon of its own; the first action is chosen at the belief rho, before anything is observed.

    Without observations (`O` empty) it is an MDP: every action is chosen in a state that is seen, also the first.
    The value is the expected sum of discount^h times the reward of stage h. Arrays are on the host, kernels are sparse.

    >>> tiger = ld.read_stationary_pomdp("tiger.pomdp")
    >>> tiger.num_states, tiger.num_observations, tiger.discount
    (2, 2, 0.95)
    """

    P: tuple[sparse.csr_array, ...]  # for each action [S, S]: probability of the next state
    O: tuple[sparse.csr_array, ...] = ()  # for each action [S, O]: of the observation, given the state it led to; none: an MDP
    r: np.ndarray  # [S, A] mean reward, not discounted
    rho: np.ndarray  # [S] law of the first state
    discount: float  # in [0, 1]
    states: tuple[str, ...] = ()  # names, in the order of the indices
    actions: tuple[str, ...] = ()
    observations: tuple[str, ...] = ()
    # what is paid: entries of a file; or for each action [S, S] by the next state, or [S, S O] with the column
    # next state * O + observation; None where that is r(s, a)
    rewards: RewardEntries | tuple[sparse.csr_array, ...] | None = None
    legal: np.ndarray | None = None  # [S, A] bool, the actions that a state allows; None: all

    def reward_table(self) -> np.ndarray:
        """R [1, S, A, S|1, O|1], what an environment pays. DataError where the table of a file is too large."""
        if self.rewards is None:
            return self.r[None, :, :, None, None]
        if isinstance(self.rewards, RewardEntries):
            return self.rewards.R()[None]
        if (total := sum(int(np.prod(cast("tuple[int, int]", R.shape))) for R in self.rewards)) > POMDP_TABLE:
            raise DataError(f"rewards of all actions make a table of {total:,} numbers; at most {POMDP_TABLE:,}")
        table = np.stack([R.toarray() for R in self.rewards], axis=1)
        return table.reshape(1, self.num_states, self.num_actions, self.num_states, -1)

    def legal_at(self, beliefs: np.ndarray) -> np.ndarray:
        """[n, A] bool, the actions that every state of positive probability in beliefs [n, S] allows."""
        if self.legal is None:
            return np.ones((len(beliefs), self.num_actions), bool)
        return (beliefs > 0).astype(float) @ (~self.legal).astype(float) == 0

    @property
    def lowest_reward(self) -> float:
        """The lowest mean reward of an action that is legal."""
        return float(self.r.min() if self.legal is None else self.r[self.legal].min())

    @property
    def num_states(self) -> int:
        return self.r.shape[0]

    @property
    def num_actions(self) -> int:
        return self.r.shape[1]

    @property
    def num_observations(self) -> int:
        return cast("tuple[int, int]", self.O[0].shape)[1] if self.O else 0  # scipy's stubs: None


def read(path: str | Path, discount: float | None = None) -> StationaryPOMDP:
    """The POMDP or MDP of a file; a large one is never dense. Errors as of `stationary` and `cassandra.read`."""
    S, A, O = cassandra.read_sizes(path)
    if S * A * (S + O) <= DENSE:
        return stationary(cassandra.read(path), discount)
    model = parse_sparse(inputs.read_text(Path(path), limits.POMDP_FILE), str(path))
    return _problem(model, model.P, model.O, discount, rewards=model.rewards)


def stationary(model: Model, discount: float | None = None) -> StationaryPOMDP:
    """The POMDP or MDP of a file.

    Args:
      discount: in place of the file's.

    Raises:
      ValueError: the discount is not in [0, 1].
    """
    P = tuple(sparse.csr_array(P) for P in model.P.swapaxes(0, 1))
    O = tuple(sparse.csr_array(O) for O in model.O) if model.observations else ()
    return _problem(model, P, O, discount, rewards=model.rewards)


def _problem(model: Model | SparseModel, P: tuple, O: tuple, discount: float | None, **rewards: Any) -> StationaryPOMDP:
    gamma = model.discount if discount is None else discount
    validate.discount(gamma)
    names = {"states": model.states, "actions": model.actions, "observations": model.observations}
    return StationaryPOMDP(P=P, O=O, r=model.r, rho=model.start, discount=float(gamma), legal=model.legal, **names, **rewards)


def from_pomdp(problem: POMDP) -> StationaryPOMDP:
    """A POMDP without its horizon and without the discount in its rewards. ValueError: it changes with the stage otherwise."""
    P, O, r = (np.asarray(x) for x in (problem.P, problem.O, problem.r))
    largest = np.unravel_index(np.abs(r[0]).argmax(), r[0].shape)
    discount = float(r[1][largest] / r[0][largest]) if len(r) > 1 and r[0][largest] else 1.0
    powers = discount ** np.arange(len(r))[:, None, None]
    if len(P) > 1 or len(O) > 1 or not 0 <= discount <= 1 or not np.allclose(r, powers * r[0], rtol=1e-9, atol=0):
        raise ValueError("kernels and rewards must be the same at every stage, but for a discount; these change")
    return StationaryPOMDP(
        P=tuple(sparse.csr_array(x) for x in P[0].swapaxes(0, 1)),
        O=tuple(sparse.csr_array(x) for x in O[0]),
        r=r[0],
        rho=np.asarray(problem.rho),
        discount=discount,
        legal=None if problem.legal is None else np.asarray(problem.legal),
    )


def to_pomdp(problem: StationaryPOMDP, horizon: int) -> POMDP:
    """The first stages as a dense POMDP, with discount^h folded into the rewards. ValueError: its tables would be too large."""
    S, A, O = problem.num_states, problem.num_actions, problem.num_observations
    validate.count(horizon, "horizon")
    if (total := S * A * (S + O + horizon)) > POMDP_TABLE:
        rule = f"a problem with a horizon has dense tables of at most {POMDP_TABLE:,} numbers; these sizes make {total:,}"
        raise ValueError(f"{rule}: solve it by point-based, which keeps it sparse")
    dtype = jnp.result_type(float)
    r = float(problem.discount) ** np.arange(horizon)[:, None, None] * problem.r
    return POMDP(
        P=jnp.asarray(np.stack([P.toarray() for P in problem.P], axis=1)[None], dtype),
        O=jnp.asarray(np.stack([O.toarray() for O in problem.O])[None], dtype),
        r=jnp.asarray(r, dtype),
        rho=jnp.asarray(problem.rho, dtype),
        legal=None if problem.legal is None else jnp.asarray(problem.legal),
    )


def stationary_mdp(P: Any, r: ArrayLike, rho: ArrayLike, discount: float, legal: ArrayLike | None = None) -> StationaryPOMDP:
    """A checked MDP from arrays; memory grows with the nonzeros of sparse ones.

    Args:
      P: an array [S, A, S], or for each action a matrix [S, S] of scipy.sparse or a `jax.experimental.sparse.BCOO`; each row a
        distribution.
      r: [S, A], finite.
      rho: [S], a distribution.
      discount: in [0, 1].
      legal: [S, A] bool, which actions a state allows, at least one; None: all.

    Raises:
      ValueError: names the argument, the rule and what was got.
    """
    rewards, start = _floats(r, "r"), _floats(rho, "rho")
    validate.discount(discount)
    if rewards.ndim != 2 or 0 in rewards.shape:
        raise ValueError(f"r must have shape [S, A]; got {rewards.shape}")
    S, A = rewards.shape
    if start.shape != (S,):
        raise ValueError(f"rho must have shape [S] = ({S},); got {start.shape}")
    validate.distribution(start, "rho")
    if not (isinstance(P, Sequence) and any(sparse.issparse(matrix) or isinstance(matrix, BCOO) for matrix in P)):
        P = _floats(P, "P")
        if P.shape != (S, A, S):
            raise ValueError(f"P must have shape [S, A, S] = {(S, A, S)}; got {P.shape}")
        P = P.swapaxes(0, 1)
    if len(P) != A:
        raise ValueError(f"P must contain a matrix for each of the {A} actions; got {len(P)}")
    kernels = tuple(_kernel(matrix, f"P[{a}]", S) for a, matrix in enumerate(P))
    allowed = None if legal is None else np.asarray(validate.legal(legal, S, A))
    rewards = rewards if allowed is None else np.where(allowed, rewards, 0)
    return StationaryPOMDP(P=kernels, r=rewards, rho=start, discount=float(discount), legal=allowed)


def _floats(value: Any, name: str) -> np.ndarray:
    """In double precision, whatever the precision of jax."""
    array = np.asarray(value)
    validate.finite(array, name)
    return array.astype(float)


def _kernel(matrix: Any, name: str, S: int) -> sparse.csr_array:
    if isinstance(matrix, BCOO):
        rows, columns = np.asarray(matrix.indices).T
        inside = (rows < matrix.shape[0]) & (columns < matrix.shape[1])  # padding is outside
        matrix = sparse.coo_array((np.asarray(matrix.data)[inside], (rows[inside], columns[inside])), shape=matrix.shape)
    kernel = sparse.csr_array(matrix, dtype=float)
    if kernel.shape != (S, S):
        raise ValueError(f"{name} must have shape [S, S] = {(S, S)}; got {kernel.shape}")
    kernel.sum_duplicates()
    validate.finite(kernel.data, f"the entries of {name}")
    if (kernel.data < 0).any():
        raise ValueError(f"{name} must contain probabilities, none below zero; got {kernel.data.min():.6g}")
    off = np.flatnonzero(np.abs(kernel.sum(1) - 1) > validate.SUM_TOLERANCE)
    if len(off):
        raise ValueError(f"each row of {name} must sum to one; row {off[0]} sums to {kernel.sum(1)[off[0]]:.6g}")
    return kernel
