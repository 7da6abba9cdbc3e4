"""In-context linear regression with Gaussian features: the law of Zhang, Frei, Bartlett (JMLR 2024) and of the paper's eq. (6).

    x ~ N(0, Lambda),   w ~ N(0, Psi),   y = <x, w> + sigma * N(0, 1)

No MDP has this law; it is the matched case in which every closed form is known.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from lindm import validate
from lindm.random import flat
from lindm.types import Prompt


def covariance(d: int, kappa: float, trace: float | None = None) -> Array:
    """Diagonal covariance [d, d] with a geometric spectrum of condition number `kappa` and the given trace (default d).

    Raises `ValueError` unless d >= 1, kappa >= 1 (equal to 1 when d = 1) and trace > 0.
    """
    validate.count(d, "d")
    if not (math.isfinite(kappa) and kappa >= 1) or (d == 1 and kappa != 1):
        raise ValueError(f"kappa must be a finite condition number >= 1 (and 1 when d = 1); got {kappa}")
    trace = float(d) if trace is None else trace
    if not (math.isfinite(trace) and trace > 0):
        raise ValueError(f"trace must be finite and positive; got {trace}")
    spectrum = jnp.geomspace(kappa, 1.0, d) if d > 1 else jnp.ones(1)
    return jnp.diag(spectrum * (trace / spectrum.sum()))


def draw_regression(key: Array, Lambda_sqrt: Array, Psi_sqrt: Array, n: int, queries: int, sigma: float | Array = 0.0):
    """Draw one task and one context.

    Args:
      key: PRNG key.
      Lambda_sqrt: [d, d], any root with Lambda = L L'; also fixes the dtype.
      Psi_sqrt: [d, d], the same for the second moment of the task vector.
      n: number of labeled pairs.
      queries: number of query columns.
      sigma: standard deviation of the label noise; the targets are noiseless.

    Returns:
      (Prompt, target [queries], w [d]).
    """
    d, dtype = Lambda_sqrt.shape[0], Lambda_sqrt.dtype
    features, task, noise = jax.random.split(key, 3)
    x = flat(jax.random.normal, features, (n + queries, d), dtype) @ Lambda_sqrt.T
    w = Psi_sqrt @ jax.random.normal(task, (d,), dtype)
    y = x @ w
    labels = y[:n] + sigma * jax.random.normal(noise, (n,), dtype)
    return Prompt(x=x[:n], y=labels.astype(dtype), query=x[n:]), y[n:], w
