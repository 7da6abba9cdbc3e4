"""All that the theory says of a law of features and its tasks: exact risks, bounds, and both in the limit of long prompts."""

import jax
import jax.numpy as jnp
from jax import Array

from lindm_experiments.lib.feature_laws import D, Law, fourth, moment
from lindm_theory.in_context import (
    context_second_moment,
    gaussian_risk,
    general_bound,
    modes,
    optimal_weights,
    optimization_error,
    paper_bound,
    risk,
)

LIMIT = 1e4  # N of the limit, in which est M and bias N^2 are within 0.2 % of their largest values on isotropic features


@jax.jit
def predicted(law: Law, training: Array, tested: Array, Ahat: Array, N: Array, M: Array) -> dict[str, Array]:
    """All that theory says of one law: exact risks of Ahat and of A_N on these tasks, bounds [N, M]; weights [N]; modes [d]."""

    def second(tasks: Array) -> Array:
        w = tasks.reshape(-1, D)
        return w.T @ w / len(w)

    Lambda, Psi, test = moment(law), second(training), second(tested)
    K, K_test, noise = fourth(law, Psi), fourth(law, test), law.sigma**2 * moment(law)

    def length(n: Array, Ahat: Array) -> dict[str, Array]:
        A = optimal_weights(Lambda, Psi, K, n, noise)
        B = context_second_moment(Lambda, Psi, K, n, noise)

        def at(m: Array) -> dict[str, Array]:
            own, best = (risk(W, Lambda, test, K_test, m, Lambda, noise) for W in (Ahat, A))
            return {
                "own_estimation": own.estimation,
                "own_bias": own.bias,
                "best_estimation": best.estimation,
                "best_bias": best.bias,
                "gaussian": gaussian_risk(Lambda, m, n, law.sigma).total,
                "bound": paper_bound(Lambda, m, n).total,
                "every_law": general_bound(Lambda, Psi, K, m, n, Lambda, noise).total,
            }

        optimization = optimization_error(Ahat, A, B, Lambda) / risk(A, Lambda, Psi, K, n, Lambda, noise).total
        weights = jnp.linalg.norm(Ahat - A) / jnp.linalg.norm(A)
        return jax.vmap(at)(M) | {"optimization": optimization, "weights": weights}

    x, q = modes(Lambda, Psi, K, Lambda, noise)
    exact = risk(optimal_weights(Lambda, Psi, K, LIMIT, noise), Lambda, Psi, K, 1.0, Lambda, noise)
    paper, every = paper_bound(Lambda, 1.0, 1.0), general_bound(Lambda, Psi, K, 1.0, 1.0, Lambda, noise)
    limit = {
        "limit_estimation": jnp.stack([exact.estimation, paper.estimation, every.estimation]),
        "limit_bias": jnp.stack([exact.bias * LIMIT**2, paper.bias, every.bias]),
        "moments": jnp.stack([Lambda, Psi, K, noise]),
    }
    return jax.vmap(length)(N, Ahat) | {"modes": x, "mode_weights": q} | limit
