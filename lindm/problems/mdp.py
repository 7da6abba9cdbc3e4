"""Tabular finite-horizon MDPs: checked, from a user's arrays, or random."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lindm import validate
from lindm.random import dirichlet, flat
from lindm.types import MDP, RewardFunction


def mdp(P: ArrayLike, r: ArrayLike, rho: ArrayLike, legal: ArrayLike | None = None) -> MDP:
    """A checked MDP.

    Args:
      P: [H|1, S, A, S], each row over the last axis a distribution.
      r: [H, S, A], finite.
      rho: [S], a distribution.
      legal: [S, A] bool, which actions a state allows, at least one; None: all.

    Raises:
      ValueError: names the argument, the rule and what was got.
    """
    P, r, rho = validate.finite(P, "P"), validate.finite(r, "r"), validate.finite(rho, "rho")
    validate.shaped(r, (None, None, None), "r", "H, S, A")
    validate.rewards(r, "r")
    H, S, A = r.shape
    validate.shaped(P, (1 if P.shape[:1] == (1,) else H, S, A, S), "P", "H|1, S, A, S")
    validate.shaped(rho, (S,), "rho", "S")
    P, rho = validate.distribution(P, "P"), validate.distribution(rho, "rho")
    # one dtype, the widest: a scan over stages carries values computed from all three
    dtype = jnp.result_type(P, r, rho)
    if legal is not None:
        legal = validate.legal(legal, S, A)
        r = jnp.where(legal, r, 0)
    return MDP(P=P.astype(dtype), r=r.astype(dtype), rho=rho.astype(dtype), legal=legal)


def simplex_rows(key: Array, shape: tuple[int, ...], power: float | Array = 1.0, dtype=None) -> Array:
    """Random probability vectors along the last axis: exponentials raised to `power`, normalized.

    Power 1 is the flat Dirichlet law; a larger power concentrates a row on few entries, power 0 makes it uniform.
    JAX's Dirichlet sampler is a rejection loop over gammas and costs ten to a hundred times more on a CPU.
    """
    dtype = dtype or jnp.result_type(float)
    exponentials = flat(jax.random.exponential, key, shape, dtype)
    # as a factor of the logarithm the power neither over- nor underflows, and a traced power is faster
    return jax.nn.softmax(jnp.asarray(power, dtype) * jnp.log(exponentials + jnp.finfo(dtype).tiny), axis=-1)


def draw_mdp(key: Array, S: int, A: int, H: int, *, power: float = 1.0, low: float = 0.0, high: float = 1.0, dtype=None) -> MDP:
    """A random MDP whose rows are `simplex_rows` and whose rewards are uniform in [low, high]; the first state is uniform."""
    for value, name in ((S, "S"), (A, "A"), (H, "H")):
        validate.count(value, name)
    validate.nonnegative(power, "power")
    validate.interval(low, high)
    dtype = dtype or jnp.result_type(float)
    kernel, reward = jax.random.split(key)
    return MDP(
        P=simplex_rows(kernel, (H, S, A, S), power, dtype),
        r=flat(jax.random.uniform, reward, (H, S, A), dtype, low, high),
        rho=jnp.full(S, 1.0 / S, dtype),
    )


def draw_stationary_mdp(
    key: Array,
    S: int,
    A: int,
    H: int,
    *,
    concentration: ArrayLike = 1.0,
    low: float = 0.0,
    high: float = 1.0,
    step: float = 0.0,
    discount: ArrayLike | None = None,
    dtype=None,
) -> MDP:
    """A random MDP with one kernel and one reward table for all stages; the first state is uniform.

    Args:
      concentration: of the Dirichlet law of the rows of P [1, S, A, S], above zero: small for nearly deterministic moves, large
        for nearly uniform ones. May be traced.
      low, high, step: rewards are uniform in [low, high] if `step` is 0, else every multiple of `step` in the interval is
        equally likely (numbers that are short in text).
      discount: in [0, 1], folded into the rewards of later stages. May be traced. [default: nothing is discounted]

    Raises:
      ValueError: a size or a number is out of its range, or [low, high] holds no multiple of `step`.
    """
    for value, name in ((S, "S"), (A, "A"), (H, "H")):
        validate.count(value, name)
    validate.positive(concentration, "concentration")
    dtype = dtype or jnp.result_type(float)
    kernel, reward = jax.random.split(key)
    r = _rewards(reward, (S, A), low, high, step, dtype)
    return MDP(
        P=dirichlet(kernel, concentration, (1, S, A, S), dtype),
        r=over_stages(r, H, 1.0 if discount is None else discount),
        rho=jnp.full(S, 1.0 / S, dtype),
        paid=None if discount is None else paid_rewards(r, discount),
    )


def over_stages(r: Array, H: int, discount: ArrayLike = 1.0) -> Array:
    """Discounted rewards discount^h r_h [H, S, A], from [H, S, A] or from a table [S, A] for all stages."""
    validate.discount(discount)
    return jnp.asarray(discount, r.dtype) ** jnp.arange(H, dtype=r.dtype)[:, None, None] * jnp.broadcast_to(r, (H, *r.shape[-2:]))


def paid_rewards(r: Array, discount: ArrayLike) -> RewardFunction:
    """What an environment with the rewards [H, S, A] or [S, A] of `over_stages` pays."""
    R = r[..., None, None]
    return RewardFunction(R=R[None] if r.ndim == 2 else R, discount=jnp.asarray(discount, r.dtype))


def _rewards(key: Array, shape: tuple[int, ...], low: float, high: float, step: float, dtype) -> Array:
    validate.interval(low, high)
    validate.nonnegative(step, "step")
    if not step:
        return flat(jax.random.uniform, key, shape, dtype, low, high)
    levels = reward_levels(low, high, step)
    return jnp.asarray(levels, dtype)[flat(jax.random.randint, key, shape, 0, len(levels))]


def reward_levels(low: float, high: float, step: float) -> np.ndarray:
    """The multiples of `step` in [low, high]. ValueError: there is none."""
    # an end that is a multiple of step counts, whatever the rounding of the quotient
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if first > last:
        raise ValueError(f"step must have a multiple between low = {low} and high = {high}; got {step}")
    # the nearest decimals: 0.3, where 3 * 0.1 is 0.30000000000000004
    return np.array([float(f"{k * step:.12g}") for k in range(first, last + 1)])
