"""A suite: a law of tasks, which is a family of problems with its sizes and options set.

The random suites (`random_suites`) draw any tables. The other families are problems of a known structure: their tables are built
in numpy, from parameters that are drawn for each task (`TabularSuite`). Two splits of a suite differ in the law of the parameters
alone: a learner is trained on `id`, and `ood` tests it out of distribution.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike
from scipy import sparse

from lindm import validate
from lindm.choices import Split
from lindm.errors import unknown
from lindm.problems.mdp import over_stages
from lindm.problems.stationary import StationaryPOMDP
from lindm.types import APOMDP, MDP, POMDP, Problem, RewardFunction

SPLITS = get_args(Split)
REWARD_STEP = 0.05  # rewards are multiples: short in text, exact in a file


class Sizes(NamedTuple):
    """Sizes of the tasks of a suite."""

    states: int
    actions: int
    observations: int = 0  # 0: the state is observed
    models: int = 0  # 0: the model is known


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A law of tasks of one size. Its fields are numbers and words, so it is hashable, and static under `jit`."""

    name: str
    horizon: int
    """Number of stages."""
    split: Split = "id"
    """Distribution of the parameters: id (in distribution) or ood (out of distribution)."""

    traceable: ClassVar[bool] = False
    """Whether `draw` may be called under `jit`."""
    discount: ClassVar[float] = 1.0
    """Discount factor, an option of suites whose tasks are discounted."""

    @property
    def sizes(self) -> Sizes:
        """Sizes of every task."""
        raise NotImplementedError

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        """Names of states, actions, observations and models in the order of the indices, without those that have no names."""
        return {}

    def draw(self, key: Array) -> Problem:
        """The task of a random key."""
        raise NotImplementedError

    @property
    def kind(self) -> type[Problem]:
        """The type of every task."""
        return APOMDP if self.sizes.models else POMDP if self.sizes.observations else MDP

    @property
    def example(self) -> Problem:
        """A problem with the shapes of every task, all zero; it takes no memory."""
        S, A, O, M = self.sizes

        def zeros(*shape: int) -> Any:
            return np.broadcast_to(np.zeros((), jnp.result_type(float)), (M, *shape) if M else shape)

        seen: dict[str, Any] = {"P": zeros(1, S, A, S), "r": zeros(self.horizon, S, A), "rho": zeros(S)}
        if not O:
            return MDP(**seen)
        model = POMDP(**seen, O=zeros(1, A, S, O))
        return APOMDP(models=model, alpha=jnp.zeros(())) if M else model


@dataclass(frozen=True, kw_only=True)
class Tables:
    """One model of a problem that is the same at every stage: numpy arrays in double precision, rewards not discounted."""

    P: np.ndarray  # [S, A, S] probability of the next state
    r: np.ndarray  # [S, A] mean reward
    rho: np.ndarray  # [S] law of the first state
    O: np.ndarray | None = None  # [A, S, O] probability of the observation after an action, given the state it led to
    R: np.ndarray | None = None  # [S, A, S|1, O|1] reward that is paid, by next state and observation; None where it is r


@dataclass(frozen=True, kw_only=True)
class TabularSuite(Suite):
    """A suite whose tasks are built in numpy: a subclass defines `tables`, `sizes` and `names`."""

    discount: float = 1.0
    """Discount factor."""

    def __post_init__(self) -> None:
        validate.count(self.horizon, "horizon")
        if self.split not in SPLITS:
            raise ValueError(unknown("split", self.split, SPLITS))
        validate.discount(self.discount)
        for field in fields(self):
            if isinstance(field.default, bool) and not isinstance(value := getattr(self, field.name), bool):
                raise ValueError(f"{field.name} must be True or False; got {value!r}")
        self.check()

    def check(self) -> None:
        """Raise ValueError for an option of the family that is out of its range."""

    def tables(self, rng: np.random.Generator) -> Sequence[Tables]:
        """The model, or the models of an ambiguous problem, with new parameters."""
        raise NotImplementedError

    @property
    def attitude(self) -> float:
        """alpha of an ambiguous problem."""
        raise NotImplementedError

    def draw(self, key: Array) -> Problem:
        models = [self._problem(tables) for tables in self.tables(_generator(key))]
        if not self.sizes.models:
            return models[0]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
        return APOMDP(models=stacked, alpha=jnp.asarray(self.attitude, jnp.result_type(float)))

    def stationary(self, key: Array) -> StationaryPOMDP:
        """The task of a random key without its horizon. ValueError: its tasks are ambiguous."""
        if self.sizes.models:
            rule = "the criterion of an ambiguous problem belongs to each stage of a finite horizon"
            raise ValueError(f"horizon must be finite for {self.name}: {rule}")
        (tables,) = self.tables(_generator(key))
        names: dict[str, Any] = {part: words for part, words in self.names.items() if part != "models"}
        return StationaryPOMDP(
            P=tuple(sparse.csr_array(tables.P[:, a]) for a in range(self.sizes.actions)),
            O=() if tables.O is None else tuple(sparse.csr_array(O) for O in tables.O),
            r=tables.r,
            rho=tables.rho,
            discount=self.discount,
            **names,
        )

    def _problem(self, tables: Tables) -> MDP | POMDP:
        dtype = jnp.result_type(float)
        seen: dict[str, Any] = {"P": jnp.asarray(tables.P[None], dtype), "rho": jnp.asarray(tables.rho, dtype)}
        r = over_stages(jnp.asarray(tables.r, dtype), self.horizon, self.discount)
        if tables.R is not None or self.discount != 1:
            R = tables.r[..., None, None] if tables.R is None else tables.R
            paid = RewardFunction(R=jnp.asarray(R[None], dtype), discount=jnp.asarray(self.discount, dtype))
            seen |= {"paid": paid}
        return MDP(**seen, r=r) if tables.O is None else POMDP(**seen, r=r, O=jnp.asarray(tables.O[None], dtype))


def _generator(key: Array) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())


# --- parameters ---------------------------------------------------------------------------------------------------------------


def rounded(rewards: ArrayLike) -> np.ndarray:
    """Rewards as the nearest multiples of `REWARD_STEP`, without the noise of binary fractions."""
    return np.round(np.round(np.asarray(rewards) / REWARD_STEP) * REWARD_STEP, 10) + 0.0  # + 0.0: no reward is 0.0, not -0.0


def levels(truth: int, seen: int, accuracy: float) -> np.ndarray:
    """A noisy reading of an ordered quantity, [truth, seen]: its own level with probability `accuracy`, otherwise any level.

    Levels are those of a scale of `seen` marks on the `truth` values.
    """
    own = np.eye(seen)[np.minimum(np.arange(truth) * seen // truth if seen < truth else np.arange(truth), seen - 1)]
    return accuracy * own + (1 - accuracy) / seen
