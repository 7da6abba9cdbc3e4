"""Labels without an oracle: r + max_a Qhat_{h+1}(s', a) (in-context least-squares value iteration), and pessimism.

Residual of a stage: l_h = T_h Vhat_{h+1} - Qhat_h with (T_h V)(s,a) = r_h(s,a) + P_h(.|s,a)'V, Vhat_h = max_a Qhat_h and
Vhat_{H+1} = 0.
The decomposition of [JYW] Lemma 3.1, for pihat greedy in Qhat, is an equality:

    V*_1 - V^pihat_1 = sum_h E_{pi*}[l_h] - sum_h E_{pihat}[l_h] - sum_h E_{pi*}[Vhat_h(s) - Qhat_h(s, a)],

and the last sum is not negative. So errors of the stages add up; they are not multiplied through earlier stages.
Proofs: notes/offline.md.
"""

import jax.numpy as jnp
from jax import Array


def bellman_residual(P: Array, r: Array, Qhat: Array) -> Array:
    """l_h = r_h + P_h Vhat_{h+1} - Qhat_h.  P [H, S, A, S], r and Qhat [H, S, A] -> [H, S, A]."""
    V = jnp.max(Qhat, axis=-1)
    later = jnp.concatenate([V[1:], jnp.zeros_like(V[:1])])
    return r + jnp.einsum("hsat,ht->hsa", P, later) - Qhat


def suboptimality_decomposition(
    residual: Array, Qhat: Array, occupancy_star: Array, pi_star: Array, occupancy_hat: Array, pi_hat: Array
) -> tuple[Array, Array, Array]:
    """The three sums of the identity (optimal policy's residual, own residual, greed), SubOpt = first - second - third.

    residual, Qhat [H, S, A]; occupancies [H, S]; policies [H, S] integers, pi_hat greedy in Qhat  -> three numbers.
    """

    def under(values: Array, occupancy: Array, pi: Array) -> Array:
        return jnp.sum(occupancy * jnp.take_along_axis(values, pi[..., None], axis=-1)[..., 0])

    greed = jnp.max(Qhat, axis=-1, keepdims=True) - Qhat
    return (
        under(residual, occupancy_star, pi_star),
        under(residual, occupancy_hat, pi_hat),
        under(greed, occupancy_star, pi_star),
    )


def linear_bound(errors: Array) -> Array:
    """SubOpt <= 2 sum_h e_h with e_h = sup |l_h|; attained.  [..., H] -> [...].

    The textbook form, derived here from the identity; cf. Williams and Baird 1993 on discounted problems, 1/(1 - gamma) for H.
    """
    return 2.0 * jnp.sum(errors, axis=-1)


def span_bound(residual: Array) -> Array:
    """SubOpt <= sum_h span_{s,a} l_h <= 2 sum_h e_h (ours): a constant in l_h cancels between pi* and pihat.  [H, S, A] -> []."""
    return jnp.sum(jnp.max(residual, axis=(-2, -1)) - jnp.min(residual, axis=(-2, -1)))


def quadratic_bound(errors: Array) -> Array:
    """2 sum_h sum_{h' >= h} e_{h'} = 2 sum_h h e_h: valid, but a factor (H+1)/2 too large for equal e_h.  [..., H] -> [...]."""
    stage = jnp.arange(1, errors.shape[-1] + 1, dtype=errors.dtype)
    return 2.0 * jnp.sum(errors * jnp.broadcast_to(stage, errors.shape), axis=-1)


def pessimism_bound(occupancy_star: Array, pi_star: Array, uncertainty: Array) -> Array:
    """SubOpt <= 2 sum_h E_{pi*}[Gamma_h(s, a)] for PEVI, on the event |l_h before the penalty| <= Gamma_h ([JYW] Thm 4.2).

    occupancy_star [H, S], pi_star [H, S], uncertainty Gamma [H, S, A] -> [].
    """
    along = jnp.take_along_axis(uncertainty, pi_star[..., None], axis=-1)[..., 0]
    return 2.0 * jnp.sum(occupancy_star * along)


def feature_uncertainty(phi: Array, gram: Array, beta: Array | float) -> Array:
    """Gamma_h(s,a) = beta ||phi(s,a)||_{gram_h^{-1}} ([JYW] eq. (4.6)).  phi [S, A, d], gram [H, d, d] -> [H, S, A]."""
    S, A, d = phi.shape
    flat = phi.reshape(-1, d)
    solved = jnp.linalg.solve(gram, jnp.broadcast_to(flat.T, (*gram.shape[:-2], d, len(flat))))
    return beta * jnp.sqrt(jnp.einsum("nd,...dn->...n", flat, solved)).reshape(*gram.shape[:-2], S, A)
