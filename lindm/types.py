"""The nouns: every type that crosses a module boundary.

Dimension key, used in every docstring and error message:
`S` states, `A` actions, `H` horizon, `d` features, `N` pairs in a training prompt, `M` pairs in a test prompt,
`Q` query columns. Sizes are shapes, never fields, and a stack of problems is the same type with leading axes.

A noun does not check its fields when it is built: `vmap`, `jit` and `tree.map` build it from tracers and from placeholders.
The checks live where a noun is born from a user's arrays (`lindm.problems`).
"""

from dataclasses import dataclass

import jax
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class MDP:
    """Finite-horizon tabular MDP; rewards and kernels may change with the stage."""

    P: Array  # [..., H, S, A, S] probability of the next state
    r: Array  # [..., H, S, A] mean reward
    rho: Array  # [..., S] law of the first state


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LinearMDP:
    """Linear MDP (Jin, Yang, Wang, Jordan, COLT 2020): r_h = <phi, theta_h>, P_h(s'|.) = <phi, mu_h(s')>."""

    phi: Array  # [..., S, A, d] feature map
    mu: Array  # [..., H, d, S] one signed measure over next states for each feature
    theta: Array  # [..., H, d] reward weights
    rho: Array  # [..., S] law of the first state


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Plan:
    """What backward induction returns."""

    V: Array  # [..., H, S] optimal value with the stages h..H to go
    Q: Array  # [..., H, S, A] optimal action value
    pi: Array  # [..., H, S] int32, an optimal action (lowest index among ties)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Episodes:
    """Rollouts of one behaviour policy."""

    s: Array  # [..., H] int32 states
    a: Array  # [..., H] int32 actions
    r: Array  # [..., H] rewards


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One stage of one task as a predictor sees it: labelled pairs and the points to predict."""

    x: Array  # [..., N, d] features of the labelled pairs
    y: Array  # [..., N] labels
    query: Array  # [..., Q, d] features whose label is asked for


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A measured quantity: mean over n independent instances and its standard error."""

    gap: Array  # [...] mean
    sem: Array  # [...] standard error of the mean
    n: int
