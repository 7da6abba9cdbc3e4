"""Linear MDPs [Jin, Yang, Wang, Jordan, COLT 2020]: drawn from a family, or built by hand and checked.

    r_h(s, a) = <phi(s, a), theta_h>,     P_h(s' | s, a) = <phi(s, a), mu_h(s')>

A *family* fixes the features and the design, which a learner knows, and the law of theta and mu, which it does not know.
Features are probability vectors, so mixing d rows of mu always gives a kernel: a soft state aggregation. For any invertible T

    phi -> T phi,     theta -> T^-T theta,     mu -> T^-T mu

is the same MDP in other coordinates, and T = C^{1/2} Lambda^{-1/2} makes E[phi phi'] = C exactly (`with_second_moment`): any
spectrum and any condition number, with valid dynamics. One-hot features are the tabular MDP.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lindm import validate
from lindm.problems.mdp import simplex_rows
from lindm.random import flat
from lindm.types import MDP, LinearMDP, in_given_precision


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class MDPFamily:
    """A law of linear MDPs that share their features."""

    phi: Array  # [S, A, d] features in the learner's coordinates
    design: Array  # [S*A] law of the (s, a) pairs of contexts and queries
    rho: Array  # [S] law of the first state
    theta_low: Array  # [H, d] box of the reward weights, in simplex coordinates
    theta_high: Array  # [H, d]
    power: Array  # [] concentration of the rows of mu, see `simplex_rows`
    dual_map: Array  # [d, d] T^-T: from simplex coordinates to those of phi


def simplex_family(
    key: Array,
    S: int,
    A: int,
    d: int,
    H: int,
    *,
    feature_power: float = 1.0,
    power: float = 1.0,
    low: float = 0.0,
    high: float = 1.0,
) -> MDPFamily:
    """Random simplex features (drawn from `key`), uniform design, rewards theta ~ U[low, high]^d at every stage."""
    for value, name in ((S, "S"), (A, "A"), (d, "d"), (H, "H")):
        validate.count(value, name)
    validate.nonnegative(feature_power, "feature_power")
    validate.nonnegative(power, "power")
    validate.interval(low, high)
    return _family(simplex_rows(key, (S, A, d), feature_power), H, power, low, high)


def onehot_family(S: int, A: int, H: int, *, power: float = 1.0, low: float = 0.0, high: float = 1.0) -> MDPFamily:
    """Tabular MDPs as linear ones: d = S*A, phi(s, a) a unit vector, uniform design."""
    for value, name in ((S, "S"), (A, "A"), (H, "H")):
        validate.count(value, name)
    validate.nonnegative(power, "power")
    validate.interval(low, high)
    return _family(jnp.eye(S * A).reshape(S, A, S * A), H, power, low, high)


def _family(phi: Array, H: int, power: float, low: float, high: float) -> MDPFamily:
    S, A, d = phi.shape
    return MDPFamily(
        phi=phi,
        design=jnp.full(S * A, 1.0 / (S * A)),
        rho=jnp.full(S, 1.0 / S),
        theta_low=jnp.full((H, d), float(low)),
        theta_high=jnp.full((H, d), float(high)),
        power=jnp.asarray(float(power)),
        dual_map=jnp.eye(d),
    )


def second_moment(family: MDPFamily) -> Array:
    """Lambda [d, d] = E[phi phi'] under the family's design."""
    x = family.phi.reshape(-1, family.phi.shape[-1])
    return (x * family.design[:, None]).T @ x


def with_second_moment(family: MDPFamily, C: ArrayLike) -> MDPFamily:
    """The same MDPs in coordinates in which E[phi phi'] is `C` [d, d] exactly.

    Raises `ValueError` if `C` is not a covariance of the right size or the features do not span R^d.
    """
    C = validate.covariance(C, "C")
    d = family.phi.shape[-1]
    validate.shaped(C, (d, d), "C", "d, d")
    Lambda = validate.covariance(second_moment(family), "the features' second moment")
    # Any root of C will do; Cholesky factors keep T and its inverse exact to rounding.
    T = jnp.linalg.cholesky(C) @ jnp.linalg.inv(jnp.linalg.cholesky(Lambda))
    return replace(family, phi=family.phi @ T.T, dual_map=jnp.linalg.inv(T).T @ family.dual_map)


def draw_task(key: Array, family: MDPFamily) -> LinearMDP:
    """One task of the family; `vmap` over keys for many. The dtype is that of `family.phi`."""
    S, dtype = family.phi.shape[0], family.phi.dtype
    H, d = family.theta_low.shape
    measures, rewards = jax.random.split(key)
    mu = simplex_rows(measures, (H, d, S), family.power, dtype)
    theta = family.theta_low + (family.theta_high - family.theta_low) * flat(jax.random.uniform, rewards, (H, d), dtype)
    return LinearMDP(
        phi=family.phi,
        mu=jnp.einsum("ij,hjs->his", family.dual_map, mu),
        theta=theta @ family.dual_map.T,
        rho=family.rho,
    )


def linear_mdp(phi: ArrayLike, mu: ArrayLike, theta: ArrayLike, rho: ArrayLike | None = None) -> LinearMDP:
    """A linear MDP from arrays, checked: its kernel must be a kernel.

    Args:
      phi: [S, A, d] features.
      mu: [H, d, S] measures over next states.
      theta: [H, d] reward weights.
      rho: [S] law of the first state; uniform if not given.

    Raises:
      ValueError: a shape is wrong, a value is not finite, or <phi(s, a), mu_h(.)> is not a distribution for some (h, s, a).
    """
    phi, mu, theta = validate.finite(phi, "phi"), validate.finite(mu, "mu"), validate.finite(theta, "theta")
    validate.shaped(phi, (None, None, None), "phi", "S, A, d")
    S, _, d = phi.shape
    validate.shaped(theta, (None, d), "theta", "H, d")
    validate.shaped(mu, (theta.shape[0], d, S), "mu", "H, d, S")
    rho = jnp.full(S, 1.0 / S, phi.dtype) if rho is None else validate.finite(rho, "rho")
    validate.shaped(rho, (S,), "rho", "S")
    validate.distribution(rho, "rho")
    dtype = jnp.result_type(phi, mu, theta, rho)
    problem = LinearMDP(phi=phi.astype(dtype), mu=mu.astype(dtype), theta=theta.astype(dtype), rho=rho.astype(dtype))
    validate.rewards(tabulate(problem).r, "the rewards <phi(s, a), theta_h>")
    validate.distribution(tabulate(problem).P, "the kernel P[h, s, a] = <phi(s, a), mu_h>")
    return problem


@in_given_precision
def tabulate(problem: LinearMDP) -> MDP:
    """The MDP of a linear MDP: the same problem without features."""
    return MDP(
        P=jnp.einsum("sad,hdt->hsat", problem.phi, problem.mu),
        r=jnp.einsum("sad,hd->hsa", problem.phi, problem.theta),
        rho=problem.rho,
    )
