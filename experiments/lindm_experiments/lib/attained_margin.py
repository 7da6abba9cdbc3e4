"""The instance on which the exponents of the margin bound are attained, up to a stated slack."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from lindm_experiments.lib.attained import Floats, Pair, Signs, generator, pairs_of, sign_features
from lindm_theory import mean_policy


def decaying(rng: np.random.Generator, H: int = 3) -> Signs:
    """Labels off by +-e, an advantage well below it, smallest at the first stage: a sum of signs, exact for every M.

    `truth`: by how many pairs a context must be longer for the loss to fall by a factor e, for long contexts.
    """
    shared = sign_features(rng, everywhere=False)
    c, e = shared["phi"][1, 0, 1], rng.uniform(0.5, 1.5)
    share = rng.uniform(0.1, 0.2)  # c g / e at the first stage
    M = 1 << 14  # at twice this length the chance is still a floating-point number
    log_chance = [stats.binom.logcdf(np.floor(n * (1 - share) / 2), n, 0.5) for n in (M, 2 * M)]
    return Signs(
        **shared,
        g=e * share / c * np.arange(1, H + 1),
        a=c**-2,
        noise_bound=e,
        noise_variance=e**2,
        W=np.eye(2),
        truth=float(M / (log_chance[0] - log_chance[1])),
    )


@jax.jit
def _exponents(phi, A, w, design, gap, noise_bound, noise_variance) -> dict[str, jax.Array]:
    moments = mean_policy.difference_moments(phi, A, w, design, noise_bound, noise_variance)
    rate = -jnp.log(mean_policy.chernoff_flip_probability(phi, A, w, design, 1, noise_bound))
    return {
        "bernstein": mean_policy.decay_exponent(gap, *moments),
        "cramer": jnp.min(jnp.where(gap > 0, rate.max(-1), jnp.inf)),
        "margin": moments[0],
        "variance": moments[1],
        "range": moments[2],
    }


def exponents_of(i: Signs) -> dict[str, Floats]:
    """Two exponents of the margin bound, and the moments of a pair [H, S, A, A] that they are made of."""
    out = _exponents(i.phi, i.A, i.w, i.design, i.gap, i.noise_bound, np.full((len(i.g), 1), i.noise_variance))
    return {k: np.asarray(v) for k, v in out.items()}


def instances(seed: int) -> dict[str, Signs]:
    """The instance of a seed, by name."""
    return {"decaying": decaying(generator(seed))}


BOUNDS = {"bernstein": ("decaying", "bernstein"), "cramer": ("decaying", "cramer")}


def pairs(seed: int) -> dict[str, Pair]:
    """Pairs of a context that lower the loss by a factor e: [in truth, by the exponent that is proved]."""

    def lengths(i: Signs) -> dict[str, Floats]:
        exponents = exponents_of(i)
        return {name: 1 / exponents[name] for name in BOUNDS}

    return pairs_of(instances(seed), lengths, BOUNDS)
