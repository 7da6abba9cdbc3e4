"""The layer and statistical methods on the same contexts: exact risks of linear predictors, exact losses of policies.

Every predictor here that sees one stage is linear in the labels, what = B X'y with a matrix B that depends on the context alone:
B = A/M for the layer, pinv(X'X) for least squares, (X'X + sigma^2 Psi^-1)^-1 for the ridge regression of the prior (Bayes). Its
risk on one context, over tasks w with second moment Psi and label noise sigma, is therefore a number that needs no sampling.
"""

import jax
import jax.numpy as jnp
from jax import Array

from lindm.icl import predictors
from lindm.icl.label_laws import oracle_labels
from lindm.problems.linear_mdp import MDPFamily
from lindm.solvers.dp import policy_value
from lindm.solvers.ties import greedy
from lindm.types import Prompt
from lindm_experiments.lib import linear_mdps

LAYER, CENTERED = "attention layer", "layer, centered labels"
BAYES, AFFINE = "Bayes, second moment", "Bayes, mean and covariance"
DATA_ONLY = ("OLS", "ridge, lambda = 1", "LSVI", "PEVI")  # methods that know nothing of the law of tasks
METHODS = (LAYER, CENTERED, BAYES, AFFINE, *DATA_ONLY, "layer on its own targets", "uniform policy")
BETA = 0.1  # PEVI's penalty: the theorem's own constant makes every value zero at these sample sizes


def linear_risk(B: Array, G: Array, Psi: Array, sigma: Array, Lambda_q: Array) -> Array:
    """E over tasks and noise, on one context with X'X = G, of |what - w|^2 in Lambda_q, where what = B X'y. All [d, d]."""
    miss = B @ G - jnp.eye(len(G))
    return jnp.trace(Lambda_q @ (miss @ Psi @ miss.T + sigma**2 * B @ G @ B.T))


@jax.jit
def risks(G: Array, A: Array, M: Array, Psi: Array, sigma: Array, Lambda_q: Array) -> dict[str, Array]:
    """Risk [n, k] of each predictor on each context and noise level, exact given X: G [n, d, d] = X'X, layers A [k, d, d],
    sigma [k]."""

    def one(G: Array) -> dict[str, Array]:
        values, vectors = jnp.linalg.eigh(G)
        kept = values > 1e-9 * values[-1]
        pinv = (vectors * jnp.where(kept, 1 / jnp.where(kept, values, 1.0), 0.0)[None]) @ vectors.T

        def level(A: Array, sigma: Array) -> dict[str, Array]:
            bayes = jnp.linalg.inv(G + sigma**2 * jnp.linalg.inv(Psi))
            B = {LAYER: A / M, "OLS": pinv, BAYES: bayes}
            return {name: linear_risk(b, G, Psi, sigma, Lambda_q) for name, b in B.items()}

        return jax.vmap(level)(A, sigma)

    return jax.vmap(one)(G)


def own_targets(phi: Array, layers: Array, x: Array, r: Array, after: Array, M: Array) -> Array:
    """Qhat [H, S, A] of a layer that bootstraps: LSVI with A_h b / M in the place of ridge. Arrays as in `baselines.lsvi`."""

    def stage(w: Array, at: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        layer, x, r, after = at
        w = layer @ ((r + jnp.max(after @ w, axis=-1)) @ x) / M
        return w, phi @ w

    return jax.lax.scan(stage, jnp.zeros_like(x[0, 0]), (layers, x, r, after), reverse=True)[1]


@jax.jit
def losses(
    family: MDPFamily, tests, layers: Array, centered_layers: Array, Psi: Array, mean: Array, M: Array, sigma: Array
) -> dict[str, Array]:
    """Exact suboptimality [tasks] of every method's greedy policy on the first M pairs, noise sigma on labels and rewards."""
    (H, _), (S, A, _) = mean.shape, family.phi.shape
    centered = Psi - mean[:, :, None] * mean[:, None, :]
    query = linear_mdps.pairs_table(family)

    def one(test) -> dict[str, Array]:
        mdp, plan, w, (x, r, after, on_labels, on_rewards) = test
        longest = x.shape[1]
        used = (jnp.arange(longest) < M).astype(x.dtype)
        # pairs beyond the M-th become zero rows: they add nothing to X'X and to X'y
        x = x * used[None, :, None]
        y = (oracle_labels(x, w) + sigma * on_labels) * used[None]
        noisy = r + sigma * on_rewards
        prompts = Prompt(x=x, y=y, query=jnp.broadcast_to(query, (H, *query.shape)))
        # least squares from the normal equations: pinv(X'X) X' = pinv(X), on a d x d problem
        deviations = Prompt(x=x, y=y - oracle_labels(x, mean), query=prompts.query)
        normal = Prompt(x=jnp.einsum("hid,hie->hde", x, x), y=jnp.einsum("hi,hid->hd", y, x), query=prompts.query)

        def by_stage(predict, *stagewise: Array, prompts: Prompt = prompts) -> Array:  # Qhat [H, S, A]
            return jax.vmap(lambda p, *a: predict(*a)(p))(prompts, *stagewise).reshape(H, S, A)

        Qhat = {
            LAYER: by_stage(predictors.closed_form, layers * (longest / M)),
            CENTERED: by_stage(predictors.closed_form, centered_layers * (longest / M), prompts=deviations)
            + jnp.einsum("sad,hd->hsa", family.phi, mean),
            BAYES: by_stage(lambda P: predictors.bayes(P, sigma), Psi),
            AFFINE: by_stage(lambda P, m: predictors.bayes(P, sigma, m), centered, mean),
            "OLS": by_stage(predictors.ols, prompts=normal),
            "ridge, lambda = 1": by_stage(lambda: predictors.ridge(1.0)),
            "LSVI": predictors.lsvi(family.phi, x, noisy, after, 1.0)[0],
            "PEVI": predictors.pevi(family.phi, x, noisy, after, 1.0, BETA),
            "layer on its own targets": own_targets(family.phi, layers, x, noisy, after, M),
        }
        pihat = jax.nn.one_hot(greedy(jnp.stack([Qhat[m] for m in METHODS[:-1]])), A, dtype=w.dtype)
        uniform = jnp.full((1, H, S, A), 1.0 / A)
        value = jax.vmap(lambda pi: mdp.rho @ policy_value(mdp, pi)[0])(jnp.concatenate([pihat, uniform]))
        return dict(zip(METHODS, mdp.rho @ plan.V[0] - value, strict=True))

    return jax.lax.map(one, tests, batch_size=32)
