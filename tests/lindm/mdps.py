"""Random tabular MDPs as numpy arrays."""

import jax.numpy as jnp
import numpy as np

from lindm.types import MDP


def numpy_mdp(seed: int, S: int, A: int, H: int):
    """P [H, S, A, S], r [H, S, A], rho [S]."""
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(S), (H, S, A)), rng.normal(size=(H, S, A)), rng.dirichlet(np.ones(S))


def as_mdp(P, r, rho) -> MDP:
    return MDP(P=jnp.asarray(P), r=jnp.asarray(r), rho=jnp.asarray(rho))
