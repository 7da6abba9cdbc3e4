"""Finite-horizon POMDPs: checked, from a user's arrays; from an MDP; or random.

The observation depends on the action and on the state it leads to: P(s', o | s, a) = P[s, a, s'] O[a, s', o]. A discount gamma is
folded into the rewards, r_h <- gamma^h r_h.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lindm import validate
from lindm.problems.mdp import draw_stationary_mdp, over_stages, paid_rewards
from lindm.random import dirichlet
from lindm.types import MDP, POMDP


def pomdp(
    P: ArrayLike,
    O: ArrayLike,
    r: ArrayLike,
    rho: ArrayLike,
    *,
    horizon: int | None = None,
    discount: float = 1.0,
    legal: ArrayLike | None = None,
) -> POMDP:
    """A checked POMDP.

    Args:
      P: [S, A, S] or [H|1, S, A, S], each row over the last axis a distribution.
      O: [A, S, O] or [H|1, A, S, O], the same; indexed by the action taken and the state it led to.
      r: [S, A], the same at every stage (then `horizon` is required), or [H, S, A]; finite, not discounted.
      rho: [S], a distribution.
      horizon: H; must agree with the arrays that have an axis of stages.
      discount: in [0, 1].
      legal: [S, A] bool, which actions a state allows, at least one; None: all. At a belief an action is legal if every state of
        positive probability allows it.

    Raises:
      ValueError: names the argument, the rule and what was got.
    """
    P, O, r, rho = (validate.finite(x, name) for x, name in ((P, "P"), (O, "O"), (r, "r"), (rho, "rho")))
    if r.ndim == 2:
        validate.shaped(r, (None, None), "r", "S, A")
        if horizon is None:
            raise ValueError(f"horizon must be given when r has no axis of stages; got r of shape {r.shape}")
        H = validate.count(horizon, "horizon")
    else:
        H = validate.shaped(r, (None, None, None), "r", "H, S, A").shape[0]
        if horizon is not None and horizon != H:
            raise ValueError(f"horizon must be the length of r's first axis, {H}; got {horizon}")
    S, A = r.shape[-2:]
    P, O = (x[None] if x.ndim == 3 else x for x in (P, O))
    validate.shaped(P, (1 if P.shape[:1] == (1,) else H, S, A, S), "P", "H|1, S, A, S")
    validate.shaped(O, (1 if O.shape[:1] == (1,) else H, A, S, None), "O", "H|1, A, S, O")
    validate.shaped(rho, (S,), "rho", "S")
    # values below zero by rounding become zero: certified bounds require it
    P, O, rho = (jnp.maximum(validate.distribution(x, name), 0) for x, name in ((P, "P"), (O, "O"), (rho, "rho")))
    # one dtype, the widest that is enabled: certificates need double precision
    dtype = jnp.promote_types(jnp.result_type(P, O, r, rho), jnp.result_type(float))
    if legal is not None:
        legal = validate.legal(legal, S, A)
        r = jnp.where(legal, r, 0)
    folded = over_stages(r.astype(dtype), H, discount)
    validate.rewards(folded, "r")
    paid = None if discount == 1 else paid_rewards(r.astype(dtype), discount)
    return POMDP(P=P.astype(dtype), O=O.astype(dtype), r=folded, rho=rho.astype(dtype), paid=paid, legal=legal)


def reveal(mdp: MDP) -> POMDP:
    """The MDP as a POMDP whose observation is the next state.

    A POMDP's first state is not observed, so the two have one value where the first state is known: V_0(unit vector of s) of the
    POMDP is V_0(s) of the MDP, and V_0(rho) is at most the mean of V_0(s) under rho.
    """
    S, A = mdp.r.shape[-2:]
    O = jnp.broadcast_to(jnp.eye(S, dtype=mdp.P.dtype), (1, A, S, S))
    return POMDP(P=mdp.P, O=O, r=mdp.r, rho=mdp.rho, paid=mdp.paid, legal=mdp.legal)


def draw_pomdp(
    key: Array,
    S: int,
    A: int,
    O: int,
    H: int,
    *,
    concentration: ArrayLike = 1.0,
    quality: ArrayLike = 0.5,
    low: float = 0.0,
    high: float = 1.0,
    step: float = 0.0,
    discount: ArrayLike | None = None,
    dtype=None,
) -> POMDP:
    """A random POMDP: the process of `draw_stationary_mdp`, with observations that are true with probability `quality`.

        O[a, s', o] = quality [o = s' mod O] + (1 - quality) noise[a, o],    noise[a] a flat Dirichlet row

    The noise of an action is one row for all states: quality 0 is uninformative, and quality 1 with O >= S determines the state.

    Args:
      quality: in [0, 1]. May be traced, as `concentration` and `discount` may.

    Raises:
      ValueError: a size or a number is out of its range.
    """
    validate.count(O, "O")
    validate.fraction(quality, "quality")
    process, noise = jax.random.split(key)
    mdp = draw_stationary_mdp(
        process, S, A, H, concentration=concentration, low=low, high=high, step=step, discount=discount, dtype=dtype
    )
    dtype = mdp.P.dtype
    rows = noisy_signals(dirichlet(noise, 1.0, (A, O), dtype), S, quality)
    return POMDP(P=mdp.P, O=rows[None], r=mdp.r, rho=mdp.rho, paid=mdp.paid)


def noisy_signals(noise: Array, S: int, quality: ArrayLike) -> Array:
    """The observation laws [..., A, S, O] of `draw_pomdp` from the noise [..., A, O]."""
    O, quality = noise.shape[-1], jnp.asarray(quality, noise.dtype)
    signal = jnp.broadcast_to(jax.nn.one_hot(jnp.arange(S) % O, O, dtype=noise.dtype), (*noise.shape[:-1], S, O))
    return quality * signal + (1 - quality) * noise[..., None, :]
