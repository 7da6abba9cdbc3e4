"""The data types that modules exchange: problems, plans, episodes, labels, prompts.

Dimension key of all docstrings and error messages: `S` states, `A` actions, `O` observations, `M` models of an APOMDP (in the
theory: pairs in a test prompt), `H` horizon, `d` features, `N` pairs in a training prompt, `Q` query columns. Sizes are shapes,
read by properties, and a stack of problems is the same type with leading axes.

`H|1` is an axis over the stages whose length is one where nothing changes with the stage (`at_stage` reads both). The horizon
is the length of the axis of the rewards. A discount is folded into the rewards r: r_h contains gamma^h, so values and action
values of every stage are discounted to the first one, and the loss of a decision at stage h is its loss of value at the start.
Solvers read r alone. What an environment pays, which is not discounted and may depend on the next state and the observation, is
a `RewardFunction` beside it.

An action that a state does not allow has the action value -inf there, reward 0, and some row of P that is never used. Where the
state is hidden, an action is legal if it is legal in every state of positive probability.

The types do not check their fields: `vmap`, `jit` and `tree.map` build them from tracers and placeholders. The functions of
`lindm.problems` that take a user's arrays check them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

Function = TypeVar("Function", bound=Callable)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """The reward that an environment pays for a step, and the discount of later steps.

    The mean rewards r of a problem are the expectation of R over the next state and the observation, discounted:
    r_h(s, a) = gamma^h E[R_h(s, a, s', o)].
    """

    R: Array  # [..., H|1, S, A, S|1, O|1] not discounted; an axis that it does not depend on has length one
    discount: Array  # [...] gamma in (0, 1]


class _RewardSizes:
    """The sizes that the shape of the rewards [..., H, S, A] tells, and the discount of the rewards."""

    r: Array
    paid: RewardFunction | None

    @property
    def discount(self) -> Array | float:
        """gamma [...], which is folded into r."""
        return 1.0 if self.paid is None else self.paid.discount

    def pay(self, h: ArrayLike, s: Any, a: Any, following: Any, o: Any = 0, model: tuple = ()) -> Any:
        """The rewards that the environment pays for steps of a stage: states, actions, next states and observations [...].

        Args:
          model: index into the leading axes: (m,) for the models of an APOMDP.
        """
        if self.paid is None:
            return self.r[(*model, h, s, a)]
        stages, *_, next_states, observations = self.paid.R.shape[-5:]
        at = (h if stages > 1 else 0, s, a, following if next_states > 1 else 0, o if observations > 1 else 0)
        return self.paid.R[(*model, *at)]

    @property
    def horizon(self) -> int:
        return self.r.shape[-3]

    @property
    def num_states(self) -> int:
        return self.r.shape[-2]

    @property
    def num_actions(self) -> int:
        return self.r.shape[-1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class MDP(_RewardSizes):
    """Finite-horizon tabular MDP; rewards and kernels may change with the stage.

    >>> problem = ld.make("mdp", horizon=4).problem
    >>> isinstance(problem, ld.MDP), problem.horizon, problem.num_actions
    (True, 4, 3)
    """

    P: Array  # [..., H|1, S, A, S] probability of the next state
    r: Array  # [..., H, S, A] mean reward
    rho: Array  # [..., S] law of the first state
    paid: RewardFunction | None = None  # None: r is paid, and nothing is discounted
    legal: Array | None = None  # [..., S, A] bool, the actions that a state allows; None: all


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class POMDP(_RewardSizes):
    """Finite-horizon POMDP; the first action is chosen at the belief rho, before anything is observed.

    >>> problem = ld.read_pomdp("tiger.pomdp", horizon=4).problem
    >>> isinstance(problem, ld.POMDP), problem.num_states, problem.num_observations
    (True, 2, 2)
    """

    P: Array  # [..., H|1, S, A, S] probability of the next state
    O: Array  # [..., H|1, A, S, O] probability of the observation after an action, given the state it led to
    r: Array  # [..., H, S, A] mean reward
    rho: Array  # [..., S] law of the first state
    paid: RewardFunction | None = None  # None: r is paid, and nothing is discounted
    legal: Array | None = None  # [..., S, A] bool, the actions that a state allows; None: all

    @property
    def num_observations(self) -> int:
        return self.O.shape[-1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class APOMDP:
    r"""Ambiguous POMDP (Saghafian, J. Econ. Theory 178, 2018): a set of models and an attitude to ambiguity.

    The criterion here is a stage-wise alpha-maxmin, a convention of this project: with G_m(b, a) the value of action a under
    model m,

        V_t(b) = max_a [ alpha min_m G_m(b, a) + (1 - alpha) max_m G_m(b, a) ],
        G_m(b, a) = b r_m(., a) + sum_o |b K_m[a, o]|_1 V_{t+1}(tau_m(b, a, o)),   K_m[a, o, s, s'] = P_m[s, a, s'] O_m[a, s', o]

    so at every stage nature takes, after the action, the worst model with probability alpha and the best one otherwise. The
    decision maker observes which (the belief is updated by that model), and a history is a sequence of (a, m, o). At the first
    stage the belief under model m is rho_m.

    >>> problem = ld.make("prostate", horizon=3).problem
    >>> isinstance(problem, ld.APOMDP), problem.num_models, float(problem.alpha)
    (True, 4, 0.5)
    """

    models: POMDP  # every field has an axis M in front of the problem's own axes: P [..., M, H|1, S, A, S], ...
    alpha: Array  # [...] in [0, 1]: 1 is the worst case, 0 the best

    @property
    def horizon(self) -> int:
        return self.models.horizon

    @property
    def num_states(self) -> int:
        return self.models.num_states

    @property
    def num_actions(self) -> int:
        return self.models.num_actions

    @property
    def num_observations(self) -> int:
        return self.models.num_observations

    @property
    def num_models(self) -> int:
        return self.models.r.shape[-4]

    @property
    def discount(self) -> Array | float:
        """gamma [...], which is folded into the rewards of all models."""
        return 1.0 if self.models.paid is None else self.models.paid.discount[..., 0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LinearMDP:
    """Linear MDP (Jin, Yang, Wang, Jordan, COLT 2020): r_h = <phi, theta_h>, P_h(s'|.) = <phi, mu_h(s')>.

    >>> problem = ld.linear_mdp([[[1.0, 0.0]], [[0.0, 1.0]]], [[[0, 1], [1, 0]]] * 2, [[0.0, 1.0]] * 2)
    >>> isinstance(problem, ld.LinearMDP), problem.num_features
    (True, 2)
    """

    phi: Array  # [..., S, A, d] feature map
    mu: Array  # [..., H, d, S] one signed measure over next states for each feature
    theta: Array  # [..., H, d] reward weights
    rho: Array  # [..., S] law of the first state

    @property
    def horizon(self) -> int:
        return self.theta.shape[-2]

    @property
    def num_states(self) -> int:
        return self.phi.shape[-3]

    @property
    def num_actions(self) -> int:
        return self.phi.shape[-2]

    @property
    def num_features(self) -> int:
        return self.phi.shape[-1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Plan:
    """The result of backward induction."""

    V: Array  # [..., H, S] optimal value with the stages h..H to go
    Q: Array  # [..., H, S, A] optimal action value
    pi: Array  # [..., H, S] int32, argmax_a Q, without the tolerance of `lindm.solvers.ties`


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Episodes:
    """Rollouts of a behavior policy; None for what the problem does not have."""

    s: Array  # [..., H] int32 states, before the action
    a: Array  # [..., H] int32 actions
    r: Array  # [..., H] mean rewards of state and action, discounted: gamma^h E[R]
    m: Array | None = None  # [..., H] int32 models that nature took, after the action
    o: Array | None = None  # [..., H] int32 observations of the next state, after the action
    paid: Array | None = None  # [..., H] rewards that the environment paid, not discounted


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Labels:
    """The solution's labels at every step of some episodes."""

    action: Array  # [..., H] int32, the greedy action (`lindm.solvers.ties`)
    Q: Array  # [..., H, A] action values, or the middle of their bounds; -inf where an action is not legal
    certificate: Array  # [..., H] int8: `EXACT`, `CERTIFIED` (no other action can be better) or `BOUNDED`
    regret: Array  # [..., H] upper bound of the action's loss at this step; 0 where exact or certified
    legal: Array | None = None  # [..., H, A] bool, where the problem does not allow every action everywhere


Problem = MDP | POMDP | APOMDP

EXACT, CERTIFIED, BOUNDED = 0, 1, 2
CERTIFICATES = ("exact", "certified", "bounded")  # names, in the order of the numbers


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The input of a predictor for one stage of one task: labeled pairs and query points."""

    x: Array  # [..., N, d] features of the labeled pairs
    y: Array  # [..., N] labels
    query: Array  # [..., Q, d] features whose labels are predicted


def cast(problem: Any, dtype: Any) -> Any:
    """A problem with its numbers in a floating point type; the actions that are legal stay bool."""
    return jax.tree.map(lambda x: jnp.asarray(x, x.dtype if x.dtype == bool else dtype), problem)


def only_legal(Q: Any, legal: Any) -> Any:
    """Action values [..., S, A] with -inf for actions that the state does not allow; `legal` None: as they are."""
    return Q if legal is None else jnp.where(legal, Q, -jnp.inf)


def at_stage(x: Array, h: ArrayLike) -> Array:
    """x[h] of an array with a leading axis `H|1`."""
    return x[0] if x.shape[0] == 1 else jax.lax.dynamic_index_in_dim(x, h, keepdims=False)


def in_given_precision(function: Function) -> Function:
    """`function` in double precision if its arguments hold float64 arrays, as problems do that `ld.mdp` makes of numpy arrays.

    Without `jax.enable_x64` JAX computes some results of such arrays in float32, and a loop that carries both raises a TypeError.
    """

    @wraps(function)
    def compute(*args: Any, **named: Any) -> Any:
        if all(getattr(leaf, "dtype", None) != jnp.float64.dtype for leaf in jax.tree.leaves((args, named))):
            return function(*args, **named)
        with jax.enable_x64(True):
            return function(*args, **named)

    return compute  # pyright: ignore
