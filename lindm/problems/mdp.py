"""Tabular finite-horizon MDPs: checked when a user brings one, drawn at random otherwise."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lindm.draws import flat
from lindm.problems import checks
from lindm.types import MDP


def mdp(P: ArrayLike, r: ArrayLike, rho: ArrayLike) -> MDP:
    """A checked MDP.

    Args:
      P: [H|1, S, A, S], each row over the last axis a distribution.
      r: [H, S, A], finite.
      rho: [S], a distribution.

    Raises:
      ValueError: names the argument, the rule and what was got.
    """
    P, r, rho = checks.finite(P, "P"), checks.finite(r, "r"), checks.finite(rho, "rho")
    checks.shaped(r, (None, None, None), "r", "H, S, A")
    H, S, A = r.shape
    checks.shaped(P, (1 if P.shape[:1] == (1,) else H, S, A, S), "P", "H|1, S, A, S")
    checks.shaped(rho, (S,), "rho", "S")
    P, rho = checks.distribution(P, "P"), checks.distribution(rho, "rho")
    # one precision, the widest: a scan over stages carries values made of all three
    dtype = jnp.result_type(P, r, rho)
    return MDP(P=P.astype(dtype), r=r.astype(dtype), rho=rho.astype(dtype))


def simplex_rows(key: Array, shape: tuple[int, ...], power: float | Array = 1.0, dtype=None) -> Array:
    """Random probability vectors along the last axis: exponentials raised to `power`, normalised.

    Power 1 is the flat Dirichlet law; a larger power concentrates a row on few entries, power 0 makes it uniform.
    JAX's Dirichlet sampler is a rejection loop over gammas and costs hundreds of times more on a CPU.
    """
    dtype = dtype or jnp.result_type(float)
    exponentials = flat(jax.random.exponential, key, shape, dtype)
    # the power is taken as a factor of the logarithm: nothing over- or underflows, and with a traced power it is faster
    return jax.nn.softmax(jnp.asarray(power, dtype) * jnp.log(exponentials + jnp.finfo(dtype).tiny), axis=-1)


def draw_mdp(key: Array, S: int, A: int, H: int, *, power: float = 1.0, low: float = 0.0, high: float = 1.0, dtype=None) -> MDP:
    """A random MDP whose rows are `simplex_rows` and whose rewards are uniform in [low, high]; starts anywhere."""
    for value, name in ((S, "S"), (A, "A"), (H, "H")):
        checks.count(value, name)
    checks.nonnegative(power, "power")
    checks.interval(low, high)
    dtype = dtype or jnp.result_type(float)
    kernel, reward = jax.random.split(key)
    return MDP(
        P=simplex_rows(kernel, (H, S, A, S), power, dtype),
        r=flat(jax.random.uniform, reward, (H, S, A), dtype, low, high),
        rho=jnp.full(S, 1.0 / S, dtype),
    )
