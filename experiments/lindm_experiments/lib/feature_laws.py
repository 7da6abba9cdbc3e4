"""Laws of features, all of one form so that one compiled program serves every one of them, and the tasks that go with them.

    x = phi_i + scale_i root z,     i ~ design,  z ~ N(0, I),     y = <x, w> + sigma N(0, 1)

These are the mixtures of `lindm.icl.feature_laws`. In a row one of phi_i and scale_i is zero, so the moments are sums of those of
a table and of a Gaussian.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lindm.icl.feature_laws import Mixture
from lindm.problems.linear_mdp import MDPFamily, simplex_family, with_second_moment
from lindm.problems.regression import covariance
from lindm.solvers.rollout import cumulative, invert
from lindm_experiments.lib import linear_mdps
from lindm_theory.moments import design_fourth, design_moment, gaussian_fourth

D, ROWS = 6, 36  # features, and rows of every table (12 states x 3 actions): laws of one shape can be stacked
TASKS = 6  # tasks that share the features of a context
KAPPAS = (1.0, 10.0, 100.0)
MATCHED = tuple(f"gaussian, κ = {kappa:g}" for kappa in KAPPAS)  # the setting of eq. (6)
SIMPLEX, ONEHOT, NOISY, HEAVY = "simplex MDP", "one-hot", "label noise", "heavy tails"
LAWS = (*MATCHED, SIMPLEX, ONEHOT, NOISY, HEAVY)
Numbers = Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Law(Mixture):
    """A mixture with the noise of its labels; tables are padded to ROWS rows."""

    sigma: Numbers  # []


def gaussian_law(Lambda: Numbers, sigma: float = 0.0, present: float = 1.0) -> Law:
    """x = 0 with probability 1 - present, else N(0, Lambda / present)."""
    design, scale = np.zeros(ROWS), np.zeros(ROWS)
    design[:2] = present, 1 - present
    scale[0] = present**-0.5
    return Law(phi=np.zeros((ROWS, D)), scale=scale, design=design, root=np.linalg.cholesky(Lambda), sigma=np.float64(sigma))


def table_law(phi: Numbers, sigma: float = 0.0) -> Law:
    """The rows of phi [n, d] with equal probabilities."""
    n = len(phi)
    design, table = np.zeros(ROWS), np.zeros((ROWS, D))
    design[:n], table[:n] = 1 / n, phi
    return Law(phi=table, scale=np.zeros(ROWS), design=design, root=np.zeros((D, D)), sigma=np.float64(sigma))


def moment(law: Mixture) -> Array:
    """Lambda [d, d] = E[x x']."""
    return design_moment(law.phi, law.design) + (law.design @ law.scale**2) * law.root @ law.root.T


def fourth(law: Mixture, Psi: Array) -> Array:
    """K(Psi) [d, d] = E[x x' Psi x x']."""
    mixed = gaussian_fourth(law.root @ law.root.T, Psi)
    return design_fourth(law.phi, law.design, Psi) + (law.design @ law.scale**4) * mixed


def draw_pairs(key: Array, law: Law, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Features x [*shape, d] and label noise [*shape]. The generator makes 64 bits at a time: two uniforms of 23 bits."""
    bits = jax.random.bits(key, (*shape, (D + 3) // 2), jnp.uint64)
    halves = jax.lax.bitcast_convert_type(bits, jnp.uint32).reshape(*shape, -1)
    u = ((halves >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)
    z = (jax.lax.erf_inv(2 * u[..., : D + 1] - 1) * jnp.float32(2**0.5)).astype(law.phi.dtype)
    i = invert(cumulative(law.design), u[..., D + 1].astype(law.design.dtype))
    x = law.phi[i] + law.scale[i][..., None] * (z[..., :D] @ law.root.T)
    return x, law.sigma * z[..., D]


@lru_cache(maxsize=4)
def simplex_mdps(seed: int) -> MDPFamily:
    """The simplex MDPs of a seed, in coordinates with Lambda = I."""
    draw = partial(simplex_family, S=12, A=3, d=D, H=4, feature_power=2.0, low=-1.0, high=1.0)
    return with_second_moment(draw(linear_mdps.family_key(seed)), np.eye(D))


def named_laws(seed: int, sigma: float, sigma_mdp: float, present: float) -> dict[str, Law]:
    """All laws of LAWS: `sigma` of the noisy one, `sigma_mdp` of the simplex MDPs of a seed, `present` of the heavy tails."""
    white = covariance(D, 1.0)
    return {
        **{name: gaussian_law(covariance(D, kappa)) for name, kappa in zip(MATCHED, KAPPAS, strict=True)},
        SIMPLEX: table_law(simplex_mdps(seed).phi.reshape(-1, D), sigma_mdp),
        ONEHOT: table_law(np.eye(D)),
        NOISY: gaussian_law(white, sigma=sigma),
        HEAVY: gaussian_law(white, present=present),
    }


def draw_tasks(key: Array, family: MDPFamily, groups: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tasks to train on and fresh ones to test on, for every law, in groups that share contexts: twice [groups, TASKS, d].

    Those of the Gaussian laws are Gaussian, those of one-hot features are the rewards of a tabular MDP's last stage; both are
    scaled so that Psi = I exactly, as eq. (6) has it. Those of the simplex MDPs `family` are w*_1, by backward induction.
    """
    tasks = groups * TASKS
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def whiten(w: np.ndarray) -> np.ndarray:
        return np.linalg.solve(np.linalg.cholesky(w.T @ w / len(w)), w.T).T

    planned = linear_mdps.task_pool(key, family, tasks=-(-2 * tasks // linear_mdps.BLOCK) * linear_mdps.BLOCK)[0]

    def half(simplex: np.ndarray) -> dict[str, np.ndarray]:
        gaussian, rewards = whiten(rng.normal(size=(tasks, D))), whiten(rng.uniform(-1, 1, size=(tasks, D)))
        chosen = {SIMPLEX: simplex, ONEHOT: rewards}
        return {name: chosen.get(name, gaussian).reshape(groups, TASKS, D) for name in LAWS}

    training, tested = np.split(np.asarray(planned)[: 2 * tasks], 2)
    return half(training), half(tested)
