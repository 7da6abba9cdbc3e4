"""Feature laws: what the features x of the pairs of a context are drawn from.

A feature law of your own is any object with `sample(key, shape) -> x [*shape, d]`, of jax operations, so that it can be a part of
a compiled training loop. If it knows its moments it has `second_moment() -> Lambda [d, d]` = E[x x'], and perhaps
`fourth_moment(Psi) -> K(Psi) [d, d]` = E[x x' Psi x x']; what it does not have is estimated from samples (`ld.theory.risk`).

The laws of this module are mixtures,

    x = phi_i + scale_i root z,     i ~ design,  z ~ N(0, I),

with phi_i or scale_i zero in every row: a table of state-action pairs has scale 0, a Gaussian is one row with phi 0.

>>> import jax
>>> law = ld.icl.feature_laws.heavy_tailed([[1.0, 0.0], [0.0, 1.0]], present=0.2)
>>> law.sample(jax.random.key(0), (64, 16)).shape
(64, 16, 2)
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lindm import validate
from lindm.random import dirichlet, flat
from lindm.solvers.rollout import cumulative, invert

Numbers = Array | np.ndarray


class FeatureLaw(Protocol):
    """A law of features; the methods `second_moment()` and `fourth_moment(Psi)` are optional (see the module)."""

    def sample(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Independent features x [*shape, d]."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The parameters of the module docstring; n rows. Their moments are in `lindm_experiments.lib.feature_laws`."""

    phi: Numbers  # [n, d]
    scale: Numbers  # [n]
    design: Numbers  # [n] probabilities
    root: Numbers  # [d, d]

    def sample(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Independent features x [*shape, d]."""
        phi, scale, design, root = (jnp.asarray(a) for a in (self.phi, self.scale, self.design, self.root))
        rows, noise = jax.random.split(key)
        z = flat(jax.random.normal, noise, (*shape, root.shape[0]), root.dtype)
        if len(design) == 1:
            return jnp.broadcast_to(phi[0], z.shape) + scale[0] * (z @ root.T)
        i = invert(cumulative(design), flat(jax.random.uniform, rows, shape, design.dtype))
        return phi[i] + scale[i][..., None] * (z @ root.T)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Table(Mixture):
    """A mixture without a Gaussian part, which is not drawn then."""

    def sample(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Independent rows of phi, [*shape, d]."""
        design = jnp.asarray(self.design)
        return jnp.asarray(self.phi)[invert(cumulative(design), flat(jax.random.uniform, key, shape, design.dtype))]


@dataclass(frozen=True, kw_only=True)
class Simplex:
    """Probability vectors x by the symmetric Dirichlet law."""

    d: int
    concentration: float

    def sample(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Independent features x [*shape, d]."""
        return dirichlet(key, self.concentration, (*shape, self.d))

    def second_moment(self) -> Array:
        """Lambda [d, d] = (c I + c^2 11') / (dc (dc + 1))."""
        d, c = self.d, self.concentration
        return (c * jnp.eye(d) + c**2) / (d * c * (d * c + 1))


def gaussian(Lambda: ArrayLike) -> Mixture:
    """x ~ N(0, Lambda).  Lambda [d, d].  Raises: ValueError if it is not symmetric and positive definite."""
    return heavy_tailed(Lambda, 1.0)


def heavy_tailed(Lambda: ArrayLike, present: float) -> Mixture:
    """x = 0 with probability 1 - present, else N(0, Lambda / present): second moment Lambda, tails as heavy as 1/present.

    Raises: ValueError if Lambda [d, d] is not symmetric and positive definite, or present is not in (0, 1].
    """
    root = np.linalg.cholesky(np.asarray(validate.covariance(Lambda, "Lambda"), dtype=float))
    validate.positive(present, "present")
    validate.fraction(present, "present")
    design = np.array([present, 1 - present])[: 1 if present == 1 else 2]
    scale = np.array([present**-0.5, 0.0])[: len(design)]
    return Mixture(phi=np.zeros((len(design), len(root))), scale=scale, design=design, root=root)


def table(phi: ArrayLike, design: ArrayLike | None = None) -> Table:
    """The rows of phi [n, d] with probabilities design [n], equal ones if not given.

    Raises: ValueError if a shape is wrong, a value is not finite, or design is not a distribution.
    """
    rows = np.asarray(validate.shaped(validate.finite(phi, "phi"), (None, None), "phi", "n, d"), dtype=float)
    n, d = rows.shape
    chances = np.full(n, 1 / n) if design is None else design
    chances = validate.distribution(validate.shaped(validate.finite(chances, "design"), (n,), "design", "n"), "design")
    return Table(phi=rows, scale=np.zeros(n), design=np.asarray(chances, dtype=float), root=np.zeros((d, d)))


def onehot(rho: ArrayLike) -> Table:
    """x = e_i with probability rho_i: the features of a tabular problem.  rho [d] a distribution, else ValueError."""
    chances = validate.shaped(validate.finite(rho, "rho"), (None,), "rho", "d")
    return table(np.eye(len(chances)), chances)


def simplex(d: int, concentration: float = 1.0) -> Simplex:
    """Probability vectors of length d by the symmetric Dirichlet law: below one few large entries, one is flat on the simplex.

    Raises: ValueError if d < 1 or the concentration is not a finite number above zero.
    """
    validate.positive(concentration, "concentration")
    return Simplex(d=validate.count(d, "d"), concentration=concentration)
